"""Tokens of a prompt as the model gets it: counted by the server, or by a tokenizer on disk."""

from pathlib import Path
from typing import Any, Protocol

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.client import Endpoint, RequestError


class Tokens(Protocol):
    """Counts tokens of prompts."""

    def count(self, text: str) -> int:
        """Tokens of a prompt with all that is put around it, a chat template for example."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""


class ServerTokens:
    """Counts with a server's ``/tokenize``, which vLLM has.

    Args:
        endpoint: The server.
        model: Name that requests carry.
        chat: Whether prompts are chat messages.
        template_options: ``chat_template_kwargs`` of the requests.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        chat: bool,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._model = model
        self._chat = chat
        self._options = {"chat_template_kwargs": template_options} if template_options else {}

    def count(self, text: str) -> int:
        """Tokens of a prompt as it is served."""
        if self._chat:
            messages = [{"role": "user", "content": text}]
            return int(self._ask("tokenize", {"messages": messages, **self._options})["count"])
        return int(self._ask("tokenize", {"prompt": text})["count"])

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        body = {"prompt": text, "add_special_tokens": False}
        return [int(token) for token in self._ask("tokenize", body)["tokens"]]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""
        return str(self._ask("detokenize", {"tokens": tokens})["prompt"])

    def _ask(self, what: str, body: dict[str, Any]) -> Any:
        try:
            return self._endpoint.post(f"/{what}", {"model": self._model, **body})
        except RequestError as error:
            raise ThinkError(
                f"eval: {self._endpoint.url}/{what}: {error}; prompts are sized by it, so give "
                "the model's tokenizer with --tokenizer NAME or directory"
            ) from None


class LocalTokens:
    """Counts with the tokenizer of a model, as transformers loads it.

    Args:
        name: Name or directory.
        chat: Whether prompts are chat messages.
        template_options: Further arguments of the chat template.

    Raises:
        ThinkError: If it cannot be loaded, or has no chat template and needs one.
    """

    def __init__(
        self, name: str | Path, chat: bool, template_options: dict[str, Any] | None = None
    ) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ThinkError(
                f"eval: --tokenizer {name}: {error}; pip install transformers, or leave it out "
                "where the server has /tokenize"
            ) from None
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ThinkError(f"eval: --tokenizer {name}: {reason}") from None
        if chat and not self._tokenizer.chat_template:
            raise ThinkError(f"eval: --tokenizer {name} has no chat template; leave --chat out")
        self._chat = chat
        self._options = template_options or {}

    def count(self, text: str) -> int:
        """Tokens of a prompt as it is served."""
        if self._chat:
            messages = [{"role": "user", "content": text}]
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._options
            )
            return len(self.encode(rendered))
        return len(self._tokenizer(text)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""
        return str(self._tokenizer.decode(tokens))


def cut_middle(text: str, room: int, tokens: Tokens) -> str:
    """Shorten a prompt to a number of tokens: its middle goes, as LongBench does it.

    Args:
        text: The prompt.
        room: Tokens that it may have as it is served.
        tokens: Counts them.

    Raises:
        ThinkError: If nothing would be left.
    """
    if (counted := tokens.count(text)) <= room:
        return text
    ids = tokens.encode(text)
    keep = room - (counted - len(ids))
    while keep >= 2:
        head = keep // 2
        cut = tokens.decode(ids[:head]) + tokens.decode(ids[len(ids) - (keep - head) :])
        if (counted := tokens.count(cut)) <= room:
            return cut
        # A text cut in two can have other tokens at the seam.
        keep -= counted - room
    raise ThinkError(
        f"eval: a prompt may have {room} tokens besides its answer, which leaves nothing of the "
        "text; serve a model with a longer context, or lower --max-tokens"
    )
