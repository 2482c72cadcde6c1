"""What the metrics are called, mean and count: the only place that states it.

Pure data. A report is a dict of plain values, since it crosses processes as msgpack::

    {"counters": {name: increase since the last report},
     "gauges": {name: {kind, or "" for none: value}},
     "shares": [[observations of each bucket], [sum of each bucket's observations]],
     "resolved": {request: whether it stays dense}}

The scheduler takes ``resolved`` out; it never reaches an API server.

Every part may be missing. Counters add up wherever a report goes: vLLM gives each to one of its
API servers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

PREFIX = "think_vllm:"

Report = dict[str, Any]


class Metric(NamedTuple):
    """A metric."""

    help: str  # text of the exposition
    kinds: tuple[str, ...] = ()  # values of its label ``kind``; none if it has no such label


SPANS, BLOCKS, BYTES = "spans_compacted", "blocks_freed", "freed_bytes"
HITS, SECONDS = "thin_prefix_hit_tokens", "compaction_seconds"
KEPT_DENSE = "requests_kept_dense"
HELD, MULTIPLE, CAPACITY = "held_tokens", "capacity_multiple", "capacity_tokens"
SHARE = "score_mass_kept"

#: Their names get the suffix ``_total``.
COUNTERS = {
    SPANS: Metric("Spans of running requests that became thin and whose other blocks were freed."),
    BLOCKS: Metric("KV cache blocks that running requests gave back because spans became thin."),
    BYTES: Metric("Bytes of those blocks, over all ranks of the engine."),
    HITS: Metric("Tokens of prompts that were found in the prefix cache as thin spans."),
    SECONDS: Metric(
        "Seconds that layers spent on choosing channels and compacting spans, on the rank that "
        "reports. CPUs only."
    ),
    KEPT_DENSE: Metric("Requests that stayed dense because of --kv-prune-max-loss."),
}
GAUGES = {
    HELD: Metric(
        "Tokens that running requests hold: dense, or in thin spans whose other blocks were freed.",
        ("dense", "thin"),
    ),
    MULTIPLE: Metric(
        "Blocks that running requests would hold if nothing were thin, over those they hold. 0 "
        "while none runs."
    ),
    CAPACITY: Metric(
        "Tokens in the KV cache when it is full of requests of max_model_len: all dense, or thin "
        "as planned.",
        ("dense", "planned"),
    ),
}
SHARE_METRIC = Metric(
    "Share of the key channels' scores that the kept channels have, per selection, layer and KV "
    "head, on the rank that reports."
)

#: Upper ends of the buckets of shares. Keeping channels at random keeps about as much mass as
#: channels; a useful selection is above that, and a good one close to 1.
SHARE_EDGES = (
    *(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9),
    *(0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0),
)


@dataclass(slots=True)
class SpanCounts:
    """Counts of one block manager, which has a group of layers."""

    spans: int = 0  # spans that became thin, and whose other blocks running requests gave back
    blocks: int = 0  # those blocks
    hit_tokens: int = 0  # tokens of thin spans that admitted requests found in the prefix cache
