"""``--kv-select static`` up to the engine: the backend it takes, its plan, and what it rejects."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.plugin.test_cuda import Platform
from tests.plugin.test_off import probe, role_targets
from tests.plugin.test_rejections import SMALL, rejected
from tests.support.models import make_config, make_llama
from tests.support.static_tables import random_tables
from think_vllm.errors import ThinkError
from think_vllm.hooks.activation import activate
from think_vllm.hooks.backend import select_backend
from think_vllm.hooks.patches.patch import Role
from think_vllm.hooks.static_engine import check_static, remember_static
from think_vllm.tools.cli import main
from think_vllm.worker.cpu.backend import ThinkCPUBackend
from think_vllm.worker.static.cpu import StaticCPUBackend


@pytest.fixture(scope="module")
def file(recall_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "tables.json"
    random_tables(recall_model).save(path)
    return path


def settings(file: Path, **more: Any) -> dict[str, Any]:
    given = {"kv_channel_prune": 0.5, "kv_select": "static", "kv_channel_tables_file": str(file)}
    return {"think": {**given, **more}}


def flags(file: Path) -> list[str]:
    given = ["--kv-channel-prune", "0.5", "--kv-select", "static"]
    return [*given, "--kv-channel-tables-file", str(file)]


@pytest.mark.slow
def test_static_leaves_all_but_attention_to_vllm(recall_model: Path, file: Path) -> None:
    result = probe(recall_model, settings(file))
    assert result["backend"] == "think_vllm.worker.static.cpu.StaticCPUBackend"
    assert result["block_size"] == 128
    assert result["prefix_caching"] is True
    assert result["rswa"] is None
    # Requests are checked, metrics and workers stay; imports bring the scheduler's wrappers.
    roles = (Role.PLUGIN, Role.BACKEND, Role.FRONT_END, Role.SCHEDULER)
    assert result["wrapped"] == role_targets(*roles)


def test_engines_of_one_process_have_their_own_backends(recall_model: Path, file: Path) -> None:
    found = []
    for additional in (settings(file), {"think": {"kv_channel_prune": 0.5}}, settings(file)):
        config = EngineArgs(
            model=str(recall_model), dtype="float32", enforce_eager=True, block_size=32,
            additional_config=additional,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(config):
            found.append(get_attn_backend(64, torch.float32, None, num_heads=4))
    assert found == [StaticCPUBackend, ThinkCPUBackend, StaticCPUBackend]


@pytest.mark.slow
def test_static_that_prunes_no_channel_is_off(recall_model: Path, file: Path) -> None:
    result = probe(recall_model, settings(file, kv_channel_prune=0.005))
    assert result["backend"] == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    assert result["ours"] == []


def test_spec_is_vllms_own_with_fewer_bytes(recall_model, file, monkeypatch):
    engine = EngineArgs(
        model=str(recall_model), dtype="bfloat16", enforce_eager=True,
        additional_config=settings(file, kv_value_prune=0.25),
    )  # fmt: skip
    config = engine.create_engine_config()
    with set_current_vllm_config(config):
        remember_static(config)
    spec = FullAttentionSpec(
        block_size=128, num_kv_heads=2, head_size=128, dtype=config.model_config.dtype
    )
    made = StaticCPUBackend.customize_spec(spec)
    assert type(made) is FullAttentionSpec
    assert (made.page_size_bytes, spec.page_size_bytes) == (2 * 128 * 160 * 2, 2 * 128 * 256 * 2)
    with pytest.raises(ThinkError, match=r"head sizes 64 .keys. and 64 .values."):
        StaticCPUBackend.customize_spec(
            FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=made.dtype)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
            "--kv-select static does not support --speculative-config yet",
        ),
        (["--kv-cache-dtype", "fp8"], "do not support --kv-cache-dtype fp8 yet"),
        (["--kv-offloading-size", "1"], "does not support --kv-offloading-size yet"),
        (["--block-size", "40"], "--kv-select static: --block-size is 40"),
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend is FLASH_ATTN"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_engine_options_are_rejected(recall_model, file, arguments, message, capsys):
    assert message in rejected(capsys, recall_model, *flags(file), *arguments)


def test_tables_of_another_model_are_rejected(file, tmp_path, capsys):
    model = make_llama(tmp_path / "model", head_size=64, num_heads=4, num_kv_heads=2)
    line = rejected(capsys, model, *flags(file))
    assert "was made for another model" in line
    assert "head_size is 128 there and 64 here" in line
    missing = rejected(capsys, model, *flags(tmp_path / "missing.json"))
    assert "No such file or directory; make the file with `think-vllm calibrate MODEL`" in missing


def test_sliding_windows_are_rejected(file, tmp_path, capsys):
    shape = {**SMALL, "head_dim": 64, "sliding_window": 256}
    shape["layer_types"] = ["sliding_attention", "full_attention"]
    model = make_config(tmp_path, "gemma3_text", **shape, architectures=["Gemma3ForCausalLM"])
    line = rejected(capsys, model, *flags(file))
    assert "--kv-select static does not support" in line
    assert "some of its layers have a sliding window" in line


def test_gpus_get_the_same_plan_and_a_warning(recall_model, file, monkeypatch, caplog):
    engine = EngineArgs(
        model=str(recall_model), dtype="bfloat16", enforce_eager=True,
        additional_config=settings(file),
    ).create_engine_config()  # fmt: skip
    monkeypatch.setattr("vllm.platforms.current_platform", Platform("cuda"))
    # vLLM's own loggers hand nothing on.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="vllm")
    activate(engine)
    assert "no GPU has run them yet" in caplog.text
    assert engine.cache_config.block_size == 128
    assert engine.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert engine.model_config.rswa_window is None
    path = "think_vllm.worker.static.cuda.StaticCUDABackend"
    assert select_backend(engine) == path
    engine.model_config.dtype = torch.float32
    with pytest.raises(ThinkError, match="dtype is float32; on GPUs use --dtype bfloat16"):
        activate(engine)


def test_other_devices_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", Platform("rocm"))
    config: Any = SimpleNamespace()
    with pytest.raises(ThinkError, match="kernels for CPUs and for NVIDIA GPUs, the device is roc"):
        check_static(config)


def test_plan_of_static_pruning(recall_model, file, capsys):
    arguments = [*flags(file), "--memory", "1GiB", "--context-length", "1024"]
    assert main(["plan", str(recall_model), *arguments, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    # 2 layers x 2 heads x 128 tokens x 192 channels in bf16; one block is vLLM's null block.
    assert fields["num_blocks"] == 2**30 // (2 * 2 * 128 * 192 * 2) - 1
    assert fields["thin_requests"] == fields["num_blocks"] // 8
    assert fields["capacity_multiple"] == fields["effective_multiple"] == pytest.approx(4 / 3)
    assert main(["plan", str(recall_model), *arguments]) == 0
    text = capsys.readouterr().out
    assert "key channels 64 of 128" in text
    assert "nothing is compacted, and prefixes are shared exactly" in text
    assert "x1.333 at every length" in text
    assert main(["plan", str(recall_model), *arguments, "--no-enable-prefix-caching"]) == 0
    assert "prefixes" not in capsys.readouterr().out
