"""Draw what a check has measured: ``python -m bench.gpu_check.plots FOLDER``. Needs no GPU.

Reads ``attention.json`` and ``load-*.json`` of the folder, as far as they are there, and writes
pictures beside them. Needs matplotlib.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Without pyplot: no window, no state that others share.
from matplotlib.figure import Figure

from think_vllm.tools.common.figures import COLORS, DPI

#: What decode attention is compared with.
BASELINE = "FlashAttention 3"
PANELS = (
    ("output tokens/s", "output_tokens_per_s"),
    ("running requests, most", "running_max"),
    ("time to first token, median, ms", "ttft_median_ms"),
    ("time between tokens, median, ms", "itl_median_ms"),
)


def attention_bars(measured: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """Bars of ``bench/gpu_attention.py``'s figures.

    Returns:
        For each batch and context: kernel, speed as a multiple of ``BASELINE``'s (NaN if that was
        not measured), and the share of the byte ideal in percent.
    """
    bandwidth = measured["machine"]["copy_bytes_per_second"]
    bars = {}
    for result in measured["results"]:
        times, read = result["microseconds"], result["bytes"]
        base = times.get(BASELINE, float("nan"))
        bars[f"batch {result['batch']}, {result['context']} tokens"] = [
            (name, base / took, 1e8 * read[name] / bandwidth / took) for name, took in times.items()
        ]
    return bars


def draw_attention(measured: dict[str, Any], path: Path) -> None:
    """A row of two panels for each batch and context."""
    bars = attention_bars(measured)
    kernels = sum(len(rows) for rows in bars.values())
    figure = Figure((11, 1 + 0.2 * kernels + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots(len(bars), 2, squeeze=False)
    for row, (title, rows) in zip(axes, bars.items(), strict=True):
        names = [name for name, _, _ in rows]
        _bars(row[0], names, [speed for _, speed, _ in rows], f"{title}: speed, {BASELINE} = 1")
        _bars(row[1], names, [share for _, _, share in rows], f"{title}: % of the byte ideal")
        row[0].axvline(1, color="black", linewidth=0.8)
        row[1].axvline(100, color="black", linewidth=0.8)
    _finish(figure, "Decode attention", measured["machine"], path)


def draw_loads(loads: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each figure of ``bench/gpu_check/load.py``."""
    figure = Figure((11, 2 + 0.6 * len(loads)), layout="constrained")
    titles = [one["title"] + ("" if one["complete"] else ", cut off") for one in loads]
    for axis, (name, field) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _bars(axis, titles, [one["figures"][field] for one in loads], name)
    _finish(figure, "8B shape, equal KV memory", loads[0]["machine"], path)


def _bars(axis: Any, names: Sequence[str], values: Sequence[float], title: str) -> None:
    for place, value in enumerate(values):
        axis.barh(place, value, color=COLORS[place % len(COLORS)], height=0.8)
        axis.text(value, place, f" {value:.3g}", va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title, fontsize=9)


def _finish(figure: Any, title: str, machine: dict[str, Any], path: Path) -> None:
    figure.suptitle(title, fontsize=11)
    about = "; ".join(f"{name}: {value}" for name, value in machine.items() if name != "command")
    figure.text(0.01, -0.01, about, fontsize=6, va="top", wrap=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Title": title})


def draw_all(folder: Path) -> list[Path]:
    """Draw whatever there is.

    Returns:
        The pictures.
    """
    made = []
    attention = folder / "attention.json"
    if attention.is_file():
        made.append(folder / "attention.png")
        draw_attention(json.loads(attention.read_text(encoding="utf-8")), made[-1])
    paths = sorted(folder.glob("load-*.json"))
    if paths:
        made.append(folder / "load.png")
        draw_loads([json.loads(path.read_text(encoding="utf-8")) for path in paths], made[-1])
    return made


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and name the pictures; 1 if there is nothing to draw."""
    made = draw_all(make_parser().parse_args(arguments).folder)
    for path in made:
        print(path)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
