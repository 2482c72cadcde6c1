"""Needles in a haystack, in English: secret numbers stated in a long text are asked for.

In the manner of RULER's NIAH tasks (arXiv 2404.06654); words, names and text are our own.
"""

import random
from collections.abc import Sequence

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.recall import ADJECTIVES, NOUNS
from think_vllm.tools.eval.tasks.haystack import Frame, hide

#: Needles, values or questions of the tasks with several.
SEVERAL = 4
_ONE_ANSWER_TOKENS, _SEVERAL_ANSWERS_TOKENS = 64, 128
_INTRODUCTION = "Some secret numbers are hidden in the following text. Remember them."


def needle(rng: random.Random, frame: Frame) -> Question:
    """One number at a depth of the text."""
    (name,), (number,) = _names(rng, 1), _numbers(rng, 1)
    return _question("needle", rng, frame, [(name, number, frame.depth)], [name])


def multi_key(rng: random.Random, frame: Frame) -> Question:
    """As `needle`, with three more numbers, of other names, at random depths."""
    names, numbers = _names(rng, SEVERAL), _numbers(rng, SEVERAL)
    depths = [frame.depth, *[None] * (SEVERAL - 1)]
    return _question(
        "multi-key", rng, frame, list(zip(names, numbers, depths, strict=True)), names[:1]
    )


def multi_value(rng: random.Random, frame: Frame) -> Question:
    """Four numbers of one name, all asked for."""
    (name,) = _names(rng, 1)
    facts = [(name, number, None) for number in _numbers(rng, SEVERAL)]
    return _question("multi-value", rng, frame, facts, [name])


def multi_query(rng: random.Random, frame: Frame) -> Question:
    """Four numbers of four names, all asked for."""
    names, numbers = _names(rng, SEVERAL), _numbers(rng, SEVERAL)
    facts = [(name, number, None) for name, number in zip(names, numbers, strict=True)]
    return _question("multi-query", rng, frame, facts, names)


def statement(name: str, number: str) -> str:
    """The sentence that states a number."""
    return f"One of the secret numbers of the {name} is {number}."


def _question(
    task: str,
    rng: random.Random,
    frame: Frame,
    facts: Sequence[tuple[str, str, float | None]],
    asked: Sequence[str],
) -> Question:
    answers = tuple(number for name, number, _ in facts if name in asked)
    hidden = [
        (rng.random() if depth is None else depth, statement(name, number))
        for name, number, depth in facts
    ]
    hay = frame.hay(rng)
    listed = _listed([f"the {name}" for name in asked])
    numbers = "secret number" if len(answers) == 1 else f"{len(answers)} secret numbers"
    question = f"What {'is' if len(answers) == 1 else 'are'} the {numbers} of {listed}?"
    start = "" if frame.chat else f"\nAnswer: The {numbers} of {listed}:"

    def build(count: int) -> str:
        sentences = hay.take(count)
        # A text of the user may hold the same number.
        clean = [line for line in sentences if not any(number in line for number in answers)]
        # The one at a fixed depth goes in last, so that its depth counts the others as well.
        text = hide(hide(clean, hidden[1:]), hidden[:1])
        return f"{_INTRODUCTION}\n\n{' '.join(text)}\n\n{question}{start}"

    answer_tokens = frame.answer_tokens(
        _ONE_ANSWER_TOKENS if len(answers) == 1 else _SEVERAL_ANSWERS_TOKENS
    )
    prompt, used = frame.fill(task, build, answer_tokens)
    return Question(
        task=task,
        number=0,
        prompt=prompt,
        answers=answers,
        metric="all",
        max_tokens=answer_tokens,
        length=frame.length,
        depth=frame.depth,
        prompt_tokens=used,
    )


def _names(rng: random.Random, count: int) -> list[str]:
    """Names of things that no filler sentence mentions: those have no hyphen."""
    pairs = rng.sample([(one, other) for one in ADJECTIVES for other in NOUNS], count)
    return [f"{one}-{other}" for one, other in pairs]


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10**6, 10**7), count)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
