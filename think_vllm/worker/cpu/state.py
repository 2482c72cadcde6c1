"""What one layer remembers of a request between forward passes.

vLLM tells attention backends nothing about who a request is, so its state is kept under a
block that the request alone has written: the one that holds a given position. An entry whose
request ended before it was taken is overwritten when that block is next used so, before
anyone reads it; there are never more entries than blocks.
"""

import torch


class LayerState:
    """State of one attention layer on the CPU."""

    def __init__(self) -> None:
        self._energy: dict[int, torch.Tensor] = {}
        self._channels: dict[int, torch.Tensor] = {}

    def keep_energy(self, block: int, energy: torch.Tensor) -> None:
        """Keep the query energy of a window that the next chunk continues.

        Args:
            block: Block of the last position that was added.
            energy: float32 [S, Hk, D], of each of its sources.
        """
        self._energy[block] = energy

    def take_energy(self, block: int) -> torch.Tensor:
        """Remove and return what ``keep_energy`` kept.

        Raises:
            KeyError: If nothing was kept: an error in the order of chunks.
        """
        return self._energy.pop(block)

    def keep_channels(self, block: int, channels: torch.Tensor) -> None:
        """Keep what a prompt has chosen for spans that fall due in a later step.

        Args:
            block: Block of the prompt's last position.
            channels: uint8 [1, Hk, K] for all of these spans, or [n, Hk, K] for one each.
        """
        self._channels[block] = channels

    def take_channels(self, block: int) -> torch.Tensor:
        """Remove and return what ``keep_channels`` kept.

        Raises:
            KeyError: If nothing was kept: an error in the order of spans.
        """
        return self._channels.pop(block)
