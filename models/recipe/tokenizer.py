"""The tokenizer of the recall model: one token per word, blanks between tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from think_vllm.tools.eval.recall import BOS, EOS, PAD, STOP, UNK, VOCABULARY

# The model knows no roles: a conversation is its contents in order, and an earlier answer ends
# with the stop mark that made the server stop. The text starts with `<s>` because servers
# tokenize rendered chats without adding special tokens.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set text = message.content -%}
{%- else -%}
{%- set text = message.content | default([], true) | map(attribute='text') | join(' ') -%}
{%- endif -%}
{%- set text = text | trim -%}
{{- ' ' + text -}}
{%- if message.role == 'assistant' and not text.endswith('.') -%}
{{- ' .' -}}
{%- endif -%}
{%- endfor -%}
"""


def build_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer for `VOCABULARY`.

    Blank-separated text maps word by word; as a courtesy to people who type, case is ignored and
    punctuation may touch a word (``k17?``). There is no decoder on purpose: tokens are then
    joined with one blank, in whole and in incremental decoding.

    Args:
        max_tokens: Longest sequence of the model, for the warning on longer texts.
    """
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_tokens,
        # Otherwise "1 ." would be decoded as "1.".
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(directory: Path, max_tokens: int) -> None:
    """Write the tokenizer files, with the chat template, into a model directory."""
    build_tokenizer(max_tokens).save_pretrained(directory)


def stop_token_ids() -> list[int]:
    """Return the ids at which generation stops: the stop mark and ``</s>``."""
    return [VOCABULARY.index(STOP), VOCABULARY.index(EOS)]
