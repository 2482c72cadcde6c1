"""Shares of score mass, and how they are counted and handed out."""

import pytest
import torch

from think_vllm.metrics.catalog import SHARE_EDGES
from think_vllm.metrics.rank import MAX_WAITING, begin_report, rank_report, take_report
from think_vllm.metrics.shares import ShareHistogram, kept_shares

CPU = torch.device("cpu")


def buckets(values: list[float]) -> tuple[list[int], list[float]]:
    """What a histogram has to say of these values."""
    below = [-1.0, *SHARE_EDGES[:-1]]
    members = [
        [value for value in values if low < value <= high]
        for low, high in zip(below, SHARE_EDGES, strict=True)
    ]
    return [len(each) for each in members], [sum(each) for each in members]


def test_kept_shares_are_those_of_the_papers_scores() -> None:
    # Norms of queries and keys: 1, 2, 3 and 4 times 2, so scores of 2, 4, 6 and 8.
    query = torch.tensor([[[1.0, 4.0, 9.0, 16.0]]])
    key = torch.full((1, 1, 4), 4.0)
    channels = torch.tensor([[[1, 3]]], dtype=torch.uint8)
    assert kept_shares(query * key, channels).item() == pytest.approx(12 / 20, abs=1e-15)
    # A sum over the window stands for the mean.
    assert kept_shares(32 * query * key, channels).item() == pytest.approx(12 / 20, abs=1e-15)


def test_kept_shares_of_zeros_and_of_no_numbers() -> None:
    energy = torch.zeros(2, 1, 4)
    channels = torch.tensor([[[0, 1]]], dtype=torch.uint8).expand(2, 1, 2)
    energy[1, 0, 3] = float("nan")
    first, second = kept_shares(energy, channels).flatten().tolist()
    assert first == 1
    assert second != second


def test_share_histogram_hands_out_what_came_since() -> None:
    histogram = ShareHistogram(CPU)
    assert histogram.take() is None
    rng = torch.Generator().manual_seed(0)
    for count in (5, 300):
        values = torch.rand(count, generator=rng, dtype=torch.float64)
        values[0], values[1] = 1.0, SHARE_EDGES[2]  # an edge belongs to the bucket below it
        histogram.add(values.view(count, 1))
        taken = histogram.take()
        assert taken is not None
        counts, sums = buckets(values.tolist())
        assert taken[0] == counts
        assert taken[1] == pytest.approx(sums, abs=1e-9)
        assert histogram.take() is None


def test_share_histogram_of_a_gpu_hands_out_copies_that_are_complete(monkeypatch):
    class Event:
        """Of a stream that has done nothing yet."""

        done = False

        def record(self) -> None:
            Event.done = False

        def query(self) -> bool:
            return Event.done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    histogram = ShareHistogram(CPU)

    def take() -> int | None:
        taken = histogram._take_copied()
        return None if taken is None else int(sum(taken[0]))

    assert take() is None
    histogram.add(torch.full((3,), 0.5, dtype=torch.float64))
    assert take() is None  # begins a copy
    histogram.add(torch.full((4,), 0.6, dtype=torch.float64))
    assert take() is None  # waits for it, without waiting
    Event.done = True
    assert take() == 3  # and begins the next one
    assert take() is None
    Event.done = True
    assert take() == 4
    assert take() is None


def test_share_histogram_leaves_out_what_is_no_number() -> None:
    histogram = ShareHistogram(CPU)
    histogram.add(torch.tensor([float("nan"), float("inf")], dtype=torch.float64))
    assert histogram.take() is None
    histogram.add(torch.tensor([float("nan"), 0.5], dtype=torch.float64))
    counts, sums = buckets([0.5])
    assert histogram.take() == [counts, sums]


def test_rank_report_is_taken_once() -> None:
    begin_report()
    assert take_report() is None
    rank_report().add_seconds(0.25)
    rank_report().add_seconds(0.5)
    chosen = torch.zeros(4, 2, 1, dtype=torch.uint8)
    energy = torch.ones(4, 2, 4)
    energy[3, :, 0] = 81  # scores of 9, 1, 1 and 1
    for rows in (slice(0, 3), slice(3, 4)):
        rank_report().add_selection(energy[rows], chosen[rows])
    counts, sums = buckets([0.25] * 6 + [0.75] * 2)
    report = {"counters": {"compaction_seconds": 0.75}, "shares": [counts, sums]}
    assert take_report() == report
    assert take_report() is None
    rank_report().add_seconds(0.5)
    begin_report()
    assert take_report() is None


def test_rank_report_that_nobody_takes_stays_small() -> None:
    begin_report()
    energy, channels = torch.ones(1, 2, 4), torch.zeros(1, 2, 1, dtype=torch.uint8)
    for _ in range(3 * MAX_WAITING + 1):
        rank_report().add_selection(energy, channels)
    assert len(rank_report()._waiting) == 1
    report = take_report()
    assert report is not None
    assert sum(report["shares"][0]) == 2 * (3 * MAX_WAITING + 1)
