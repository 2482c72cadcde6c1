"""Sections of a check: whatever becomes of one, the next one runs, and all of it is kept."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from bench.gpu_check import runner
from bench.gpu_check.runner import FAILED, NOT_RUN, PASSED, TIMED_OUT, Section, run_all

MACHINE = {"gpu": "none"}
#: Waits without end, as does the process that it starts; both leave their ids.
HANGS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child:
    with open(sys.argv[1] + "/pids", "w") as file:
        file.write(f"{os.getpid()} {child}")
    print("waiting", flush=True)
while True:
    signal.pause()
"""
INTERRUPTED = """
import json, signal, sys
try:
    print("started", flush=True)
    signal.pause()
except KeyboardInterrupt:
    json.dump([1], open(sys.argv[1] + "/partial.json", "w"))
    raise
"""


class LatePopen(subprocess.Popen[bytes]):
    """A process whose time begins once it has written something, however busy the machine is."""

    def __init__(self, *args: Any, stdout: Any, **more: Any) -> None:
        self._log = Path(stdout.name)
        super().__init__(*args, stdout=stdout, **more)

    def wait(self, timeout: float | None = None) -> int:
        while timeout is not None and self.poll() is None and not self._log.stat().st_size:
            time.sleep(0.01)
        return super().wait(timeout)


def python(name: str, code: str, limit_s: float = 60, **more) -> Section:
    return Section(name, limit_s, (sys.executable, "-c", code, "{out}"), **more)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # Killed, and not yet collected by whoever has inherited it.
    return state != "Z"


def test_failures_do_not_stop_the_next_one(tmp_path):
    out = tmp_path / "results"
    sections = [
        python("fails", "import sys; print('no'); sys.exit(3)"),
        Section("gone", 5, ("/no/such/program",)),
        python("writes", "import sys; open(sys.argv[1] + '/made.json', 'w').write('{}')"),
    ]
    done = run_all("1", sections, out, 100, MACHINE)
    assert [ended.status for ended in done] == [FAILED, FAILED, PASSED]
    assert [ended.returncode for ended in done] == [3, None, 0]
    assert "No such file" in done[1].why
    assert [ended.figures for ended in done] == [[], [], ["made.json"]]
    assert (out / "fails.txt").read_text() == "no\n"
    kept = json.loads((out / "check-1.json").read_text())
    assert kept["machine"] == MACHINE
    assert [one["name"] for one in kept["sections"]] == ["fails", "gone", "writes"]
    assert kept["sections"][2]["command"][-1] == str(out)


def test_results_are_kept_after_each_section(tmp_path):
    code = "import sys; print(open(sys.argv[1] + '/check-2.json').read())"
    done = run_all("2", [python("first", ""), python("second", code)], tmp_path, 100, MACHINE)
    assert done[1].status == PASSED
    told = json.loads((tmp_path / "second.txt").read_text())
    assert [one["name"] for one in told["sections"]] == ["first"]


def test_results_are_packed_after_each_section(tmp_path):
    out, archive = tmp_path / "results", tmp_path / "given" / "part-1.tar.gz"
    code = f"import tarfile; print(sorted(tarfile.open({str(archive)!r}).getnames()))"
    run_all("1", [python("first", ""), python("second", code)], out, 100, MACHINE, archive)
    told = (out / "second.txt").read_text()
    assert told == "['results', 'results/check-1.json', 'results/first.txt']\n"
    with tarfile.open(archive) as packed:
        assert "results/second.txt" in packed.getnames()
    assert list(archive.parent.iterdir()) == [archive]


def test_a_section_that_hangs_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.1)
    monkeypatch.setattr(subprocess, "Popen", LatePopen)
    done = run_all("1", [python("hangs", HANGS, 2), python("next", "")], tmp_path, 100, MACHINE)
    assert [ended.status for ended in done] == [TIMED_OUT, PASSED]
    assert (done[0].returncode, done[0].limit_s) == (None, 2)
    assert (tmp_path / "hangs.txt").read_text() == "waiting\n"
    processes = [int(text) for text in (tmp_path / "pids").read_text().split()]
    assert not any(map(is_alive, processes))


def test_a_section_out_of_time_can_write_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", LatePopen)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    (ended,) = run_all("1", [python("slow", INTERRUPTED, 2)], tmp_path, 100, MACHINE)
    assert (ended.status, ended.figures) == (TIMED_OUT, ["partial.json"])


def test_what_cannot_run(tmp_path):
    absent = python("absent", "", needs="no-such-program")
    present = python("present", "", needs="sh")
    done = run_all("1", [absent, present], tmp_path, 100, MACHINE)
    assert [ended.status for ended in done] == [NOT_RUN, PASSED]
    assert done[0].why == "no-such-program is not installed"
    (late,) = run_all("1", [present], tmp_path, 0.5, MACHINE)
    assert (late.status, late.why) == (NOT_RUN, "no time left")


def test_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    code = "import os; print(os.environ['KEPT'], os.environ['GIVEN'])"
    run_all("1", [python("env", code, environment=(("GIVEN", "2"),))], tmp_path, 100, MACHINE)
    assert (tmp_path / "env.txt").read_text() == "1 2\n"
    assert "GIVEN" not in os.environ
