"""The KV cache spec that tells vLLM which block manager a layer needs.

Importing this module registers the spec, and with it the scheduler's side. It is imported wherever
a spec is made (workers, through the attention backend) or unpickled (the engine core).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as

from think_vllm.hooks.engine import EnginePlan, check_head_sizes, selected_engine
from think_vllm.plan.spans import SpanRule


@dataclass(frozen=True, kw_only=True)
class ThinKVCacheSpec(FullAttentionSpec):
    """Full attention whose old spans shrink as ``rule`` says.

    The page size is that of a dense block: thin blocks live in the same pool.
    """

    #: When a span is thin.
    rule: SpanRule
    #: Tokens of a prompt's end that no prefix hit may cover; 0 if nothing is pruned.
    observation_window: int = 0
    #: Whether thin spans are cached.
    thin_prefixes: bool = True
    #: Whether the worker decides at a prompt's end if its request stays dense.
    limits_loss: bool = False
    #: Tokens that are scheduled before the first of them has been processed, at most.
    in_flight_tokens: int = 0

    def max_blocks(self, num_tokens: int) -> int:
        """Blocks that a request holds at once until it has ``num_tokens`` tokens, at most."""
        rule = self.rule
        dense = -(-num_tokens // rule.block_size)
        if not self._shrinks_always:
            return dense  # of a short prompt nothing may ever become thin
        # Blocks come back when a span's chunk has been processed, a span at a time.
        spans = rule.prompt_spans(max(0, num_tokens - self.in_flight_tokens))
        if spans < 2:
            return dense
        freed = rule.span_blocks - rule.thin_blocks
        # It may have held more just before the last of these spans was due.
        before = rule.due_position(spans - 1) + self.in_flight_tokens - 1
        peak = -(-before // rule.block_size) - (spans - 2) * freed
        return max(peak, dense - (spans - 1) * freed)

    @property
    def _shrinks_always(self) -> bool:
        """Whether old spans shrink while their prompt is computed, and ever after."""
        return self.rule.prune_prefill and self.rule.prune_decode

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Memory that a request of the longest length needs, as vLLM checks at start-up."""
        if not self._shrinks_always:
            dense: int = super().max_memory_usage_bytes(vllm_config)
            return dense
        most = self.max_blocks(vllm_config.model_config.max_model_len)
        return most * int(self.page_size_bytes)

    @classmethod
    def from_dense(cls, spec: FullAttentionSpec, engine: EnginePlan) -> ThinKVCacheSpec:
        """Extend the spec that vLLM made for a full-attention layer.

        Raises:
            ValueError: If its blocks are not those of the plan.
        """
        plan = engine.plan
        if spec.block_size != plan.block_size:
            raise ValueError(
                f"ThinKVCacheSpec: block_size is {spec.block_size}, the plan is made for blocks "
                f"of {plan.block_size} tokens"
            )
        extended: ThinKVCacheSpec = replace_as(
            spec,
            cls,
            rule=plan.rule,
            observation_window=plan.selection_window,
            limits_loss=plan.limits_loss,
            thin_prefixes=engine.thin_prefixes,
            in_flight_tokens=engine.in_flight_tokens,
        )
        return extended

    @classmethod
    def merge(cls, specs: list[Any]) -> ThinKVCacheSpec:
        """Merge the specs of one group, as vLLM's specs with own fields do.

        Raises:
            ValueError: If the specs disagree on a field of ours.
            AssertionError: If a spec is of another kind.
        """
        own = [f.name for f in fields(cls) if f.name not in _DENSE_FIELDS]
        first = specs[0]
        for spec in specs[1:]:
            if not isinstance(spec, ThinKVCacheSpec):
                # vLLM tests so whether layers are of one kind; those with a window are not.
                raise AssertionError(f"ThinKVCacheSpec.merge: {type(spec).__name__} is another")
            for name in own:
                if getattr(spec, name) != getattr(first, name):
                    raise ValueError(
                        f"ThinKVCacheSpec.merge: layers of one group differ in {name}: "
                        f"{getattr(first, name)} and {getattr(spec, name)}"
                    )
        merged = FullAttentionSpec.merge(
            [replace_as(spec, FullAttentionSpec, drop=own) for spec in specs]
        )
        dense = {name: getattr(merged, name) for name in _DENSE_FIELDS}
        kept: ThinKVCacheSpec = replace(first, **dense)
        return kept


def customize_spec(spec: Any) -> Any:
    """Make the spec of a layer: a ``ThinKVCacheSpec`` for full attention, else as it is.

    Raises:
        ThinkError: If the layer does not have the shape that the plan was made for.
    """
    if type(spec) is not FullAttentionSpec:
        return spec
    engine = selected_engine()
    check_head_sizes("thin KV blocks", spec, engine.plan)
    return ThinKVCacheSpec.from_dense(spec, engine)


_DENSE_FIELDS = frozenset(f.name for f in fields(FullAttentionSpec) if f.init)


def _register() -> None:
    # The one import from hooks into a room above them: what unpickles a spec needs its manager.
    from think_vllm.scheduler.registration import register

    register(ThinKVCacheSpec)


_register()
