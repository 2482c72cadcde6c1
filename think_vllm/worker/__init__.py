"""The attention backend: what happens to queries, keys and values in a forward pass."""
