"""Offline: ``LLM(..., additional_config=...)``, as in a script of a user."""

import json

import pytest

from tests.support.checks import HALF, TOLERANCE, random_prompts
from tests.support.server import run_script

pytestmark = pytest.mark.e2e

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_num_seqs=8,
              kv_cache_memory_bytes=2**27,
              additional_config={"think": {"kv_channel_prune": 0.5}})
    asks = [None, None, {"kv_channel_prune": False}]
    params = [SamplingParams(temperature=0, max_tokens=30, logprobs=0, ignore_eos=True,
                             extra_args=asked) for asked in asks]
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    try:
        llm.generate(prompts[0], SamplingParams(extra_args={"kv_channel_prune": 0.4}))
    except VLLMValidationError as error:
        print("REFUSED", error)
    answers = [output.outputs[0] for output in llm.generate(prompts, params)]
    print("RESULT" + json.dumps([
        [list(a.token_ids), [step[t].logprob for t, step in zip(a.token_ids, a.logprobs)]]
        for a in answers
    ]))
"""


def test_llm_takes_additional_config(recall_model, recall_reference, tmp_path):
    prompts = random_prompts([300, 1000, 1001])
    answers, printed = run_script(SCRIPT, tmp_path, str(recall_model), json.dumps(prompts))
    assert "REFUSED kv_channel_prune is 0.4" in printed
    for prompt, (tokens, logprobs), thinning in zip(
        prompts, answers, [HALF, HALF, None], strict=True
    ):
        expected = recall_reference.logprobs(prompt, tokens, thinning)
        assert max(abs(a - b) for a, b in zip(expected, logprobs, strict=True)) < TOLERANCE
