"""Plots of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from think_vllm.tools.bench.comparison import Row
from think_vllm.tools.bench.report import load_range
from think_vllm.tools.bench.results import Results
from think_vllm.tools.common.figures import COLORS, finish, new_figure

MARKERS = "osD^vPX*"

_PANELS: tuple[tuple[str, Callable[[Row], float], bool], ...] = (
    ("output tokens/s", lambda row: row.figures.output_tokens_per_s, False),
    ("running requests", lambda row: row.running, False),
    ("time to first token, median, ms", lambda row: row.figures.median_ttft_ms, True),
    ("time per output token, median, ms", lambda row: row.figures.median_tpot_ms, True),
)


def draw(results: Results, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw a plot for each scenario, and one of the greatest loads.

    Returns:
        The files.
    """
    paths = []
    for scenario in results.scenarios:
        table = [row for row in rows if row.scenario == scenario.name]
        if table:
            path = folder / f"{scenario.name}.png"
            _draw_scenario(results, scenario.description, table, path)
            paths.append(path)
    last = [row for row in rows if row.point == _greatest(results, row.scenario)]
    if any("output_tokens_per_s" in row.ratios for row in last):
        path = folder / "summary.png"
        _draw_summary(results, last, path)
        paths.append(path)
    return paths


def _draw_scenario(results: Results, title: str, rows: Sequence[Row], path: Path) -> None:
    figure, axes = new_figure(2, width=4.6, height=7, rows=2)
    by_rate = rows[0].point.request_rate is not None
    for axis, (name, value, logarithmic) in zip(axes, _PANELS, strict=True):
        for index, server in enumerate(results.servers):
            line = [row for row in rows if row.server == server.label]
            loads = [row.point.request_rate or row.point.concurrency for row in line]
            values = [value(row) for row in line]
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
            axis.plot(loads, values, label=server.label, linewidth=1.5, markersize=5, **style)
        ticks = sorted({row.point.request_rate or row.point.concurrency or 0 for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("requests per second" if by_rate else "requests in flight")
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _finish(figure, title, results, path)


def _draw_summary(results: Results, rows: Sequence[Row], path: Path) -> None:
    """Bars: multiples of plain vLLM's running requests and rates."""
    scenarios = [one.name for one in results.scenarios if any(r.scenario == one.name for r in rows)]
    panels = [("running requests", "running_waiting"), ("output tokens/s", "output_tokens_per_s")]
    if results.machine.device == "cpu" and any(row.figures.processor_s for row in rows):
        panels.append(("output tokens per processor second", "output_tokens_per_processor_s"))
    height = 1.6 + 0.36 * len(results.servers) * len(scenarios)
    figure, axes = new_figure(len(panels), width=4.5, height=height, sharey=True)
    for axis, (name, field) in zip(axes, panels, strict=True):
        labels: list[tuple[int, str]] = []
        for row in sorted(rows, key=lambda row: scenarios.index(row.scenario)):
            place = len(labels) + scenarios.index(row.scenario)
            color = COLORS[_index(results, row.server) % len(COLORS)]
            multiple = row.ratios.get(field)
            labels.append((place, f"{row.scenario}, {row.point}: {row.server}"))
            axis.barh(place, multiple or 0, color=color, height=0.8)
            axis.text(multiple or 0, place, f" x{multiple:.2f}" if multiple else " -", va="center")
        axis.set_yticks([place for place, _ in labels], [text for _, text in labels])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(x=0.25)
        axis.set_title(f"{name},\nof plain vLLM's", fontsize=10)
    axes[0].invert_yaxis()
    memory = results.kv_cache_memory_bytes
    size = f" ({memory / 1e6:g} MB of KV cache)" if memory else ""
    _finish(figure, f"{Path(results.model).name}: equal KV memory{size}", results, path)


def _finish(figure: Any, title: str, results: Results, path: Path) -> None:
    about = f"{results.machine}\nload average {load_range(results)}. {results.note}".rstrip()
    finish(figure, path, title, about, Description=f"{about}\n{results.command}")


def _greatest(results: Results, scenario: str) -> object:
    """The greatest load of a scenario."""
    points = next(one for one in results.scenarios if one.name == scenario).points()
    return max(points, key=lambda point: point.concurrency or point.request_rate or 0)


def _index(results: Results, server: str) -> int:
    return [one.label for one in results.servers].index(server)
