"""The command line of lm-evaluation-harness, and its results."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests.support.fake_api import FakeApi
from think_vllm.errors import ThinkError
from think_vllm.tools.cli import main
from think_vllm.tools.common.client import ServedModel
from think_vllm.tools.eval.harness import find_harness, harness_command

#: Leaves results as lm_eval 0.4.13 does, and its arguments beside them.
PROGRAM = """#!{python}
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "fake"
out.mkdir(parents=True)
(out / "arguments.json").write_text(json.dumps(sys.argv[1:]))
results = {{
    "results": {{
        "gsm8k": {{"alias": "gsm8k", "exact_match,strict-match": 0.5,
                  "exact_match_stderr,strict-match": 0.1, "sample_len": 4}},
        "arc": {{"acc,none": 0.25, "acc_stderr,none": "N/A"}},
        "ruler": {{"4096,none": -1, "2048,none": 0.75}},
    }},
    "group_subtasks": {{"ruler": ["gsm8k"], "gsm8k": []}},
    "configs": {{"gsm8k": {{"output_type": "generate_until"}},
                "arc": {{"output_type": "multiple_choice"}}}},
}}
(out / "results_2026.json").write_text(json.dumps(results))
print("the reason")
sys.exit({status})
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
    directory.mkdir()
    program = directory / "lm_eval"
    program.write_text(PROGRAM.format(python=sys.executable, status=status), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(sys, "executable", str(directory / "python"))


def command(model="m", **changes):
    options = Namespace(
        chat=False, concurrency=4, tokenizer=None, harness="a,b", lengths=[], harness_arguments=()
    )
    vars(options).update(changes)
    return harness_command(
        "lm_eval", "http://h:1", ServedModel(model, None, 2048), Path("out"), options
    )


def test_harness_command_names_the_client_and_the_address():
    plain = command()
    assert plain[:3] == ["lm_eval", "--model", "local-completions"]
    settings = dict(pair.split("=") for pair in plain[plain.index("--model_args") + 1].split(","))
    assert settings["base_url"] == "http://h:1/v1/completions"
    assert settings["num_concurrent"] == "4"
    assert settings["tokenizer_backend"] == "None"
    assert settings["max_length"] == "2048"
    assert "--apply_chat_template" not in plain
    assert "--metadata" not in plain
    chat = command(chat=True, tokenizer="dir")
    assert "local-chat-completions" in chat
    assert "--apply_chat_template" in chat
    assert "tokenizer_backend=huggingface,tokenizer=dir" in ",".join(chat)


def test_harness_command_passes_lengths_to_ruler():
    arguments = command(harness="ruler", lengths=[1024, 2048], harness_arguments=("--limit", "5"))
    assert arguments[-4:] == ["--metadata", '{"max_seq_lengths": [1024, 2048]}', "--limit", "5"]


def test_harness_command_rejects_names_that_would_be_split():
    with pytest.raises(ThinkError, match=r"model is 'a,b'.*--served-model-name"):
        command(model="a,b")


def test_harness_results_are_in_the_report(tmp_path, capsys, monkeypatch):
    install(tmp_path / "bin", monkeypatch)
    out = tmp_path / "out"
    with FakeApi(lambda _: "") as api:
        arguments = ["--base-url", api.url, "--harness", "gsm8k,arc", "--harness-args", "--limit 5"]
        assert main(["eval", *arguments, "--out", str(out)]) == 0
        assert not any(path == "/v1/completions" for path, _ in api.requests)
    report = capsys.readouterr().out
    assert (
        f"| gsm8k | exact_match (strict-match) | {api.url} | 0.500 [0.304, 0.696] | yes |" in report
    )
    assert f"| ruler | 2048 (none) | {api.url} | 0.750 | yes |" in report
    assert f"| arc | acc (none) | {api.url} | 0.250 | no: scored in the pass over" in report
    given = json.loads((out / "harness/0/fake/arguments.json").read_text(encoding="utf-8"))
    assert given[-2:] == ["--limit", "5"]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [line["task"] for line in results["harness"][0]["lines"]] == ["gsm8k", "arc", "ruler"]


def test_harness_that_fails_is_an_error(tmp_path, capsys, monkeypatch):
    install(tmp_path / "bin", monkeypatch, status=3)
    with FakeApi(lambda _: "") as api:
        arguments = ["eval", "--base-url", api.url, "--harness", "gsm8k", "--out", str(tmp_path)]
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "ended with status 3" in error
    assert "the reason" in error


def test_find_harness_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ThinkError, match=r"pip install 'lm-eval\[api,ruler,longbench\]'"):
        find_harness()
