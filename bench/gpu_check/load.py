"""The shape of an 8B model, random weights, many long requests at once, in one configuration.

The KV cache has the same bytes whatever is in it, so a format that takes less runs more requests.
All requests are sent at once. The engine runs in this process, with CUDA graphs for decoding but
without torch.compile, which would take most of the time of a check: compare configurations with
each other.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_check.engine import SHAPE_8B, make_llm, make_shape
from bench.gpu_check.machine import write_result
from bench.gpu_check.trace import Trace, summarize
from bench.support.repository import BUNDLED
from think_vllm.plan.formats import FORMATS

#: Ids that every model here has.
TOKENS = range(4, 384)
WARM_UP_REQUESTS = 2


def run(llm: Any, prompts: Sequence[list[int]], new_tokens: int, seconds: float) -> Trace:
    """Send all prompts at once and step the engine until it is done, or time is over.

    Args:
        llm: An engine in this process.
        prompts: Token ids.
        new_tokens: Of each answer.
        seconds: Most that it may take; what is left then is aborted.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    trace = Trace(time.perf_counter())
    left = {f"{index}-{trace.start}" for index in range(len(prompts))}
    for request, prompt in zip(sorted(left), prompts, strict=True):
        engine.add_request(request, {"prompt_token_ids": prompt}, params)
    scheduler = engine.engine_core.engine_core.scheduler
    while engine.has_unfinished_requests() and time.perf_counter() - trace.start < seconds:
        outputs = engine.step()
        now = time.perf_counter()
        trace.running.append((now, len(scheduler.running)))
        for output in outputs:
            trace.add(output.request_id, now, len(output.outputs[0].token_ids))
            if output.finished:
                left.discard(output.request_id)
    if left:
        engine.abort_request(sorted(left))
    return trace


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", choices=FORMATS, help="plain vLLM if left out")
    parser.add_argument("--ratio", type=float, default=0.5, help="of key channels, with --quant")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of plain vLLM")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=8000)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--kv-bytes", type=float, default=20 * 2**30)
    parser.add_argument("--seconds", type=float, default=40, help="of the measured run, at most")
    parser.add_argument("--bundled", action="store_true", help="the bundled model, as a rehearsal")
    parser.add_argument("--out", type=Path)
    return parser


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``LLM``."""
    sizes = [size for size in (1, 2, 4, *range(8, 257, 8)) if size <= max(8, options.requests)]
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    return {
        "max_model_len": options.prompt_tokens + options.new_tokens,
        "max_num_seqs": max(8, options.requests),
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": int(options.kv_bytes),
        "kv_cache_dtype": options.kv_cache_dtype,
        "enable_prefix_caching": False,
        "load_format": "auto" if options.bundled else "dummy",
        "compilation_config": {} if options.bundled else graphs,
        "enforce_eager": options.bundled,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if there is nothing to write."""
    options = make_parser().parse_args(arguments)
    think = {"kv_channel_prune": options.ratio, "kv_quant": options.quant} if options.quant else {}
    rng = random.Random(0)
    prompts = [rng.choices(TOKENS, k=options.prompt_tokens) for _ in range(options.requests)]
    with tempfile.TemporaryDirectory() as folder:
        model = BUNDLED if options.bundled else make_shape(Path(folder) / "8b", **SHAPE_8B)
        begun = time.perf_counter()
        llm = make_llm(model, think, **engine_arguments(options))
        run(llm, prompts[:WARM_UP_REQUESTS], min(16, options.new_tokens), math.inf)
        ready = time.perf_counter()
        trace = run(llm, prompts, options.new_tokens, options.seconds)
        figures = summarize(trace, time.perf_counter())
    figures["start_seconds"] = ready - begun
    complete = figures["output_tokens"] == options.requests * options.new_tokens
    title = f"{options.ratio:g} {options.quant}" if options.quant else (
        f"plain {'bf16' if options.kv_cache_dtype == 'auto' else options.kv_cache_dtype}"
    )  # fmt: skip
    print(title + ("" if complete else ", cut off"))
    for name, figure in figures.items():
        print(f"  {name}: {figure:.1f}")
    told = {name: str(value) for name, value in vars(options).items()}
    write_result(options.out, title=title, complete=complete, figures=figures, options=told)
    return 0 if figures["output_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
