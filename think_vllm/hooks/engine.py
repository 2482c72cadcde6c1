"""What an engine's flags make of its model: planned here, and in words, for all who ask.

The server, its block manager and its layers use this description, and so do ``think-vllm plan``,
``bench`` and ``doctor``: what they print is what is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from think_vllm.errors import ThinkError
from think_vllm.hooks.engine_support import (
    check_cache_dtype,
    check_loss_limit,
    requested_block_size,
)
from think_vllm.hooks.model_support import (
    AttentionLayers,
    attention_layers,
    check_model,
    check_static_model,
    window_summary,
)
from think_vllm.plan.additional_config import config_from_additional
from think_vllm.plan.block_plan import ChannelPlan
from think_vllm.plan.channel_tables import tables_of
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan, plan_static
from think_vllm.plan.summary import plan_fields, plan_summary, static_fields, static_summary

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


@dataclass(frozen=True)
class Engine:
    """An engine with thin blocks."""

    config: ThinkConfig  # the settings
    layers: AttentionLayers  # attention layers of its model by kind
    plan: BlockPlan | None = None  # of blocks that become thin; None if none does
    #: Of blocks that are narrow from the first token on; None if none is.
    static: StaticPlan | None = None

    def summary(self, prefix_caching: bool) -> list[str]:
        """The plan in a few lines that a person reads; none if nothing is pruned.

        Args:
            prefix_caching: Whether vLLM caches prefixes.
        """
        if self.static is not None:
            return static_summary(self.static, prefix_caching)
        if self.plan is None:
            return []
        return [*window_summary(self.layers), *plan_summary(self.plan, prefix_caching)]

    def fields(self, prefix_caching: bool) -> dict[str, Any] | None:
        """The plan as flat, JSON-ready fields; None if nothing is pruned.

        Args:
            prefix_caching: Whether vLLM caches prefixes.
        """
        if self.static is not None:
            return static_fields(self.static)
        return None if self.plan is None else plan_fields(self.plan, prefix_caching)


def find_engine(vllm_config: VllmConfig) -> Engine | None:
    """Describe an engine, the same in every process of it; None without our flags.

    Raises:
        ThinkError: If no plan fits.
    """
    config = config_from_additional(vllm_config.additional_config)
    if config is None:
        return None
    block_size = requested_block_size(vllm_config.cache_config)
    return describe_engine(config, vllm_config.model_config, block_size)


def describe_engine(
    config: ThinkConfig, model_config: ModelConfig, block_size: int | None
) -> Engine:
    """Describe the engines of a model.

    Args:
        config: The settings.
        model_config: vLLM's, of the model.
        block_size: Tokens of a block if the user chose them, else None.

    Raises:
        ThinkError: If no plan fits.
    """
    return _describe(
        config,
        attention_layers(model_config),
        model_config.get_head_size(),
        model_config.dtype.itemsize,
        block_size,
    )


def plan_engine(
    config: ThinkConfig,
    model_config: ModelConfig,
    block_size: int | None,
    *,
    cache_dtype: str,
    parallel: Any,
) -> Engine:
    """Describe the engines of a model that none is started for.

    What depends on the model is checked as at the start of an engine; what depends on the device
    is not, since the plan may be for another machine.

    Args:
        config: What is asked for.
        model_config: vLLM's, of the model.
        block_size: Tokens of a block if the user chose them, else None.
        cache_dtype: ``--kv-cache-dtype``.
        parallel: What has ``tensor_parallel_size`` and ``pipeline_parallel_size``.

    Raises:
        ThinkError: If the model cannot be served like that, or no plan fits.
    """
    check_model(model_config)
    check_cache_dtype(model_config, cache_dtype)
    if config.is_static:
        check_static_model(model_config)
        tables_of(config, model_config)
    engine = describe_engine(config, model_config, block_size)
    if config.limits_loss:
        check_loss_limit(parallel)
    return engine


@lru_cache(maxsize=16)
def _describe(
    config: ThinkConfig,
    layers: AttentionLayers,
    head_size: int,
    itemsize: int,
    block_size: int | None,
) -> Engine:
    if config.is_static:
        return Engine(config, layers, static=plan_static(config, head_size, itemsize, block_size))
    if layers.window:
        # Beside them vLLM may cut a hit in the middle of a thin span.
        config = config.model_copy(update={"kv_prefix_cache": "dense"})
    return Engine(config, layers, plan=plan_blocks(config, head_size, itemsize, block_size))


@dataclass(frozen=True)
class EnginePlan:
    """The plan of an engine, for its KV cache specs."""

    plan: BlockPlan  # how its blocks are pruned and quantized
    thin_prefixes: bool  # whether prefix caching keeps thin spans
    #: Tokens that are scheduled before the first of them has been processed, at most.
    in_flight_tokens: int


_selected: EnginePlan | None = None


def remember_plan(vllm_config: VllmConfig) -> BlockPlan:
    """Find the plan of the engine whose layers are being built.

    VLLM builds layers with their engine's config at hand, and requests KV cache specs without it,
    so what these need is remembered in between.

    Raises:
        RuntimeError: If that engine has no thin blocks.
    """
    global _selected
    engine = find_engine(vllm_config)
    if engine is None or engine.plan is None:
        raise RuntimeError("think-vllm: remember_plan() for an engine without thin blocks")
    plan = engine.plan
    _selected = EnginePlan(
        plan=plan,
        thin_prefixes=plan.config.kv_prefix_cache == "thin",
        in_flight_tokens=vllm_config.max_in_flight_tokens,
    )
    return plan


def selected_engine() -> EnginePlan:
    """The plan of the engine whose layers this process built last.

    Raises:
        RuntimeError: If none was built.
    """
    if _selected is None:
        raise RuntimeError("think-vllm: selected_engine() before remember_plan()")
    return _selected


def check_head_sizes(who: str, spec: Any, plan: ChannelPlan) -> None:
    """Reject a layer that does not have the shape that the plan was made for.

    Args:
        who: What asks for that shape.
        spec: vLLM's, of the layer.
        plan: The engine's.

    Raises:
        ThinkError: If a head has another size.
    """
    if spec.head_size != plan.head_size or spec.head_size_v != plan.head_size:
        raise ThinkError(
            f"{who}: an attention layer has head sizes {spec.head_size} (keys) and "
            f"{spec.head_size_v} (values), the plan was made for {plan.head_size}; models whose "
            "heads differ are not supported"
        )
