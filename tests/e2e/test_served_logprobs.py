"""Served log-probabilities against a masked transformers model: the anchor of this project.

Other settings, over the same engine without HTTP: tests/engine/test_logprobs.py.
"""

import pytest

from tests.e2e.conftest import Serve
from tests.support.checks import EAGER, HALF, check_served
from tests.support.server import Server

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    # Prompts fit one chunk.
    return serve(*EAGER, "--kv-channel-prune", "0.5", "--max-num-batched-tokens", "2048")


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        # A prompt of n spans plus the recent window is the first whose n-th span is thin.
        ([191, 192, 193, 223, 224, 225, 415, 416, 417], [6] * 9),
        # Short prompts choose channels long before their first span is full.
        ([5, 40, 230, 400], [700, 520, 420, 410]),
        ([1777, 1999, 1000], [24] * 3),
    ],
    ids=["span edges", "decoded spans", "long"],
)
def test_logprobs_equal_the_reference(server, recall_reference, lengths, counts):
    # The comparison would notice if nothing were pruned, or too late.
    others = [None] if lengths[-1] == 1000 else []
    check_served(server, recall_reference, lengths, counts, HALF, others=others)


def test_prompts_shorter_than_the_windows(server, recall_reference):
    lengths = [1, 2, 31, 32, 33, 50]
    check_served(server, recall_reference, lengths, [8] * len(lengths), HALF, together=False)
