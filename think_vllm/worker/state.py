"""What the layers of a group remember of requests between forward passes.

Model runners move requests between the rows of their batches, so state is kept under a number
that belongs to a request for as long as it needs one. Everything is written before it is read:
the numbers' earlier owners leave nothing behind.
"""

from collections.abc import Container

import torch

from think_vllm.worker.step_tensors import DueSpans


class RequestSlots:
    """Numbers for requests, from 0.

    Args:
        capacity: How many there are at first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity))
        self._slots: dict[str, int] = {}

    def give(self, request: str, known: Container[str]) -> int:
        """Find the request's number; if it has none, give it one.

        Args:
            request: Its id.
            known: Ids of the requests that the runner still knows. Others' numbers may be given
                away; a preempted request is known or not, and begins again in either case.
        """
        if request not in self._slots:
            if not self._free:
                self._make_room(known)
            self._slots[request] = self._free.pop()
        return self._slots[request]

    def get(self, request: str) -> int:
        """Look up the request's number.

        Raises:
            KeyError: If it has none: an error in the order of chunks or spans.
        """
        return self._slots[request]

    def release(self, request: str) -> int:
        """Take the request's number back, and return it; raises as ``get`` does."""
        slot = self._slots.pop(request)
        self._free.append(slot)
        return slot

    def _make_room(self, known: Container[str]) -> None:
        for request in [request for request in self._slots if request not in known]:
            self.release(request)
        if not self._free:
            self._free = list(range(self.capacity, 2 * self.capacity))
            self.capacity *= 2


class GroupState:
    """State of the layers of a group.

    Args:
        layer_names: The layers.
        num_kv_heads: ``Hk``.
        head_size: ``D``.
        kept_channels: ``K``.
        num_requests: Requests that run at once.
        device: Where it is kept.
        sources: How much windows sum up: ``count_sources``.
    """

    #: Prompts whose observation window is cut by the end of a step: rarely more than one or two.
    CUT_WINDOWS = 8

    def __init__(
        self,
        layer_names: list[str],
        num_kv_heads: int,
        head_size: int,
        kept_channels: int,
        num_requests: int,
        device: torch.device,
        sources: int = 1,
    ) -> None:
        self.index = {name: index for index, name in enumerate(layer_names)}
        self.windows = RequestSlots(self.CUT_WINDOWS)
        self.requests = RequestSlots(num_requests)
        layers = len(layer_names)
        #: Squares of cut windows so far: float32 [layers, windows, sources, Hk, D].
        self.energy = torch.zeros(
            layers,
            self.windows.capacity,
            sources,
            num_kv_heads,
            head_size,
            dtype=torch.float32,
            device=device,
        )
        #: Channels that prompts' ends have selected: uint8 [layers, requests, Hk, K].
        self.channels = torch.zeros(
            layers, num_requests, num_kv_heads, kept_channels, dtype=torch.uint8, device=device
        )
        #: Channels of a prompt's spans that the next step compacts, where each span has its own:
        #: uint8 [spans, Hk, K], by the request's number and the layer's.
        self.tables: dict[int, dict[int, torch.Tensor]] = {}

    def due_channels(self, due: DueSpans, layer: int) -> torch.Tensor:
        """Channels of spans that have fallen due, in one layer: uint8 [n, Hk, K]."""
        channels = self.channels[layer].index_select(0, due.slot)
        for begin, slot in due.tables:
            tables = self.tables[slot][layer]
            channels[begin : begin + len(tables)] = tables
        return channels

    def due_channels_of_layers(self, due: DueSpans) -> torch.Tensor:
        """``due_channels`` of all layers: uint8 [layers, n, Hk, K]."""
        if not due.tables:
            return self.channels.index_select(1, due.slot)
        return torch.stack([self.due_channels(due, layer) for layer in self.index.values()])

    def grow(self) -> None:
        """Make room for all numbers that were given; call before their tensors are used."""
        self.energy = _grown(self.energy, self.windows.capacity)
        self.channels = _grown(self.channels, self.requests.capacity)


def _grown(rows: torch.Tensor, count: int) -> torch.Tensor:
    old = rows.shape[1]
    if old >= count:
        return rows
    grown = rows.new_zeros(rows.shape[0], count, *rows.shape[2:])
    grown[:, :old] = rows
    return grown
