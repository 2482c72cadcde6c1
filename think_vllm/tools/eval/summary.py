"""Figures of several servers' answers: by task, by length and by cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.runner import Result
from think_vllm.tools.eval.stats import Difference, Estimate, estimate_difference, estimate_mean

#: Below this a server knows too little of a task for a difference to say much.
TOO_HARD = 0.2


@dataclass(frozen=True)
class Run:
    """One server's answers.

    Args:
        label: What the reports call it.
        url: Where it was; None if it was started here.
        flags: Flags that it was started with; None if they are unknown.
        model: Name of its model.
        max_model_len: Tokens of a request; None if it does not say.
        version: Of the server; None if it does not say.
        settings: Those of thin blocks; None if it does not say.
        results: Its answers, in the order of the questions.
    """

    label: str
    url: str | None
    flags: tuple[str, ...] | None
    model: str
    max_model_len: int | None
    version: str | None
    settings: dict[str, Any] | None
    results: list[Result]


@dataclass(frozen=True)
class Figure:
    """One server's answers to some questions.

    Args:
        label: The server's.
        asked: Number of questions.
        failed: Requests without an answer.
        cut_off: Answers that ran into the limit of tokens.
        mean: Mean score of the answers; None without any.
        difference: To the first server; None for that one.
    """

    label: str
    asked: int
    failed: int
    cut_off: int
    mean: Estimate | None
    difference: Difference | None


@dataclass(frozen=True)
class Group:
    """The same questions on every server.

    Args:
        task: Theirs.
        length: Theirs; None for all.
        depth: Theirs; None for all.
        figures: One for each server.
    """

    task: str
    length: int | None
    depth: float | None
    figures: list[Figure]

    @property
    def is_too_hard(self) -> bool:
        """Whether the first server fails at it."""
        mean = self.figures[0].mean
        return mean is None or mean.value < TOO_HARD


def by_task(runs: Sequence[Run], seed: int) -> list[Group]:
    """One group for each task."""
    return _groups(runs, seed, lambda question: (question.task, None, None))


def by_length(runs: Sequence[Run], seed: int) -> list[Group]:
    """One group for each task and length."""
    return _groups(runs, seed, lambda question: (question.task, question.length, None))


def by_cell(runs: Sequence[Run], seed: int) -> list[Group]:
    """One group for each task, length and depth, of the questions that have a depth."""
    cells = _groups(runs, seed, lambda question: (question.task, question.length, question.depth))
    return [cell for cell in cells if cell.depth is not None]


def _groups(
    runs: Sequence[Run],
    seed: int,
    key_of: Callable[[Question], tuple[str, int | None, float | None]],
) -> list[Group]:
    # In the order of the questions, which is the same for all runs.
    members: dict[tuple[str, int | None, float | None], list[int]] = {}
    for index, result in enumerate(runs[0].results):
        members.setdefault(key_of(result.question), []).append(index)
    groups = []
    for key, indices in members.items():
        first = [runs[0].results[index] for index in indices]
        figures = [_figure(runs[0].label, first, None, seed)]
        for run in runs[1:]:
            results = [run.results[index] for index in indices]
            figures.append(_figure(run.label, results, first, seed))
        groups.append(Group(*key, figures))
    return groups


def _figure(
    label: str, results: Sequence[Result], first: Sequence[Result] | None, seed: int
) -> Figure:
    binary = all(result.question.is_binary for result in results)
    difference = None
    if first is not None:
        pairs = [
            (one.score, other.score)
            for one, other in zip(first, results, strict=True)
            if one.score is not None and other.score is not None
        ]
        difference = estimate_difference([a for a, _ in pairs], [b for _, b in pairs], binary, seed)
    return Figure(
        label=label,
        asked=len(results),
        failed=sum(result.score is None for result in results),
        cut_off=sum(result.finish_reason == "length" for result in results),
        mean=estimate_mean([x.score for x in results if x.score is not None], binary, seed),
        difference=difference,
    )
