"""A question of an evaluation: its prompt, what is right, and where it belongs in the tables."""

import re
from dataclasses import dataclass
from typing import Literal

from think_vllm.tools.eval.recall import CODE_DIGITS

QUESTION_MARK = "?"


@dataclass(frozen=True)
class Question:
    """One prompt with its right answers."""

    task: str  # name of the task, a row of the tables
    number: int  # of the question in its cell, from 0
    prompt: str  # text that is sent
    answers: tuple[str, ...]  # what is right, all of it wanted
    metric: Literal["recall", "all"]  # how text is scored: ``recall`` or ``all``, see `score`
    max_tokens: int  # tokens that may be generated
    length: int  # tokens of prompt and answer that the prompt fills
    #: Share of the text before the fact that is asked for, 0 to 1; None without one.
    depth: float | None
    prompt_tokens: int  # tokens of the prompt as it is served

    @property
    def is_binary(self) -> bool:
        """Whether an answer is right or wrong, with nothing in between."""
        return self.metric == "recall" or len(self.answers) == 1

    def score(self, text: str) -> float:
        """Score an answer, 0 to 1.

        ``recall``: whether the question mark and then exactly the right digits come first. The
        prompt ends before its question mark: vLLM computes the first token of an answer before
        the prompt becomes thin, so all digits are read from thin blocks.

        ``all``: the share of the right answers in the text, in any case. This is RULER's string
        match (arXiv 2404.06654), but of whole words: RULER also finds ``cat`` in ``category``.
        """
        if self.metric == "recall":
            right = [QUESTION_MARK, *self.answers[0].split()]
            return float(text.split()[: 1 + CODE_DIGITS] == right)
        words = (rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in self.answers)
        return sum(bool(re.search(word, text, re.IGNORECASE)) for word in words) / len(self.answers)
