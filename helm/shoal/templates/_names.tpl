{{- define "shoal.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* KubeRay appends up to 20 characters to a RayService's name. */}}
{{- define "shoal.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What Prometheus and the alerts call this release. */}}
{{- define "shoal.job" -}}
{{- default (include "shoal.fullname" .) .Values.monitoring.job -}}
{{- end -}}

{{- define "shoal.selector" -}}
app.kubernetes.io/name: {{ include "shoal.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "shoal.labels" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "shoal.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "shoal.serviceAccount" -}}
{{- default (ternary (include "shoal.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{/* helm, cert-manager, secrets, or off, which YAML reads as false. */}}
{{- define "shoal.tlsFrom" -}}
{{- $from := toString .Values.tls.from -}}
{{- ternary "off" $from (eq $from "false") -}}
{{- end -}}

{{/* The Secret with a role's certificate: (dict "root" . "role" "decode"). */}}
{{- define "shoal.tlsSecret" -}}
{{- default (printf "%s-%s-tls" (include "shoal.fullname" .root) .role) (get .root.Values.tls.secrets .role) -}}
{{- end -}}

{{/* Whether an optional object is made: (list . "auto|true|false" "api/version/Kind") gives "yes" or nothing. */}}
{{- define "shoal.wanted" -}}
{{- $root := index . 0 -}}
{{- $wanted := toString (index . 1) -}}
{{- if or (eq $wanted "true") (and (eq $wanted "auto") ($root.Capabilities.APIVersions.Has (index . 2))) -}}
yes
{{- end -}}
{{- end -}}

{{/* The gRPC port of a Service: (dict "root" . "port" 9000). */}}
{{- define "shoal.grpcPort" -}}
name: serve-grpc
port: {{ .port }}
targetPort: serve-grpc
{{- if not .root.Values.gateway.tls.existingSecret }}
appProtocol: kubernetes.io/h2c
{{- end }}
{{- end -}}
