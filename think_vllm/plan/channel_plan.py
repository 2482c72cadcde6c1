"""Which channels of a head the blocks of a model keep, whatever else they do."""

from dataclasses import dataclass

from think_vllm.plan.formats import BlockFormat
from think_vllm.plan.settings import ThinkConfig


@dataclass(frozen=True)
class ChannelPlan:
    """How many channels of a head are kept.

    Args:
        config: What was asked for.
        head_size: Channels of a key head.
        key_channels: Kept key channels.
        value_channels: Kept value channels.
    """

    config: ThinkConfig
    head_size: int
    key_channels: int
    value_channels: int

    @property
    def format(self) -> BlockFormat:
        """How tokens are coded."""
        return self.config.format

    @property
    def prunes_keys(self) -> bool:
        """Whether key channels are left out."""
        return self.key_channels < self.head_size

    @property
    def prunes_values(self) -> bool:
        """Whether value channels are left out."""
        return self.value_channels < self.head_size

    @property
    def prunes(self) -> bool:
        """Whether channels are left out, and so have to be chosen."""
        return self.prunes_keys or self.prunes_values

    @property
    def requested_ratio(self) -> float:
        """Fraction of key channels that was asked to go."""
        return self.config.kv_channel_prune

    @property
    def actual_ratio(self) -> float:
        """Fraction of key channels that goes."""
        return 1.0 - self.key_channels / self.head_size

    @property
    def actual_value_ratio(self) -> float:
        """Fraction of value channels that goes."""
        return 1.0 - self.value_channels / self.head_size
