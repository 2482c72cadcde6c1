"""The list of configurations: settings of ``ThinkConfig``, and how each is asked.

A row whose settings the installed version does not know is skipped, with a remark.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.tables.questions import WAYS

#: Written before the first engine that reads it, by `think-vllm calibrate`.
CALIBRATED = "bench/out/channel-tables.json"

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: What chooses channels, and the settings that ask for it.
POLICIES: dict[str, dict[str, Any]] = {
    "think": {},
    "span": {"kv_channel_tables": "span"},
    "static": {"kv_select": "static", "kv_channel_tables_file": CALIBRATED},
    "key-norm": {"kv_select": "key-norm"},
    "random": {"kv_select": "random"},
}
FORMATS = ("fp8", "kivi4", "k4v2", "kivi2")
FORMAT_RATIOS = (0.0, 0.4, 0.5)
METHODS = ("snapkv", "h2o")
BUDGETS = (128, 256, 512, 1024)
EVICTION_RATIOS = (0.0, 0.4)
VALUE_RATIOS = (0.3, 0.5, 0.7)
#: Formats and ratios whose prefixes are hit, or whose prompts are pruned chunk by chunk.
PREFIX_FORMATS = (("none", 0.5), ("kivi4", 0.4), ("k4v2", 0.5))
CHUNKS = (512, 256)

#: Blocks are planned for the shortest prompts, whose spans are short: most of a prompt is thin.
PLANNED = {"kv_plan_context": 512}


@dataclass(frozen=True)
class Configuration:
    """One engine."""

    name: str  # unique; ``dense`` is what others are compared with
    group: str  # the table it belongs to
    #: Of ``ThinkConfig``; none for an engine without thin blocks.
    settings: Mapping[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = WAYS[:1]  # how it is asked
    labels: Mapping[str, Any] = field(default_factory=dict)  # what the tables of channels say of it
    arguments: tuple[str, ...] = ()  # further ones of the engine
    #: Whether each prompt follows one of the same text that asks for another record, so that it
    #: finds a prefix whose channels that one has chosen.
    hits: bool = False


def configurations() -> Iterator[Configuration]:
    """All of them; those that others are compared with come first."""
    yield Configuration("dense", "dense", ways=WAYS)
    yield from _channels()
    for format_ in FORMATS:
        for ratio in FORMAT_RATIOS:
            settings = {**_pruned(ratio), "kv_quant": format_, **PLANNED}
            yield Configuration(_name(format_, ratio), "formats", settings)
    for ratio in VALUE_RATIOS:
        settings = {"kv_value_prune": ratio, **PLANNED}
        yield Configuration(f"values {ratio:g}", "values", settings)
    for method in METHODS:
        for budget in BUDGETS:
            for ratio in EVICTION_RATIOS:
                evict = {"kv_evict": method, "kv_evict_budget": budget}
                settings = {**_pruned(ratio), **evict, **PLANNED}
                name = _name(f"{method} {budget}", ratio)
                yield Configuration(name, "eviction", settings, WAYS)
    yield from _prefixes()


def _channels() -> Iterator[Configuration]:
    for ratio in RATIOS:
        for policy, chosen in POLICIES.items():
            # Static blocks hold every token thin, so there is nothing to plan.
            planned = {} if policy == "static" else PLANNED
            settings = {**_pruned(ratio), **chosen, **planned}
            labels = {"policy": policy, "ratio": ratio}
            yield Configuration(f"{policy} {ratio:g}", "channels", settings, labels=labels)


def _prefixes() -> Iterator[Configuration]:
    for format_, ratio in PREFIX_FORMATS:
        settings = {**_pruned(ratio), "kv_quant": format_, **PLANNED}
        name = _name("" if format_ == "none" else format_, ratio)
        for mode in ("thin", "dense"):
            cached = {**settings, "kv_prefix_cache": mode}
            yield Configuration(f"{name}, {mode} prefix", "prefixes", cached, hits=True)
        for tokens in CHUNKS:
            # Chunks are one prompt's own only if no other shares the step.
            alone = ("--max-num-batched-tokens", str(tokens), "--max-num-seqs", "1")
            yield Configuration(
                f"{name}, chunks of {tokens}",
                "prefixes",
                {**settings, "kv_prune_prefill": True},
                arguments=alone,
            )


def _pruned(ratio: float) -> dict[str, Any]:
    return {"kv_channel_prune": ratio} if ratio else {}


def _name(first: str, ratio: float) -> str:
    return " + ".join(part for part in (first, f"{ratio:g}" if ratio else "") if part)
