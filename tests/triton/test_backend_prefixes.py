"""Spans on the CUDA backend that are thin before their request's prompt ends, or only later."""

import pytest
import torch

from tests.triton.lives import Life


@pytest.mark.parametrize(
    ("name", "version"), [("k4v2-0.5", 1), ("k4v2-0.5", 2), ("fp8", 2), ("k4v2-values-0.5", 2)]
)
def test_prompts_behind_cached_thin_spans(name, version, device):
    life = Life(name, version, device, graphs=True)
    engine, span, due = life.engine, life.plan.span_tokens, life.rule.due_position
    donor = life.add("donor", 2 * span + 20, 2 * span + 21)
    life.step(donor=2 * span + 20)
    life.step(donor=1)
    assert donor.freed_spans == 2
    # One makes no span of its own until it decodes, and goes on from a dense block; the other
    # makes one at the end of its prompt.
    length, total = due(2) - 2, due(2) + 2
    own = life.add("own", length, total, hit=(donor, 2 * span + 16))
    more = life.add("more", length, total, hit=(donor, span))
    assert (own.cached_spans, more.cached_spans) == (2, 1)
    life.step(own=3, more=span)
    engine.finish(donor)
    life.step(own=length - own.computed - 1, more=8)
    life.step(own=1, more=length - more.computed)
    graph_steps = engine.graph_steps
    life.decode(4, "own", "more")
    assert engine.graph_steps == graph_steps + 4
    assert (own.freed_spans, more.freed_spans) == (3, 3)
    # Resumed in one chunk: one finds fewer spans than before, the other none.
    engine.preempt(own)
    life.resume(own, hit=(more, span))
    life.step(own=total - span - 1)
    engine.preempt(more)
    life.resume(more)
    life.step(more=total - 1, own=1)
    life.step(more=1)
    assert (own.cached_spans, more.cached_spans) == (1, 0)


@pytest.mark.parametrize(("name", "version"), [("k4v2-0.5", 1), ("k4v2-values-0.5", 2)])
def test_prompts_can_be_compacted_a_step_after_their_end(name, version, device):
    life = Life(name, version, device, layers=2, graphs=True, kv_prefix_cache="dense")
    engine, due = life.engine, life.rule.due_position
    one = life.add("one", due(2) - 2, due(2) + 2)
    two = life.add("two", due(0) - 2, due(0) + 2)  # too short for a span

    def heads() -> torch.Tensor:
        blocks = one.blocks[:: life.plan.span_blocks][:2]
        return torch.stack([layer.kv_cache[blocks] for layer in engine.layers])

    life.step(one=due(1), two=40)
    dense = heads()
    life.step(one=one.prompt_len - due(1), two=two.prompt_len - 40)
    assert torch.equal(heads(), dense)
    life.step(one=1, two=1)
    assert not torch.eq(heads(), dense).flatten(3).all(3).any()
    assert one.freed_spans == 0
    life.decode(3, "one", "two")
    assert engine.graph_steps == 4
    assert (one.freed_spans, two.freed_spans) == (3, 1)
    engine.preempt(one)
    engine.preempt(two)
    life.resume(one)
    life.step(one=one.total - 1, two=two.prompt_len)
    life.step(one=1, two=two.total - two.prompt_len)


@pytest.mark.parametrize(("name", "version"), [("k4v2-0.5", 1), ("k4v2-values-0.5", 2)])
def test_chunks_of_prompts_can_be_compacted(name, version, device):
    life = Life(name, version, device, graphs=True, kv_prune_prefill=True)
    engine, span, due = life.engine, life.plan.span_tokens, life.rule.due_position
    length, total = due(2) - 2, due(2) + 2
    # All spans of this prompt are made at the ends of its chunks, so those that fill while it
    # decodes take the last chunk's channels.
    early = life.add("early", length, total, borders=[70, 130])
    # The prompt's end makes one more, and selects.
    late = life.add("late", length, total, borders=[70])
    # A chunk shorter than the observation window.
    short = life.add("short", 70, 72, borders=[56, 62])
    life.step(early=70, late=70, short=56)
    life.step(early=60, short=6)
    assert early.freed_spans == 1
    life.step(early=length - 130, late=length - 70, short=8)
    hit = life.add("hit", length, total, hit=(late, span), borders=[130])
    life.step(early=1, late=1, short=1, hit=130 - span)
    life.step(early=1, late=1, short=1, hit=length - 130)
    life.decode(2, "early", "late", "hit")
    life.decode(2, "hit")
    assert engine.graph_steps == 4
    assert [r.freed_spans for r in (early, late, short, hit)] == [3, 3, 1, 3]
    engine.preempt(early)
    life.step(early=70)
    life.step(early=60)
    life.step(early=total - 131)
    life.step(early=1)


def test_chunks_of_prompts_can_be_quantized(device):
    life = Life("fp8", 2, device, kv_prune_prefill=True)
    one = life.add("one", 80, 82, borders=[50, 60])
    life.step(one=50)
    life.step(one=10)
    life.step(one=20)
    life.step(one=1)
    life.step(one=1)
    assert one.freed_spans == 2
