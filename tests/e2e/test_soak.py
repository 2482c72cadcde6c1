"""Requests of all lengths, some abandoned, on too few blocks: a few hundred, or ``SOAK_REQUESTS``.

With ``-s`` it prints what has come of them.
"""

import os
from collections import Counter
from copy import deepcopy

import pytest

from tests.support import soak_checks
from tests.support.reference import Reference, Thinning
from tests.support.served import Completion
from tests.support.soak import CASES, MAX_MODEL_LEN, soak
from tests.support.soak_checks import TOLERANCE, Findings, Outcome
from tests.support.soak_jobs import Job, draw_jobs

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "250"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", ["prune 0.5", pytest.param("prune 0.4 + kivi4", marks=pytest.mark.extended)]
)
def test_soak(serve, tmp_path, name):
    case = CASES[name]
    model = case.model(tmp_path)
    server = serve(*case.server_arguments(), model=model, kv_cache_bytes=case.pool_bytes())
    reference, thinning = Reference(model), Thinning.of(case.plan)
    jobs = case.jobs(1, REQUESTS)
    done = soak(
        server, reference, thinning, jobs, case.precise(), alone=max(15, REQUESTS // 12),
        exact_prefixes=case.exact_prefixes,
    )  # fmt: skip
    kinds = Counter(
        "rejected" if job.status != 200 else "answered" if got.done else "cut off"
        for job, got in zip(done.jobs, done.outcomes, strict=True)
    )
    print(  # noqa: T201  (for -s)
        f"{name}: {dict(kinds)}, {done.preemptions} preemptions, {done.seconds:.0f} s of load, "
        f"{done.found.compared} compared, {done.found.compared_alone} of them alone, worst "
        f"{done.found.worst:.1e}, {done.found.rescored} by float64, {len(done.found.tossed)} too "
        "close to call"
    )
    assert not done.found.failures, "\n".join(done.found.failures)

    # All that is asked for has happened.
    assert server.metric("vllm:prefix_cache_hits_total") > 0
    jobs_of = list(zip(done.jobs, done.outcomes, strict=True))
    assert sum(job.status != 200 for job, _ in jobs_of) == REQUESTS // 20
    assert any(job.leaves_after == 0 for job, _ in jobs_of)
    assert any(job.patience_s is not None and got.status is None for job, got in jobs_of)
    assert any(job.leaves and got.tokens and not got.done for job, got in jobs_of)
    assert done.found.compared > (0.7 if case.exact_prefixes else 0.5) * REQUESTS
    # The comparison would notice if nothing were thin.
    longest = sorted(
        soak_checks.comparable(done.jobs, done.outcomes, exact_prefixes=False),
        key=lambda index: -len(jobs[index].prompt),
    )[:3]
    dense = Findings()
    soak_checks.compare_with_reference(reference, None, done.jobs, done.outcomes, longest, dense)
    assert len(dense.failures) == 3


PROMPT = {"prompt": [5, 6, 7], "max_tokens": 3}
WHOLE = Outcome(200, [7, 8, 9], [-1.0, -2.0, -0.5], done=True)


def changed(outcome: Outcome, **changes: object) -> Outcome:
    made = deepcopy(outcome)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("job", "got", "problem"),
    [
        (Job(PROMPT), WHOLE, None),
        (Job(PROMPT), Outcome(), "status None"),
        (Job(PROMPT), Outcome(500), "status 500"),
        (Job(PROMPT), changed(WHOLE, done=False, tokens=[7, 8]), "2 of 3 tokens, no end"),
        (Job(PROMPT), changed(WHOLE, tokens=[7, 8]), "2 tokens, not 3"),
        (Job(PROMPT), changed(WHOLE, logprobs=[-1.0, float("nan"), -0.5]), "finite"),
        (Job(PROMPT), changed(WHOLE, logprobs=[-1.0]), "finite"),
        (Job(PROMPT), changed(WHOLE, error="RemoteProtocolError"), "broke off"),
        (Job(PROMPT, 400), Outcome(400, error="too long"), None),
        (Job(PROMPT, 400), WHOLE, "status 200, not 400"),
        (Job(PROMPT, stream=True, leaves_after=0), Outcome(200), None),
        (Job(PROMPT, stream=True, leaves_after=0), Outcome(), "status None"),
        (Job(PROMPT, patience_s=0.1), Outcome(), None),
        (Job(PROMPT, patience_s=0.1), Outcome(503), "status 503"),
    ],
)
def test_check_outcomes_finds_what_is_wrong(job, got, problem):
    found = Findings()
    soak_checks.check_outcomes([job], [got], found)
    assert len(found.failures) == (problem is not None)
    assert all(problem in line for line in found.failures)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "expected"),
    [
        ([7, 8, 9], [-1.0, -2.0, -0.5], 0.0),
        ([7, 8, 9], [-1.0, -2.25, -0.5], 0.25),
        # Another token that was as likely, and whatever comes of it.
        ([7, 4, 3], [-1.0, -2.0, -9.0], 0.0),
        ([7, 4, 3], [-1.0, -2.5, -9.0], 0.5),
        # As likely once what vLLM subtracts of a repeated token is.
        ([7, 7, 3], [-1.0, -0.5, -9.0], 0.0),
        ([7, 7, 3], [-1.0, -2.0, -9.0], 1.5),
    ],
)
def test_distance_is_that_of_the_first_difference(tokens, logprobs, expected):
    assert soak_checks.distance(WHOLE, Completion(tokens, logprobs, ""), 1.5) == pytest.approx(
        expected
    )


def test_answers_from_other_keys_are_noticed(recall_reference):
    thinning = Thinning.of(CASES["prune 0.5"].plan)
    job = draw_jobs(1, 3, MAX_MODEL_LEN)[1]
    prompt = (job.prompt * 300)[:300]
    jobs = [Job({"prompt": prompt, "max_tokens": 3})] * 2
    answers = [
        Outcome(200, [7, 8, 9], recall_reference.logprobs(asked, [7, 8, 9], thinning), done=True)
        for asked in (prompt, [*prompt[:-1], (prompt[-1] + 1) % 300 + 4])
    ]
    found = Findings()
    soak_checks.compare_with_reference(recall_reference, thinning, jobs, answers, [0, 1], found)
    assert found.worst < TOLERANCE
    assert [line.split(":")[0] for line in found.failures] == ["request 1"]


def test_draw_jobs_are_the_same_ones_and_fit():
    jobs = draw_jobs(0, 2000, MAX_MODEL_LEN)
    assert jobs == draw_jobs(0, 2000, MAX_MODEL_LEN)
    assert jobs != draw_jobs(1, 2000, MAX_MODEL_LEN)
    served = [job for job in jobs if job.status == 200]
    lengths = [len(job.prompt) for job in served]
    assert min(lengths) == 1
    assert max(lengths) > 0.9 * MAX_MODEL_LEN
    assert all(len(job.prompt) + job.max_tokens <= MAX_MODEL_LEN for job in served)
    assert all(job.max_tokens >= 1 for job in served)
    assert 0.15 < sum(job.leaves for job in served) / len(served) < 0.25
    # Blocks of 16 tokens and more are shared by those that shall share, and by nobody else.
    first = [tuple(job.prompt[:16]) for job in served if not job.shared and len(job.prompt) >= 16]
    assert len(set(first)) == len(first)
    assert len({tuple(job.prompt[:16]) for job in served if job.shared}) == 4
