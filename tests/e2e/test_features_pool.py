"""A pool that holds exactly one request of the greatest length: who waits, yields and hangs up.

Whatever happens to a request, its blocks come back, and others answer as if alone.
"""

import http.client
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Serve
from tests.support.checks import EAGER, assert_equal, plan_served, random_prompts
from tests.support.reference import Reference, Thinning
from tests.support.served import Completion
from tests.support.server import Server, completion_of

pytestmark = pytest.mark.e2e

MAX_MODEL_LEN = 1024
PLAN, FLAGS = plan_served(128, kv_channel_prune=0.5, kv_quant="k4v2", kv_prefix_cache="dense")
THIN = Thinning.of(PLAN)
ARGUMENTS = (*EAGER, *FLAGS, "--max-model-len", str(MAX_MODEL_LEN))
#: Of one layer with two heads.
BLOCK_BYTES = PLAN.layout.run_bytes * 2
#: The longest request, and the null block.
POOL_BYTES = (MAX_MODEL_LEN // PLAN.block_size + 1) * BLOCK_BYTES
#: Times that something is tried which a fast machine may be too fast for.
ROUNDS = 10
#: Greedy answers of a random model go round in circles: groups of equal tokens.
VARIED = {"frequency_penalty": 2.0}


@pytest.fixture(scope="module")
def server(serve: Serve, exact_model: Path) -> Iterator[Server]:
    options = ("--max-num-batched-tokens", "128", "--scheduling-policy", "priority")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # /sleep and /reset_prefix_cache
        yield serve(*ARGUMENTS, *options, model=exact_model, kv_cache_bytes=POOL_BYTES)


def assert_nothing_lost(server: Server, exact_reference: Reference) -> None:
    """A request that needs every block gets them all."""
    server.wait_for_metric("vllm:num_requests_running", 0)
    server.wait_for_metric("vllm:kv_cache_usage_perc", 0)
    prompts = random_prompts([MAX_MODEL_LEN - 1])
    assert_equal(exact_reference, prompts, [server.complete(prompts[0], 1)], THIN)


def test_longest_requests(server, exact_reference):
    prompts = random_prompts([MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 60, 1], seed=1)
    counts = [MAX_MODEL_LEN - len(prompt) for prompt in prompts]
    before = server.metric("vllm:num_preemptions_total")
    answers = [
        server.complete(prompt, count, **VARIED)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    assert_equal(exact_reference, prompts, answers, THIN)
    assert server.metric("vllm:num_preemptions_total") == before
    # The comparison would notice blocks that are not thin.
    with pytest.raises(AssertionError):
        assert_equal(exact_reference, prompts[1:2], answers[1:2], None)


def test_priorities_and_lengths_mixed(server, exact_reference):
    # Long and short prompts share chunks of 128 tokens; whoever comes last may go first.
    # The last six need few blocks at first and more than there are in the end.
    lengths = [700, 5, 450, 33, 600, 300, 17, 500, 90, 310, *range(20, 26)]
    counts = [120, 400, 200, 300, 100, 200, 350, 150, 330, 300, *[240] * 6]
    prompts = random_prompts(lengths, seed=2)
    before = server.metric("vllm:num_preemptions_total")

    def ask(i: int) -> Completion:
        return server.complete(prompts[i], counts[i], priority=-i, **VARIED)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    assert_equal(exact_reference, prompts, answers, THIN)
    assert server.metric("vllm:num_preemptions_total") > before


def test_clients_that_hang_up(server, exact_reference):
    # Their prompts end 20 tokens before a second span is due.
    length = 2 * PLAN.span_tokens + 12

    def hang_up(after: int) -> None:
        [prompt] = random_prompts([length], seed=after)
        body = {"model": server.model, "prompt": prompt, "max_tokens": 300, "stream": True}
        options = {"ignore_eos": True, **VARIED}
        # Headers come before the first token, which takes five chunks.
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, **options}, timeout=600
        ) as response:
            lines = (line for line in response.iter_lines() if line)
            for _ in range(after):
                next(lines)

    prompts = random_prompts([40, 300, PLAN.span_tokens + 32], seed=3)
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.complete, prompt, 350, **VARIED) for prompt in prompts]
        list(pool.map(hang_up, [0, 0, 1, 0, 2, *range(18, 24), 0, 60]))
        answers = [other.result() for other in others]
    assert_equal(exact_reference, prompts, answers, THIN)
    assert_nothing_lost(server, exact_reference)


def test_client_that_does_not_wait_for_the_answer(server, exact_reference):
    count, answers = 700, 4
    body = {"model": server.model, "max_tokens": count, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    generated = "vllm:generation_tokens_total"
    # Answers come one after the other, and all of them may be done before the server has seen that
    # nobody waits for them.
    for _ in range(ROUNDS):
        before = server.metric(generated)
        prompts = random_prompts([300] * answers, seed=4)
        with closing(http.client.HTTPConnection(server.url.removeprefix("http://"))) as connection:
            connection.request(
                "POST", "/v1/completions", json.dumps({**body, "prompt": prompts}), headers
            )
            # It came later, and goes first: once it is answered, the others are there.
            server.complete([5, 6, 7], 1, priority=-1)
        assert_nothing_lost(server, exact_reference)
        if server.metric(generated) - before < answers * count:
            return
    raise AssertionError(f"in {ROUNDS} rounds no answer was cut off")


def check_interrupted(
    server: Server, exact_reference: Reference, between: Callable[[], None]
) -> None:
    """Stream long answers, do something that preempts them once they have begun, and compare.

    The server does not wait for its clients, so answers may be done by then: they are asked for
    until they are not.
    """
    for _ in range(ROUNDS):
        before = server.metric("vllm:num_preemptions_total")
        prompts, answers = interrupted_answers(server, between)
        assert_equal(exact_reference, prompts, answers, THIN)
        assert_nothing_lost(server, exact_reference)
        if server.metric("vllm:num_preemptions_total") - before >= len(prompts):
            return
    raise AssertionError(f"in {ROUNDS} rounds answers were done before anything could happen")


def interrupted_answers(
    server: Server, between: Callable[[], None]
) -> tuple[list[list[int]], list[Completion]]:
    prompts = random_prompts([50, PLAN.span_tokens + 20], seed=7)
    options = {"max_tokens": 700, "temperature": 0, "logprobs": 0, "ignore_eos": True, **VARIED}
    streams = [server.stream(prompt=prompt, return_token_ids=True, **options) for prompt in prompts]
    begun = [[next(stream)] for stream in streams]
    between()
    answers = []
    for first, rest in zip(begun, streams, strict=True):
        pieces = [completion_of(chunk["choices"][0]) for chunk in [*first, *rest]]
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
        answers.append(Completion(tokens, logprobs, "".join(piece.text for piece in pieces)))
    return prompts, answers


def test_reset_of_the_prefix_cache(server, exact_reference):
    def reset() -> None:
        answer = server.ask("/reset_prefix_cache?reset_running_requests=true")
        assert answer == {"success": True}

    check_interrupted(server, exact_reference, reset)
    assert server.ask("/reset_prefix_cache") == {"success": True}


def test_sleep_in_the_middle_of_answers(server, exact_reference):
    # On CPUs vLLM frees no memory then, but forgets the blocks of those it keeps.
    def sleep() -> None:
        assert server.ask("/sleep?level=1&mode=keep")["status"] == "sleeping"
        assert server.ask("/wake_up")["status"] == "awake"

    check_interrupted(server, exact_reference, sleep)
