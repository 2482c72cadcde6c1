"""Time to first token of a 2k prompt: plain vLLM and pruned, request by request in turn.

Both servers are up at the same time, and one is frozen while the other works, so every pair
meets the same machine. Run: ``python -m bench.ttft``; with ``--large`` on a random-weight model
whose prefill is dominated by its matrices, as that of a real model is.
"""

import argparse
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.machine import describe_machine
from tests.support.models import BUNDLED, make_llama
from tests.support.server import Server
from think_vllm.plan.formats import FORMATS


def seconds_to_answer(server: Server, prompt: list[int]) -> float:
    """Time until one token is there, which is the first."""
    start = time.perf_counter()
    server.complete(prompt, 1)
    return time.perf_counter() - start


def main() -> None:
    """Print medians and the ratio of pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="32/8 heads of 128, 4 layers")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--ratio", default="0.5")
    parser.add_argument("--quant", default="none", choices=FORMATS)
    parser.add_argument("--evict", default="none", choices=["none", "snapkv", "h2o"])
    parser.add_argument("--budget", default="512", help="--kv-evict-budget, with --evict")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    rng = random.Random(0)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = BUNDLED
        if options.large:
            model = make_llama(
                folder / "model", head_size=128, num_heads=32, num_kv_heads=8, num_layers=4
            )
        common = ["--dtype", options.dtype, "--no-enable-prefix-caching"]
        common += ["--max-model-len", "2048", "--max-num-batched-tokens", "2048"]
        plain = stack.enter_context(Server(model, common, folder / "plain.log"))
        flags = [*common, "--kv-channel-prune", options.ratio, "--kv-quant", options.quant]
        if options.evict != "none":
            flags += ["--kv-evict", options.evict, "--kv-evict-budget", options.budget]
        pruned = stack.enter_context(Server(model, flags, folder / "pruned.log"))
        times: list[tuple[float, float]] = []
        for pair in range(options.pairs + 3):
            prompt = [rng.randrange(4, 384) for _ in range(options.tokens)]
            with pruned.frozen():
                first = seconds_to_answer(plain, prompt)
            with plain.frozen():
                second = seconds_to_answer(pruned, prompt)
            if pair >= 3:  # the first ones warm up
                times.append((first, second))
    ratios = sorted(second / first for first, second in times)
    print(describe_machine())
    print(
        f"{options.tokens} tokens, {options.dtype}, {options.pairs} pairs: plain "
        f"{1e3 * statistics.median(a for a, _ in times):.1f} ms, pruned "
        f"{1e3 * statistics.median(b for _, b in times):.1f} ms, ratio of pairs: median "
        f"{statistics.median(ratios):.3f}, quartiles {ratios[len(ratios) // 4]:.3f} to "
        f"{ratios[3 * len(ratios) // 4]:.3f}"
    )


if __name__ == "__main__":
    main()
