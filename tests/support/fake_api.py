"""An OpenAI-compatible server whose answers are a function: for tests of its clients."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

#: Text of an answer, or the HTTP status of a failure.
Reply = Callable[[str], str | int]


class FakeApi:
    """A server on this machine: one token a word, and one for the beginning of a prompt.

    Args:
        reply: Answers a prompt.
        models: Names that it serves.
        max_model_len: Tokens of a request that it claims to take.
        key: That it asks for; None for none.
        port: 0 for any.
    """

    def __init__(
        self,
        reply: Reply,
        models: tuple[str, ...] = ("fake",),
        max_model_len: int | None = 4096,
        key: str | None = None,
        port: int = 0,
    ) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self._vocabulary: list[str] = []
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if key is not None and self.headers["Authorization"] != f"Bearer {key}":
                    self._send(401, {"error": "no key"})
                elif self.path == "/v1/models":
                    cards = [{"id": name, "max_model_len": max_model_len} for name in models]
                    self._send(200, {"data": cards})
                elif self.path == "/health":
                    self._send(200, {})
                elif self.path == "/version":
                    self._send(200, {"version": "1.2.3"})
                else:
                    self._send(404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append((self.path, body))
                text = body["messages"][0]["content"] if "messages" in body else body.get("prompt")
                if self.path == "/tokenize":
                    special = body.get("add_special_tokens", True)
                    tokens = [0] * special + fake._encode(text)
                    self._send(200, {"count": len(tokens), "tokens": tokens})
                elif self.path == "/detokenize":
                    words = [fake._vocabulary[token] for token in body["tokens"]]
                    self._send(200, {"prompt": " ".join(words) + " "})
                else:
                    self._answer(reply(text), chat=self.path == "/v1/chat/completions")

            def _answer(self, said: str | int, chat: bool) -> None:
                if isinstance(said, int):
                    self._send(said, {"error": "rejected"})
                    return
                text = {"message": {"content": said}} if chat else {"text": said}
                self._send(200, {"choices": [{"index": 0, **text, "finish_reason": "stop"}]})

            def _send(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            known = {word: token for token, word in enumerate(self._vocabulary)}
            tokens = []
            for word in text.split():
                if word not in known:
                    known[word] = len(self._vocabulary)
                    self._vocabulary.append(word)
                tokens.append(known[word])
            return tokens

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def read_recall(prompt: str) -> str:
    """The right answer to a recall prompt without its question mark."""
    words = prompt.split()
    place = words.index(words[-1])
    return " ".join(["?", *words[place + 2 : place + 6], "."])
