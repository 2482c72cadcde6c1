"""Off means off: without the flag nothing of ours is imported, and vLLM selects as usual."""

import json
import os

import pytest

from tests.support.processes import run_python
from think_vllm.hooks.patches import PATCHES
from think_vllm.hooks.patches.patch import Role

pytestmark = pytest.mark.slow  # processes that import vLLM

PROBE = """
import json, sys
from pathlib import Path
from vllm.engine.arg_utils import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.plugins import load_general_plugins
from vllm.v1.attention.selector import get_attn_backend
load_general_plugins()
additional, = sys.argv[2:]
config = EngineArgs(model=sys.argv[1], enforce_eager=True, dtype="float32",
                    additional_config=json.loads(additional)).create_engine_config()
with set_current_vllm_config(config):
    backend = get_attn_backend(128, config.model_config.dtype, "auto")
print("RESULT" + json.dumps({
    "backend": backend.__module__ + "." + backend.__qualname__,
    "block_size": config.cache_config.block_size,
    "prefix_caching": config.cache_config.enable_prefix_caching,
    "rswa": config.model_config.rswa_window,
    "ours": sorted(m for m in sys.modules if m.startswith(
        ("think_vllm.worker", "think_vllm.scheduler", "think_vllm.kernels",
         "think_vllm.metrics"))),
    "wrapped": sys.modules["think_vllm.hooks.installation"].installed()
               if "think_vllm.hooks" in sys.modules else [],
}))
"""


def probe(
    model: object, additional: dict[str, object], plugins: str = "think_vllm"
) -> dict[str, object]:
    environment = {**os.environ, "VLLM_PLUGINS": plugins}
    done = run_python("-c", PROBE, str(model), json.dumps(additional), env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    result: dict[str, object] = json.loads(line.removeprefix("RESULT"))
    return result


def role_targets(*roles: Role) -> list[str]:
    return [patch.target for patch in PATCHES if patch.role in roles]


@pytest.fixture(scope="module")
def plain(recall_model: object) -> dict[str, object]:
    """What vLLM does that has not loaded us."""
    return probe(recall_model, {}, plugins="")


@pytest.mark.parametrize(
    "additional",
    [
        {},
        {"think": {"kv_channel_prune": 0, "kv_quant": "none"}},
        {"think": {"kv_channel_prune": 0.005}},
    ],
    ids=["no-flag", "zero-and-none", "no-channel"],
)
def test_register_leaves_vllm_alone_without_thin_blocks(recall_model, plain, additional):
    result = probe(recall_model, additional)
    wrapped = role_targets(Role.PLUGIN, Role.BACKEND)
    assert result == {**plain, "wrapped": wrapped}
    assert (plain["wrapped"], result["ours"], result["rswa"]) == ([], [], None)
    assert result["backend"] == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


@pytest.mark.parametrize(
    ("settings", "block_size"),
    [({"kv_channel_prune": 0.5}, 48), ({"kv_quant": "kivi4"}, 16)],
    ids=["prune", "quant"],
)
def test_register_selects_our_backend_with_thin_blocks(recall_model, settings, block_size):
    result = probe(recall_model, {"think": settings})
    assert result["backend"] == "think_vllm.worker.cpu.backend.ThinkCPUBackend"
    assert result["block_size"] == block_size
    assert result["prefix_caching"] is True
    # The backend brings its KV cache spec, and that the scheduler's side.
    roles = (Role.PLUGIN, Role.BACKEND, Role.FRONT_END, Role.REPORTS, Role.SCHEDULER)
    assert result["wrapped"] == role_targets(*roles)
