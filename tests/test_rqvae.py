"""The RQ-VAE: what collapses and what does not, exact resume, the checkpoint that is kept, files that give the same codes again."""
import json
import math
import os
from dataclasses import asdict

import pytest
import torch
from toy_tasks import item_vectors, train_small_rqvae

from recgen.core.errors import InputError, ParameterError, RunError
from recgen.core.files import write_torch
from recgen.core.training import TrainSettings
from recgen.formats.embeddings import Embeddings
from recgen.quantization.autoencoder import QuantizedAutoencoder, autoencoder_loss
from recgen.quantization.codebook import Codebook, code_scores, rotate_onto, sinkhorn_codes, smoothed_counts
from recgen.quantization.residual import ResidualQuantizer
from recgen.quantization.scaling import standardized
from recgen.stages.tokenizer import assign_ids, link_checkpoints, save_model
from recgen.tokens.health import check_health, health_table
from recgen.tokens.rqkmeans import RQKMeans
from recgen.tokens.rqvae import (
    RqVae,
    RqVaeConfig,
    RqVaeTask,
    chosen_model,
    encode_exactly,
    explained_by_level,
    load_tokenizer,
    selection_score,
    train_rqvae,
)

WAYS = [("ste", True), ("ste", False), ("rotation", True), ("rotation", False), ("sinkhorn", True), ("sinkhorn", False), ("gumbel", False)]


def error_of(model, x, mean, scale) -> float:
    "Squared error of what the codes rebuild, in standardised columns."
    return float((standardized(model.decode(model.codes(x)), mean, scale) - standardized(x, mean, scale)).square().sum(1).mean())


# --- learning


@pytest.mark.parametrize("quantize, use_ema", WAYS)
def test_every_way_learns(quantize, use_ema):
    x, _, mean, scale = item_vectors()
    trainer = train_small_rqvae(config={"quantize": quantize, "use_ema": use_ema}, epochs=60, eval_every=20, valid_share=0.0)
    model = chosen_model(trainer, "last")
    assert error_of(model, x, mean, scale) < 0.65 * 12, "12 is the variance of the standardised columns"
    assert all(len(c.unique()) >= 6 for c in model.codes(x).T)
    assert explained_by_level(model, x, model.codes(x))[-1] == pytest.approx(1 - error_of(model, x, mean, scale) / 12, abs=1e-3)


def crowded_vectors(n=2000, width=64):
    "Unit vectors around a common mean, as sentence encoders give them."
    g = torch.Generator().manual_seed(0)
    x = 1.0 + torch.randn(40, width, generator=g)[torch.randint(40, (n,), generator=g)] * 0.3 + 0.2 * torch.randn(n, width, generator=g)
    return torch.nn.functional.normalize(x, dim=1)


def test_collapse_and_what_prevents_it():
    "Raw unit vectors, codebooks drawn at random and moved by gradient, no restarts: one code a level. The health gate says so."
    x = crowded_vectors()
    how = TrainSettings(epochs=20, batch_size=200, learning_rate=1e-3, device="cpu", eval_every=20)
    config = RqVaeConfig(width=64, latent_dim=16, n_layers=3, n_embed=32, hidden=[64], use_ema=False, dead_share=0)
    torch.manual_seed(0)
    model = RqVae(config)
    task = RqVaeTask(model, x, how.batch_size)  # as they come, and no k-means start
    optimizer = torch.optim.AdamW(model.parameters(), how.learning_rate)
    for epoch in range(how.epochs):
        for batch in task.batches(torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            task.loss(model, batch)[0].backward()
            optimizer.step()
    codes = model.eval().codes(x)
    used = [len(c.unique()) for c in codes.T]
    assert max(used) <= 2 and 1 - len(codes.unique(dim=0)) / len(codes) > 0.99, used
    table = health_table(codes, model.sizes, x)
    assert len(check_health(table, 0.5)) == 3
    with pytest.raises(InputError, match="semantic IDs are ill"):
        check_health(table, 0.5, strict=True)

    mean, scale = x.mean(0), x.std(0, correction=0)
    trainer = train_rqvae(RqVaeConfig(**{**asdict(config), "use_ema": True, "dead_share": 0.1}), how, standardized(x, mean, scale), mean, scale)
    healthy = chosen_model(trainer, "reconstruction").codes(x)
    assert not check_health(health_table(healthy, config.n_layers * [config.n_embed], x), 0.5)


def test_losses_are_sums_of_one_kind():
    "Reconstruction and commitment are both summed over dimensions, so beta means the same at any width."
    torch.manual_seed(0)
    model = QuantizedAutoencoder(12, 4, [8, 8], hidden=(16,), use_ema=False).train()
    x = torch.randn(30, 12)
    loss, recon, vq = autoencoder_loss(model, x, beta=0.25)
    z = model.encoder(x)
    residual, rebuilt, distance = z, 0, 0
    for book in model.quantizer.levels:
        e = book.vectors[torch.cdist(residual, book.vectors).argmin(1)]
        distance, rebuilt, residual = distance + (residual - e).square().sum(1).mean(), rebuilt + e, residual - e
    assert recon.item() == pytest.approx(float((model.decoder(rebuilt) - x).detach().square().sum(1).mean()), rel=1e-4)
    assert vq.item() == pytest.approx(1.25 * float(distance.detach()), rel=1e-4)
    assert loss.item() == pytest.approx((recon.item() + vq.item()) / 12, rel=1e-5)


def test_gradients_of_a_codebook_by_finite_differences():
    "With codes held fixed, the codebook's gradient is that of ‖r − e‖² and of the reconstruction that straight-through sends elsewhere."
    torch.manual_seed(1)
    quantizer = ResidualQuantizer([5], 3, use_ema=False, dead_share=0).double().train()
    z = torch.randn(20, 3, dtype=torch.float64)
    out = quantizer(z)
    out.codebook.sum().backward()
    book = quantizer.levels[0].vectors
    for k in range(5):
        mine = z[out.codes[:, 0] == k]
        assert torch.allclose(book.grad[k], 2 * (book[k] - mine).sum(0).detach() if len(mine) else torch.zeros(3, dtype=torch.float64))


def test_deeper_levels_reach_the_encoder():
    "The residual takes codes as constants, so every level's commitment pulls at the encoder's output."
    torch.manual_seed(0)
    quantizer = ResidualQuantizer([4, 4, 4], 6, use_ema=False, dead_share=0).train()
    z = torch.randn(50, 6, requires_grad=True)
    out = quantizer(z)
    (gradient,) = torch.autograd.grad(out.commitment.sum(), z)
    residual, expected = z.detach(), torch.zeros_like(z)
    for level, book in enumerate(quantizer.levels):
        residual = residual - book.vectors[out.codes[:, level]].detach()
        expected += 2 * residual
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_rotation_keeps_value_and_angle():
    g = torch.Generator().manual_seed(0)
    z, q = torch.randn(40, 5, generator=g, requires_grad=True), torch.randn(40, 5, generator=g)
    out = rotate_onto(z, q)
    assert torch.allclose(out, q, atol=1e-5)
    outer = torch.randn(40, 5, generator=g)
    (gradient,) = torch.autograd.grad((out * outer).sum(), z)
    assert torch.allclose(torch.cosine_similarity(gradient, z), torch.cosine_similarity(outer, q), atol=1e-4)
    assert torch.allclose(gradient.norm(dim=1), outer.norm(dim=1) * q.norm(dim=1) / z.norm(dim=1), rtol=1e-4)


def test_sinkhorn_shares_out():
    g = torch.Generator().manual_seed(0)
    distances = torch.rand(256, 16, generator=g) + torch.linspace(0, 3, 16)
    codes = torch.bincount(sinkhorn_codes(distances), minlength=16)
    assert codes.min() >= 8 and codes.max() <= 32, codes.tolist()
    assert torch.isfinite(distances).all() and len(sinkhorn_codes(torch.zeros(4, 3))) == 4


def test_running_means_are_means():
    "With decay 0 a codebook is Lloyd's step: the mean of what it served."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g)
    book = Codebook(4, 3, decay=0.0, dead_share=0)
    book.place(torch.arange(4), x[:4], torch.ones(4))
    codes = code_scores(x, book.vectors).argmin(1)
    book.observe(x, codes)
    for k in range(4):
        assert torch.allclose(book.vectors[k], x[codes == k].mean(0), atol=1e-4)
    assert smoothed_counts(torch.tensor([0.0, 5.0])).min() > 0


def test_restarts_take_the_worst_served():
    book = Codebook(3, 2, dead_share=0.5, check_every=1, decay=0.5)
    book.place(torch.arange(3), torch.tensor([[0.0, 0], [50, 50], [60, 60]]), torch.tensor([10.0, 0, 0]))
    x = torch.cat([torch.zeros(18, 2), torch.tensor([[5.0, 0], [0, 7.0]])])
    book.observe(x, code_scores(x, book.vectors).argmin(1))
    assert int(book.restarts) == 2 and {tuple(v) for v in book.vectors[1:].tolist()} == {(5.0, 0.0), (0.0, 7.0)}


# --- files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rqvae")
    trainer = train_small_rqvae(folder, save_every=2)
    return folder, trainer


def test_files_of_the_original(trained):
    folder, trainer = trained
    link_checkpoints(folder)
    for epoch in (2, 4, 6):
        assert os.path.samefile(folder / f"checkpoint_epoch_{epoch}.pt", folder / "checkpoints" / f"epoch_{epoch}.pt")
    x = item_vectors()[0]
    model = RqVae.load_from_checkpoint(folder / "checkpoint_epoch_6.pt")
    assert model.get_semantic_ids(x).equal(chosen_model(trainer, "last").codes(x)) and not model.training
    assert model.decode_from_codes(model.get_semantic_ids(x)).shape == x.shape
    link_checkpoints(folder)  # again, over links that are there


def test_export_load_export_is_equal(trained, tmp_path):
    x = item_vectors()[0]
    emb = Embeddings(torch.arange(1, len(x) + 1), x, {"embedding": x.shape[1]})
    model = chosen_model(trained[1], "reconstruction")
    for dedup in ("nearest", "suffix", "sinkhorn", "none"):
        first, _ = assign_ids(save_model(model, tmp_path), emb, dedup)
        second, _ = assign_ids(save_model(RqVae.load_from_checkpoint(tmp_path / "final_model.pt"), tmp_path), emb, dedup)
        assert first == second and first.raw_codes.equal(model.codes(x))


def test_codes_do_not_depend_on_the_batch_or_the_mode(trained):
    model, x = trained[1].module, item_vectors()[0]
    whole = model.eval().codes(x)
    assert whole.equal(torch.cat([model.codes(part) for part in x.split(7)]))
    assert whole.equal(model.train().codes(x)), "in train mode too: nothing is learnt by asking"
    assert whole.equal(encode_exactly(model, x.double().numpy(), 13)[1])
    order = torch.randperm(len(x))
    assert model.codes(x[order]).equal(whole[order])


@pytest.mark.parametrize("change, problem", [
    (lambda s: s | {"kind": "recgen.rqkmeans"}, "not whole|not a residual|not an RQ-VAE"),
    (lambda s: s | {"version": 9}, "not an RQ-VAE"),
    (lambda s: s | {"config": {**s["config"], "latent_dim": 5}}, "not whole"),
    (lambda s: s | {"config": {"wide": 5}}, "not whole"),
    (lambda s: {k: v for k, v in s.items() if k != "model"}, "not whole"),
    (lambda s: s | {"model": {k: v for k, v in s["model"].items() if "encoder.0" not in k}}, "not whole"),
    (lambda s: {}, "not an RQ-VAE"),
    (lambda s: [1, 2], "not an RQ-VAE"),
])
def test_other_files_are_refused(trained, tmp_path, change, problem):
    write_torch(tmp_path / "m.pt", change(chosen_model(trained[1], "last").file_state()))
    with pytest.raises(InputError, match=problem) as e:
        RqVae.load_from_checkpoint(tmp_path / "m.pt")
    assert "m.pt" in str(e.value)
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "m.pt")


def test_a_truncated_checkpoint_is_refused(trained, tmp_path):
    write_torch(tmp_path / "m.pt", chosen_model(trained[1], "last").file_state())
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="m.pt"):
        RqVae.load_from_checkpoint(tmp_path / "m.pt")


def test_the_other_mode_s_model_opens_with_the_same_call(tmp_path):
    x = item_vectors()[0]
    write_torch(tmp_path / "final_model.pt", RQKMeans.fit(x, 2, 8).file_state())
    assert isinstance(load_tokenizer(tmp_path / "final_model.pt"), RQKMeans)
    with pytest.raises(InputError, match="not an RQ-VAE"):
        RqVae.load_from_checkpoint(tmp_path / "final_model.pt")


@pytest.mark.parametrize("bad, problem", [
    (torch.ones(3, 5), "another width"), (torch.full((3, 12), math.nan), "NaN or infinite"), (torch.ones(12), "not a matrix"),
])
def test_vectors_that_do_not_fit_are_refused(trained, bad, problem):
    with pytest.raises(InputError, match=problem):
        trained[1].module.get_semantic_ids(bad)


@pytest.mark.parametrize("codes", [[[0, 0, 8]], [[0, -1, 0]], [[0, 0]]])
def test_codes_that_do_not_exist_are_refused(trained, codes):
    with pytest.raises(InputError, match="codes"):
        trained[1].module.decode_from_codes(torch.tensor(codes))


# --- training


def test_resume_is_exact(tmp_path, monkeypatch):
    "Stopped in the middle of an epoch and resumed: the same weights, running means and records, bit for bit."
    whole = train_small_rqvae(tmp_path / "whole", save_minutes=0.0)
    original, calls = RqVaeTask.loss, []

    def breaks(self, model, index):
        calls.append(1)
        if len(calls) == 13:  # in the third epoch
            raise ZeroDivisionError("the power went out")
        return original(self, model, index)

    monkeypatch.setattr(RqVaeTask, "loss", breaks)
    with pytest.raises(ZeroDivisionError):
        train_small_rqvae(tmp_path / "broken", save_minutes=0.0)
    monkeypatch.setattr(RqVaeTask, "loss", original)
    resumed = train_small_rqvae(tmp_path / "broken", save_minutes=0.0)
    assert resumed.resumed_from == (2, 2)
    assert resumed.position.records == whole.position.records
    for name, value in whole.module.state_dict().items():
        assert value.equal(resumed.module.state_dict()[name]), name
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "broken")]
    assert lines[0] == lines[1] and {"recon", "vq", "catalogue/duplicate_rate"} <= set(json.loads(lines[0].splitlines()[-1]))


def test_a_checkpoint_of_another_model_is_refused(trained):
    with pytest.raises(RunError, match="rqvae.latent_dim: 4 → 5"):
        train_small_rqvae(trained[0], config={"latent_dim": 5}, save_every=2)
    with pytest.raises(RunError, match="checkpoint of another run"):
        train_small_rqvae(trained[0], select="duplicates", save_every=2)


def test_what_is_kept(tmp_path):
    bound = sorted(r["catalogue/recon"] for r in train_small_rqvae(None, epochs=12).position.records)[5]  # which half of the epochs meet
    few = train_small_rqvae(tmp_path, select="duplicates", bound=bound, epochs=12)
    records = few.position.records
    inside = [r for r in records if r["catalogue/recon"] <= bound]
    assert 0 < len(inside) < 12 and few.best.epoch == min(inside, key=lambda r: r["catalogue/duplicate_rate"])["epoch"]
    assert selection_score("duplicates", 0, 10.0, 0.0, 9.0) > selection_score("duplicates", 0, 8.0, 0.9, 9.0)
    held_out = train_small_rqvae(None, epochs=12)
    assert held_out.best.epoch == min(held_out.position.records, key=lambda r: r["valid/recon"])["epoch"]


def test_held_out_items_are_not_trained_on():
    x, standard, mean, scale = item_vectors()
    task = RqVaeTask(RqVae(RqVaeConfig(12, 4, 2, 8, hidden=[16]), mean, scale), standard, 50, valid_share=0.2)
    seen = torch.cat(task.batches(torch.Generator().manual_seed(0)))
    assert len(task.held_out) == 60 and not torch.isin(task.held_out, seen).any() and len(seen.unique()) == 240


def test_early_stop():
    trainer = train_small_rqvae(epochs=400, early_stop_patience=2, early_stop_min_delta=0.5)
    assert trainer.position.epoch < 400 and trainer.position.epoch == trainer.best.epoch + 2


def test_gumbel_cools_down_and_needs_gradients():
    trainer = train_small_rqvae(config={"use_ema": False, "quantize": "gumbel"}, epochs=4)
    assert trainer.module.quantizer.temperature == pytest.approx(0.2) and trainer.module.config.total_steps == 4 * 5
    with pytest.raises(ParameterError, match="by gradient"):
        ResidualQuantizer([4], 2, quantize="gumbel")
    with pytest.raises(ParameterError, match="no such way"):
        ResidualQuantizer([4], 2, quantize="magic")


def test_levels_of_any_number_train():
    for levels in (1, 2, 6):
        trainer = train_small_rqvae(config={"n_layers": levels}, epochs=2)
        assert trainer.module.codes(item_vectors()[0]).shape == (300, levels)
