"""What must be true of a soak: of every request, of every token, and of the server afterwards."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.reference import Reference, Thinning
from tests.support.served import Completion
from tests.support.server import Server
from tests.support.soak_jobs import Job

#: float32, as in ``tests/e2e/checks.py``: other orders of the same sums.
TOLERANCE = 1e-4
#: Sums of squares that differ by less, relatively, can change places when they are added in
#: another order; another channel is kept then, which shows as 1e-3 and more.
MARGIN = 1e-5
#: Share of the answers that may hang on such a choice. Drawn scores say one in a thousand.
TOSSED_SHARE = 0.01


@dataclass
class Outcome:
    """What a client has got before it left or was done; no status if there was no answer."""

    status: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False
    error: str = ""

    def take(self, choice: dict[str, Any]) -> None:
        """Add a part of the answer."""
        self.tokens += choice["token_ids"]
        self.logprobs += choice["logprobs"]["token_logprobs"]
        self.done = choice["finish_reason"] == "length"


@dataclass
class Findings:
    """What the checks have found.

    ``rescored`` counts requests that the float64 reference had to judge, ``worst`` is the largest
    difference of a log-probability that was compared, ``margins`` are those of the reference's
    choices of channels; requests are ``tossed`` whose difference comes from a choice within the
    margin.
    """

    compared: int = 0
    compared_alone: int = 0
    rescored: int = 0
    worst: float = 0.0
    margins: dict[int, float] = field(default_factory=dict)
    tossed: set[int] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


def check_outcomes(jobs: Sequence[Job], outcomes: Sequence[Outcome], found: Findings) -> None:
    """Statuses, and answers complete and finite."""
    for index, (job, got) in enumerate(zip(jobs, outcomes, strict=True)):
        problem = _problem(job, got)
        if problem:
            found.failures.append(f"request {index}: {problem}; {got.error[:300]}")


def _problem(job: Job, got: Outcome) -> str:
    if job.status != 200:
        return "" if got.status == job.status else f"status {got.status}, not {job.status}"
    if got.status != 200 and not (got.status is None and job.patience_s is not None):
        return f"status {got.status}"
    if got.status == 200 and got.error:
        return "the answer broke off"
    if not job.leaves and not got.done:
        return f"{len(got.tokens)} of {job.max_tokens} tokens, no end"
    if got.done and len(got.tokens) != job.max_tokens:
        return f"{len(got.tokens)} tokens, not {job.max_tokens}"
    if len(got.tokens) != len(got.logprobs) or not all(map(math.isfinite, got.logprobs)):
        return "a token without a finite log-probability"
    return ""


def comparable(jobs: Sequence[Job], outcomes: Sequence[Outcome], exact_prefixes: bool) -> list[int]:
    """Requests whose tokens can be compared, those of an answer cut short too."""
    return [
        index
        for index, (job, got) in enumerate(zip(jobs, outcomes, strict=True))
        if job.status == 200 and got.tokens and (exact_prefixes or not job.shared)
    ]


def compare_with_reference(
    reference: Reference,
    thinning: Thinning | None,
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
    which: Iterable[int],
    found: Findings,
    precise: Reference | None = None,
) -> None:
    """Score every token of these answers with the reference.

    One that differs is scored by the precise reference, if there is one: both sides round, and of
    some 100,000 tokens a few meet where both round far.
    """
    threads = torch.get_num_threads()
    # Several lose more by waiting for each other than these small products gain.
    torch.set_num_threads(1)
    for index in which:
        prompt, got = jobs[index].prompt, outcomes[index]
        scores = reference.logprobs(prompt, got.tokens, thinning)
        found.margins[index] = reference.margin
        worst, where = _worst(scores, got.logprobs)
        if worst >= TOLERANCE and precise is not None:
            found.rescored += 1
            worst, where = _worst(precise.logprobs(prompt, got.tokens, thinning), got.logprobs)
        found.compared += 1
        against = f"the reference at token {where} of {len(got.tokens)}, {got.logprobs[where]:.2f}"
        _judge(index, against, worst, found)
    torch.set_num_threads(threads)


def _worst(expected: Sequence[float], got: Sequence[float]) -> tuple[float, int]:
    """Largest difference, and where it is."""
    return max((abs(a - b), i) for i, (a, b) in enumerate(zip(expected, got, strict=True)))


def compare_alone(
    server: Server,
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
    which: Iterable[int],
    found: Findings,
) -> None:
    """Ask for these answers again, one at a time; after ``compare_with_reference``."""
    for index in which:
        got = outcomes[index]
        alone = server.complete(
            jobs[index].prompt,
            len(got.tokens),
            frequency_penalty=jobs[index].frequency_penalty,
            # Nothing that others have left, itself in company included.
            cache_salt=f"alone-{index}",
        )
        found.compared_alone += 1
        _judge(index, "the same alone", distance(got, alone, jobs[index].frequency_penalty), found)


def distance(got: Outcome, alone: Completion, frequency_penalty: float) -> float:
    """How far two greedy answers to one prompt are apart.

    The largest difference of a log-probability up to the first token that differs; and of that
    one, how far apart the two candidates are, less what vLLM subtracts of repeated tokens.
    """
    worst, seen = 0.0, Counter[int]()
    for token, logprob, other, other_logprob in zip(
        got.tokens, got.logprobs, alone.tokens, alone.logprobs, strict=True
    ):
        if token != other:
            first = logprob - frequency_penalty * seen[token]
            second = other_logprob - frequency_penalty * seen[other]
            return max(worst, abs(first - second))
        worst = max(worst, abs(logprob - other_logprob))
        seen[token] += 1
    return worst


def _judge(index: int, against: str, difference: float, found: Findings) -> None:
    if difference < TOLERANCE:
        found.worst = max(found.worst, difference)
    elif found.margins.get(index, math.inf) < MARGIN:
        found.tossed.add(index)
    else:
        margin = found.margins.get(index, math.inf)
        found.failures.append(
            f"request {index}: {difference:.1e} from {against}; choice of channels by {margin:.1e}"
        )


def check_tossed(found: Findings) -> None:
    """Selections too close to call are rare."""
    if len(found.tossed) > max(1.0, TOSSED_SHARE * found.compared):
        found.failures.append(
            f"{len(found.tossed)} of {found.compared} answers hang on a choice of channels that "
            f"is closer than {MARGIN}"
        )


def check_server(server: Server, found: Findings) -> None:
    """Nobody runs or waits, no block is lost, and the log shows no error."""
    # Scheduled behind the last client that left, and vLLM counts after each step.
    server.complete([5, 6, 7], 4)
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    ):
        try:
            server.wait_for_metric(name, 0)
        except AssertionError as error:
            found.failures.append(str(error))
    log = server.log.read_text(encoding="utf-8", errors="replace").splitlines()
    for index, line in enumerate(log):
        if "Traceback" in line or " ERROR " in f" {line} ":
            found.failures.append("\n".join(["the server's log:", *log[index : index + 30]]))
            return
