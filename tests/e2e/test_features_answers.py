"""What a request may ask of its answer, on prompts that are compacted under it.

Prompts of 400 tokens have a thin span from their end on, and get a second one at the 17th token
of the answer, so whatever differs there shows in the middle of an answer.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Serve
from tests.support import checks
from tests.support.checks import EAGER, HALF, TOLERANCE
from tests.support.models import BUNDLED, make_llama
from tests.support.reference import Reference
from tests.support.served import Completion
from tests.support.server import Server, completion_of

pytestmark = pytest.mark.e2e

PROMPT = checks.random_prompts([400], seed=5)[0]
#: Index of the answer's first token whose query sees the second span thin.
SECOND_SPAN = 2 * HALF.span_tokens + HALF.recent_window - len(PROMPT)
COUNT = SECOND_SPAN + 24
#: Token ids, none of which the text leaves out.
IDS = {
    **{"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True},
    "logit_bias": {str(special): -100 for special in range(4)},
}
#: Greedy answers in which no token comes twice, so that each stands for one place.
VARIED = IDS | {"temperature": 0, "max_tokens": COUNT}
VARIED |= {"frequency_penalty": 2.0, "presence_penalty": 2.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return make_llama(path)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def server(serve: Serve, model: Path) -> Server:
    # Whole prompts, as a seeded request whose prompt is cut ends the CPU engine of vLLM 0.32.
    # CPUs schedule synchronously whatever is asked for; on GPUs the other flag is the default.
    options = ("--no-enable-chunked-prefill", "--async-scheduling")
    template = ("--chat-template", str(BUNDLED / "chat_template.jinja"))
    # Prompts are asked again and again: hits have to be exact.
    flags = ("--kv-channel-prune", "0.5", "--kv-prefix-cache", "dense")
    return serve(*EAGER, *flags, *options, *template, model=model)


@pytest.fixture(scope="module")
def whole(server: Server) -> Completion:
    """The varied answer."""
    answer = server.ask(prompt=PROMPT, logprobs=0, **VARIED)
    return completion_of(answer["choices"][0])


def test_answer_is_varied_and_pruned(whole: Completion, reference: Reference) -> None:
    # What the other tests rest on.
    assert len(set(whole.tokens)) == len(whole.text.split()) == COUNT
    checks.assert_equal(reference, [PROMPT], [whole], HALF)
    # The second span counts, too.
    for other in (None, replace(HALF, prune_decode=False)):
        checks.assert_unequal(reference, [PROMPT], [whole], other)


def sampled(server: Server, seed: int, **options: Any) -> list[Completion]:
    """Choices of one request."""
    options = {"max_tokens": COUNT, "seed": seed, "logprobs": 0, **IDS, **options}
    return [completion_of(choice) for choice in server.ask(prompt=PROMPT, **options)["choices"]]


def test_choices_equal_single_requests(server: Server, reference: Reference) -> None:
    # vLLM gives choice i of a request with a seed the seed plus i.
    with ThreadPoolExecutor(6) as pool:
        together = [pool.submit(sampled, server, 100, n=4) for _ in range(2)]
        singles = [pool.submit(sampled, server, 100 + i) for i in range(4)]
        choices, again = (request.result() for request in together)
        alone = [request.result()[0] for request in singles]
    tokens = [choice.tokens for choice in choices]
    assert tokens == [choice.tokens for choice in again]
    assert tokens == [choice.tokens for choice in alone]
    assert len({tuple(chosen) for chosen in tokens}) == 4
    for choice in choices:
        checks.assert_equal(reference, [PROMPT], [choice], HALF)


def test_choices_without_chance_are_greedy(server: Server, whole: Completion) -> None:
    # vLLM rejects n > 1 at temperature 0, but not with a single candidate per token.
    answer = server.ask(prompt=PROMPT, **{**VARIED, "temperature": 1.0}, n=3, top_k=1)
    assert [choice["token_ids"] for choice in answer["choices"]] == [whole.tokens] * 3


def assert_candidates_equal(
    served: list[dict[str, float]], scores: torch.Tensor, count: int
) -> None:
    """The most likely tokens of each row, by id, and the log-probability of each."""
    for position, (found, row) in enumerate(zip(served, scores, strict=True)):
        # Beside them the chosen token, if it is none of them.
        assert count <= len(found) <= count + 1
        for token, logprob in found.items():
            assert logprob == pytest.approx(float(row[int(token)]), abs=TOLERANCE), position
        best = sorted(found.values(), reverse=True)[:count]
        assert best == pytest.approx(row.topk(count).values.tolist(), abs=TOLERANCE), position


def test_logprobs_of_the_best_candidates(server: Server, reference: Reference) -> None:
    choice = server.ask(prompt=PROMPT, logprobs=5, **VARIED)["choices"][0]
    served = [
        {name.removeprefix("token_id:"): value for name, value in candidates.items()}
        for candidates in choice["logprobs"]["top_logprobs"]
    ]
    scores = reference.scores(PROMPT, choice["token_ids"], HALF)[len(PROMPT) - 1 :]
    assert_candidates_equal(served, scores, 5)


def test_prompt_logprobs(server: Server, reference: Reference) -> None:
    choice = server.ask(prompt=PROMPT, prompt_logprobs=3, **VARIED)["choices"][0]
    first, *served = choice["prompt_logprobs"]
    assert first is None
    found = [{i: entry["logprob"] for i, entry in row.items()} for row in served]
    scores = reference.scores(PROMPT, choice["token_ids"], HALF)[: len(PROMPT) - 1]
    assert_candidates_equal(found, scores, 3)


def test_echo(server: Server, reference: Reference, whole: Completion) -> None:
    # With token ids asked for, vLLM leaves the prompt out of the text.
    options = {**VARIED, "return_token_ids": False}
    choice = server.ask(prompt=PROMPT, logprobs=0, echo=True, **options)["choices"][0]
    prompt = server.ask("/detokenize", tokens=PROMPT)["prompt"]
    assert choice["text"].split() == prompt.split() + whole.text.split()
    first, *served = choice["logprobs"]["token_logprobs"]
    assert first is None
    scores = reference.scores(PROMPT, whole.tokens, HALF)
    following = torch.tensor(PROMPT[1:] + whole.tokens)
    expected = scores[torch.arange(following.numel()), following].tolist()
    assert served == pytest.approx(expected, abs=TOLERANCE)


def test_stops(server: Server, whole: Completion) -> None:
    words = whole.text.split()

    def stop_at(index: int) -> tuple[Any, Any]:
        by_id = server.ask(prompt=PROMPT, stop_token_ids=[whole.tokens[index]], **VARIED)
        by_word = server.ask(prompt=PROMPT, stop=[f" {words[index]}"], **VARIED)
        return by_id["choices"][0], by_word["choices"][0]

    # At the end of the prompt, around the token that sees a second span, and later.
    places = [0, 1, *range(SECOND_SPAN - 2, SECOND_SPAN + 3), COUNT - 2]
    with ThreadPoolExecutor(len(places)) as pool:
        for index, (by_id, by_word) in zip(places, pool.map(stop_at, places), strict=True):
            assert by_id["token_ids"] == whole.tokens[: index + 1]
            assert (by_id["finish_reason"], by_id["stop_reason"]) == ("stop", whole.tokens[index])
            # A word may begin an earlier one, as k1 does k12.
            word = f" {words[index]}"
            assert by_word["text"] == whole.text[: whole.text.index(word)]
            assert (by_word["finish_reason"], by_word["stop_reason"]) == ("stop", word)
    server.wait_for_metric("vllm:kv_cache_usage_perc", 0)
    again = server.ask(prompt=PROMPT, **VARIED)["choices"][0]
    assert again["token_ids"] == whole.tokens


def test_streams_join_to_the_whole_answer(server: Server, whole: Completion) -> None:
    options = {"logprobs": 0, "stream_options": {"include_usage": True}}
    *chunks, last = server.stream(prompt=PROMPT, **VARIED, **options)
    pieces = [chunk["choices"][0] for chunk in chunks]
    # Tokens that the front end has not sent yet are joined to one piece.
    assert len(pieces) > 1
    assert "".join(piece["text"] for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece["token_ids"] or ()] == whole.tokens
    logprobs = [p for piece in pieces for p in (piece["logprobs"] or {}).get("token_logprobs", ())]
    assert logprobs == pytest.approx(whole.logprobs, abs=TOLERANCE)
    assert last["choices"] == []
    used = [last["usage"][f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert used == [len(PROMPT), COUNT, len(PROMPT) + COUNT]


def test_other_endpoints(server: Server, reference: Reference) -> None:
    text = " ".join(f"the code of k{i} is 4 9 2 1 ." for i in range(40))
    messages = [{"role": "user", "content": text}]
    chat = {"path": "/v1/chat/completions", "messages": messages, **VARIED}
    answer = server.ask(**chat, logprobs=True)
    choice, prompt = answer["choices"][0], answer["prompt_token_ids"]
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    expected = reference.logprobs(prompt, choice["token_ids"], HALF)
    assert logprobs == pytest.approx(expected, abs=TOLERANCE)
    pieces = [chunk["choices"][0]["delta"] for chunk in server.stream(**chat)]
    content = "".join(piece.get("content") or "" for piece in pieces)
    assert content == choice["message"]["content"]

    # This endpoint puts a second token of the beginning before the template's.
    alone = server.complete([prompt[0], *prompt], COUNT)
    body = {"input": text, "max_output_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    response = server.ask("/v1/responses", **body)
    assert response["usage"]["input_tokens"] == len(prompt) + 1
    assert response["output"][0]["content"][0]["text"] == alone.text

    tokens = server.ask("/tokenize", prompt="the code of k17", add_special_tokens=False)["tokens"]
    assert len(tokens) == 4
    assert server.ask("/detokenize", tokens=tokens)["prompt"] == "the code of k17"
