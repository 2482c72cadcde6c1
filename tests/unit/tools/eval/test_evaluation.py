"""The whole command against servers whose answers are known."""

import json
import sys

import pytest

from tests.support.fake_api import FakeApi, read_recall
from think_vllm.tools.cli import main
from think_vllm.tools.eval.stats import mcnemar_exact, paired_interval, wilson_interval

CELLS = ["--lengths", "400", "800", "--depths", "0", "100", "--samples", "5", "--seed", "3"]


def key_of(prompt: str) -> int:
    return int(prompt.split()[-1].removeprefix("k"))


def forgetful(prompt: str) -> str:
    """Right but for every third key."""
    return "? 0 0 0 x" if key_of(prompt) % 3 == 0 else read_recall(prompt)


def evaluate(out, *arguments):
    status = main(["eval", "--out", str(out), *CELLS, *arguments])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return status, results, [json.loads(line) for line in lines]


def mean_of_recall(out, api, *arguments):
    """Of one server that answers all."""
    given = ("--base-url", api.url, "--tasks", "recall", "--no-plots", *arguments)
    status, results, _ = evaluate(out, *given)
    assert status == 0
    return results["by_task"][0]["figures"][0]["mean"]["value"]


def rejection(capsys, *arguments):
    """Why a command that asked nothing ended."""
    assert main(["eval", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_two_servers_are_compared_on_the_same_questions(tmp_path, capsys):
    with FakeApi(read_recall) as right, FakeApi(forgetful) as worse:
        status, results, answers = evaluate(
            tmp_path, "--base-url", right.url, "--base-url", worse.url + "/v1/",
            "--label", "plain", "--label", "thin", "--tasks", "recall-keys", "recall",
        )  # fmt: skip
        asked = [
            [body["prompt"] for path, body in api.requests if path == "/v1/completions"]
            for api in (right, worse)
        ]
    assert status == 0
    assert sorted(asked[0]) == sorted(asked[1])
    assert len(asked[0]) == 2 * 2 * 5 + 2 * 5
    on_grid = [line for line in answers if line["task"] == "recall-keys"]
    lost = sum(line["score"] == 0 for line in on_grid if line["server"] == "thin")
    assert 0 < lost < 20
    assert all(line["score"] == 1 for line in on_grid if line["server"] == "plain")

    plain, thin = results["by_task"][0]["figures"]
    assert (plain["mean"]["value"], plain["difference"]) == (1.0, None)
    assert thin["mean"]["value"] == pytest.approx(1 - lost / 20)
    ends = [thin["mean"]["low"], thin["mean"]["high"]]
    assert ends == pytest.approx(wilson_interval(20 - lost, 20))
    difference = thin["difference"]
    assert (difference["better"], difference["worse"]) == (0, lost)
    ends = paired_interval(both=20 - lost, lost=lost, won=0, neither=0)
    found = [difference["estimate"]["low"], difference["estimate"]["high"]]
    assert found == pytest.approx(ends)
    assert difference["p_value"] == pytest.approx(mcnemar_exact(0, lost))
    assert len(results["by_cell"]) == 4
    assert sum(cell["figures"][1]["mean"]["value"] for cell in results["by_cell"]) == (
        pytest.approx((20 - lost) / 5)
    )

    report = capsys.readouterr().out
    assert report == (tmp_path / "report.md").read_text(encoding="utf-8")
    interval = f"{1 - lost / 20:.3f} [{thin['mean']['low']:.3f}, {thin['mean']['high']:.3f}]"
    assert f"| recall-keys | thin | 20 | 0 | 0 | {interval} |" in report
    assert "## By length" in report
    for name in ("tasks.png", "heatmap-recall-keys.png"):
        assert f"({name})" in report
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "heatmap-recall.png").exists()


def test_provenance_says_where_figures_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with FakeApi(read_recall, key="sk-secret") as api:
        mean_of_recall(tmp_path, api)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (server,) = results["servers"]
    assert (server["version"], server["model"]) == ("1.2.3", "fake")
    assert (server["max_model_len"], server["flags"]) == (4096, None)
    assert results["settings"]["seed"] == 3
    assert results["settings"]["lengths"] == [400, 800]
    assert "--tasks recall --no-plots" in results["provenance"]["command"]
    assert results["provenance"]["versions"]["think-vllm"]
    for path in tmp_path.iterdir():
        assert "sk-secret" not in path.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.png"))


def test_failed_requests_are_counted_and_not_scored(tmp_path, capsys):
    def failing(prompt: str) -> str | int:
        return 422 if key_of(prompt) % 2 else forgetful(prompt)

    with FakeApi(forgetful) as first, FakeApi(failing) as second:
        status, results, answers = evaluate(
            tmp_path, "--base-url", first.url, "--base-url", second.url,
            "--tasks", "recall-needle", "--no-plots",
        )  # fmt: skip
    assert status == 1
    failed = [line for line in answers if line["score"] is None]
    assert 0 < len(failed) < 20
    assert all(line["error"].startswith("HTTP 422: ") for line in failed)
    one, other = results["by_task"][0]["figures"]
    assert (one["failed"], other["failed"]) == (0, len(failed))
    scores = [line["score"] for line in answers if line["server"] == second.url]
    answered = [score for score in scores if score is not None]
    assert other["mean"]["value"] == pytest.approx(sum(answered) / len(answered))
    # The same function answered both, so what both answered is equal.
    assert other["difference"]["pairs"] == 20 - len(failed)
    assert other["difference"]["estimate"]["value"] == 0
    output = capsys.readouterr()
    assert f"| recall-needle | {second.url} | 20 | {len(failed)} |" in output.out
    assert f"{len(failed)} FAILED" in output.err
    assert f"{len(failed)} requests failed" in output.err


def test_server_without_any_answer_is_reported(tmp_path):
    with FakeApi(lambda _: 400) as api:
        arguments = ("--base-url", api.url, "--tasks", "recall-needle")
        status, results, _ = evaluate(tmp_path, *arguments)
    assert status == 1
    (figure,) = results["by_task"][0]["figures"]
    assert (figure["failed"], figure["mean"]) == (20, None)


def test_chat_sends_messages_and_extra_fields(tmp_path):
    with FakeApi(read_recall) as api:
        extra = '{"chat_template_kwargs": {"enable_thinking": false}, "seed": 1}'
        assert mean_of_recall(tmp_path, api, "--chat", "--extra-body", extra) == 1
        sent = [body for path, body in api.requests if path == "/v1/chat/completions"]
        counted = [body for path, body in api.requests if path == "/tokenize"]
    assert all(body["messages"][0]["role"] == "user" for body in sent)
    assert all(body["temperature"] == 0 and body["seed"] == 1 for body in sent)
    # A template that thinks is longer than one that does not.
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in counted)


def test_tasks_that_are_too_hard_are_pointed_out(tmp_path):
    with FakeApi(lambda _: "dunno") as api:
        arguments = ("--base-url", api.url, "--tasks", "needle", "multi-value")
        status, results, _ = evaluate(tmp_path, *arguments)
    assert status == 0
    scores = {group["task"]: group["figures"][0]["mean"]["value"] for group in results["by_task"]}
    assert scores == {"needle": 0, "multi-value": 0}
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"**{api.url} scores below 0.2 at needle, multi-value" in report


def test_failures_that_pass_are_tried_again(tmp_path):
    tried = set()

    def busy(prompt: str) -> str | int:
        if prompt in tried:
            return read_recall(prompt)
        tried.add(prompt)
        return 503

    with FakeApi(busy) as api:
        assert mean_of_recall(tmp_path, api, "--lengths", "400", "--samples", "2") == 1


def test_tokenizer_on_disk_replaces_the_servers(tmp_path, recall_model):
    with FakeApi(read_recall) as api:
        assert mean_of_recall(tmp_path, api, "--tokenizer", str(recall_model)) == 1
        assert {path for path, _ in api.requests} == {"/v1/completions"}


#: What is started in place of vLLM: a fake that forgets more with one flag, and dies with another.
SERVER = """
import sys, threading
from tests.support.fake_api import FakeApi, read_recall
from tests.unit.tools.eval.test_evaluation import forgetful
if "--die" in sys.argv:
    sys.exit("the reason")
reply = forgetful if "--thin" in sys.argv else read_recall
with FakeApi(reply, port=int(sys.argv[-1])):
    threading.Event().wait()
"""


def fake_command(model, arguments, port):
    return [sys.executable, "-c", SERVER, model, *arguments, str(port)]


def test_serve_starts_one_server_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr("think_vllm.tools.common.server.server_command", fake_command)
    status, results, answers = evaluate(
        tmp_path, "--serve", "m", "--config", "--thin 1", "--server-args", "--all 2",
        "--tasks", "recall", "--no-plots",
    )  # fmt: skip
    assert status == 0
    servers = {server["label"]: server["flags"] for server in results["servers"]}
    assert servers == {"plain": ["--all", "2"], "thin 1": ["--all", "2", "--thin", "1"]}
    assert [server["url"] for server in results["servers"]] == [None, None]
    plain, thin = results["by_task"][0]["figures"]
    assert plain["mean"]["value"] == 1
    assert thin["difference"]["worse"] == sum(line["score"] == 0 for line in answers) > 0
    assert (tmp_path / "server-1.log").is_file()


def test_serve_reports_the_servers_before_one_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("think_vllm.tools.common.server.server_command", fake_command)
    arguments = ("--serve", "m", "--config", "--die now", "--tasks", "recall", "--no-plots")
    status, results, _ = evaluate(tmp_path, *arguments)
    assert status == 2
    assert "eval: die now: the server ended with status 1" in (error := capsys.readouterr().err)
    assert "the reason" in error
    assert [server["label"] for server in results["servers"]] == ["plain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --base-url URL, once or more, or --serve MODEL"),
        (["--base-url", "{url}", "--serve", "m"], "give either --base-url"),
        (["--base-url", "{url}", "--config", "--x 1"], "--config is for --serve"),
        (["--base-url", "localhost:80"], "'localhost:80' is no address"),
        (["--base-url", "{url}", "--label", "a", "--label", "b"], "one label for each"),
        (["--base-url", "{url}", "--base-url", "{url}"], "two servers would be called"),
        (["--base-url", "{url}", "--tasks", "nothing"], "nothing is no task"),
        (["--base-url", "{url}", "--model", "other"], "serves fake, not other"),
        (["--base-url", "{url}", "--lengths", "9999"], "--lengths 9999: fake takes 4096 tokens"),
        (["--base-url", "{url}", "--haystack", "none.txt"], "none.txt: "),
        (["--base-url", "{url}", "--extra-body", "[]"], "no JSON object"),
        (["--base-url", "{url}", "--extra-body", "{{"], "is no JSON"),
        (["--base-url", "http://127.0.0.1:1"], "no OpenAI-compatible server answers there"),
        (["--serve", "m", "--no-plain"], "starts nothing"),
        (["--serve", "m", "--config", "0.5"], "holds no flags"),
        (["--serve", "m", "--config", "--a 'b"], "No closing quotation"),
    ],
)
def test_wrong_usage_is_explained(tmp_path, capsys, arguments, message):
    with FakeApi(read_recall) as api:
        given = [argument.format(url=api.url) for argument in arguments]
        error = rejection(capsys, "--out", tmp_path / "out", *given)
        assert not any(path.startswith("/v1/c") for path, _ in api.requests)
    assert error.startswith("think-vllm: error: eval: ")
    assert message in error


def test_several_models_want_a_choice(tmp_path, capsys):
    with FakeApi(read_recall, models=("a", "b")) as api:
        error = rejection(capsys, "--base-url", api.url, "--out", tmp_path, "--no-plots")
        assert "serves a, b; choose one with --model NAME" in error
        mean_of_recall(tmp_path, api, "--model", "b")
        assert api.requests[-1][1]["model"] == "b"


def test_server_that_says_no_length_needs_one(tmp_path, capsys):
    with FakeApi(read_recall, max_model_len=None) as api:
        error = rejection(capsys, "--base-url", api.url, "--out", tmp_path, "--no-plots")
    assert "give --lengths TOKENS" in error


def test_plots_without_matplotlib_are_rejected_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with FakeApi(read_recall) as api:
        error = rejection(capsys, "--base-url", api.url, "--out", tmp_path)
        assert not api.requests
    assert "pip install 'think-vllm[bench]', or give --no-plots" in error
