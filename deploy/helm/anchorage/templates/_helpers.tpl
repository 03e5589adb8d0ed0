{{- define "anchorage.labels" -}}
app.kubernetes.io/name: anchorage
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "anchorage.selector" -}}
app.kubernetes.io/name: anchorage
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "anchorage.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "anchorage.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Environment variable with a value of the secret. Arguments: (list . VARIABLE KEY) */ -}}
{{- define "anchorage.secretVariable" -}}
- name: {{ index . 1 }}
  valueFrom: {secretKeyRef: {name: {{ (index . 0).Values.secret }}, key: {{ index . 2 }}}}
{{- end }}

{{- define "anchorage.redisAddress" -}}
{{- if .Values.redis.external -}}
{{ .Values.redis.external }}
{{- else -}}
{{ .Release.Name }}-redis:6379
{{- end -}}
{{- end }}

{{- define "anchorage.redisVariables" -}}
{{ include "anchorage.secretVariable" (list . "ANCHORAGE_REDIS_PASSWORD" "redis-password") }}
- name: ANCHORAGE_REDIS_HOST
  value: {{ include "anchorage.redisAddress" . | quote }}
{{- end }}

{{- define "anchorage.runsClaim" -}}
{{- default (printf "%s-runs" .Release.Name) .Values.runs.existingClaim -}}
{{- end }}

{{- define "anchorage.modelsMount" -}}
{{- if .Values.models.existingClaim }}
- {name: models, mountPath: /app/models, readOnly: true}
{{- end }}
{{- end }}

{{- define "anchorage.modelsVolume" -}}
{{- if .Values.models.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ .Values.models.existingClaim }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "anchorage.pull" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* What is compiled at first use. */ -}}
{{- define "anchorage.compiledVolume" -}}
{{- if .Values.cache.existingClaim }}
- name: compiled
  persistentVolumeClaim: {claimName: {{ .Values.cache.existingClaim }}}
{{- else }}
- {name: compiled, emptyDir: {sizeLimit: {{ .Values.cache.size }}}}
{{- end }}
{{- end }}

{{- define "anchorage.hostNetwork" -}}
{{- if .Values.nodes.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- end }}

{{- define "anchorage.objectStore" -}}
{{- if .Values.nodes.objectStoreBytes }}
object-store-memory: {{ printf "%d" (int64 .Values.nodes.objectStoreBytes) | quote }}
{{- end }}
{{- end }}

{{- /* Ends the pod with one line if the driver of its host is too old. Arguments: (list . KIND GPUS) */ -}}
{{- define "anchorage.driverCheck" -}}
{{- $gpus := index . 2 }}
{{- if $gpus }}
{{- with index . 0 }}
initContainers:
  - name: driver
    image: {{ .Values.image.node | quote }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [python, -m, anchorage.checks.cards, {{ index $ 1 }}]
    securityContext: {{- include "anchorage.containerSecurity" . | nindent 6 }}
    resources:
      requests: {cpu: 100m, memory: 256Mi}
      limits: {memory: 1Gi, nvidia.com/gpu: {{ $gpus }}}
{{- end }}
{{- end }}
{{- end }}

{{- /* Replace KubeRay's own probes, which query Ray's dashboard agent: the agent is not installed. Argument: the port. */ -}}
{{- define "anchorage.rayProbes" -}}
startupProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 5
  failureThreshold: 60
readinessProbe:
  tcpSocket: {port: {{ . }}}
livenessProbe:
  tcpSocket: {port: {{ . }}}
  failureThreshold: 6
{{- end }}
