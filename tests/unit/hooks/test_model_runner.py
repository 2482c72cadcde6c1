"""How many cached thin spans each row has, as both model runners tell it."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from think_vllm.hooks import model_runner
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.step_sorter import leading_thin_spans

RULE = SpanRule(2, 3, 2, 5, True)  # 3 blocks of 2 tokens


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(model_runner, "_count_cached", partial(leading_thin_spans, RULE))
    monkeypatch.setattr(model_runner, "_step_rows", None)
    monkeypatch.setattr(model_runner, "_rule", RULE)
    for remembered in (model_runner._cached_spans, model_runner._own_rules):
        remembered.clear()
    yield
    for remembered in (model_runner._cached_spans, model_runner._own_rules):
        remembered.clear()


def admitted(
    name: str, blocks: list[int], computed: int, extra_args: dict[str, Any] | None = None
) -> Any:
    return SimpleNamespace(
        req_id=name,
        block_ids=(blocks,),
        num_computed_tokens=computed,
        sampling_params=SimpleNamespace(extra_args=extra_args),
    )


def step_v2(names: list[str], new: list[Any], known: list[str] | None = None) -> list[int]:
    """One step of these requests; their cached spans."""
    known = known or names
    runner = SimpleNamespace(
        req_states=SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.full(9, 30, np.int32)),
            req_id_to_index={name: row for row, name in enumerate(known)},
        )
    )
    batch = SimpleNamespace(req_ids=names, idx_mapping_np=np.arange(len(names)), has_prefill=False)
    output = SimpleNamespace(scheduled_new_reqs=new)
    model_runner._observe_v2(lambda *_: (batch, 1), runner, output, False)
    rows = model_runner.step_rows()
    assert rows is not None
    return rows.cached_spans.tolist()


def test_v2_remembers_what_a_request_had_when_it_was_admitted() -> None:
    hit = admitted("a", [5, 6, 0, 7, 8, 0, 1, 2], 12)
    dense = admitted("b", [5, 6, 7, 1, 2], 6)
    assert step_v2(["a", "b"], [hit, dense]) == [2, 0]
    assert step_v2(["b", "a"], []) == [0, 2]
    # Preempted, and back with less of the cache; then with none of it.
    assert step_v2(["b"], []) == [0]
    assert step_v2(["a", "b"], [admitted("a", [5, 6, 0, 7, 8, 9, 1, 2], 6)]) == [1, 0]
    assert step_v2(["a", "b"], [admitted("a", [5, 6, 1, 7], 0)]) == [0, 0]


def test_v2_forgets_requests_that_have_ended() -> None:
    step_v2(["a"], [admitted("a", [5, 6, 0, 1], 6)])
    step_v2(["b"], [admitted("b", [5, 6, 0, 1], 6)], known=["b"])
    assert model_runner._cached_spans == {"b": 1}


def test_v2_ignores_blocks_that_are_not_computed() -> None:
    """Warm-up runs requests of null blocks."""
    assert step_v2(["a"], [admitted("a", [0] * 12, 0)]) == [0]


def runner_v1(*names: str) -> Any:
    """A runner of up to two requests."""
    rows = np.array([[5, 6, 0, 1, 2, 3], [5, 6, 7, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
    return SimpleNamespace(
        requests=dict.fromkeys(names),
        input_batch=SimpleNamespace(
            req_ids=list(names),
            num_reqs=len(names),
            num_prompt_tokens=np.array([30, 30, 30], np.int32),
            num_computed_tokens_cpu=np.array([11, 6, 12], np.int32),
            block_table=[SimpleNamespace(get_numpy_array=lambda: rows)],
        ),
    )


def step_v1(runner: Any, *new: Any) -> model_runner.StepRows | None:
    output = SimpleNamespace(scheduled_new_reqs=new)
    assert model_runner._admit_v1(lambda *_: 7, runner, output) == 7
    model_runner._observe_v1(lambda *_, **__: None, runner)
    return model_runner.step_rows()


def test_v1_reads_its_rows_of_blocks() -> None:
    step = step_v1(runner_v1("a", "b"))
    assert step is not None
    assert step.cached_spans.tolist() == [1, 0]


DENSE = {"kv_channel_prune": False}


def own_rows(step: model_runner.StepRows | None) -> set[int]:
    assert step is not None
    return set(step.own)


def test_v1_notes_rules_of_requests_that_are_new() -> None:
    assert own_rows(step_v1(runner_v1("a"), admitted("a", [], 0))) == set()
    # Something that is not ours.
    assert own_rows(step_v1(runner_v1("a"), admitted("a", [], 0, {"session_id": "x"}))) == set()
    step = step_v1(runner_v1("a", "b"), admitted("b", [], 0, DENSE))
    assert step is not None
    assert {row: rule.stays_dense for row, rule in step.own.items()} == {1: True}
    # Known without a row: preempted. Its rule is not told again.
    other = runner_v1("a")
    other.requests["b"] = None
    assert own_rows(step_v1(other)) == set()
    assert own_rows(step_v1(runner_v1("b"))) == {0}
    # Gone, and one of its name that asks for nothing.
    assert own_rows(step_v1(runner_v1("c"), admitted("c", [], 0))) == set()
    assert own_rows(step_v1(runner_v1("b"), admitted("b", [], 0, DENSE))) == {0}
    assert own_rows(step_v1(runner_v1("b"), admitted("b", [], 0))) == set()


def test_v2_notes_rules_of_requests_that_are_admitted() -> None:
    step_v2(["a", "b"], [admitted("a", [1], 0), admitted("b", [2], 0, DENSE)])
    assert own_rows(model_runner.step_rows()) == {1}
    step_v2(["b", "a"], [])
    assert own_rows(model_runner.step_rows()) == {0}
    # Preempted: forgotten, and told again.
    step_v2(["a", "c"], [admitted("c", [3], 0)])
    assert model_runner._own_rules == {}
    step_v2(["a", "b"], [admitted("b", [2], 0, DENSE)])
    assert own_rows(model_runner.step_rows()) == {1}


@pytest.mark.parametrize("version", [1, 2])
def test_dummy_runs_have_no_rows(version: int) -> None:
    step_v2(["a"], [])
    if version == 1:
        model_runner._observe_v1(lambda *_, **__: None, None, force_uniform_decode=False)
    else:
        model_runner._observe_v2(lambda *_: (None, 1), None, None, True)
    assert model_runner.step_rows() is None


def test_engines_that_cache_no_thin_spans_count_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "_count_cached", None)
    assert step_v2(["a"], [admitted("a", [5, 6, 0, 1], 6)]) == [0]
