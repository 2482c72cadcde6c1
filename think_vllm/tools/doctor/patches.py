"""Private names of vLLM that think-vllm uses, and whether the installed vLLM has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from think_vllm.hooks.patches import PATCHES
from think_vllm.tools.doctor.finding import Finding, Level

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_patches() -> Iterator[Finding]:
    """Report every row of the table of patches.

    What this vLLM lacks stands in the way only on devices that need it.
    """
    from vllm.platforms import current_platform

    for patch in PATCHES:
        text = f"{patch.target} is {patch.kind.value}: {patch.why}"
        if patch.until:
            text += f"; until {patch.until}"
        if problem := patch.problem():
            is_needed = patch.device in (None, current_platform.device_type)
            level = Level.BAD if is_needed else Level.NOTE
            yield Finding(
                level, "patch", f"{problem}, which think_vllm.{patch.where} needs. {text}"
            )
        else:
            yield Finding(Level.GOOD, "patch", text)
