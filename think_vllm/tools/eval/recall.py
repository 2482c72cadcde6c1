"""Long-context key/value recall: text that only a working KV cache can answer.

A prompt is a shuffle of records and filler sentences, then one question:

    the code of k17 is 4 9 2 1 . the old mill watches the river beside the garden .
    the code of k203 is 7 7 0 5 . what is the code of k17 ?

The right continuation is ``4 9 2 1``, then ``.``. Keys and digits are random, so a wrong key cache
shows in the digits: guessing is right once in 10,000.

This module owns the vocabulary and the text. It is pure Python, so tests, load generators and the
training code share it. Every token is one word and is followed by a blank, punctuation included:
``len(text.split())`` is the number of tokens of a text without its leading ``<s>``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

PAD: Final = "<pad>"
UNK: Final = "<unk>"
BOS: Final = "<s>"
EOS: Final = "</s>"
STOP: Final = "."
"""Ends a record, a filler sentence and an answer; generation stops at it."""

SPECIAL_TOKENS: Final = (PAD, UNK, BOS, EOS)
DIGITS: Final = tuple("0123456789")
NUM_KEYS: Final = 256
KEYS: Final = tuple(f"k{i}" for i in range(NUM_KEYS))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_TEMPLATE_WORDS: Final = ("the", "code", "of", "is", "what", "?", STOP)
ADJECTIVES: Final = _words(
    "old quiet green narrow bright distant gentle heavy hollow little lonely modest painted pale "
    "patient plain rusty silver sleepy small steady tall warm young"
)
NOUNS: Final = _words(
    "mill river garden barn bell bench boat bridge candle castle chapel cliff cottage farmer field "
    "fisher fountain gate harbor hill horse island keeper ladder lake lantern library market "
    "meadow miller mountain orchard painter path pond road sailor shepherd stable station teacher "
    "tower village window"
)
_VERBS: Final = _words(
    "watches admires approaches avoids crosses describes draws enters faces finds follows guards "
    "hides knows leaves likes measures misses paints passes remembers repairs reaches visits"
)
_PREPOSITIONS: Final = _words(
    "beside above across against along around before behind below beneath between near opposite "
    "past under"
)

VOCABULARY: Final[tuple[str, ...]] = (
    *SPECIAL_TOKENS,
    *_TEMPLATE_WORDS,
    *DIGITS,
    *KEYS,
    *ADJECTIVES,
    *NOUNS,
    *_VERBS,
    *_PREPOSITIONS,
)
"""Every token of the model; the position in the tuple is the token id."""

CODE_DIGITS: Final = 4
"""Digits, and so tokens, of a code."""
RECORD_TOKENS: Final = 10
QUESTION_TOKENS: Final = 7
ANSWER_TOKENS: Final = CODE_DIGITS + 1
"""Tokens of an answer with the stop mark."""
MAX_FILLER_TOKENS: Final = 10


@dataclass(frozen=True)
class Record:
    """One fact to remember."""

    key: str  # a word of `KEYS`
    code: str  # four digits separated by blanks, e.g. ``"4 9 2 1"``

    @property
    def statement(self) -> str:
        """The sentence that states the record (`RECORD_TOKENS` tokens)."""
        return f"the code of {self.key} is {self.code} {STOP}"

    @property
    def question(self) -> str:
        """The sentence that asks for the code (`QUESTION_TOKENS` tokens)."""
        return f"what is the code of {self.key} ?"


@dataclass(frozen=True)
class RecallSample:
    """A prompt and the only right continuation."""

    #: Records and filler, ending with the question; without the leading ``<s>``, which the
    #: tokenizer adds.
    prompt: str
    answer: str  # the four digits separated by blanks, e.g. ``"4 9 2 1"``

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, with the leading ``<s>``."""
        return 1 + len(self.prompt.split())

    def is_answered_by(self, completion: str) -> bool:
        """Return whether a completion starts with exactly the right four digits.

        Surrounding blanks and whatever follows the fourth digit do not count: servers differ in
        whether they return the blank before the first token and the stop mark after the last.
        """
        return completion.split()[:CODE_DIGITS] == self.answer.split()


def draw_records(rng: random.Random, num_records: int) -> list[Record]:
    """Draw records with distinct keys and uniform digits (repeats allowed).

    Args:
        rng: Source of randomness.
        num_records: Number of records, 1 to `NUM_KEYS`.

    Raises:
        ValueError: If `num_records` is out of range.
    """
    if not 1 <= num_records <= NUM_KEYS:
        raise ValueError(f"num_records: expected 1 to {NUM_KEYS}, got {num_records}")
    return [
        Record(key, " ".join(rng.choices(DIGITS, k=CODE_DIGITS)))
        for key in rng.sample(KEYS, num_records)
    ]


def draw_filler(rng: random.Random) -> str:
    """Draw a sentence without information, of 6 to `MAX_FILLER_TOKENS` tokens."""
    subject, target, place = rng.sample(NOUNS, 3)
    adjective = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.5 else ""
    sentence = f"the {adjective}{subject} {rng.choice(_VERBS)} the {target}"
    if rng.random() < 0.5:
        sentence += f" {rng.choice(_PREPOSITIONS)} the {place}"
    return f"{sentence} {STOP}"


def recall_prompt(rng: random.Random, num_tokens: int, num_records: int) -> RecallSample:
    """Draw a prompt of a given length.

    The prompt with its ``<s>`` is just under `num_tokens`: there is always room for the answer
    and its stop mark (`ANSWER_TOKENS`), and less than one more filler sentence
    (`MAX_FILLER_TOKENS`) is left over.

    Args:
        rng: Source of randomness; the same state gives the same sample.
        num_tokens: Tokens of prompt and answer together, an upper bound.
        num_records: Number of records, 1 to `NUM_KEYS`. The one asked for is uniform over them.

    Raises:
        ValueError: If the records and the question do not fit, or `num_records` is out of range.
    """
    records = draw_records(rng, num_records)
    needed = 1 + num_records * RECORD_TOKENS + QUESTION_TOKENS + ANSWER_TOKENS
    if needed > num_tokens:
        raise ValueError(
            f"num_tokens: {num_records} records need at least {needed} tokens, got {num_tokens}"
        )
    asked = rng.choice(records)
    sentences = [record.statement for record in records]
    room = num_tokens - needed
    while True:
        filler = draw_filler(rng)
        room -= len(filler.split())
        if room < 0:
            break
        sentences.append(filler)
    rng.shuffle(sentences)
    return RecallSample(prompt=" ".join([*sentences, asked.question]), answer=asked.code)


def recall_samples(
    seed: int, count: int, num_tokens: int, num_records: int
) -> Iterator[RecallSample]:
    """Yield `count` independent samples of one size, the same ones for the same arguments."""
    rng = random.Random(f"recall/{seed}/{num_tokens}/{num_records}")
    for _ in range(count):
        yield recall_prompt(rng, num_tokens, num_records)
