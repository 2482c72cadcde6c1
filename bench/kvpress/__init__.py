"""The same prompts with kvpress, in an environment of its own (``requirements.txt``)."""
