"""Triton kernels for thin and dense KV blocks on NVIDIA GPUs.

Imports torch and triton, never vLLM: launchers take tensors and a ``BlockPlan``, check both, and
trust the kernels; kernels trust their launchers. The byte layout is that of
``think_vllm/plan/layout.py``, the rules are those of ``think_vllm/kernels/reference/``.
"""
