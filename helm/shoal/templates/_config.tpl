{{/*
What values say of Shoal's configuration, as JSON: paths in it -> the value that is the only place to set it.
*/}}
{{- define "shoal.owned" -}}
model.name: model.name
prefill.replicas: prefill.replicas
prefill.num_cpus: prefill.num_cpus
prefill.num_gpus: prefill.num_gpus
decode.replicas: decode.replicas
decode.num_cpus: decode.num_cpus
decode.num_gpus: decode.num_gpus
gateway.tls: gateway.tls.existingSecret
gateway.keys_file: apiKeys.existingSecret
handoff.host: ""
handoff.advertised_host: ""
gateway.host: ""
gateway.resource: ""
gateway.num_cpus: ""
metrics.host: ""
ray.address: ""
ray.app_name: ""
ray.join_timeout_s: ""
{{- end -}}

{{/* Ports and times that more than Shoal must know: its own defaults, under what config says. */}}
{{- define "shoal.shared" -}}
{{- $defaults := dict
  "gateway" (dict "port" 8000 "grpc_port" 9000 "deadline_s" 600.0)
  "metrics" (dict "port_range" (dict "first" 22000 "last" 22999))
  "handoff" (dict "drain_s" 2.0)
  "ray" (dict "stop_timeout_s" 60.0)
-}}
{{- mergeOverwrite $defaults (deepCopy .Values.config) | toJson -}}
{{- end -}}

{{/* The whole ShoalConfig tree. */}}
{{- define "shoal.config" -}}
{{- $gateway := dict "host" "0.0.0.0" "resource" "gateway" -}}
{{- if not (hasKey (default dict .Values.config.gateway) "reflection") -}}
{{- $_ := set $gateway "reflection" false -}}
{{- end -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $gateway "keys_file" "/etc/shoal/keys/keys.yaml" -}}
{{- end -}}
{{- with .Values.gateway.tls -}}
{{- if .existingSecret -}}
{{- $tls := dict "cert_file" "/etc/shoal/tls/tls.crt" "key_file" "/etc/shoal/tls/tls.key" -}}
{{- if .clientCa -}}{{- $_ := set $tls "client_ca_file" "/etc/shoal/tls/ca.crt" -}}{{- end -}}
{{- $_ := set $gateway "tls" $tls -}}
{{- end -}}
{{- end -}}
{{- $derived := dict
  "model" (dict "name" .Values.model.name)
  "gateway" $gateway
  "handoff" (dict "host" "auto")
  "metrics" (dict "host" "auto")
  "ray" (dict "address" "auto")
-}}
{{- $tls := dict "folder" "/etc/shoal/certs" -}}
{{- $_ := set $derived "tls" (ternary "off" $tls (eq (include "shoal.tlsFrom" .) "off")) -}}
{{- range $pool := list "prefill" "decode" -}}
{{- $_ := set $derived $pool (pick (index $.Values $pool) "replicas" "num_cpus" "num_gpus") -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .Values.config) $derived | toYaml -}}
{{- end -}}

{{- define "shoal.serveConfig" -}}
{{- $shared := include "shoal.shared" . | fromJson -}}
# Workers carry no proxy: clients come in by the head, where the gateway is.
proxy_location: HeadOnly
http_options:
  host: 0.0.0.0
  port: {{ $shared.gateway.port }}
logging_config:
  log_level: WARNING
  enable_access_log: false
applications:
  - name: shoal
    route_prefix: /
    import_path: shoal.cluster:build
    args:
      {{- include "shoal.config" . | nindent 6 }}
{{- end -}}
