"""Asking a server all questions, several at a time."""

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TextIO

from think_vllm.tools.eval.client import Answer, Asker
from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.scoring import score
from think_vllm.tools.eval.tasks.longbench import scored_text

#: Seconds between two lines where nobody watches a terminal.
_LINE_S = 30.0


@dataclass(frozen=True)
class Result:
    """A question, its answer, and what that is worth.

    Args:
        question: What was asked.
        answer: What came back.
        score: 0 to 1; None if the request failed.
    """

    question: Question
    answer: Answer
    score: float | None


def ask_all(
    asker: Asker, questions: Sequence[Question], concurrency: int, label: str
) -> list[Result]:
    """Ask everything; a failed request is a result without a score.

    Args:
        asker: Sends the questions.
        questions: In the order of the results.
        concurrency: Requests at the same time.
        label: The server's, for the progress line.
    """
    progress = Progress(label, len(questions), sys.stderr)

    def ask(question: Question) -> Result:
        answer = asker.ask(question)
        right = None if answer.error else score(question, scored_text(question, answer.text))
        result = Result(question, answer, right)
        progress.add(result)
        return result

    pool = ThreadPoolExecutor(concurrency)
    try:
        results = list(pool.map(ask, questions))
    finally:
        # Whoever stops this must not wait for the questions that are left, or for a slow answer.
        pool.shutdown(wait=False, cancel_futures=True)
    progress.end()
    return results


class Progress:
    """A line that says how far it is: rewritten on a terminal, from time to time elsewhere.

    Args:
        label: What it is about.
        total: Results to come.
        stream: Where it goes.
    """

    def __init__(self, label: str, total: int, stream: TextIO) -> None:
        self._label, self._total, self._stream = label, total, stream
        self._done = self._failed = 0
        self._scores = 0.0
        self._start = self._said = time.monotonic()
        self._lock = threading.Lock()

    def add(self, result: Result) -> None:
        """Count a result."""
        with self._lock:
            self._done += 1
            if result.score is None:
                self._failed += 1
            else:
                self._scores += result.score
            now = time.monotonic()
            if self._stream.isatty():
                self._stream.write(f"\r{self}\x1b[K")
                self._stream.flush()
            elif now - self._said > _LINE_S:
                self._said = now
                self._stream.write(f"{self}\n")

    def end(self) -> None:
        """Say the last word."""
        before = "\r" if self._stream.isatty() else ""
        self._stream.write(f"{before}{self}\n")
        self._stream.flush()

    def __str__(self) -> str:
        answered = self._done - self._failed
        mean = f", mean score {self._scores / answered:.3f}" if answered else ""
        failed = f", {self._failed} FAILED" if self._failed else ""
        return (
            f"{self._label}: {self._done}/{self._total} in "
            f"{time.monotonic() - self._start:.0f} s{mean}{failed}"
        )
