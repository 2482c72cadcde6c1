"""vLLM engines in this process, for the checks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bench.support.repository import BUNDLED

#: What makes a Llama of the bundled model's configuration as large as one of 8B parameters.
SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "vocab_size": 128256,
}


def make_shape(folder: Path, **changes: Any) -> Path:
    """A model without weights: the bundled one's tokenizer, and its configuration with changes."""
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


def make_llm(
    model: Path, think: dict[str, Any], runner: int | None = None, **arguments: Any
) -> Any:
    """A ``vllm.LLM`` in this process, so that it can be looked into.

    Args:
        model: Directory.
        think: Our settings, as ``additional_config`` has them; empty for plain vLLM.
        runner: 1 or 2 for one of vLLM's model runners; None for its choice.
        arguments: Of ``LLM``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(runner - 1)
    from vllm import LLM

    from think_vllm.plugin import register

    # Where the package is not installed, nothing has loaded its entry point.
    register()
    given = {"additional_config": {"think": think}} if think else {}
    return LLM(str(model), dtype="bfloat16", disable_log_stats=True, **given, **arguments)
