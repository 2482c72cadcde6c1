"""Quantized thin blocks: log-probabilities of every format against the reference.

On models whose keys and values are exact (``make_exact_llama``), so that both sides code the
same bits.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.engine.conftest import Load
from tests.support import checks
from tests.support.checks import EAGER, FLOAT32, TOLERANCE
from tests.support.models import make_exact_llama
from tests.support.reference import Reference, Thinning
from think_vllm.plan.formats import FORMATS

MAX_MODEL_LEN = 2048
HALF = {"kv_channel_prune": 0.5}


@dataclass(frozen=True)
class Case:
    """One engine: a format, other settings, and a model of head size, query heads and KV heads.

    The KV cache of a ``small_pool`` holds little more than one request; a step has ``chunk`` tokens
    at most; ``key_bias`` is of a channel in 16 of the model's keys.
    """

    quant: str
    settings: dict[str, float] = field(default_factory=dict)
    block_size: int | None = None
    heads: tuple[int, int, int] = (128, 4, 2)
    small_pool: bool = False
    chunk: int | None = None
    key_bias: float = 0.0
    arguments: tuple[str, ...] = EAGER


CASES = {
    "fp8-pruned": Case("fp8", HALF),
    "kivi4-pruned-mqa-64": Case("kivi4", {"kv_channel_prune": 0.4}, heads=(64, 8, 1)),
    "k4v2-pruned-preempted": Case("k4v2", HALF, small_pool=True),
    "kivi2-pruned-mha-96": Case("kivi2", HALF, heads=(96, 4, 4)),
    # 3 thin blocks of a span, the last one with fewer tokens. A bias is many times what keys
    # differ in, which would be lost without their channels' zeros.
    "fp8-biased-preempted-small-chunks": Case(
        "fp8", block_size=64, small_pool=True, chunk=80, key_bias=32.0
    ),
    "kivi4-small-chunks": Case("kivi4", chunk=64),
    "k4v2-group-64": Case("k4v2", {"kv_quant_group": 64}),
    "kivi2-compiled": Case("kivi2", arguments=FLOAT32),
    # 44 of 64 value channels in groups of 32, and half of the key channels.
    "k4v2-values": Case("k4v2", HALF | {"kv_value_prune": 0.3}, heads=(64, 4, 2)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logprobs_equal_the_reference(load: Load, tmp_path: Path, case: Case) -> None:
    head_size, num_heads, num_kv_heads = case.heads
    heads = {"head_size": head_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    model = make_exact_llama(tmp_path, **heads, key_bias=case.key_bias)
    plan, arguments = checks.plan_served(
        head_size, case.block_size, kv_quant=case.quant, **case.settings
    )
    options = {}
    if case.small_pool:
        block_bytes = plan.layout.run_bytes * num_kv_heads
        # The longest request, and the null block.
        options["kv_cache_bytes"] = (MAX_MODEL_LEN // plan.block_size + 1) * block_bytes
    limit = ["--max-model-len", str(MAX_MODEL_LEN)]
    if case.chunk:
        limit += ["--max-num-batched-tokens", str(case.chunk)]
    engine = load(*case.arguments, *arguments, *limit, model=model, **options)

    # Prompts shorter than the windows, at the first positions that see a span thin, and long;
    # then two more spans fill while decoding.
    span = plan.span_tokens
    lengths = [1, 20, 32, 33, 50, 60, 70, 80, 90, 100, span + 31, span + 32, span + 33, 1900]
    counts = [min(2 * span + 40, 800)] * (len(lengths) - 1) + [120]
    reference, thinning = Reference(model), Thinning.of(plan)
    # Greedy answers of a random model go round in circles: groups of equal tokens.
    options = {"frequency_penalty": 2.0, "others": [replace(thinning, format=FORMATS["none"])]}
    completions = checks.check_served(engine, reference, lengths, counts, thinning, **options)
    if case.small_pool:
        assert engine.metric("vllm:num_preemptions_total") > 0
    if case.chunk:
        # Alone, so that its chunks are whole: the last one of its prompt is a single token.
        alone = [1 + case.chunk * (1 + (2 * span + 32) // case.chunk)]
        checks.check_served(engine, reference, alone, [40], thinning, frequency_penalty=2.0)
    if case.key_bias:
        prompts = checks.random_prompts(lengths)
        # By what the reference says of both, and a server of one: 8 bits are better than 4.
        other = Thinning.of(checks.plan_served(head_size, kv_quant="kivi4")[0])
        lost = checks.differences(reference, prompts[-1], completions[-1], None)
        exact = torch.tensor(reference.logprobs(prompts[-1], completions[-1].tokens, None))
        by_other = reference.logprobs(prompts[-1], completions[-1].tokens, other)
        assert lost.mean() < 0.5 * (torch.tensor(by_other) - exact).abs().mean()


def test_bundled_model(load: Load, recall_model: Path, recall_reference: Reference) -> None:
    # Several layers, and positions. Its keys differ from the reference's by 1e-7 and more, so
    # one that lies between two codes may get the other one, and its layer's successors differ by
    # more: a few log-probabilities of a request then do, by up to 1e-3.
    plan, arguments = checks.plan_served(128, kv_channel_prune=0.5, kv_quant="k4v2")
    engine = load(*EAGER, *arguments)
    lengths = [33, plan.span_tokens + 32, 300, 700, 1000, 1700]
    prompts = checks.random_prompts(lengths)
    completions = engine.complete_all(prompts, [300] * len(lengths))
    for prompt, completion in zip(prompts, completions, strict=True):
        served = checks.differences(recall_reference, prompt, completion, Thinning.of(plan))
        assert served.median() < TOLERANCE, len(prompt)
        assert served.max() < 0.01, len(prompt)


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact model in float16, too: its weights, and all bits of its queries, keys and values."""
    path = tmp_path_factory.mktemp("half")
    make_exact_llama(path, head_size=64, num_heads=2, num_kv_heads=1)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float16)
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.data = (projection.weight * 128).round() / 128
    model.float().save_pretrained(path)
    return path


@pytest.mark.parametrize("quant", FORMATS)
def test_float16(load: Load, half_model: Path, quant: str) -> None:
    plan, arguments = checks.plan_served(64, itemsize=2, kv_channel_prune=0.5, kv_quant=quant)
    engine = load("--dtype", "float16", "--enforce-eager", *arguments, model=half_model)
    lengths = [40, plan.span_tokens + 32, 900]
    prompts = checks.random_prompts(lengths)
    completions = engine.complete_all(prompts, [plan.span_tokens + 20] * 3, frequency_penalty=2.0)
    reference, thinning = Reference(half_model), Thinning.of(plan)
    for prompt, completion in zip(prompts, completions, strict=True):
        served = checks.differences(reference, prompt, completion, thinning)
        # Activations behind are rounded to 11 bits: transformers in float16 differs by up to 0.01.
        assert served.max() < 0.03, len(prompt)
        # The comparison would notice if nothing were thin.
        dense = checks.differences(reference, prompt, completion, None)
        assert dense.max() > 0.3, len(prompt)
