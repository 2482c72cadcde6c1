"""Word counts, in the manner of RULER's aggregation tasks: the most frequent words of a list.

Words are made up, so that a list of any length has enough of them.
"""

import random
from collections.abc import Callable, Iterator

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.tasks.haystack import Frame

NUM_COMMON = 5
COMMON_TIMES, RARE_TIMES = 12, 2
NUM_FREQUENT = 3
#: Words of the text that has three words frequent enough to be told from the fourth.
LEAST_WORDS = 60
_ANSWER_TOKENS = 96
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = 3


def common_words(rng: random.Random, frame: Frame) -> Question:
    """Five words stand in a list twelve times, all others twice."""
    made = _made_up(rng)
    common = [next(made) for _ in range(NUM_COMMON)]
    rare: list[str] = []
    seed = rng.random()

    def build(count: int) -> str:
        rare.extend(next(made) for _ in range(count - len(rare)))
        words = common * COMMON_TIMES + rare[:count] * RARE_TIMES
        random.Random(f"{seed}/{count}").shuffle(words)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        question = f"Question: Which {NUM_COMMON} words are the most common in the list?"
        start = "" if frame.chat else f"\nAnswer: The {NUM_COMMON} most common words are"
        return (
            "Some words of the following numbered list are more common than the others.\n\n"
            f"{listed}\n\n{question}{start}"
        )

    return _question("common-words", frame, build, common)


def frequent_words(rng: random.Random, frame: Frame) -> Question:
    """Frequencies fall with the square of the rank; the first three words are asked for."""
    made = _made_up(rng)
    ranked: list[str] = []
    seed = rng.random()

    def build(count: int) -> str:
        times = list(_zipf(LEAST_WORDS + count))
        ranked.extend(next(made) for _ in range(len(times) - len(ranked)))
        words = [word for word, n in zip(ranked, times, strict=False) for _ in range(n)]
        random.Random(f"{seed}/{count}").shuffle(words)
        question = f"Question: Which {NUM_FREQUENT} words are the most frequent in the text?"
        start = "" if frame.chat else f"\nAnswer: The {NUM_FREQUENT} most frequent words are"
        return f"Count the words of the following text.\n\n{' '.join(words)}\n\n{question}{start}"

    build(0)
    return _question("frequent-words", frame, build, ranked[:NUM_FREQUENT])


def _question(task: str, frame: Frame, build: Callable[[int], str], answers: list[str]) -> Question:
    answer_tokens = frame.answer_tokens(_ANSWER_TOKENS)
    prompt, used = frame.fill(task, build, answer_tokens)
    return Question(
        task=task,
        number=0,
        prompt=prompt,
        answers=tuple(answers),
        metric="all",
        max_tokens=answer_tokens,
        length=frame.length,
        prompt_tokens=used,
    )


def _zipf(total: int) -> Iterator[int]:
    """Times that each rank stands in a text of so many words; single words fill it up."""
    # 6 / pi^2 makes the shares of all ranks one.
    left, rank = total, 1
    while left > 0:
        times = min(left, max(1, round(total * 0.6079271 / rank**2)))
        yield times
        left -= times
        rank += 1


def _made_up(rng: random.Random) -> Iterator[str]:
    """Yield words of three syllables, each once."""
    used = set()
    while True:
        letters = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(_SYLLABLES))
        word = "".join(letters)
        if word not in used:
            used.add(word)
            yield word
