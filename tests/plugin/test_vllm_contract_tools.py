"""What the programs beside the server call of vLLM; see ``test_vllm_contract.py``."""

import argparse
import inspect
from typing import get_args

import pytest
import torch
from vllm import SamplingParams
from vllm.benchmarks.serve import add_cli_args
from vllm.v1.sample.logits_processor import RequestLogitsProcessor

from tests.support.contract import check
from think_vllm.tools.bench.driver import generator_arguments
from think_vllm.tools.bench.scenario import known_scenarios, load_scenario
from think_vllm.tools.common.server import KEEP_ALIVE, KEEP_ALIVE_S
from think_vllm.tools.doctor.forced import FORCED_TOKENS, ForcedTokens


def test_server_under_test_keeps_connections_longer_than_the_load_generator() -> None:
    ours = "tools/common/server.py"
    check(ours, "benchmarks.serve:benchmark", ["keepalive_timeout=60,"])
    server = "entrypoints.launchers.api_server.entry:build_and_serve"
    check(ours, server, [f"timeout_keep_alive=envs.{KEEP_ALIVE}"])
    assert KEEP_ALIVE_S > 60


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


@pytest.mark.parametrize("name", known_scenarios())
def test_load_generator_takes_what_a_scenario_says(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    scenario = load_scenario(name)
    for point in scenario.points():
        given = parser.parse_args(generator_arguments("model", scenario, point, seed=7))
        assert (given.model, given.seed, given.ignore_eos) == ("model", 7, True)
        assert (given.dataset_name, given.num_prompts) == (scenario.dataset, point.num_prompts)
        assert given.max_concurrency == point.concurrency
        assert given.request_rate == (point.request_rate or float("inf"))
        if scenario.dataset == "random":
            lengths = (given.random_input_len, given.random_output_len)
            assert float(given.random_range_ratio) == scenario.length_spread
        else:
            prefix, suffix = given.prefix_repetition_prefix_len, given.prefix_repetition_suffix_len
            assert prefix == scenario.prefix_tokens
            lengths = (prefix + suffix, given.prefix_repetition_output_len)
        assert lengths == (scenario.prompt_tokens, scenario.output_tokens)
