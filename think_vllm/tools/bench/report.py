"""A run as tables: Markdown for people, CSV for spreadsheets."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from think_vllm.tools.bench.comparison import Row
from think_vllm.tools.bench.results import Figures, Results
from think_vllm.tools.common.markdown import table

_COLUMNS = (
    *("load", "server", "running", "of plain", "output tok/s", "of plain", "of fp8 cache"),
    *("tok/processor s", "of plain", "TTFT ms, median", "p99", "ITL ms, median", "p99"),
    *("TPOT ms, median", "p99", "preemptions", "cache use", "fit"),
)
LEGEND = (
    "running: mean of vLLM's gauge while others waited and the cache was full; in brackets, while "
    "any ran, as none waited. tok/processor s: output tokens for each second of processor time of "
    "the server's processes, spinning included: on a CPU that others use too it says more than "
    "tok/s, on a GPU nothing. TTFT: time to first token, with waiting; ITL: time between tokens "
    "as the client reads them, 0 for those that it reads at once; TPOT: a request's mean. cache "
    "use: mean share of blocks in use, of the same samples. fit: whole requests of the mean length "
    "that the cache holds at once, by plan. Times and tokens are those of vLLM's load generator."
)


def markdown(results: Results, rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The tables, and what they were measured on."""
    lines = ["# Load test", "", str(results.machine), "", f"`{results.command}`", ""]
    memory = results.kv_cache_memory_bytes
    size = "KV cache: not known" if memory is None else f"{memory / 1e6:,.1f} MB of KV cache"
    lines += [f"{results.model}; {size}; rounds: {results.rounds}; seed {results.seed}."]
    lines += [f"Load average before each load: {load_range(results)}. {results.note}".rstrip(), ""]
    if not results.complete:
        lines += ["**This run did not come to its end.**", ""]
    lines += [f"- {note}" for note in notes] + ([""] if notes else [])
    for scenario in results.scenarios:
        measured = [row for row in rows if row.scenario == scenario.name]
        lines += [f"## {scenario.name}", "", scenario.description, ""]
        if measured:
            cells = table(_COLUMNS, (_cells(row, results) for row in measured))
            lines += [cells, "", *_hits(measured)]
        else:
            lines += ["Nothing was measured.", ""]
    lines += [LEGEND, "", "## Servers", ""]
    lines += [f"- {one.label}: `{'`, `'.join(one.commands)}`" for one in results.servers]
    if results.failures:
        lines += ["", "## What failed", ""]
        for failure in results.failures:
            where = f"{failure.server}{f', {failure.load}' if failure.load else ''}"
            lines += [f"{where}:", "", "```", failure.message, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def csv_text(results: Results) -> str:
    """One line for each load of each round, each with all it takes to place it."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in results.measurements:
        server = results.server(one.server)
        row: dict[str, Any] = one.model_dump(exclude={"figures"}) | one.figures.model_dump()
        row |= {
            "errors": one.figures.reasons,
            "machine": str(results.machine),
            "model": results.model,
            "kv_cache_memory_bytes": results.kv_cache_memory_bytes,
            "command": results.command,
            "server_command": "; ".join(server.commands),
            "capacity": server.capacity.get(one.scenario),
        }
        writer.writerow(row)
    return out.getvalue()


_CSV_COLUMNS = [
    *("scenario", "server", "concurrency", "request_rate", "num_prompts", "round", "capacity"),
    *Figures.model_fields,
    *("load_average", "date", "model", "kv_cache_memory_bytes", "server_command", "command"),
    "machine",
]


def progress(figures: Figures) -> str:
    """A load in a few words."""
    waiting = figures.running_waiting
    running = (
        f"running {figures.running_mean:.1f}"
        if waiting is None
        else f"running {waiting:.1f} while others wait"
    )
    return (
        f"{figures.output_tokens_per_s:.0f} output tok/s, {running}, TTFT "
        f"{figures.median_ttft_ms:.0f} ms, TPOT {figures.median_tpot_ms:.1f} ms, "
        f"{figures.preemptions} preemptions, {figures.duration_s:.0f} s"
    )


def _cells(row: Row, results: Results) -> list[str]:
    figures = row.figures
    rate = f"{figures.output_tokens_per_s:,.0f}"
    if row.slowest != row.fastest:
        rate += f" ({row.slowest:,.0f} to {row.fastest:,.0f})"
    per_processor_s = figures.output_tokens_per_processor_s
    failed = f"; **{figures.failed} failed**" if figures.failed else ""
    capacity = results.server(row.server).capacity.get(row.scenario)
    return [
        str(row.point),
        row.server + failed,
        f"{row.running:.1f}" if row.memory_bound else f"({row.running:.1f})",
        _multiple(row.ratios.get("running_waiting")),
        rate,
        _multiple(row.ratios.get("output_tokens_per_s")),
        _multiple(row.of_fp8_cache),
        "-" if per_processor_s is None else f"{per_processor_s:,.0f}",
        _multiple(row.ratios.get("output_tokens_per_processor_s")),
        f"{figures.median_ttft_ms:,.0f}",
        f"{figures.p99_ttft_ms:,.0f}",
        f"{figures.median_itl_ms:.1f}",
        f"{figures.p99_itl_ms:.1f}",
        f"{figures.median_tpot_ms:.1f}",
        f"{figures.p99_tpot_ms:.1f}",
        f"{figures.preemptions}",
        f"{figures.cache_use_mean:.2f}",
        "-" if capacity is None else f"{capacity}",
    ]


def _hits(rows: Sequence[Row]) -> list[str]:
    """Shares of prompt tokens found in prefix caches, if there are any."""
    rates = [
        f"{row.server}, {row.point}: {row.figures.prefix_hit_rate:.3f}"
        for row in rows
        if row.figures.prefix_hit_rate is not None
    ]
    return [f"Prompt tokens found in the prefix cache: {'; '.join(rates)}.", ""] if rates else []


def _multiple(value: float | None) -> str:
    """A multiple, or a dash if there is nothing to compare with."""
    return "-" if value is None else f"x{value:.2f}"


def load_range(results: Results) -> str:
    """Load averages before the loads: they say whether the machine had other work."""
    loads = [one.load_average for one in results.measurements]
    return f"{min(loads):.1f} to {max(loads):.1f}" if loads else "not known"
