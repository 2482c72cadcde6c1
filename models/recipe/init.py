"""Build the model with its look-back heads already in place.

With an ordinary initialization this small a model does not find the key match within a thousand
steps: it confuses even three records. The initialization below hands it the two circuits that
recall needs, as a starting point; everything is trained afterwards.

- Layer 0 looks back by a fixed distance (1, 2, 3, 4 tokens, one per query head). One token back
  from the ``?`` of a question is the key; two back from the first digit of a record is the key.
- Layer 1 matches what layer 0 wrote, by content, on the slow RoPE pairs only. How many pairs carry
  the match decides how many key channels can be pruned without loss.
"""

from __future__ import annotations

import math

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from think_vllm.tools.eval.recall import BOS, EOS, PAD, VOCABULARY

from .tokenizer import stop_token_ids

MAX_TOKENS = 2048
NUM_LAYERS = 2
NUM_QUERY_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 128
CONTENT_PAIRS = 22
"""RoPE pairs that start with the content match in layer 1, of `HEAD_DIM` / 2."""

_ROPE_THETA = 5e5
_EMBEDDING_STD = 0.3
_CONSTANT = 1.5
"""Embedding channel 0 of every token: a direction that all tokens share and RMSNorm keeps."""
_CONTENT_STD = 0.08
# At the usual 0.02 what layer 0 writes is too faint beside the embeddings for layer 1 to match.
_OTHER_STD = 0.05


def build_config() -> LlamaConfig:
    """Return the configuration: 2 layers, 4 query heads over 2 KV heads of 128, 688,768 weights."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_QUERY_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        rms_norm_eps=1e-6,
        initializer_range=_OTHER_STD,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
    )


def build_model(seed: int, content_pairs: int = CONTENT_PAIRS) -> LlamaForCausalLM:
    """Return an untrained float32 model with look-back heads.

    Args:
        seed: Seeds torch's global generator.
        content_pairs: RoPE pairs that carry the content match, 1 to `HEAD_DIM` / 2.

    Raises:
        ValueError: If `content_pairs` is out of range.
    """
    if not 1 <= content_pairs <= HEAD_DIM // 2:
        raise ValueError(f"content_pairs: expected 1 to {HEAD_DIM // 2}, got {content_pairs}")
    torch.manual_seed(seed)
    config = build_config()
    model: LlamaForCausalLM = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=stop_token_ids(),
    )
    with torch.no_grad():
        _set_embeddings(model)
        _set_look_back(model)
        for layer in range(1, NUM_LAYERS):
            _set_content_match(model, layer, content_pairs)
    return model


def rope_frequencies() -> torch.Tensor:
    """Return the angle per token of each RoPE pair, [HEAD_DIM / 2] float32, fast to slow.

    Pair ``i`` is made of the channels ``i`` and ``i + HEAD_DIM / 2``.
    """
    return _ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def _set_embeddings(model: LlamaForCausalLM) -> None:
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0.0, _EMBEDDING_STD)
    embeddings[:, 0] = _CONSTANT


def _set_look_back(model: LlamaForCausalLM) -> None:
    """Make query head h of layer 0 attend h + 1 tokens back.

    The constant channel feeds a vector of length g into some RoPE pairs of the keys, and the same
    vector turned back by ``offset`` tokens into the queries. The logit at distance d is then
    g^2 * sum(cos((d - offset) * frequency)), which peaks at d = offset.
    """
    frequencies = rope_frequencies()
    half = HEAD_DIM // 2
    attention = model.model.layers[0].self_attn
    # Channel 0 after RMSNorm; the other channels of an embedding have mean square std^2.
    constant = _CONSTANT / math.sqrt(_EMBEDDING_STD**2 + _CONSTANT**2 / model.config.hidden_size)
    sharp = frequencies > 0.05
    soft = (frequencies < 0.2) & (frequencies > 0.01)
    for kv_head, (pairs, peak_logit) in enumerate(((sharp, 24.0), (soft, 12.0))):
        amplitude = math.sqrt(peak_logit * math.sqrt(HEAD_DIM) / int(pairs.sum())) / constant
        chosen = amplitude * pairs
        key_row = kv_head * HEAD_DIM
        attention.k_proj.weight[key_row : key_row + HEAD_DIM, 0] = torch.cat(
            (chosen, torch.zeros(half))
        )
        for query_head in (2 * kv_head, 2 * kv_head + 1):
            angle = (query_head + 1) * frequencies
            query_row = query_head * HEAD_DIM
            attention.q_proj.weight[query_row : query_row + HEAD_DIM, 0] = torch.cat(
                (chosen * angle.cos(), -chosen * angle.sin())
            )
    # "Two back" in a record and "one back" in a question have to write the key alike, so that
    # layer 1 can match them.
    output = attention.o_proj.weight
    output[:, HEAD_DIM : 2 * HEAD_DIM] = output[:, :HEAD_DIM]


def _set_content_match(model: LlamaForCausalLM, layer: int, content_pairs: int) -> None:
    """Give keys and queries of a layer the same projection on the slowest RoPE pairs.

    The constant channel is left out, since it matches everything.
    """
    attention = model.model.layers[layer].self_attn
    half = HEAD_DIM // 2
    group = NUM_QUERY_HEADS // NUM_KV_HEADS
    slow = torch.arange(half - content_pairs, half)
    rows = torch.cat((slow, slow + half))
    for kv_head in range(NUM_KV_HEADS):
        projection = torch.randn(len(rows), model.config.hidden_size) * _CONTENT_STD
        projection[:, 0] = 0.0
        attention.k_proj.weight[kv_head * HEAD_DIM + rows] = projection
        for query_head in range(kv_head * group, (kv_head + 1) * group):
            attention.q_proj.weight[query_head * HEAD_DIM + rows] = projection
