"""FlashAttention in plain torch, as strict as vLLM's own about what it is called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils

#: Version of FlashAttention that is found, as on compute capability 9.0.
VERSION = 3
#: Pages of FlashAttention 2 hold a multiple of this many tokens, and heads of this many channels.
PAGE_MULTIPLE, HEAD_MULTIPLE = 16, 8
#: Its loads are this wide, so all strides but that of channels are multiples.
LOAD_BYTES = 16


@dataclass
class FlashStandIn:
    """Stands for ``vllm.vllm_flash_attn.flash_attn_varlen_func``, and remembers its calls."""

    #: The only one that it takes. The real one has no float32, in which tests compare.
    dtype: torch.dtype = torch.float32
    #: Lengths of the prompts of each call over their own keys.
    fresh: list[list[int]] = field(default_factory=list)
    #: Queries and tokens of each request of each call over pages.
    paged: list[list[tuple[int, int]]] = field(default_factory=list)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        max_seqlen_q: int,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_k: int,
        cu_seqlens_k: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        block_table: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        fa_version: int = 2,
    ) -> None:
        """Attend; parameters are those of vLLM's function that we pass."""
        assert causal is True
        assert fa_version == VERSION
        assert isinstance(softmax_scale, float)
        assert out is not None
        assert out.shape == q.shape
        paged = block_table is not None
        assert (cu_seqlens_k is None) == paged == (seqused_k is not None)
        num_requests = cu_seqlens_q.numel() - 1
        for tensor in (q, k, v, out):
            assert tensor.dtype == self.dtype
            assert tensor.shape[-1] == q.shape[2]
            assert tensor.stride(-1) == 1
            assert all(x * tensor.itemsize % LOAD_BYTES == 0 for x in tensor.stride()[:-1])
            assert tensor.data_ptr() % LOAD_BYTES == 0
        assert k.shape == v.shape
        assert q.shape[1] % k.shape[-2] == 0
        assert q.shape[2] % HEAD_MULTIPLE == 0
        for numbers in (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table):
            assert numbers is None or numbers.dtype == torch.int32
        for number in (max_seqlen_q, max_seqlen_k):
            assert type(number) is int
        starts = cu_seqlens_q.tolist()
        assert starts[0] == 0
        assert starts[-1] == q.shape[0]
        counts = cu_seqlens_q.diff().tolist()
        assert 0 < max(counts) <= max_seqlen_q
        if block_table is None:
            assert cu_seqlens_k is not None
            assert torch.equal(cu_seqlens_q, cu_seqlens_k)
            assert k.dim() == 3
            assert k.shape[0] == q.shape[0]
            lengths = counts
            contexts = list(zip(k.split(counts), v.split(counts), strict=True))
            self.fresh.append(counts)
        else:
            assert seqused_k is not None
            assert seqused_k.shape == (num_requests,)
            assert k.dim() == 4
            assert k.shape[1] % PAGE_MULTIPLE == 0
            assert block_table.shape[0] == num_requests
            assert block_table.stride(1) == 1
            lengths = seqused_k.tolist()
            assert block_table.shape[1] * k.shape[1] >= max(lengths)
            contexts = [
                (_whole_pages(k, row, length), _whole_pages(v, row, length))
                for row, length in zip(block_table, lengths, strict=True)
            ]
            self.paged.append(list(zip(counts, lengths, strict=True)))
        assert max(lengths) <= max_seqlen_k
        for i, (keys, values) in enumerate(contexts):
            rows = slice(starts[i], starts[i + 1])
            out[rows] = _attend(q[rows], keys, values, lengths[i], softmax_scale, softcap)


@contextmanager
def found(flash: FlashStandIn | None) -> Iterator[None]:
    """Let layers that are built find a FlashAttention, or none."""
    version = None if flash is None else VERSION
    with (
        patch.object(type(current_platform), "is_cuda", return_value=True),
        patch.object(fa_utils, "get_flash_attn_version", return_value=version),
        patch.object(fa_utils, "flash_attn_varlen_func", flash, create=True),
    ):
        yield


def _whole_pages(part: torch.Tensor, row: torch.Tensor, length: int) -> torch.Tensor:
    """Tokens of a context up to the end of its last page, ``[tokens, Hk, D]``."""
    return part[row[: -(-length // part.shape[1])].long()].flatten(0, 1)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """The last ``len(query)`` of ``length`` tokens; what lies behind weighs 0, NaN or not."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1).double() for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(length - len(query), length, device=query.device)
    token = torch.arange(len(keys), device=query.device)
    scores = scores.masked_fill(token[None] > position[:, None], -torch.inf)
    answer = torch.einsum("hqk,khd->qhd", scores.softmax(2), values)
    return answer.to(query.dtype)
