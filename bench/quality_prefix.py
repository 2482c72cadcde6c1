"""Recall over prefixes that another question has pruned, and over prompts pruned chunk by chunk.

"hit" rows ask every prompt twice, with two questions: the first one leaves its prefix in the cache,
the second finds it there and is the one that counts. A thin prefix keeps the channels that the
first question chose, and the second question's own tokens see it pruned; with
``--kv-prefix-cache dense`` they see it whole. "chunks" rows prune at the end of every chunk of a
prompt, whose channels are chosen by text, not by the question. As in ``quality.py`` prompts are
sent without their final "?". The bundled model says nothing about real language models.
Run: ``python -m bench.quality_prefix``.
"""

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import describe_machine
from bench.quality import QUESTION_MARK, is_right
from tests.support.models import BUNDLED
from tests.support.server import Server
from think_vllm.tools.eval.recall import QUESTION_TOKENS, RecallSample, recall_samples

HEADER = "| prefix | flags | right | tokens hit, of all |\n| --- | --- | --- | --- |"
FORMATS = {
    "0.4": ["--kv-channel-prune", "0.4"],
    "0.5": ["--kv-channel-prune", "0.5"],
    "0.4 + kivi4": ["--kv-channel-prune", "0.4", "--kv-quant", "kivi4"],
    "0.5 + k4v2": ["--kv-channel-prune", "0.5", "--kv-quant", "k4v2"],
}


@dataclass(frozen=True)
class Mode:
    """How prefixes come about."""

    name: str
    flags: tuple[str, ...]
    asks_twice: bool = False


MODES = [
    Mode("no hit", ("--no-enable-prefix-caching",)),
    Mode("thin hit", (), asks_twice=True),
    Mode("dense hit", ("--kv-prefix-cache", "dense"), asks_twice=True),
    Mode("chunks of 512", ("--kv-prune-prefill", "--max-num-batched-tokens", "512")),
    Mode("chunks of 256", ("--kv-prune-prefill", "--max-num-batched-tokens", "256")),
]


def other_question(sample: RecallSample) -> str:
    """The same text with a question for another record."""
    words = sample.prompt.split()
    text, asked = words[:-QUESTION_TOKENS], words[-2]
    keys = [key for key in re.findall(r"the code of (\S+) is", " ".join(text)) if key != asked]
    return " ".join([*text, *words[-QUESTION_TOKENS:-2], keys[len(keys) // 2], QUESTION_MARK])


def measure(
    mode: Mode, flags: Sequence[str], samples: Sequence[RecallSample], options: argparse.Namespace
) -> tuple[float, float]:
    """Share of right answers, and of prompt tokens that were in the cache."""
    # Chunks are one prompt's own only if no other shares the step.
    at_once = 1 if "--max-num-batched-tokens" in mode.flags else options.concurrency
    arguments = ["--dtype", options.dtype, "--enforce-eager", "--max-num-seqs", str(at_once)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(
            options.model, [*arguments, *flags, *mode.flags], Path(folder) / "server.log"
        ) as server,
        ThreadPoolExecutor(at_once) as pool,
    ):

        def ask(sample: RecallSample) -> bool:
            if mode.asks_twice:
                server.complete(other_question(sample), 4)
            return is_right(server, sample)

        right = list(pool.map(ask, samples))
        hits = server.metric("vllm:prefix_cache_hits_total")
        asked = sum(sample.num_prompt_tokens - 1 for sample in samples)
    return sum(right) / len(right), hits / asked


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--records", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=8, help="prompts at once")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    names = [mode.name for mode in MODES]
    parser.add_argument("--modes", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = list(recall_samples(options.seed, options.samples, options.tokens, options.records))
    print(describe_machine())
    print(f"`{shlex.join(['python', '-m', 'bench.quality_prefix', *sys.argv[1:]])}`")
    print(f"{options.samples} prompts of {options.tokens} tokens, {options.records} records\n")
    print(HEADER)
    for name in options.formats:
        for mode in MODES:
            if mode.name in options.modes:
                right, hit = measure(mode, FORMATS[name], samples, options)
                print(f"| {mode.name} | {name} | {right:.3f} | {hit:.2f} |", flush=True)


if __name__ == "__main__":
    main()
