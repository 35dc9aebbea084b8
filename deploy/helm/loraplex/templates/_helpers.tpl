{{/* Name of everything. A StatefulSet's must be short: Kubernetes puts a hash behind it, in a label. */}}
{{- define "loraplex.name" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels that pods are found by; they never change. */}}
{{- define "loraplex.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "loraplex.adminSecret" -}}
{{- .Values.adminKey.existingSecret | default (printf "%s-admin" (include "loraplex.name" .)) -}}
{{- end -}}

{{/* Whether /metrics answers without a key: "true", or nothing. */}}
{{- define "loraplex.openMetrics" -}}
{{- if eq (get .Values.settings "METRICS_WITHOUT_KEY" | toString | lower) "true" -}}true{{- end -}}
{{- end -}}

{{/* Whether there may be more than one server: "true", or nothing. */}}
{{- define "loraplex.several" -}}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) -}}true{{- end -}}
{{- end -}}

{{/* A value as text. Helm reads numbers as floats, and would write a million as 1e+06. */}}
{{- define "loraplex.text" -}}
{{- if kindIs "float64" . -}}
{{- if eq (floor .) . -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}
