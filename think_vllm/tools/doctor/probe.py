"""Generate with one engine in a process of its own: ``python -m <this module> JOB``.

``JOB`` is a JSON file with the fields of `ProbeJob`. Two engines do not fit one GPU at a time, and
a process that has ended holds no memory.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from think_vllm.tools.eval.recall import RECORD_TOKENS, recall_prompt

#: Of all words of a drawn prompt, those in records; the rest is filler.
RECORDS_SHARE = 0.5
MAX_RECORDS = 96


class ProbeJob(BaseModel):
    """One generation."""

    arguments: list[str]  # of `vllm serve`, without the model
    model: str  # name or directory
    dense: bool  # leave the flags for thin blocks out
    text: Path | None = None  # file to cut prompts from, or None to draw recall prompts
    prompts: list[list[int]] | None = None  # token ids, or None to make them
    num_prompts: int  # how many to make
    prompt_tokens: int  # longest prompt to make
    new_tokens: int  # tokens to generate for each prompt
    #: Tokens to follow for each prompt, or None to generate greedily.
    forced: list[list[int]] | None = None
    out: Path  # file for the result


class ProbeResult(BaseModel):
    """Results; one entry a prompt, and in it one a token."""

    prompts: list[list[int]]  # token ids of the prompts
    tokens: list[list[int]]  # generated, or followed
    logprobs: list[list[float]]  # of the tokens
    likeliest: list[list[int]]  # the token that would have been chosen
    cached_tokens: list[int] = []  # of each prompt, found in the prefix cache


def make_prompts(job: ProbeJob, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Prompts of at most ``job.prompt_tokens`` tokens.

    Args:
        job: How many, how long, and from which text.
        encode: The model's tokenizer, special tokens included.

    Raises:
        ValueError: If the text is too short for one prompt.
    """
    if job.text is not None:
        tokens = encode(job.text.read_text(encoding="utf-8"))
        starts = range(0, len(tokens) - job.prompt_tokens + 1, job.prompt_tokens)
        prompts = [tokens[start : start + job.prompt_tokens] for start in starts]
        if not prompts:
            raise ValueError(
                f"{job.text}: {len(tokens)} tokens are less than one prompt of {job.prompt_tokens}"
            )
        return prompts[: job.num_prompts]
    rng = random.Random(0)
    return [_recall_prompt(rng, job.prompt_tokens, encode) for _ in range(job.num_prompts)]


def _recall_prompt(
    rng: random.Random, num_tokens: int, encode: Callable[[str], list[int]]
) -> list[int]:
    """The longest of a few tries that fits: other tokenizers make more of a word than one token."""
    words = num_tokens
    while True:
        records = max(1, min(MAX_RECORDS, int(RECORDS_SHARE * words) // RECORD_TOKENS))
        sample = recall_prompt(rng, words, records)
        tokens = encode(sample.prompt)
        if len(tokens) <= num_tokens:
            return tokens
        words = min(words - 1, words * num_tokens // len(tokens))


def run(job: ProbeJob) -> ProbeResult:
    """Start an engine, generate, return the results."""
    from vllm import LLM, SamplingParams

    from think_vllm.tools.doctor.forced import FORCED_TOKENS, ForcedTokens

    engine_args = parse_engine_args(job.model, job.arguments)
    if job.dense:
        engine_args.additional_config.pop("think", None)
    engine_args.logits_processors = [ForcedTokens]
    llm = LLM.from_engine_args(engine_args)
    prompts = job.prompts or make_prompts(job, llm.get_tokenizer().encode)
    forced: Sequence[list[int] | None] = job.forced or [None] * len(prompts)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=job.new_tokens,
            ignore_eos=True,
            logprobs=1,
            extra_args=None if tokens is None else {FORCED_TOKENS: tokens},
        )
        for tokens in forced
    ]
    requests = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    outputs = [request.outputs[0] for request in requests]
    steps = [list(zip(output.token_ids, output.logprobs or [], strict=True)) for output in outputs]
    return ProbeResult(
        prompts=prompts,
        tokens=[list(output.token_ids) for output in outputs],
        logprobs=[[step[token].logprob for token, step in answer] for answer in steps],
        likeliest=[
            [max(step, key=lambda token: step[token].logprob) for _, step in answer]
            for answer in steps
        ],
        cached_tokens=[request.num_cached_tokens or 0 for request in requests],
    )


def parse_engine_args(model: str, arguments: Sequence[str]) -> Any:
    """Make ``EngineArgs`` of vLLM from the arguments of a server.

    Raises:
        SystemExit: If vLLM's parser does not take them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from think_vllm.hooks.config_file import split_config

    # The parser of AsyncEngineArgs is the one that plugins are loaded for.
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="think-vllm doctor MODEL"))
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *split_config(arguments)]))


def main() -> None:
    """Run the job of the command line."""
    job = ProbeJob.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job.out.write_text(json.dumps(run(job).model_dump()), encoding="utf-8")


if __name__ == "__main__":
    main()
