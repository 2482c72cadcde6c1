"""Small models with random weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tests.conftest import REPOSITORY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BUNDLED = REPOSITORY / "models" / "tiny-recall"


def make_llama(
    path: Path, *, head_size: int, num_heads: int, num_kv_heads: int, num_layers: int = 2
) -> Path:
    """Save a Llama with random weights and the bundled model's tokenizer.

    Weights are larger than at a usual initialization: attention is then far from uniform, and
    a wrong key shows in the output.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        vocab_size=384,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    copy_tokenizer(path)
    return path


def make_config(path: Path, model_type: str, **settings: Any) -> Path:
    """Save a model's configuration alone: enough for a server to refuse it."""
    config = AutoConfig.for_model(model_type, **settings)
    config.save_pretrained(path)
    copy_tokenizer(path)
    return path


def copy_tokenizer(path: Path) -> None:
    """Copy the bundled model's tokenizer into another model."""
    for name in TOKENIZER_FILES:
        shutil.copy(BUNDLED / name, path / name)
