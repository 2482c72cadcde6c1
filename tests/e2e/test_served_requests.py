"""Requests as users send them: the example, chat, cut off, too long; and a load test."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import vllm

from tests.e2e.conftest import Serve
from tests.support.processes import run_python
from tests.support.server import Server, offline_environment, serve_arguments
from tests.unit.tools.bench.example_results import figures, measurement, results
from think_vllm.tools.bench.comparison import rows_of
from think_vllm.tools.bench.results import Results
from think_vllm.tools.bench.scenario import load_scenario
from think_vllm.tools.cli import main
from think_vllm.tools.common.machine import this_machine
from think_vllm.tools.eval.recall import recall_samples
from think_vllm.tools.eval.stats import wilson_interval
from think_vllm.tools.eval.tasks import make_questions
from think_vllm.tools.eval.tasks.haystack import Frame
from think_vllm.tools.example import example_hint

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    # The flags of `make serve`, with vLLM's default data type, compilation and processes.
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return serve("--kv-channel-prune", "0.5", "--max-num-seqs", "32", environment=processes)


def test_example_hint_is_answered_right(server: Server, recall_model: Path) -> None:
    hint = example_hint(serve_arguments(str(recall_model)), {})
    assert hint is not None
    assert f'"model": "{recall_model}"' in hint
    prompt = "the code of k17 is 4 9 2 1 . the code of k5 is 8 0 3 6 . what is the code of k17 ?"
    assert prompt in hint
    assert "Authorization" not in hint
    with_key = example_hint(serve_arguments(str(recall_model), api_key=["x"]), {})
    assert with_key is not None
    assert '-H "Authorization: Bearer $VLLM_API_KEY"' in with_key
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"].strip() == "4 9 2 1"


def test_chat_answers_from_a_pruned_prompt(server: Server) -> None:
    samples = list(recall_samples(seed=3, count=20, num_tokens=1500, num_records=60))

    def ask(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        response = server.post("/v1/chat/completions", body)
        return response.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, [sample.prompt for sample in samples]))
    right = sum(s.is_answered_by(a) for s, a in zip(samples, answers, strict=True))
    assert right >= 19


@pytest.mark.extended
def test_bench_loads_a_server_that_runs(server: Server, recall_model: Path, tmp_path: Path) -> None:
    url = ["--base-url", server.url, "--scenario", "paper"]
    loads = ["--concurrency", "3", "--num-prompts", "6", "--no-plots"]

    def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["-m", "think_vllm.tools.cli", "bench", recall_model, *url, *loads, *arguments]
        return run_python(*command, env=offline_environment())

    # What it is compared with: plain vLLM, said to make 1,000,000 tokens per second.
    made = measurement("plain", 3, figures(1e6, None))
    plain = results(
        made.model_copy(update={"scenario": "paper", "num_prompts": 6}),
        machine=this_machine(),
        scenarios=[load_scenario("paper").changed(concurrency=(3,), num_prompts=6)],
    )
    plain.write(tmp_path / "earlier.json")
    out = tmp_path / "out"
    compare = ["--compare", str(tmp_path / "earlier.json")]
    done = bench("--out", str(out), "--label", "pruned", *compare)
    assert done.returncode == 0, done.stdout + done.stderr
    now = Results.read(out / "results.json")
    [record] = now.servers
    assert (record.label, record.kind, record.block_size) == ("pruned", "external", 48)
    [got] = now.measurements
    assert (got.figures.completed, got.figures.failed) == (6, 0)
    assert got.figures.output_tokens == 6 * 338
    [row] = rows_of(now, plain)
    assert row.ratios["output_tokens_per_s"] == got.figures.output_tokens_per_s / 1e6
    text = (out / "results.md").read_text(encoding="utf-8")
    assert f"whether {server.url} has as much KV memory is not checked" in text

    rejected = bench("--out", str(out))
    assert rejected.returncode == 2
    assert "holds the results of another run" in rejected.stderr
    rejected = bench("--out", str(tmp_path / "x"), "--scenario", "document-8k")
    assert rejected.returncode == 2
    assert "has 8448 tokens" in rejected.stderr


def test_eval_counts_what_the_server_answers(server: Server, tmp_path: Path) -> None:
    # Twice the same server: there is no difference to be found.
    arguments = ["--base-url", server.url, "--label", "one", "--base-url", server.url]
    arguments += ["--label", "two", "--tasks", "recall-keys", "--lengths", "600", "1900"]
    arguments += ["--depths", "0", "60", "--samples", "6", "--seed", "8", "--out", str(tmp_path)]
    assert main(["eval", *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    questions = make_questions(
        ["recall-keys"], [600, 1900], [0.0, 0.6], 6, 8, Frame(0, None, count_tokens), threads=1
    )
    body = {"max_tokens": 6, "temperature": 0}
    right = {}
    for question in questions:
        assert question.prompt_tokens is not None
        answer = server.ask(prompt=question.prompt, **body)
        assert answer["usage"]["prompt_tokens"] == question.prompt_tokens
        text = answer["choices"][0]["text"].strip()
        cell = right.setdefault((question.length, question.depth), [])
        cell.append(text.startswith(f"? {question.answers[0]}"))

    assert [(cell["length"], cell["depth"]) for cell in results["by_cell"]] == list(right)
    for cell in results["by_cell"]:
        expected = right[cell["length"], cell["depth"]]
        for figure in cell["figures"]:
            assert figure["mean"]["value"] == pytest.approx(sum(expected) / len(expected))
    one, two = results["by_task"][0]["figures"]
    hits = sum(map(sum, right.values()))
    assert hits >= 22
    # The file keeps seven digits.
    interval = pytest.approx(wilson_interval(hits, 24), rel=1e-6)
    assert [one["mean"]["low"], one["mean"]["high"]] == interval
    assert (two["difference"]["better"], two["difference"]["worse"]) == (0, 0)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| recall-keys | two | 24 | 0 | 0 | {hits / 24:.3f} [" in report
    assert (tmp_path / "heatmap-recall-keys.png").is_file()
    assert results["servers"][0]["version"] == vllm.__version__


def test_eval_counts_requests_that_the_server_rejects(server: Server, tmp_path: Path) -> None:
    arguments = ["--base-url", server.url, "--tasks", "recall", "--lengths=300", "--samples=3"]
    # No such field value: rejected with status 400, request by request.
    arguments += ["--extra-body", '{"temperature": -1}', "--chat", "--no-plots"]
    assert main(["eval", *arguments, "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (figure,) = results["by_task"][0]["figures"]
    assert (figure["asked"], figure["failed"], figure["mean"]) == (3, 3, None)
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert all("HTTP 400" in json.loads(line)["error"] for line in lines)


def count_tokens(text: str) -> int:
    """Tokens of a prompt of the bundled model."""
    return 1 + len(text.split())
