"""Every touch of vLLM: where this plugin takes part in its configuration, requests and metrics."""
