"""think-vllm: thin KV blocks, pruned and quantized, paged, for stock vLLM.

Importing this package imports neither vLLM nor torch; vLLM finds it through the
``vllm.general_plugins`` entry point (see ``plugin.py``).
"""

__version__ = "0.1.0"

#: The vLLM release lines that this version extends. Any other one leaves the plugin inert.
VLLM_SERIES = ("0.32", "0.33")
#: The same, for people.
VLLM_VERSIONS = " or ".join(f"{series}.*" for series in VLLM_SERIES)
