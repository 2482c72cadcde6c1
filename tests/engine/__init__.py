"""Tests of vLLM's engine with thin blocks, in the process of the tests."""
