"""Attention over thin blocks on CPUs."""
