"""Whose rows a step has, as vLLM's GPU model runners know it; see the ledger in ``compat.py``."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from think_vllm.compat import wrap_method

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Counts leading spans that came thin from the prefix cache: of rows of blocks, int32 [n, W], and
#: how many tokens of each have been computed, int64 [n]. Returns int64 [n].
CountCached = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int64]], npt.NDArray[np.int64]]

_step_rows: StepRows | None = None
_count_cached: CountCached | None = None
#: Of the V2 runner's requests that have any, since they were admitted.
_cached_spans: dict[str, int] = {}


@dataclass(frozen=True)
class StepRows:
    """Whose rows the step has that a CUDA model runner prepares.

    Args:
        request_ids: Of each row; padding has none.
        prompt_lens: int64 [n]. Tokens of each row's prompt.
        cached_spans: int64 [n]. Leading spans of each that came thin from the prefix cache.
        known: Ids of all requests that the runner still knows.
    """

    request_ids: Sequence[str]
    prompt_lens: npt.NDArray[np.int64]
    cached_spans: npt.NDArray[np.int64]
    known: Container[str]


def step_rows() -> StepRows | None:
    """Rows of the step that is being prepared; None if it is a dummy without requests.

    Known after ``watch_runner``.
    """
    return _step_rows


def watch_runner(vllm_config: VllmConfig, count_cached: CountCached | None) -> None:
    """Fill ``step_rows`` from now on, and keep prompts out of full decode graphs.

    Called by metadata builders: their runner's module has been imported by then.

    Args:
        vllm_config: Of the engine.
        count_cached: Counts cached thin spans; there is one group of layers then. None if the
            engine caches none.
    """
    global _count_cached
    _count_cached = count_cached
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu import model_runner as v2

        wrap_method(v2.GPUModelRunner, "gather_batch_req_state", _watch_v2)
    else:
        from vllm.v1.worker import gpu_model_runner as v1

        wrap_method(v1.GPUModelRunner, "_determine_batch_execution_and_padding", _watch_v1)


def _watch_v2(original: Any, runner: Any, scheduler_output: Any, dummy_run: bool) -> Any:
    global _step_rows
    batch, uniform_tokens = original(runner, scheduler_output, dummy_run)
    if batch is None:
        _step_rows = None
        return batch, uniform_tokens
    known = runner.req_states.req_id_to_index
    _admit(scheduler_output.scheduled_new_reqs, known)
    _step_rows = StepRows(
        request_ids=batch.req_ids,
        prompt_lens=runner.req_states.prompt_len.np[batch.idx_mapping_np].astype(np.int64),
        cached_spans=np.array([_cached_spans.get(name, 0) for name in batch.req_ids], np.int64),
        known=known,
    )
    return batch, None if batch.has_prefill else uniform_tokens


def _admit(requests: Sequence[Any], known: Container[str]) -> None:
    """Count the cached thin spans of requests that are new or resumed."""
    for request in requests:
        # Whoever had this id before, or what the same request had before it was preempted.
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


def _watch_v1(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    global _step_rows
    if kwargs.get("force_uniform_decode") is not None:  # dummy runs say what they are
        _step_rows = None
        return original(runner, *args, **kwargs)
    rows = runner.input_batch
    prompt_lens = rows.num_prompt_tokens[: rows.num_reqs].astype(np.int64)
    computed = rows.num_computed_tokens_cpu[: rows.num_reqs].astype(np.int64)
    cached_spans = np.zeros_like(computed)
    if _count_cached is not None:
        blocks = rows.block_table[0].get_numpy_array()[: rows.num_reqs]
        cached_spans = _count_cached(blocks, computed)
    _step_rows = StepRows(tuple(rows.req_ids), prompt_lens, cached_spans, runner.requests)
    if (computed < prompt_lens).any():
        kwargs["force_uniform_decode"] = False
    return original(runner, *args, **kwargs)
