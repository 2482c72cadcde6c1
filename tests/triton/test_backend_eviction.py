"""Eviction on the CUDA backend, against undisturbed requests in plain torch."""

import pytest

from tests.support.tables import crossed
from tests.triton.lives import Life


def evicting(name: str, version: int, device, method: str = "snapkv", **settings) -> Life:
    """A backend that keeps one span of old tokens, or as many tokens in blocks."""
    budget = 48 if name == "evicted-only" else 80
    evicted = {"kv_evict": method, "kv_evict_budget": budget, "kv_prefix_cache": "dense"}
    return Life(name, version, device, **evicted, **settings)


@crossed(
    {
        "name, method": [
            ("none-0.5", "snapkv"), ("k4v2-0.5", "h2o"), ("fp8", "snapkv"), ("evicted-only", "h2o"),
        ],
        "version": [1, 2],
    }
)  # fmt: skip
def test_lives_of_evicted_requests(name, method, version, device):
    only = {"kv_prune_decode": False} if name == "evicted-only" else {}
    life = evicting(name, version, device, method, seed=version, **only)
    span, due = life.plan.span_tokens, life.rule.due_position
    budget = life.rule.budget_spans
    length = (budget + 2) * span + 20
    long = life.add("long", length, max(due(budget + 2), length) + 9)
    short = life.add("short", budget * span + 12, budget * span + 30)
    assert life.rule.evicted_spans(long.prompt_len) == 2
    assert life.rule.evicted_spans(short.prompt_len) == 0
    # The observation window is cut, and the prompt's last chunk shorter than it.
    life.step(long=length - 6, short=5)
    life.step(long=2, short=short.prompt_len - 5)
    life.step(long=4, short=1)
    life.decode(3, "long", "short")
    assert len(long.gone) >= 2 * life.plan.span_blocks
    assert life.engine.layers[0].impl.attention.evictor._kept == {}
    # Preempted, and resumed in a chunk that crosses its prompt's end.
    life.engine.preempt(long)
    life.step(short=1, long=long.prompt_len + 5)
    life.step(short=1, long=long.total - long.computed - 2)
    life.step(long=1)
    life.step(long=1, short=1)


@pytest.mark.parametrize("version", [1, 2])
def test_packs_ahead_of_graphs(version, device):
    life = evicting("k4v2-0.5", version, device, layers=2, graphs=True)
    span = life.plan.span_tokens
    first = life.add("first", 3 * span + 20, 3 * span + 40)
    life.add("second", 2 * span + 12, 2 * span + 20)
    life.step(first=first.prompt_len)
    life.step(second=2 * span + 12)
    life.decode(5, "first", "second")
    # A row less, so that another one's context begins elsewhere.
    life.decode(3, "first")
    life.step(second=1)
    assert life.engine.graph_steps == 9


def test_spans_that_fill_while_decoding_have_the_packed_channels(device):
    life = evicting("k4v2-0.5", 2, device)
    span, due = life.plan.span_tokens, life.rule.due_position
    one = life.add("one", 3 * span + 20, due(3) + 3)
    life.step(one=one.prompt_len)
    while one.computed < one.total:
        life.step(one=1)
    assert one.freed_spans == 4


@crossed({"version": [1, 2], "name, method": [("k4v2-0.5", "snapkv"), ("evicted-only", "h2o")]})
def test_budgets_of_requests(name, method, version, device):
    only = {"kv_prune_decode": False} if name == "evicted-only" else {}
    life = evicting(name, version, device, method, seed=version, graphs=True, **only)
    span, budget = life.plan.span_tokens, life.rule.budget_spans
    length = (budget + 3) * span + 20
    asks = {
        "server": {},
        "more": {"kv_evict_budget": (budget + 2) * span},
        "all": {"kv_evict_budget": False},
        "dense": {"kv_channel_prune": False},
    }
    requests = {name: life.add(name, length, length + 6, **asks[name]) for name in asks}
    life.step(server=length, all=length - 5)
    life.step(more=length, all=5, dense=length)
    for _ in range(2):
        life.step(**dict.fromkeys(asks, 1))
    assert life.engine.graph_steps == 2
    life.engine.preempt(requests["more"])
    life.step(server=1, more=length + 3, all=1, dense=1)
    life.step(**dict.fromkeys(asks, 1))
    gone = {name: len(request.gone) for name, request in requests.items()}
    tail = life.plan.span_blocks - life.plan.thin_blocks
    old = budget + 3
    assert gone["dense"] == 0
    assert gone["all"] == old * tail
    assert gone["more"] == old * tail + life.plan.thin_blocks
    assert gone["server"] == old * tail + 3 * life.plan.thin_blocks
