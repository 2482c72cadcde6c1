"""Multiples of plain vLLM's figures, from results written by hand."""

import pytest

from tests.unit.tools.bench.example_results import MACHINE, SCENARIO, figures, measurement, results
from think_vllm.errors import ThinkError
from think_vllm.tools.bench.comparison import check_comparable, rows_of

RUN = results(
    measurement("thin", 8, figures(300, 12.0, median_ttft_ms=50, processor_s=1.0)),
    measurement("plain", 8, figures(200, 4.0, median_ttft_ms=100)),
    measurement("fp8 cache", 8, figures(240, 8.0)),
    measurement("plain", 2, figures(100, None)),
    measurement("thin", 2, figures(90, None)),
)


def test_rows_of_compares_with_plain_under_the_same_load() -> None:
    rows = {(row.server, row.point.concurrency): row for row in rows_of(RUN)}
    thin = rows["thin", 8]
    assert thin.ratios["output_tokens_per_s"] == 1.5
    assert thin.ratios["running_waiting"] == 3
    assert thin.ratios["median_ttft_ms"] == 0.5
    assert thin.ratios["output_tokens_per_processor_s"] == 2
    assert thin.of_fp8_cache == 1.25
    assert (thin.running, thin.memory_bound) == (12, True)
    assert rows["plain", 8].ratios["output_tokens_per_s"] == 1
    alone = rows["thin", 2]
    assert alone.ratios["output_tokens_per_s"] == 0.9
    assert "running_waiting" not in alone.ratios
    assert alone.of_fp8_cache is None
    assert (alone.running, alone.memory_bound) == (2, False)


def test_rows_of_is_in_the_order_of_loads_and_servers() -> None:
    order = [(row.point.concurrency, row.server) for row in rows_of(RUN)]
    assert order == [(2, "plain"), (2, "thin"), (8, "plain"), (8, "fp8 cache"), (8, "thin")]


def test_rows_of_takes_medians_of_rounds() -> None:
    run = results(
        *(measurement("thin", 8, figures(x, x / 10), turn) for turn, x in enumerate((90, 50, 100))),
        measurement("plain", 8, figures(45, None, failed=1, errors={"x": 1})),
        measurement("plain", 8, figures(45, 5.0, failed=2, errors={"x": 1, "y": 1}), 1),
    )
    plain, thin = rows_of(run)
    assert thin.figures.output_tokens_per_s == 90
    assert (thin.slowest, thin.fastest) == (50, 100)
    assert thin.figures.running_waiting == 9
    assert thin.ratios["output_tokens_per_s"] == 2
    # In one round nobody waited, so there is no figure for all rounds.
    assert plain.figures.running_waiting is None
    assert "running_waiting" not in thin.ratios
    assert (plain.figures.failed, plain.figures.completed) == (3, 16)
    assert plain.figures.reasons == "2 x x; 1 x y"


def test_rows_of_an_external_server_compares_with_an_earlier_run() -> None:
    now = results(measurement("thin", 8, figures(400, 2.0)))
    [row] = rows_of(now, RUN)
    assert row.ratios["output_tokens_per_s"] == 2
    assert row.ratios["running_waiting"] == 0.5
    [alone] = rows_of(now)
    assert alone.ratios == {}


def test_check_comparable_tells_differences() -> None:
    now = results(
        machine=MACHINE.model_copy(update={"versions": {"vllm": "0.33.0"}}),
        kv_cache_memory_bytes=5,
        scenarios=[SCENARIO.changed(concurrency=(8, 9), num_prompts=8)],
    )
    notes = check_comparable(now, RUN, None)
    told = ["short, 9 at a time", "other versions then", "another KV cache then"]
    assert [note.split(":")[0] for note in notes] == told
    assert check_comparable(now, RUN, "http://x")[-1].startswith("whether http://x has as much")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": MACHINE.model_copy(update={"cores": 4})}, "of different machines say nothing"),
        ({"scenarios": [SCENARIO.changed(concurrency=(3,))]}, "s: short, 2 at a time; short, 8"),
        ({"scenarios": [SCENARIO.changed(prompt_tokens=99)]}, "none of them is run"),
        ({"scenarios": [SCENARIO.changed(name="other")]}, "none of them is run"),
    ],
)
def test_check_comparable_rejects(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ThinkError, match=message):
        check_comparable(results(**changes), RUN, None)
