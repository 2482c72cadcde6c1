"""Tests of vLLM's engine with thin blocks, without a server."""
