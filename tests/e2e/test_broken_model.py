"""A model that computes NaN for some requests: the others must not notice.

vLLM by itself does not promise that. Its CPU kernels weigh what lies behind a context in a block
with zero, which leaves a NaN a NaN, so healthy requests answer NaN once they get the blocks of
broken ones. With thin blocks such memory is cleared, and codes of NaN concern their owner alone.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.e2e.conftest import Serve
from tests.support.checks import EAGER, assert_equal, plan_served
from tests.support.models import make_exact_llama
from tests.support.reference import Reference, Thinning
from tests.support.served import Completion

pytestmark = pytest.mark.e2e

#: Tokens whose embedding holds a NaN; an infinity; and one whose keys and values overflow.
NAN, INFINITE, OVERFLOWING = BROKEN = (4, 5, 6)
MAX_MODEL_LEN = 1024


def make_broken_llama(path: Path) -> Path:
    """Save an exact model that computes NaN and infinities for the tokens above."""
    make_exact_llama(path)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        # As exact as before, and with channels that no healthy token uses.
        embedding = model.model.embed_tokens.weight
        embedding[:, :32] *= 2
        embedding[:, 32:] = 0
        embedding[NAN, 7] = float("nan")
        embedding[INFINITE, 7] = float("inf")
        embedding[OVERFLOWING, 127] = 64
        attention.k_proj.weight[5, 127] = -3e38
        attention.v_proj.weight[3, 127] = 3e38
    model.save_pretrained(path)
    return path


def test_healthy_requests_do_not_notice_broken_ones(serve: Serve, tmp_path: Path) -> None:
    model = make_broken_llama(tmp_path)
    plan, arguments = plan_served(128, kv_channel_prune=0.5, kv_quant="k4v2")
    # Prompts in one chunk and in several: vLLM's kernel finds their keys in different places.
    limits = ("--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "256")
    # One long request and the null block: everybody gets blocks that others have used.
    pool = (MAX_MODEL_LEN // plan.block_size + 1) * plan.layout.run_bytes * 2
    server = serve(*EAGER, *arguments, *limits, model=model, kv_cache_bytes=pool)
    rng = random.Random(0)
    options = {
        # Nobody generates a broken token, nor goes round in circles.
        "logit_bias": {str(token): -100 for token in BROKEN},
        "frequency_penalty": 2.0,
    }

    def prompt(length: int) -> list[int]:
        return [rng.randrange(16, 384) for _ in range(length)]

    def ask(tokens: list[int], count: int) -> Completion:
        return server.complete(tokens, count, **options)

    def ask_broken(tokens: list[int], count: int) -> None:
        # With log-probabilities vLLM answers that a NaN is no JSON, without them with odd tokens.
        body = {"prompt": tokens, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        for wanted in ({"logprobs": 0}, {}):
            server.post("/v1/completions", {**body, **options, **wanted})

    # Broken by the last token alone, by one in the middle of a span, and by all of them.
    broken = []
    for token in BROKEN:
        broken += [[*prompt(299), token], [*prompt(50), token, *prompt(450)], [token] * 350]
    beside = [prompt(length) for length in (1, 33, plan.span_tokens + 32, 300, 450, 700)]
    with ThreadPoolExecutor(len(broken) + len(beside)) as threads:
        others = [threads.submit(ask_broken, tokens, 200) for tokens in broken]
        answers = list(threads.map(ask, beside, [250] * len(beside)))
        for request in others:
            request.result()
    # Whoever comes after a request that has filled the pool finds nothing else.
    after = [prompt(length) for length in (2, 34, 100, 239, 257, 320, 500)]
    for tokens in after:
        ask_broken([NAN] * 1000, 1)
        answers.append(ask(tokens, 40))
    assert_equal(Reference(model), beside + after, answers, Thinning.of(plan))
    # Blocks changed hands in the middle of requests too.
    assert server.metric("vllm:num_preemptions_total") > 0
