"""``think-vllm calibrate``: channel tables of a model, for ``--kv-select static``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from think_vllm import __version__
from think_vllm.errors import ThinkError
from think_vllm.tools.plan import positive_int

_DESCRIPTION = """
Run a model over prompts and rank the channels of its keys and values, per layer and KV head, by
ThinK's score averaged over the prompts. `--kv-select static --kv-channel-tables-file FILE` then
prunes every token with them, at any ratio. Take prompts like those of your users: what they do not
ask for is what goes. On a GPU if torch sees one.
"""


def calibrate(arguments: Sequence[str]) -> int:
    """Write the file; return the exit status.

    Raises:
        ThinkError: If the model or the prompts cannot be used.
    """
    options = _parser().parse_args(list(arguments))
    if (options.prompts is None) == (options.task is None):
        raise ThinkError(
            "calibrate: give either --prompts FILE, with text like that of your users, or --task "
            "NAME for questions of `think-vllm eval`"
        )
    if not options.out.parent.is_dir():
        raise ThinkError(f"calibrate: --out {options.out}: there is no such directory; make it")
    # Heavy, and not needed to explain the command line.
    from transformers import AutoTokenizer

    from think_vllm.hooks.model_support import check_static_model
    from think_vllm.plan.channel_tables import Calibration, ChannelTables, ModelShape
    from think_vllm.tools.calibrate.calibration import hash_prompts, score_prompts
    from think_vllm.tools.calibrate.prompts import read_prompts, task_prompts
    from think_vllm.tools.plan import read_model

    model_config = read_model("calibrate", options.model, options.dtype, options.trust_remote_code)
    check_static_model(model_config)
    num_tokens = min(options.prompt_tokens, model_config.max_model_len)
    tokenizer = AutoTokenizer.from_pretrained(
        options.model, trust_remote_code=options.trust_remote_code
    )

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer.encode(text)
        return tokens

    if options.task is not None:
        source = f"task {options.task}, seed {options.seed}"
        prompts = task_prompts(options.task, encode, options.num_prompts, num_tokens, options.seed)
    else:
        source = options.prompts.name
        prompts = read_prompts(options.prompts, encode, options.num_prompts, num_tokens)
    total = sum(map(len, prompts))
    print(f"calibrating over {len(prompts)} prompts, {total} tokens", file=sys.stderr)
    shape = ModelShape.of(model_config)
    keys, values = score_prompts(
        options.model,
        shape,
        prompts,
        str(model_config.dtype).removeprefix("torch."),
        options.observed_queries,
        options.trust_remote_code,
    ).rankings()
    tables = ChannelTables(
        model=options.model,
        shape=shape,
        calibration=Calibration(
            source=source,
            prompts=len(prompts),
            tokens=total,
            sha256=hash_prompts(prompts),
            observed_queries=options.observed_queries,
            think_vllm=__version__,
        ),
        key_channels=keys,
        value_channels=values,
    )
    tables.save(options.out)
    print(
        f"{options.out}: {shape.num_layers} layers, {shape.num_kv_heads} KV heads, "
        f"{shape.head_size} channels. Serve with\n  --kv-channel-prune 0.5 --kv-select static "
        f"--kv-channel-tables-file {options.out}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="think-vllm calibrate", description=_DESCRIPTION)
    add = parser.add_argument
    add("model", help="Model name or directory.")
    text = "Text, or JSON lines (.jsonl): strings, or objects with a prompt or a text."
    add("--prompts", type=Path, metavar="FILE", help=text)
    text = "Questions of a task of `think-vllm eval` instead."
    add("--task", metavar="NAME", help=text)
    text = "Of a task; that of `eval` is another. Default: 100."
    add("--seed", type=int, default=100, help=text)
    add("--num-prompts", type=positive_int, default=32, help="Default: 32.")
    text = "Tokens of a prompt at most. Default: 2048."
    add("--prompt-tokens", type=positive_int, default=2048, help=text)
    text = "Last queries of each prompt that count. Default: all, as all see pruned keys."
    add("--observed-queries", type=positive_int, metavar="N", help=text)
    add("--dtype", default="auto", help="As for `vllm serve`. Default: auto.")
    add("--trust-remote-code", action="store_true", help="As for `vllm serve`.")
    out = Path("channel-tables.json")
    add("--out", type=Path, default=out, metavar="FILE", help=f"Default: {out}.")
    return parser
