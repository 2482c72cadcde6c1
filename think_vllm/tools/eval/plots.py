"""Plots of an evaluation: bars by task, and heat maps of depth by length."""

from collections.abc import Sequence
from pathlib import Path

from think_vllm.tools.common.figures import heatmap, new_figure, save
from think_vllm.tools.eval.summary import Group


def draw_bars(tasks: Sequence[Group], path: Path) -> Path:
    """Draw one group of bars for each task, with intervals."""
    labels = [figure.label for figure in tasks[0].figures]
    figure, (panel,) = new_figure(1, width=2 + 0.35 * len(tasks) * (len(labels) + 1), height=3.6)
    width = 0.8 / len(labels)
    for index, label in enumerate(labels):
        means = [group.figures[index].mean for group in tasks]
        places = [place + width * (index - (len(labels) - 1) / 2) for place in range(len(tasks))]
        values = [0.0 if mean is None else mean.value for mean in means]
        panel.bar(places, values, width, label=label)
        for place, mean in zip(places, means, strict=True):
            if mean is None:
                # No bar would look like a score of 0.
                panel.text(place, 0.02, "no answer", rotation=90, ha="center", fontsize=8)
            elif mean.low is not None and mean.high is not None:
                panel.plot([place, place], [mean.low, mean.high], color="black", linewidth=1)
    panel.set_xticks(range(len(tasks)), [group.task for group in tasks], rotation=20, ha="right")
    panel.set_ylim(0, 1.02)
    panel.set_ylabel("mean score, 95 % interval")
    # Bars may be anywhere in the panel.
    figure.legend(fontsize=8, loc="outside upper center", ncols=min(4, len(labels)))
    save(figure, path)
    return path


def draw_heatmaps(cells: Sequence[Group], directory: Path) -> list[Path]:
    """Draw one plot for each task on the grid, one panel for each server.

    Returns:
        The files.
    """
    paths = []
    for task in dict.fromkeys(cell.task for cell in cells):
        path = directory / f"heatmap-{task}.png"
        _draw_heatmap(task, [cell for cell in cells if cell.task == task], path)
        paths.append(path)
    return paths


def _draw_heatmap(task: str, cells: Sequence[Group], path: Path) -> None:
    lengths = sorted({cell.length for cell in cells if cell.length is not None})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    labels = [figure.label for figure in cells[0].figures]
    figure, panels = new_figure(
        len(labels), width=1.4 + 0.75 * len(lengths), height=1.6 + 0.45 * len(depths)
    )
    for index, (label, panel) in enumerate(zip(labels, panels, strict=True)):
        means = {(cell.length, cell.depth): cell.figures[index].mean for cell in cells}
        values = [
            [
                mean.value if (mean := means.get((length, depth))) else float("nan")
                for length in lengths
            ]
            for depth in depths
        ]
        image = heatmap(
            panel, values, [str(x) for x in lengths], [f"{100 * depth:.0f} %" for depth in depths]
        )
        panel.set_title(label, fontsize=9)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the fact")
    asked = cells[0].figures[0].asked
    figure.suptitle(f"{task}: mean score, {asked} questions a cell", fontsize=10)
    figure.colorbar(image, ax=panels, shrink=0.8)
    save(figure, path)
