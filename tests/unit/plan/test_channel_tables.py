"""Files of channel tables: what is written is read, and what does not fit is rejected in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.static_tables import mask, random_tables
from think_vllm.errors import ThinkError
from think_vllm.plan.channel_tables import ChannelTables, load_tables, read_tables
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan, plan_static

RATIOS = {"kv_channel_prune": 0.5, "kv_value_prune": 0.25}


def config(**settings: Any) -> ThinkConfig:
    return ThinkConfig(kv_select="static", kv_channel_tables_file="t.json", **settings)


@pytest.fixture(scope="module")
def tables(recall_model: Path) -> ChannelTables:
    return random_tables(recall_model)


def save(tables: ChannelTables, path: Path, **changes: Any) -> str:
    """Write a file with some of its fields changed."""
    tables.save(path)
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))
    return str(path)


def test_tables_are_read_as_they_were_written(tables: ChannelTables, tmp_path: Path) -> None:
    tables.save(tmp_path / "tables.json")
    assert read_tables(str(tmp_path / "tables.json")) == tables
    assert load_tables(str(tmp_path / "tables.json"), tables.shape) == tables


def test_one_file_serves_every_ratio(tables: ChannelTables) -> None:
    for ratio, keys in ((0.3, 90), (0.5, 64), (0.8, 26)):
        plan = plan_static(config(kv_channel_prune=ratio), 128, 2)
        assert plan is not None
        kept = tables.kept_keys(1, plan)
        assert [len(head) for head in kept] == [keys] * tables.shape.num_kv_heads
        assert all(head == sorted(head) for head in kept)
        expected = mask(tables.key_channels, keys)[1]
        assert [head.nonzero()[:, 0].tolist() for head in expected] == kept
        # Values are not pruned.
        assert tables.kept_values(0, plan) == [list(range(128))] * tables.shape.num_kv_heads


def test_a_file_for_another_model_is_rejected(tables: ChannelTables, tmp_path: Path) -> None:
    path = save(tables, tmp_path / "tables.json")
    other = tables.shape.model_copy(update={"num_kv_heads": 8, "model_type": "qwen3"})
    with pytest.raises(ThinkError) as rejected:
        load_tables(path, other)
    message = str(rejected.value)
    assert f"--kv-channel-tables-file {path} was made for another model" in message
    assert "model_type is llama there and qwen3 here; num_kv_heads is 2 there and 8 here" in message
    assert "think-vllm calibrate MODEL" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no file of think-vllm channel tables, version 1: format: "),
        ({"version": 2}, "version: Input should be 1"),
        ({"key_channels": [[[0] * 128] * 2] * 2}, "layer 0, KV head 0 is no ranking of the"),
        ({"key_channels": [[list(range(128))] * 2]}, "its shape says 2 layers of 2 KV heads"),
        ({"value_channels": [[list(range(128))]] * 2}, "its shape says 2 layers of 2 KV heads"),
        ({"value_channels": []}, "value_channels has"),
        ({"value_channels": [[list(range(64))] * 2] * 2}, "channels 0 to 127"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_files_that_are_none_of_ours_are_rejected(tables, tmp_path, changes, message):
    path = save(tables, tmp_path / "tables.json", **changes)
    with pytest.raises(ThinkError) as rejected:
        load_tables(path, tables.shape)
    assert message in str(rejected.value)
    assert "think-vllm calibrate MODEL" in str(rejected.value)


def test_files_that_cannot_be_read_are_rejected(tables: ChannelTables, tmp_path: Path) -> None:
    with pytest.raises(ThinkError, match=r"No such file.*think-vllm calibrate MODEL"):
        load_tables(str(tmp_path / "missing.json"), tables.shape)
    (tmp_path / "text.json").write_text("no tables")
    with pytest.raises(ThinkError, match="is no file of think-vllm channel tables"):
        load_tables(str(tmp_path / "text.json"), tables.shape)


def test_a_file_that_changes_is_read_again(tables: ChannelTables, tmp_path: Path) -> None:
    path = save(tables, tmp_path / "tables.json")
    assert load_tables(path, tables.shape).model == tables.model
    save(tables, tmp_path / "tables.json", model="another name of it")
    assert load_tables(path, tables.shape).model == "another name of it"


def test_plan_static_counts_bytes() -> None:
    plan = plan_static(config(**RATIOS), 128, 2)
    assert plan == StaticPlan(config(**RATIOS), 128, 64, 96, 128, 2)
    assert (plan.dense_bytes_per_token_head, plan.bytes_per_token_head) == (512, 320)
    assert plan.capacity_multiple == pytest.approx(1.6)
    assert plan.layout.run_bytes == 128 * 320


def test_plan_static_counts_the_bytes_of_codes() -> None:
    plan = plan_static(config(kv_channel_prune=0.5, kv_quant="fp8"), 128, 2)
    assert plan is not None
    # 64 + 128 codes and two float32 scales.
    assert plan.bytes_per_token_head == 200
    assert plan.capacity_multiple == pytest.approx(2.56)


def test_plan_static_is_none_below_one_channel() -> None:
    assert plan_static(config(kv_channel_prune=0.005), 128, 2) is None


@pytest.mark.parametrize(
    ("head_size", "block_size", "message"),
    [(40, None, "head size is 40"), (128, 24, "--block-size is 24"), (512, None, "is 512")],
)
def test_plan_static_rejects_what_kernels_cannot_take(head_size, block_size, message):
    with pytest.raises(ThinkError, match=message):
        plan_static(config(kv_channel_prune=0.5), head_size, 2, block_size)
