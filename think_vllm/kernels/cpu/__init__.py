"""CPU kernels in numba. They know bytes and block tables, nothing of vLLM.

Launchers (``decode_attention``, ``compact_spans`` ...) take tensors and a plan, validate, and
hand flat arrays and plain integers to the compiled functions, which trust them. Arguments
are brought to one form first, so that each element type compiles exactly once.
"""
