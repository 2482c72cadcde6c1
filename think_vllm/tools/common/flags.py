"""Parse flags of a server that one of our options has as one quoted string."""

import shlex

from think_vllm.errors import ThinkError


def split_arguments(text: str, option: str) -> tuple[str, ...]:
    """Split arguments as a shell does; errors begin with the command and its option.

    Raises:
        ThinkError: If quotes do not match.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ThinkError(f"{option} {text!r}: {error}") from None


def split_flags(text: str, option: str) -> tuple[str, ...]:
    """Split flags as a shell does; errors begin with the command and its option.

    Raises:
        ThinkError: If quotes do not match, or there is no flag.
    """
    flags = split_arguments(text, option)
    if not flags or not flags[0].startswith("-"):
        raise ThinkError(
            f"{option} {text!r} holds no flags; write them in quotes, as in "
            f'{option.split()[-1]} "--kv-channel-prune 0.5 --kv-quant k4v2"'
        )
    return flags
