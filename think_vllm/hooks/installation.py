"""Install the wrappers of ``PATCHES``: the one place that replaces methods of vLLM."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from think_vllm.hooks.backend import has_our_backend
from think_vllm.hooks.patches import PATCHES
from think_vllm.hooks.patches.patch import Role, locate

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MARK = "think_vllm_wrapped"


def install(role: Role) -> None:
    """Wrap what the processes of a role need wrapped; safe to call more than once.

    Raises:
        LookupError: If this vLLM lacks one of the targets.
    """
    for patch in PATCHES:
        if patch.role is role:
            owner, name = locate(patch.target)
            module, _, function = patch.where.partition(":")
            wrapper = getattr(importlib.import_module(f"think_vllm.{module}"), function)
            wrap_method(owner, name, wrapper, patch.engines_only)


def install_worker(vllm_config: VllmConfig) -> None:
    """Install what the workers of an engine need, by their model runner."""
    install(Role.WORKER_V2 if vllm_config.use_v2_model_runner else Role.WORKER_V1)


def wrap_method(
    owner: Any, name: str, wrapper: Callable[..., Any], engines_only: bool = False
) -> None:
    """Let ``wrapper(original, self, ...)`` stand in for a method, once.

    Args:
        owner: The class, or an object whose class it is.
        name: Of the method, which may be a class method.
        wrapper: Gets the original as a plain function.
        engines_only: Call the original alone for objects of engines without thin blocks.
    """
    owner = owner if isinstance(owner, type) else type(owner)
    declared = inspect.getattr_static(owner, name)
    is_class_method = isinstance(declared, classmethod)
    original = declared.__func__ if is_class_method else declared
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Several engines may live in one process, one after the other.
        if engines_only and not has_our_backend(self.vllm_config):
            return original(self, *args, **kwargs)
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)


def installed() -> list[str]:
    """Targets that are wrapped in this process."""
    targets = []
    for patch in PATCHES:
        if patch.role is not None and patch.target.partition(":")[0] in sys.modules:
            owner, name = locate(patch.target)
            if hasattr(getattr(owner, name), _MARK):
                targets.append(patch.target)
    return targets
