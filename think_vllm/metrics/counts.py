"""What a block manager has counted since it was made."""

from dataclasses import dataclass


@dataclass(slots=True)
class SpanCounts:
    """Counts of one group of layers.

    Args:
        spans: Spans whose tails running requests gave back.
        blocks: Those tails' blocks.
        hit_tokens: Tokens of thin spans that admitted requests found in the prefix cache.
    """

    spans: int = 0
    blocks: int = 0
    hit_tokens: int = 0
