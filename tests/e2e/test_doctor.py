"""``think-vllm doctor`` on the bundled model: its figures are the reference's."""

import json
import subprocess
from argparse import Namespace

import pytest
import torch

from tests.support.checks import EAGER, TOLERANCE, plan_served
from tests.support.processes import run_python
from tests.support.reference import Thinning
from tests.support.server import offline_environment
from think_vllm.errors import ThinkError
from think_vllm.tools.cli import main
from think_vllm.tools.doctor.examination import Examination, run_probe
from think_vllm.tools.doctor.finding import Level
from think_vllm.tools.doctor.probe import ProbeJob

pytestmark = pytest.mark.e2e

PLAN, FLAGS = plan_served(128, kv_channel_prune=0.5)
ARGUMENTS = [*EAGER, *FLAGS, "--kv-cache-memory-bytes", "100000000"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "think_vllm.tools.cli", "doctor", *arguments, env=offline_environment())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Engines in child processes are not to interpret kernels.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # The command sets it, and what it sets here would silence the servers of later tests.
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.mark.extended
def test_figures_are_those_of_the_reference(recall_model, recall_reference):
    generation = Namespace(
        text=None, num_prompts=2, prompt_tokens=500, new_tokens=30, max_perplexity_change=0.05,
        min_agreement=0.9,
    )  # fmt: skip
    examination = Examination(str(recall_model), ARGUMENTS, generation)
    findings = list(examination.findings())
    assert all(finding.level is Level.GOOD for finding in findings), findings
    assert examination.runs is not None
    expected = []
    for ran, thinning in zip(examination.runs, (None, Thinning.of(PLAN)), strict=True):
        for prompt, tokens, logprobs in zip(ran.prompts, ran.tokens, ran.logprobs, strict=True):
            truth = torch.tensor(recall_reference.logprobs(prompt, tokens, thinning))
            assert (truth - torch.tensor(logprobs)).abs().max() < TOLERANCE
            expected.append(truth[1:])
    dense, thin = torch.cat(expected[:2]), torch.cat(expected[2:])
    assert examination.comparison is not None
    mean = float((dense - thin).mean())
    assert examination.comparison.mean_difference == pytest.approx(mean, abs=TOLERANCE)
    # Forced tokens are not what agreement counts.
    assert examination.comparison.tokens == 58
    assert json.dumps(examination.fields())


def test_an_engine_that_fails_is_shown(recall_model, tmp_path):
    text = tmp_path / "text"
    text.write_text("the code of k1 is 1 2 3 4 .")
    job = ProbeJob(
        arguments=["--max-model-len", "4096"], model=str(recall_model), dense=True, num_prompts=1,
        prompt_tokens=500, new_tokens=1, out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(ThinkError, match=r"(?s)without the flags failed.*max_model_len"):
        run_probe(job)


def test_no_generation_says_so_and_goes(recall_model):
    done = run(str(recall_model), "--no-generation", *FLAGS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "GO"
    assert "note   answers: not compared (--no-generation)" in lines
    assert any(line.startswith("ok     plan: 4 blocks of 48 tokens become 3") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--kv-quant and --kv-evict is needed"),
        (["--kv-quant", "fp8", "--kv-cache-dtype", "fp8"], "do not support --kv-cache-dtype fp8"),
        (["--kv-channel-prune", "0.5", "--prompt-tokens", "100"], "--prompt-tokens 224 or more"),
        (["--kv-channel-prune", "0.5", "--new-tokens", "1500"], "exceed the model's 2048"),
        (["--kv-channel-prune", "0.5", "--max-model-len", "100"], "raise --max-model-len"),
    ],
)
def test_what_rules_a_model_out(recall_model, arguments, reason, capsys):
    assert main(["doctor", str(recall_model), "--json", *arguments]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["go"] is False
    [bad] = [x for x in report["findings"] if x["level"] == "no-go"]
    assert reason in bad["text"]


def test_a_plugin_that_is_not_loaded(recall_model, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    done = run(str(recall_model), "--no-generation")
    assert done.returncode == 1
    assert "no-go  plugin: VLLM_PLUGINS is 'other'" in done.stdout
