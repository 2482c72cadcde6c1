"""Small models with random weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.conftest import REPOSITORY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BUNDLED = REPOSITORY / "models" / "tiny-recall"


def make_llama(
    path: Path,
    *,
    head_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    num_layers: int = 2,
    **settings: Any,
) -> Path:
    """Save a Llama with random weights and the bundled model's tokenizer.

    Weights are larger than at a usual initialization: attention is then far from uniform, and
    a wrong key shows in the output.
    """
    torch.manual_seed(0)
    shape = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    shape |= {"num_hidden_layers": num_layers, "head_dim": head_size}
    config = LlamaConfig(**SMALL, **shape, tie_word_embeddings=False, **settings)
    LlamaForCausalLM(config).save_pretrained(path)
    copy_tokenizer(path)
    return path


def make_model(path: Path, model_type: str, **settings: Any) -> Path:
    """Save a model of any family, as ``make_llama`` does.

    Biases, weights of norms and sinks, which families initialize as zeros or ones, are random too:
    otherwise leaving one out would change nothing.
    """
    torch.manual_seed(0)
    usual = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **SMALL | usual | {"pad_token_id": 0} | settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    copy_tokenizer(path)
    return path


def make_exact_llama(
    path: Path,
    *,
    head_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    num_layers: int = 1,
    key_bias: float = 0.0,
    **settings: Any,
) -> Path:
    """Save a Llama whose keys and values are the same bits wherever they are computed.

    Codes are rounded, so a key that differs by 1e-7 between two implementations now and then
    differs by a whole step when it is quantized: some 1e-3 of a log-probability, ten times what a
    comparison should let pass. Here nothing is rounded before it is quantized:

    * embeddings are 1 or -1, so normalization divides by exactly 1;
    * weights of keys and values are multiples of 2 ** -10, so their sums are exact in any order;
    * rotary positions turn the first pair of channels only, whose keys are 0: in float32 this
      base is infinite, and all other frequencies are 0.

    With a ``key_bias``, a multiple of 2 ** -10, one key channel in 16 has it, much as in Qwen2.

    That goes for the first layer: a second one sees its rounded attention.
    """
    heads = {"head_size": head_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    rope = {"rope_type": "default", "rope_theta": 1e300}
    exact = {"rms_norm_eps": 1e-12, "rope_parameters": rope, "attention_bias": key_bias != 0}
    make_llama(path, num_layers=num_layers, **heads, **exact, **settings)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.where(embedding < 0, -1.0, 1.0))
        for weight in (attention.k_proj.weight, attention.v_proj.weight):
            weight.copy_((weight * 1024).round() / 1024)
        keys = attention.k_proj.weight.view(num_kv_heads, head_size, -1)
        keys[:, [0, head_size // 2]] = 0.0
        if key_bias:
            attention.k_proj.bias.view(num_kv_heads, head_size)[:, 15::16] = key_bias
    model.save_pretrained(path)
    return path


def make_config(path: Path, model_type: str, **settings: Any) -> Path:
    """Save a model's configuration alone: enough for a server to reject it."""
    config = AutoConfig.for_model(model_type, **settings)
    config.save_pretrained(path)
    copy_tokenizer(path)
    return path


def copy_tokenizer(path: Path) -> None:
    """Copy the bundled model's tokenizer into another model."""
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / name, path / name)
