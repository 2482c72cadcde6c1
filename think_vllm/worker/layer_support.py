"""What an attention layer may ask for, and we do not have."""

from collections.abc import Iterable
from typing import Any

from think_vllm.errors import REMEDY, ThinkError


def reject_options(who: str, options: Iterable[tuple[Any, str]]) -> None:
    """Reject a layer with an option that is not supported.

    Args:
        who: Rejects.
        options: Values with their names; those that are None were not asked for.

    Raises:
        ThinkError: Naming the first one that was.
    """
    for value, name in options:
        if value is not None:
            raise ThinkError(
                f"{who}: an attention layer has {name}, which is not supported. {REMEDY}"
            )
