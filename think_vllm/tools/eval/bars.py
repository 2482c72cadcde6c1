"""Bars of scores by task, with their intervals."""

from collections.abc import Sequence
from pathlib import Path

from think_vllm.tools.eval.pictures import new_figure, save
from think_vllm.tools.eval.summary import Group

BARS_FILE = "tasks.png"


def draw_bars(tasks: Sequence[Group], directory: Path) -> Path:
    """Draw one group of bars for each task.

    Args:
        tasks: As `summary.by_task` returns them; at least one.
        directory: Where the picture goes.

    Returns:
        The file.
    """
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
    path = directory / BARS_FILE
    save(figure, path)
    return path
