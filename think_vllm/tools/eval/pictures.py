"""What all pictures share: matplotlib, asked for late, without a display."""

from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError

#: Inches of one panel are chosen by the picture; dots of an inch are the same for all.
_DPI = 110


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


def save(figure: Any, path: Path) -> None:
    """Write a PNG, without the version of matplotlib in it: equal figures are equal bytes."""
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
