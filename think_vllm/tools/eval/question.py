"""A question of an evaluation: its prompt, what is right, and where it belongs in the tables."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One prompt with its right answers.

    Args:
        task: Name of the task, a row of the tables.
        number: Of the question in its cell, from 0.
        prompt: Text that is sent.
        answers: What is right; the metric says whether one or all of them are wanted.
        metric: A name of `scoring.METRICS`.
        max_tokens: Tokens that may be generated.
        length: Tokens of prompt and answer that the prompt was made for; None if it has its own.
        depth: Share of the text before the fact that is asked for, 0 to 1; None without one.
        classes: All classes, of a classification.
        prompt_tokens: Tokens of the prompt as it is served.
        identity: Name of the question in the file that it comes from.
    """

    task: str
    number: int
    prompt: str
    answers: tuple[str, ...]
    metric: str
    max_tokens: int
    length: int | None = None
    depth: float | None = None
    classes: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    identity: str | None = None

    @property
    def is_binary(self) -> bool:
        """Whether an answer is right or wrong, with nothing in between."""
        return self.metric in ("recall", "any") or (self.metric == "all" and len(self.answers) == 1)
