{{/* Refuses values that contradict one another, or that are of no use. What has a wrong type the schema refuses. */}}
{{- define "shoal.validate" -}}
{{- range $path, $value := include "shoal.owned" . | fromYaml -}}
  {{- $parts := splitList "." $path -}}
  {{- if hasKey (default dict (get $.Values.config (first $parts))) (last $parts) -}}
    {{- if $value -}}
      {{- fail (printf "config.%s: set %s instead, which is also what Kubernetes goes by" $path $value) -}}
    {{- else -}}
      {{- fail (printf "config.%s: leave it out, the chart sets it as a pod needs it" $path) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- include "shoal.validatePorts" . -}}
{{- include "shoal.validateSecrets" . -}}
{{- range $part := list "head" "prefill" "decode" -}}
  {{- if lt (include "shoal.bytes" (get $.Values $part).shmSize | float64) (include "shoal.objectStore" $ | float64) -}}
    {{- fail (printf "%s.shmSize: must be at least %s bytes, the size of Ray's object store" $part (include "shoal.objectStore" $)) -}}
  {{- end -}}
{{- end -}}
{{- $shared := include "shoal.shared" . | fromJson -}}
{{- range $pool := list "prefill" "decode" -}}
  {{- $values := index $.Values $pool -}}
  {{- if hasKey $values "autoscaling" -}}
    {{- fail (printf "%s.autoscaling: pools don't scale by themselves yet: set %s.replicas" $pool $pool) -}}
  {{- end -}}
  {{- range $kind := list "requests" "limits" -}}
    {{- if hasKey (default dict (get $values.resources $kind)) $values.gpuResource -}}
      {{- fail (printf "%s.resources.%s: set %s.num_gpus instead of %s" $pool $kind $pool $values.gpuResource) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- with .Values.model -}}
  {{- if and .existingClaim (not (hasPrefix (printf "%s/" .mountPath) .name)) -}}
    {{- fail (printf "model.name: with model.existingClaim it must be a path below %s, such as %s/my-model" .mountPath .mountPath) -}}
  {{- end -}}
{{- end -}}
{{- with .Values.gateway.tls -}}
  {{- if and .clientCa (not .existingSecret) -}}
    {{- fail "gateway.tls.clientCa: needs gateway.tls.existingSecret, a Secret with tls.crt, tls.key and ca.crt" -}}
  {{- end -}}
  {{- if and .existingSecret (not (int $shared.gateway.grpc_port)) -}}
    {{- fail "gateway.tls.existingSecret: of no use while config.gateway.grpc_port is 0, which means no gRPC" -}}
  {{- end -}}
{{- end -}}
{{- with .Values.gcsFaultTolerance -}}
  {{- if and .existingSecret (not .redisAddress) -}}
    {{- fail "gcsFaultTolerance.existingSecret: needs gcsFaultTolerance.redisAddress" -}}
  {{- end -}}
  {{- if and .redisAddress $.Values.networkPolicy.enabled (not $.Values.networkPolicy.egress) -}}
    {{- fail "gcsFaultTolerance.redisAddress: the network policy would keep the head from it: allow it with networkPolicy.egress" -}}
  {{- end -}}
{{- end -}}
{{- with .Values.networkPolicy -}}
  {{- $type := $.Values.gateway.service.type -}}
  {{- $clients := .clients | default list | toJson -}}
  {{- if and .enabled (ne $type "ClusterIP") (has $clients (list "[]" (list (dict "podSelector" dict) | toJson))) -}}
    {{- fail (printf "gateway.service.type: the network policy would keep out whom a %s brings in: name them with networkPolicy.clients, such as [{ipBlock: {cidr: 203.0.113.0/24}}]" $type) -}}
  {{- end -}}
{{- end -}}
{{- $grace := include "shoal.grace" . | int -}}
{{- if lt (int .Values.drain.deadline_s) $grace -}}
  {{- fail (printf "drain.deadline_s: must be at least %d, the time in which a replica finishes and closes (config.ray.stop_timeout_s, config.handoff.drain_s, and 2 s)" $grace) -}}
{{- end -}}
{{- end -}}

{{/* Certificates come from one place, and keys are for those, too, who ask for the operator. */}}
{{- define "shoal.validateSecrets" -}}
{{- if hasKey .Values.config "tls" -}}
  {{- fail "config.tls: set tls.from instead, which is also where pods get their certificates from" -}}
{{- end -}}
{{- $from := include "shoal.tlsFrom" . -}}
{{- range $role, $secret := .Values.tls.secrets -}}
  {{- if and (eq $from "secrets") (not $secret) -}}
    {{- fail (printf "tls.secrets.%[1]s: name a Secret with ca.crt, tls.crt and tls.key, for %[1]s.shoal.internal" $role) -}}
  {{- else if and (ne $from "secrets") $secret -}}
    {{- fail (printf "tls.secrets.%s: of no use unless tls.from is secrets" $role) -}}
  {{- end -}}
{{- end -}}
{{- if and (eq $from "cert-manager") (not .Values.tls.issuer.name) -}}
  {{- fail "tls.issuer.name: name an issuer of cert-manager's, one that signs for nobody else" -}}
{{- else if and (ne $from "cert-manager") .Values.tls.issuer.name -}}
  {{- fail "tls.issuer.name: of no use unless tls.from is cert-manager" -}}
{{- end -}}
{{- with .Values.apiKeys -}}
  {{- if and .existingSecret (not .clientSecret) -}}
    {{- fail "apiKeys.clientSecret: name a Secret with metrics-key and test-key: Prometheus and helm test need keys, too" -}}
  {{- else if and .clientSecret (not .existingSecret) -}}
    {{- fail "apiKeys.clientSecret: of no use without apiKeys.existingSecret" -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* Seconds in which a replica finishes and closes, as stop_s of shoal.cluster.graph has it. */}}
{{- define "shoal.grace" -}}
{{- $shared := include "shoal.shared" . | fromJson -}}
{{- addf $shared.ray.stop_timeout_s $shared.handoff.drain_s 2 | ceil -}}
{{- end -}}

{{/* Each process must be able to listen. */}}
{{- define "shoal.validatePorts" -}}
{{- $shared := include "shoal.shared" . | fromJson -}}
{{- if not (int $shared.gateway.port) -}}
  {{- fail "config.gateway.port: must not be 0: a Service has to know it" -}}
{{- end -}}
{{- $taken := dict
  "6379" "Ray's GCS"
  "8080" "Ray, for its own metrics,"
  "8265" "Ray's dashboard"
  "10001" "Ray's server for its client"
  "44217" "Ray's autoscaler, for its metrics,"
  "44227" "Ray's dashboard, for its metrics,"
  "52365" "Ray's agent"
-}}
{{- range $key := list "port" "grpc_port" -}}
  {{- $port := get $shared.gateway $key | int | toString -}}
  {{- with get $taken $port -}}
    {{- fail (printf "config.gateway.%s: %s listens on %s already" $key . $port) -}}
  {{- end -}}
  {{- $_ := set $taken $port (printf "config.gateway.%s" $key) -}}
{{- end -}}
{{- range $section := list "metrics" "handoff" -}}
  {{- with get (default dict (get $.Values.config $section)) "port_range" -}}
    {{- if lt (int .last) (int .first) -}}
      {{- fail (printf "config.%s.port_range: last (%d) is below first (%d)" $section (int .last) (int .first)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* A size as Kubernetes writes it, in bytes. */}}
{{- define "shoal.bytes" -}}
{{- $units := dict
  "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776
-}}
{{- if kindIs "string" . -}}
{{- mulf (regexFind "^[0-9.]+" . | float64) (get $units (regexFind "[a-zA-Z]*$" .)) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}
