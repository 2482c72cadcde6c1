"""What blocks of statically pruned tokens hold, and what that is worth."""

from dataclasses import dataclass
from functools import cached_property

from think_vllm.errors import REMEDY, ThinkError
from think_vllm.plan.block_plan import ChannelPlan
from think_vllm.plan.layout import MAX_HEAD_SIZE
from think_vllm.plan.planner import SIZE_MULTIPLE, pruned_channels
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_layout import StaticLayout

#: vLLM's own block size on CPUs. Every token is pruned, so no other one would save more. On GPUs
#: too: keys are channel-major, and short rows of them would be read in small pieces.
BLOCK_SIZE = 128


@dataclass(frozen=True)
class StaticPlan(ChannelPlan):
    """How the KV blocks of one model are pruned from the first token on; see ``ChannelPlan``."""

    block_size: int  # tokens of a block
    itemsize: int  # bytes of a cache element

    @cached_property
    def layout(self) -> StaticLayout:
        """Byte layout of a block."""
        return StaticLayout(
            self.key_channels,
            self.value_channels,
            self.block_size,
            self.itemsize,
            self.is_quantized,
        )

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are stored in fp8."""
        return self.config.kv_quant == "fp8"

    @property
    def selects_per_span(self) -> bool:
        """Whether each span has channels of its own: there are no spans."""
        return False

    @property
    def dense_bytes_per_token_head(self) -> int:
        """Bytes of one token in one KV head, keys and values, in plain vLLM."""
        return 2 * self.head_size * self.itemsize

    @property
    def bytes_per_token_head(self) -> int:
        """Bytes of one token in one KV head, keys and values."""
        return self.layout.token_bytes

    @property
    def capacity_multiple(self) -> float:
        """Tokens that fit where one dense token fits, at every length."""
        return self.dense_bytes_per_token_head / self.bytes_per_token_head


def plan_static(
    config: ThinkConfig, head_size: int, itemsize: int, block_size: int | None = None
) -> StaticPlan | None:
    """Plan the blocks of a model.

    Args:
        config: What is asked for.
        head_size: Channels of a key head (values have as many).
        itemsize: Bytes of a cache element: 2 for bf16 and fp16, 4 for fp32.
        block_size: Tokens of a block if the user chose them, else None.

    Returns:
        The plan, or None if the ratios are too small to prune a single channel and nothing is
        quantized.

    Raises:
        ThinkError: If the kernels cannot take the head size or the block size.
    """
    keys = pruned_channels(config.kv_channel_prune, head_size)
    values = pruned_channels(config.kv_value_prune, head_size)
    if not keys and not values and config.kv_quant == "none":
        return None
    if head_size > MAX_HEAD_SIZE:
        raise ThinkError(
            f"--kv-select static: the model's head size is {head_size}; at most {MAX_HEAD_SIZE} is "
            f"possible. {REMEDY}"
        )
    for name, value, remedy in (
        ("the model's head size", head_size, REMEDY),
        ("--block-size", block_size, f"Leave it out for {BLOCK_SIZE}"),
    ):
        if value is not None and (value < 1 or value % SIZE_MULTIPLE):
            raise ThinkError(
                f"--kv-select static: {name} is {value}; the kernels need a multiple of "
                f"{SIZE_MULTIPLE}. {remedy}"
            )
    return StaticPlan(
        config=config,
        head_size=head_size,
        key_channels=head_size - keys,
        value_channels=head_size - values,
        block_size=block_size or BLOCK_SIZE,
        itemsize=itemsize,
    )
