"""Start a container with runc, Docker's runtime, and ask it as its runtime and its users would."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.image_check.inputs import CheckError, Health, Image
from scripts.image_check.spec import HOSTNAME, HOSTS, container_spec, volume_targets

POLL_S = 0.5
ASK_TIMEOUT_S = 120
#: What `docker stop` and compose give a container between SIGTERM and SIGKILL.
STOP_GRACE_S = 10
LOG_LINES = 30


def copy_volumes(root: Path, service: Mapping[str, Any], work: Path) -> None:
    """Fill new volumes with what the image has there, owners included, as Docker does."""
    for index, target in enumerate(volume_targets(service)):
        folder = work / "volumes" / str(index)
        folder.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-a", str(root / target.lstrip("/")), str(folder)], check=True)


class Container:
    """One container; a context manager, which ends it."""

    def __init__(
        self,
        image: Image,
        service: Mapping[str, Any],
        root: Path,
        work: Path,
        variables: Mapping[str, str],
    ) -> None:
        self._image, self._service, self._root = image, service, root
        self._work, self._variables = work, variables
        self._name = f"image-check-{os.getpid()}"
        self._runc = ["runc", "--root", str(work / "runc")]
        self.log = work / "server.log"

    def __enter__(self) -> "Container":
        bundle = self._work / "bundle"
        bundle.mkdir()
        subprocess.run([*self._runc, "spec", "--bundle", str(bundle)], check=True)
        config = bundle / "config.json"
        default = json.loads(config.read_text(encoding="utf-8"))
        copy_volumes(self._root, self._service, self._work)
        (self._work / "hosts").write_text(HOSTS.format(hostname=HOSTNAME), encoding="utf-8")
        spec = container_spec(
            default, self._image, self._service, self._root, self._work, self._variables
        )
        config.write_text(json.dumps(spec, indent=1), encoding="utf-8")
        self._started = time.monotonic()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [*self._runc, "run", "--bundle", str(bundle), self._name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *_: object) -> None:
        command = [*self._runc, "delete", "--force", self._name]
        subprocess.run(command, check=False, capture_output=True)
        self._process.wait()

    def run(self, command: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, with the container's user and variables unless told otherwise."""
        inside = [*self._runc, "exec", *options, self._name, *command]
        return subprocess.run(
            inside, check=False, capture_output=True, text=True, timeout=ASK_TIMEOUT_S
        )

    def wait_healthy(self, health: Health) -> float:
        """Seconds until the health check passes.

        Raises:
            CheckError: If the server ends before, or Docker would call it unhealthy.
        """
        while True:
            took = time.monotonic() - self._started
            if self._process.poll() is not None:
                self._fail(
                    f"the container ended with {self._process.returncode} before it was healthy"
                )
            if took > health.deadline_s:
                self._fail(f"not healthy after {health.deadline_s:.0f} s")
            try:
                command = [*self._runc, "exec", self._name, *health.command]
                done = subprocess.run(
                    command, check=False, capture_output=True, timeout=health.timeout_s
                )
                if not done.returncode:
                    return time.monotonic() - self._started
            except subprocess.TimeoutExpired:
                pass  # as good as a failure, to Docker
            time.sleep(POLL_S)

    def ask(self, command: Sequence[str]) -> str:
        """Run a client of this machine in the container's network, which is no other's."""
        state = subprocess.run(
            [*self._runc, "state", self._name], check=True, capture_output=True, text=True
        )
        network = ["nsenter", "--target", str(json.loads(state.stdout)["pid"]), "--net"]
        done = subprocess.run(
            [*network, *command], check=False, capture_output=True, text=True, timeout=ASK_TIMEOUT_S
        )
        if done.returncode:
            self._fail(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def stop(self) -> float:
        """Seconds from SIGTERM to the end.

        Raises:
            CheckError: If Docker would have killed it.
        """
        start = time.monotonic()
        subprocess.run([*self._runc, "kill", self._name, "TERM"], check=True)
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._fail(f"it runs {STOP_GRACE_S} s after SIGTERM, and Docker would kill it")
        return time.monotonic() - start

    def _fail(self, why: str) -> None:
        last = self.log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise CheckError("\n".join([why, *last]))
