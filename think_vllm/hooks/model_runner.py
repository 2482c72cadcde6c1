"""Requests of a step, row by row, as vLLM's model runners know them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from think_vllm.hooks.installation import install_worker
from think_vllm.plan.request import dense_rule, request_override
from think_vllm.plan.spans import SpanRule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Counts leading spans that came thin from the prefix cache: of rows of blocks, int32 [n, W], and
#: how many tokens of each have been computed, int64 [n]. Returns int64 [n].
CountCached = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int64]], npt.NDArray[np.int64]]

_step_rows: StepRows | None = None
_rule: SpanRule | None = None
_count_cached: CountCached | None = None
#: Of the V2 runner's requests that have any, since they were admitted.
_cached_spans: dict[str, int] = {}
#: Of requests that override the engine's rule.
_own_rules: dict[str, SpanRule] = {}
#: Requests whose fallback to dense blocks has been decided.
_resolved: set[str] = set()


@dataclass(frozen=True)
class StepRows:
    """Requests of the step that a model runner prepares, row by row."""

    request_ids: Sequence[str]  # of each row without padding
    prompt_lens: npt.NDArray[np.int64]  # int64 [n]. Tokens of each row's prompt
    #: int64 [n]. Leading spans of each that came thin from the prefix cache.
    cached_spans: npt.NDArray[np.int64]
    known: Container[str]  # ids of all requests that the runner still knows
    #: Rules of the rows whose requests override that of the engine.
    own: Mapping[int, SpanRule] = field(default_factory=dict)


def step_rows() -> StepRows | None:
    """Rows of the step that is being prepared; None if it is a dummy without requests.

    Known after ``track_rows``.
    """
    return _step_rows


def is_resolved(name: str) -> bool:
    """Whether a request's fallback to dense blocks has been decided."""
    return name in _resolved


def resolve(decisions: Mapping[str, bool]) -> None:
    """Remember until they end which requests stay dense, and which do not.

    Args:
        decisions: Whether each stays dense, by its id.
    """
    _resolved.update(decisions)
    if _rule is not None:
        dense = dense_rule(_rule)
        _own_rules.update((name, dense) for name, stays in decisions.items() if stays)


def track_rows(vllm_config: VllmConfig, rule: SpanRule, count_cached: CountCached | None) -> None:
    """Fill ``step_rows`` from now on, and keep prompts out of full decode graphs.

    Called by metadata builders: their runner's module has been imported by then.

    Args:
        vllm_config: Of the engine.
        rule: Of the engine.
        count_cached: Counts cached thin spans; there is one group of layers then. None if the
            engine caches none.
    """
    global _count_cached, _rule, _step_rows
    _count_cached, _rule, _step_rows = count_cached, rule, None
    _own_rules.clear()
    _resolved.clear()
    install_worker(vllm_config)


def _observe_v2(original: Any, runner: Any, scheduler_output: Any, dummy_run: bool) -> Any:
    global _step_rows
    batch, uniform_tokens = original(runner, scheduler_output, dummy_run)
    if batch is None:
        _step_rows = None
        return batch, uniform_tokens
    known = runner.req_states.req_id_to_index
    _admit(scheduler_output.scheduled_new_reqs, known)
    _admit_own(scheduler_output.scheduled_new_reqs, known)
    _step_rows = StepRows(
        request_ids=batch.req_ids,
        prompt_lens=runner.req_states.prompt_len.np[batch.idx_mapping_np].astype(np.int64),
        cached_spans=np.array([_cached_spans.get(name, 0) for name in batch.req_ids], np.int64),
        known=known,
        own=_own_rows(batch.req_ids),
    )
    return batch, None if batch.has_prefill else uniform_tokens


def _admit(requests: Sequence[Any], known: Container[str]) -> None:
    """Count the cached thin spans of requests that are new or resumed."""
    for request in requests:
        # Of another request with this id, or of the same one before it was preempted.
        _cached_spans.pop(request.req_id, None)
        if _count_cached is None or request.num_computed_tokens == 0:
            continue
        (blocks,) = request.block_ids
        computed = np.array([request.num_computed_tokens], np.int64)
        (count,) = _count_cached(np.array([blocks], np.int32), computed)
        if count:
            _cached_spans[request.req_id] = int(count)
    if requests:
        for name in [name for name in _cached_spans if name not in known]:
            del _cached_spans[name]


def _admit_v1(original: Any, runner: Any, scheduler_output: Any) -> Any:
    result = original(runner, scheduler_output)
    if scheduler_output.scheduled_new_reqs:
        _admit_own(scheduler_output.scheduled_new_reqs, runner.requests)
    return result


def _admit_own(requests: Sequence[Any], known: Container[str]) -> None:
    """Note the overrides of requests that are new or, with V2, resumed."""
    for request in requests:
        _own_rules.pop(request.req_id, None)  # of another request with this id
        _resolved.discard(request.req_id)
        params = request.sampling_params
        if _rule is not None and params is not None and params.extra_args:
            own = request_override(_rule, params.extra_args)
            if own is not None:
                _own_rules[request.req_id] = own
    if requests and _own_rules:
        for name in [name for name in _own_rules if name not in known]:
            del _own_rules[name]
    if requests and _resolved:
        _resolved.intersection_update([name for name in _resolved if name in known])


def _own_rows(names: Sequence[str]) -> Mapping[int, SpanRule]:
    if not _own_rules:
        return {}
    return {row: _own_rules[name] for row, name in enumerate(names) if name in _own_rules}


def _observe_v1(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    global _step_rows
    if kwargs.get("force_uniform_decode") is not None:  # a dummy run
        _step_rows = None
        return original(runner, *args, **kwargs)
    rows = runner.input_batch
    prompt_lens = rows.num_prompt_tokens[: rows.num_reqs].astype(np.int64)
    computed = rows.num_computed_tokens_cpu[: rows.num_reqs].astype(np.int64)
    cached_spans = np.zeros_like(computed)
    if _count_cached is not None:
        blocks = rows.block_table[0].get_numpy_array()[: rows.num_reqs]
        cached_spans = _count_cached(blocks, computed)
    names = tuple(rows.req_ids)
    _step_rows = StepRows(names, prompt_lens, cached_spans, runner.requests, _own_rows(names))
    if (computed < prompt_lens).any():
        kwargs["force_uniform_decode"] = False
    return original(runner, *args, **kwargs)
