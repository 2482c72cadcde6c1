"""Kernels over dense and thin blocks, one package per device."""
