"""Numbers only: settings, layouts, spans, plans. Imports neither torch nor vLLM."""
