"""Which token is chosen: penalties, biases, thresholds and grammars, in the middle of compaction.

On quantized blocks, and with prompts in chunks. The reference says which token has to be chosen,
or which ones may be.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Serve
from tests.support.checks import EAGER, TOLERANCE, plan_served, random_prompts
from tests.support.reference import Reference, Thinning
from tests.support.server import Server, completion_of

pytestmark = pytest.mark.e2e

PLAN, ARGUMENTS = plan_served(128, kv_channel_prune=0.5, kv_quant="k4v2", kv_prefix_cache="dense")
THIN = Thinning.of(PLAN)
#: One span is thin at the end of the prompt, a second one is due 20 tokens later.
PROMPT = random_prompts([2 * PLAN.span_tokens + 32 - 20], seed=6)[0]
COUNT = 40
IDS = {"max_tokens": COUNT, "return_token_ids": True, "ignore_eos": True}
#: Words of the bundled tokenizer, and what ends an answer: by the tokenizer, and by the model.
DIGITS = list(range(11, 21))
ENDS = [2, 3]
#: They part behind the second span.
CHOICES = ["4" * COUNT, "4" * (COUNT - 8) + "71" * 4]


@pytest.fixture(scope="module")
def server(serve: Serve, exact_model: Path) -> Server:
    chunks = ("--max-num-batched-tokens", "200", "--no-async-scheduling")
    return serve(*EAGER, *ARGUMENTS, *chunks, model=exact_model)


def choose(server: Server, **options: Any) -> list[int]:
    """Tokens of an answer."""
    return server.ask(prompt=PROMPT, **{**IDS, **options})["choices"][0]["token_ids"]


def scores_of(
    exact_reference: Reference, tokens: list[int], thinning: Thinning | None = THIN
) -> torch.Tensor:
    """Log-probabilities in front of each token of an answer: [num_tokens, vocabulary]."""
    return exact_reference.scores(PROMPT, tokens, thinning)[len(PROMPT) - 1 :]


def assert_best(adjusted: torch.Tensor, tokens: list[int]) -> None:
    """Each token is the best of its row, but for rounding."""
    chosen = adjusted[torch.arange(len(tokens)), torch.tensor(tokens)]
    behind = adjusted.max(dim=1).values - chosen
    assert float(behind.max()) < TOLERANCE, behind


def counts_before(tokens: list[int], size: int) -> torch.Tensor:
    """How often each token came up before each place: [num_tokens, size]."""
    came = torch.nn.functional.one_hot(torch.tensor(tokens), size)
    return came.cumsum(0) - came


def test_penalties(server, exact_reference):
    tokens = choose(server, temperature=0, frequency_penalty=0.7, presence_penalty=0.4)
    scores = scores_of(exact_reference, tokens)
    counts = counts_before(tokens, scores.shape[1])
    adjusted = scores - 0.7 * counts - 0.4 * (counts > 0)
    assert_best(adjusted, tokens)
    # Unpenalized ones would be others, and so would those of blocks that are not thin.
    with pytest.raises(AssertionError):
        assert_best(scores, tokens)
    dense = scores_of(exact_reference, tokens, None)
    with pytest.raises(AssertionError):
        assert_best(dense - 0.7 * counts - 0.4 * (counts > 0), tokens)


def test_repetition_penalty_counts_the_prompt(server, exact_reference):
    tokens = choose(server, temperature=0, repetition_penalty=1.5)
    logits = exact_reference.logits(PROMPT, tokens, THIN)[len(PROMPT) - 1 :]
    seen = counts_before(tokens, logits.shape[1]) > 0
    seen[:, PROMPT] = True
    penalized = torch.where(logits > 0, logits / 1.5, logits * 1.5)
    assert_best(torch.where(seen, penalized, logits), tokens)
    with pytest.raises(AssertionError):
        assert_best(logits, tokens)


def test_logit_bias(server, exact_reference):
    bias = {150: 2.0, 200: 1.5, 250: 2.5, 300: -100.0}
    tokens = choose(server, temperature=0, logit_bias={str(i): x for i, x in bias.items()})
    scores = scores_of(exact_reference, tokens)
    adjusted = scores.clone()
    for token, value in bias.items():
        adjusted[:, token] += value
    assert_best(adjusted, tokens)
    with pytest.raises(AssertionError):
        assert_best(scores, tokens)


def test_thresholds_of_sampling(server, exact_reference):
    # Not seeded: with prompts in chunks, seeds end the CPU engine of vLLM 0.32.
    def allowed(tokens: list[int], rest: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        scores = scores_of(exact_reference, tokens)
        return rest(scores)[torch.arange(len(tokens)), torch.tensor(tokens)]

    def above_min_p(scores: torch.Tensor) -> torch.Tensor:
        return scores - scores.max(dim=1, keepdim=True).values - torch.tensor(0.4).log()

    def above_third(scores: torch.Tensor) -> torch.Tensor:
        return scores - scores.topk(3, dim=1).values[:, -1:]

    tokens = choose(server, temperature=1.0, min_p=0.4)
    assert float(allowed(tokens, above_min_p).min()) > -TOLERANCE
    tokens = choose(server, temperature=1.0, top_k=3)
    assert float(allowed(tokens, above_third).min()) > -TOLERANCE
    # Without thresholds, others come up.
    tokens = choose(server, temperature=1.0)
    assert float(allowed(tokens, above_min_p).min()) < -TOLERANCE
    assert float(allowed(tokens, above_third).min()) < -TOLERANCE


def next_digit(tokens: list[int]) -> list[int]:
    return DIGITS if len(tokens) < COUNT else ENDS


def next_of_choices(tokens: list[int]) -> list[int]:
    allowed = []
    for choice in CHOICES:
        ids = [DIGITS[int(digit)] for digit in choice]
        if ids[: len(tokens)] == tokens:
            allowed += ids[len(tokens) : len(tokens) + 1] or ENDS
    return allowed


def next_of_integer(tokens: list[int]) -> list[int]:
    if tokens == DIGITS[:1]:
        return ENDS  # no digit behind a leading zero
    return DIGITS + ENDS if tokens else DIGITS


#: Apart from 0 to 9 nothing that JSON is made of is a word of the bundled tokenizer.
INTEGER = {"name": "integer", "schema": {"type": "integer"}}


@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        ({"structured_outputs": {"regex": f"[0-9]{{{COUNT}}}"}}, next_digit),
        ({"structured_outputs": {"choice": CHOICES}}, next_of_choices),
        ({"response_format": {"type": "json_schema", "json_schema": INTEGER}}, next_of_integer),
    ],
    ids=["regex", "choice", "json-schema"],
)
def test_structured_output(server, exact_reference, grammar, allowed):
    # Ends are unlikely, so that the integer becomes a long one, too.
    options = {**IDS, "ignore_eos": False, "max_tokens": COUNT + 1, "logprobs": 0, **grammar}
    options["logit_bias"] = {str(end): -100 for end in ENDS}
    found = completion_of(server.ask(prompt=PROMPT, temperature=0, **options)["choices"][0])
    tokens = found.tokens
    assert len(tokens) > COUNT - 5
    logits = exact_reference.logits(PROMPT, tokens, THIN)[len(PROMPT) - 1 :]
    masked = torch.full_like(logits, float("-inf"))
    for place, row in enumerate(masked):
        which = allowed(tokens[:place])
        row[which] = logits[place, which]
    biased = masked.clone()
    biased[:, ENDS] -= 100
    assert_best(biased, tokens)
    # vLLM's log-probabilities are those among allowed tokens, without biases.
    scores = torch.log_softmax(masked, dim=1)
    expected = scores[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    assert found.logprobs == pytest.approx(expected, abs=TOLERANCE)
