"""Start the real server, talk to it, stop it."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.support.processes import run_python
from tests.support.served import GREEDY, KV_CACHE_BYTES, POLL_S, Completion, Served
from think_vllm.tools.common.server import server_environment

START_TIMEOUT_S = 300
REQUEST_TIMEOUT_S = 600


def serve_arguments(model_tag: str | None, **given: Any) -> argparse.Namespace:
    """Arguments of `serve` as its parser leaves them, of those that tell how to reach a server."""
    empty = ["model", "host", "uds", "served_model_name", "api_key", "ssl_keyfile", "ssl_certfile"]
    usual = {"port": 8000, "ssl_cert_reqs": 0, "headless": False, "grpc": False}
    return argparse.Namespace(**{**dict.fromkeys(empty), **usual, "model_tag": model_tag, **given})


def completion_of(choice: dict[str, Any]) -> Completion:
    """A choice of an answer that was asked for token ids and log-probabilities."""
    return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["text"])


class Server(Served):
    """vLLM's OpenAI-compatible server in a process of its own, whose output goes to ``log``.

    The KV cache is that of one rank if there are several.
    """

    def __init__(
        self,
        model: Path,
        arguments: Sequence[str],
        log: Path,
        kv_cache_bytes: int = KV_CACHE_BYTES,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.model = str(model)
        memory = ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
        self.arguments = [*arguments, *memory, "--host", "127.0.0.1"]
        self.log = log
        # httpx keeps a connection for 5 seconds too: on a loaded machine it may find it closed.
        self._environment = server_environment(offline_environment()) | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(timeout=REQUEST_TIMEOUT_S)
        self.url = ""

    def __enter__(self) -> Self:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "think_vllm.tools.cli", "serve", self.model]
        command += [*self.arguments, "--port", str(port)]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
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

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended while starting:\n{self.log_tail()}")
            with suppress(httpx.TransportError):
                if self._client.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(POLL_S)
        raise RuntimeError(
            f"the server is not healthy after {START_TIMEOUT_S} s:\n{self.log_tail()}"
        )

    def stop(self) -> None:
        """End the server and all its children."""
        self._client.close()
        process = self._process
        if process is None:
            return
        self._process = None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all processes of the server for a while: idle ones still spin on their queues."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def log_text(self) -> str:
        """The server's output."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """POST a JSON body."""
        return self._client.post(f"{self.url}{path}", json={"model": self.model, **body})

    def get(self, path: str) -> httpx.Response:
        """Get what a path answers; an error if that is one."""
        answer = self._client.get(self.url + path)
        answer.raise_for_status()
        return answer

    def ask(self, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        """POST a JSON body, and return the answer's."""
        response = self.post(path, body)
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {response.text}\n{self.log_tail()}")
        return response.json()

    def stream(self, path: str = "/v1/completions", **body: Any) -> Iterator[dict[str, Any]]:
        """POST a JSON body, and yield what the server streams. Closing this hangs up."""
        body = {"model": self.model, "stream": True, **body}
        with self._client.stream("POST", f"{self.url}{path}", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"HTTP {response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    yield json.loads(data)

    def complete(self, prompt: list[int] | str, max_tokens: int, **options: Any) -> Completion:
        """Greedy completion of exactly ``max_tokens`` tokens."""
        return self._complete(prompt, max_tokens, **options)[0]

    def complete_together(
        self, prompts: Sequence[list[int]], max_tokens: int, **options: Any
    ) -> list[Completion]:
        """Complete all prompts in one HTTP request; see ``complete``."""
        return self._complete(list(prompts), max_tokens, **options)

    def _complete(self, prompt: Any, max_tokens: int, **options: Any) -> list[Completion]:
        body = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
        body |= GREEDY | options
        choices = sorted(self.ask(**body)["choices"], key=lambda choice: choice["index"])
        return [completion_of(choice) for choice in choices]

    def complete_all(
        self, prompts: Sequence[list[int]], max_tokens: Sequence[int], **options: Any
    ) -> list[Completion]:
        """Complete all prompts at the same time.

        Those whose answers have the same length are one HTTP request, so that they run together
        however slow the machine is.
        """
        groups: dict[int, list[int]] = {}
        for place, count in enumerate(max_tokens):
            groups.setdefault(count, []).append(place)
        with ThreadPoolExecutor(len(groups)) as pool:
            asked = {
                pool.submit(
                    self.complete_together, [prompts[i] for i in places], count, **options
                ): places
                for count, places in groups.items()
            }
            found = {
                place: answer
                for future, places in asked.items()
                for place, answer in zip(places, future.result(), strict=True)
            }
        return [found[place] for place in range(len(prompts))]

    def complete_each(
        self, prompts: Sequence[list[int]], max_tokens: int, options: Sequence[dict[str, Any]]
    ) -> list[Completion]:
        """Complete all prompts at the same time, each with options of its own."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            running = [
                pool.submit(self.complete, prompt, max_tokens, **own)
                for prompt, own in zip(prompts, options, strict=True)
            ]
        return [one.result() for one in running]

    def metrics_text(self) -> str:
        """All metrics, as Prometheus gets them."""
        return self._client.get(f"{self.url}/metrics").text


def run_script(text: str, folder: Path, *arguments: str) -> tuple[Any, str]:
    """Run a script that prints RESULT and JSON in a line: that, and all that it printed."""
    script = folder / "script.py"
    script.write_text(text)
    done = run_python(script, *arguments, env=offline_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT")), done.stdout


def run_serve(model: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected to reject to start."""
    command = ("-m", "think_vllm.tools.cli", "serve", model, *arguments)
    return run_python(*command, timeout=START_TIMEOUT_S, env=offline_environment())


def offline_environment() -> dict[str, str]:
    """Environment of a server that may not reach a model hub, nor interpret its kernels.

    Its worker is in the engine's process, as vLLM has it on one GPU, and has one thread: a server
    starts in 20 seconds, not 30, and leaves the other core to others.
    """
    return {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
