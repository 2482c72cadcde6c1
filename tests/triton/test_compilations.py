"""After warm-up, no kernel is compiled while requests wait, whatever they are like."""

import pytest
import torch

from csrc_triton.static_blocks import order_channels
from tests.support.compilations import record_binaries
from tests.support.static_blocks import make_plan as make_static_plan
from tests.triton.engine import Engine
from tests.triton.lives import PLANS, Life
from tests.triton.static_engine import StaticWorker
from tests.triton.test_backend_eviction import evicting
from think_vllm.attention.cuda_warmup import warm_up, warm_up_static


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


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("version", "layers", "width"), [(1, 1, 40), (2, 3, 48)])
def test_requests_compile_nothing(name, version, layers, width, device, monkeypatch):
    monkeypatch.setattr(Engine, "WIDTH", width)  # the block table's
    check(Life(name, version, device, layers=layers, graphs=True), follow_requests)


@pytest.mark.parametrize("name", ["k4v2-0.5", "evicted-only"])
def test_evicted_requests_compile_nothing(name, device):
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

    check(evicting(name, 2, device, **only), follow)


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
