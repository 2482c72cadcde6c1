"""``think-vllm plan``: the block plan of a model, without starting anything."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.hooks.engine import plan_engine
from think_vllm.hooks.flags import declare_flags, take_flags
from think_vllm.hooks.model_support import AttentionLayers, attention_layers
from think_vllm.plan.capacity import PoolShape, pool_capacity, static_capacity
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.planner import BlockPlan, pruned_channels
from think_vllm.plan.settings import ThinkConfig, prune_flags
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.plan.summary import budget_text, context_hint, never_thin

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def plan(arguments: Sequence[str]) -> int:
    """Print a plan.

    Raises:
        ThinkError: If the model or the settings cannot be served with thin blocks.
    """
    namespace, config = parse_options(arguments)
    fields, lines = plan_report(namespace, config)
    if namespace.json:
        print(json.dumps({"model": namespace.model, **fields}, indent=2))
    else:
        print("\n  ".join([namespace.model, *lines]))
    return 0


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, ThinkConfig]:
    """Read the command's options; what asks for thin blocks comes apart.

    Raises:
        ThinkError: If a setting is wrong, or means nothing beside the others.
        SystemExit: If argparse does not take the options.
    """
    parser = _parser()
    namespace = parser.parse_args(list(arguments))
    settings = take_flags(namespace)
    config = parse_config(settings)
    if not settings:
        parser.error(
            "--kv-channel-prune RATIO, --kv-quant FORMAT or --kv-evict METHOD is needed (or "
            "--kv-value-prune RATIO)"
        )
    return namespace, config


def plan_report(
    namespace: argparse.Namespace, config: ThinkConfig
) -> tuple[dict[str, Any], list[str]]:
    """Plan as an engine would: fields for programs, and lines for people.

    Raises:
        ThinkError: If the model or the settings cannot be served with thin blocks.
    """
    model_config, ranks = _engine_shape(namespace)
    engine = plan_engine(
        config,
        model_config,
        namespace.block_size,
        cache_dtype=namespace.kv_cache_dtype,
        parallel=ranks[0],
    )
    blocks = engine.static or engine.plan
    if blocks is None:
        raise ThinkError(
            f"{prune_flags(config)} prunes no channel at head size "
            f"{model_config.get_head_size()}, and --kv-quant is none; nothing to plan. Give a "
            "larger ratio, or --kv-quant FORMAT"
        )
    # Every rank gets as many blocks as the one with most layers has room for.
    stages = [model_config.get_layers_start_end_indices(rank) for rank in ranks]
    share = max(
        (attention_layers(model_config, stage) for stage in stages), key=engine.layers.block_layers
    )
    prefix_caching = namespace.enable_prefix_caching and config.allows_prefix_caching
    fields = (engine.fields(prefix_caching) or {}) | budget_fields(
        blocks,
        model_config.get_num_kv_heads(ranks[0]),
        engine.layers,
        namespace.memory,
        namespace.context_length,
        share,
    )
    fields["num_ranks"] = ranks[0].world_size
    lines = [*engine.summary(prefix_caching), budget_text(fields)]
    if engine.plan is not None:
        fields["warnings"] = never_thin(engine.plan, model_config.max_model_len)
        lines += _unfitting(engine.plan)
        lines += [f"warning: {line}" for line in fields["warnings"]]
        lines += context_hint(engine.plan, namespace.context_length, namespace.block_size)
    return fields, lines


def budget_fields(
    plan: BlockPlan | StaticPlan,
    num_kv_heads: int,
    layers: AttentionLayers,
    memory_bytes: int,
    context_len: int,
    share: AttentionLayers | None = None,
) -> dict[str, Any]:
    """What fits into a memory budget, against plain vLLM with the same block size.

    Args:
        plan: The plan.
        num_kv_heads: KV heads of a layer on one rank.
        layers: Attention layers of the model by kind.
        memory_bytes: Memory of the KV cache on one rank.
        context_len: Tokens of a request.
        share: Layers of that rank; None for all.
    """
    share = share or layers
    runs = num_kv_heads * layers.block_layers(share)

    def fitting(run_bytes: int) -> int:
        return max(0, memory_bytes // (run_bytes * runs) - 1)  # block 0 is vLLM's null block

    blocks = fitting(plan.layout.run_bytes)
    if isinstance(plan, StaticPlan):
        plain_blocks = fitting(plan.dense_bytes_per_token_head * plan.block_size)
        capacity = static_capacity(plan, plain_blocks, blocks, context_len)
    else:
        _, full_groups, window_groups = layers.groups
        pool = PoolShape(blocks, full_groups, window_groups, layers.window_tokens)
        capacity = pool_capacity(plan, pool, context_len)
    return {
        "num_kv_heads": num_kv_heads,
        "num_layers": share.full + share.window,
        "num_window_layers": share.window,
        "memory_bytes": memory_bytes,
        "num_blocks": blocks,
        "context_length": context_len,
        "plain_tokens": capacity.plain_tokens,
        "thin_tokens": capacity.thin_tokens,
        "plain_requests": capacity.plain_requests,
        "thin_requests": capacity.thin_requests,
        "effective_multiple": capacity.multiple,
    }


def parse_bytes(text: str) -> int:
    """Read a size such as ``8GiB``, ``100M`` or ``123456``.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 8GiB, 500MB or bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def positive_int(text: str) -> int:
    """Read a whole number above zero.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="think-vllm plan", description="The block plan of a model."
    )
    add = parser.add_argument
    count: dict[str, Any] = {"type": positive_int}
    add("model", help="Model name or directory.")
    add("--dtype", default="auto", help="As for `vllm serve`. Default: auto.")
    add("--block-size", **count, help="Tokens of a block. Default: the best.")
    text = "Ranks that share the heads. Default: 1."
    add("--tensor-parallel-size", "-tp", default=1, **count, help=text)
    text = "Stages that share the layers. Default: 1."
    add("--pipeline-parallel-size", "-pp", default=1, **count, help=text)
    text = "KV cache of a rank. Default: 8GiB."
    add("--memory", type=parse_bytes, default=8 * 2**30, help=text)
    add("--context-length", default=8192, **count, help="Tokens of a request. Default: 8192.")
    add("--kv-cache-dtype", default="auto", help="As for `vllm serve`.")
    text = "Tokens of the longest request. Default: the model's."
    add("--max-model-len", **count, help=text)
    yes_or_no = argparse.BooleanOptionalAction
    add("--enable-prefix-caching", action=yes_or_no, default=True, help="As for `vllm serve`.")
    add("--trust-remote-code", action="store_true", help="As for `vllm serve`.")
    add("--json", action="store_true", help="Print JSON.")
    declare_flags(parser)
    return parser


def read_model(who: str, model: str, dtype: str, trust_remote_code: bool, **others: Any) -> Any:
    """Let vLLM read a model's config; ``others`` are further arguments of an engine.

    Raises:
        ThinkError: If it cannot.
    """
    from vllm.engine.arg_utils import EngineArgs

    try:
        return EngineArgs(
            model=model, dtype=dtype, trust_remote_code=trust_remote_code, **others
        ).create_model_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ThinkError(f"{who}: cannot read the model {model!r}: {reason}") from None


def _engine_shape(namespace: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Let vLLM read the model's config, as it would for a server.

    Returns:
        That config, and the parallel config of the first rank of each pipeline stage.
    """
    from vllm.config import ParallelConfig

    model_config = read_model(
        "plan",
        namespace.model,
        namespace.dtype,
        namespace.trust_remote_code,
        max_model_len=namespace.max_model_len,
    )
    try:
        ranks = [
            ParallelConfig(
                tensor_parallel_size=namespace.tensor_parallel_size,
                pipeline_parallel_size=namespace.pipeline_parallel_size,
                rank=stage * namespace.tensor_parallel_size,
                # Left to choose one, vLLM rejects more ranks than this machine has GPUs.
                distributed_executor_backend="mp",
            )
            for stage in range(namespace.pipeline_parallel_size)
        ]
        model_config.verify_with_parallel_config(ranks[0])
    except (NotImplementedError, ValueError) as error:
        raise ThinkError(f"plan: vLLM cannot split {namespace.model!r}: {error}") from None
    return model_config, ranks


def _unfitting(plan: BlockPlan) -> list[str]:
    """Lines on channels that were asked for and do not fit."""
    lines = []
    for kind, ratio, kept in (
        ("", plan.requested_ratio, plan.key_channels),
        ("value ", plan.config.kv_value_prune, plan.value_channels),
    ):
        wanted = plan.head_size - pruned_channels(ratio, plan.head_size)
        if kept != wanted:
            lines.append(
                f"{wanted} {kind}channels were asked for; blocks are whole, and {kept} is the "
                "most that fits"
            )
    return lines
