"""Another vLLM: inert, one line, and a rejection only if the flag is used."""

import pytest

from tests.support.processes import run_python

pytestmark = pytest.mark.slow  # processes that import vLLM

PROBE = """
import json, sys, vllm
vllm.__version__ = "0.99.1"
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
load_general_plugins()
EngineArgs(model=sys.argv[1], enforce_eager=True,
           additional_config=json.loads(sys.argv[2])).create_engine_config()
print("CREATED")
"""


@pytest.mark.parametrize(
    ("additional", "used"),
    [
        ("{}", False),
        ('{"think": {"kv_channel_prune": 0.5}}', True),
        ('{"think": {"kv_quant": "fp8"}}', True),
    ],
    ids=["no-flag", "prune", "quant"],
)
def test_register_on_another_version_rejects_only_the_flags(recall_model, additional, used):
    done = run_python("-c", PROBE, str(recall_model), additional)
    output = done.stdout + done.stderr
    flags = "--kv-channel-prune, --kv-value-prune, --kv-quant and --kv-evict"
    assert output.count(f"this is vLLM 0.99.1: {flags} are off") == 1
    assert ("CREATED" in done.stdout) is not used
    assert ("works with vLLM 0.32.* or 0.33.*, this is 0.99.1" in output) is used
