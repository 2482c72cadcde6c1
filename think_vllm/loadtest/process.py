"""A program and all its children: started in a session of their own, ended together."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from think_vllm.loadtest.interrupts import held

GRACE_S = 30.0
POLL_S = 0.1


class ProcessGroup:
    """One program with its children.

    Args:
        command: Program and arguments.
        log: File that gets its output.
        environment: All its variables; None for this process's.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self.log = log
        self._environment = None if environment is None else dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            # A signal between the fork and the assignment would leave a child that nobody knows.
            with held(), self.log.open("wb") as output:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def exit_status(self) -> int | None:
        """What it ended with; None while it runs."""
        return None if self._process is None else self._process.poll()

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
            _kill_group(process.pid)
            process.wait()
            self._process = None

    def log_tail(self, lines: int = 40) -> str:
        """The end of its output."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def _kill_group(group: int) -> None:
    """Kill the members of a group, and wait until none is left that still runs.

    Orphans are reaped by somebody else, so zombies do not count.
    """
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        if not _runs(group):
            return
        time.sleep(POLL_S)


def _runs(group: int) -> bool:
    """Whether a process of the group is more than a zombie."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (name) state parent group ...; the name may hold spaces and brackets.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                return True
    return False
