"""`think-vllm bench` with two real servers: its files, and whether the figures belong together."""

import csv
from pathlib import Path

import pytest

from tests.support.processes import run_python
from tests.support.server import offline_environment
from think_vllm.tools.bench.results import Results

pytestmark = [pytest.mark.e2e, pytest.mark.extended]

#: Long enough for gauges to be read often, even where other work slows the server down.
SCENARIO = """
description: Few short ones, more than fit.
prompt_tokens: 300
output_tokens: 200
concurrency: [24]
num_prompts: 96
"""
#: 2 layers x 2 heads x 512 bytes of a token: 19 blocks of plain vLLM, one of them its null block.
POOL_BYTES = 5_000_000
THIN = "prune 0.5 + k4v2"
DEADLINE_S = 900


def test_bench_compares_two_servers(recall_model: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "few.yaml"
    scenario.write_text(SCENARIO, encoding="utf-8")
    out = tmp_path / "out"
    command = ["-m", "think_vllm.tools.cli", "bench", str(recall_model)]
    command += ["--config", "--kv-channel-prune 0.5 --kv-quant k4v2", "--scenario", str(scenario)]
    command += ["--kv-cache-memory-bytes", str(POOL_BYTES), "--out", str(out)]
    command += ["--server-args", "--enforce-eager --max-model-len 512"]
    done = run_python(*command, timeout=DEADLINE_S, env=offline_environment())
    assert done.returncode == 0, done.stdout + done.stderr

    results = Results.read(out / "results.json")
    assert results.complete
    assert results.failures == []
    plain, thin = results.servers
    assert (plain.label, plain.kind, plain.flags) == ("plain", "plain", [])
    assert (thin.label, thin.kind, thin.block_size) == (THIN, "thin", 16)
    # The same memory and limits; plain vLLM has its own block size.
    assert plain.block_size == 128
    [plain_command] = plain.commands
    [thin_command] = thin.commands
    assert thin_command.replace(" --kv-channel-prune 0.5 --kv-quant k4v2", "") == plain_command
    assert f"--kv-cache-memory-bytes {POOL_BYTES} --max-num-seqs 24" in plain_command
    assert plain.num_blocks == POOL_BYTES // (128 * 2048)
    assert plain.capacity == {"few": 4}
    assert thin.capacity["few"] > 4

    measured = {one.server: one.figures for one in results.measurements}
    assert list(measured) == ["plain", THIN]
    for figures in measured.values():
        assert (figures.completed, figures.failed) == (96, 0)
        assert figures.output_tokens == 200 * 96
        assert figures.input_tokens == 300 * 96
        tokens_per_s = figures.output_tokens / figures.duration_s
        assert figures.output_tokens_per_s == pytest.approx(tokens_per_s)
        assert figures.running_peak <= 24
        assert 0 < figures.median_ttft_ms <= figures.p99_ttft_ms
        assert 0 < figures.cache_use_peak <= 1
        assert figures.samples > 0
    waited = measured["plain"].running_waiting
    assert waited is not None
    assert waited <= 6  # prompts of 3 blocks

    with (out / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["server"] for row in rows] == ["plain", THIN]
    assert {row["machine"] for row in rows} == {str(results.machine)}
    text = (out / "results.md").read_text(encoding="utf-8")
    ratio = measured[THIN].output_tokens_per_s / measured["plain"].output_tokens_per_s
    [line] = [line for line in text.splitlines() if line.startswith(f"| 24 at a time | {THIN} ")]
    assert f"| x{ratio:.2f} | - |" in line
    for name in ("few.png", "summary.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
