"""A stand-in for vLLM's ``flash_attn_varlen_func``, in plain torch and as strict."""

from dataclasses import dataclass, field

import torch


@dataclass
class FlashAttention:
    """Attends causally, as a partial of the real one with ``causal=True`` does.

    Args:
        fresh: Lengths of the prompts of each call over a step's own keys.
        paged: Queries and tokens of the contexts of each call over pages.
    """

    fresh: list[list[int]] = field(default_factory=list)
    paged: list[list[tuple[int, int]]] = field(default_factory=list)

    def __call__(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        softcap: float,
        cu_seqlens_k: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
    ) -> None:
        assert (cu_seqlens_k is None) != (seqused_k is None)
        assert (block_table is None) == (seqused_k is None)
        assert softcap == 0.0
        assert q.dtype == k.dtype == v.dtype == out.dtype
        assert all(x.stride(-1) == 1 for x in (q, k, v, out))
        counts = cu_seqlens_q.diff().tolist()
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max(counts)
        assert sum(counts) == q.shape[0] == out.shape[0]
        if block_table is None:
            assert torch.equal(cu_seqlens_q, cu_seqlens_k)
            assert max_seqlen_k == max_seqlen_q
            self.fresh.append(counts)
            lengths = counts
            contexts = list(zip(k.split(counts), v.split(counts), strict=True))
        else:
            assert seqused_k.dtype == block_table.dtype == torch.int32
            assert block_table.stride(1) == 1
            assert seqused_k.shape == (len(counts),) == block_table.shape[:1]
            lengths = seqused_k.tolist()
            assert max_seqlen_k == max(lengths)
            size = k.shape[1]
            assert size % 16 == 0
            assert block_table.shape[1] * size >= max_seqlen_k
            self.paged.append(list(zip(counts, lengths, strict=True)))
            # Whole blocks are read.
            tables = [
                row[: -(-n // size)].long() for row, n in zip(block_table, lengths, strict=True)
            ]
            contexts = [(k[blocks].flatten(0, 1), v[blocks].flatten(0, 1)) for blocks in tables]
        parts = zip(q.split(counts), contexts, out.split(counts), lengths, strict=True)
        for query, (keys, values), answer, length in parts:
            answer[:] = _attend(query, keys, values, length, softmax_scale)


def _attend(query, keys, values, length, scale):
    """The last queries of a context of ``length`` tokens; what lies behind it weighs zero."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    position = length - query.shape[0] + torch.arange(query.shape[0], device=query.device)
    hidden = torch.arange(keys.shape[0], device=query.device) > position[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=2)
    # As on a GPU, zero times a NaN is a NaN.
    return torch.einsum("hqk,khd->qhd", weights, values)
