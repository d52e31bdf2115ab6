{{- define "deltacome.name" -}}
{{- if contains "deltacome" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-deltacome{{ end -}}
{{- end }}

{{- define "deltacome.selector" -}}
app.kubernetes.io/name: deltacome
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "deltacome.labels" -}}
{{ include "deltacome.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "deltacome.claim" -}}
{{ .Values.volume.claim | default (include "deltacome.name" .) }}
{{- end }}
