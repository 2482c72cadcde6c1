"""Other shapes of attention, as random-weight models."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.checks import EAGER, check_served, plan_served
from tests.support.engine import Engine
from tests.support.models import make_llama
from tests.support.reference import Reference, Thinning


@pytest.mark.parametrize(
    ("head_size", "num_heads", "num_kv_heads", "num_layers", "ratio", "block_size"),
    [(64, 8, 1, 3, 0.5, None), (80, 4, 4, 2, 0.4, 32), (256, 4, 2, 2, 0.7, None)],
    ids=["mqa-64", "mha-80", "gqa-256"],
)
def test_logprobs_equal_the_reference(
    load: Callable[..., Engine],
    tmp_path: Path,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    num_layers: int,
    ratio: float,
    block_size: int | None,
) -> None:
    model = make_llama(
        tmp_path,
        head_size=head_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_layers=num_layers,
    )
    plan, arguments = plan_served(head_size, block_size, kv_channel_prune=ratio)
    span = plan.span_tokens
    engine = load(*EAGER, *arguments, model=model)
    lengths = [30, span + 32, span + 31, 2 * span + 100, 900]
    counts = [span + 20] * len(lengths)
    check_served(engine, Reference(model), lengths, counts, Thinning.of(plan))
