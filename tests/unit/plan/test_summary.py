"""What a person and a program are told about a plan."""

import json

import pytest

from tests.support.plans import make_plan
from think_vllm.plan.summary import context_hint, never_thin, plan_fields, plan_summary

KEYS = "key channels 63 of 128 (pruned: 0.508, requested 0.5)"
VALUES = "key channels all 128, value channels 88 of 128 (pruned: 0.312, requested 0.3)"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kv_channel_prune": 0.5}, f"{KEYS}; keys and values as computed"),
        (
            {"kv_quant": "kivi4", "kv_quant_group": 64},
            "key channels all 128; keys and values 4-bit in groups of 64 (kivi4)",
        ),
        (
            {"kv_channel_prune": 0.5, "kv_quant": "k4v2"},
            "key channels 64 of 128 (pruned: 0.500, requested 0.5); keys 4-bit, values 2-bit in "
            "groups of 32 (k4v2)",
        ),
        (
            {"kv_channel_prune": 0.5, "kv_value_prune": 0.5},
            f"{KEYS}, value channels 64 of 128 (pruned: 0.500, requested 0.5); keys and values as "
            "computed",
        ),
        (
            {"kv_channel_prune": 0.5, "kv_select": "key-norm", "kv_channel_tables": "span"},
            f"{KEYS} by key-norm for each span; keys and values as computed",
        ),
        (
            {"kv_value_prune": 0.3, "kv_quant": "fp8", "kv_select": "random"},
            f"{VALUES} by random; keys and values fp8",
        ),
    ],
)
def test_plan_summary_says_what_is_kept_and_how(settings: dict[str, object], expected: str) -> None:
    assert plan_summary(make_plan(**settings), True)[0] == expected


def test_plan_summary_says_what_it_is_worth() -> None:
    line = plan_summary(make_plan(kv_channel_prune=0.5, kv_quant="k4v2"), True)[2]
    # 2 x 8,192 bytes / 176 tokens; keys (3,584 + 64) / 88, values 4,224 / 88
    assert line == (
        "bytes per token and KV head: 512 dense, 93.1 thin (keys 41.5, values 48.0, waste 3.9 %): "
        "x5.500; whole requests x4.35 at 2k, x5.16 at 8k, x5.41 at 32k tokens; "
        "planned for 8192"
    )


@pytest.mark.parametrize(
    ("settings", "caching", "expected"),
    [
        ({}, True, "decoded spans compacted too, prefixes cached thin)"),
        ({"kv_prefix_cache": "dense"}, True, "compacted too, prefixes cached as dense copies)"),
        ({}, False, "decoded spans compacted too)"),
        ({"kv_prefix_cache": "dense"}, False, "compacted too)"),
        ({"kv_prune_prefill": True}, False, "at the end of every chunk of a prompt)"),
    ],
)
def test_plan_summary_speaks_of_prefixes_where_they_are_cached(settings, caching, expected):
    plan = make_plan(kv_channel_prune=0.5, **settings)
    assert plan_summary(plan, caching)[1].endswith(expected)
    cached = settings.get("kv_prefix_cache", "thin") if caching else None
    assert plan_fields(plan, caching)["prefix_cache"] == cached


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_channel_prune": 0.5}, "32 recent tokens (--kv-recent-window)"),
        ({"kv_channel_prune": 0.5, "kv_recent_window": 4096}, "4096 recent tokens"),
        ({"kv_channel_prune": 0.5, "kv_prune_decode": False}, "shrink once"),
        ({"kv_quant": "kivi2", "kv_prune_prefill": True}, "shrink once"),
        ({"kv_evict": "snapkv", "kv_evict_budget": 2048}, "are kept (--kv-evict-budget)"),
        ({"kv_evict": "h2o", "kv_channel_prune": 0.5}, "shrink once"),
    ],
)
def test_never_thin_is_said_up_to_the_last_length_that_saves_nothing(settings, named):
    plan = make_plan(**settings)
    least = plan.rule.shortest_saving
    assert never_thin(plan, least) == []
    (line,) = never_thin(plan, least - 1)
    assert line.startswith(f"nothing is saved: no request of up to {least - 1} tokens")
    assert named in line
    assert f"must have {least} tokens" in line


def test_context_hint_is_given_where_it_pays() -> None:
    plan = make_plan(kv_channel_prune=0.5, kv_quant="k4v2")
    assert context_hint(plan, 1024) == [
        "--kv-plan-context 1024 would make it x3.90 instead of x3.60 for requests of 1024 tokens"
    ]
    assert context_hint(plan, 8192) == []
    assert context_hint(make_plan(kv_channel_prune=0.5), 1024) == []
    # Shorter than anything that can be asked for.
    assert context_hint(plan, 100) == []


@pytest.mark.parametrize(
    ("settings", "group"),
    [
        ({"kv_quant": "fp8", "kv_channel_prune": 0.5}, None),
        ({"kv_quant": "kivi2"}, 32),
        ({"kv_quant": "kivi2", "kv_quant_group": 128}, 128),
        ({"kv_value_prune": 0.5}, None),
    ],
)
def test_plan_fields_are_json_and_name_a_group_where_there_is_one(settings, group):
    fields = json.loads(json.dumps(plan_fields(make_plan(**settings), True)))
    assert fields["kv_quant"] == settings.get("kv_quant", "none")
    assert fields["kv_quant_group"] == group
    parts = fields["key_bytes_per_token_head"] + fields["value_bytes_per_token_head"]
    assert parts == pytest.approx((1 - fields["waste"]) * fields["thin_bytes_per_token_head"])
    assert fields["effective_multiple_2k"] < fields["effective_multiple_32k"]


def test_summary_says_that_requests_may_stay_dense() -> None:
    plan = make_plan(kv_channel_prune=0.5, kv_prune_max_loss=0.2)
    assert plan.rule.delay_prompt
    (line,) = [line for line in plan_summary(plan, True) if "stay dense:" in line]
    assert "more than 0.2 of the scores" in line
    assert plan_fields(plan, True)["max_loss"] == 0.2
    # Where rounding leaves every key channel, there is nothing to decide.
    for settings in (
        {"kv_channel_prune": 0.5},
        {"kv_channel_prune": 0.001, "kv_quant": "fp8", "kv_prune_max_loss": 0.2},
    ):
        assert not make_plan(**settings).limits_loss
        assert plan_fields(make_plan(**settings), True)["max_loss"] is None
