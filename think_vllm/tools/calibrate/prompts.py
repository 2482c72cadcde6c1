"""The prompts that a model is calibrated over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.tasks import TASKS, make_questions
from think_vllm.tools.eval.tasks.haystack import Frame

#: Keys of a line of JSON that have its text, the first one that is there counts.
TEXT_KEYS = ("prompt", "text")
#: Depths at which tasks hide what they ask for.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

Encode = Callable[[str], list[int]]


def read_prompts(path: Path, encode: Encode, count: int, num_tokens: int) -> list[list[int]]:
    """Prompts of a file.

    Args:
        path: JSON lines (``.jsonl``), a prompt each; of any other file, its text, cut into pieces.
        encode: The model's tokenizer, special tokens included.
        count: Prompts at most.
        num_tokens: Tokens of a prompt at most; of longer ones the last tokens are kept, as that
            is where their questions are. Text is cut into pieces of so many.

    Raises:
        ThinkError: If there are none.
    """
    who = f"calibrate: --prompts {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThinkError(f"{who}: {error}; name a text file, or JSON lines (.jsonl)") from None
    if path.suffix == ".jsonl":
        lines = _lines(text, who)
        prompts = [encode(line)[-num_tokens:] for line, _ in zip(lines, range(count), strict=False)]
    else:
        tokens = encode(text)
        starts = range(0, len(tokens), num_tokens)
        prompts = [tokens[start : start + num_tokens] for start in starts][:count]
    prompts = [prompt for prompt in prompts if len(prompt) > 1]
    if not prompts:
        raise ThinkError(f"{who} has no text; a few thousand tokens of what users send are needed")
    return prompts


def task_prompts(
    name: str, encode: Encode, count: int, num_tokens: int, seed: int
) -> list[list[int]]:
    """Prompts of a task of `think-vllm eval`.

    Args:
        name: Of the task.
        encode: The model's tokenizer, special tokens included.
        count: Prompts.
        num_tokens: Tokens of prompt and answer at most.
        seed: Another one than that of the evaluation, or it asks what was calibrated over.

    Raises:
        ThinkError: If the task does not fit.
    """
    if name not in TASKS:
        raise ThinkError(f"calibrate: --task {name} is no task; there are {', '.join(TASKS)}")
    frame = Frame(length=0, depth=None, count=lambda text: len(encode(text)))
    depths = DEPTHS if TASKS[name].has_depth else (0.0,)
    samples = -(-count // len(depths))
    questions = make_questions([name], [num_tokens], depths, samples, seed, frame, threads=1)
    return [encode(question.prompt) for question in questions[:count]]


def _lines(text: str, who: str) -> Iterator[str]:
    """Texts of JSON lines.

    Raises:
        ThinkError: If a line has none.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except ValueError as error:
            raise ThinkError(f"{who}, line {number} is no JSON: {error}") from None
        if isinstance(value, dict):
            value = next((value[key] for key in TEXT_KEYS if key in value), None)
        if not isinstance(value, str):
            raise ThinkError(
                f"{who}, line {number} has no text: a string is needed, or an object with "
                f"{' or '.join(TEXT_KEYS)}"
            )
        yield value
