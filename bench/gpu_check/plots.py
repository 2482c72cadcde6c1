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

from think_vllm.tools.common.figures import bars, finish, new_figure

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
    found = attention_bars(measured)
    height = 1 + 0.2 * sum(map(len, found.values())) + 0.6 * len(found)
    figure, axes = new_figure(2, width=5.1, height=height, rows=len(found))
    for number, (title, rows) in enumerate(found.items()):
        speed, ideal = axes[2 * number : 2 * number + 2]
        names = [name for name, _, _ in rows]
        bars(speed, names, [times for _, times, _ in rows], f"{title}: speed, {BASELINE} = 1")
        bars(ideal, names, [share for _, _, share in rows], f"{title}: % of the byte ideal")
        speed.axvline(1, color="black", linewidth=0.8)
        ideal.axvline(100, color="black", linewidth=0.8)
    finish(figure, path, "Decode attention", about(measured["machine"]))


def draw_loads(loads: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each figure of ``bench/gpu_check/load.py``."""
    figure, axes = new_figure(2, width=5.1, height=2 + 0.6 * len(loads), rows=2)
    titles = [one["title"] + ("" if one["complete"] else ", cut off") for one in loads]
    for axis, (name, field) in zip(axes, PANELS, strict=True):
        bars(axis, titles, [one["figures"][field] for one in loads], name)
    finish(figure, path, "8B shape, equal KV memory", about(loads[0]["machine"]))


def about(machine: dict[str, Any]) -> str:
    """What is known of a machine."""
    return "; ".join(f"{name}: {value}" for name, value in machine.items() if name != "command")


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and name the pictures; 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    made = draw_all(parser.parse_args(arguments).folder)
    for path in made:
        print(path)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
