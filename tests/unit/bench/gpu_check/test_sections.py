"""The table of sections, and the parts of their programs that need no GPU."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import triton

from bench.gpu_attention import table_of
from bench.gpu_check import __main__ as command
from bench.gpu_check.answers import CASES, faults_of, make_samples, read_result
from bench.gpu_check.counters import METRICS, command_of, read_counters
from bench.gpu_check.engine import SHAPE_8B, make_shape
from bench.gpu_check.jit import counted_compilations
from bench.gpu_check.load import engine_arguments
from bench.gpu_check.load import make_parser as load_parser
from bench.gpu_check.loads import try_all
from bench.gpu_check.machine import find_commit, folder_name, gpu_machine, read_gpu
from bench.gpu_check.plots import attention_bars, draw_all
from bench.gpu_check.sections import BUDGETS, sections_of
from bench.gpu_check.trace import Trace, quantile, summarize
from tests.conftest import REPOSITORY

MEASURED = {
    "machine": {"gpu": "some", "copy_bytes_per_second": 1e12},
    "results": [{
        "batch": 64, "context": 8192, "errors": {"torch": "OutOfMemoryError: none left"},
        "microseconds": {"FlashAttention 3": 200.0, "k4v2 0.5": 50.0},
        "bytes": {"FlashAttention 3": 100_000_000, "k4v2 0.5": 25_000_000},
    }],
}  # fmt: skip


@pytest.mark.parametrize("part", BUDGETS)
def test_sections_fit_their_part(part: int) -> None:
    sections = sections_of(part)
    assert sum(section.limit_s for section in sections) <= BUDGETS[part]
    names = [section.name for section in sections]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("section", sections_of(1) + sections_of(2), ids=lambda one: one.name)
def test_commands_of_sections_can_be_parsed(section) -> None:
    assert "-m" in section.command
    at = section.command.index("-m")
    module, rest = section.command[at + 1], section.command[at + 2 :]
    if module == "pytest":
        files = [part for part in rest if part.endswith(".py")]
        assert files
        assert all((REPOSITORY / file).is_file() for file in files)
        return
    options = importlib.import_module(module).make_parser().parse_args(rest)
    assert str(getattr(options, "out", None)).startswith(("{out}/", "None"))


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.make_parser().parse_args([]).part is None
    assert command.make_parser().parse_args(["2", "--out", "x"]).part == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["1"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_machine() -> None:
    machine = gpu_machine()
    assert {"date", "python", "versions", "command", "commit"} <= machine.keys()
    assert find_commit() == machine["commit"] != ""
    said = "NVIDIA H100 80GB HBM3, 580.65, 81559 MiB, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W\n"
    gpu = read_gpu(said * 2)
    assert (gpu["gpu"], gpu["driver"]) == ("NVIDIA H100 80GB HBM3", "580.65")
    assert gpu["power_limit"] == "700.00 W"
    assert read_gpu("") == {}
    name = folder_name(gpu | {"date": "2026-11-27T12:00:00+00:00"})
    assert name == "gpu-nvidia-h100-80gb-hbm3-2026-11-27"


def test_compilations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    runtime = triton.knobs.runtime
    monkeypatch.setattr(runtime, "jit_post_compile_hook", lambda **told: seen.append(told))
    before = runtime.jit_post_compile_hook

    class Kernel:
        module, name = "csrc_triton.decode", "_attend"

    with counted_compilations() as compiled:
        for _ in range(2):
            runtime.jit_post_compile_hook(fn=Kernel, key="")
    assert compiled == {"csrc_triton.decode._attend": 2}
    assert len(seen) == 2
    assert runtime.jit_post_compile_hook is before


def test_faults_of_answers() -> None:
    turns = [{"right": 38, "cached_tokens": 0}, {"right": 40, "cached_tokens": 900}]
    good = {"prompts": 40, "compilations": {"vllm.other": 1}, "turns": turns}
    assert faults_of(good) == []
    bad = good | {"turns": [turns[0] | {"right": 37}, turns[0]]}
    assert faults_of(bad) == ["turn 1: 37 of 40 right", "no prefix hits"]
    compiled = good | {"compilations": {"csrc_triton.decode._attend": 1}}
    assert faults_of(compiled) == ["compiled while serving: csrc_triton.decode._attend"]
    assert faults_of({"error": "gone"}) == ["gone"]


def test_results_of_cases() -> None:
    assert read_result('INFO x\nRESULT {"prompts": 1}\nlate\n', "") == {"prompts": 1}
    log = "a\nRuntimeError: the kernel failed\nb\n"
    assert read_result("", log)["error"] == "RuntimeError: the kernel failed"
    assert read_result("", "")["error"] == "no output"
    assert make_samples(3) == make_samples(3)
    formats = {case.think.get("kv_quant") for case in CASES.values()}
    assert formats == {None, "none", "fp8", "kivi4", "k4v2", "kivi2"}


def test_counters() -> None:
    printed = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","_attend","gpu__time_duration.sum","us","301.2"\n'
        '"0","_attend","smsp__inst_executed.sum","inst","1,234"\n'
    )
    assert read_counters(printed) == {
        "gpu__time_duration.sum": "301.2 us",
        "smsp__inst_executed.sum": "1,234 inst",
    }
    assert read_counters("==ERROR== ERR_NVGPUCTRPERM\n") == {}
    assert ",".join(METRICS) in command_of("fp8")


def test_what_loads() -> None:
    def gone() -> str:
        raise ImportError("not there")

    assert try_all({"a": lambda: 1, "b": gone}) == ({"a": "1"}, {"b": "ImportError: not there"})


def test_times_of_tokens() -> None:
    trace = Trace(10.0)
    for time, count in ((11.0, 1), (11.5, 1), (12.5, 2)):
        trace.add("a", time, count)
    trace.add("b", 13.0, 1)
    trace.add("b", 14.0, 0)
    trace.running = [(11.0, 1), (13.0, 2), (14.0, 1)]
    figures = summarize(trace, 15.0)
    assert figures["output_tokens"] == 5
    assert figures["output_tokens_per_s"] == 1.0
    assert (figures["ttft_median_ms"], figures["ttft_p99_ms"]) == (1000.0, 3000.0)
    assert (figures["itl_median_ms"], figures["itl_p99_ms"]) == (500.0, 500.0)
    assert figures["running_mean"] == pytest.approx((1 * 1 + 2 * 2 + 1 * 1) / 4)
    assert figures["running_max"] == 2


def test_a_run_without_tokens() -> None:
    figures = summarize(Trace(1.0), 2.0)
    assert figures["output_tokens"] == 0
    assert math.isnan(figures["itl_median_ms"])
    assert math.isnan(quantile([], 0.5))


def test_shape_of_a_large_model(tmp_path: Path) -> None:
    made = make_shape(tmp_path / "model", **SHAPE_8B)
    config = json.loads((made / "config.json").read_text())
    assert (config["num_hidden_layers"], config["model_type"]) == (32, "llama")
    assert (made / "tokenizer.json").is_file()
    assert not list(made.glob("*.safetensors"))
    arguments = engine_arguments(load_parser().parse_args(["--requests", "20"]))
    sizes = arguments["compilation_config"]["cudagraph_capture_sizes"]
    assert (max(sizes), arguments["max_num_seqs"]) == (16, 20)
    assert arguments["load_format"] == "dummy"


def test_attention_table_and_bars() -> None:
    table = table_of(MEASURED["results"][0], 1e12)
    assert "| k4v2 0.5 | 50.0 | 50 % |" in table
    assert "torch: OutOfMemoryError" in table
    half = pytest.approx(50)
    bars = [("FlashAttention 3", 1.0, half), ("k4v2 0.5", 4.0, half)]
    assert attention_bars(MEASURED) == {"batch 64, 8192 tokens": bars}


def test_pictures(tmp_path: Path) -> None:
    assert draw_all(tmp_path) == []
    (tmp_path / "attention.json").write_text(json.dumps(MEASURED))
    figures = summarize(Trace(1.0), 2.0) | {"output_tokens_per_s": 3.0}
    for name in ("plain", "k4v2"):
        told = {"machine": {}, "title": name, "complete": False, "figures": figures}
        (tmp_path / f"load-{name}.json").write_text(json.dumps(told))
    assert [path.name for path in draw_all(tmp_path)] == ["attention.png", "load.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
