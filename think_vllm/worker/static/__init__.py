"""Attention over statically pruned blocks."""
