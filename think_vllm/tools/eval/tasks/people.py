"""Questions over two documents among many: where somebody works, and where that place is.

The shape of RULER's QA tasks, whose paragraphs are those of public sets; people and places here
are made up, so no model knows them.
"""

import random
from collections.abc import Iterator

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.recall import ADJECTIVES, NOUNS
from think_vllm.tools.eval.tasks.haystack import Frame

_ANSWER_TOKENS = 48
_TRADES = ("baker", "carpenter", "cook", "gardener", "tailor", "weaver", "printer", "clerk")
_KINDS = ("inn", "workshop", "school", "bakery", "theatre", "library", "museum", "shop")
_FIRST, _MIDDLE, _LAST = (
    ("Bra", "Dol", "Eri", "Fen", "Gal", "Hos", "Jor", "Kel", "Lor", "Mir", "Nor", "Tam"),
    ("da", "be", "go", "li", "ma", "ne", "ro", "si", "ta", "ve"),
    ("n", "l", "r", "s", "nd", "th", "m", "x"),
)


def people(rng: random.Random, frame: Frame) -> Question:
    """Ask for the town where a person works; the person's own document does not name it."""
    pairs = _pairs(rng)
    name, town, asked = next(pairs)
    others: list[str] = []
    seed = rng.random()

    def build(count: int) -> str:
        while len(others) < 2 * count:
            others.extend(next(pairs)[2])
        documents = [*asked, *others[: 2 * count]]
        random.Random(f"{seed}/{count}").shuffle(documents)
        text = "\n\n".join(f"Document {i}: {text}" for i, text in enumerate(documents, 1))
        start = "" if frame.chat else f"\nAnswer: {name} works in the town of"
        return (
            f"Answer a question about the following documents.\n\n{text}\n\n"
            f"Question: In which town does {name} work?{start}"
        )

    answer_tokens = frame.answer_tokens(_ANSWER_TOKENS)
    prompt, used = frame.fill("people", build, answer_tokens)
    return Question(
        task="people",
        number=0,
        prompt=prompt,
        answers=(town,),
        metric="any",
        max_tokens=answer_tokens,
        length=frame.length,
        prompt_tokens=used,
    )


def _pairs(rng: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """Yield person, town and the two documents that lead from one to the other, each once."""
    names = _names(rng)
    while True:
        name, town = f"{next(names)} {next(names)}", next(names)
        thing = f"{rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"
        place = f"{thing} of {next(names)}"
        trade, kind, born = rng.choice(_TRADES), rng.choice(_KINDS), rng.randrange(1900, 2000)
        yield (
            name,
            town,
            [
                f"{name}, a {trade} born in {born}, works at the {place}.",
                f"The {place} is a {kind} in the town of {town}.",
            ],
        )


def _names(rng: random.Random) -> Iterator[str]:
    """Yield made-up names, each once; there are 10^5."""
    used = set()
    while True:
        middle = "".join(rng.choices(_MIDDLE, k=rng.choice((2, 3))))
        name = f"{rng.choice(_FIRST)}{middle}{rng.choice(_LAST)}"
        if name not in used:
            used.add(name)
            yield name
