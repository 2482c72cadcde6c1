"""Static blocks for tests of kernels: caches in which everything that is not stored is a NaN."""

import torch

from think_vllm.kernels.reference.static import static_attention_ref, store_static_ref
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan

#: Kept key and value channels of 64: keys alone, values alone, both, either of them longer, odd
#: numbers, hardly any.
KEPT = [(32, 64), (64, 40), (31, 48), (50, 23), (13, 13), (63, 64), (1, 64)]
QUANTS = ["none", "fp8"]


def make_plan(
    keys: int,
    values: int,
    dtype: torch.dtype,
    block_size: int = 16,
    head_size: int = 64,
    quant: str = "none",
) -> StaticPlan:
    config = ThinkConfig.model_validate({"kv_channel_prune": 0.5, "kv_quant": quant})
    return StaticPlan(config, head_size, keys, values, block_size, dtype.itemsize)


def random_channels(
    plan: StaticPlan, num_kv_heads: int, generator: torch.Generator
) -> StaticChannels:
    """Channels at random, so that every head has its own."""

    def draw(count: int) -> torch.Tensor:
        order = [torch.randperm(plan.head_size, generator=generator) for _ in range(num_kv_heads)]
        return torch.stack([channels[:count].sort().values for channels in order])

    return StaticChannels(draw(plan.key_channels), draw(plan.value_channels))


class StaticCase:
    """Requests whose blocks were filled by the reference; every other byte is a NaN."""

    def __init__(
        self,
        plan: StaticPlan,
        dtype: torch.dtype,
        heads: tuple[int, int],
        lengths: list[int],
        gap_blocks: int = 0,
    ) -> None:
        self.plan, self.dtype, self.lengths = plan, dtype, lengths
        self.scale = plan.head_size**-0.5
        self.generator = torch.Generator().manual_seed(0)
        num_heads, num_kv_heads = heads
        self.channels = random_channels(plan, num_kv_heads, self.generator)
        entries = max(-(-length // plan.block_size) for length in lengths) + 1
        num_blocks = len(lengths) * entries + 1
        stored, poison = (torch.uint8, 255) if plan.is_quantized else (dtype, torch.nan)
        width = plan.layout.token_bytes // stored.itemsize
        shape = (num_blocks, 1 + gap_blocks, num_kv_heads, plan.block_size, width)
        self.kv_cache = torch.full(shape, poison, dtype=stored)[:, 0]
        order = 1 + torch.randperm(num_blocks - 1, generator=self.generator)
        # Entries that must not be read point at block 0, which stays NaN.
        self.block_table = order.view(len(lengths), entries).to(torch.int32)
        for request, length in enumerate(lengths):
            used = -(-length // plan.block_size)
            self.block_table[request, used:] = 0
            key, value = self.random(length, num_kv_heads), self.random(length, num_kv_heads)
            store_static_ref(
                key, value, self.kv_cache, self.slots(request), *self.kept_lists(), plan
            )
        self.query = self.random(len(lengths), num_heads)

    def random(self, tokens: int, heads: int) -> torch.Tensor:
        shape = (tokens, heads, self.plan.head_size)
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def kept_lists(self) -> tuple[list[list[int]], list[list[int]]]:
        return self.channels.keys.tolist(), self.channels.values.tolist()

    def slots(self, request: int) -> list[int]:
        size = self.plan.block_size
        blocks = self.block_table[request]
        return [int(blocks[i // size]) * size + i % size for i in range(self.lengths[request])]

    def expected(
        self,
        query: torch.Tensor,
        request: list[int],
        seq_len: list[int],
        cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The reference's answers; arguments as for ``static_attention_ref``."""
        return static_attention_ref(
            query, self.kv_cache, self.block_table, request, seq_len, *self.kept_lists(),
            self.plan, self.scale, cap, sinks,
        )  # fmt: skip
