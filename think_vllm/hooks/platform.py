"""Wrappers of vLLM's platform: our flags in its parsers, our checks of its configs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from think_vllm import VLLM_SERIES
from think_vllm.errors import ThinkError
from think_vllm.hooks.activation import activate, reject_version
from think_vllm.hooks.command_line import ends_in_one_line
from think_vllm.hooks.flags import add_flags

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def supported_vllm() -> bool:
    """Whether the installed vLLM is of a series that this version extends."""
    import vllm

    version: str = vllm.__version__
    return any(version == series or version.startswith(series + ".") for series in VLLM_SERIES)


def pre_register_and_update(
    original: Callable[..., None], platform: Any, parser: argparse.ArgumentParser | None = None
) -> None:
    """Add our flags to a parser of vLLM's engine arguments."""
    original(platform, parser)
    if parser is not None:
        add_flags(parser)


def check_and_update_config(
    original: Callable[..., None], platform: Any, vllm_config: VllmConfig
) -> None:
    """Check and complete a config that asks for thin blocks.

    Raises:
        ThinkError: If it cannot be served.
        SystemExit: In its place, if the flags came from a command line.
    """
    original(platform, vllm_config)
    try:
        if supported_vllm():
            activate(vllm_config)
        else:
            reject_version(vllm_config)
    except ThinkError as error:
        if ends_in_one_line():
            # Instead of the traceback through pydantic and the server.
            sys.stderr.write(f"think-vllm: error: {error}\n")
            raise SystemExit(2) from None
        raise
