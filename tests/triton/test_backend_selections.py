"""Policies, and spans with channels of their own, on the CUDA backend."""

import pytest
import torch

from tests.triton.lives import Life
from think_vllm.metrics.rank import begin_report, take_report


@pytest.mark.parametrize(
    ("name", "prefixes", "version"), [("none-0.5-values-0.3", "thin", 1), ("none-0.5", "dense", 2)]
)
def test_lives_of_spans_with_channels_of_their_own(name, prefixes, version, device):
    settings = {"kv_channel_tables": "span", "kv_prefix_cache": prefixes}
    life = Life(name, version, device, seed=version, **settings)
    span, due = life.plan.span_tokens, life.rule.due_position
    short = life.add("short", 7, due(1) + 3)  # no span of the prompt: one choice for all of them
    long = life.add("long", 3 * span + 14, due(3) + 3)
    spans = life.expected["long"].channels[0]
    assert not torch.equal(spans[0], spans[1])
    assert not torch.equal(spans[1], spans[2])
    assert torch.equal(spans[2], spans[3])  # filled while decoding
    life.step(long=span, short=7)
    life.step(long=2 * span, short=1)
    life.step(long=14, short=1)  # the window is cut
    life.step(long=1, short=1)
    life.step(long=1, short=1)
    assert long.freed_spans == 3
    # Both are preempted, then resumed: prompt and output in one chunk, or in several.
    life.engine.preempt(short)
    life.engine.preempt(long)
    life.step(long=due(3) - 1, short=5)
    life.step(short=due(1) - 6, long=1)
    life.step(short=1, long=1)
    life.step(short=1, long=1)
    life.step(short=1, long=1)
    assert (short.freed_spans, long.freed_spans) == (2, 4)
    if prefixes == "thin":
        other = life.add("other", 4 * span + 13, 4 * span + 15, hit=(long, 2 * span))
        life.step(other=2 * span + 13)
        life.step(other=1)
        life.step(other=1)
        assert (other.cached_spans, other.freed_spans) == (2, 4)


def test_spans_with_channels_of_their_own_ahead_of_graphs(device):
    settings = {"kv_channel_tables": "span", "kv_prefix_cache": "dense"}
    life = Life("k4v2-0.5", 1, device, layers=2, graphs=True, **settings)
    span, engine = life.plan.span_tokens, life.engine
    life.add("first", 2 * span + 20, 2 * span + 30)
    life.add("second", 3 * span + 12, 3 * span + 20)
    life.add("third", 20, 30)
    life.step(first=2 * span + 20, third=20)
    life.step(second=3 * span + 12, first=1)
    assert engine.graph_steps == 0
    # The second one's spans are compacted ahead of a graph.
    life.decode(5, "first", "second", "third")
    assert engine.graph_steps == 5
    assert not engine.builder.state.tables.keys() - {engine.builder.state.requests.get("third")}


def test_spans_of_chunks_have_channels_of_their_own(device):
    settings = {"kv_channel_tables": "span", "kv_prune_prefill": True}
    life = Life("none-0.5", 1, device, **settings)
    span = life.plan.span_tokens
    borders = [2 * span + 20, 3 * span + 5]
    one = life.add("one", 4 * span + 20, 4 * span + 25, borders=borders)
    life.step(one=borders[0])
    life.step(one=borders[1] - borders[0])
    life.step(one=one.prompt_len - borders[1])
    life.decode(3, "one")
    assert one.freed_spans == 4


@pytest.mark.parametrize(
    ("select", "tables"), [("key-norm", "prompt"), ("key-norm", "span"), ("random", "prompt")]
)
def test_lives_by_policy(select, tables, device):
    settings = {"kv_select": select, "kv_channel_tables": tables}
    life = Life("none-0.5", 2, device, layers=2, **settings)
    span = life.plan.span_tokens
    one = life.add("one", 2 * span + 20, 2 * span + 23)
    first, second = (life.expected["one"].channels[layer][0] for layer in (0, 1))
    assert not torch.equal(first, second)
    assert life.engine.builder.state.energy.shape[2] == 0  # no window is summed up
    life.step(one=span)
    life.step(one=one.prompt_len - span - 4)
    life.step(one=4)
    life.decode(3, "one")
    assert one.freed_spans == 2


@pytest.mark.parametrize(("tables", "choices"), [("prompt", 1), ("span", 3)])
def test_score_mass_is_counted_for_every_choice(tables, choices, device):
    begin_report()
    life = Life("none-0.5", 2, device, kv_channel_tables=tables)
    one = life.add("one", 3 * life.plan.span_tokens + 12, 3 * life.plan.span_tokens + 14)
    life.step(one=one.prompt_len)
    report = take_report()
    assert report is not None
    counts, sums = report["shares"]
    assert sum(counts) == choices * life.engine.heads[1]
    # Half of the channels of random numbers: more than half of the scores, and not all.
    assert 0.5 < sum(sums) / sum(counts) < 0.8


def test_random_choices_have_no_score_mass(device):
    begin_report()
    life = Life("none-0.5", 2, device, kv_select="random")
    life.add("one", 100, 102)
    life.step(one=100)
    assert take_report() is None
