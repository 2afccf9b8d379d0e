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
{{- end -}}
{{- $grace := include "shoal.grace" . | int -}}
{{- if lt (int .Values.drain.deadline_s) $grace -}}
  {{- fail (printf "drain.deadline_s: must be at least %d, the time in which a replica closes (twice config.handoff.drain_s, and 2 s)" $grace) -}}
{{- end -}}
{{- end -}}

{{/* Seconds in which a replica finishes and closes, as shoal.app.graph has it. */}}
{{- define "shoal.grace" -}}
{{- $shared := include "shoal.shared" . | fromJson -}}
{{- addf (mulf 2 $shared.handoff.drain_s) 2 | ceil -}}
{{- end -}}
