"""Tables of results in Markdown."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from bench.tables.configurations import POLICIES, RATIOS, configurations
from bench.tables.figures import compare, share_right, sign, within_a_point
from bench.tables.questions import WAYS
from bench.tables.results import Results, Row
from think_vllm.tools.eval.stats import Difference, Estimate

DENSE = "dense"
FIRST_POLICY = next(iter(POLICIES))
TITLES = {
    "channels": "Which channels go",
    "formats": "Formats",
    "values": "Value channels",
    "eviction": "Eviction",
    "float32": "In float32, for the comparison with kvpress",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; nothing without rows."""
    lines = [header, ["---"] * len(header), *rows]
    if len(lines) == 2:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(estimate: Estimate) -> str:
    """A share with its interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def difference(found: Difference) -> str:
    """A difference with its interval; just the figure where all differences are the same."""
    # Of log-probabilities, small ones are shown by the interval too; of shares they are not.
    digits = 4 if "bootstrap" in found.estimate.method else 3
    estimate = found.estimate
    text = f"{estimate.value:+.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def claims(results: Results) -> str:
    """What the paper makes one expect, and whether it was seen here."""
    lines = []
    for policy in list(POLICIES)[1:]:
        by_right, by_logprob = _verdicts(results, policy)
        if by_right:
            lines.append([f"think beats {policy}", _outcome(by_right), _outcome(by_logprob)])
    row = results.rows.get(f"{FIRST_POLICY} 0.4")
    dense = results.rows.get(DENSE)
    if row is not None and dense is not None:
        found = compare(row, dense, WAYS[0])
        answer = {True: "yes", False: "no", None: "neither shown"}[within_a_point(found)]
        lines.append(
            [
                "0.4 loses less than a point to dense",
                f"{answer}: {difference(found.right)}",
                difference(found.logprob),
            ]
        )
    return table(["expected", "share right", "log-probability"], lines)


def known_policies(results: Results) -> list[str]:
    """Those with rows."""
    found = {row.labels["policy"] for row in results.rows.values() if row.group == "channels"}
    return [policy for policy in POLICIES if policy in found]


def policies(results: Results) -> str:
    """Share right by ratio and policy, all sizes together."""
    return _by_policy(results, lambda row, _: share(share_right(row, WAYS[0])))


def policies_logprob(results: Results) -> str:
    """Log-probability to dense by ratio and policy, all sizes together."""
    return _by_policy(results, lambda row, dense: difference(compare(row, dense, WAYS[0]).logprob))


def duels(results: Results) -> str:
    """ThinK's choice against each other one, at equal ratios."""
    lines = []
    for policy in list(POLICIES)[1:]:
        for ratio in RATIOS:
            first = results.rows.get(f"{FIRST_POLICY} {ratio:g}")
            other = results.rows.get(f"{policy} {ratio:g}")
            if first is None or other is None:
                continue
            found = compare(first, other, WAYS[0])
            lines.append(
                [
                    policy,
                    f"{ratio:g}",
                    difference(found.right),
                    f"{found.right.better} / {found.right.worse}",
                    f"{found.right.p_value:.2g}",
                    difference(found.logprob),
                    {1: "think", -1: policy, 0: "-"}[sign(found.logprob.estimate)],
                ]
            )
    header = ["think against", "ratio", "share right", "better / worse", "McNemar p"]
    text = table([*header, "log-probability", "wins by it"], lines)
    return text and f"### ThinK's choice against each other one\n\n{text}"


def group_table(results: Results, group: str, way: str, size: int | None = None) -> str:
    """All rows of a group to dense, asked one way."""
    rows = [
        (name, row)
        for name, row in results.rows.items()
        if row.group == group and way in row.answers
    ]
    dense = results.rows["float32: dense" if group == "float32" else DENSE]
    header = ["configuration", "thin", "right", "to dense", "p", "log-probability to dense"]
    return table(header, [_line(name, row, dense, way, size) for name, row in rows if row != dense])


def all_tables(results: Results) -> Iterator[str]:
    """Every group by size and way of asking, as sections."""
    for group, title in TITLES.items():
        rows = [row for row in results.rows.values() if row.group == group]
        for way in WAYS:
            sizes = sorted({size for row in rows for size in row.sizes(way)})
            for size in (None, *sizes) if sizes else ():
                where = "all sizes" if size is None else f"{size} tokens"
                text = group_table(results, group, way, size)
                if text:
                    yield f"### {title}, {way}, {where}\n\n{text}"


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


def _line(name: str, row: Row, dense: Row, way: str, size: int | None) -> list[str]:
    found = compare(row, dense, way, size)
    shares = row.plan.get("thin_share", {})
    thin = [part for length, part in shares.items() if size in (None, int(length))]
    return [
        name.removeprefix("float32: "),
        f"{100 * sum(thin) / len(thin):.0f} %",
        share(share_right(row, way, size)),
        difference(found.right),
        f"{found.right.p_value:.2g}",
        difference(found.logprob),
    ]


def _by_policy(results: Results, cell: Callable[[Row, Row], str]) -> str:
    dense = results.rows[DENSE]
    known = known_policies(results)
    lines = []
    for ratio in RATIOS:
        rows = [results.rows.get(f"{policy} {ratio:g}") for policy in known]
        if not any(rows):
            continue
        lines.append([f"{ratio:g}", *("-" if row is None else cell(row, dense) for row in rows)])
    return table(["ratio", *known], lines)


def _verdicts(results: Results, policy: str) -> tuple[dict[float, int], dict[float, int]]:
    """By ratio: 1 where think is better, -1 where the other is, 0 where neither is shown."""
    by_right, by_logprob = {}, {}
    for ratio in RATIOS:
        first = results.rows.get(f"{FIRST_POLICY} {ratio:g}")
        other = results.rows.get(f"{policy} {ratio:g}")
        if first is not None and other is not None:
            found = compare(first, other, WAYS[0])
            by_right[ratio] = sign(found.right.estimate)
            by_logprob[ratio] = sign(found.logprob.estimate)
    return by_right, by_logprob


def _outcome(verdicts: dict[float, int]) -> str:
    kinds = {1: "yes at", -1: "the other at", 0: "neither at"}
    parts = []
    for verdict, kind in kinds.items():
        ratios = [f"{ratio:g}" for ratio, found in verdicts.items() if found == verdict]
        if ratios:
            parts.append(f"{kind} {', '.join(ratios)}")
    return "; ".join(parts)
