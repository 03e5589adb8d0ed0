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

{{- /* Replace KubeRay's own probes, which query Ray's dashboard agent: the agent is not installed. */ -}}
{{- define "anchorage.rayProbes" -}}
startupProbe:
  tcpSocket: {port: 6380}
  periodSeconds: 5
  failureThreshold: 60
readinessProbe:
  tcpSocket: {port: 6380}
livenessProbe:
  tcpSocket: {port: 6380}
  failureThreshold: 6
{{- end }}
