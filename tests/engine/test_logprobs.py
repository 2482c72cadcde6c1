"""Log-probabilities against a masked transformers model; over HTTP: e2e/test_served_pruned.py."""

from dataclasses import replace

import pytest

from tests.conftest import REPOSITORY
from tests.engine.conftest import Load
from tests.support.checks import EAGER, FLOAT32, HALF, check_served, random_prompts
from tests.support.engine import Engine
from tests.support.metrics import steady_metrics
from tests.support.reference import Reference, Thinning

PRUNED = (*EAGER, "--kv-channel-prune", "0.5")


def test_value_channels(load: Load, recall_reference: Reference) -> None:
    # All key channels are kept, and 88 of 128 value channels: 7 blocks of 48 tokens become 6.
    # Chunks of 100 tokens cut observation windows.
    engine = load(*EAGER, "--kv-value-prune", "0.3", "--max-num-batched-tokens", "100")
    thinning = Thinning(key_channels=128, span_tokens=336, value_channels=88)
    lengths = [5, 40, 367, 368, 369, 510, 700, 1000]
    counts = [380, 340, 8, 8, 8, 220, 24, 24]
    check_served(engine, recall_reference, lengths, counts, thinning, others=[None])


def test_spans_with_channels_of_their_own(load: Load, recall_reference: Reference) -> None:
    tables = ("--kv-channel-tables", "span")
    engine = load(*PRUNED, *tables, "--max-num-batched-tokens", "100")
    thinning = replace(HALF, tables="span")
    lengths = [5, 40, 223, 224, 230, 416, 700, 1000]
    counts = [430, 390, 8, 8, 420, 30, 130, 24]
    engine.complete_all(random_prompts([3]), [2])  # the first choice brings the metric
    before = steady_metrics(engine)
    check_served(engine, recall_reference, lengths, counts, thinning, others=[HALF])
    # Two layers of two heads; prompts without a span choose once.
    spans = [max(1, thinning.old_tokens(length) // 192) for length in lengths]
    after = steady_metrics(engine)
    count = after.value("score_mass_kept_count") - before.value("score_mass_kept_count")
    assert count == sum(spans) * 2 * 2


def test_key_norm(load: Load, recall_reference: Reference) -> None:
    engine = load(*PRUNED, "--kv-select", "key-norm", "--max-num-batched-tokens", "512")
    thinning, counts = replace(HALF, select="key-norm"), [230, 210, 24, 24]
    lengths = [40, 224, 700, 1500]
    check_served(engine, recall_reference, lengths, counts, thinning, others=[HALF])


def test_small_chunks(load: Load, recall_reference: Reference) -> None:
    # 64 tokens a step, shared by all: windows are cut in every place.
    engine = load(*PRUNED, "--max-num-batched-tokens", "64")
    lengths = [20, 64, 65, 90, 128, 130, 250, 300, 431, 700]
    check_served(engine, recall_reference, lengths, [40] * len(lengths), HALF)
    check_served(engine, recall_reference, lengths[::3], [20] * 4, HALF, together=False)


class TestSmallPool:
    """A pool too small for the load: 43 blocks of 48 tokens, and the null block."""

    @pytest.fixture(scope="class")
    def engine(self, load: Load) -> Engine:
        # A block of this model: 2 layers x 2 heads x 48 tokens x 1 KiB in float32.
        return load(*PRUNED, "--max-model-len", "2048", kv_cache_bytes=44 * 196_608)

    def test_preempted_requests(self, engine: Engine, recall_reference: Reference) -> None:
        lengths = [500, 433, 610, 380, 420, 555, 300, 470]
        before = engine.metric("vllm:num_preemptions_total")
        check_served(engine, recall_reference, lengths, [500] * len(lengths), HALF)
        assert engine.metric("vllm:num_preemptions_total") > before

    def test_freed_blocks_admit_a_second_request(self, engine: Engine) -> None:
        # A prompt of 1,100 tokens takes 23 of the 43 blocks, so a second one has to wait for
        # the first to end, unless compaction frees 5 of them. With 150 more tokens two requests
        # take 42 blocks. One after the other, 4 requests take 4 * 150 steps; two at a time, half.
        steps = "vllm:iteration_tokens_total_count"
        before = engine.metric(steps)
        engine.complete_all(random_prompts([1100] * 4), [150] * 4)
        assert 2 * 150 - 1 <= engine.metric(steps) - before < 3 * 150


def test_preemption_with_small_chunks(load: Load, recall_reference: Reference) -> None:
    # Resumed requests recompute prompt and answer over many chunks, in which the end of the
    # prompt may lie anywhere; and in blocks of 64 tokens, which need no scratch blocks.
    arguments = ("--kv-channel-prune=0.4", "--block-size=64", "--max-num-batched-tokens=80")
    engine = load(*EAGER, *arguments, "--max-model-len", "2048", kv_cache_bytes=34 * 262_144)
    thinning = Thinning(key_channels=76, span_tokens=320)
    lengths = [500, 433, 610, 380, 420, 555, 300, 470]
    check_served(engine, recall_reference, lengths, [400] * len(lengths), thinning)
    assert engine.metric("vllm:num_preemptions_total") > 0


def test_dense_decode(load: Load, recall_reference: Reference) -> None:
    config = REPOSITORY / "configs" / "think-0.5-dense-decode.yaml"
    engine = load(*EAGER, "--config", str(config))
    thinning = Thinning(key_channels=63, span_tokens=192, prune_decode=False)
    check_served(engine, recall_reference, [40, 400, 900], [300] * 3, thinning)


def test_windows_and_compilation(load: Load, recall_reference: Reference) -> None:
    # vLLM's default compilation, another ratio, other windows.
    windows = ("--kv-recent-window", "7", "--kv-observation-window", "100")
    engine = load(*FLOAT32, "--kv-channel-prune", "0.4", *windows)
    # 0.4 at head size 128 in float32: 76 channels, 5 blocks of 32 tokens become 4.
    thinning = Thinning(key_channels=76, span_tokens=160, recent_window=7, observation_window=100)
    check_served(engine, recall_reference, [60, 166, 167, 168, 1500], [330] * 5, thinning)


def test_ratio_that_prunes_nothing(load: Load, recall_reference: Reference) -> None:
    engine = load(*EAGER, "--kv-channel-prune", "0.005")
    check_served(engine, recall_reference, [40, 900], [64] * 2, None)
    assert "prunes no channel of this model, and --kv-quant is none" in engine.log_tail(10_000)
    metrics = engine.metrics_text()
    assert "vllm:num_requests_running" in metrics
    assert "think_vllm" not in metrics
