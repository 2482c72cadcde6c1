"""All questions of an evaluation, sent to a server several at a time."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from think_vllm.tools.common.client import Client, RequestError
from think_vllm.tools.eval.question import Question

#: Seconds between two progress lines in a log.
_LOG_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Result:
    """A question, its answer, and what that is worth."""

    question: Question  # what was asked
    text: str  # the answer; empty if the request failed
    finish_reason: str | None  # why generation stopped, as the server says
    error: str | None  # why the request failed; None if it did not
    seconds: float  # from sending to the end of the answer
    score: float | None  # 0 to 1; None if the request failed


def ask_all(
    client: Client,
    model: str,
    questions: Sequence[Question],
    *,
    chat: bool,
    extra: dict[str, Any],
    concurrency: int,
    label: str,
) -> list[Result]:
    """Ask everything, greedily; a failed request is a result without a score."""

    def ask(question: Question) -> Result:
        text, reason, failure, score = "", None, None, None
        start = time.monotonic()
        try:
            text, reason = client.complete(model, question.prompt, question.max_tokens, chat, extra)
            score = question.score(text)
        except RequestError as error:
            failure = str(error)
        return Result(question, text, reason, failure, time.monotonic() - start, score)

    pool = ThreadPoolExecutor(concurrency)
    results: list[Result] = []
    interval = None if sys.stderr.isatty() else _LOG_INTERVAL_S
    try:
        with tqdm(total=len(questions), desc=label, mininterval=interval or 0.1) as progress:
            for result in pool.map(ask, questions):
                results.append(result)
                progress.set_postfix_str(_summary(results), refresh=False)
                progress.update()
    finally:
        # An interrupted run must not wait for the remaining questions, or for a slow answer.
        pool.shutdown(wait=False, cancel_futures=True)
    return results


def _summary(results: Sequence[Result]) -> str:
    scores = [result.score for result in results if result.score is not None]
    mean = f"mean score {sum(scores) / len(scores):.3f}" if scores else "no answer"
    failed = len(results) - len(scores)
    return f"{mean}, {failed} FAILED" if failed else mean
