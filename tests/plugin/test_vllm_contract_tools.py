"""What the programs beside the server call of vLLM; see ``test_vllm_contract.py``."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

from tests.support.contract import check_accepts, check_members, check_parameters, name_of
from think_vllm.doctor.forced import FORCED_TOKENS, ForcedTokens


@pytest.mark.parametrize(
    ("ours", "function", "parameters"),
    [
        ("doctor/probe.py", LLM.from_engine_args, ["engine_args"]),
        ("doctor/probe.py", AsyncEngineArgs.add_cli_args, ["parser", "async_args_only"]),
        ("doctor/probe.py", EngineArgs.from_cli_args, ["args"]),
        ("doctor/forced.py", AdapterLogitsProcessor.new_req_logits_processor, ["self", "params"]),
        ("doctor/forced.py", AdapterLogitsProcessor.is_argmax_invariant, ["self"]),
    ],
    ids=name_of,
)
def test_signatures(ours: str, function: Callable[..., Any], parameters: list[str]) -> None:
    check_parameters(ours, function, parameters)


def test_parameters_passed_by_name() -> None:
    check_accepts("doctor/probe.py", LLM.generate, ["prompts", "sampling_params"])
    names = ["temperature", "max_tokens", "ignore_eos", "logprobs", "extra_args"]
    check_accepts("doctor/probe.py", SamplingParams, names)
    check_members("doctor/probe.py", EngineArgs, {"additional_config", "logits_processors"})
    names = ["is_cpu", "is_cuda", "get_device_name", "get_device_total_memory"]
    check_members("doctor/machine.py", type(current_platform), set(names))


def test_forced_tokens_are_forced_in_their_own_request_only() -> None:
    # The form with two arguments, of which the first are the tokens so far.
    assert len(get_args(get_args(RequestLogitsProcessor)[0])[0]) == 2
    processor = object.__new__(ForcedTokens)
    free = processor.new_req_logits_processor(SamplingParams())
    assert free is None
    params = SamplingParams(extra_args={FORCED_TOKENS: [3, 1]})
    force = processor.new_req_logits_processor(params)
    assert force is not None
    assert len(inspect.signature(force).parameters) == 2
    logits = torch.tensor([9.0, 0.0, 5.0, -2.0])
    for so_far, token in (([], 3), ([3], 1)):
        forced = force(so_far, logits.clone())
        assert int(forced.argmax()) == token
        assert torch.isinf(forced).sum() == 3
