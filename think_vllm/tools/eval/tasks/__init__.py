"""The tasks, and the questions of an evaluation."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.tasks.haystack import Frame
from think_vllm.tools.eval.tasks.needles import multi_key, multi_query, multi_value, needle
from think_vllm.tools.eval.tasks.records import recall, recall_keys, recall_needle


@dataclass(frozen=True)
class Task:
    """A kind of question."""

    make: Callable[[random.Random, Frame], Question]  # draws one that fits a frame
    has_depth: bool  # whether it is asked at every depth
    english: bool  # whether it is in English; otherwise in the words of the bundled model

    @property
    def summary(self) -> str:
        """What it asks, in one line."""
        return (self.make.__doc__ or "").strip().split("\n")[0]


TASKS = {
    "needle": Task(needle, has_depth=True, english=True),
    "multi-key": Task(multi_key, has_depth=True, english=True),
    "multi-value": Task(multi_value, has_depth=False, english=True),
    "multi-query": Task(multi_query, has_depth=False, english=True),
    "recall": Task(recall, has_depth=False, english=False),
    "recall-needle": Task(recall_needle, has_depth=True, english=False),
    "recall-keys": Task(recall_keys, has_depth=True, english=False),
}


def check_tasks(names: Sequence[str]) -> None:
    """Reject unknown names.

    Raises:
        ThinkError: If a name is no task.
    """
    for name in names:
        if name not in TASKS:
            raise ThinkError(
                f"eval: --tasks {name} is no task; there are {', '.join(TASKS)}; RULER's and "
                "LongBench's are tasks of --harness"
            )


def make_questions(
    names: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    frame: Frame,
    threads: int,
) -> list[Question]:
    """Make the questions of all cells, the same ones for the same arguments and tokenizer.

    Args:
        names: Of tasks.
        lengths: Tokens of prompt and answer.
        depths: Where facts are hidden, 0 to 1, for tasks on the grid.
        samples: Questions of a cell.
        seed: Of all of them.
        frame: What does not depend on the cell.
        threads: Prompts that are built at the same time: the server counts their tokens.
    """
    cells = list(_cells(names, lengths, depths, samples))

    def make(cell: tuple[str, int, float | None, int]) -> Question:
        name, length, depth, number = cell
        rng = random.Random(f"{name}/{seed}/{length}/{depth}/{number}")
        question = TASKS[name].make(rng, replace(frame, length=length, depth=depth))
        return replace(question, number=number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(make, cells))


def _cells(
    names: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int
) -> Iterator[tuple[str, int, float | None, int]]:
    for name, length in product(names, lengths):
        for depth in depths if TASKS[name].has_depth else [None]:
            for number in range(samples):
                yield name, length, depth, number
