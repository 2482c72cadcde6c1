"""Turn thin blocks on for one engine: check its config, plan its blocks, complete it."""

from __future__ import annotations

import logging
import multiprocessing
from typing import TYPE_CHECKING

from think_vllm import VLLM_VERSIONS, __version__
from think_vllm.errors import REMEDY, ThinkError
from think_vllm.hooks.backend import claim_backend
from think_vllm.hooks.engine import describe_engine
from think_vllm.hooks.engine_support import (
    check_engine,
    check_loss_limit,
    is_cpu,
    requested_block_size,
)
from think_vllm.hooks.installation import install
from think_vllm.hooks.kv_cache import fix_block_size
from think_vllm.hooks.patches.patch import Role
from think_vllm.hooks.static_engine import activate_static
from think_vllm.plan.additional_config import config_from_additional
from think_vllm.plan.settings import ThinkConfig, prune_flags
from think_vllm.plan.summary import COUNTED_DENSE, context_hint, never_thin

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.think_vllm")


def activate(vllm_config: VllmConfig) -> None:
    """Check and complete a config with thin blocks; leave any other one alone.

    Runs again whenever vLLM validates a config, so every step is idempotent.

    Raises:
        ThinkError: If this engine cannot be served with thin blocks.
    """
    config = config_from_additional(vllm_config.additional_config)
    if config is None or vllm_config.model_config is None:
        return
    if config.is_static:
        static = activate_static(config, vllm_config)
        if static is None:
            _say_off(config)
        else:
            _say(static.summary(vllm_config.cache_config.enable_prefix_caching))
            install(Role.FRONT_END)
            if not is_cpu():
                _warn_of_gpus()
        return
    check_engine(vllm_config)
    # Before it is ours. When vLLM validates a config again, the hint has been given.
    user_block_size = requested_block_size(vllm_config.cache_config)
    engine = describe_engine(config, vllm_config.model_config, user_block_size)
    plan = engine.plan
    if config.limits_loss:
        check_loss_limit(vllm_config.parallel_config)
    if plan is None:
        _say_off(config)
        return
    cache_config = vllm_config.cache_config
    fix_block_size(cache_config, plan.block_size)
    if cache_config.enable_prefix_caching and not config.allows_prefix_caching:
        cache_config.enable_prefix_caching = False
        logger.info(
            "think-vllm: --kv-evict h2o adds up all queries of a prompt, so each is computed "
            "whole; prefix caching is off"
        )
    claim_backend(vllm_config)
    install(Role.FRONT_END)
    install(Role.REPORTS)
    if not is_cpu():
        _warn_of_gpus()
    lines = [*engine.summary(cache_config.enable_prefix_caching), COUNTED_DENSE]
    longest = vllm_config.model_config.max_model_len
    _say(never_thin(plan, longest), logging.WARNING)
    if longest < config.kv_plan_context:
        lines += context_hint(plan, longest, user_block_size)
    _say(lines)


def reject_version(vllm_config: VllmConfig) -> None:
    """Stand-in for ``activate`` on a vLLM that this version does not extend.

    Raises:
        ThinkError: If the config requests thin blocks.
    """
    if config_from_additional(vllm_config.additional_config) is None:
        return
    import vllm

    raise ThinkError(
        f"thin KV blocks: think-vllm {__version__} works with vLLM {VLLM_VERSIONS}, this is "
        f"{vllm.__version__}; install one of those. {REMEDY}"
    )


def _say_off(config: ThinkConfig) -> None:
    logger.info(
        "think-vllm: %s prunes no channel of this model, and --kv-quant is none; thin KV "
        "blocks are off",
        prune_flags(config),
    )


def _say(lines: list[str], level: int = logging.INFO) -> None:
    """Log the plan, once per start of a server: every API server and engine process has it."""
    is_first = multiprocessing.parent_process() is None
    for line in lines:
        logger.log(level if is_first else logging.DEBUG, "think-vllm: %s", line)


def _warn_of_gpus() -> None:
    logger.warning(
        "think-vllm %s: the GPU kernels were tested in an interpreter; no GPU has run them "
        "yet. Compare answers with a server without these flags (docs/gpu.md)",
        __version__,
    )
