"""Parts of a step on the CPU, in the form that vLLM's kernel and ours take."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from think_vllm.kernels.cpu.decode import DecodeRows
from think_vllm.worker.cpu.scratch import PromptScratch
from think_vllm.worker.eviction_step import Pack, Watched
from think_vllm.worker.step import Int32Array, Int64Array, Prefill, Step, Wave
from think_vllm.worker.tokens import Tokens, token_range


@dataclass(frozen=True)
class QueryRows:
    """Queries that attend to thin and dense blocks.

    Args:
        tokens: Where they are.
        rows: One entry per query.
    """

    tokens: Tokens
    rows: DecodeRows


@dataclass(frozen=True)
class WaveRows:
    """A wave in the form that the kernels take.

    Args:
        due_request: int32 [n]. Rows of the batch with a span to compact.
        due_span: int32 [n]. That span.
        due_kept: bool [n]. Whether its channels were kept at the prompt's end.
        queries: The wave's queries.
        packs: Prompts to pack before that.
    """

    due_request: Int32Array
    due_span: Int32Array
    due_kept: npt.NDArray[np.bool_]
    queries: QueryRows
    packs: list[Pack] = field(default_factory=list)


@dataclass(frozen=True)
class PrefillPart:
    """Prompt queries that one call of vLLM's kernel serves.

    Args:
        metadata: vLLM's own.
        tokens: Where the queries are.
        scratch: Blocks to attend to instead of the cache, None for the cache.
        tails: In the cache, the block of each prompt's last query and the tokens stored in it,
            unless it is full.
    """

    metadata: CPUAttentionMetadata
    tokens: Tokens
    scratch: PromptScratch | None
    tails: list[tuple[int, int]]


@dataclass(frozen=True)
class ThinkCPUMetadata:
    """One step, shared by the layers of a group.

    Args:
        step: The sorted batch.
        block_table: int32 [num_reqs, width]. Blocks of each request.
        prompt_lens: int64 [num_reqs]. Tokens of each request's prompt.
        prefill: The step's prompt queries that see dense blocks only, in at most two parts.
        context: Its other prompt queries, None for none.
        waves: The step's waves.
        wave_table: The block table that their queries' rows are of.
        watched: Prompt queries that choose tokens.
        known: Ids of the requests that the runner knows.
        names: Ids of the step's requests, if prompts ask for theirs.
    """

    step: Step
    block_table: torch.Tensor
    prompt_lens: Int64Array
    prefill: list[PrefillPart]
    context: QueryRows | None
    waves: list[WaveRows]
    wave_table: torch.Tensor
    watched: list[Watched] = field(default_factory=list)
    known: Container[str] = ()
    names: Sequence[str] = ()


def prefill_common(
    common: CommonAttentionMetadata, prefill: Prefill, block_table: torch.Tensor
) -> CommonAttentionMetadata:
    """The batch as if it held nothing but these prompt queries."""
    query_start = np.concatenate(([0], np.cumsum(prefill.num_tokens))).astype(np.int32)
    starts = torch.from_numpy(query_start)
    return common.replace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.from_numpy(prefill.seq_len.astype(np.int32)),
        num_reqs=int(prefill.request.size),
        num_actual_tokens=int(query_start[-1]),
        max_query_len=int(prefill.num_tokens.max()),
        max_seq_len=int(prefill.seq_len.max()),
        block_table_tensor=block_table,
    )


def split_prefill(prefill: Prefill | None) -> tuple[Prefill | None, QueryRows | None]:
    """Prompts that see dense blocks only, and queries of those that see thin ones too."""
    if prefill is None or not prefill.thin_spans.any():
        return prefill, None
    thin = prefill.thin_spans > 0
    chosen = prefill.choose(thin)
    token = chosen.tokens()
    first = np.repeat(chosen.seq_len - chosen.num_tokens - chosen.first_token, chosen.num_tokens)
    context = _query_rows(
        token,
        np.repeat(chosen.request, chosen.num_tokens),
        token + first + 1,
        np.repeat(chosen.thin_spans, chosen.num_tokens),
    )
    return (None if thin.all() else prefill.choose(~thin)), context


def wave_rows(wave: Wave) -> WaveRows:
    """A wave without prompts to pack."""
    return WaveRows(
        due_request=np.asarray(wave.due_request, np.int32),
        due_span=np.asarray(wave.due_span, np.int32),
        due_kept=np.asarray(wave.due_kept, np.bool_),
        queries=_query_rows(wave.token, wave.request, wave.seq_len, wave.thin_spans),
    )


def _query_rows(
    token: Int64Array, request: Int64Array, seq_len: Int64Array, thin_spans: Int64Array
) -> QueryRows:
    # Queries come request by request, which need not be token order.
    order = np.argsort(token, kind="stable")
    return QueryRows(
        tokens=token_range(token[order]),
        rows=DecodeRows(
            request=request[order].astype(np.int32),
            seq_len=seq_len[order].astype(np.int32),
            thin_spans=thin_spans[order].astype(np.int32),
        ),
    )
