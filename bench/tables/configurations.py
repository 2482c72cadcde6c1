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
#: What is compared with kvpress: ratios of channels, budgets of tokens, and both.
COMPARED_RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8)
COMPARED_BUDGETS = (128, 256, 512)
COMPARED_BOTH = ((256, 0.4), (256, 0.6))

#: Blocks are planned for the shortest prompts, whose spans are short: most of a prompt is thin.
PLANNED = {"kv_plan_context": 512}


@dataclass(frozen=True)
class Configuration:
    """One engine.

    Args:
        name: Unique; ``dense`` and ``float32: dense`` are what others are compared with.
        group: The table it belongs to.
        settings: Of ``ThinkConfig``; none for an engine without thin blocks.
        ways: How it is asked.
        dtype: Of the model.
        labels: What the tables say of it.
    """

    name: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = WAYS[:1]
    dtype: str = "bfloat16"
    labels: Mapping[str, Any] = field(default_factory=dict)


def configurations() -> Iterator[Configuration]:
    """All of them; those that others are compared with come first."""
    yield Configuration("dense", "dense", ways=WAYS)
    yield from _channels()
    for format_ in FORMATS:
        for ratio in FORMAT_RATIOS:
            settings = {**_pruned(ratio), "kv_quant": format_, **PLANNED}
            labels = {"format": format_, "ratio": ratio}
            yield Configuration(_name(format_, ratio), "formats", settings, labels=labels)
    for ratio in VALUE_RATIOS:
        settings = {"kv_value_prune": ratio, **PLANNED}
        yield Configuration(f"values {ratio:g}", "values", settings, labels={"ratio": ratio})
    for method in METHODS:
        for budget in BUDGETS:
            for ratio in EVICTION_RATIOS:
                yield _eviction(method, budget, ratio)
    yield from _compared()


def _channels() -> Iterator[Configuration]:
    for ratio in RATIOS:
        for policy, chosen in POLICIES.items():
            # Static blocks hold every token thin, so there is nothing to plan.
            planned = {} if policy == "static" else PLANNED
            settings = {**_pruned(ratio), **chosen, **planned}
            labels = {"policy": policy, "ratio": ratio}
            yield Configuration(f"{policy} {ratio:g}", "channels", settings, labels=labels)


def _eviction(method: str, budget: int, ratio: float) -> Configuration:
    evict = {"kv_evict": method, "kv_evict_budget": budget}
    return Configuration(
        _name(f"{method} {budget}", ratio),
        "eviction",
        {**_pruned(ratio), **evict, **PLANNED},
        WAYS,
        labels={"method": method, "budget": budget, "ratio": ratio},
    )


def _compared() -> Iterator[Configuration]:
    """In float32, so that other code rounds as little as ours does."""
    cases = [
        (0.0, None),
        *((ratio, None) for ratio in COMPARED_RATIOS),
        *((0.0, budget) for budget in COMPARED_BUDGETS),
        *((ratio, budget) for budget, ratio in COMPARED_BOTH),
    ]
    for ratio, budget in cases:
        settings = _pruned(ratio)
        if budget is not None:
            settings |= {"kv_evict": "snapkv", "kv_evict_budget": budget}
        name = compared_name(ratio, budget)
        if settings:
            # kvpress compresses a prompt once, and nothing of what follows.
            settings |= {"kv_prune_decode": False, **PLANNED}
        # What channels do to an answer hardly depends on the way it is asked.
        ways = WAYS[:1] if ratio and budget is None else WAYS
        labels = {"ratio": ratio, "budget": budget}
        yield Configuration(name, "float32", settings, ways, "float32", labels)


def compared_name(ratio: float, budget: int | None) -> str:
    """Name of a configuration that is compared with kvpress."""
    what = _name("" if budget is None else f"snapkv {budget}", ratio)
    return f"float32: {what or 'dense'}"


def _pruned(ratio: float) -> dict[str, Any]:
    return {"kv_channel_prune": ratio} if ratio else {}


def _name(first: str, ratio: float) -> str:
    return " + ".join(part for part in (first, f"{ratio:g}" if ratio else "") if part)
