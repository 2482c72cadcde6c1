"""Plots with matplotlib, which is optional, and without a display."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError

#: Distinct for colour-blind readers, too.
COLORS = ("#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
DPI = 120
#: Values below this are drawn in dark colours, which need white letters.
_DARK = 0.6


def check_matplotlib(command: str) -> None:
    """Reject a request for plots early where they cannot be drawn later.

    Raises:
        ThinkError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ThinkError(
            f"{command}: plots need matplotlib, which is not installed; run pip install "
            "'think-vllm[bench]', or give --no-plots"
        )


def new_figure(
    panels: int, width: float, height: float, rows: int = 1, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure and its panels, row by row.

    Args:
        panels: Of a row.
        width: Of a panel; inches.
        height: Of the figure; inches.
        rows: Of panels.
        options: Of matplotlib's ``subplots``.
    """
    from matplotlib.figure import Figure

    # Not pyplot, which keeps figures and looks for a display.
    figure = Figure(figsize=(width * panels + 0.8, height), layout="constrained")
    return figure, list(figure.subplots(rows, panels, squeeze=False, **options).flat)


def heatmap(
    panel: Any, values: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]
) -> Any:
    """Draw values of 0 to 1 as colours and as numbers; NaN is a dash.

    Returns:
        What a colour bar needs.
    """
    image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = f"{value:.2f}" if value == value else "-"
            color = "white" if value < _DARK else "black"
            panel.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows)
    return image


def bars(panel: Any, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Draw a row of horizontal bars, each in a colour of its own and with its value."""
    colors = [COLORS[place % len(COLORS)] for place in range(len(values))]
    drawn = panel.barh(range(len(values)), values, color=colors)
    panel.bar_label(drawn, fmt=" {:.3g}", fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_title(title, fontsize=9)


def finish(figure: Any, path: Path, title: str, about: str, **metadata: str) -> None:
    """Write a PNG with a title, and below in small print what was measured on what."""
    figure.suptitle(title, fontsize=11)
    figure.text(0.01, -0.01, about, fontsize=6, va="top", wrap=True)
    save(figure, path, Title=title, **metadata)


def save(figure: Any, path: Path, **metadata: str) -> None:
    """Write a PNG, without the version of matplotlib: equal figures are equal bytes."""
    figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None, **metadata})
