"""``think-vllm plan`` says what the engine does: the same words, and numbers that its specs have.

Engines are configured, not started. What vLLM then counts from the specs of all layers is its own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.utils import get_pp_indices
from vllm.logger import configure_logging_if_needed
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from tests.support.models import make_config
from tests.support.static_tables import random_tables
from think_vllm.errors import ThinkError
from think_vllm.hooks.command_line import errors_raised
from think_vllm.hooks.engine import find_engine, remember_plan
from think_vllm.hooks.model_support import attention_layers
from think_vllm.hooks.static_engine import remember_static
from think_vllm.hooks.static_spec import customize_static_spec
from think_vllm.metrics.catalog import CAPACITY
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.summary import COUNTED_DENSE
from think_vllm.scheduler.report import engine_report
from think_vllm.tools.doctor.probe import parse_engine_args
from think_vllm.tools.plan import parse_options, plan_report

MEMORY_BYTES = 2**30
FULL, WINDOW = "full_attention", "sliding_attention"

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
}
#: No ``head_dim`` in these families: hidden size / heads.
TWO_HEADS = {"hidden_size": 256, "head_dim": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
#: Architecture, model type, and settings that differ from ``SHAPE``.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {}),
    "llama-mha": ("LlamaForCausalLM", "llama", {"num_key_value_heads": 4, "head_dim": 96}),
    "llama-mqa": ("LlamaForCausalLM", "llama", {"num_key_value_heads": 1, "head_dim": 256}),
    "llama-float32": ("LlamaForCausalLM", "llama", {"dtype": "float32", "head_dim": 128}),
    "mistral": ("MistralForCausalLM", "mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", TWO_HEADS),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {"head_dim": 128}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "phi3": ("Phi3ForCausalLM", "phi3", TWO_HEADS),
    "gemma": ("GemmaForCausalLM", "gemma", {"head_dim": 256}),
    "granite": ("GraniteForCausalLM", "granite", TWO_HEADS),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", {"sliding_window": 100}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        {
            "num_hidden_layers": 5,
            "layer_types": [WINDOW, WINDOW, FULL, WINDOW, FULL],
            "sliding_window": 64,
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "layer_types": [WINDOW, FULL] * 2,
            "sliding_window": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
KEYS = ["--kv-channel-prune", "0.5"]
#: What a plan depends on.
FLAGS: dict[str, list[str]] = {
    "keys": KEYS,
    "values": ["--kv-value-prune", "0.3"],
    "both": [*KEYS, "--kv-value-prune", "0.3"],
    "fp8": ["--kv-quant", "fp8"],
    "k4v2": [*KEYS, "--kv-quant", "k4v2"],
    "kivi4": ["--kv-quant", "kivi4", "--kv-quant-group", "64"],
    "kivi2": ["--kv-quant", "kivi2", "--kv-recent-window", "100"],
    "observation": [*KEYS, "--kv-observation-window", "7", "--kv-recent-window", "0"],
    "key-norm": [*KEYS, "--kv-select", "key-norm"],
    "random": [*KEYS, "--kv-value-prune", "0.5", "--kv-select", "random"],
    "span-tables": [*KEYS, "--kv-channel-tables", "span"],
    "no-decode": [*KEYS, "--no-kv-prune-decode"],
    "prefill": [*KEYS, "--kv-prune-prefill"],
    "dense-prefixes": [*KEYS, "--kv-prefix-cache", "dense"],
    "no-prefixes": [*KEYS, "--no-enable-prefix-caching"],
    "snapkv": ["--kv-evict", "snapkv"],
    "snapkv-keys": [*KEYS, "--kv-evict", "snapkv", "--kv-evict-budget", "700"],
    "h2o": ["--kv-quant", "fp8", "--kv-evict", "h2o"],
    "max-loss": [*KEYS, "--kv-prune-max-loss", "0.2"],
    "plan-context": [*KEYS, "--kv-quant", "kivi4", "--kv-plan-context", "512"],
    "block-size": [*KEYS, "--block-size", "32"],
    "float32": [*KEYS, "--dtype", "float32"],
    "never-thin": [*KEYS, "--kv-recent-window", "2040", "--max-model-len", "2048"],
    "never-evicted": ["--kv-evict", "snapkv", "--kv-evict-budget", "4000"],
    "tensor-parallel": [*KEYS, "--tensor-parallel-size", "2"],
    "pipeline-parallel": [*KEYS, "--pipeline-parallel-size", "2"],
}
STATIC_FLAGS: dict[str, list[str]] = {
    "keys": KEYS,
    "both": [*KEYS, "--kv-value-prune", "0.25", "--no-enable-prefix-caching"],
    "fp8": ["--kv-quant", "fp8", "--kv-channel-prune", "0.25", "--block-size", "64"],
    "ranks": [*KEYS, "--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"],
}


pytestmark = pytest.mark.usefixtures("inspect_here")


def make_family(path: Path, name: str) -> Path:
    architecture, model_type, settings = FAMILIES[name]
    given = {k: v for k, v in {**SHAPE, **settings}.items() if k != "head_dim" or v is not None}
    return make_config(path, model_type, architectures=[architecture], **given)


@dataclass(frozen=True)
class Configured:
    """An engine that was configured, and not started."""

    config: VllmConfig  # its own
    info: list[str]  # what think-vllm logged of its plan
    warnings: list[str]  # what it warned of


def configure(model: Path, arguments: Sequence[str]) -> Configured:
    """Go as far as an engine does before it starts its workers."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    engine_args = parse_engine_args(str(model), [*arguments, "--enforce-eager"])
    # Else the first engine does, and takes our handler away.
    configure_logging_if_needed(engine_args.create_logging_config())
    logger = logging.getLogger("vllm.think_vllm")
    logger.addHandler(handler)
    try:
        with errors_raised():
            config = engine_args.create_engine_config()
    except ValidationError as error:
        [cause] = error.errors()
        raise cause["ctx"]["error"] from None
    finally:
        logger.removeHandler(handler)
    said = [(x.levelno, x.getMessage().removeprefix("think-vllm: ")) for x in records]
    return Configured(
        config,
        info=[text for level, text in said if level == logging.INFO],
        warnings=[text for level, text in said if level == logging.WARNING],
    )


def rank_specs(config: VllmConfig, full: FullAttentionSpec) -> list[dict[str, KVCacheSpec]]:
    """Specs of every rank's layers, of which ``full`` is that of a full one."""
    model, parallel = config.model_config, config.parallel_config
    stages, count = parallel.pipeline_parallel_size, model.get_total_num_hidden_layers()
    ranks = []
    config.cache_config.kv_cache_layout = "LBHNC"  # as all workers resolve it
    for stage in range(stages):
        layers = attention_layers(model, get_pp_indices(count, stage, stages))
        specs: dict[str, KVCacheSpec] = {f"{stage}.full.{i}": full for i in range(layers.full)}
        for i in range(layers.window):
            specs[f"{stage}.window.{i}"] = SlidingWindowSpec(
                block_size=full.block_size,
                num_kv_heads=full.num_kv_heads,
                head_size=full.head_size,
                dtype=full.dtype,
                sliding_window=layers.window_tokens,
            )
        ranks += [specs] * parallel.tensor_parallel_size
    return ranks


def plan_beside(configured: Configured, model: Path, flags: list[str]) -> dict[str, Any]:
    """Plan for requests of the longest length, compare the words, and return the fields."""
    longest = str(configured.config.model_config.max_model_len)
    budget = ["--memory", str(MEMORY_BYTES), "--context-length", longest]
    fields, lines = plan_report(*parse_options([str(model), *flags, *budget]))
    assert fields.get("warnings", []) == configured.warnings
    warned = [line for line in lines if line.startswith("warning: ")]
    assert warned == [f"warning: {text}" for text in configured.warnings]
    said = [line for line in configured.info if line != COUNTED_DENSE and "is off" not in line]
    own = ("warning: ", f"{MEMORY_BYTES / 2**30:.2f} GiB of KV cache")
    assert said == [
        line for line in lines if not line.startswith(own) and "were asked for" not in line
    ]
    return fields


def dense_spec(config: VllmConfig) -> FullAttentionSpec:
    """What vLLM makes for a full-attention layer."""
    model = config.model_config
    return FullAttentionSpec(
        block_size=config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=model.dtype,
    )


def check_thin(model: Path, flags: list[str]) -> None:
    from think_vllm.hooks.kv_cache_spec import customize_spec

    configured = configure(model, flags)
    config = configured.config
    fields = plan_beside(configured, model, flags)
    with set_current_vllm_config(config):
        remember_plan(config)
    spec = customize_spec(dense_spec(config))
    rule = spec.rule
    names = ("block_size", "span_blocks", "thin_blocks", "span_tokens", "recent_window")
    names += ("prune_decode", "prune_prefill")
    assert {name: getattr(rule, name) for name in names} == {name: fields[name] for name in names}
    assert spec.block_size == fields["block_size"]
    runs = fields["num_kv_heads"] * fields["block_size"]
    assert spec.page_size_bytes == runs * fields["dense_bytes_per_token_head"]
    evicts, selects = fields["evict"] != "none", fields["select"] is not None
    observed = fields["observation_window"] if selects or evicts else 0
    assert spec.observation_window == observed
    assert spec.limits_loss == (fields["max_loss"] is not None)
    kept = None if rule.budget_spans is None else rule.budget_spans * rule.span_tokens
    assert fields["evict_budget"] == kept
    assert rule.delay_prompt == (not spec.thin_prefixes and not rule.prune_prefill)
    cached = {True: "thin", False: "dense"}[spec.thin_prefixes]
    caching = config.cache_config.enable_prefix_caching
    assert fields["prefix_cache"] == (cached if caching else None)
    # What vLLM makes of its memory, and shows on /metrics.
    ranks = rank_specs(config, spec)
    pools = make_pools(config, ranks)
    assert {pool.num_blocks - 1 for pool in pools} == {fields["num_blocks"]}
    assert len(ranks) == fields["num_ranks"]
    assert capacity(config, pools[0]) == {
        "dense": fields["plain_tokens"],
        "planned": fields["thin_tokens"],
    }


def make_pools(config: VllmConfig, ranks: list[dict[str, KVCacheSpec]]) -> list[Any]:
    """The caches that vLLM makes of its memory for the specs of all ranks."""
    arguments = [config, ranks, [MEMORY_BYTES] * len(ranks)]
    if hasattr(core, "get_global_kv_cache_groups"):  # from 0.33 on, a step of its own
        arguments.append(core.get_global_kv_cache_groups(config, ranks))
    pools: list[Any] = core.get_kv_cache_configs(*arguments)
    return pools


def capacity(config: VllmConfig, pool: Any) -> dict[str, float]:
    """The gauge of an engine with these blocks."""
    from think_vllm.scheduler.manager import ThinKVCacheManager

    managers = []
    for group in pool.kv_cache_groups:
        manager = object.__new__(ThinKVCacheManager)
        manager.kv_cache_spec = group.kv_cache_spec
        if not isinstance(group.kv_cache_spec, SlidingWindowSpec):
            manager.rule = group.kv_cache_spec.rule
            manager.counts = SimpleNamespace(spans=0, blocks=0, hit_tokens=0)
            managers.append(manager)
    coordinator = SimpleNamespace(single_type_managers=managers)
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(coordinator=coordinator),
        vllm_config=config,
        kv_cache_config=pool,
        running=[],
    )
    report = engine_report(scheduler)
    assert report is not None
    taken = report.take(None)
    assert taken is not None
    found: dict[str, float] = taken["gauges"][CAPACITY]
    return found


@pytest.mark.parametrize("name", FLAGS)
def test_plan_is_the_engines_for_every_flag(recall_model: Path, name: str) -> None:
    check_thin(recall_model, FLAGS[name])


@pytest.mark.parametrize(
    "name",
    ["keys", "kivi4", "prefill", "no-prefixes", "snapkv", "h2o", "max-loss", "pipeline-parallel"],
)
def test_plan_is_the_engines_beside_sliding_windows(tmp_path: Path, name: str) -> None:
    check_thin(make_family(tmp_path, "gemma3"), FLAGS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_is_the_engines_for_every_family(tmp_path: Path, name: str) -> None:
    check_thin(make_family(tmp_path, name), [*KEYS, "--kv-quant", "fp8", "--kv-evict", "snapkv"])


@pytest.mark.parametrize("name", STATIC_FLAGS)
def test_plan_is_the_engines_for_static_channels(recall_model, tmp_path, name):
    file = tmp_path / "tables.json"
    random_tables(recall_model).save(file)
    select = ["--kv-select", "static", "--kv-channel-tables-file", str(file)]
    flags = [*STATIC_FLAGS[name], *select]
    configured = configure(recall_model, flags)
    config = configured.config
    fields = plan_beside(configured, recall_model, flags)
    with set_current_vllm_config(config):
        remember_static(config)
    spec = customize_static_spec(dense_spec(config))
    assert spec.block_size == fields["block_size"]
    runs = fields["num_kv_heads"] * fields["block_size"]
    assert spec.page_size_bytes == runs * fields["thin_bytes_per_token_head"]
    ranks = rank_specs(config, spec)
    pools = make_pools(config, ranks)
    assert {pool.num_blocks - 1 for pool in pools} == {fields["num_blocks"]}


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ["--kv-channel-prune", "0.05"]),
        ("llama", [*KEYS, "--block-size", "40"]),
        ("llama", [*KEYS, "--kv-cache-dtype", "fp8"]),
        ("llama", ["--kv-quant", "kivi4", "--kv-quant-group", "128"]),
        ("llama", ["--kv-evict", "h2o", "--kv-evict-budget", "9"]),
        ("llama", [*KEYS, "--kv-prune-max-loss", "0.1", "-tp", "2"]),
        ("llama", [*KEYS, "--kv-prune-max-loss", "0.1", "-pp", "2"]),
        ("llama", [*KEYS, "--kv-select", "static", "--kv-channel-tables-file", "none.json"]),
        ("gemma2", [*KEYS, "--kv-select", "static", "--kv-channel-tables-file", "none.json"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-2:]),
)
def test_plan_rejects_what_the_engine_does(tmp_path: Path, family: str, flags: list[str]) -> None:
    model = make_family(tmp_path, family)
    with pytest.raises(ThinkError) as planned:
        plan_report(*parse_options([str(model), *flags]))
    with pytest.raises(ThinkError) as configured:
        configure(model, flags)
    assert str(planned.value) == str(configured.value)


def test_plan_rejects_what_leaves_the_engine_as_it_is(recall_model: Path) -> None:
    flags = ["--kv-channel-prune", "0.001"]
    with pytest.raises(ThinkError, match="prunes no channel at head size 128, and --kv-quant is"):
        plan_report(*parse_options([str(recall_model), *flags]))
    configured = configure(recall_model, flags)
    (line,) = configured.info
    assert "--kv-channel-prune 0.001 prunes no channel of this model" in line
    engine = find_engine(configured.config)
    assert engine is not None
    assert (engine.summary(True), engine.fields(True)) == ([], None)


def test_flags_that_change_a_plan_are_all_compared() -> None:
    compared = {flag for flags in [*FLAGS.values(), *STATIC_FLAGS.values()] for flag in flags}
    # Given with all static ones.
    compared |= {"--kv-select", "--kv-channel-tables-file"}
    settings = {name.replace("_", "-") for name in ThinkConfig.model_fields}
    assert {name for name in settings if not {f"--{name}", f"--no-{name}"} & compared} == set()
