"""Which requests stay dense because of what they would lose, and that this is decided once."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from think_vllm.hooks import metrics, model_runner, scheduler
from think_vllm.metrics.rank import begin_report
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.loss_limit import begin_loss_limit, loss_limit, take_decisions

RULE = SpanRule(2, 3, 2, 5, True, delay_prompt=True)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(model_runner, "_rule", RULE)
    remembered = (model_runner._own_rules, model_runner._resolved)
    for each in remembered:
        each.clear()
    begin_report()
    begin_loss_limit(0.25)
    yield
    begin_loss_limit(None)
    for each in remembered:
        each.clear()


def end_prompts(**shares: list[list[float]]) -> None:
    """Let prompts end, whose choices keep so much in each layer and head."""
    for layer in zip(*shares.values(), strict=True):
        loss_limit().add(list(shares), torch.tensor(layer, dtype=torch.float64))


def test_guard_decides_by_the_mean_over_layers_and_heads() -> None:
    end_prompts(a=[[0.9, 0.8], [0.7, 0.7]], b=[[0.9, 0.8], [0.6, 0.5]], c=[[0.75] * 2] * 2)
    assert take_decisions() == {"a": False, "b": True, "c": False}
    assert set(model_runner._own_rules) == {"b"}
    assert model_runner._own_rules["b"].stays_dense
    assert take_decisions() == {}


def test_guard_keeps_what_it_has_decided() -> None:
    end_prompts(a=[[0.9]], b=[[0.1]])
    take_decisions()
    # Resumed, with sums in another order; then another request of that name.
    end_prompts(a=[[0.7]])
    assert take_decisions() == {}
    new = SimpleNamespace(req_id="a", sampling_params=None)
    model_runner._admit_own([new], {"a": None, "b": None})
    assert set(model_runner._own_rules) == {"b"}
    end_prompts(a=[[0.7]])
    assert take_decisions() == {"a": True}
    model_runner._admit_own([SimpleNamespace(req_id="c", sampling_params=None)], {"c": None})
    assert not model_runner._resolved
    assert not model_runner._own_rules


def test_guard_keeps_requests_without_scores_dense() -> None:
    end_prompts(a=[[0.9, torch.nan]])
    assert take_decisions() == {"a": True}


def test_decisions_reach_the_scheduler_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_take_decisions", take_decisions)
    end_prompts(a=[[0.9]], b=[[0.1]])
    sent = metrics._measured()
    assert sent.kv_connector_stats.data == {
        "resolved": {"a": False, "b": True},
        "counters": {"requests_kept_dense": 1},
    }
    received: list[Any] = []
    receivers = scheduler.Receivers(
        lambda *_: None, lambda _, decisions: received.append(decisions), lambda _: None
    )
    monkeypatch.setattr(scheduler, "_receivers", receivers, raising=False)
    stats = scheduler.make_stats(
        lambda *_: None, SimpleNamespace(), None, sent.kv_connector_stats, None
    )
    assert stats is None
    assert received == [{"a": False, "b": True}]
    # It goes no further.
    assert "resolved" not in sent.kv_connector_stats.data


def test_engines_without_a_limit_have_no_guard() -> None:
    begin_loss_limit(None)
    assert take_decisions() == {}
    with pytest.raises(RuntimeError, match="without --kv-prune-max-loss"):
        loss_limit()
