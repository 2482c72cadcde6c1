{{- define "think-vllm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "think-vllm.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "think-vllm.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "think-vllm.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "think-vllm.selectorLabels" -}}
app.kubernetes.io/name: {{ include "think-vllm.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "think-vllm.labels" -}}
{{ include "think-vllm.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "think-vllm.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "think-vllm.cacheClaim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "think-vllm.fullname" .)) }}
{{- end }}

{{- /* What follows `vllm serve`, one argument a line. */}}
{{- define "think-vllm.arguments" -}}
- {{ .Values.model | quote }}
{{- with .Values.think }}
{{- if .enabled }}
{{- if .channelPrune }}
- --kv-channel-prune={{ .channelPrune }}
{{- end }}
{{- if .valuePrune }}
- --kv-value-prune={{ .valuePrune }}
{{- end }}
{{- if ne .select "think" }}
- --kv-select={{ .select }}
{{- end }}
{{- if ne .channelTables "prompt" }}
- --kv-channel-tables={{ .channelTables }}
{{- end }}
{{- if .channelTablesFile }}
- --kv-channel-tables-file={{ .channelTablesFile }}
{{- end }}
{{- if ne .quant "none" }}
- --kv-quant={{ .quant }}
{{- end }}
{{- if .quantGroup }}
- --kv-quant-group={{ int .quantGroup }}
{{- end }}
{{- if not (kindIs "invalid" .recentWindow) }}
- --kv-recent-window={{ int .recentWindow }}
{{- end }}
{{- if .observationWindow }}
- --kv-observation-window={{ int .observationWindow }}
{{- end }}
{{- if .planContext }}
- --kv-plan-context={{ int .planContext }}
{{- end }}
{{- if not .pruneDecode }}
- --no-kv-prune-decode
{{- end }}
{{- if ne .prefixCache "thin" }}
- --kv-prefix-cache={{ .prefixCache }}
{{- end }}
{{- if .prunePrefill }}
- --kv-prune-prefill
{{- end }}
{{- if .pruneMaxLoss }}
- --kv-prune-max-loss={{ .pruneMaxLoss }}
{{- end }}
{{- if ne .evict "none" }}
- --kv-evict={{ .evict }}
{{- end }}
{{- if .evictBudget }}
- --kv-evict-budget={{ int .evictBudget }}
{{- end }}
{{- end }}
{{- end }}
- --max-model-len={{ int .Values.maxModelLen }}
- --gpu-memory-utilization={{ .Values.gpuMemoryUtilization }}
- --tensor-parallel-size={{ int .Values.tensorParallelSize }}
- --shutdown-timeout={{ max 0 (sub .Values.terminationGracePeriodSeconds 15) }}
{{- if .Values.trustRemoteCode }}
- --trust-remote-code
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}
