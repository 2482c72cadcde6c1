"""Served log-probabilities against a masked transformers model: the anchor of this project.

Other settings, over the same engine without HTTP: tests/engine/test_logprobs.py.
"""

from collections.abc import Callable

import pytest

from tests.support.checks import (
    EAGER,
    HALF,
    TOLERANCE,
    check_served,
    random_prompts,
    worst_differences,
)
from tests.support.reference import Reference
from tests.support.server import Server

pytestmark = pytest.mark.e2e

PRUNED = (*EAGER, "--kv-channel-prune", "0.5")


class TestWholeChunks:
    """Prompts fit one chunk."""

    @pytest.fixture(scope="class")
    def server(self, serve: Callable[..., Server]) -> Server:
        return serve(*PRUNED, "--max-num-batched-tokens", "2048")

    def test_prompts_shorter_than_the_windows(
        self, server: Server, recall_reference: Reference
    ) -> None:
        lengths = [1, 2, 31, 32, 33, 50]
        check_served(server, recall_reference, lengths, [8] * len(lengths), HALF, together=False)

    def test_prompts_at_span_edges(self, server: Server, recall_reference: Reference) -> None:
        # A prompt of n spans plus the recent window is the first whose n-th span is thin.
        lengths = [191, 192, 193, 223, 224, 225, 415, 416, 417]
        check_served(server, recall_reference, lengths, [6] * len(lengths), HALF)

    def test_long_prompts(self, server: Server, recall_reference: Reference) -> None:
        check_served(server, recall_reference, [1000, 1777, 1999], [24] * 3, HALF)

    def test_decoded_spans(self, server: Server, recall_reference: Reference) -> None:
        # Short prompts choose channels long before their first span is full.
        check_served(server, recall_reference, [5, 40, 230, 400], [700, 520, 420, 410], HALF)

    def test_pruning_changes_the_answer(self, server: Server, recall_reference: Reference) -> None:
        # The comparison would notice if nothing were pruned, or too late.
        prompts = random_prompts([1000])
        completions = server.complete_all(prompts, [24])
        unpruned = worst_differences(recall_reference, prompts, completions, None)
        assert unpruned[1000] > 10 * TOLERANCE
