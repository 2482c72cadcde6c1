"""The whole command, vLLM's load generator included, but for servers that only look like vLLM's."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.fake_server import LAST_WORDS
from think_vllm.tools.bench.results import Results
from think_vllm.tools.common.server import KEEP_ALIVE, KEEP_ALIVE_S, server_environment

#: The command, but for which program its servers are.
PROGRAM = """
import sys
from think_vllm.tools.cli import main
from think_vllm.tools.common import server

def command(model, arguments, port):
    return [sys.executable, "-m", "tests.support.fake_server", "serve", model, *arguments,
            "--port", str(port)]

server.server_command = command
sys.exit(main(["bench", *sys.argv[1:]]))
"""
#: Of all processes of a run, to find what is left of them.
MARK = "THINK_VLLM_TEST_RUN"
DEADLINE_S = 600
FAILING = ("--no-plain", "--config", "--block-size 7")
UNSTEADY = ("--config", "--block-size 13")


def start(model: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-c", PROGRAM, str(model), "--kv-cache-memory-bytes", "10MB"),
            *("--concurrency", "4", "--num-prompts", "8", "--out", str(out), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, MARK: str(out)},
    )


def survivors(out: Path) -> list[str]:
    """Command lines of processes that a run has left."""
    running = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(out):
                running.append(" ".join(process.cmdline()))
    return running


def test_server_under_test_keeps_connections_unless_told_otherwise():
    assert server_environment({"A": "b"}) == {"A": "b", KEEP_ALIVE: str(KEEP_ALIVE_S)}
    assert server_environment({KEEP_ALIVE: "7"}) == {KEEP_ALIVE: "7"}


@pytest.mark.slow
def test_server_that_fails_is_reported_and_the_others_go_on(recall_model, tmp_path):
    out = tmp_path / "out"
    arguments = (*FAILING, *UNSTEADY, "--config", "--enforce-eager", "--no-plots")
    done = start(recall_model, out, *arguments)
    said, _ = done.communicate(timeout=DEADLINE_S)
    assert done.returncode == 1, said
    assert f"--block-size 7: FAILED: the server ended with status 1; the end of {out}/logs" in said
    assert LAST_WORDS in said
    results = Results.read(out / "results.json")
    assert results.complete
    failure, unsteady = results.failures
    assert failure.server == "--block-size 7"
    assert LAST_WORDS in failure.message
    # Why, and what helps where it can.
    assert unsteady.server == "--block-size 13"
    assert unsteady.message.startswith("4 requests failed: ")
    assert "2 x Service Unavailable" in unsteady.message
    assert re.search(r"2 x [\w.]*ServerDisconnectedError", unsteady.message)
    assert f"set {KEEP_ALIVE}={KEEP_ALIVE_S} in" in unsteady.message
    assert unsteady.message in said
    partly, measured = results.measurements
    assert (partly.figures.completed, partly.figures.failed) == (4, 4)
    assert sum(partly.figures.errors.values()) == 4
    assert measured.server == "--enforce-eager"
    figures = measured.figures
    assert figures.errors == {}
    assert (figures.completed, figures.failed) == (8, 0)
    assert figures.output_tokens == 8 * 338
    assert figures.running_waiting == 3
    assert LAST_WORDS in (out / "results.md").read_text(encoding="utf-8")
    assert survivors(out) == []


@pytest.mark.slow
def test_interrupt_in_the_middle_of_a_load_leaves_no_process(recall_model, tmp_path):
    out = tmp_path / "out"
    config = ("--config", "--block-size 11", "--num-prompts", "4")
    run = start(recall_model, out, *config)
    assert run.stdout is not None
    # Plain answers; the second server says nothing, so its load lasts.
    said = ""
    while "--block-size 11: paper, warming up" not in said:
        line = run.stdout.readline()
        assert line, said
        said += line
    deadline = time.monotonic() + DEADLINE_S
    while not any("think_vllm.tools.bench.generator_program" in one for one in survivors(out)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # The command, the server, its stubborn child, the load generator.
    assert len(survivors(out)) >= 4
    run.send_signal(signal.SIGINT)
    rest, _ = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 128 + signal.SIGINT, said + rest
    assert f"stopped by SIGINT; what was measured is in {out}" in rest
    assert survivors(out) == []
    results = Results.read(out / "results.json")
    assert not results.complete
    assert [one.server for one in results.measurements] == ["plain"]
    assert (out / "paper.png").is_file()
