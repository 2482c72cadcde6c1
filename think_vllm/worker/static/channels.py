"""Which channels a rank keeps of a layer."""

import torch

from think_vllm.hooks.static_engine import StaticEngine
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.worker.policies import LayerHeads


def rank_channels(engine: StaticEngine, heads: LayerHeads) -> StaticChannels:
    """Kept channels of the KV heads that this rank has of a layer."""
    these = slice(heads.first, heads.first + heads.count)
    return StaticChannels(
        keys=torch.tensor(engine.tables.kept_keys(heads.layer, engine.plan)[these]),
        values=torch.tensor(engine.tables.kept_values(heads.layer, engine.plan)[these]),
    )
