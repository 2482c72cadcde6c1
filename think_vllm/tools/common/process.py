"""A program and all its children: started in a session of their own, ended together."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from think_vllm.errors import end_of_output
from think_vllm.tools.common.interrupts import held

GRACE_S = 30.0
POLL_S = 0.1


class ProcessGroup:
    """One program with its children.

    Args:
        command: Program and arguments.
        log: File that gets its output.
        environment: All its variables; None for this process's.
        takes_input: Whether it is sent lines. Then it learns when this process has ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        takes_input: bool = False,
    ) -> None:
        self.command = list(command)
        self.log = log
        self._stdin = subprocess.PIPE if takes_input else subprocess.DEVNULL
        self._environment = None if environment is None else dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            # A signal between the fork and the assignment would leave a child that is not known.
            with held(), self.log.open("wb") as output:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=self._stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self.stop()

    @property
    def exit_status(self) -> int | None:
        """Status that the program ended with; None while it runs."""
        return None if self._process is None else self._process.poll()

    def wait(self) -> int:
        """Wait until the program ends; return its status."""
        assert self._process is not None
        return self._process.wait()

    def send(self, line: str) -> None:
        """Send a line to its standard input; lost if it has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode("utf-8") + b"\n")
            self._process.stdin.flush()

    def processor_s(self) -> float:
        """Seconds of processor time that members of the group that still run have used."""
        assert self._process is not None
        seconds = 0.0
        for member in _running(self._process.pid):
            with suppress(psutil.Error):  # It has ended.
                times = member.cpu_times()
                seconds += times.user + times.system
        return seconds

    def stop(self) -> None:
        """Ask it to end, wait for a while, then kill what is left of the group."""
        process = self._process
        if process is None:
            return
        with held():
            if process.poll() is None:
                # To the program alone: vLLM's ends its children itself, in order.
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
            deadline = time.monotonic() + GRACE_S
            while _running(process.pid) and time.monotonic() < deadline:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(POLL_S)
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
            self._process = None

    def log_tail(self, lines: int = 40) -> str:
        """The end of its output, behind the first error in it."""
        return end_of_output(self.log.read_text(encoding="utf-8", errors="replace"), lines)


def _running(group: int) -> list[psutil.Process]:
    """Members of a process group, orphans included; zombies wait for others to reap them."""
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):  # It has ended.
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members
