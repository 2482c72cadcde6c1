"""Models that cannot be served are rejected by their configuration, with the reason."""

import pytest

from tests.plugin.test_rejections import SMALL, rejected
from tests.support.models import make_config

HEADS = {**SMALL, "head_dim": 64}
pytestmark = pytest.mark.usefixtures("inspect_here")
#: Settings that differ from ``SMALL``, by architecture and model type.
MODELS: list[tuple[str, str, dict[str, object], str]] = [
    (
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
        | {"q_lora_rank": None},
        "multi-head latent attention (MLA)",
    ),
    ("LlamaForCausalLM", "llama", {"head_dim": 320}, "head size is 320"),
    (
        "MistralForCausalLM",
        "mistral",
        {"sliding_window": 256},
        "all its layers have a sliding window (256 tokens), so there is nothing old to compact",
    ),
    (
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 2},
        "all its layers have a sliding window (4096 tokens)",
    ),
    (
        "Llama4ForCausalLM",
        "llama4_text",
        {"intermediate_size_mlp": 64},
        "it has chunked attention layers",
    ),
    (
        "Gemma3nForCausalLM",
        "gemma3n_text",
        {"num_hidden_layers": 5, "num_kv_shared_layers": 2},
        "its layers share one another's KV cache",
    ),
    (
        "WhisperForConditionalGeneration",
        "whisper",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "pad_token_id": 0, "begin_suppress_tokens": None},
        "it is an encoder-decoder model",
    ),
    (
        "PaliGemmaForConditionalGeneration",
        "paligemma",
        {"text_config": {**HEADS, "model_type": "gemma"}},
        "its attention over images is bidirectional",
    ),
    ("JambaForCausalLM", "jamba", {}, "mixes attention with state-space or linear layers"),
    (
        "Qwen3NextForCausalLM",
        "qwen3_next",
        {"num_hidden_layers": 4},
        "it mixes attention with state-space or linear layers",
    ),
    ("MambaForCausalLM", "mamba", {}, "it has no attention layers"),
    ("FalconForCausalLM", "falcon", {"alibi": True}, "ALiBi"),
    ("BloomForCausalLM", "bloom", {"n_layer": 2, "n_head": 4}, "ALiBi"),
]


@pytest.mark.parametrize(
    ("architecture", "model_type", "settings", "message"), MODELS, ids=[row[1] for row in MODELS]
)
def test_models_are_rejected(tmp_path, architecture, model_type, settings, message, capsys):
    model = make_config(tmp_path, model_type, **SMALL | settings, architectures=[architecture])
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
    tmp_path, cpu, arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr("think_vllm.hooks.engine_support.is_cpu", lambda: cpu)
    monkeypatch.setattr("think_vllm.hooks.engine_support.check_device", lambda vllm_config: None)
    shape = {**HEADS, "architectures": ["Gemma2ForCausalLM"]}
    model = make_config(tmp_path, "gemma2", **shape)
    assert message in rejected(capsys, model, "--kv-channel-prune", "0.5", *arguments)
