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
    """One server's answers."""

    label: str  # what the reports call it
    url: str | None  # where it was; None if it was started here
    flags: tuple[str, ...] | None  # flags that it was started with; None if they are unknown
    model: str  # name of its model
    max_model_len: int | None  # tokens of a request; None if it does not say
    version: str | None  # of the server; None if it does not say
    settings: dict[str, Any] | None  # those of thin blocks; None if it does not say
    results: list[Result]  # its answers, in the order of the questions


@dataclass(frozen=True)
class Figure:
    """One server's answers to some questions."""

    label: str  # the server's
    asked: int  # number of questions
    failed: int  # requests without an answer
    cut_off: int  # answers that ran into the limit of tokens
    mean: Estimate | None  # mean score of the answers; None without any
    difference: Difference | None  # to the first server; None for that one


@dataclass(frozen=True)
class Group:
    """The same questions on every server."""

    task: str  # theirs
    length: int | None  # theirs; None for all
    depth: float | None  # theirs; None for all
    figures: list[Figure]  # one for each server

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
