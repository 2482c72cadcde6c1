"""``think-vllm calibrate``: channel tables of a model."""
