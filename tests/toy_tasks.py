"""Small trainings in a module of their own, so that other processes can import them too."""
import sys
import time
from pathlib import Path

import torch

from recgen.core import training
from recgen.core.processes import gather_objects
from recgen.core.ragged import Ragged
from recgen.core.training import TrainSettings, fit
from recgen.evaluation.protocol import Cases
from recgen.formats.semantic_ids import SemanticIDs
from recgen.quantization.scaling import column_scale, standardized
from recgen.retrieval.sequences import token_table
from recgen.retrieval.training import train_tiger
from recgen.retrieval.transformer import TigerConfig
from recgen.tokens.rqvae import RqVaeConfig, train_rqvae

RQVAES = {"rqvae": {}, "rqvae_by_gradient": {"use_ema": False}}
N = 70  # samples: no multiple of any batch size used here


class Curve:
    "y = 3x + 0.5 by a small network with dropout, so that chance matters."

    def __init__(self, batch_size=16, dropout=0.2, n=N, pause=0.0):
        torch.manual_seed(0)
        self.x = torch.linspace(-1, 1, n)[:, None]
        self.y = 3 * self.x + 0.5
        self.model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1))
        self.batch_size, self.pause, self.calls, self.breaks_at = batch_size, pause, 0, None

    def batches(self, generator):
        return list(torch.randperm(len(self.x), generator=generator).split(self.batch_size))

    def loss(self, model, index):
        self.calls += 1
        if self.calls == self.breaks_at:
            raise ZeroDivisionError("the power went out")
        time.sleep(self.pause)
        return (model(self.x[index]).float() - self.y[index]).square().mean()

    def evaluate(self, model):
        "The error over all samples, each process looking at its share."
        shares = gather_objects(None)
        rank = torch.distributed.get_rank() if len(shares) > 1 else 0
        mine = slice(rank, None, len(shares))
        errors = gather_objects((model(self.x[mine]) - self.y[mine]).square())
        return {"valid/error": float(torch.cat(errors).double().mean())}


def settings(**changes):
    base = {"epochs": 4, "learning_rate": 0.02, "weight_decay": 0.1, "warmup_steps": 3, "best_metric": "valid/error", "best_mode": "min", "device": "cpu"}
    return TrainSettings(**{**base, **changes})


def train_slowly(folder):
    "A training of a few seconds, to be interrupted by a signal."
    return fit(Curve(pause=0.02), settings(epochs=8, gradient_accumulate_every=2), folder)


def ring_world(n=24, users=40):
    "Walks around a ring of items: what train_tiger needs, small."
    g = torch.Generator().manual_seed(0)
    ids = SemanticIDs(torch.arange(1, n + 1), torch.stack([torch.arange(n) // 6, torch.arange(n) % 6], 1), [4, 6])
    walks = [[(s + i) % n + 1 for i in range(length)]
             for s, length in zip(torch.randint(0, n, (users,), generator=g).tolist(), torch.randint(3, 8, (users,), generator=g).tolist(), strict=True)]
    valid = Cases(torch.arange(1, users + 1), Ragged.from_lists([w[:-1] for w in walks]), torch.tensor([w[-1] for w in walks]),
                  torch.ones(users, dtype=torch.long), "valid")
    return Ragged.from_lists([w[:-1] for w in walks]), token_table(ids, n), ids.to_trie(), valid, ids


def train_ring(folder, path="exact", batch_size=13):
    "train_tiger on the ring, without dropout."
    sequences, table, trie, valid, ids = ring_world()
    how = TrainSettings(epochs=2, batch_size=batch_size, learning_rate=1e-3, warmup_steps=4, best_metric="valid/item/filtered/ndcg@10", device="cpu")
    return train_tiger(TigerConfig(ids.sizes, 16, 16, 2, 32, 1, 1, dropout=0.0), how, sequences, table, trie, valid, path, 20, folder)


def item_vectors(n=300, width=12, seed=0):
    "Vectors of a few noisy groups, standardised, with their mean and scale."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(20, width, generator=g)[torch.randint(20, (n,), generator=g)] + 0.5 * torch.randn(n, width, generator=g)
    mean, scale = column_scale(x, standardize=True)
    return x, standardized(x, mean, scale), mean, scale


def train_small_rqvae(folder=None, batch_size=60, config=None, select="reconstruction", bound=0.0, valid_share=0.1, **changes):
    "An RQ-VAE of 3 levels of 8 codes."
    _, x, mean, scale = item_vectors()
    shape = RqVaeConfig(**{"width": 12, "latent_dim": 4, "n_layers": 3, "n_embed": 8, "hidden": [16], **(config or {})})
    how = TrainSettings(**{"epochs": 6, "batch_size": batch_size, "learning_rate": 3e-3, "device": "cpu", **changes})
    return train_rqvae(shape, how, x, mean, scale, valid_share, select, bound, folder)


def forbid_writing():
    "Only rank 0 may write: in any other process writing is an error."
    def refuse(*args):
        raise AssertionError("a process other than rank 0 writes")

    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        training.write_torch = training.append_record = training.write_records = refuse


def train_everything(folder, batch_sizes):
    "All trainings that are compared between one process and several."
    forbid_writing()
    for size in batch_sizes:
        fit(Curve(size, dropout=0.0), settings(gradient_accumulate_every=2), Path(folder) / f"curve{size}")
    fit(Curve(16, dropout=0.0), settings(gradient_accumulate_every=1, save_minutes=0.0), Path(folder) / "often")
    train_ring(Path(folder) / "tiger")
    for name, config in RQVAES.items():
        train_small_rqvae(Path(folder) / name, config=config)


if __name__ == "__main__":
    train_slowly(sys.argv[1])
