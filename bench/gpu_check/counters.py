"""Why decode attention takes as long as it does: hardware counters of every format, by ``ncu``."""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_check.machine import write_result
from think_vllm.plan.formats import FORMATS

METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "smsp__inst_executed.sum",
    "smsp__inst_executed.avg.per_cycle_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)
#: Launches of the kernel that are left out: they compile and warm up.
SKIPPED = 2


def command_of(quant: str) -> list[str]:
    """What measures one format."""
    return [
        "ncu", "--csv", "--clock-control", "none", "-k", "regex:attend", "-s", str(SKIPPED),
        "-c", "1", "--metrics", ",".join(METRICS),
        sys.executable, "-m", "bench.gpu_check.kernel", quant,
    ]  # fmt: skip


def read_counters(printed: str) -> dict[str, str]:
    """Counters, with their units, from what ``ncu --csv`` prints among other lines."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".rstrip()
        for row in csv.DictReader(lines)
        if row.get("Metric Name")
    }


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--limit", type=float, default=20, help="seconds for a format")
    parser.add_argument("--out", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write counters; 1 if a format has none."""
    options = make_parser().parse_args(arguments)
    found: dict[str, dict[str, str]] = {}
    for quant in options.formats:
        try:
            done = subprocess.run(
                command_of(quant), capture_output=True, text=True, timeout=options.limit,
                check=False,
            )  # fmt: skip
            found[quant] = read_counters(done.stdout)
            said = (done.stdout + done.stderr)[-800:]
        except (OSError, subprocess.TimeoutExpired) as error:
            found[quant], said = {}, str(error)
        print(f"{quant}: {found[quant] or said}", flush=True)
        write_result(options.out, counters=found)
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
