"""What a figure was measured on."""

from think_vllm.tools.common.machine import this_machine


def describe_machine() -> str:
    """One line: date, processor, threads, versions."""
    return str(this_machine())
