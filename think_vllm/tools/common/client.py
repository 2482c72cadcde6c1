"""A server of OpenAI's API, asked through OpenAI's own client."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, OpenAI, OpenAIError

from think_vllm.errors import ThinkError

#: Requests to these hosts bypass the proxies of the environment.
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
#: Characters of a server's response that an error keeps.
_ERROR_CHARACTERS = 300


class RequestError(OSError):
    """A request without a usable response; the message says why."""


@dataclass(frozen=True)
class ServedModel:
    """A model of a server."""

    name: str  # name that requests carry
    root: str | None  # name or directory it was loaded from; None if the server does not say
    max_model_len: int | None  # tokens of a request; None if the server does not say


class Client:
    """One server; `OPENAI_API_KEY` is sent if it is set.

    Args:
        url: With or without ``/v1``.
        command: What errors begin with, such as ``eval``.
        timeout_s: Seconds for one request.
        retries: Further attempts after errors that may pass; OpenAI's client waits between them.

    Raises:
        ThinkError: If the URL is no address.
    """

    def __init__(self, url: str, command: str, timeout_s: float, retries: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._command = command
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ThinkError(
                f"{command}: --base-url {url!r} is no address; write it as in http://localhost:8000"
            )
        self._openai = OpenAI(
            base_url=f"{self.url}/v1",
            # The client wants one; servers without a key ignore it.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout_s,
            max_retries=retries,
            http_client=DefaultHttpxClient(trust_env=parts.hostname not in _LOCAL_HOSTS),
        )

    def get(self, path: str) -> str:
        """Body of a GET.

        Raises:
            RequestError: If the server does not respond, or responds with an error.
        """
        with _explained():
            return self._openai.get(self.url + path, cast_to=str)

    def get_json(self, path: str) -> Any:
        """JSON of a GET.

        Raises:
            RequestError: If there is none.
        """
        with _explained():
            return json.loads(self.get(path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """JSON of a POST of JSON.

        Raises:
            RequestError: If there is none.
        """
        with _explained():
            return json.loads(self._openai.post(self.url + path, cast_to=str, body=body))

    def complete(
        self, model: str, prompt: str, max_tokens: int, chat: bool, extra: dict[str, Any]
    ) -> tuple[str, str | None]:
        """Complete a prompt greedily.

        Args:
            model: Name of the model.
            prompt: Text.
            max_tokens: Tokens of the answer.
            chat: Whether the prompt is sent as a chat message.
            extra: Further fields of the request; they replace those of the same name.

        Returns:
            The answer, and why it ended.

        Raises:
            RequestError: If there is no answer.
        """
        with _explained():
            if chat:
                reply = self._openai.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body=extra,
                ).choices[0]
                # Null where a reasoning model never came to its answer.
                return reply.message.content or "", reply.finish_reason
            choice = self._openai.completions.create(
                model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
            ).choices[0]
            return choice.text + "", choice.finish_reason

    def models(self) -> list[ServedModel]:
        """Models that the server has.

        Raises:
            ThinkError: If no such server answers.
        """
        try:
            with _explained():
                return [
                    ServedModel(
                        model.id,
                        getattr(model, "root", None),
                        getattr(model, "max_model_len", None),
                    )
                    for model in self._openai.models.list().data
                ]
        except RequestError as error:
            raise ThinkError(
                f"{self._command}: --base-url {self.url}: no OpenAI-compatible server answers "
                f"there ({error}); start one, or correct the address (if it asks for a key, set "
                "OPENAI_API_KEY)"
            ) from None


@contextmanager
def _explained() -> Iterator[None]:
    """Turn errors of OpenAI's client into `RequestError`, with what the server said."""
    try:
        yield
    except APIStatusError as error:
        text = error.response.text[:_ERROR_CHARACTERS]
        raise RequestError(f"HTTP {error.status_code}: {text}") from None
    except APIConnectionError as error:
        raise RequestError(f"no answer: {error.__cause__ or error!r}") from None
    except (OpenAIError, ValueError) as error:
        raise RequestError(f"no JSON came back: {error}") from None
    except (AttributeError, IndexError, TypeError) as error:
        raise RequestError(f"not a response of OpenAI's API: {error!r}") from None
