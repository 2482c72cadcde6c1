"""Command line: the flags, and the ``think-vllm`` program."""
