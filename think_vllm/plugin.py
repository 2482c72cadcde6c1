"""Entry point of the ``vllm.general_plugins`` group: runs in every process of vLLM.

It only installs hooks. Nothing of ours runs in a forward pass, and neither attention, blocks
nor kernels are imported, unless a config asks for thin blocks.
"""

import contextlib
import logging

from think_vllm import VLLM_VERSIONS, __version__
from think_vllm.errors import FLAGS

# A child of vLLM's logger, so that vLLM's handlers and levels apply.
logger = logging.getLogger("vllm.think_vllm")


def register() -> None:
    """Install the hooks; safe to call more than once."""
    from think_vllm.hooks.installation import install
    from think_vllm.hooks.patches.patch import Role
    from think_vllm.hooks.platform import supported_vllm

    if supported_vllm():
        install(Role.PLUGIN)
        install(Role.BACKEND)
        return
    import vllm

    logger.warning(
        "think-vllm %s extends vLLM %s, this is vLLM %s: %s are off",
        __version__,
        VLLM_VERSIONS,
        vllm.__version__,
        FLAGS,
    )
    # Its platform class may have other hooks; users without our flags must not notice.
    with contextlib.suppress(LookupError):
        install(Role.PLUGIN)
