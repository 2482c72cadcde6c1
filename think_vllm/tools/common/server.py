"""A server under test: started here, or already running."""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from think_vllm.errors import ThinkError
from think_vllm.tools.common.client import Client, RequestError
from think_vllm.tools.common.process import POLL_S, ProcessGroup

HTTP_TIMEOUT_S = 30.0
#: Seconds until vLLM's server closes a connection that is not used, unless this says otherwise: 5.
KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
#: Longer than vLLM's load generator keeps one (60), so that no request finds it closed. On a
#: machine whose engine takes all processors, 5 seconds pass between two requests.
KEEP_ALIVE_S = 120


class ServerError(RuntimeError):
    """A server that did not start, or ended; the message holds the end of its log."""


class Server:
    """A server that answers at a URL.

    Args:
        url: Without a path.
        model: Name that requests carry.
        group: Its processes; None if it was not started here.

    Raises:
        ThinkError: If the URL is no address.
    """

    def __init__(self, url: str, model: str, group: ProcessGroup | None = None) -> None:
        # No retries: gauges are sampled again soon, and health is asked for until it is there.
        self.client = Client(url, "bench", HTTP_TIMEOUT_S, retries=0)
        self.url = self.client.url
        self.model = model
        self._group = group

    def check_alive(self) -> None:
        """Notice a server that ended.

        Raises:
            ServerError: With the end of its log.
        """
        if self._group is not None and (status := self._group.exit_status) is not None:
            raise ServerError(
                f"the server ended with status {status}; the end of {self._group.log}:\n"
                f"{self._group.log_tail()}"
            )

    def processor_s(self) -> float | None:
        """Seconds of processor time used so far; None if the server was not started here."""
        return None if self._group is None else self._group.processor_s()

    def get(self, path: str) -> str:
        """Body of a GET.

        Raises:
            OSError: If it is out of reach, or answers with an error.
            ServerError: If it has ended.
        """
        try:
            return self.client.get(path)
        except RequestError as error:
            self.check_alive()
            raise OSError(f"GET {self.url}{path}: {error}") from error


class StartedServer(Server):
    """vLLM's server in processes of its own, while the context lasts.

    Args:
        model: Name or directory of the model.
        arguments: Of ``serve``, but for host and port.
        log: File that gets its output.
        start_timeout_s: Seconds it may take to start.
    """

    def __init__(
        self, model: str, arguments: Sequence[str], log: Path, start_timeout_s: float
    ) -> None:
        port = free_port()
        command = server_command(model, arguments, port)
        self._started = ProcessGroup(command, log, server_environment(os.environ))
        self._start_timeout_s = start_timeout_s
        super().__init__(f"http://127.0.0.1:{port}", model, self._started)

    def __enter__(self) -> Self:
        self._started.__enter__()
        try:
            self._wait_until_healthy()
        except BaseException:
            self._started.stop()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        self._started.stop()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            try:
                self.get("/health")
            except OSError:
                pass
            else:
                return
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server is not healthy after {self._start_timeout_s:g} s (give it more "
                    f"with --start-timeout); the end of {self._started.log}:\n"
                    f"{self._started.log_tail()}"
                )
            time.sleep(POLL_S)


def server_command(model: str, arguments: Sequence[str], port: int) -> list[str]:
    """Program and arguments of a server on this machine only."""
    command = [sys.executable, "-m", "think_vllm.tools.cli", "serve", model, *arguments]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


def server_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a server under test.

    Args:
        environment: Of this process; what it says stays.
    """
    return {KEEP_ALIVE: str(KEEP_ALIVE_S), **environment}


def find_server(url: str, model: str) -> tuple[Server, int | None]:
    """A server that runs already, and the tokens a request may have there.

    Args:
        url: Without a path.
        model: Name or directory; also where the load generator finds the tokenizer.

    Raises:
        ThinkError: If there is none, or it serves other models.
    """
    server = Server(url, model)
    models = server.client.models()
    served = next((one for one in models if model in (one.name, one.root)), None)
    if served is None:
        names = ", ".join(one.name for one in models) or "nothing"
        raise ThinkError(
            f"bench: --base-url {url} serves {names}, not {model}; give the model as that server "
            "names it"
        )
    server.model = served.name
    return server, served.max_model_len


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
