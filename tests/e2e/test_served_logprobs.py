"""Served log-probabilities against a masked transformers model: the anchor of this project.

Tolerance 1e-4 for log-probabilities in float32: two implementations that sum in different
orders differ by some 1e-6 here; one wrong channel of one span shows as 1e-3 and more.
"""

import random
from collections.abc import Callable, Sequence

import pytest

from tests.conftest import REPOSITORY
from tests.support.reference import Pruning, Reference
from tests.support.server import Completion, Server

pytestmark = pytest.mark.e2e

TOLERANCE = 1e-4
CONFIG = REPOSITORY / "configs" / "think-0.5-dense-decode.yaml"
#: 0.5 at head size 128 in float32: 63 channels, 4 blocks of 48 tokens become 3.
HALF = Pruning(key_channels=63, span_tokens=192)
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16")
PRUNED = (*COMMON, "--kv-channel-prune", "0.5")


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random token ids; the model's vocabulary has 371 words behind 4 special ones."""
    rng = random.Random(seed)
    return [[rng.randrange(4, 371) for _ in range(length)] for length in lengths]


def worst(
    reference: Reference,
    requests: Sequence[list[int]],
    completions: Sequence[Completion],
    pruning: Pruning | None,
) -> dict[int, float]:
    """Largest difference of a log-probability, by prompt length."""
    differences = {}
    for prompt, completion in zip(requests, completions, strict=True):
        expected = reference.logprobs(prompt, completion.tokens, pruning)
        differences[len(prompt)] = max(
            abs(a - b) for a, b in zip(expected, completion.logprobs, strict=True)
        )
    return differences


def check(
    server: Server,
    reference: Reference,
    lengths: Sequence[int],
    max_tokens: Sequence[int],
    pruning: Pruning | None,
    together: bool = True,
) -> None:
    """Complete prompts of these lengths and compare every log-probability."""
    requests = prompts(lengths)
    if together:
        completions = server.complete_all(requests, max_tokens)
    else:
        completions = [
            server.complete(request, count)
            for request, count in zip(requests, max_tokens, strict=True)
        ]
    differences = worst(reference, requests, completions, pruning)
    assert max(differences.values()) < TOLERANCE, differences


class TestWholeChunks:
    """Prompts fit one chunk."""

    @pytest.fixture(scope="class")
    def server(self, serve: Callable[..., Server]) -> Server:
        return serve(*PRUNED, "--max-num-batched-tokens", "2048")

    def test_prompts_shorter_than_the_windows(
        self, server: Server, recall_reference: Reference
    ) -> None:
        lengths = [1, 2, 31, 32, 33, 50]
        check(server, recall_reference, lengths, [8] * len(lengths), HALF, together=False)

    def test_prompts_at_span_edges(self, server: Server, recall_reference: Reference) -> None:
        # A prompt of n spans plus the recent window is the first whose n-th span is thin.
        lengths = [191, 192, 193, 223, 224, 225, 415, 416, 417]
        check(server, recall_reference, lengths, [6] * len(lengths), HALF)

    def test_long_prompts(self, server: Server, recall_reference: Reference) -> None:
        check(server, recall_reference, [1000, 1777, 1999], [24] * 3, HALF)

    def test_decoded_spans(self, server: Server, recall_reference: Reference) -> None:
        # Short prompts choose channels long before their first span is full.
        check(server, recall_reference, [5, 40, 230, 400], [700, 520, 420, 410], HALF)

    def test_pruning_changes_the_answer(self, server: Server, recall_reference: Reference) -> None:
        # The comparison would notice if nothing were pruned, or too late.
        requests = prompts([1000])
        completions = server.complete_all(requests, [24])
        assert worst(recall_reference, requests, completions, None)[1000] > 10 * TOLERANCE


def test_small_chunks(serve: Callable[..., Server], recall_reference: Reference) -> None:
    # 64 tokens a step, shared by all: windows are cut in every place.
    server = serve(*PRUNED, "--max-num-batched-tokens", "64")
    lengths = [20, 64, 65, 90, 128, 130, 250, 300, 431, 700]
    check(server, recall_reference, lengths, [40] * len(lengths), HALF)
    check(server, recall_reference, lengths[::3], [20] * 4, HALF, together=False)


def test_preemption(serve: Callable[..., Server], recall_reference: Reference) -> None:
    # 2 layers x 2 heads x 48 tokens x 1 KiB a block: 44 blocks, less than the load needs.
    server = serve(*PRUNED, "--max-model-len", "2048", kv_cache_bytes=44 * 196_608)
    lengths = [500, 433, 610, 380, 420, 555, 300, 470]
    check(server, recall_reference, lengths, [500] * len(lengths), HALF)
    assert server.metric("vllm:num_preemptions_total") > 0


def test_dense_decode(serve: Callable[..., Server], recall_reference: Reference) -> None:
    server = serve(*COMMON, "--config", str(CONFIG))
    pruning = Pruning(key_channels=63, span_tokens=192, prune_decode=False)
    check(server, recall_reference, [40, 400, 900], [300] * 3, pruning)


def test_windows_and_compilation(serve: Callable[..., Server], recall_reference: Reference) -> None:
    # vLLM's default compilation, another ratio, other windows.
    server = serve(
        "--dtype",
        "float32",
        "--max-num-seqs",
        "16",
        "--kv-channel-prune",
        "0.4",
        "--kv-recent-window",
        "7",
        "--kv-observation-window",
        "100",
    )
    pruning = Pruning(key_channels=76, span_tokens=320, recent_window=7, observation_window=100)
    check(server, recall_reference, [60, 326, 327, 328, 1500], [330] * 5, pruning)


def test_ratio_that_prunes_nothing(
    serve: Callable[..., Server], recall_reference: Reference
) -> None:
    server = serve(*COMMON, "--kv-channel-prune", "0.005")
    check(server, recall_reference, [40, 900], [64] * 2, None)
    assert "prunes no channel of this model; pruning is off" in server.log_tail(10_000)
