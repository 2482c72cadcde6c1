"""No process is left, whoever asks to stop, and whenever."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from think_vllm.tools.common import process
from think_vllm.tools.common.interrupts import Interrupted, held, interruptible
from think_vllm.tools.common.process import ProcessGroup

#: Starts a child that ignores SIGTERM, says so, and waits.
PARENT = """
import subprocess, sys, time
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\\n"
subprocess.Popen([sys.executable, "-c", child + "time.sleep(600)"])
time.sleep(600)
"""
STUBBORN = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + PARENT


def members(group: int) -> list[int]:
    """Processes of a group that still run."""
    running = []
    for one in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(one.pid) == group and one.status() != psutil.STATUS_ZOMBIE:
                running.append(one.pid)
    return running


def wait_for_child(group: ProcessGroup) -> None:
    """Until the child ignores SIGTERM; the log is that of both."""
    tail = subprocess.Popen(["tail", "-f", "-n", "+1", str(group.log)], stdout=subprocess.PIPE)
    assert tail.stdout is not None
    assert tail.stdout.readline() == b"up\n"
    tail.kill()
    tail.wait()


@pytest.mark.parametrize("program", [PARENT, STUBBORN], ids=["obedient", "stubborn"])
def test_stop_leaves_no_member_of_the_group(tmp_path, monkeypatch, program):
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    group = ProcessGroup([sys.executable, "-c", program], tmp_path / "log")
    with group:
        wait_for_child(group)
        assert group.exit_status is None
        assert 0 < group.processor_s() < 60
        assert group._process is not None
        number = group._process.pid
        assert len(members(number)) == 2
        assert number != os.getpgid(0)
    assert members(number) == []


def test_exit_status_and_log_of_a_program_that_ends(tmp_path):
    program = "import sys; print('first'); sys.exit('last words')"
    with ProcessGroup([sys.executable, "-c", program], tmp_path / "log") as group:
        assert group._process is not None
        group._process.wait()
        assert group.exit_status == 1
        assert group.log_tail(lines=1) == "last words"


def test_log_tail_names_the_first_error(tmp_path):
    log = tmp_path / "log"
    lines = [
        "(Worker pid=1) WARNING 11-23 [a.py:1] this can cause `OSError: too many files`",
        "(Worker pid=1) ERROR 11-23 [b.py:2] ValueError: not enough memory",
        "(Core pid=2) ERROR 11-23 [c.py:3] RuntimeError: a worker failed",
        "RuntimeError: the engine failed",
    ]
    log.write_text("\n".join(lines))
    group = ProcessGroup([], log)
    assert group.log_tail(lines=1) == f"ValueError: not enough memory\n...\n{lines[-1]}"
    assert group.log_tail(lines=3) == "\n".join(lines[1:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruptible_ends_what_runs(tmp_path, number):
    before = signal.getsignal(number)
    group = ProcessGroup([sys.executable, "-c", PARENT], tmp_path / "log")
    leader = 0

    def interrupted() -> None:
        nonlocal leader
        with interruptible(), group:
            wait_for_child(group)
            assert group._process is not None
            leader = group._process.pid
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as caught:
        interrupted()
    assert caught.value.number == number
    assert leader > 0
    assert members(leader) == []
    assert signal.getsignal(number) == before


def test_held_delays_a_signal_and_a_second_one_is_ignored():
    reached = []

    def interrupted() -> None:
        with interruptible():
            with held():
                signal.raise_signal(signal.SIGTERM)
                reached.append("rest of the block")
            reached.append("after it")

    with pytest.raises(Interrupted, match="SIGTERM"):
        interrupted()
    assert reached == ["rest of the block"]

    def twice() -> None:
        with interruptible():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                reached.append("cleaning up")

    with pytest.raises(Interrupted, match="SIGTERM"):
        twice()
    assert reached[-1] == "cleaning up"
