"""After warm-up, no kernel is compiled while requests wait, whatever they are like."""

from types import SimpleNamespace

import pytest
import torch

from csrc_triton import aot
from csrc_triton.static_blocks import order_channels
from tests.kernels.helpers import make_plan
from tests.support.compilations import as_compiled, full_name, record_binaries
from tests.support.static_blocks import make_plan as make_static_plan
from tests.support.tables import crossed
from tests.triton.engine import Engine
from tests.triton.lives import PLANS, Life
from tests.triton.static_engine import StaticWorker
from tests.triton.test_backend_eviction import evicting
from think_vllm.worker.cuda.warmup import (
    warm_up,
    warm_up_layers,
    warm_up_static,
    warm_up_static_layers,
)

#: Formats that other tests of lives leave out, as in ``PLANS``.
OTHER_PLANS = {
    "kivi4": ("kivi4", 3, 1, 48, 64, 64, (2, 1)),
    "kivi2-0.5": ("kivi2", 3, 1, 48, 32, 64, (2, 1)),
}


def follow_requests(life: Life) -> None:
    """Chunks, ends of prompts, decoding over due spans, preemption, prefix hits: many sizes."""
    span, due = life.plan.span_tokens, life.rule.due_position
    life.add("short", 7, due(0) + 4)
    long = life.add("long", 2 * span + 20, due(2) + 3)
    life.step(long=span, short=7)
    life.step(long=span + 16, short=1)
    life.step(long=4, short=1)
    life.step(long=1, short=1)
    life.engine.preempt(long)
    life.step(long=due(2) - 1)
    life.step(long=1, short=1)
    # Batches of one, of a multiple of 16 tokens, and of others.
    life.step(long=1)
    life.add("sixteen", 16, 20)
    life.step(sixteen=16)
    several = {f"r{i}": life.add(f"r{i}", 30 + i, 34 + i) for i in range(3)}
    life.step(**{name: request.prompt_len for name, request in several.items()})
    life.step(**dict.fromkeys(several, 1))
    # Behind another's prefix, thin and dense.
    life.add("other", 2 * span + 25, 2 * span + 30, hit=(long, 2 * span))
    life.step(other=25)


def check(life: Life, follow) -> None:
    with record_binaries() as warm:
        warm_up(life.plan, life.engine.heads, torch.float32, life.engine.device)
    with record_binaries() as used:
        follow(life)
    assert len({kernel for kernel, *_ in used}) >= 4
    assert sorted(used - warm) == []


@crossed({"name": list(PLANS), "version, layers, width": [(2, 3, 48), (1, 1, 40)]})
def test_requests_compile_nothing(name, version, layers, width, device, monkeypatch):
    monkeypatch.setattr(Engine, "WIDTH", width)  # the block table's
    check(Life(name, version, device, layers=layers, graphs=True), follow_requests)


@pytest.mark.parametrize("name", OTHER_PLANS)
def test_requests_of_other_formats_compile_nothing(name, device, monkeypatch):
    monkeypatch.setitem(PLANS, name, OTHER_PLANS[name])
    check(Life(name, 2, device), follow_requests)


@pytest.mark.parametrize("name", ["k4v2-0.5", "evicted-only"])
def test_evicted_requests_compile_nothing(name, device, monkeypatch):
    # Buffers of so many rows, one behind the other, do not begin at multiples of 16 bytes.
    monkeypatch.setattr(Engine, "MAX_REQUESTS", 5)
    only = {"kv_prune_decode": False} if name == "evicted-only" else {}

    def follow(life: Life) -> None:
        span, budget = life.plan.span_tokens, life.rule.budget_spans
        length = (budget + 2) * span + 20
        long = life.add("long", length, length + 9)
        life.add("short", budget * span + 12, budget * span + 30)
        life.step(long=length - 6, short=5)
        life.step(long=6, short=budget * span + 7)
        life.step(long=1, short=1)
        life.engine.preempt(long)
        life.step(short=1, long=length + 3)
        life.step(long=1)

    check(evicting(name, 2, device, graphs=True, **only), follow)


def test_layers_that_differ_compile_nothing(device):
    life = Life("k4v2-0.5", 2, device, layers=2)
    impls = [layer.impl for layer in life.engine.layers]
    impls[1].logits_soft_cap = 30.0
    with record_binaries() as warm:
        warm_up_layers(life.plan, impls, torch.float32, device)
    length = life.plan.span_tokens + 20
    life.add("one", length, length + 3)
    with record_binaries() as used:
        # Not the life's step: what it expects has no cap.
        for count in (30, length - 30, 1, 1):
            life.engine.step({"one": count})
    assert sorted(used - warm) == []


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_requests_over_static_blocks_compile_nothing(quant, device):
    plan, heads = make_static_plan(31, 48, torch.float32, quant=quant), (4, 2)
    worker = StaticWorker(plan, heads, device, graphs=True)
    order = order_channels(worker.channels[0], plan.head_size, device)
    with record_binaries() as warm:
        warm_up_static(plan, order, heads, torch.float32, device)
    with record_binaries() as used:
        worker.add("long", 60)
        worker.add("short", 25)
        worker.add("one", 4)
        worker.step(long=16, short=7)
        worker.step(long=17, short=1, one=1)
        worker.step(long=1, short=8, one=1)
        worker.step(long=1)
        worker.preempt("long")
        worker.step(long=33, one=1)
    assert len({kernel for kernel, *_ in used}) >= 4
    assert sorted(used - warm) == []


def test_static_layers_that_differ_are_all_warmed_up(device):
    plan = make_static_plan(31, 48, torch.float32)
    worker = StaticWorker(plan, (4, 2), device)
    order = order_channels(worker.channels[0], plan.head_size, device)
    kinds = [(4, 0.0), (2, 0.0), (4, 30.0), (4, 0.0)]
    attention = SimpleNamespace(kernels=SimpleNamespace(order=order))
    impls = [
        SimpleNamespace(num_heads=heads, num_kv_heads=2, logits_soft_cap=cap, attention=attention)
        for heads, cap in kinds
    ]
    with record_binaries() as made:
        warm_up_static_layers(plan, impls, torch.float32, device)
    with record_binaries() as wanted:
        for heads, cap in kinds:
            warm_up_static(plan, order, (heads, 2), torch.float32, device, cap)
    assert made == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("quant", "value_ratio"), [("none", 0.3), ("k4v2", 0.0)])
def test_what_is_compiled_ahead_is_what_is_launched(quant, value_ratio, dtype, device):
    plan = make_plan(64, dtype, quant=quant, value_ratio=value_ratio)
    with record_binaries() as binaries:
        warm_up(plan, (4, 2), dtype, device)
    launched = {
        (where, known.partition("=('constexpr'")[0].rpartition(", ")[0])
        for where, known, _ in binaries
    }
    assert {(full_name(x.kernel), told(x)) for x in aot.cases(plan, dtype)} == launched


def told(case: aot.AotCase) -> str:
    """What a case tells Triton of run-time arguments, as ``record_binaries`` writes it."""
    kernel = as_compiled(case.kernel)
    parts = []
    for name in kernel.arg_names[: len(case.signature)]:
        kind, _, multiple = case.signature[name].partition(":")
        known = None
        if kind.startswith("*"):
            is_known = multiple and name not in kernel.do_not_specialize_on_alignment
            known = "D" if is_known else ""
        parts.append(f"{name}={(kind, known)}")
    return ", ".join(parts)
