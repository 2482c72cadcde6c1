"""Which KV heads of the model a rank has: policies know channels by layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed import get_tensor_model_parallel_rank

from think_vllm.worker.policies import LayerHeads

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class RankHeads:
    """KV heads of this rank, in every layer: see ``LayerHeads``."""

    first: int
    count: int
    head_size: int
    seed: int

    def of_layer(self, name: str) -> LayerHeads:
        """Those of the layer that vLLM calls so, as in ``model.layers.3.self_attn.attn``.

        Raises:
            ValueError: If the name has no number, or several.
        """
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if len(numbers) != 1:
            raise ValueError(f"of_layer: name is {name!r}; expected one with the layer's number")
        return LayerHeads(numbers[0], self.first, self.count, self.head_size, self.seed)


def rank_heads(config: VllmConfig, count: int, head_size: int) -> RankHeads:
    """Number this rank's KV heads.

    Args:
        config: Of the engine.
        count: How many the rank has.
        head_size: ``D``.
    """
    rank, ranks = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
    total = config.model_config.get_total_num_kv_heads()
    # Where there are fewer heads than ranks, vLLM gives each to ranks that are neighbours.
    return RankHeads(rank * total // ranks, count, head_size, config.model_config.seed)
