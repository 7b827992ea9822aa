"""The original guide's calls and what they rest on: histories as codes, tuples, attention; the model's named shapes, separator and users."""
import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError, RunError
from recgen.core.ragged import Ragged
from recgen.core.training import TrainSettings
from recgen.evaluation.accumulator import TopKAccumulator
from recgen.evaluation.protocol import Cases
from recgen.formats.semantic_ids import SemanticIDs
from recgen.retrieval.beam import exact_scores
from recgen.retrieval.guide import CodeDataset, build_trie, generate, generate_recommendations, history_to_tokens
from recgen.retrieval.sequences import PrefixSamples, prompt_tokens, subsampled, token_table, user_tokens
from recgen.retrieval.training import TigerTask, rank_cases, train_tiger
from recgen.retrieval.transformer import PRESETS, Tiger, TigerConfig

SIZES = [3, 2, 4]
TUPLES = torch.tensor(list(itertools.product(*map(range, SIZES))))


def small(seed=0, sizes=SIZES, **changes):
    torch.manual_seed(seed)
    shape = {"embedding_dim": 16, "attn_dim": 16, "num_heads": 2, "ff_dim": 32, "encoder_layers": 2, "decoder_layers": 1, "max_history": 5, "dropout": 0.0, **changes}
    return Tiger(TigerConfig(list(sizes), **shape)).eval()


def forced(model, tokens, codes):
    "Log-probabilities of tuples (N, L) after one prompt, by teacher forcing."
    with torch.no_grad():
        logits = model(tokens.expand(len(codes), -1), codes)
    return sum(x.log_softmax(-1).gather(1, codes[:, i : i + 1]).squeeze(1) for i, x in enumerate(logits))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(TUPLES.tolist()), max_size=8), st.integers(1, 30), st.booleans(), st.sets(st.integers(0, len(TUPLES) - 1), min_size=1))
def test_generation_says_what_teacher_forcing_says(history, k, separator, valid):
    model = small(separator=separator)
    tokens = history_to_tokens(model, history)
    assert tokens.shape == (1, min(5, len(history)) * (3 + separator))
    free, inside = generate(model, history, k, 100), model.generate_with_trie(history, build_trie(TUPLES[sorted(valid)], SIZES), k, 100)
    for found, allowed in ((free, TUPLES), (inside, TUPLES[sorted(valid)])):
        expected = forced(model, tokens, allowed).sort(descending=True).values[:k]
        n = len(expected)
        assert torch.allclose(found.scores[0, :n], expected, atol=2e-5) and (found.scores[0, n:] == -torch.inf).all()
        assert (found.codes[0, n:] == -1).all()
        assert torch.allclose(forced(model, tokens, found.codes[0, :n]), found.scores[0, :n], atol=2e-5)
        assert {tuple(c) for c in found.codes[0, :n].tolist()} <= {tuple(c) for c in allowed.tolist()}


def test_encoded_lists_tensors_and_tokens_are_one_history():
    model, history = small(), [[0, 1, 3], [2, 0, 0]]
    tokens = history_to_tokens(model, history)
    ways = [history, [torch.tensor(h) for h in history], [tuple(h) for h in history], tokens, model.encode_sequence(history)]
    assert all(generate(model, way, 4).codes.equal(generate(model, history, 4).codes) for way in ways)
    assert model.encode_sequence(history).shape == (1, 6, 16)
    assert generate_recommendations(model, history, 4) == generate(model, history, 4).codes[0].tolist()
    assert model.get_attention_weights(history).equal(model.get_attention_weights(tokens))


def test_a_trie_built_without_sizes_works_as_in_the_guide():
    model, valid = small(), torch.tensor([[0, 1, 2], [1, 0, 0]])
    found = model.generate_with_trie([[2, 1, 3]], trie=build_trie(valid), max_length=10)
    same = model.generate_with_trie([[2, 1, 3]], trie=build_trie(valid, SIZES), max_length=10)
    assert found.codes.equal(same.codes) and found.scores.equal(same.scores) and (found.codes[0, :2, 0] >= 0).all()


def test_generation_has_no_dropout_and_leaves_the_mode_alone():
    model = small(dropout=0.5).train()
    ways = [model.generate([[0, 1, 3]], 5).scores for _ in range(2)] + [model.generate(model.encode_sequence([[0, 1, 3]]), 5).scores]
    assert ways[0].equal(ways[1]) and ways[0].equal(ways[2]) and model.training
    assert model.get_attention_weights([[0, 1, 3]]).equal(model.get_attention_weights([[0, 1, 3]])) and model.training
    assert model.get_attention_weights(torch.zeros(1, 3, dtype=torch.long)).isfinite().all(), "an empty history looks at its padding"


def test_a_duplicated_tuple_comes_once_and_a_smaller_trie_gives_fewer():
    model = small()
    trie = build_trie(torch.tensor([[0, 0, 0], [0, 0, 0], [2, 1, 3]]), SIZES)
    assert sorted(generate_recommendations(model, [[0, 1, 2]], 10, trie)) == [[0, 0, 0], [2, 1, 3]]


@pytest.mark.parametrize("call, says", [
    (lambda m: m.generate([[0, 0]]), "codes that the model does not know"),
    (lambda m: m.generate([[0, 0, 9]]), "codes that the model does not know"),
    (lambda m: m.generate([[0, 0, -1]]), "codes that the model does not know"),
    (lambda m: m.generate_with_trie([[0, 0, 0]], build_trie([[0, 0, 4]])), "codes that the model does not know"),
    (lambda m: m.generate_with_trie([[0, 0, 0]], build_trie([[0, 0]])), "codes that the model does not know"),
    (lambda m: build_trie(torch.zeros(0, 3, dtype=torch.long)), "not rows of codes"),
    (lambda m: build_trie([[0, -1]]), "not rows of codes"),
    (lambda m: build_trie([[0, 4]], sizes=[1, 4]), "beyond the codebooks"),
    (lambda m: m.get_attention_weights(torch.ones(2, 3, dtype=torch.long)), "one history at a time"),
    (lambda m: TigerConfig.preset("huge", SIZES), "no such preset"),
    (lambda m: small(num_user_embeddings=4).generate([[0, 0, 0]]), "knows its users"),
])
def test_what_the_guide_refuses(call, says):
    with pytest.raises(InputError, match=says):
        call(small())


def catalogue(model, n=24):
    ids = SemanticIDs(torch.arange(1, n + 1), TUPLES[torch.randperm(len(TUPLES), generator=torch.Generator().manual_seed(1))[:n]], SIZES)
    return ids, token_table(ids, n, separator=model.config.separator)


def test_the_guides_evaluator_agrees_with_the_ranks():
    model = small(separator=True)
    ids, table = catalogue(model)
    g = torch.Generator().manual_seed(3)
    history = Ragged.from_lists([torch.randint(1, 25, (n,), generator=g).tolist() for n in (0, 1, 4, 5, 9, 2)])
    cases = Cases(torch.arange(1, 7), history, torch.randint(1, 25, (6,), generator=g), torch.zeros(6, dtype=torch.long))
    loader = torch.utils.data.DataLoader(CodeDataset(cases, model, table), batch_size=4)
    metrics = TopKAccumulator(k=[5, 10, 20]).evaluate(model, loader)
    rank = []
    for u in range(6):
        score = forced(model, prompt_tokens(model.config, table, history.select(torch.tensor([u]))), TUPLES)
        own = forced(model, prompt_tokens(model.config, table, history.select(torch.tensor([u]))), ids.codes(cases.targets[u : u + 1]))
        rank.append(int((score > own + 1e-6).sum()) + 1)
    for k in (5, 10, 20):
        assert metrics[f"recall@{k}"] == pytest.approx(sum(r <= k for r in rank) / 6)
        assert metrics[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in rank if r <= k) / 6)
    assert metrics["recall@20"] > 0


def test_attention_hides_padding_and_adds_up():
    model = small()
    tokens = torch.nn.functional.pad(history_to_tokens(model, [[0, 1, 2]]), (0, 3))
    weights = model.get_attention_weights(tokens)
    assert weights.shape == (2, 2, 6, 6) and torch.allclose(weights.sum(-1), torch.ones(2, 2, 6), atol=1e-5) and (weights[..., 3:] == 0).all()
    assert torch.allclose(weights[..., :3, :3], model.get_attention_weights(tokens[:, :3]), atol=1e-6)


# --- separator, users, presets, sub-sequences


def test_the_separator_follows_every_item_and_is_learned():
    model = small(separator=True)
    ids, table = catalogue(model)
    tokens = prompt_tokens(model.config, table, Ragged.from_lists([[3, 7], [5]]))
    assert tokens[0, [3, 7]].tolist() == [10, 10] and tokens[1].tolist()[4:] == [0] * 4 and model.embedding.num_embeddings == 11
    task = TigerTask(model, PrefixSamples.from_sequences(Ragged.from_lists([[3, 7, 5]])), table, 2)
    task.loss(model, torch.arange(2)).backward()
    assert model.embedding.weight.grad[10].abs().sum() > 0
    with pytest.raises(InputError, match="not that of the model"):
        train_tiger(TigerConfig(SIZES, separator=False), TrainSettings(epochs=1), Ragged.from_lists([[1, 2]]), table, ids.to_trie())


def test_users_have_the_same_token_in_every_process_and_change_the_ranking():
    model = small(num_user_embeddings=50)
    config = model.config
    here = user_tokens(config, torch.tensor([1, 2, 3, 10**12])).tolist()
    code = "import torch; from types import SimpleNamespace as S; from recgen.retrieval.sequences import user_tokens; " \
           f"print(user_tokens(S(sizes={SIZES}, separator=False, num_user_embeddings=50), torch.tensor([1, 2, 3, 10**12])).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(here) == there.strip() and all(10 <= t < 60 for t in here)
    ids, table = catalogue(model)
    history = Ragged.from_lists([[1, 2], [1, 2], [1, 2]])
    same = user_tokens(config, torch.arange(1, 400))
    twin = int((same[1:] == same[0]).nonzero()[0]) + 2  # another user with the token of user 1
    cases = Cases(torch.tensor([1, 2, twin]), history, torch.tensor([3, 3, 3]), torch.full((3,), 2))
    found = rank_cases(model, table, ids.to_trie(), cases, "exact")
    assert found["scores"][0].equal(found["scores"][2]) and not torch.allclose(found["scores"][0], found["scores"][1])
    reference = exact_scores(model, prompt_tokens(config, table, history, cases.users), ids.to_trie(), 24)
    assert torch.allclose(found["scores"], reference[:, 1:].sort(descending=True).values[:, :20], atol=1e-5)
    with pytest.raises(InputError, match="none are given"):
        prompt_tokens(config, table, history)


def test_training_knows_whose_sequence_it_is():
    model = small(num_user_embeddings=1000)
    _, table = catalogue(model)
    samples = PrefixSamples.from_sequences(Ragged.from_lists([[1], [2, 3, 4], [5, 6]]))
    task = TigerTask(model, samples, table, 4, users=torch.tensor([100, 7, 9]))
    assert samples.rows.tolist() == [1, 1, 2]
    tokens = task.user_tokens[samples.rows]
    assert tokens.tolist() == user_tokens(model.config, torch.tensor([7, 7, 9])).tolist()
    task.loss(model, torch.arange(3)).backward()
    moved = (model.embedding.weight.grad.abs().sum(1) > 0).nonzero().squeeze(1)
    assert set(tokens.tolist()) <= set(moved.tolist()) and int(user_tokens(model.config, torch.tensor([100]))) not in moved.tolist()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = small()
    ids, table = catalogue(model)
    def train(augmentation="prefix", **changes):
        config = TigerConfig(SIZES, 16, 16, 2, 32, 1, 1, **{"dropout": 0.0, **changes})
        return train_tiger(config, TrainSettings(epochs=1, batch_size=4, device="cpu"), Ragged.from_lists([[1, 2, 3], [4, 5]]), table, ids.to_trie(), folder=tmp_path, augmentation=augmentation)

    train()
    assert train().trained == 0, "the same run is only loaded"
    for other in ({"dropout": 0.5}, {"max_history": 3}, {"augmentation": "subsample"}):
        with pytest.raises(RunError, match="checkpoint of another run"):
            train(**other)


def test_presets_are_shapes_and_what_is_given_wins():
    for name, shape in PRESETS.items():
        config = TigerConfig.preset(name, SIZES)
        assert {k: getattr(config, k) for k in shape} == shape and config.sizes == SIZES
    paper = TigerConfig.preset("tiger", [256] * 3)
    assert (paper.embedding_dim, paper.attn_dim, paper.num_heads, paper.ff_dim, paper.encoder_layers, paper.decoder_layers) == (128, 384, 6, 1024, 4, 4)
    assert TigerConfig.preset("recipe", SIZES, dropout=0.5, encoder_layers=1).dropout == 0.5


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=8), st.integers(1, 6), st.integers(0, 5))
def test_sub_sequences_keep_every_target_once_and_touch_nothing_else(sequences, max_history, seed):
    samples = PrefixSamples.from_sequences(Ragged.from_lists(sequences), max_history)
    if not len(samples):
        return
    every = torch.arange(len(samples))
    cut = subsampled(samples, torch.Generator().manual_seed(seed))
    again = subsampled(samples, torch.Generator().manual_seed(seed))
    assert cut.lengths.equal(again.lengths) and cut.targets(every).equal(samples.targets(every))
    for short, whole in zip(cut.histories(every).tolist(), samples.histories(every).tolist(), strict=True):
        short, whole = [i for i in short if i], [i for i in whole if i]
        assert short and whole[-len(short) :] == short


def test_sub_sequences_are_drawn_anew_in_every_epoch_and_the_same_after_a_resume():
    model = small()
    _, table = catalogue(model)
    samples = PrefixSamples.from_sequences(Ragged.from_lists([list(range(1, 25))]), 20)
    task = TigerTask(model, samples, table, 8, augmentation="subsample")
    lengths = []
    for seed in (1, 2, 1):
        batches = task.batches(torch.Generator().manual_seed(seed))
        assert torch.cat(batches).sort().values.equal(torch.arange(23))
        lengths.append(task.epoch_samples.lengths)
    assert lengths[0].equal(lengths[2]) and not lengths[0].equal(lengths[1])
