"""``think-vllm plan``."""

import io
import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.plugin.test_rejections import SMALL
from tests.support.models import make_config, make_llama
from tests.support.plans import make_plan
from tests.support.processes import run_python
from think_vllm.hooks.model_support import AttentionLayers
from think_vllm.tools.cli import main
from think_vllm.tools.plan import budget_fields, parse_bytes

FIELDS = {
    *("head_size", "key_channels", "value_channels", "requested_ratio", "actual_ratio"),
    *("requested_value_ratio", "actual_value_ratio", "block_size", "span_blocks", "thin_blocks"),
    *("span_tokens", "recent_window", "observation_window", "dense_bytes_per_token_head"),
    *("thin_bytes_per_token_head", "key_bytes_per_token_head", "value_bytes_per_token_head"),
    *("kv_quant", "kv_quant_group", "waste", "capacity_multiple", "effective_multiple_8k"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has imported vLLM already."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(["plan", *arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.mark.slow
def test_plan_program_prints_json_with_the_documented_fields(recall_model: Path) -> None:
    flags = ["--kv-channel-prune", "0.5", "--memory", "1GiB", "--json"]
    done = run_python("-m", "think_vllm.tools.cli", "plan", recall_model, *flags)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert set(fields) >= FIELDS
    assert (fields["key_channels"], fields["head_size"], fields["block_size"]) == (63, 128, 48)
    assert fields["thin_bytes_per_token_head"] == 384.0
    # 2 layers x 2 heads x 48 tokens x 512 bytes a block, one block is vLLM's null block.
    assert fields["num_blocks"] == 2**30 // (2 * 2 * 48 * 512) - 1
    assert fields["thin_requests"] > 1.3 * fields["plain_requests"]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "heads", "layers"),
    [(2, 1, 1, 2), (1, 2, 2, 1), (2, 2, 1, 1), (4, 1, 1, 2)],  # 4: each KV head is on two ranks
)
def test_plan_counts_what_one_rank_holds(recall_model, tensor, pipeline, heads, layers):
    ranks = ["-tp", str(tensor), "-pp", str(pipeline)]
    done = run(str(recall_model), "--kv-channel-prune", "0.5", *ranks, "--memory", "1GiB", "--json")
    fields = json.loads(done.stdout)
    assert fields["num_ranks"] == tensor * pipeline
    assert (fields["num_kv_heads"], fields["num_layers"]) == (heads, layers)
    assert fields["num_blocks"] == 2**30 // (heads * layers * 48 * 512) - 1


def test_plan_counts_the_rank_with_most_layers(tmp_path: Path) -> None:
    model = make_llama(tmp_path, head_size=128, num_heads=4, num_kv_heads=2, num_layers=5)
    done = run(str(model), "--kv-channel-prune", "0.5", "--pipeline-parallel-size", "2")
    assert "8.00 GiB of KV cache on each of 2 ranks (KV heads 2, layers 3)" in done.stdout


def test_plan_text_says_what_it_is_worth(recall_model: Path) -> None:
    done = run(str(recall_model), "--kv-channel-prune", "0.4", "--kv-recent-window", "16")
    assert "key channels 76 of 128" in done.stdout
    assert "77 channels were asked for; blocks are whole, and 76 is the most" in done.stdout
    assert "recent window 16" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-channel-prune", "0.001"], "prunes no channel"),
        (["--kv-channel-prune", "0.5", "--context-length", "0"], "not a whole number above zero"),
        (["--kv-channel-prune", "0.5", "--dtype", "foo"], "dtype"),
        (["--kv-channel-prune", "0.5", "-tp", "3"], "must be divisible by tensor parallel size"),
        ([], "--kv-channel-prune RATIO, --kv-quant FORMAT or --kv-evict METHOD is needed"),
        (["--kv-quant", "none"], "--kv-quant is none; nothing to plan"),
        (["--kv-quant", "fp8", "--kv-quant-group", "64"], "which has no groups"),
    ],
)
def test_plan_rejects_in_one_line(recall_model: Path, arguments: list[str], message: str) -> None:
    done = run(str(recall_model), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_counts_window_layers_of_the_whole_model_as_the_engine_does(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    shape = {**SMALL, "head_dim": 64, "num_key_value_heads": 1, "sliding_window": 64}
    shape |= {"num_hidden_layers": 4, "layer_types": kinds, "architectures": ["Gemma3ForCausalLM"]}
    model = make_config(tmp_path, "gemma3_text", **shape)
    done = run(str(model), "--kv-channel-prune", "0.5", "-pp", "2")
    assert done.returncode == 0, done.stderr
    assert "2 of 4 layers become thin" in done.stdout
    assert "on each of 2 ranks (KV heads 1, layers 2)" in done.stdout


def test_plan_rejects_a_model_that_is_not_there() -> None:
    done = run("models/no-such-model", "--kv-channel-prune", "0.5")
    assert done.returncode == 2
    assert "plan: cannot read the model 'models/no-such-model'" in done.stderr
    assert "Traceback" not in done.stderr


def test_budget_fields_count_whole_requests() -> None:
    plan = make_plan(kv_channel_prune=0.5)
    block = plan.layout.run_bytes * 8 * 32
    layers = AttentionLayers(full=32, window=0, window_tokens=0)
    fields = budget_fields(plan, 8, layers, memory_bytes=block * 101, context_len=416)
    # 9 blocks dense; 7 once two spans are thin.
    names = ("num_blocks", "plain_requests", "thin_requests")
    assert [fields[name] for name in names] == [100, 11, 14]


def test_budget_fields_count_windows_apart() -> None:
    plan = make_plan(kv_channel_prune=0.5)
    layers = AttentionLayers(full=5, window=25, window_tokens=96)
    block = plan.layout.run_bytes * 8 * 5
    fields = budget_fields(plan, 8, layers, memory_bytes=block * 101, context_len=416)
    # A group of full layers as above, and 5 groups whose windows take 3 blocks at most.
    assert (fields["plain_requests"], fields["thin_requests"]) == (100 // 24, 100 // 22)
    assert 1 < fields["effective_multiple"] < 24 / 22 + 0.1


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MB", 500 * 10**6), ("1.5k", 1500), ("77", 77), ("2gi", 2**31)],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size
