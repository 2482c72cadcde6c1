"""Attention over thin blocks on NVIDIA GPUs."""
