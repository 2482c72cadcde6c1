"""A server that answers as vLLM's does, at once, so that only the program that loads it is tested.

Run with ``python -m tests.support.fake_server serve MODEL [flags] --port N``. It has a child that
ignores SIGTERM. ``--block-size 7`` makes it end while starting, ``--block-size 11`` never answer,
``--block-size 13`` reject two requests of four, one of them without an answer.
"""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LAST_WORDS = "this is no block size"
METRICS = """\
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:kv_cache_usage_perc{engine="0"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="101"} 1.0
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    time.sleep(60)
"""


class Handler(BaseHTTPRequestHandler):
    """The paths that a load test asks for."""

    silent = False
    unsteady = False
    numbers = itertools.count()

    def do_GET(self) -> None:
        self._answer(METRICS if self.path == "/metrics" else "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        while self.silent:
            time.sleep(60)
        place = next(self.numbers) % 4
        if self.unsteady and place == 1:
            self.send_error(503)
            return
        if self.unsteady and place == 3:
            return
        count = body["max_tokens"]
        chunks: list[dict[str, Any]] = [{"choices": [{"text": " 4"}]} for _ in range(count)]
        chunks.append({"choices": [], "usage": {"completion_tokens": count, "prompt_tokens": 9}})
        self._answer("".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def main(arguments: list[str]) -> None:
    port = int(arguments[arguments.index("--port") + 1])
    block_size = (
        arguments[arguments.index("--block-size") + 1] if "--block-size" in arguments else ""
    )
    if block_size == "7":
        sys.exit(LAST_WORDS)
    Handler.silent = block_size == "11"
    Handler.unsteady = block_size == "13"
    subprocess.Popen([sys.executable, "-c", STUBBORN])
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
