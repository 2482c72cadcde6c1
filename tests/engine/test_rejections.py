"""What an engine is rejected for once its model is there."""

from pathlib import Path

import pytest

from tests.engine.conftest import Load
from tests.support.checks import EAGER, plan_served
from tests.support.models import make_exact_llama

MAX_MODEL_LEN = 1024
PLAN, FLAGS = plan_served(128, kv_channel_prune=0.5, kv_quant="k4v2")
ARGUMENTS = (*EAGER, *FLAGS, "--max-model-len", str(MAX_MODEL_LEN))


def test_pool_one_block_too_small(load: Load, tmp_path: Path) -> None:
    # Of one layer with two heads; the null block is one more.
    model = make_exact_llama(tmp_path)
    block_bytes, needed = PLAN.layout.run_bytes * 2, MAX_MODEL_LEN // PLAN.block_size + 1
    with pytest.raises(ValueError, match="To serve at least one request with the model"):
        load(*ARGUMENTS, model=model, kv_cache_bytes=(needed - 1) * block_bytes)
    load(*ARGUMENTS, model=model, kv_cache_bytes=needed * block_bytes)
