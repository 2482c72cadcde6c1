"""Streaming-input sessions, whose prompts grow: rejected one by one, and nobody else notices."""

import json

import pytest

from tests.support.checks import HALF, TOLERANCE, random_prompts
from tests.support.server import run_script

pytestmark = pytest.mark.e2e

SCRIPT = """
import asyncio, json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        sys.argv[1], dtype="float32", enforce_eager=True, max_num_seqs=4,
        kv_cache_memory_bytes=2**27, additional_config=json.loads(sys.argv[3])))
    prompt = json.loads(sys.argv[2])
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=0, ignore_eos=True,
                            output_kind=RequestOutputKind.DELTA)

    async def chunks():
        for part in (prompt[:200], prompt[200:]):
            yield StreamingInput({"prompt_token_ids": part})

    async def ask(prompt, name):
        tokens, logprobs = [], []
        async for output in engine.generate(prompt, params, name):
            [answer] = output.outputs
            tokens += answer.token_ids
            logprobs += [step[t].logprob for t, step in zip(answer.token_ids, answer.logprobs)]
        return tokens, logprobs

    whole = {"prompt_token_ids": prompt}
    session, *others = await asyncio.gather(
        ask(chunks(), "session"), ask(whole, "beside"), return_exceptions=True)
    others.append(await ask(whole, "after"))
    rejected = isinstance(session, Exception)
    print("RESULT" + json.dumps([repr(session) if rejected else session[0], others]))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_sessions_are_rejected_alone(recall_model, recall_reference, tmp_path):
    [prompt] = random_prompts([420])
    settings = {"think": {"kv_channel_prune": 0.5, "kv_prefix_cache": "dense"}}
    given = str(recall_model), json.dumps(prompt), json.dumps(settings)
    (session, others), _ = run_script(SCRIPT, tmp_path, *given)
    assert "streaming-input sessions" in session
    assert len(others) == 2
    for tokens, logprobs in others:
        expected = recall_reference.logprobs(prompt, tokens, HALF)
        assert logprobs == pytest.approx(expected, abs=TOLERANCE)
