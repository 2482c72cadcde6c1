"""Exact match of recall answers by what chooses the key channels, on the real server.

Prompts are asked as in ``bench/quality.py``, so every digit comes from thin blocks. Each row is
a server of its own, with the same questions and, at one ratio, the same bytes. Rows are compared
in pairs, question by question: other policies and tables with ThinK's score over the prompt, and
tables of a span with those of the prompt. Differences have Newcombe's 95 % interval for pairs.

``--answers FILE`` keeps the answers, and asks no row again that it has: a long run can go on where
it was stopped. Run: ``python -m bench.quality_choices --samples 60``.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoConfig

from bench.machine import describe_machine
from bench.quality import is_right
from models.recipe.evaluate import SIZES
from tests.support.models import BUNDLED
from tests.support.server import Server
from think_vllm.config import ThinkConfig
from think_vllm.errors import ThinkError
from think_vllm.evals.recall import RecallSample, recall_samples
from think_vllm.evals.stats import estimate_difference, wilson_interval
from think_vllm.planner import plan_blocks

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SELECTS = get_args(ThinkConfig.model_fields["kv_select"].annotation)
TABLES = get_args(ThinkConfig.model_fields["kv_channel_tables"].annotation)


@dataclass(frozen=True)
class Row:
    """One server.

    Args:
        ratio: Share of key channels that is pruned, as asked for.
        select: What chooses the channels.
        tables: Over which keys.
        format: Of old keys and values.
    """

    ratio: float
    select: str
    tables: str
    format: str

    @property
    def config(self) -> ThinkConfig:
        """Its settings."""
        return ThinkConfig(
            kv_channel_prune=self.ratio,
            kv_select=self.select,
            kv_channel_tables=self.tables,
            kv_quant=self.format,
        )

    @property
    def flags(self) -> list[str]:
        """Its settings as flags."""
        given = self.config.model_dump(exclude_defaults=True)
        return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """Rows that were asked for, and mean something."""
    for ratio in options.ratios:
        for select in options.selects:
            for tables in options.tables:
                if (select, tables) != ("random", "span"):
                    yield Row(ratio, select, tables, options.format)


def ask(row: Row, samples: Sequence[RecallSample], options: argparse.Namespace) -> list[bool]:
    """Start a server, ask it everything, stop it; return which answers are right."""
    arguments = ["--dtype", options.dtype, "--enforce-eager", "--no-enable-prefix-caching"]
    arguments += ["--max-num-seqs", str(options.concurrency), *row.flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(options.model, arguments, Path(folder) / "server.log") as server,
        ThreadPoolExecutor(options.concurrency) as pool,
    ):
        return list(pool.map(lambda sample: is_right(server, sample), samples))


class Answers:
    """Answers that are kept in a file, a line each row.

    Args:
        path: The file; None to keep them nowhere.
        asked: What the rows have in common.
    """

    def __init__(self, path: Path | None, asked: dict[str, object]) -> None:
        self._path, self._asked = path, asked
        self._known: dict[Row, list[bool]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        for line in lines:
            found = json.loads(line)
            if found["asked"] != asked:
                raise ThinkError(
                    f"quality_choices: {path} has answers to {found['asked']}, asked are {asked}; "
                    "give another --answers"
                )
            self._known[Row(**found["row"])] = found["right"]

    def get(self, row: Row) -> list[bool] | None:
        """What is known of a row."""
        return self._known.get(row)

    def put(self, row: Row, right: list[bool]) -> None:
        """Keep a row."""
        self._known[row] = right
        if self._path is not None:
            line = json.dumps({"asked": self._asked, "row": asdict(row), "right": right})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def table_row(row: Row, right: Sequence[bool], options: argparse.Namespace) -> str:
    """A row in Markdown."""
    head_size = AutoConfig.from_pretrained(options.model).head_dim
    plan = plan_blocks(row.config, head_size, getattr(torch, options.dtype).itemsize)
    assert plan is not None
    low, high = wilson_interval(sum(right), len(right))
    cells = [f"{row.ratio:g}", f"{plan.key_channels} of {head_size}", row.select, row.tables]
    cells += [f"{sum(right)} of {len(right)}", f"{low:.3f} to {high:.3f}"]
    return f"| {' | '.join(cells)} |"


def comparison(first: Row, second: Row, known: Answers) -> str | None:
    """Two rows of one ratio, question by question; None if one of them was not asked."""
    of_first, of_second = known.get(first), known.get(second)
    if of_first is None or of_second is None:
        return None
    found = estimate_difference([*map(float, of_first)], [*map(float, of_second)], True, 0)
    assert found is not None
    names = [f"{row.select}, {row.tables}" for row in (second, first)]
    mean = found.estimate
    cells = [f"{first.ratio:g}", f"{names[0]} minus {names[1]}", f"{mean.value:+.3f}"]
    cells += [f"{mean.low:+.3f} to {mean.high:+.3f}", f"{found.better} : {found.worse}"]
    return f"| {' | '.join(cells)} |"


def comparisons(known: Answers, options: argparse.Namespace) -> Iterator[str]:
    """All comparisons of rows that were asked."""
    for ratio in options.ratios:
        base = Row(ratio, "think", "prompt", options.format)
        pairs = [
            (base, Row(ratio, "think", "span", options.format)),
            (base, Row(ratio, "key-norm", "prompt", options.format)),
            (base, Row(ratio, "random", "prompt", options.format)),
            (
                Row(ratio, "key-norm", "prompt", options.format),
                Row(ratio, "key-norm", "span", options.format),
            ),
        ]
        for pair in pairs:
            if (line := comparison(*pair, known)) is not None:
                yield line


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--format", default="none", help="--kv-quant")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=SIZES[-1][0])
    parser.add_argument("--records", type=int, default=SIZES[-1][1])
    parser.add_argument("--concurrency", type=int, default=8, help="prompts at once")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--selects", nargs="+", choices=SELECTS, default=SELECTS)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--answers", type=Path, help="file that keeps answers")
    options = parser.parse_args()
    samples = list(recall_samples(options.seed, options.samples, options.tokens, options.records))
    asked = ("dtype", "samples", "seed", "tokens", "records")
    known = Answers(
        options.answers,
        {"model": options.model.name, **{name: getattr(options, name) for name in asked}},
    )
    print(describe_machine())
    print(f"`{shlex.join(['python', '-m', 'bench.quality_choices', *sys.argv[1:]])}`")
    print(
        f"{options.samples} prompts of {options.tokens} tokens with {options.records} records, "
        f"{options.dtype}, format {options.format}, {options.model.name}\n"
    )
    print("| pruned | channels | chosen by | tables | right | 95 % interval |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for row in rows_of(options):
        right = known.get(row)
        if right is None:
            right = ask(row, samples, options)
            known.put(row, right)
        print(table_row(row, right, options), flush=True)
    print("\n| pruned | compared | difference | 95 % interval | better : worse |")
    print("| --- | --- | --- | --- | --- |")
    for line in comparisons(known, options):
        print(line)


if __name__ == "__main__":
    main()
