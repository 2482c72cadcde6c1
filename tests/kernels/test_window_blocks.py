"""Sliding-window layers in blocks that others have used."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.support.vllm_kernel import vllm_attention
from think_vllm.worker.cpu.window import WindowCPUImpl

BLOCK, HEADS, SIZE = 48, 2, 64


def make_impl() -> Any:
    impl: Any = object.__new__(WindowCPUImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    return impl


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_what_a_block_held_before_stays_out(chunk: int) -> None:
    layer: Any = SimpleNamespace(isa="vec16", _k_scale_float=1.0, _v_scale_float=1.0)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 67, HEADS, SIZE, generator=generator)
    query = torch.randn(1, 4, SIZE, generator=generator)
    table = torch.tensor([[2, 1]], dtype=torch.int32)
    slots = torch.cat([2 * BLOCK + torch.arange(BLOCK), BLOCK + torch.arange(67 - BLOCK)])
    answers = []
    for before in (0.0, torch.nan):
        cache = torch.full((3, HEADS, BLOCK, 2 * SIZE), before)
        for first in range(0, 67, chunk):
            part = slice(first, first + chunk)
            make_impl().do_kv_cache_update(layer, key[part], value[part], cache, slots[part])
        run, out = vllm_attention(query, cache, table, [1], [67], 0.125, "vec16")
        run()
        answers.append(out)
        assert bool(cache[0].isnan().any()) == (before != 0.0)
    assert answers[0].isfinite().all()
    assert torch.equal(*answers)
