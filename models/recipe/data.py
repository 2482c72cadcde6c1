"""Training sequences: records, filler and many answered questions, all freshly drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from think_vllm.tools.eval.recall import (
    BOS,
    CODE_DIGITS,
    RECORD_TOKENS,
    STOP,
    VOCABULARY,
    Record,
    draw_filler,
    draw_records,
)

_IDS = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Batch:
    """Sequences of one length."""

    tokens: torch.Tensor  # [batch, length] int64. Token ids, each row starting with ``<s>``
    is_answer: torch.Tensor  # [batch, length] bool. True on the digits that answer a question


class _Writer:
    """Appends sentences to one sequence and marks the digits of answers."""

    def __init__(self) -> None:
        self.words: list[str] = [BOS]
        self.is_answer: list[bool] = [False]

    def write(self, text: str) -> None:
        words = text.split()
        self.words += words
        self.is_answer += [False] * len(words)

    def ask(self, record: Record) -> None:
        self.write(record.question)
        self.words += record.code.split()
        self.is_answer += [True] * CODE_DIGITS
        self.write(STOP)


def _write_block(
    writer: _Writer, rng: random.Random, records: list[Record], filler: float, length: int
) -> None:
    """Write all statements first, then questions to the end."""
    sentences = [record.statement for record in records]
    question_share = rng.uniform(0.15, 0.60)
    room = int(length * (1.0 - question_share)) - len(records) * RECORD_TOKENS
    for _ in records:
        if rng.random() < filler / (1.0 - filler):
            sentence = draw_filler(rng)
            room -= len(sentence.split())
            if room < 0:
                break
            sentences.append(sentence)
    rng.shuffle(sentences)
    for sentence in sentences:
        writer.write(sentence)
    while len(writer.words) < length:
        writer.ask(rng.choice(records))


def _write_interleaved(
    writer: _Writer, rng: random.Random, records: list[Record], filler: float, length: int
) -> None:
    """Write statements and questions about earlier statements in turn."""
    known = 0
    while len(writer.words) < length:
        if rng.random() < filler:
            writer.write(draw_filler(rng))
        elif known == 0 or (known < len(records) and rng.random() < 0.5):
            writer.write(records[known].statement)
            known += 1
        else:
            writer.ask(rng.choice(records[:known]))


def draw_batch(
    rng: random.Random, batch: int, length: int, max_records: int, filler: float
) -> Batch:
    """Draw a training batch.

    Half of the sequences ask in a block at the end, half in between. Sequences are cut at
    `length`, so there is no padding.

    Args:
        rng: Source of randomness.
        batch: Number of sequences.
        length: Tokens of each sequence.
        max_records: Largest number of records; the smallest is a third of it.
        filler: Share of filler sentences among the sentences of the context, 0 to 0.5.
    """
    token_rows: list[list[int]] = []
    answer_rows: list[list[bool]] = []
    for _ in range(batch):
        writer = _Writer()
        records = draw_records(rng, rng.randint(max(1, max_records // 3), max_records))
        write = _write_block if rng.random() < 0.5 else _write_interleaved
        write(writer, rng, records, filler, length)
        token_rows.append([_IDS[word] for word in writer.words[:length]])
        answer_rows.append(writer.is_answer[:length])
    return Batch(torch.tensor(token_rows), torch.tensor(answer_rows))
