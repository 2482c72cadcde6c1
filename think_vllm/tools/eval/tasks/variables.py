"""Variable tracking, in the manner of RULER: which variables have a value, directly or not."""

import random
import string

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.tasks.haystack import Frame, hide

NUM_CHAINS = 2
CHAIN_LENGTH = 5
_ANSWER_TOKENS = 128
_NAME_LETTERS = 5


def variables(rng: random.Random, frame: Frame) -> Question:
    """One chain of assignments is asked for, and another one distracts."""
    names = _names(rng, NUM_CHAINS * CHAIN_LENGTH)
    values = [str(value) for value in rng.sample(range(10**4, 10**5), NUM_CHAINS)]
    chains = [names[i * CHAIN_LENGTH : (i + 1) * CHAIN_LENGTH] for i in range(NUM_CHAINS)]
    hidden = []
    for chain, value in zip(chains, values, strict=True):
        # A variable is assigned before another takes its value: in the order of the text.
        depths = sorted(rng.random() for _ in chain)
        hidden += list(zip(depths, _assignments(chain, value), strict=True))
    hay = frame.hay(rng)
    question = (
        f"Question: Which {CHAIN_LENGTH} variables have the value {values[0]}, directly or "
        "through other variables?"
    )
    start = "" if frame.chat else f"\nAnswer: The {CHAIN_LENGTH} variables are"

    def build(count: int) -> str:
        clean = [line for line in hay.take(count) if not any(value in line for value in values)]
        text = " ".join(hide(clean, hidden))
        return (
            "Follow the assignments of variables that are hidden in the following text.\n\n"
            f"{text}\n\n{question}{start}"
        )

    answer_tokens = frame.answer_tokens(_ANSWER_TOKENS)
    prompt, used = frame.fill("variables", build, answer_tokens)
    return Question(
        task="variables",
        number=0,
        prompt=prompt,
        answers=tuple(chains[0]),
        metric="all",
        max_tokens=answer_tokens,
        length=frame.length,
        prompt_tokens=used,
    )


def _assignments(chain: list[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in chain[:-1])]
    return [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=True)]


def _names(rng: random.Random, count: int) -> list[str]:
    names: set[str] = set()
    while len(names) < count:
        names.add("".join(rng.choices(string.ascii_uppercase, k=_NAME_LETTERS)))
    # A set's order changes from run to run.
    return rng.sample(sorted(names), count)
