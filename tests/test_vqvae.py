"The VQ-VAE of click features: its loss, codes that no batch changes, trained weights and no others, what it refuses."
import copy
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recgen.clicks.vqvae import (
    SharedCodebook,
    VqVae,
    VqVaeConfig,
    catalogue_figures,
    load_vqvae,
    perplexity,
    save_vqvae,
    train_vqvae,
    vqvae_config,
    vqvae_loss,
)
from recgen.core.errors import InputError, ParameterError, RunError
from recgen.core.files import read_torch, write_torch
from recgen.core.training import TrainSettings
from recgen.formats.embeddings import load_embeddings
from recgen.quantization.codebook import Codebook
from recgen.quantization.scaling import column_scale, standardized

def scaled(model, x):
    "What the encoder is given."
    return standardized(x, model.mean, model.scale)


def vectors(n=400, width=20, rank=5, seed=0):
    "Vectors near a curved surface, off the origin, with a constant column."
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, rank, generator=g)
    x = torch.cat([hidden, hidden.square()], 1) @ torch.randn(2 * rank, width, generator=g) + 2
    x[:, 3] = 7.0
    return x


def config(**changes):
    return VqVaeConfig(**{"width": 20, "hidden": 32, "tokens": 4, "code_dim": 6, "n_embed": 24, **changes})


def settings(**changes):
    return TrainSettings(**{"epochs": 6, "batch_size": 64, "learning_rate": 3e-3, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def trained():
    return train_vqvae(config(), settings(epochs=15), vectors()).load_best()


# --- shape and loss


def test_the_original_has_about_135_million_parameters():
    with torch.device("meta"):
        model = VqVae(vqvae_config("original", 1024))
    assert sum(p.numel() for p in model.encoder.parameters()) == 1024 * 512 + 512 * 512 * 256
    book = model.codebook.vectors
    assert book.shape == (1024, 256)
    assert sum(p.numel() for p in model.parameters()) == 135_528_448
    c = vqvae_config("default", 384)
    assert (c.tokens, c.hidden, c.n_embed, c.alpha, c.beta) == (32, 512, 1024, 0.5, 0.1)
    assert vqvae_config("original", 7, tokens=3).tokens == 3
    for wrong in (lambda: vqvae_config("huge", 8), lambda: config(tokens=0), lambda: config(beta=-1)):
        with pytest.raises(ParameterError):
            wrong()


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_shared_codebook_learns_as_the_codebook_of_quantization(use_ema):
    torch.manual_seed(0)
    one, other = SharedCodebook(12, 5, use_ema, check_every=3), Codebook(12, 5, use_ema, check_every=3)
    one.place(torch.arange(6, 12), torch.full((6, 5), 50.0), torch.full((6,), 1e-3))  # these are far from everything
    other.load_state_dict(one.state_dict())
    one.train()
    for _ in range(9):
        z = torch.randn(40, 5)
        codes = one(z).codes[:, 0]
        other.observe(z, codes)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert int(one.restarts) > 0


def test_loss_by_hand():
    "MSE + α‖sg z_e − z_q‖² + β‖z_e − sg z_q‖², straight-through: values and gradients against autograd's of the plain formula."
    torch.manual_seed(0)
    model, x = VqVae(config(use_ema=False, alpha=0.5, beta=0.1, dead_share=0)), torch.randn(10, 20)
    z = model.encoder(x).view(-1, 6)
    codes = torch.cdist(z, model.codebook.vectors).argmin(1)
    q = model.codebook.vectors[codes]
    recon = (model.decoder((z + (q - z).detach()).view(10, -1)) - x).square().mean()
    expected = recon + 0.5 * (z.detach() - q).square().mean() + 0.1 * (z - q.detach()).square().mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss, own_recon, vq = vqvae_loss(model, x, model.config)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.allclose(loss, expected) and torch.allclose(own_recon, recon) and torch.allclose(vq, expected - recon, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients, found, strict=True))
    assert model(x)[3].view(-1).equal(codes)


def test_running_means_have_no_codebook_loss():
    model = VqVae(config(use_ema=True))
    x = torch.randn(10, 20)
    _, codebook, commitment, _ = model(x)
    assert not codebook.any() and commitment.min() > 0
    assert "codebook.vectors" not in dict(model.named_parameters())


def test_perplexity_counts_codes_used_as_evenly():
    assert perplexity(torch.tensor([5, 5, 0, 5])) == pytest.approx(3)
    assert perplexity(torch.tensor([[9, 0], [1, 1]])).tolist() == pytest.approx([1, 2])


# --- learning


@pytest.mark.parametrize("use_ema", [True, False])
def test_it_learns_and_says_so(use_ema):
    x = vectors()
    trainer = train_vqvae(config(use_ema=use_ema), settings(epochs=25), x, valid_share=0.2)
    records, model = trainer.position.records, trainer.load_best()
    codes = model.encode(x)
    explained = model.explained_variance(x, codes)
    assert explained > (0.6 if use_ema else 0.5) > records[0]["catalogue/explained_variance"]
    best = records[trainer.best.epoch - 1]
    assert best["valid/explained_variance"] == trainer.best.value == max(r["valid/explained_variance"] for r in records)
    assert best["catalogue/explained_variance"] == pytest.approx(explained, abs=2e-3)
    counts = torch.bincount(codes.view(-1), minlength=24)
    assert best["catalogue/perplexity"] == pytest.approx(float(perplexity(counts)), rel=0.02)
    assert best["catalogue/use"] == pytest.approx(float((counts > 0).float().mean()), abs=0.05) and best["catalogue/use"] > 0.8
    assert 1 < best["catalogue/token_perplexity"] <= best["catalogue/perplexity"]
    assert best["valid/explained_variance"] != best["catalogue/explained_variance"]
    x = scaled(model, vectors())
    by_hand = 1 - (scaled(model, model.decode(codes)) - x).square().sum() / x.square().sum()
    assert explained == pytest.approx(float(by_hand), abs=1e-5)


def test_held_out_items_are_not_trained_on():
    x = vectors()
    trainer = train_vqvae(config(), settings(epochs=1), x, valid_share=0.25)
    task = trainer.task
    assert int(task.held_out.sum()) == 100 and not task.held_out[torch.cat(task.batches(torch.Generator().manual_seed(0)))].any()
    figures = catalogue_figures(trainer.module.eval(), task.x, task.held_out)
    own = trainer.module.explained_variance(x[task.held_out])
    assert figures["valid/explained_variance"] == pytest.approx(own, abs=1e-2)


def test_dead_codes_restart():
    x = vectors()
    torch.manual_seed(0)
    used = {}
    for share in (0.0, 0.1):
        model = VqVae(config(dead_share=share, use_ema=False), *column_scale(x, True)).train()
        model.codebook.place(torch.arange(4, 24), torch.full((20, 6), 1e3), torch.ones(20))  # far from everything
        data, optimizer = scaled(model, x), torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            vqvae_loss(model, data[torch.randperm(len(data))[:64]], model.config)[0].backward()
            optimizer.step()
        used[share] = catalogue_figures(model.eval(), data, torch.zeros(len(data), dtype=torch.bool))["catalogue/use"]
    assert used[0.0] <= 4 / 24 and used[0.1] > 0.6, used


def test_start_places_the_codebook_among_the_latents():
    x = vectors()
    model = train_vqvae(config(), settings(epochs=1, learning_rate=1e-9), x).module
    assert catalogue_figures(model.eval(), scaled(model, x), torch.zeros(len(x), dtype=torch.bool))["catalogue/use"] == 1.0


def test_equal_trainings_and_a_resumed_one_are_equal(tmp_path):
    class Breaks:
        def info(self, line):
            if line.startswith("Epoch 3:"):
                raise ZeroDivisionError("the power went out")

    x = vectors()
    one, other = (train_vqvae(config(), settings(), x).module.state_dict() for _ in range(2))
    with pytest.raises(ZeroDivisionError):
        train_vqvae(config(), settings(), x, tmp_path, log=Breaks())
    resumed = train_vqvae(config(), settings(), x, tmp_path)
    assert resumed.resumed_from == (3, 0)
    third = resumed.module.state_dict()
    assert all(one[k].equal(other[k]) and one[k].equal(third[k]) for k in one)
    with pytest.raises(RunError, match="checkpoint of another run"):
        train_vqvae(config(tokens=5), settings(), x, tmp_path)
    with pytest.raises(RunError, match="checkpoint of another run"):
        train_vqvae(config(), settings(), x, tmp_path, fingerprint={"vectors": "others"})


# --- codes


def test_codes_are_those_of_the_trained_weights_and_fresh_ones_give_others(tmp_path):
    "The original encoded with weights that it had never loaded. Here: the kept epoch's, not the last's, not fresh ones, which are refused."
    x = vectors()
    trainer = train_vqvae(config(), settings(epochs=8, learning_rate=0.02, early_stop_min_delta=0.9), x, tmp_path)
    assert trainer.best.epoch == 1, "only the first epoch counts as an improvement, so best and last differ"
    model = trainer.load_best()
    codes = model.encode(x)
    by_file = {}
    for name in ("best", "last"):
        by_hand = VqVae(config())
        by_hand.load_state_dict(read_torch(tmp_path / "checkpoints" / f"{name}.pt")["model"])
        by_file[name] = by_hand.encode(x)
    assert codes.equal(by_file["best"]) and not codes.equal(by_file["last"])
    fresh = VqVae(config(), *column_scale(x, True))
    with pytest.raises(InputError, match="never trained"):
        fresh.encode(x)
    with pytest.raises(InputError, match="never trained"):
        fresh.explained_variance(x)
    random = fresh.encode(x, untrained_ok=True)
    assert (random != codes).float().mean() > 0.8
    save_vqvae(tmp_path / "fresh.pt", fresh)
    with pytest.raises(InputError, match="never trained"):
        load_vqvae(tmp_path / "fresh.pt").encode(x)


def test_codes_are_a_pure_function_of_file_and_vectors(trained, tmp_path):
    x = vectors()
    codes = trained.encode(x)
    save_vqvae(tmp_path / "a.pt", trained)
    again = load_vqvae(tmp_path / "a.pt")
    assert again.encode(x).equal(codes) and again.config == trained.config and not again.training
    save_vqvae(tmp_path / "b.pt", again)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert trained.encode(x.double().numpy()).equal(codes) and codes.dtype == torch.int64 and codes.shape == (400, 4)
    trained.train()  # a model that somebody left in training mode
    steps = int(trained.codebook.steps)
    assert trained.encode(x).equal(codes) and int(trained.codebook.steps) == steps
    trained.eval()


@pytest.mark.parametrize("seed", range(5))
def test_no_batch_changes_a_code(trained, seed):
    g = torch.Generator().manual_seed(seed)
    x = vectors(300, seed=seed) + torch.randn(20, generator=g)
    codes, order = trained.encode(x), torch.randperm(300, generator=g)
    for block in (1, 7, 300):
        assert trained.encode(x[order], block=block).equal(codes[order])
    z = copy.deepcopy(trained.encoder).double()(scaled(trained, x).double()).view(-1, 6)
    nearest = torch.cdist(z, trained.codebook.vectors.double()).argmin(1)
    assert (nearest.view(-1, 4) == codes).float().mean() > 0.999


class Largest(TorchDispatchMode):
    "The largest tensor that any operation gave."

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_encoding_never_holds_all_latents_or_distances():
    most = 1 << 22
    model, x = VqVae(config(tokens=8, n_embed=512, code_dim=4)), vectors(4000)
    with Largest() as seen:
        model.encode(x, untrained_ok=True)
        with torch.no_grad():
            model.eval()(x)
    assert 4000 * 8 * 512 > most >= seen.numel
    model, x = VqVae(config(tokens=8, n_embed=64, code_dim=16)), vectors(40_000)
    with Largest() as seen:
        model.encode(x, untrained_ok=True)
    assert 40_000 * 8 * 16 > most >= seen.numel


def test_no_batch_changes_a_code_among_8192_near_ones():
    "Codes a thousandth apart on a line: latents rounded as float32 products round them would fall to either side of a border."
    torch.manual_seed(0)
    model, x = VqVae(config(width=64, hidden=64, tokens=512, code_dim=1, n_embed=8192)), vectors(60, width=64)
    model.codebook.vectors.copy_(torch.linspace(-2, 2, 8192)[:, None])
    codes = model.encode(x, untrained_ok=True)
    assert model.encode(x[:40], untrained_ok=True, block=1).equal(codes[:40])


def test_decoding(trained):
    x = vectors()
    codes = trained.encode(x)
    rebuilt = trained.decode(codes)
    assert rebuilt.shape == x.shape and torch.allclose(trained.decode(codes[5:6]), rebuilt[5:6], atol=1e-5)
    error, *_ = trained(scaled(trained, x))
    assert torch.allclose((scaled(trained, rebuilt) - scaled(trained, x)).square().sum(1), error, atol=1e-3)
    assert (rebuilt[:, 3] == 7).all(), "a constant column comes back"
    for wrong in (codes[:, :3], codes + 24, codes - 24, codes[0]):
        with pytest.raises(InputError):
            trained.decode(wrong)
    with pytest.raises(InputError, match="different items"):
        trained.explained_variance(x, codes[:10])


# --- bad input


@pytest.mark.parametrize("spoil, message", [
    (lambda x: x.index_put((torch.tensor([5]), torch.tensor([2])), torch.tensor(float("nan"))), "NaN"),
    (lambda x: x.index_put((torch.tensor([5]), torch.tensor([2])), torch.tensor(float("inf"))), "infinite"),
    (lambda x: [[1.0, 2.0], [1.0]], "not a matrix"),
    (lambda x: [None, "a"], "not a matrix"),
    (lambda x: x[0], "not a matrix"),
    (lambda x: x[:0], "not a matrix"),
    (lambda x: x[:, :19], "another width"),
    (lambda x: x[:23], "fewer distinct"),
    (lambda x: x[:23].repeat(20, 1), "fewer distinct"),
    (lambda x: torch.full((400, 20), 3.0) + 0 * x, "fewer distinct"),
])
def test_refused_before_anything_is_written(spoil, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train_vqvae(config(), settings(), spoil(vectors()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_constant_vectors_are_refused_and_constant_columns_are_not():
    with pytest.raises(InputError, match="every column"):
        column_scale(torch.full((5, 3), 0.1), True)
    mean, scale = column_scale(torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.1, 2.0]]), True)
    assert scale[0] == 0 and scale[1] > 0
    with pytest.raises(InputError, match="every column"):
        train_vqvae(config(n_embed=1), settings(), torch.full((50, 20), 3.0))


def test_encoding_refuses_what_does_not_fit(trained):
    for wrong, message in ((vectors(width=21), "another width"), (vectors() * float("nan"), "NaN"), ([[1.0], [1.0, 2.0]], "not a matrix")):
        with pytest.raises(InputError, match=message):
            trained.encode(wrong)
    with pytest.raises(ParameterError, match="nothing to train"):
        train_vqvae(config(), settings(), vectors(), valid_share=1.0)


def test_files_of_something_else_are_refused(trained, tmp_path):
    save_vqvae(tmp_path / "vqvae.pt", trained)
    state = read_torch(tmp_path / "vqvae.pt")
    spoiled = {
        "rqvae.pt": {"kind": "recgen.rqvae", "config": {"width": 20, "latent_dim": 8}, "model": {}},
        "other_size.pt": {**state, "config": {**state["config"], "tokens": 5}},
        "no_scaling.pt": {**state, "model": {k: v for k, v in state["model"].items() if k != "scale"}},
        "impossible.pt": {**state, "config": {**state["config"], "tokens": 0}},
        "weights.pt": state["model"],
        "not_finite.pt": {**state, "model": {**state["model"], "encoder.0.weight": state["model"]["encoder.0.weight"] * float("nan")}},
    }
    for name, content in spoiled.items():
        write_torch(tmp_path / name, content)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "vqvae.pt").read_bytes()[:-500])
    (tmp_path / "text.pt").write_text(json.dumps({"config": 1}))
    for name in (*spoiled, "torn.pt", "text.pt", "absent.pt"):
        with pytest.raises(InputError, match=name):
            load_vqvae(tmp_path / name)


# --- real vectors


def test_beauty(data):
    x = load_embeddings(data / "beauty", max_items=2000).vectors
    trainer = train_vqvae(vqvae_config("default", 384, tokens=16, n_embed=128), settings(epochs=4, batch_size=128, learning_rate=1e-3), x)
    model, best = trainer.load_best(), trainer.position.records[-1]
    codes = model.encode(x)
    assert model.explained_variance(x, codes) > 0.2 and best["catalogue/use"] > 0.9 and best["catalogue/perplexity"] > 60
    assert len(codes.unique(dim=0)) > 1600
