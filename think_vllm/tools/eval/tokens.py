"""Tokens of a prompt as the model gets it: counted by the server, or by a tokenizer on disk."""

from collections.abc import Callable
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.common.client import Client, RequestError

#: Counts the tokens of a prompt with all that is put around it, such as a chat template.
Counter = Callable[[str], int]


def server_counter(
    client: Client, model: str, chat: bool, template_options: dict[str, Any] | None
) -> Counter:
    """Count with a server's ``/tokenize``, which vLLM has."""
    options = {"chat_template_kwargs": template_options} if template_options else {}

    def count(text: str) -> int:
        body: dict[str, Any] = {"prompt": text}
        if chat:
            body = {"messages": [{"role": "user", "content": text}], **options}
        try:
            return int(client.post("/tokenize", {"model": model, **body})["count"])
        except RequestError as error:
            raise ThinkError(
                f"eval: {client.url}/tokenize: {error}; prompts are sized by it, so give the "
                "model's tokenizer with --tokenizer NAME or directory"
            ) from None

    return count


def tokenizer_counter(name: str, chat: bool, template_options: dict[str, Any] | None) -> Counter:
    """Count with the tokenizer of a model, as transformers loads it.

    Raises:
        ThinkError: If it cannot be loaded, or has no chat template and needs one.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ThinkError(
            f"eval: --tokenizer {name}: {error}; pip install transformers, or leave it out "
            "where the server has /tokenize"
        ) from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ThinkError(f"eval: --tokenizer {name}: {reason}") from None
    if chat and not tokenizer.chat_template:
        raise ThinkError(f"eval: --tokenizer {name} has no chat template; leave --chat out")

    def count(text: str) -> int:
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                **template_options or {},
            )
        return len(tokenizer(text, add_special_tokens=not chat)["input_ids"])

    return count
