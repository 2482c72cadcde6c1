"""The flags, through vLLM's own parser of `vllm serve`."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from think_vllm.hooks.moved import moved
from think_vllm.plan.parsing import parse_config
from think_vllm.plugin import register

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    register()
    register()  # vLLM may load a plugin more than once
    made: argparse.ArgumentParser = moved("make_arg_parser")(FlexibleArgumentParser())
    return made


def settings(namespace: argparse.Namespace) -> Any:
    return namespace.additional_config.get("think")


def test_flags_become_additional_config(parser: argparse.ArgumentParser) -> None:
    arguments = ["model", "--kv-channel-prune", "0.4", "--no-kv-prune-decode"]
    namespace = parser.parse_args(arguments)
    assert settings(namespace) == {"kv_channel_prune": 0.4, "kv_prune_decode": False}
    assert not hasattr(namespace, "kv_channel_prune")


def test_flags_complete_what_json_began(parser: argparse.ArgumentParser) -> None:
    given = json.dumps({"think": {"kv_quant_group": 128}})
    namespace = parser.parse_args(["m", "--additional-config", given, "--kv-quant", "kivi2"])
    assert settings(namespace) == {"kv_quant": "kivi2", "kv_quant_group": 128}


@pytest.mark.parametrize("flag_first", [True, False], ids=["flag-first", "json-first"])
def test_flags_win_over_json_in_any_order(parser, flag_first):
    flag = ["--kv-channel-prune", "0.4"]
    given = {"think": {"kv_channel_prune": 0.5, "kv_recent_window": 64}, "other": 1}
    extra = ["--additional-config", json.dumps(given)]
    namespace = parser.parse_args(["m", *(flag + extra if flag_first else extra + flag)])
    assert settings(namespace)["kv_channel_prune"] == 0.4
    assert settings(namespace)["kv_recent_window"] == 64
    assert namespace.additional_config["other"] == 1


def test_flags_absent_leave_additional_config_alone(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args(["m"]).additional_config == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-channel-prune", "0.9"], "--kv-channel-prune is 0.9: Input should be less than"),
        (["--kv-channel-prune", "much"], "--kv-channel-prune: invalid float value: 'much'"),
        (["--kv-quant", "int8"], "--kv-quant: invalid choice: 'int8' (choose from"),
        (["--kv-quant-group", "64"], "--kv-quant-group given without --kv-channel-prune RATIO or"),
    ],
)
def test_flags_out_of_range_end_the_program_in_words(parser, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["m", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(parser: argparse.ArgumentParser, path: Path) -> None:
    namespace = parser.parse_args(["--config", str(path)])
    assert parse_config(settings(namespace)).enabled


def test_configs_are_shipped() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names >= {"think-0.5", "think-0.4-kivi4", "think-0.5-k4v2"}


def test_yaml_without_a_ratio_takes_a_format(parser, tmp_path):
    path = tmp_path / "quant.yaml"
    path.write_text("model: m\nkv-quant: kivi2\nkv-quant-group: 64\n", encoding="utf-8")
    namespace = parser.parse_args(["--config", str(path)])
    assert settings(namespace) == {"kv_quant": "kivi2", "kv_quant_group": 64}
