"""An OpenAI-compatible server, as its client sees it: plain HTTP with JSON, nothing else."""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.question import Question

#: Proxies that the environment names are not asked for these.
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
#: What an error keeps of a server's answer, characters.
_ERROR_CHARACTERS = 300


class RequestError(Exception):
    """A request without a usable answer; the message says why.

    Args:
        message: Why.
        status: HTTP status; None if there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What came back for a question.

    Args:
        text: The answer; empty if the request failed.
        finish_reason: Why generation stopped, as the server says.
        error: Why the request failed; None if it did not.
        seconds: From sending to the end of the answer.
    """

    text: str
    finish_reason: str | None
    error: str | None
    seconds: float


class Endpoint:
    """One server.

    Args:
        url: With or without ``/v1``.
        api_key: Sent as a bearer token if there is one.
        timeout_s: Seconds for one request.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ThinkError(
                f"eval: --base-url {url!r} is no address; write it as in http://localhost:8000"
            )
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        direct = [urllib.request.ProxyHandler({})] if parts.hostname in _LOCAL_HOSTS else []
        self._opener = urllib.request.build_opener(*direct)

    def get(self, path: str) -> Any:
        """JSON of a GET.

        Raises:
            RequestError: Without one.
        """
        return self._send(urllib.request.Request(self.url + path, headers=self._headers))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST of JSON.

        Raises:
            RequestError: Without one.
        """
        data = json.dumps(body).encode()
        return self._send(urllib.request.Request(self.url + path, data, self._headers))

    def _send(self, request: urllib.request.Request) -> Any:
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:_ERROR_CHARACTERS]
            raise RequestError(f"HTTP {error.code}: {said}", error.code) from None
        except ValueError as error:
            raise RequestError(f"no JSON came back: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"no answer: {error!r}") from None


@dataclass(frozen=True)
class Asker:
    """How questions are sent to a server.

    Args:
        endpoint: Where to.
        model: Name that requests carry.
        chat: Whether as chat messages, not as plain prompts.
        extra: Further fields of every request.
    """

    endpoint: Endpoint
    model: str
    chat: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    def ask(self, question: Question) -> Answer:
        """Send a question, greedily; a failure is part of the answer."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": question.max_tokens,
            "temperature": 0,
            **dict(self.extra),
        }
        if self.chat:
            body["messages"] = [{"role": "user", "content": question.prompt}]
        else:
            body["prompt"] = question.prompt
        start = time.monotonic()
        try:
            reply = self.endpoint.post(
                "/v1/chat/completions" if self.chat else "/v1/completions", body
            )
            text, reason = self._read(reply)
        except RequestError as error:
            return Answer("", None, str(error), time.monotonic() - start)
        return Answer(text, reason, None, time.monotonic() - start)

    def _read(self, reply: Any) -> tuple[str, str | None]:
        try:
            choice = reply["choices"][0]
            # Null where a reasoning model never came to its answer.
            text = (choice["message"]["content"] if self.chat else choice["text"]) or ""
            if not isinstance(text, str):
                raise TypeError("its text is none")
            return text, choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            said = json.dumps(reply)[:_ERROR_CHARACTERS]
            raise RequestError(f"not what the API promises ({error!r}): {said}") from None


@dataclass(frozen=True)
class Card:
    """What a server says about itself.

    Args:
        model: Name that requests carry.
        max_model_len: Tokens of a request; None if it does not say.
        version: Of the server; None if it does not say.
        settings: Thin blocks' settings; None if it does not say (vLLM does in development mode).
    """

    model: str
    max_model_len: int | None
    version: str | None
    settings: dict[str, Any] | None


def read_card(endpoint: Endpoint, model: str | None) -> Card:
    """Ask a server what it serves.

    Args:
        endpoint: The server.
        model: Name that is wanted; None for the only one.

    Raises:
        ThinkError: If there is no such server or model, or several models and no name.
    """
    try:
        cards = {card["id"]: card for card in endpoint.get("/v1/models")["data"]}
    except (RequestError, KeyError, TypeError) as error:
        raise ThinkError(
            f"eval: {endpoint.url}/v1/models: {error}; an OpenAI-compatible server is needed "
            "there (and OPENAI_API_KEY in the environment if it asks for a key)"
        ) from None
    names = ", ".join(cards) or "no model"
    if model is None and len(cards) != 1:
        raise ThinkError(f"eval: {endpoint.url} serves {names}; choose one with --model NAME")
    if model is not None and model not in cards:
        raise ThinkError(f"eval: {endpoint.url} serves {names}, not {model}; correct --model")
    name = model if model is not None else next(iter(cards))
    return Card(name, cards[name].get("max_model_len"), _version(endpoint), _settings(endpoint))


def _version(endpoint: Endpoint) -> str | None:
    try:
        version = endpoint.get("/version")["version"]
    except (RequestError, KeyError, TypeError):
        return None  # Only vLLM has it.
    return str(version)


def _settings(endpoint: Endpoint) -> dict[str, Any] | None:
    try:
        config = endpoint.get("/server_info?config_format=json")["vllm_config"]
        return dict(config["additional_config"])
    except (RequestError, KeyError, TypeError, ValueError):
        return None  # vLLM has it with VLLM_SERVER_DEV_MODE=1 only.
