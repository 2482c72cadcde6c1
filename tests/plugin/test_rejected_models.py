"""Models that cannot be served are rejected by their configuration, with the reason."""

from pathlib import Path

import pytest

from tests.plugin.test_rejections import SMALL, rejected
from tests.support.models import make_config

HEADS = {**SMALL, "num_key_value_heads": 2, "head_dim": 64}


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        (
            "deepseek_v2",
            {
                **SMALL,
                "kv_lora_rank": 32,
                "qk_rope_head_dim": 16,
                "qk_nope_head_dim": 16,
                "v_head_dim": 16,
                "q_lora_rank": None,
                "num_key_value_heads": 4,
                "architectures": ["DeepseekV2ForCausalLM"],
            },
            "multi-head latent attention (MLA)",
        ),
        (
            "llama",
            {
                **SMALL,
                "head_dim": 320,
                "num_key_value_heads": 2,
                "architectures": ["LlamaForCausalLM"],
            },
            "head size is 320",
        ),
        (
            "mistral",
            {
                **SMALL,
                "num_key_value_heads": 2,
                "sliding_window": 256,
                "architectures": ["MistralForCausalLM"],
            },
            "all its layers have a sliding window (256 tokens), so there is nothing old to compact",
        ),
        (
            "gemma3_text",
            {
                **HEADS,
                "layer_types": ["sliding_attention"] * 2,
                "architectures": ["Gemma3ForCausalLM"],
            },
            "all its layers have a sliding window (4096 tokens)",
        ),
        (
            "llama4_text",
            {**HEADS, "intermediate_size_mlp": 64, "architectures": ["Llama4ForCausalLM"]},
            "it has chunked attention layers",
        ),
        (
            "gemma3n_text",
            {
                **HEADS,
                "num_hidden_layers": 5,
                "num_kv_shared_layers": 2,
                "architectures": ["Gemma3nForCausalLM"],
            },
            "its layers share one another's KV cache",
        ),
        (
            "whisper",
            {
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "vocab_size": 384,
                "pad_token_id": 0,
                "begin_suppress_tokens": None,
                "architectures": ["WhisperForConditionalGeneration"],
            },
            "it is an encoder-decoder model",
        ),
        (
            "paligemma",
            {
                "text_config": {**HEADS, "model_type": "gemma"},
                "architectures": ["PaliGemmaForConditionalGeneration"],
            },
            "its attention over images is bidirectional",
        ),
        (
            "jamba",
            {**HEADS, "architectures": ["JambaForCausalLM"]},
            "it mixes attention with state-space or linear layers",
        ),
        (
            "qwen3_next",
            {**HEADS, "num_hidden_layers": 4, "architectures": ["Qwen3NextForCausalLM"]},
            "it mixes attention with state-space or linear layers",
        ),
        (
            "mamba",
            {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "vocab_size": 384,
                "architectures": ["MambaForCausalLM"],
            },
            "it has no attention layers",
        ),
        (
            "falcon",
            {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 384,
                "alibi": True,
                "architectures": ["FalconForCausalLM"],
            },
            "ALiBi",
        ),
        (
            "bloom",
            {
                "hidden_size": 64,
                "n_layer": 2,
                "n_head": 4,
                "vocab_size": 384,
                "architectures": ["BloomForCausalLM"],
            },
            "ALiBi",
        ),
    ],
    ids=[
        "mla",
        "head-size",
        "windows-only",
        "windows-only-by-layer",
        "chunked",
        "shared-kv",
        "encoder-decoder",
        "prefix-lm",
        "state-space",
        "linear",
        "attention-free",
        "alibi-falcon",
        "alibi",
    ],
)
def test_models_are_rejected(
    tmp_path: Path,
    model_type: str,
    settings: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_config(tmp_path, model_type, **settings)
    assert message in rejected(capsys, model, "--kv-channel-prune", "0.5")


@pytest.mark.parametrize(
    ("cpu", "arguments", "message"),
    [
        (True, ["--disable-hybrid-kv-cache-manager"], "do not support --disable-hybrid-kv-cache"),
        (False, [], "on NVIDIA GPUs (CUDA): some of its layers have a sliding window"),
    ],
    ids=["one-group", "cuda"],
)
def test_windows_are_rejected_where_they_have_no_group_of_their_own(
    tmp_path: Path,
    cpu: bool,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("think_vllm.hooks.engine_support.is_cpu", lambda: cpu)
    monkeypatch.setattr("think_vllm.hooks.engine_support.check_device", lambda vllm_config: None)
    shape = {**HEADS, "architectures": ["Gemma2ForCausalLM"]}
    model = make_config(tmp_path, "gemma2", **shape)
    assert message in rejected(capsys, model, "--kv-channel-prune", "0.5", *arguments)
