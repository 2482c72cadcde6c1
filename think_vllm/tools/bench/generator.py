"""vLLM's load generator as a program beside this one, which is started once for many loads."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from think_vllm.tools.common.process import POLL_S, ProcessGroup
from think_vllm.tools.common.server import Server

PROGRAM = "think_vllm.tools.bench.generator_program"


class LoadError(RuntimeError):
    """The load generator failed; the message holds the end of its output."""


class LoadGenerator:
    """vLLM's ``bench serve``, while the context lasts; started by the first load."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._group: ProcessGroup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._stop()
        self._folder.cleanup()

    def run(self, server: Server, arguments: list[str]) -> dict[str, Any]:
        """Load a server.

        Args:
            server: Whose end also ends the load.
            arguments: But for the server's address and model, and where the result goes.

        Returns:
            The fields of vLLM's result file.

        Raises:
            LoadError: If it fails.
            ServerError: If the server ends.
        """
        folder = Path(self._folder.name)
        result, done = folder / "result.json", folder / "done"
        command = ["--backend", "vllm", "--base-url", server.url]
        command += ["--served-model-name", server.model, *arguments, "--disable-tqdm"]
        command += ["--save-result", "--result-dir", str(folder), "--result-filename", result.name]
        command += ["--save-detailed"]  # why requests failed is among the details only
        group = self._started()
        try:
            group.send(json.dumps({"arguments": command, "done": str(done)}))
            while not done.is_file():
                server.check_alive()
                if (status := group.exit_status) is not None:
                    raise LoadError(
                        f"vLLM's load generator ended with status {status}; the end of its output:"
                        f"\n{group.log_tail()}"
                    )
                time.sleep(POLL_S)
            # Its requests failed because of that, whatever it says.
            server.check_alive()
        except BaseException:
            # It may be in the middle of a load; the next one gets another.
            self._stop()
            raise
        fields: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        for path in (result, done):
            path.unlink()
        return fields

    def _started(self) -> ProcessGroup:
        if self._group is None:
            command = [sys.executable, "-m", PROGRAM]
            log = Path(self._folder.name) / "generator.log"
            self._group = ProcessGroup(command, log, takes_input=True)
            self._group.__enter__()
        return self._group

    def _stop(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.stop()
        for name in ("result.json", "done"):
            (Path(self._folder.name) / name).unlink(missing_ok=True)
