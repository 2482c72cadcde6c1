"""Text to hide facts in, and prompts filled with it to a number of tokens."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.recall import draw_filler

#: Units of text of the first try; the second one is computed from it.
_FIRST_TRY = 16


@dataclass(frozen=True)
class Frame:
    """What a prompt has to fit."""

    length: int  # tokens of prompt and answer together
    #: Share of the text before the fact that is asked for; None where the task chooses.
    depth: float | None
    count: Callable[[str], int]  # tokens of a prompt as it is served
    chat: bool = False  # whether it is a chat message, which takes no beginning of an answer
    #: Tokens of an answer, in place of the task's; None for the task's.
    max_tokens: int | None = None
    sentences: tuple[str, ...] = ()  # of a text to hide facts in; empty for generated ones

    def answer_tokens(self, usual: int) -> int:
        """Tokens that an answer may have."""
        return usual if self.max_tokens is None else self.max_tokens

    def fill(self, task: str, build: Callable[[int], str], answer_tokens: int) -> tuple[str, int]:
        """Build the longest prompt that fits.

        Args:
            task: For errors.
            build: A prompt with so many units of filling.
            answer_tokens: Tokens that the answer may have.

        Returns:
            The prompt, and its tokens: with one more unit it would be too long.

        Raises:
            ThinkError: If it does not even fit without filling.
        """
        room = self.length - answer_tokens
        best, low, used = build(0), 0, 0
        used = empty = self.count(best)
        if used > room:
            raise ThinkError(
                f"eval: {task} needs {used} tokens and {answer_tokens} for its answer even "
                f"without filling; --lengths {self.length} is too short for it"
            )
        high: int | None = None
        guess = _FIRST_TRY
        while high is None or high - low > 1:
            text = build(guess)
            counted = self.count(text)
            if counted <= room:
                best, low, used = text, guess, counted
            else:
                high = guess
            unit = max(1.0, (counted - empty) / guess)
            guess = guess + int((room - counted) // unit)
            # Where the estimate says that this was it, one more must be seen not to fit.
            guess = max(guess, low + 1)
            if high is not None:
                guess = min(guess, high - 1)
        return best, used

    def hay(self, rng: random.Random) -> "Hay":
        """Sentences to hide facts in."""
        if not self.sentences:
            return Hay(lambda: as_english(draw_filler(rng)))
        start = rng.randrange(len(self.sentences))
        # Round and round: a text may be shorter than the prompt.
        numbers = iter(range(start, start + 10**9))
        return Hay(lambda: self.sentences[next(numbers) % len(self.sentences)])


class Hay:
    """Sentences drawn one after the other, and kept."""

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._drawn: list[str] = []

    def take(self, count: int) -> list[str]:
        """The first so many sentences."""
        while len(self._drawn) < count:
            self._drawn.append(self._draw())
        return self._drawn[:count]


def hide(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Put sentences between others.

    Args:
        sentences: The text.
        needles: Depth and sentence of each; the share of the text's words before it is as close
            to its depth as whole sentences allow. Those of one place stay in their order.
    """
    words = [0, *accumulate(len(sentence.split()) for sentence in sentences)]
    places: dict[int, list[str]] = {}
    for depth, needle in needles:
        place = min(range(len(words)), key=lambda i: abs(words[i] - depth * words[-1]))
        places.setdefault(place, []).append(needle)
    result = []
    for index in range(len(words)):
        result += places.get(index, [])
        result += sentences[index : index + 1]
    return result


def as_english(filler: str) -> str:
    """A filler sentence of the recall task as one writes it."""
    return filler.removesuffix(" .").capitalize() + "."


def read_sentences(path: Path) -> tuple[str, ...]:
    """Sentences of a text file, to hide facts in.

    Raises:
        ThinkError: If it cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ThinkError(f"eval: --haystack {path}: {error}; a UTF-8 text is needed") from None
    sentences = tuple(filter(None, re.split(r"(?<=[.!?])\s+", " ".join(text.split()))))
    if not sentences:
        raise ThinkError(f"eval: --haystack {path} holds no sentence")
    return sentences
