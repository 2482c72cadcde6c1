"""Flags of servers: how they are called, and which would make the comparison unfair."""

import shlex

import pytest

from think_vllm.errors import ThinkError
from think_vllm.tools.bench.configuration import DEFAULT_FLAGS, make_configurations, shared_flags


def test_make_configurations_begins_with_what_others_are_compared_with() -> None:
    configurations = make_configurations(DEFAULT_FLAGS, fp8_cache=True)
    ours = ["prune 0.5 + fp8", "prune 0.4 + kivi4", "prune 0.5 + k4v2"]
    assert [one.label for one in configurations] == ["plain", "fp8 cache", *ours]
    assert [one.kind for one in configurations] == ["plain", "fp8 cache", "thin", "thin", "thin"]
    assert configurations[0].flags == ()
    split = [tuple(shlex.split(flags)) for flags in DEFAULT_FLAGS]
    assert [one.flags for one in configurations[2:]] == split


def test_make_configurations_without_plain() -> None:
    [one] = make_configurations(["--kv-quant=k4v2"], plain=False)
    assert (one.label, one.kind) == ("k4v2", "thin")


@pytest.mark.parametrize(
    ("text", "label", "kind"),
    [
        ("--kv_channel_prune 0.4", "prune 0.4", "thin"),
        ("--kv-quant fp8 --kv-recent-window 64", "fp8 --kv-recent-window 64", "thin"),
        ("--block-size 32", "--block-size 32", "other"),
        ("--kv-cache-dtype fp8", "--kv-cache-dtype fp8", "other"),
    ],
)
def test_make_configurations_labels(text: str, label: str, kind: str) -> None:
    [one] = make_configurations([text], plain=False)
    assert (one.label, one.kind) == (label, kind)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["--kv-quant fp8", "--kv-quant  fp8"], "'fp8' is given twice"),
        (["kv-quant fp8"], "holds no flags; write them in quotes"),
        ([""], "holds no flags"),
        (["--kv-quant 'fp8"], "No closing quotation"),
        (["--kv-quant fp8 --port 80"], "--port is chosen here"),
        (["--kv-quant fp8 --max_num_seqs=3"], "--max-num-seqs has to be the same for all"),
        (["--kv-cache-memory-bytes 3"], "use --kv-cache-memory-bytes SIZE"),
        (["--dtype float16"], 'use --server-args "--dtype TYPE"'),
    ],
)
def test_make_configurations_rejects(texts: list[str], message: str) -> None:
    with pytest.raises(ThinkError, match=message):
        make_configurations(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--kv-channel-prune 0.5", "would hold for plain vLLM too; give it in --config"),
        ("--kv_cache_dtype=fp8", "would hold for plain vLLM too"),
        ("--max-num-seqs 4", "is an option of its own here; use --max-num-seqs N"),
        ("--host 0.0.0.0", "--host is chosen here"),
    ],
)
def test_shared_flags_rejects(text: str, message: str) -> None:
    with pytest.raises(ThinkError, match=message):
        shared_flags(text)


def test_shared_flags_are_split() -> None:
    assert shared_flags("--enforce-eager --dtype bfloat16")[1:] == ("--dtype", "bfloat16")
