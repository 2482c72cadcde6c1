"""What all pictures share: matplotlib, asked for late, without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError

#: Inches of one panel are chosen by the picture; dots of an inch are the same for all.
_DPI = 110
#: Shares below this are drawn in colours that want white letters.
_DARK = 0.6


def check_pictures() -> None:
    """Notice early that nothing can be drawn.

    Raises:
        ThinkError: If matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ThinkError(
            f"eval: plots need matplotlib ({error}); pip install matplotlib (or "
            "think-vllm[bench]), or pass --no-plots"
        ) from None


def new_figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with panels side by side.

    Args:
        panels: How many.
        width: Of a panel; inches.
        height: Of the figure; inches.
    """
    from matplotlib.figure import Figure

    # Not pyplot, which keeps figures and looks for a display.
    figure = Figure(figsize=(width * panels + 0.8, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def draw_grid(
    panel: Any, values: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]
) -> Any:
    """Draw shares as a heat map with its numbers; NaN where nothing is known.

    Returns:
        The image, for a colour bar.
    """
    image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = f"{value:.2f}" if value == value else "-"
            # Low values are dark.
            color = "white" if value < _DARK else "black"
            panel.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows)
    return image


def save(figure: Any, path: Path) -> None:
    """Write a PNG, without the version of matplotlib in it: equal figures are equal bytes."""
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
