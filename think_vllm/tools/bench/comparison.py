"""Figures of all rounds put together, and as multiples of plain vLLM's under the same load."""

import statistics
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.bench.results import Figures, Measurement, Results
from think_vllm.tools.bench.scenario import LoadPoint, Scenario

#: Figures that are compared with plain vLLM's.
COMPARED = (
    *("running_waiting", "output_tokens_per_s", "output_tokens_per_processor_s"),
    *("median_ttft_ms", "median_itl_ms", "median_tpot_ms"),
)
SUMMED = ("completed", "failed", "errors")

Key = tuple[str, str, LoadPoint]


@dataclass(frozen=True)
class Row:
    """One server under one load, all rounds together."""

    server: str  # its label
    scenario: str  # its name
    point: LoadPoint  # the load
    figures: Figures  # medians over the rounds, each figure by itself; requests are summed
    slowest: float  # output tokens/s of the slowest round
    fastest: float  # of the fastest
    #: Multiples of plain vLLM's figures, by name; empty without one to compare with.
    ratios: dict[str, float]
    #: Output tokens/s as a multiple of vLLM's own fp8 cache; None without one.
    of_fp8_cache: float | None

    @property
    def memory_bound(self) -> bool:
        """Whether requests waited for memory."""
        return self.figures.running_waiting is not None

    @property
    def running(self) -> float:
        """Requests that ran: while others waited for memory if any did, else while any ran."""
        waiting = self.figures.running_waiting
        return self.figures.running_mean if waiting is None else waiting


def rows_of(results: Results, baseline: Results | None = None) -> list[Row]:
    """Rows by scenario, load and server, in the order of the run."""
    groups = _grouped(results)
    others = _grouped(baseline or results)
    plain, fp8 = (
        {key[1:]: median_of(group) for key, group in others.items() if key[0] in labels}
        for labels in ((baseline or results).labels_of(kind) for kind in ("plain", "fp8 cache"))
    )
    rows = []
    for scenario in results.scenarios:
        for point in scenario.points():
            for server in results.servers:
                group = groups.get((server.label, scenario.name, point))
                if group:
                    where = (scenario.name, point)
                    rows.append(_row(group, plain.get(where), fp8.get(where)))
    return rows


def check_comparable(results: Results, baseline: Results, url: str | None) -> list[str]:
    """Reject an earlier run that says nothing about this one.

    Args:
        results: Of this run, before anything is measured.
        baseline: The earlier run.
        url: Of a server that was not started here; None otherwise.

    Returns:
        Differences that a reader should know.

    Raises:
        ThinkError: If machines differ, or it has no plain vLLM under one of these loads.
    """
    if baseline.machine.hardware != results.machine.hardware:
        raise ThinkError(
            f"bench: --compare was measured on {baseline.machine.hardware}, this is "
            f"{results.machine.hardware}; times of different machines say nothing. Leave --compare "
            "out, or measure plain vLLM here"
        )
    plain = baseline.labels_of("plain")
    there = {(m.scenario, m.point) for m in baseline.measurements if m.server in plain}
    old = {scenario.name: scenario for scenario in baseline.scenarios}
    wanted = {
        (scenario.name, point)
        for scenario in results.scenarios
        for point in scenario.points()
        # Loads may differ, what is sent may not.
        if _sent(scenario) == _sent(old.get(scenario.name))
    }
    if not there & wanted:
        loads = "; ".join(sorted({f"{name}, {point}" for name, point in there})) or "none"
        raise ThinkError(
            f"bench: --compare has plain vLLM under these loads: {loads}; none of them is run "
            "now. Give the same --scenario, --concurrency and --num-prompts"
        )
    notes = [
        f"{name}, {point}: not in the run compared with"
        for name, point in sorted(wanted - there, key=str)
    ]
    if baseline.machine.versions != results.machine.versions:
        notes.append(f"other versions then: {baseline.machine.versions}")
    if baseline.model != results.model:
        notes.append(f"another model then: {baseline.model}")
    if url is None and baseline.kv_cache_memory_bytes != results.kv_cache_memory_bytes:
        notes.append(f"another KV cache then: {baseline.kv_cache_memory_bytes} bytes")
    if url is not None:
        notes.append(f"whether {url} has as much KV memory is not checked")
    return notes


def median_of(group: list[Measurement]) -> Figures:
    """Medians over rounds of the same load; requests are summed."""
    merged: dict[str, Any] = {}
    for name in Figures.model_fields:
        values = [getattr(one.figures, name) for one in group]
        there = [value for value in values if value is not None]
        if name in SUMMED:
            merged[name] = reduce(add, there)
        elif len(there) < len(values):
            # In a round in which no request waited, the others' figure means something else.
            merged[name] = None
        else:
            middle = statistics.median(there)
            whole = Figures.model_fields[name].annotation is int
            merged[name] = round(middle) if whole else middle
    return Figures.model_validate(merged)


def ratios_of(figures: Figures, plain: Figures) -> dict[str, float]:
    """Multiples of plain vLLM's figures; without those that one of the two lacks."""
    pairs = {name: (getattr(figures, name), getattr(plain, name)) for name in COMPARED}
    return {name: mine / theirs for name, (mine, theirs) in pairs.items() if mine and theirs}


def _grouped(results: Results) -> dict[Key, list[Measurement]]:
    """Measurements of all rounds of a load."""
    groups: dict[Key, list[Measurement]] = {}
    for one in results.measurements:
        groups.setdefault((one.server, one.scenario, one.point), []).append(one)
    return groups


def _row(group: list[Measurement], plain: Figures | None, fp8: Figures | None) -> Row:
    figures = median_of(group)
    rates = [one.figures.output_tokens_per_s for one in group]
    return Row(
        server=group[0].server,
        scenario=group[0].scenario,
        point=group[0].point,
        figures=figures,
        slowest=min(rates),
        fastest=max(rates),
        ratios={} if plain is None else ratios_of(figures, plain),
        of_fp8_cache=None
        if fp8 is None or not fp8.output_tokens_per_s
        else figures.output_tokens_per_s / fp8.output_tokens_per_s,
    )


def _sent(scenario: Scenario | None) -> object:
    """A scenario without its loads."""
    if scenario is None:
        return None
    loads = {"concurrency", "request_rate", "num_prompts", "prompts_per_place", "description"}
    return scenario.model_dump(exclude=loads)
