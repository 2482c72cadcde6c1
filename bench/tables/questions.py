"""What is asked: recall prompts as token ids, and the answers that engines are led along.

vLLM computes the first output token in the step that ends a prompt, from dense blocks. Both ways
to ask count only digits that are read from thin blocks:

* ``unasked``: the prompt without its "?", which comes first in the answer. All four digits count,
  and no query of the prompt has looked the record up.
* ``asked``: the whole prompt. Its "?" looks the record up, as snapkv wants it; the first digit
  comes from dense blocks, so the other three count.

Every answer is led: each step is given the right tokens so far, and says what it would have said,
and how likely the right one was. All digits likeliest is what a greedy answer that is right means.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from think_vllm.tools.eval.recall import BOS, CODE_DIGITS, STOP, VOCABULARY, recall_samples

#: Tokens of prompt and answer, and records among them.
SIZES = ((512, 32), (1024, 64), (2048, 96))
WAYS = ("unasked", "asked")
ANSWER_TOKENS = CODE_DIGITS + 1

_QUESTION_MARK = "?"
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Question:
    """A prompt and the answer to be led along."""

    length: int  # the size it belongs to, as in `SIZES`
    prompt: tuple[int, ...]  # token ids
    answer: tuple[int, ...]  # token ids, `ANSWER_TOKENS`
    counted: slice  # those of the answer that count


@dataclass(frozen=True)
class Answer:
    """How one question was answered."""

    right: bool  # whether every digit that counts was the likeliest token
    logprob: float  # mean log-probability of these digits; nats


def questions(way: str, seed: int, samples: int) -> Iterator[Question]:
    """Yield ``samples`` questions of each size, the same ones for the same arguments.

    Args:
        way: One of `WAYS`; both have the same prompts.
        seed: Of all of them.
        samples: Questions of each size.
    """
    for length, records in SIZES:
        for sample in recall_samples(seed, samples, length, records):
            prompt = [BOS, *sample.prompt.split()]
            answer = [*sample.answer.split(), STOP]
            counted = slice(1, CODE_DIGITS)
            if way == "unasked":
                answer = [prompt.pop(), *answer[:-1]]
                assert answer[0] == _QUESTION_MARK
                counted = slice(1, ANSWER_TOKENS)
            yield Question(length, _ids(prompt), _ids(answer), counted)


def other_prompt(question: Question) -> tuple[int, ...]:
    """The same text with a question for another record, which leaves its prefix in the cache."""
    words = [VOCABULARY[token] for token in question.prompt]
    # Of every record and, last, of the question itself.
    places = [i for i in range(3, len(words)) if words[i - 3 : i] == ["the", "code", "of"]]
    *records, asked = places
    keys = [words[place] for place in records if words[place] != words[asked]]
    words[asked] = keys[len(keys) // 2]
    return _ids(words)


def judge(question: Question, logprobs: Sequence[float], likeliest: Sequence[int]) -> Answer:
    """Make one answer of what a model said, token by token.

    Args:
        question: What was asked.
        logprobs: Of each token of the right answer; nats.
        likeliest: What the model would have said in its place.
    """
    counted = question.counted
    digits = logprobs[counted]
    return Answer(
        right=tuple(likeliest[counted]) == question.answer[counted],
        logprob=math.fsum(digits) / len(digits),
    )


def _ids(words: Sequence[str]) -> tuple[int, ...]:
    return tuple(_IDS[word] for word in words)
