"""Heat maps of scores, depth by length, one panel for each server."""

from collections.abc import Sequence
from pathlib import Path

from think_vllm.tools.eval.pictures import draw_grid, new_figure, save
from think_vllm.tools.eval.summary import Group


def draw_heatmaps(cells: Sequence[Group], directory: Path) -> list[Path]:
    """Draw one picture for each task on the grid.

    Args:
        cells: As `summary.by_cell` returns them.
        directory: Where pictures go.

    Returns:
        The files.
    """
    paths = []
    for task in dict.fromkeys(cell.task for cell in cells):
        path = directory / f"heatmap-{task}.png"
        _draw(task, [cell for cell in cells if cell.task == task], path)
        paths.append(path)
    return paths


def _draw(task: str, cells: Sequence[Group], path: Path) -> None:
    lengths = sorted({cell.length for cell in cells if cell.length is not None})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    labels = [figure.label for figure in cells[0].figures]
    figure, axes = new_figure(
        len(labels), width=1.4 + 0.75 * len(lengths), height=1.6 + 0.45 * len(depths)
    )
    image = None
    for index, (label, panel) in enumerate(zip(labels, axes, strict=True)):
        means = {(cell.length, cell.depth): cell.figures[index].mean for cell in cells}
        values = [
            [
                float("nan") if (mean := means.get((length, depth))) is None else mean.value
                for length in lengths
            ]
            for depth in depths
        ]
        image = draw_grid(
            panel,
            values,
            columns=[str(length) for length in lengths],
            rows=[f"{100 * depth:.0f} %" for depth in depths],
        )
        panel.set_title(label, fontsize=9)
        panel.set_xlabel("tokens")
    axes[0].set_ylabel("depth of the fact")
    asked = cells[0].figures[0].asked
    figure.suptitle(f"{task}: mean score, {asked} questions a cell", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8)
    save(figure, path)
