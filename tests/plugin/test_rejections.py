"""What cannot be served is rejected before anything starts, in one line that names the remedy."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from vllm import AsyncEngineArgs
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.models import make_config
from tests.support.server import run_serve
from think_vllm.errors import ThinkError
from think_vllm.hooks.moved import moved
from think_vllm.plugin import register

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 2048,
}
LLAMA = {**SMALL, "head_dim": 64, "dtype": "bfloat16"}
LLAMA["architectures"] = ["LlamaForCausalLM"]
KEYS = ["--kv-channel-prune", "0.5"]


def reject(model: Path, *arguments: str) -> None:
    """Go as far as a server does before it starts its engine."""
    register()
    parser: argparse.ArgumentParser = moved("make_arg_parser")(FlexibleArgumentParser())
    namespace = parser.parse_args([*arguments, "--enforce-eager"])
    namespace.model = str(model)
    AsyncEngineArgs.from_cli_args(namespace).create_engine_config()


def rejected(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str) -> str:
    """Return the one line that says why."""
    with pytest.raises(SystemExit) as ended:
        reject(model, *arguments)
    assert ended.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if "think-vllm: error:" in x]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*KEYS, "--kv-cache-dtype", "fp8"], "as computed; use --kv-quant fp8 instead"),
        (
            ["--kv-quant", "fp8", "--kv-offloading-size", "1"],
            "or serve without --kv-channel-prune, --kv-value-prune, --kv-quant and --kv-evict",
        ),
        ([*KEYS, "--kv-prune-max-loss=0.2", "-tp=2"], "--tensor-parallel-size 2: each rank knows"),
        ([*KEYS, "--kv-prune-max-loss=0.2", "-pp=2"], "--pipeline-parallel-size 2: each rank kn"),
        (
            [*KEYS, "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
            "--speculative-config yet: a rejected token rolls its request back",
        ),
        (
            [*KEYS, "--kv-transfer-config", '{"kv_connector": "X", "kv_role": "kv_both"}'],
            "--kv-transfer-config (a KV connector) yet: connectors move dense blocks",
        ),
        (
            ["--kv-quant", "fp8", "--kv-events-config", '{"enable_kv_cache_events": true}'],
            "--kv-events-config yet: blocks change their form without an event",
        ),
        ([*KEYS, "-tp=4", "--decode-context-parallel-size=2"], "--decode-context-parallel-size 2"),
        ([*KEYS, "--attention-backend", "FLASH_ATTN"], "--attention-backend is FLASH_ATTN"),
        ([*KEYS, "--runner", "pooling", "--convert", "embed"], "it does not generate text"),
    ],
    ids=lambda value: " ".join(value[2:4]) if isinstance(value, list) else None,
)
def test_engine_options_are_rejected(recall_model, arguments, message, capsys):
    assert message in rejected(capsys, recall_model, *arguments)


@pytest.mark.parametrize(
    ("additional", "named"),
    [
        ({"kv_channel_prune": 0.5}, "kv_channel_prune"),
        ({"kv-channel-prune": 0.5}, "kv_channel_prune"),
        ({"kv_quant": "fp8"}, "kv_quant"),
        ({"kv_chanel_prune": 0.5}, "kv_channel_prune"),
        ({"kv_prune_prefil": True}, "kv_prune_prefill"),
        ({"--kv-chanel-prune": 0.5}, "kv_channel_prune"),
        ({"think_vllm": {"kv_channel_prune": 0.5}}, "kv_channel_prune"),
        ({"think-vllm": {"kv_quant": "fp8"}}, "kv_quant"),
        ({"Think": {}}, "kv_channel_prune"),
        ({"thinkvllm": {"prune": 0.5}}, "kv_channel_prune"),
        ({"thinks": {"kv_evict": "h2o"}}, "kv_evict"),
        ({"other": {"kv_channel_prune": 0.5}}, "kv_channel_prune"),
        ({"think": {"kv_channel_prune": 0.5}, "kv_recent_window": 64}, "kv_recent_window"),
        ({"vllm": {"think": {"kv_channel_prune": 0.5}}}, "kv_channel_prune"),
        ({"plugins": [{"kv_value_prune": 0.3}]}, "kv_value_prune"),
        ({"thnik": {}}, "kv_channel_prune"),
        ({"kv_think": {}}, "kv_channel_prune"),
        ({"think.kv_quant": "fp8"}, "kv_channel_prune"),
    ],
    ids=str,
)
def test_settings_in_the_wrong_place_are_rejected(
    recall_model, additional, named, capsys, monkeypatch
):
    message = (
        f'below "think": write {{"think": {{"{named}": ...}}}}, or give --{named.replace("_", "-")}'
    )
    with pytest.raises(SystemExit) as ended:
        reject(recall_model, "--additional-config", json.dumps(additional))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    # And of an engine that no command line made.
    monkeypatch.setattr("think_vllm.hooks.command_line._requested", False)
    with pytest.raises(ValueError, match="which is not read") as error:
        EngineArgs(model=str(recall_model), additional_config=additional).create_engine_config()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("additional", "flags", "message"),
    [
        ('{"think": [1]}', [], "it must be an object like"),
        ('{"think": [1]}', ["--kv-quant", "fp8"], "it must be an object like"),
        ('["think"]', ["--kv-quant", "fp8"], "it must be an object, beside which --kv-quant"),
        ('{"think": {"kv_quant": "fp8", "kv_recent_window": true}}', [], "`true` are true"),
        ('{"think": {"kv_quant": false}}', [], "write `none`, or leave it out"),
        ('{"think": {"kv_channel_prune": 0.5, "kv_evict_budget": true}}', [], "such as `1024`"),
    ],
)
def test_settings_of_another_kind_are_rejected(recall_model, additional, flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        reject(recall_model, "--additional-config", additional, *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "additional",
    [
        {"other": {"think": 1}},
        {"thinking": {"budget": 3}},
        {"thinking_config": {}},
        {"a": 1},
        {"ascend": {"kv_quant": "int8"}},
        {"lmcache": {"opts": [{"kv_evict": "lru"}]}},
    ],
    ids=str,
)
def test_settings_of_others_are_left_alone(recall_model, additional):
    reject(recall_model, "--additional-config", json.dumps(additional))


FP8_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
FP8_SCHEME |= {"dynamic": False}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
COMPRESSED |= {"ignore": [], "kv_cache_scheme": FP8_SCHEME}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}


@pytest.mark.parametrize(
    ("quantization", "flags", "named"),
    [
        (COMPRESSED, KEYS, "kv_cache_scheme={"),
        (COMPRESSED, ["--kv-quant", "fp8"], "kv_cache_scheme={"),
        ({**MODELOPT, "kv_cache_scheme": FP8_SCHEME}, KEYS, "kv_cache_scheme={"),
        ({**MODELOPT, "kv_cache_quant_algo": "FP8"}, KEYS, "kv_cache_quant_algo=FP8"),
        # The user's wish for a quantized cache changes nothing about the remedy.
        (COMPRESSED, ["--kv-quant", "fp8", "--kv-cache-dtype", "fp8"], "kv_cache_scheme="),
    ],
)
def test_cache_types_of_checkpoints_are_rejected(tmp_path, quantization, flags, named, capsys):
    model = make_config(tmp_path, "llama", **LLAMA, quantization_config=quantization)
    line = rejected(capsys, model, *flags)
    assert f"the checkpoint {model} sets ({named}" in line
    assert "give --kv-cache-dtype bfloat16" in line
    at = flags.index("--kv-cache-dtype") if "--kv-cache-dtype" in flags else len(flags)
    reject(model, *flags[:at], "--kv-cache-dtype", "bfloat16")


@pytest.mark.parametrize("said", ["bfloat16", "torch.bfloat16", "auto", None])
def test_checkpoints_that_keep_keys_as_computed_are_served(tmp_path, said):
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "kv_cache_dtype": said}
    model = make_config(tmp_path, "llama", **LLAMA, quantization_config=quantization)
    reject(model, *KEYS)


def test_offline_engines_get_an_exception_with_the_same_words(recall_model, monkeypatch):
    register()
    monkeypatch.setattr("think_vllm.hooks.command_line._requested", False)
    engine = EngineArgs(
        model=str(recall_model), additional_config={"think": {"kv_channel_prune": 3}}
    )
    with pytest.raises(ValueError, match="--kv-channel-prune is 3") as error:
        engine.create_engine_config()
    # pydantic wraps it; nothing else does.
    assert isinstance(error.value, ThinkError) or "ThinkError" not in str(error.value)


def test_sleep_mode_is_rejected_as_vllm_does(recall_model):
    settings = {"think": {"kv_channel_prune": 0.5}}
    engine = EngineArgs(model=str(recall_model), enable_sleep_mode=True, additional_config=settings)
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine.create_engine_config()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-channel-prune", "1.5"], "--kv-channel-prune is 1.5: Input should be less than"),
        (
            ["--additional-config", json.dumps({"think": {"kv_channel_prune": 0.5, "x": 1}})],
            "unknown setting x=1",
        ),
        (["--kv-channel-prune", "0.05"], "the smallest ratio that does is 0.08"),
    ],
    ids=["flag", "json", "plan"],
)
def test_serve_ends_in_one_line_without_a_traceback(recall_model, arguments, message):
    done = run_serve(recall_model, arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
