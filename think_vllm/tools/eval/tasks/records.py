"""Tasks in the words of the bundled model: a code of four digits, stated once, is asked for.

A prompt ends before the question mark, which the model says first (see `Question.score`).
"""

import random

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.question import QUESTION_MARK, Question
from think_vllm.tools.eval.recall import (
    ANSWER_TOKENS,
    NUM_KEYS,
    draw_filler,
    draw_records,
    recall_prompt,
)
from think_vllm.tools.eval.tasks.haystack import Frame, Hay, hide

#: The question mark, the digits and the stop mark, which ends the answer.
_ANSWER_TOKENS = ANSWER_TOKENS + 1
#: One record for so many tokens of a prompt, which makes about half of them records.
TOKENS_PER_RECORD = 20


def recall(rng: random.Random, frame: Frame) -> Question:
    """Records and filler shuffled, one record asked for: the task that the model learned."""
    try:
        # Its own count has the question mark in the prompt, so that the sum is the same.
        sample = recall_prompt(rng, frame.length, _num_records(frame))
    except ValueError as error:
        raise ThinkError(f"eval: recall: {error}; --lengths is too short for it") from None
    prompt = sample.prompt.removesuffix(f" {QUESTION_MARK}")
    return _question("recall", prompt, sample.answer, frame, _counted("recall", prompt, frame))


def recall_needle(rng: random.Random, frame: Frame) -> Question:
    """One record at a depth of filler."""
    return _needle("recall-needle", rng, frame, 1)


def recall_keys(rng: random.Random, frame: Frame) -> Question:
    """One record at a depth of filler and other records, which differ in their keys."""
    return _needle("recall-keys", rng, frame, _num_records(frame))


def _needle(task: str, rng: random.Random, frame: Frame, num_records: int) -> Question:
    asked, *others = draw_records(rng, num_records)
    hay = Hay(lambda: draw_filler(rng))
    depths = [rng.random() for _ in others]
    depth = rng.random() if frame.depth is None else frame.depth
    question = asked.question.removesuffix(f" {QUESTION_MARK}")

    def build(count: int) -> str:
        shuffled = [(at, record.statement) for at, record in zip(depths, others, strict=True)]
        text = hide(hay.take(count), shuffled)
        # Last, so that the depth counts the other records as well.
        return " ".join([*hide(text, [(depth, asked.statement)]), question])

    prompt, used = frame.fill(task, build, frame.answer_tokens(_ANSWER_TOKENS))
    _check_words(task, prompt, used)
    return _question(task, prompt, asked.code, frame, used)


def _num_records(frame: Frame) -> int:
    return min(NUM_KEYS, max(1, frame.length // TOKENS_PER_RECORD))


def _counted(task: str, prompt: str, frame: Frame) -> int:
    used = frame.count(prompt)
    _check_words(task, prompt, used)
    return used


def _check_words(task: str, prompt: str, used: int) -> None:
    words = len(prompt.split()) + 1
    if used != words:
        raise ThinkError(
            f"eval: {task}: a prompt of {words} words has {used} tokens there, so this is not "
            "the bundled model, the only one that knows the task; try --tasks needle"
        )


def _question(task: str, prompt: str, code: str, frame: Frame, used: int) -> Question:
    return Question(
        task=task,
        number=0,
        prompt=prompt,
        answers=(code,),
        metric="recall",
        max_tokens=frame.answer_tokens(_ANSWER_TOKENS),
        length=frame.length,
        depth=frame.depth,
        prompt_tokens=used,
    )
