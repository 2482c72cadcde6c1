"""What the answers of several servers come to: figures by task, by length and by cell."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from think_vllm.tools.eval.client import Card
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
        flags: It was started with; None if nobody knows.
        card: What it said about itself.
        results: Its answers, in the order of the questions.
    """

    label: str
    url: str | None
    flags: tuple[str, ...] | None
    card: Card
    results: list[Result]


@dataclass(frozen=True)
class Figure:
    """What one server made of some questions.

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
    return list(_groups(runs, lambda result: (result.question.task, None, None), seed))


def by_length(runs: Sequence[Run], seed: int) -> list[Group]:
    """One group for each task and length."""
    return list(
        _groups(runs, lambda result: (result.question.task, result.question.length, None), seed)
    )


def by_cell(runs: Sequence[Run], seed: int) -> list[Group]:
    """One group for each task, length and depth, of the questions that have a depth."""
    cells = _groups(
        runs,
        lambda result: (result.question.task, result.question.length, result.question.depth),
        seed,
    )
    return [cell for cell in cells if cell.depth is not None]


_Key = tuple[str, int | None, float | None]


def _groups(runs: Sequence[Run], key_of: Callable[[Result], _Key], seed: int) -> Iterator[Group]:
    # A dict keeps the order of the questions, and drops keys that come again.
    for key in dict.fromkeys(map(key_of, runs[0].results)):
        members = [i for i, result in enumerate(runs[0].results) if key_of(result) == key]
        chosen = [[run.results[i] for i in members] for run in runs]
        figures = [
            _figure(run.label, results, chosen[0] if index else None, seed)
            for index, (run, results) in enumerate(zip(runs, chosen, strict=True))
        ]
        yield Group(*key, figures)


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
        cut_off=sum(result.answer.finish_reason == "length" for result in results),
        mean=estimate_mean([x.score for x in results if x.score is not None], binary, seed),
        difference=difference,
    )
