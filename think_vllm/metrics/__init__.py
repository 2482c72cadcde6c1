"""Metrics of the pruned cache, counted where things happen and shown on vLLM's own ``/metrics``."""
