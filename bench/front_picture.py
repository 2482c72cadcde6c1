"""The README's picture, from the recorded load test of docs/results/random-56m.

``make bench NAME=front_picture``
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from think_vllm.tools.bench.comparison import rows_of
from think_vllm.tools.bench.results import Results
from think_vllm.tools.common.figures import COLORS

FOLDER = Path("docs/results/random-56m")
SCENARIO = "context-1k"
PANELS = {"running requests": "running_waiting", "output tokens per second": "output_tokens_per_s"}
NAMES = {"plain": "plain vLLM, bf16", "fp8 cache": "vLLM's own fp8 cache"}


def draw(results: Results) -> Figure:
    """Draw bars for each server: multiples of plain vLLM's."""
    rows = [row for row in rows_of(results) if row.scenario == SCENARIO]
    servers = [row.server.split(" --")[0] for row in rows]
    labels = [NAMES.get(server, server) for server in servers]
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    for axis, (title, name) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        multiples = [row.ratios[name] for row in rows]
        bars = axis.barh(labels, multiples, color=COLORS[: len(rows)])
        axis.bar_label(bars, [f"x{multiple:.2f}" for multiple in multiples], padding=3)
        axis.set_title(title, fontsize=11)
        axis.margins(x=0.15)
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.yaxis.set_inverted(True)
    return figure


def main() -> None:
    """Write the picture."""
    # Readable on a dark page; the same bytes from the same results.
    mpl.rcParams.update({"savefig.facecolor": "white", "svg.fonttype": "none", "svg.hashsalt": ""})
    figure = draw(Results.read(FOLDER / "results.json"))
    figure.savefig(FOLDER / "gain.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
