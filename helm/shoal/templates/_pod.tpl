{{/*
A worker group of KubeRay's from one pool's values: (dict "root" . "pool" "prefill"). Both pools come out of this.
*/}}
{{- define "shoal.workerGroup" -}}
{{- $values := index .root.Values .pool -}}
{{- $pods := add $values.replicas $values.spare -}}
groupName: {{ .pool }}
replicas: {{ $pods }}
minReplicas: {{ $pods }}
maxReplicas: {{ $pods }}
rayStartParams:
  # One replica a pod at most: those that are spare carry none.
  num-cpus: {{ ceil $values.num_cpus | int | quote }}
  num-gpus: {{ $values.num_gpus | quote }}
  object-store-memory: {{ include "shoal.objectStore" . | quote }}
  resources: {{ dict .pool 1 | toJson | quote | squote }}
template:
  {{- include "shoal.pod" (dict "root" .root "component" .pool "values" $values) | nindent 2 }}
{{- end -}}

{{/* Bytes of /dev/shm for what Ray passes by reference, which is little here. Its own choice is a third of memory. */}}
{{- define "shoal.objectStore" -}}134217728{{- end -}}

{{/* The pod of the head or of a pool: (dict "root" . "component" "head" "values" .Values.head). */}}
{{- define "shoal.pod" -}}
{{- $root := .root -}}
{{- $values := .values -}}
{{- $own := dict "app.kubernetes.io/component" .component -}}
metadata:
  labels:
    {{- mergeOverwrite (deepCopy $values.labels) (include "shoal.labels" $root | fromYaml) $own | toYaml | nindent 4 }}
  annotations:
    {{- /* KubeRay compares pods alone, and not all of them: without this, it would leave new numbers of replicas and new
    tolerations aside, and have Serve restart all replicas where they are for anything else that changes. It writes the
    Service's spec only where it turns it to another cluster, and its annotations never again. */}}
    {{- $others := list $root.Values.gateway.service.type $root.Values.prefill.spare $root.Values.decode.spare }}
    checksum/config: {{ list (include "shoal.config" $root) $values.tolerations $others | toJson | sha256sum }}
    {{- with $values.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "shoal.serviceAccount" $root }}
  automountServiceAccountToken: false
  # Otherwise every Service of the namespace becomes variables of every pod.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $root.Values.drain.deadline_s (include "shoal.grace" $root | int) 10 }}
  securityContext:
    runAsNonRoot: true
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
    # A volume of weights has many files, and they are only read.
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- $selector := dict "matchLabels" (merge (include "shoal.selector" $root | fromYaml) $own) }}
    {{- range . }}
    - {{ ternary . (merge (dict "labelSelector" $selector) .) (hasKey . "labelSelector") | toYaml | indent 6 | trim }}
    {{- end }}
  {{- end }}
  containers:
    {{- include "shoal.container" . | nindent 4 }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $values.shmSize }}}
    {{- with $root.Values.model.existingClaim }}
    - name: model
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
    {{- if and (eq .component "head") $root.Values.gateway.tls.existingSecret }}
    - name: tls
      secret: {secretName: {{ $root.Values.gateway.tls.existingSecret }}}
    {{- end }}
    {{- if ne (include "shoal.tlsFrom" $root) "off" }}
    - name: certs
      secret: {secretName: {{ include "shoal.tlsSecret" (dict "root" $root "role" (include "shoal.role" .)) }}, defaultMode: 0440}
    {{- end }}
    {{- if and (eq .component "head") $root.Values.apiKeys.existingSecret }}
    - name: keys
      secret: {secretName: {{ $root.Values.apiKeys.existingSecret }}, defaultMode: 0440}
    {{- end }}
{{- end -}}

{{/* What Shoal's process in a pod is: the head carries the gateway. */}}
{{- define "shoal.role" -}}
{{- ternary "gateway" .component (eq .component "head") -}}
{{- end -}}

{{/* KubeRay adds `ray start`, the token, and what else is its own. */}}
{{- define "shoal.container" -}}
{{- $head := eq .component "head" -}}
{{- $shared := include "shoal.shared" .root | fromJson -}}
- name: ray-{{ .component }}
  image: {{ include "shoal.image" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  securityContext:
    {{- include "shoal.securityContext" (dict "capabilities" (and .root.Values.rdma.enabled (not $head))) | nindent 4 }}
  env:
    {{- include "shoal.env" . | nindent 4 }}
    {{- with .values.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    {{- if $head }}
    - {name: gcs-server, containerPort: 6379}
    - {name: dashboard, containerPort: 8265}
    # KubeRay makes Services of the ports that begin with "serve".
    - {name: serve, containerPort: {{ $shared.gateway.port }}}
    {{- with int $shared.gateway.grpc_port }}
    - {name: serve-grpc, containerPort: {{ . }}}
    {{- end }}
    {{- end }}
    - {name: health, containerPort: 52365}
    - {name: shoal-metrics, containerPort: {{ $shared.metrics.port_range.first }}}
  {{- include "shoal.probes" . | nindent 2 }}
  {{- if not $head }}
  lifecycle:
    preStop:
      exec:
        command:
          {{- include "shoal.drain" .root | nindent 10 }}
  {{- end }}
  resources:
    {{- include "shoal.resources" .values | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    {{- if .root.Values.model.existingClaim }}
    - {name: model, mountPath: {{ .root.Values.model.mountPath }}, readOnly: true}
    {{- end }}
    {{- if and $head .root.Values.gateway.tls.existingSecret }}
    - {name: tls, mountPath: /etc/shoal/tls, readOnly: true}
    {{- end }}
    {{- if ne (include "shoal.tlsFrom" .root) "off" }}
    - {name: certs, mountPath: /etc/shoal/certs/{{ include "shoal.role" . }}, readOnly: true}
    {{- end }}
    {{- if and $head .root.Values.apiKeys.existingSecret }}
    - {name: keys, mountPath: /etc/shoal/keys, readOnly: true}
    {{- end }}
{{- end -}}

{{- define "shoal.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if .capabilities }}
  add: [IPC_LOCK]
  {{- end }}
{{- end -}}

{{- define "shoal.env" -}}
# The root file system is read-only, and the user may have no name in the image.
- {name: HOME, value: /tmp}
- {name: USER, value: shoal}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# A replica whose engine hangs is ended at once: it can't finish its answers, and holds what its successor needs.
- {name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS, value: "1"}
# Replicas log a line a request, and Ray by itself keeps all of it: each log is three files of 32 MiB at most.
- {name: RAY_ROTATION_MAX_BYTES, value: "33554432"}
- {name: RAY_ROTATION_BACKUP_COUNT, value: "2"}
{{- end -}}

{{/*
KubeRay's own readiness probe of a worker asks for a Serve proxy, which no worker has here: it would never be ready.
Whether the pools serve is what the gateway's /readyz says.
*/}}
{{- define "shoal.probes" -}}
startupProbe:
  httpGet: {path: /api/healthz, port: health}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 150
readinessProbe:
  httpGet: {path: /api/healthz, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 10
livenessProbe:
  httpGet: {path: /api/healthz, port: health}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 24
{{- end -}}

{{/* Serve starts the replica elsewhere, if a spare pod is there, and stops it here; the pod stays until it is gone. */}}
{{- define "shoal.drain" -}}
- sh
- -c
- |
  ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod goes away' \
    --deadline-remaining-seconds {{ .Values.drain.deadline_s }} || exit 0
  while grep -qs '^ray::ServeReplica:shoal:' /proc/[0-9]*/cmdline; do sleep 1; done
{{- end -}}

{{- define "shoal.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .num_gpus -}}
{{- $gpus := dict .gpuResource (toString .num_gpus) -}}
{{- $resources = merge $resources (dict "limits" $gpus) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
