"""What the CUDA backend keeps between steps and sends for each, and its warm-up."""

import pytest
import torch

from tests.kernels.helpers import make_plan
from think_vllm.worker.cuda.metadata import to_device
from think_vllm.worker.cuda.warmup import warm_up
from think_vllm.worker.state import GroupState, RequestSlots
from think_vllm.worker.step_tensors import DueSpans, Observed, Slots


def test_request_slots_keep_their_numbers_while_requests_are_known():
    slots = RequestSlots(3)
    known = {"a", "b", "c"}
    numbers = {name: slots.give(name, known) for name in sorted(known)}
    assert sorted(numbers.values()) == [0, 1, 2]
    assert {name: slots.give(name, known) for name in known} == numbers
    # Nobody told that b has ended; its number is found when one is needed.
    known = {"a", "c", "d"}
    assert slots.give("d", known) == numbers["b"]
    assert slots.get("c") == numbers["c"]
    assert slots.capacity == 3
    # One that is released is given again.
    assert slots.release("c") == numbers["c"]
    for unknown in (slots.get, slots.release):
        with pytest.raises(KeyError):
            unknown("c")
    known = {"a", "d", "e"}
    assert slots.give("e", known) == numbers["c"]
    # All of them are known: there are more, then.
    known |= {"f", "g"}
    assert len({slots.give(name, known) for name in known}) == 5
    assert slots.capacity == 6


def test_group_state_keeps_what_it_holds_when_it_grows():
    state = GroupState(["x", "y"], 2, 64, 32, 1, torch.device("cpu"))
    assert state.index == {"x": 0, "y": 1}
    state.channels[1, 0] = 7
    state.requests.give("a", {"a", "b"})
    state.requests.give("b", {"a", "b"})
    state.grow()
    assert state.channels.shape == (2, 2, 2, 32)
    assert (state.channels[1, 0] == 7).all()
    assert not state.channels[:, 1].any()
    assert state.energy.shape == (2, GroupState.CUT_WINDOWS, 1, 2, 64)


def test_to_device_sends_every_tensor_at_an_aligned_place():
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    parts = [
        Observed(ints(1, 2, 3), ints(4), None, Slots(ints(), ints(5, 6)), ints(7)),
        DueSpans(ints(8), ints(9), ints(10)),
    ]
    sent = to_device(parts, torch.device("cpu"))
    assert sent[0].resumed is None
    first, second = sent[0].begin, sent[1].slot
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    for tensor, values in (
        (sent[0].begin, [1, 2, 3]),
        (sent[0].end, [4]),
        (sent[0].kept.index, []),
        (sent[0].kept.slot, [5, 6]),
        (sent[0].ended, [7]),
        (sent[1].request, [8]),
        (sent[1].span, [9]),
        (sent[1].slot, [10]),
    ):
        assert tensor.tolist() == values
        assert tensor.storage_offset() % 4 == 0


@pytest.mark.parametrize(
    ("quant", "ratio", "value_ratio"), [("none", 0.5, 0.0), ("fp8", 0.0, 0.0), ("kivi4", 0.0, 0.4)]
)
def test_warm_up_gives_kernels_what_they_take(quant, ratio, value_ratio, device):
    plan = make_plan(64, torch.float16, ratio=ratio, quant=quant, value_ratio=value_ratio)
    warm_up(plan, (4, 2), torch.float16, device)
