"""All that this package uses of vLLM and that is no documented extension point, and why.

``hooks/installation.py`` installs what is wrapped, ``think-vllm doctor`` prints the table, and
``tests/plugin/test_patches.py`` holds it against the installed vLLM and against our own code.
"""

from think_vllm.hooks.patches import front_end, metrics, scheduler, worker
from think_vllm.hooks.patches.patch import Patch

PATCHES: tuple[Patch, ...] = (
    *front_end.PATCHES,
    *metrics.PATCHES,
    *scheduler.PATCHES,
    *worker.PATCHES,
)
