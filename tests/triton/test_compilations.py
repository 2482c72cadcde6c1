"""After warm-up, no kernel is compiled while requests wait, whatever they are like."""

import pytest
import torch

from tests.support.compilations import record_binaries
from tests.triton.lives import PLANS, Life
from think_vllm.attention.cuda_warmup import warm_up


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


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("version", [1, 2])
def test_requests_compile_nothing(name, version, device):
    life = Life(name, version, device, layers=2, graphs=True)
    with record_binaries() as warm:
        warm_up(life.plan, life.engine.heads, torch.float32, device)
    with record_binaries() as used:
        follow_requests(life)
    assert len({kernel for kernel, *_ in used}) >= 5
    assert sorted(used - warm) == []
