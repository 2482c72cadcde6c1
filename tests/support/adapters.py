"""LoRA adapters with random weights, and models that have one merged."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.models import copy_tokenizer

#: Queries, keys and values: an adapter of each of them changes what is pruned, and how.
TARGETS = ("q_proj", "k_proj", "v_proj")
RANK = 4
ALPHA = 8


def make_adapter(path: Path, model: Path, seed: int) -> Path:
    """Save an adapter of every layer's attention in PEFT's format.

    Weights are large: an answer of the wrong adapter is far from that of the right one.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in _targets(_load(model)).items():
        size_out, size_in = weight.shape
        prefix = f"base_model.model.{name}"
        shrink = torch.randn(RANK, size_in, generator=generator)
        expand = torch.randn(size_out, RANK, generator=generator)
        weights[f"{prefix}.lora_A.weight"] = shrink / size_in**0.5
        weights[f"{prefix}.lora_B.weight"] = expand * weight.float().std() / RANK**0.5
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merge_adapter(path: Path, model: Path, adapter: Path) -> Path:
    """Save a model with an adapter added to its weights, float32."""
    delta = load_file(adapter / "adapter_model.safetensors")
    merged = _load(model)
    with torch.no_grad():
        for name, weight in _targets(merged).items():
            shrink = delta[f"base_model.model.{name}.lora_A.weight"]
            expand = delta[f"base_model.model.{name}.lora_B.weight"]
            weight += ALPHA / RANK * (expand @ shrink)
    merged.save_pretrained(path)
    copy_tokenizer(path)
    return path


def _load(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _targets(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that an adapter adds to, by the name of their module."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }
