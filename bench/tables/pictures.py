"""Pictures of results: a heat map of policies, and lines of log-probabilities and of eviction."""

from collections.abc import Sequence
from pathlib import Path

from bench.tables.configurations import BUDGETS, EVICTION_RATIOS, METHODS, RATIOS
from bench.tables.figures import DENSE, logprob_against, share_right
from bench.tables.markdown import known_policies
from bench.tables.questions import SIZES, WAYS
from bench.tables.results import Results
from think_vllm.tools.common.figures import heatmap, new_figure, save
from think_vllm.tools.eval.stats import Estimate


def draw_all(results: Results, directory: Path) -> list[Path]:
    """Draw what there are rows for; return the files."""
    paths = []
    known = known_policies(results)
    if known:
        paths.append(_heatmap(results, known, directory / "heatmap-policies.png"))
        paths.append(_logprobs(results, known, directory / "policies-logprob.png"))
    if any(row.group == "eviction" for row in results.rows.values()):
        paths.append(_eviction(results, directory / "eviction.png"))
    return paths


def _heatmap(results: Results, known: list[str], path: Path) -> Path:
    figure, axes = new_figure(len(SIZES), width=3.6, height=1.5 + 0.4 * len(known))
    image = None
    for (size, records), panel in zip(SIZES, axes, strict=True):
        values = [
            [
                float("nan")
                if row is None
                else share_right(row, WAYS[0], results.samples, size).value
                for row in (results.rows.get(f"{policy} {ratio:g}") for ratio in RATIOS)
            ]
            for policy in known
        ]
        image = heatmap(panel, values, [f"{ratio:g}" for ratio in RATIOS], known)
        panel.set_title(f"{size} tokens, {records} records", fontsize=9)
        panel.set_xlabel("pruned share of key channels")
    figure.suptitle(f"share answered right, {results.samples} prompts a cell", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    save(figure, path)
    return path


def _logprobs(results: Results, known: list[str], path: Path) -> Path:
    figure, (panel,) = new_figure(1, width=6, height=3.8)
    for policy in known:
        rows = {ratio: results.rows.get(f"{policy} {ratio:g}") for ratio in RATIOS}
        points = [
            (ratio, logprob_against(row, WAYS[0], DENSE))
            for ratio, row in rows.items()
            if row is not None
        ]
        _draw_line(panel, points, policy)
    # Small losses and large ones on one axis; linear around zero.
    panel.set_yscale("symlog", linthresh=0.01)
    panel.set_xlabel("pruned share of key channels")
    panel.set_ylabel("log-probability of a right digit,\nto dense; nats, 95 % interval")
    panel.axhline(0, color="gray", linewidth=0.8)
    figure.legend(fontsize=8, loc="outside upper center", ncols=len(known))
    save(figure, path)
    return path


def _eviction(results: Results, path: Path) -> Path:
    figure, axes = new_figure(len(WAYS), width=4.2, height=3.8)
    size, _ = SIZES[-1]
    for way, panel in zip(WAYS, axes, strict=True):
        for method in METHODS:
            for ratio in EVICTION_RATIOS:
                suffix = f" + {ratio:g}" if ratio else ""
                rows = {b: results.rows.get(f"{method} {b}{suffix}") for b in BUDGETS}
                points = [
                    (budget, share_right(row, way, results.samples, size))
                    for budget, row in rows.items()
                    if row is not None
                ]
                label = f"{method}{suffix}" if way == WAYS[0] else None
                _draw_line(panel, points, label)
        panel.set_title(f"{way}, {size} tokens", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("budget, tokens")
    axes[0].set_ylabel("share right, 95 % interval")
    figure.legend(fontsize=8, loc="outside upper center", ncols=4)
    save(figure, path)
    return path


def _draw_line(panel: object, points: Sequence[tuple[float, Estimate]], label: str | None) -> None:
    """Draw figures, and their intervals where there are any."""
    if not points:
        return
    places = [place for place, _ in points]
    values = [estimate.value for _, estimate in points]
    # An end that is the value itself may be rounded to the wrong side of it.
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for _, e in points]
    above = [0.0 if e.high is None else max(0.0, e.high - e.value) for _, e in points]
    panel.errorbar(places, values, [below, above], marker="o", markersize=3, label=label)  # type: ignore[attr-defined]
