"""Tables of results in Markdown."""

from collections.abc import Callable

from bench.tables.configurations import POLICIES, RATIOS, configurations
from bench.tables.figures import (
    DENSE,
    FIRST_POLICY,
    logprob_against,
    right_against,
    share_right,
    sign,
    within_a_point,
)
from bench.tables.questions import WAYS
from bench.tables.results import Results, Row
from think_vllm.tools.common.markdown import table
from think_vllm.tools.eval.stats import Estimate, estimate_text

TITLES = {
    "formats": "Formats",
    "values": "Value channels",
    "eviction": "Eviction",
    "prefixes": "Cached prefixes, and prompts pruned in chunks",
}


def difference(estimate: Estimate) -> str:
    """A difference with its interval; small ones of log-probabilities show in the interval too."""
    return estimate_text(estimate, "+", digits=4 if "bootstrap" in estimate.method else 3)


def claims(results: Results) -> str:
    """What the paper makes one expect, and whether it was seen here."""
    lines = []
    for policy in list(POLICIES)[1:]:
        by_right, by_logprob = _decisions(results, policy)
        if by_right:
            lines.append([f"think beats {policy}", _outcome(by_right), _outcome(by_logprob)])
    row = results.rows.get(f"{FIRST_POLICY} 0.4")
    if row is not None:
        right = right_against(row, WAYS[0], results.samples, DENSE).estimate
        answer = {True: "yes", False: "no", None: "neither shown"}[within_a_point(right)]
        logprob = difference(logprob_against(row, WAYS[0], DENSE))
        what = "0.4 loses less than a point to dense"
        lines.append([what, f"{answer}: {difference(right)}", logprob])
    return table(["expected", "share right", "log-probability"], lines)


def known_policies(results: Results) -> list[str]:
    """Those with rows."""
    found = {row.labels["policy"] for row in results.rows.values() if row.group == "channels"}
    return [policy for policy in POLICIES if policy in found]


def policies(results: Results) -> str:
    """Share right by ratio and policy, all sizes together."""
    return _by_policy(
        results, lambda row: estimate_text(share_right(row, WAYS[0], results.samples))
    )


def policies_logprob(results: Results) -> str:
    """Log-probability to dense by ratio and policy, all sizes together."""
    return _by_policy(results, lambda row: difference(logprob_against(row, WAYS[0], DENSE)))


def group_table(results: Results, group: str, way: str) -> str:
    """All rows of a group to dense, asked one way, all sizes together."""
    lines = [
        _line(name, row, way, results.samples)
        for name, row in results.rows.items()
        if row.group == group and way in row.figures
    ]
    header = ["configuration", "thin", "right", "to dense", "p", "log-probability to dense"]
    return table(header, lines)


def remarks(results: Results) -> str:
    """What was not run, and which rows are not of one code."""
    names = [configuration.name for configuration in configurations()]
    missing = [name for name in names if name not in results.rows and name not in results.skipped]
    lines = []
    if missing:
        listed = ", ".join(f"`{name}`" for name in missing)
        lines.append(f"- not asked yet, {len(missing)} of {len(names)}: {listed}")
    lines += [f"- not run: `{name}`: {reason}" for name, reason in results.skipped.items()]
    codes = sorted({row.code for row in results.rows.values()})
    if len(codes) > 1:
        lines.append(f"- rows are of several versions of the code: {', '.join(codes)}")
    return "\n".join(lines)


def _line(name: str, row: Row, way: str, samples: int) -> list[str]:
    right = right_against(row, way, samples, DENSE)
    thin = row.thin_share.values()
    return [
        name,
        f"{100 * sum(thin) / len(thin):.0f} %",
        estimate_text(share_right(row, way, samples)),
        difference(right.estimate),
        f"{right.p_value:.2g}",
        difference(logprob_against(row, way, DENSE)),
    ]


def _by_policy(results: Results, cell: Callable[[Row], str]) -> str:
    known = known_policies(results)
    lines = []
    for ratio in RATIOS:
        rows = [results.rows.get(f"{policy} {ratio:g}") for policy in known]
        if any(rows):
            lines.append([f"{ratio:g}", *("-" if row is None else cell(row) for row in rows)])
    return table(["ratio", *known], lines)


def _decisions(results: Results, policy: str) -> tuple[dict[float, int], dict[float, int]]:
    """By ratio: 1 where think is better, -1 where the other is, 0 where neither is shown."""
    by_right, by_logprob = {}, {}
    for ratio in RATIOS:
        first, other = f"{FIRST_POLICY} {ratio:g}", results.rows.get(f"{policy} {ratio:g}")
        if other is not None and first in other.figures[WAYS[0]].against:
            right = right_against(other, WAYS[0], results.samples, first)
            by_right[ratio] = -sign(right.estimate)
            by_logprob[ratio] = -sign(logprob_against(other, WAYS[0], first))
    return by_right, by_logprob


def _outcome(decisions: dict[float, int]) -> str:
    kinds = {1: "yes at", -1: "the other at", 0: "neither at"}
    parts = []
    for decision, kind in kinds.items():
        ratios = [f"{ratio:g}" for ratio, found in decisions.items() if found == decision]
        if ratios:
            parts.append(f"{kind} {', '.join(ratios)}")
    return "; ".join(parts)
