"""YAML files of arguments: false is false, and what vanishes in vLLM is refused or meant."""

import argparse
from pathlib import Path

import pytest

from think_vllm.cli.config_file import (
    check_settings,
    known_options,
    negations,
    our_arguments,
    read_settings,
)
from think_vllm.errors import ThinkError


def settings_of(path: Path, text: str) -> dict[str, object]:
    path.write_text(text)
    return dict(read_settings(str(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kv-quant: off", "kv-quant: `off`, `no` and `false` are false in YAML; write `none`"),
        ("kv_quant: no", "kv-quant: `off`, `no` and `false` are false in YAML; write `none`"),
        ("kv-evict: false", "kv-evict: `off`, `no` and `false` are false in YAML; write `none`"),
        ("kv-quant: on", "kv-quant: `on`, `yes` and `true` are true in YAML; write `none`"),
        ("kv-quant:", "kv-quant is None; write `none`"),
        ("kv-quant: [fp8]", "kv-quant is ['fp8']; write `none`"),
        ("kv-channel-prune: off", "are false in YAML; write one value such as `0.0`"),
        ("kv-channel-prune: yes", "are true in YAML; write one value such as `0.0`"),
        ("kv-recent-window: {a: 1}", "kv-recent-window is {'a': 1}; write one value such as `32`"),
        ("kv-channel-tables-file: false", "are false in YAML; write one value"),
        ('kv-prune-decode: "false"', "kv-prune-decode is 'false'; write true or false, without"),
        ("kv-prune-prefill: 1", "kv-prune-prefill is 1; write true or false, without quotes"),
        ("kv-prune-decode:", "kv-prune-decode is None; write true or false"),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    settings = settings_of(path, line)
    with pytest.raises(ThinkError) as refused:
        check_settings("serve.yaml", settings)
    assert str(refused.value).startswith("serve.yaml: ")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "line",
    [
        "kv-quant: none",
        "kv-channel-prune: 0.5",
        "kv-prune-decode: off",
        "kv-prune-decode: true",
        "kv-evict: snapkv",
        "model: no",  # vLLM's own
        "- a list",
        "a: [1",  # no YAML, which vLLM says
    ],
)
def test_other_values_are_left_alone(tmp_path: Path, line: str) -> None:
    check_settings("x", settings_of(tmp_path / "serve.yaml", line))


def parser_with_a_command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--top", action=argparse.BooleanOptionalAction)
    command = parser.add_subparsers().add_parser("serve")
    command.add_argument("--kv-prune-decode", action=argparse.BooleanOptionalAction)
    command.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    command.add_argument("--enforce-eager", action="store_true")
    command.add_argument("--port")
    return parser


def test_false_is_said_to_those_who_know_how(tmp_path: Path) -> None:
    known = known_options(parser_with_a_command())
    text = "kv_prune_decode: false\nenable-prefix-caching: off\ntop: no\n"
    text += "enforce-eager: false\nport: false\nunknown: false\nkv-prune-prefill: true\n"
    settings = settings_of(tmp_path / "serve.yaml", text)
    wanted = ["--no-kv-prune-decode", "--no-enable-prefix-caching", "--no-top"]
    assert negations(settings, known) == wanted


def test_only_our_options_are_touched_in_vllms_own_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("kv-prune-decode: false\nenable-prefix-caching: false\n")
    parser = parser_with_a_command()
    assert our_arguments(parser, str(path)) == ["--no-kv-prune-decode"]
    path.write_text("kv-quant: off\n")
    with pytest.raises(SystemExit):
        our_arguments(parser, str(path))
    assert "`off`, `no` and `false` are false in YAML" in capsys.readouterr().err
    assert our_arguments(parser, str(tmp_path / "missing.yaml")) == []
