"""Policies against formulas as published, and what is chosen by them."""

import random
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from think_vllm.kernels.reference.scoring import key_scores_ref, query_energy_ref, top_channels_ref
from think_vllm.plan.block_plan import BlockPlan, span_rule
from think_vllm.plan.settings import ThinkConfig
from think_vllm.worker.channel_selection import ChannelSelector, count_sources, top_channels
from think_vllm.worker.heads import RankHeads, rank_heads
from think_vllm.worker.policies import POLICIES, LayerHeads

D, TOKENS, WINDOW = 64, 90, 32
HEADS = LayerHeads(layer=3, first=4, count=2, head_size=D)


def make_plan(select: str = "think", keys: int = 24, values: int = D) -> BlockPlan:
    config = ThinkConfig.model_validate(
        {
            "kv_channel_prune": 1 - keys / D,
            "kv_value_prune": min(0.8, 1 - values / D),
            "kv_select": select,
        }
    )
    return BlockPlan(config, D, keys, values, span_rule(config, 16, 4, 3), 22, 2)


def some_tokens(heads: int, seed: int = 0) -> torch.Tensor:
    """Tokens whose channels differ in size: [heads, TOKENS, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(heads, 1, D, generator=generator) * 3
    return torch.randn(heads, TOKENS, D, generator=generator) * sizes


def authors_choice(query: torch.Tensor, keys: torch.Tensor, pruned: int) -> torch.Tensor:
    """Channels that ThinK's authors keep, as the formula of section 3.2: bool [H, D].

    One query head per KV head. The Frobenius norm of ``Q[:, i] K[:, i]^T``, whose rank is one, is
    the product of two lengths; as long as nothing is left out, sums and means rank alike.
    """
    kept = torch.ones(keys.shape[0], D, dtype=torch.bool)
    for head in range(keys.shape[0]):
        norms = torch.stack(
            [
                torch.linalg.matrix_norm(
                    torch.outer(query[head, -WINDOW:, i].double(), keys[head, :, i].double())
                )
                for i in range(D)
            ]
        )
        kept[head, norms.argsort()[:pruned]] = False
    return kept


def kvpress_choice(query: torch.Tensor, keys: torch.Tensor, pruned: int) -> torch.Tensor:
    """The same for groups: squares of queries are averaged over the heads that share a KV head."""
    squares = query[:, -WINDOW:].double().pow(2).mean(dim=1)
    of_groups = torch.stack([part.mean(dim=0) for part in squares.chunk(keys.shape[0])])
    score = of_groups * keys.double().pow(2).mean(dim=1)
    kept = torch.ones_like(score, dtype=torch.bool)
    return kept.scatter_(1, score.topk(pruned, dim=1, largest=False).indices, False)


def chosen(select: str, query: torch.Tensor, keys: torch.Tensor, heads: LayerHeads) -> torch.Tensor:
    """What a layer keeps of a prompt, from its queries [Hq, n, D] and keys: bool [Hk, D]."""
    plan = make_plan(select)
    windows = torch.zeros(1, count_sources(plan), heads.count, D)
    if windows.shape[1]:
        energy = query_energy_ref(query[:, -WINDOW:].transpose(0, 1), heads.count)
        windows[0, 0] = energy.float()
    energy = keys.square().mean(dim=1)[None]
    selector = ChannelSelector(plan, heads)
    found = selector.select(windows, energy if selector.uses_keys else None).channels[0]
    assert found.dtype == torch.uint8
    return torch.zeros(heads.count, D, dtype=torch.bool).scatter_(1, found.long(), True)


@pytest.mark.parametrize("seed", range(5))
def test_think_of_one_query_head_each_is_that_of_the_paper(seed: int) -> None:
    query, keys = some_tokens(2, seed), some_tokens(2, seed + 100)
    expected = authors_choice(query, keys, D - 24)
    assert torch.equal(chosen("think", query, keys, HEADS), expected)
    # The test can tell: other policies, and a window of another length, choose otherwise.
    assert not torch.equal(chosen("key-norm", query, keys, HEADS), expected)
    assert not torch.equal(authors_choice(keys, query, D - 24), expected)


@pytest.mark.parametrize("seed", range(5))
def test_think_of_groups_is_that_of_kvpress(seed: int) -> None:
    query, keys = some_tokens(8, seed), some_tokens(2, seed + 100)
    expected = kvpress_choice(query, keys, D - 24)
    assert torch.equal(chosen("think", query, keys, HEADS), expected)


def test_key_norm_ignores_queries() -> None:
    query, keys = some_tokens(4), some_tokens(2, 1)
    expected = torch.zeros(2, D, dtype=torch.bool)
    expected.scatter_(1, torch.linalg.vector_norm(keys, dim=1).topk(24, dim=1).indices, True)
    assert torch.equal(chosen("key-norm", query, keys, HEADS), expected)
    assert torch.equal(chosen("key-norm", -3 * query.flip(2), keys, HEADS), expected)


def test_random_is_seeded_by_seed_layer_and_head() -> None:
    keys = some_tokens(2)
    first = chosen("random", keys, keys, HEADS)
    # Predicted without the package: the channels with the highest of D numbers.
    drawn = random.Random("0 3 5 keys")
    numbers = [drawn.random() for _ in range(D)]
    best = sorted(range(D), key=lambda i: -numbers[i])[:24]
    assert first[1].nonzero()[:, 0].tolist() == sorted(best)
    # Another prompt, or a rank that has the second head alone, keeps the same.
    other = some_tokens(2, 7)
    assert torch.equal(chosen("random", other, other, HEADS), first)
    alone = LayerHeads(3, 5, 1, D)
    assert torch.equal(chosen("random", other[:1], other[:1], alone), first[1:])
    for changed in (LayerHeads(4, 4, 2, D), LayerHeads(3, 0, 2, D), LayerHeads(3, 4, 2, D, 1)):
        assert not torch.equal(chosen("random", keys, keys, changed), first)


@pytest.mark.parametrize("select", POLICIES)
def test_policies_are_the_references(select: str) -> None:
    energies = [some_tokens(2, seed).square().mean(dim=1)[None] for seed in (0, 1)]
    policy = POLICIES[select](ThinkConfig(), HEADS)
    scores = policy.score_keys(*energies).expand(1, 2, D)
    expected = key_scores_ref(select, *energies, layer=3, first_head=4)
    assert torch.equal(scores, expected.float())


def test_policies_are_those_of_the_flag() -> None:
    # Static channels are scored before there is an engine: see think_vllm/tools/calibrate/.
    wanted = (*POLICIES, "static")
    assert ThinkConfig.model_fields["kv_select"].annotation.__args__ == wanted


@pytest.mark.parametrize(
    ("select", "keys", "values", "sources", "mass"),
    [
        ("think", 24, D, 1, True),
        ("think", 24, 32, 2, True),
        ("think", D, 32, 1, False),
        ("key-norm", 24, D, 0, True),
        ("key-norm", 24, 32, 1, True),
        ("random", 24, D, 0, False),
        ("random", 24, 32, 0, False),
        ("random", D, 32, 0, False),
    ],
)
def test_nothing_is_summed_up_that_a_policy_does_not_use(select, keys, values, sources, mass):
    plan = make_plan(select, keys, values)
    assert count_sources(plan) == sources
    selector = ChannelSelector(plan, HEADS)
    query, output = torch.zeros(3, 4, D), torch.ones(3, 4, D)
    summed = selector.sources(query, output)
    assert len(summed) == sources
    uses_queries = select == "think" and keys < D
    assert any(x is query for x in summed) == uses_queries
    assert any(x is output for x in summed) == (values < D and select != "random")
    assert selector.uses_keys == (keys < D and select != "random")
    # Two prompts, of which the window's last source decides about values.
    windows = torch.rand(2, sources, 2, D, generator=torch.Generator().manual_seed(0))
    energy = torch.rand(2, 2, D, generator=torch.Generator().manual_seed(1))
    choice = selector.select(windows, energy if selector.uses_keys else None)
    assert choice.channels.shape == (2, 2, plan.kept_channels)
    assert (choice.scores is not None) == mass
    if values < D and select != "random":
        expected = top_channels_ref(windows[:, -1], values)
        assert torch.equal(choice.channels[:, :, keys:], expected)
    if keys == D:
        assert (choice.channels[:, :, :D] == torch.arange(D)).all()


def test_chooser_rejects_what_is_missing() -> None:
    selector = ChannelSelector(make_plan(), HEADS)
    with pytest.raises(ValueError, match="keys is None; --kv-select think needs their energy"):
        selector.select(torch.zeros(1, 1, 2, D), None)
    with pytest.raises(ValueError, match=r"windows is .1, 2, 2, 64.; expected .n, 1, Hk, D."):
        selector.select(torch.zeros(1, 2, 2, D), torch.zeros(1, 2, D))


@pytest.mark.parametrize("count", [1, 31, 64])
def test_top_channels(count: int) -> None:
    # Whole numbers, so that there are many ties.
    scores = torch.randint(0, 9, (3, 2, D), generator=torch.Generator().manual_seed(0)).float()
    found = top_channels(scores, count)
    assert found.dtype == torch.uint8
    assert torch.equal(found, top_channels_ref(scores, count))


def test_top_channels_by_hand() -> None:
    # Of equal scores the lower channel is kept.
    scores = torch.tensor([[[4.0, 6.0, 6.0, 1.0], [0.0, 0.0, 2.0, 0.0]]])
    assert top_channels(scores, 1).tolist() == [[[1], [2]]]
    assert top_channels(scores, 2).tolist() == [[[1, 2], [0, 2]]]
    assert top_channels(scores, 3).tolist() == [[[0, 1, 2], [0, 1, 2]]]


def test_top_channels_rejects() -> None:
    with pytest.raises(ValueError, match=r"score is .1, 2, 64., count is 65"):
        top_channels(torch.zeros(1, 2, D), 65)
    with pytest.raises(ValueError, match=r"score is .2, 64., count is 3; expected .n, Hk, D."):
        top_channels(torch.zeros(2, D), 3)


@pytest.mark.parametrize(
    ("rank", "ranks", "total", "first"),
    [(0, 1, 8, 0), (1, 2, 8, 4), (3, 4, 8, 6), (0, 4, 2, 0), (1, 4, 2, 0), (2, 4, 2, 1)],
)
def test_heads_of_a_rank(rank: int, ranks: int, total: int, first: int) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total, seed=5),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    count = max(1, total // ranks)
    with patch("think_vllm.worker.heads.get_tensor_model_parallel_rank", return_value=rank):
        heads = rank_heads(config, count, D)  # type: ignore[arg-type]  # stands for vLLM's
    name = "language_model.model.layers.31.self_attn.attn"
    assert heads.of_layer(name) == LayerHeads(31, first, count, D, 5)


@pytest.mark.parametrize("name", ["model.attn", "layers.1.mtp.2.attn"])
def test_layer_without_its_number(name: str) -> None:
    with pytest.raises(ValueError, match="expected one with the layer's number"):
        RankHeads(0, 1, D, 0).of_layer(name)
