"""Calibration: scores against sums written out, prompts from files and tasks, the command."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.support.models import make_llama
from think_vllm.errors import ThinkError
from think_vllm.plan.channel_tables import ModelShape, read_tables
from think_vllm.tools.calibrate.calibration import ChannelScores, score_prompts
from think_vllm.tools.calibrate.prompts import read_prompts, task_prompts
from think_vllm.tools.cli import main

SHAPE = ModelShape(
    model_type="llama", num_layers=1, num_heads=4, num_kv_heads=2, head_size=8, hidden_size=32,
    vocab_size=9,
)  # fmt: skip


def encode(text: str) -> list[int]:
    return [1, *map(len, text.split())]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("observed", [None, 3, 99])
def test_scores_are_those_of_the_paper(observed: int | None) -> None:
    scores = ChannelScores(SHAPE, observed)
    expected = torch.zeros(2, 2, 8, dtype=torch.float64)
    for seed, length in enumerate([5, 11]):
        query, answer = random(4, length, 8, seed=seed), random(4, length, 8, seed=seed + 7)
        key = random(2, length, 8, seed=seed + 20)
        scores.add(0, query, key, answer)
        first = max(0, length - (observed or length))
        for head in range(2):
            for channel in range(8):
                group = [2 * head, 2 * head + 1]
                of_queries = sum(
                    float(query[h, i, channel]) ** 2 for h in group for i in range(first, length)
                ) / (2 * (length - first))
                of_keys = sum(float(x) ** 2 for x in key[head, :, channel]) / length
                of_answers = sum(
                    float(answer[h, i, channel]) ** 2 for h in group for i in range(first, length)
                ) / (2 * (length - first))
                expected[0, head, channel] += of_queries * of_keys
                expected[1, head, channel] += of_answers
    assert torch.allclose(scores.keys[0], expected[0], rtol=1e-6)
    assert torch.allclose(scores.values[0], expected[1], rtol=1e-6)
    keys, values = scores.rankings()
    for ranked, score in ((keys, expected[0]), (values, expected[1])):
        for head in range(2):
            ordered = score[head, ranked[0][head]]
            assert sorted(ranked[0][head]) == list(range(8))
            assert (ordered[:-1] >= ordered[1:]).all()


def test_scores_that_are_no_numbers_are_rejected() -> None:
    scores = ChannelScores(SHAPE)
    part = torch.full((4, 3, 8), torch.inf)
    scores.add(0, part, part[:2] * 0, part)
    with pytest.raises(ThinkError, match="not finite; try --dtype float32"):
        scores.rankings()


def test_score_prompts_sees_queries_and_keys_of_every_layer(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "model", head_size=32, num_heads=4, num_kv_heads=2)
    plain = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = plain.config
    shape = ModelShape(
        model_type="llama", num_layers=2, num_heads=4, num_kv_heads=2, head_size=32,
        hidden_size=config.hidden_size, vocab_size=config.vocab_size,
    )  # fmt: skip
    prompts = [[1, 7, 30, 200, 4, 9], [1, 5, 6]]
    expected = torch.zeros(2, 2, 32, dtype=torch.float64)
    for tokens in prompts:
        with torch.no_grad():
            ran = plain(torch.tensor([tokens]), use_cache=True, output_hidden_states=True)
            position = torch.arange(len(tokens))[None]
            for number, layer in enumerate(plain.model.layers):
                # What the second layer sees depends on what the watched first one answers.
                hidden = layer.input_layernorm(ran.hidden_states[number])
                query = layer.self_attn.q_proj(hidden).view(1, len(tokens), 4, 32).transpose(1, 2)
                turn = plain.model.rotary_emb(hidden, position)
                query, _ = apply_rotary_pos_emb(query, query, *turn)
                key = ran.past_key_values.layers[number].keys[0]
                of_queries = query[0].double().square().mean(dim=1).view(2, 2, 32).mean(dim=1)
                expected[number] += of_queries * key.double().square().mean(dim=1)
    scores = score_prompts(str(path), shape, prompts, "float32")
    assert torch.allclose(scores.keys, expected, rtol=1e-4)


def test_read_prompts_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a bb ccc"}\n\n"dddd"\n{"text": "e ff"}\n{"prompt": "never"}\n')
    assert read_prompts(path, encode, 3, 100) == [[1, 1, 2, 3], [1, 4], [1, 1, 2]]
    # The end of a long prompt is kept: its question is there.
    assert read_prompts(path, encode, 1, 2) == [[2, 3]]


def test_read_prompts_of_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a bb ccc dddd eeeee")
    assert read_prompts(path, encode, 9, 4) == [[1, 1, 2, 3], [4, 5]]
    assert read_prompts(path, encode, 1, 4) == [[1, 1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"question": "a"}\n', "line 1 has no text: a string is needed, or an object"),
        ("p.jsonl", "a\n", "line 1 is no JSON"),
        ("p.jsonl", "\n", "has no text; a few thousand tokens"),
        ("p.txt", "", "has no text; a few thousand tokens"),
        (None, "", "No such file"),
    ],
)
def test_read_prompts_rejects(tmp_path: Path, name: str | None, text: str, message: str) -> None:
    path = tmp_path / (name or "missing.txt")
    if name is not None:
        path.write_text(text)
    with pytest.raises(ThinkError, match=message):
        read_prompts(path, encode, 8, 64)


def test_task_prompts_are_those_of_the_evaluation(recall_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recall_model)
    made = task_prompts("recall-keys", tokenizer.encode, 7, 256, seed=100)
    assert len(made) == 7
    assert all(200 < len(prompt) <= 256 for prompt in made)
    assert made == task_prompts("recall-keys", tokenizer.encode, 7, 256, seed=100)
    assert made != task_prompts("recall-keys", tokenizer.encode, 7, 256, seed=0)
    with pytest.raises(ThinkError, match="--task riddles is no task; there are needle"):
        task_prompts("riddles", tokenizer.encode, 7, 256, seed=100)


def test_calibrate_writes_a_file(recall_model, tmp_path, capsys):
    out = tmp_path / "tables.json"
    options = ["--task", "recall", "--num-prompts", "2", "--prompt-tokens", "200"]
    assert main(["calibrate", str(recall_model), *options, "--out", str(out)]) == 0
    tables = read_tables(str(out))
    assert (tables.shape.num_layers, tables.shape.head_size) == (2, 128)
    assert (tables.calibration.prompts, tables.calibration.source) == (2, "task recall, seed 100")
    assert "--kv-select static" in capsys.readouterr().out
    # The bundled model looks at few channels, and not at the same ones everywhere.
    best = {tuple(sorted(head[:64])) for layer in tables.key_channels for head in layer}
    assert len(best) == 4
    again = tmp_path / "again.json"
    assert main(["calibrate", str(recall_model), *options, "--out", str(again)]) == 0
    assert json.loads(again.read_text()) == json.loads(out.read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --prompts FILE"),
        (["--task", "recall", "--prompts", "a.txt"], "give either --prompts FILE"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt"),
        (["--task", "recall", "--out", "nowhere/tables.json"], "there is no such directory"),
    ],
)
def test_calibrate_rejects(recall_model, capsys, options, message):
    assert main(["calibrate", str(recall_model), *options]) == 2
    assert message in capsys.readouterr().err
