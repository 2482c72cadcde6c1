"""Turn static pruning on for one engine: check its config, read its tables, complete it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from think_vllm.errors import FLAGS, ThinkError
from think_vllm.hooks.backend import claim_backend
from think_vllm.hooks.engine import Engine, describe_engine, find_engine
from think_vllm.hooks.engine_support import (
    check_cache_dtype,
    check_device,
    requested_block_size,
    unsupported_options,
)
from think_vllm.hooks.kv_cache import fix_block_size
from think_vllm.hooks.model_support import check_static_model
from think_vllm.plan.channel_tables import ChannelTables, tables_of
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WHO = "--kv-select static"


@dataclass(frozen=True)
class StaticEngine:
    """Static channels of an engine, for its layers."""

    plan: StaticPlan  # how many channels go
    tables: ChannelTables  # which ones


_selected: StaticEngine | None = None


def activate_static(config: ThinkConfig, vllm_config: VllmConfig) -> Engine | None:
    """Check and complete a config that asks for static pruning.

    Runs again whenever vLLM validates a config, so every step is idempotent.

    Returns:
        The engine; None if no channel of the model goes, and vLLM is left alone.

    Raises:
        ThinkError: If this engine cannot be served like that.
    """
    check_static(vllm_config)
    block_size = requested_block_size(vllm_config.cache_config)
    engine = describe_engine(config, vllm_config.model_config, block_size)
    # A wrong file is an error even where nothing would be read from it.
    tables_of(config, vllm_config.model_config)
    if engine.static is None:
        return None
    # As vLLM's own default would be reset whenever a config is validated again.
    fix_block_size(vllm_config.cache_config, engine.static.block_size)
    claim_backend(vllm_config)
    return engine


def remember_static(vllm_config: VllmConfig) -> StaticEngine:
    """Remember plan and tables of the engine whose layers are being built.

    vLLM builds layers with their engine's config at hand, and requests KV cache specs without it.

    Raises:
        RuntimeError: If that engine is not pruned statically.
    """
    global _selected
    engine = find_engine(vllm_config)
    if engine is None or not engine.config.is_static:
        raise RuntimeError("think-vllm: remember_static() for an engine without static pruning")
    if engine.static is None:
        raise RuntimeError("think-vllm: remember_static() for an engine that prunes nothing")
    _selected = StaticEngine(engine.static, tables_of(engine.config, vllm_config.model_config))
    return _selected


def selected_static() -> StaticEngine:
    """Plan and tables of the engine whose layers this process built last.

    Raises:
        RuntimeError: If none was built.
    """
    if _selected is None:
        raise RuntimeError("think-vllm: selected_static() before remember_static()")
    return _selected


def check_static(vllm_config: VllmConfig) -> None:
    """Reject what is not supported with static pruning.

    Raises:
        ThinkError: Naming the option or the property of the model, and the remedy.
    """
    check_device(vllm_config)
    check_static_model(vllm_config.model_config)
    cache_dtype = vllm_config.cache_config.cache_dtype
    check_cache_dtype(vllm_config.model_config, cache_dtype, vllm_config.quant_config)
    for name, _ in unsupported_options(vllm_config):
        raise ThinkError(
            f"{WHO} does not support {name} yet: it was not tested with blocks whose keys "
            f"are shorter than its values; leave it out, or serve without {FLAGS}"
        )
