"""What the CUDA side overrides, wraps or calls in vLLM; see ``test_vllm_contract.py``.

Its modules are imported here on the CPU too. Where they cannot be, or say only inside a function
what they have, their source is read.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.support import source
from tests.support.contract import tight
from tests.support.flash import FlashStandIn
from think_vllm.hooks.model_runner import step_rows, track_rows
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.token_selection import split_runs

FLASH = "vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func"


def test_vllm_flash_attention_takes_what_our_stand_in_takes() -> None:
    parameters = source.parameters(source.find(FLASH))
    taken = list(inspect.signature(FlashStandIn.__call__).parameters)[1:]
    assert [name for name in parameters if name in taken] == taken
    # tests/triton calls the stand-in as we do.
    passed = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k"]
    passed += ["block_table", "softmax_scale", "softcap", "causal", "fa_version"]
    assert set(passed) <= set(taken)


def test_vllm_flash_attention_reads_our_dense_blocks() -> None:
    kv_cache = torch.arange(3 * 2 * 16 * 128).view(3, 2, 16, 128)
    keys, values = kv_cache.transpose(1, 2).split(64, dim=-1)
    ours = split_runs(kv_cache, SimpleNamespace(block_size=16, head_size=64), BlockForm.GPU)  # type: ignore[arg-type]
    assert torch.equal(ours[0].permute(0, 3, 1, 2), keys)
    assert torch.equal(ours[1].transpose(1, 2), values)


def test_vllm_runner_v1_tells_dummy_runs_apart() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "_determine_batch_execution_and_padding" not in vars(CPUModelRunner)
    assert "force_uniform_decode" not in tight(GPUModelRunner.execute_model)


@pytest.mark.parametrize("use_v2", [False, True])
def test_watching_a_runner_wraps_it_once(use_v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if use_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        name = "gather_batch_req_state"
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        name = "_determine_batch_execution_and_padding"
    calls: list[Any] = []

    def original(self: Any, *args: Any, **kwargs: Any) -> tuple[None, int]:
        calls.append((args, kwargs))
        return None, 1

    monkeypatch.setattr(GPUModelRunner, name, original)
    config = SimpleNamespace(use_v2_model_runner=use_v2)
    rule = SpanRule(2, 3, 2, 5, True)
    track_rows(config, rule, None)  # type: ignore[arg-type]
    wrapped = getattr(GPUModelRunner, name)
    track_rows(config, rule, None)  # type: ignore[arg-type]
    assert getattr(GPUModelRunner, name) is wrapped
    # Runners without thin blocks, and dummy runs of those with, see the original.
    arguments: dict[str, Any] = {"scheduler_output": None, "dummy_run": True}
    if not use_v2:
        arguments = {"num_tokens": 1, "force_uniform_decode": True}
    for backend in (None, AttentionBackendEnum.CUSTOM):
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        )
        assert wrapped(runner, **arguments) == (None, 1)
    assert len(calls) == 2
    assert step_rows() is None
