"""Load tests: plain vLLM and thin blocks in equal KV memory, under vLLM's own load generator."""
