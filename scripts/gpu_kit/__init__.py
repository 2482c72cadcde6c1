"""Stock vLLM's CUDA build, packed for a machine that has a GPU and torch but no package index."""
