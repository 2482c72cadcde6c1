"""Figures of rows, with intervals: shares, log-probabilities, and differences of both."""

from bench.tables.results import Against, Answers, Figures, Results, Row
from think_vllm.tools.eval.stats import Difference, Estimate, estimate_difference, estimate_mean

DENSE = "dense"
FIRST_POLICY = "think"
#: Of all bootstraps.
SEED = 0
#: A loss of this much is one answer in a hundred.
POINT = 0.01


def count(results: Results) -> None:
    """Fill in the figures of all rows that have answers.

    Each is compared with the dense row, and a policy with ThinK's choice at its ratio.
    """
    for name, row in results.rows.items():
        others = {DENSE}
        if row.group == "channels":
            others.add(f"{FIRST_POLICY} {row.labels['ratio']:g}")
        for way, cells in row.answers.items():
            figures = Figures(right={size: cell.right.count("1") for size, cell in cells.items()})
            for other in sorted(others - {name}):
                if other in results.rows and way in results.rows[other].answers:
                    theirs = results.rows[other].answers[way]
                    figures.against[other] = _compare(cells, theirs)
            row.figures[way] = figures


def _compare(ours: dict[int, Answers], theirs: dict[int, Answers]) -> Against:
    pairs = [(ours[size], theirs[size]) for size in ours]
    right = [marks for one, two in pairs for marks in zip(one.right, two.right, strict=True)]
    logprob = estimate_difference(
        [value for _, two in pairs for value in two.logprobs],
        [value for one, _ in pairs for value in one.logprobs],
        binary=False,
        seed=SEED,
    )
    if logprob is None:
        raise ValueError("compare: the rows have no questions in common")
    found = logprob.estimate
    better, worse = right.count(("1", "0")), right.count(("0", "1"))
    return Against(better, worse, found.value, found.low, found.high)


def share_right(row: Row, way: str, samples: int, size: int | None = None) -> Estimate:
    """Share answered right, with Wilson's interval."""
    counts = row.figures[way].right
    sizes = list(counts) if size is None else [size]
    right, total = sum(counts[one] for one in sizes), samples * len(sizes)
    estimate = estimate_mean([1.0] * right + [0.0] * (total - right), binary=True, seed=SEED)
    assert estimate is not None  # something was asked
    return estimate


def right_against(row: Row, way: str, samples: int, other: str) -> Difference:
    """Difference of shares to another row, from what was counted of both."""
    figures = row.figures[way]
    better, worse, *_ = figures.against[other]
    both = sum(figures.right.values()) - better
    neither = samples * len(figures.right) - both - better - worse
    ours = [1.0] * both + [1.0] * better + [0.0] * (worse + neither)
    theirs = [1.0] * both + [0.0] * better + [1.0] * worse + [0.0] * neither
    found = estimate_difference(theirs, ours, binary=True, seed=SEED)
    assert found is not None
    return found


def logprob_against(row: Row, way: str, other: str) -> Estimate:
    """Difference of log-probabilities to another row."""
    *_, value, low, high = row.figures[way].against[other]
    return Estimate(value, low, high, "paired bootstrap")


def sign(estimate: Estimate) -> int:
    """1 or -1 where a difference's whole interval is on one side of zero, 0 where it is not."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def within_a_point(difference: Estimate) -> bool | None:
    """Whether a loss of more than a point is ruled out; None where neither is shown."""
    if difference.low is None or difference.high is None:
        return None
    if difference.low >= -POINT:
        return True
    return False if difference.high < -POINT else None
