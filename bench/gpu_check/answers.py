"""The bundled model served in every format, model runner and mode: are its answers right?

Each case is an engine in a process of its own; several run at a time. It answers the same prompts
twice, the second time from the prefix cache, and goes on for a few hundred tokens, so that spans
fill while it decodes. A case is bad if too few answers are right or if it compiles a kernel of ours
while it answers.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_check.engine import make_llm
from bench.gpu_check.jit import counted_compilations
from bench.gpu_check.machine import write_result
from bench.support.repository import BUNDLED, REPOSITORY
from think_vllm.tools.eval.recall import RecallSample, recall_prompt

PROMPTS = 48
PROMPT_TOKENS = 1200
RECORDS = 64
NEW_TOKENS = 300
#: The bundled model answers some prompts wrong, pruned or not.
LEAST_RIGHT = 0.95
#: Mark of the line that has a case's result.
RESULT = "RESULT "


@dataclass(frozen=True)
class Case:
    """One way to serve."""

    think: dict[str, Any] = field(default_factory=dict)  # our settings; empty for plain vLLM
    runner: int | None = None  # model runner, 1 or 2; None for vLLM's choice
    arguments: dict[str, Any] = field(default_factory=dict)  # of ``LLM``


def pruned(quant: str, **more: Any) -> dict[str, Any]:
    """Settings: half of the key channels pruned."""
    return {"kv_channel_prune": 0.5, "kv_quant": quant, **more}


CASES = {
    "plain": Case(),
    "none": Case(pruned("none")),
    "k4v2": Case(pruned("k4v2")),
    "fp8": Case(pruned("fp8")),
    "kivi4": Case(pruned("kivi4")),
    "kivi2": Case(pruned("kivi2")),
    "k4v2, runner 1": Case(pruned("k4v2"), runner=1),
    "none, runner 1, eager": Case(pruned("none"), 1, {"enforce_eager": True}),
    "k4v2, eager": Case(pruned("k4v2"), None, {"enforce_eager": True}),
    "k4v2, chunks": Case(pruned("k4v2"), None, {"max_num_batched_tokens": 256}),
    "none, dense prefixes": Case(pruned("none", kv_prefix_cache="dense")),
}


def make_samples(count: int) -> list[RecallSample]:
    """Prompts with known answers, the same every time."""
    rng = random.Random(0)
    return [recall_prompt(rng, PROMPT_TOKENS, RECORDS) for _ in range(count)]


def run_case(case: Case, count: int, new_tokens: int) -> dict[str, Any]:
    """Serve one case in this process."""
    from vllm import SamplingParams

    # Several engines share the GPU, so none may take what is free.
    settings: dict[str, Any] = {
        "max_model_len": 2048,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 4096,
        "kv_cache_memory_bytes": 256 * 2**20,
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": True,
    }
    start = time.perf_counter()
    llm = make_llm(BUNDLED, case.think, case.runner, **settings | case.arguments)
    started = time.perf_counter() - start
    samples = make_samples(count)
    encode = llm.get_tokenizer().encode
    prompts = [{"prompt_token_ids": encode(sample.prompt)} for sample in samples]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    turns = []
    with counted_compilations() as compiled:
        for _ in range(2):
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers = zip(samples, outputs, strict=True)
            turns.append({
                "right": sum(s.is_answered_by(o.outputs[0].text) for s, o in answers),
                "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
                "seconds": round(time.perf_counter() - start, 2),
            })  # fmt: skip
    return {
        "prompts": count,
        "start_seconds": round(started, 1),
        "turns": turns,
        "compilations": dict(compiled),
    }


def faults_of(result: dict[str, Any]) -> list[str]:
    """What is wrong with the result of a case."""
    if "error" in result:
        return [result["error"]]
    faults = []
    for number, turn in enumerate(result["turns"], 1):
        if turn["right"] < LEAST_RIGHT * result["prompts"]:
            faults.append(f"turn {number}: {turn['right']} of {result['prompts']} right")
    if not result["turns"][-1]["cached_tokens"]:
        faults.append("no prefix hits")
    ours = [name for name in result["compilations"] if name.startswith("csrc_triton")]
    if ours:
        faults.append(f"compiled while serving: {', '.join(ours)}")
    return faults


def run_apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a case in a process of its own; an error is part of the result."""
    command = [sys.executable, "-m", "bench.gpu_check.answers", "--case", name]
    command += ["--prompts", str(options.prompts), "--new-tokens", str(options.new_tokens)]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True,
            timeout=options.limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {options.limit:g} s"}
    return read_result(done.stdout, done.stdout[-2000:] + done.stderr[-4000:])


def read_result(printed: str, log: str) -> dict[str, Any]:
    """The result among what a case printed; without one, the end of its log."""
    for line in reversed(printed.splitlines()):
        if line.startswith(RESULT):
            result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return result
    lines = [line for line in log.splitlines() if "Error" in line] or log.splitlines()[-5:]
    return {"error": " / ".join(lines[-3:]) or "no output", "log": log}


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="run this one here, and print its result")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--together", type=int, default=6, help="engines at a time")
    parser.add_argument("--limit", type=float, default=75, help="seconds for a case")
    parser.add_argument("--out", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases; 1 if one is bad."""
    options = make_parser().parse_args(arguments)
    if options.case:
        result = run_case(CASES[options.case], options.prompts, options.new_tokens)
        print(RESULT + json.dumps(result), flush=True)
        return 0
    results: dict[str, dict[str, Any]] = {}
    bad = 0
    with ThreadPoolExecutor(options.together) as pool:
        running = {pool.submit(run_apart, name, options): name for name in options.cases}
        for done in as_completed(running):
            name, result = running[done], done.result()
            faults = faults_of(result)
            results[name] = result | {"faults": faults}
            bad += bool(faults)
            rights = "/".join(str(turn["right"]) for turn in result.get("turns", []))
            print(f"{name}: {'; '.join(faults) or f'{rights} right'}", flush=True)
            write_result(options.out, cases=results)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
