"""YAML files of arguments: false is false, and what vanishes in vLLM is rejected or meant."""

import argparse
from pathlib import Path

import pytest

from think_vllm.errors import ThinkError
from think_vllm.hooks.config_file import (
    check_settings,
    known_options,
    negations,
    other_arguments,
    our_arguments,
    read_settings,
    split_config,
)


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
        ("kv_evict_budget: true", "are true in YAML; write one value such as `1024`"),
        ('kv-prune-decode: "false"', "kv-prune-decode is 'false'; write true or false, without"),
        ("kv-prune-prefill: 1", "kv-prune-prefill is 1; write true or false, without quotes"),
        ("kv-prune-decode:", "kv-prune-decode is None; write true or false"),
        ('no-kv-prune-decode: "false"', "no-kv-prune-decode is 'false'; write `kv-prune-decode: "),
        ("no_kv_prune_prefill: 1", "is 1; write `kv-prune-prefill: true` or `kv-prune-prefill: f"),
        ("no-kv-prune-decode: false", "no-kv-prune-decode is False; write `kv-prune-decode: true`"),
        ("no-kv-prune-decode:", "no-kv-prune-decode is None; write `kv-prune-decode: true`"),
    ],
)
def test_values_of_another_kind_are_rejected(tmp_path, line, message):
    path = tmp_path / "serve.yaml"
    settings = settings_of(path, line)
    with pytest.raises(ThinkError) as rejected:
        check_settings("serve.yaml", settings)
    assert str(rejected.value).startswith("serve.yaml: ")
    assert message in str(rejected.value)


@pytest.mark.parametrize(
    "line",
    [
        *("kv-quant: none", "kv-channel-prune: 0.5", "kv-prune-decode: off"),
        *("kv-prune-decode: true", "no-kv-prune-decode: true"),
        "no-port: x",  # no option
        "kv-evict: snapkv",
        "model: no",  # vLLM's own
        "a: [1",  # no YAML, which vLLM says
    ],
)
def test_other_values_are_left_alone(tmp_path, line):
    check_settings("x", settings_of(tmp_path / "serve.yaml", line))


def parser_with_a_command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--top", action=argparse.BooleanOptionalAction)
    command = parser.add_subparsers().add_parser("serve")
    command.add_argument("--kv-prune-decode", action=argparse.BooleanOptionalAction)
    command.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    command.add_argument("--enforce-eager", action="store_true")
    command.add_argument("--port")
    command.add_argument("--enable-lora", "--lora", action="store_true")
    graphs = command.add_argument("--enable-graphs", action="store_true")
    command._option_string_actions["--disable-graphs"] = graphs  # as vLLM 0.33 has it
    command.add_argument("--enable-log", action="store_true")
    command.add_argument("--disable-log", action="store_true")
    return parser


def test_false_is_said_to_those_who_know_how(tmp_path):
    known = known_options(parser_with_a_command())
    text = "kv_prune_decode: false\nenable-prefix-caching: off\ntop: no\n"
    text += "enforce-eager: false\nport: false\nkv-prune-prefill: true\nlora: false\n"
    text += "disable-graphs: false\ndisable-log: false\n"
    settings = settings_of(tmp_path / "serve.yaml", text)
    wanted = ["--no-kv-prune-decode", "--no-enable-prefix-caching", "--no-top", "--enable-graphs"]
    assert negations(settings, known) == wanted


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("unknown: false", "unknown is false, and there is no such option"),
        ("kv-prune-dec: false", "kv-prune-dec is false, and there is no such option"),
        ("KV-Prune-Decode: off", "KV-Prune-Decode is false, and there is no such option"),
        ("--top: false", "top is false, and there is no such option"),
        ("no-top: false", "no-top is false; write `top: true`"),
        ("enable-prefix-caching:", "enable-prefix-caching is empty; write true or false"),
        ("additional-config.think.kv_quant: off", "write `kv-quant: false` instead"),
        ("additional-config.think.kv_prune_decode: true", "write `kv-prune-decode: true` instead"),
        ("", "holds no settings; write lines like"),
        ("# a comment", "holds no settings; write lines like"),
        ("- a list", "holds no settings; write lines like"),
    ],
)
def test_what_vllm_would_drop_is_rejected(tmp_path, line, message, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text(line)
    parser = parser_with_a_command()

    def read() -> None:
        our_arguments(parser, str(path))
        other_arguments(parser, str(path))

    with pytest.raises(SystemExit):
        read()
    assert message in capsys.readouterr().err


def test_a_file_named_behind_a_sign_is_read():
    words = split_config(["m", "--config=a=b.yaml", "--x=1"])
    assert words == ["m", "--config", "a=b.yaml", "--x=1"]


def test_only_our_options_are_touched_in_vllms_own_program(tmp_path, capsys):
    path = tmp_path / "serve.yaml"
    path.write_text("kv-prune-decode: false\nenable-prefix-caching: false\n")
    parser = parser_with_a_command()
    assert our_arguments(parser, str(path)) == ["--no-kv-prune-decode"]
    path.write_text("kv-quant: off\n")
    with pytest.raises(SystemExit):
        our_arguments(parser, str(path))
    assert "`off`, `no` and `false` are false in YAML" in capsys.readouterr().err
    assert our_arguments(parser, str(tmp_path / "missing.yaml")) == []
