"""Programs of the GPU check that launch kernels, on what there is."""

import sys
from unittest.mock import MagicMock

import pytest
import torch
import triton

from bench.gpu_attention import memory_needed, think_kernel
from bench.gpu_check.compilations import launch_all
from bench.gpu_check.kernel import compact_again
from bench.gpu_rivals import RIVALS, flash_kernel, int4_kernel, rows_of, take, torch_kernel
from bench.support.plans import plan_of


def finite_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 64, (num_bytes,), dtype=torch.uint8, device=device)


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_every_kernel_is_launched(quant, device):
    launch_all(plan_of(quant), (4, 2), batch=2, spans=1, device=device)


def test_compaction_repeats_itself(device):
    assert compact_again(plan_of("fp8"), times=1, device=device, spans=1) == 0


def test_our_kernel_over_memory_that_is_shared(device):
    query = torch.randn(2, 4, 128, device=device).to(torch.bfloat16)
    memory = finite_memory(memory_needed(2, 500, 2, 128), device)
    plan = plan_of("none")
    kernel = think_kernel(plan)(query, 2, 500, memory)
    kernel.run()
    spans = plan.rule.prompt_spans(500)
    assert spans > 0
    dense = 2 * 500 * 2 * 2 * 128 * 2
    assert dense / 2 < kernel.num_bytes < dense


def test_int4_kernel_of_vllm(device, monkeypatch):
    from vllm.v1.attention.ops import int4_per_token_head

    # vLLM's CPU build has no kernels of Triton: what would be launched is looked at instead.
    launched = MagicMock()
    for name in ("_attn_packed", "reduce_segments"):
        monkeypatch.setattr(int4_per_token_head, name, launched)
    monkeypatch.setattr(int4_per_token_head, "triton", triton)
    query = torch.randn(2, 4, 128, device=device).to(torch.bfloat16)
    kernel = int4_kernel(query, 2, 40, finite_memory(2**17, device))
    kernel.run()
    told = launched.__getitem__.return_value.call_args_list[0].kwargs
    assert (told["HEAD_SIZE"], told["PACKING_FACTOR"], told["IS_3D"]) == (128, 2, True)
    # Bytes of a token in a head: 64 of keys, their scale, 64 of values, theirs.
    assert told["stride_k_cache_1"] == told["stride_v_cache_1"] == 2 * (64 + 4)
    assert told["stride_ks_slot"] == 2 * (64 + 4) // 4
    assert kernel.num_bytes == 2 * 40 * 2 * 2 * (64 + 4)


def test_torch_kernel(device):
    query = torch.randn(2, 4, 128, device=device).to(torch.bfloat16)
    kernel = torch_kernel(query, 2, 40, finite_memory(2**18, device))
    assert kernel.run().shape == (2, 4, 1, 128)
    assert kernel.num_bytes == 2 * 2 * 40 * 2 * 128 * 2


@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
def test_flash_attention(dtype, device, monkeypatch):
    fake = MagicMock()
    fake.is_fa_version_supported = lambda version: version == 3
    for name in ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, fake)
    assert set(RIVALS) >= {"FlashAttention 3", "FlashAttention 3, fp8 cache"}
    query = torch.randn(2, 4, 128, device=device).to(torch.bfloat16)
    memory = finite_memory(2**18, device)
    with pytest.raises(RuntimeError, match="FlashAttention 2 does not load"):
        flash_kernel(2, dtype)(query, 2, 40, memory)
    kernel = flash_kernel(3, dtype)(query, 2, 40, memory)
    kernel.run()
    (given, keys, values), told = fake.flash_attn_varlen_func.call_args
    assert given.dtype == keys.dtype == values.dtype == (dtype or torch.bfloat16)
    assert keys.shape == (6, 16, 2, 128)
    assert ("q_descale" in told) == (dtype is not None)
    assert kernel.num_bytes == 2 * 2 * 40 * 2 * 128 * keys.itemsize


def test_rows(device):
    rows = rows_of(torch.zeros(3, 4, 128, device=device), 40)
    assert (rows.num_blocks, rows.table.shape, rows.starts.tolist()) == (9, (3, 3), [0, 1, 2, 3])
    assert sorted(rows.table.flatten().tolist()) == list(range(9))
    with pytest.raises(ValueError, match="take 24 bytes; there are 20"):
        take(torch.zeros(20, dtype=torch.uint8), (2, 3), torch.float32)
