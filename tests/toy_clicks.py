"""A small click log in a module of its own, so that other processes can train on it too."""
from pathlib import Path

import pandas as pd
import torch
from toy_tasks import forbid_writing

from recgen.clicks.data import Clicks
from recgen.clicks.din import DinConfig
from recgen.clicks.features import features_of, item_table
from recgen.clicks.training import train_din
from recgen.core.ragged import Ragged
from recgen.core.training import TrainSettings

N = 20
HOW = {"epochs": 3, "batch_size": 64, "learning_rate": 5e-3, "best_metric": "valid/auc", "device": "cpu"}


def log(n=300, seed=0, top=N):
    "Clicks on items of the kind (odd or even) that the history holds; users and items alone say nothing."
    g = torch.Generator().manual_seed(seed)
    kind, lengths = torch.randint(0, 2, (n,), generator=g), torch.randint(0, 6, (n,), generator=g)
    history = 1 + 2 * torch.randint(0, top // 2, (int(lengths.sum()),), generator=g) + kind.repeat_interleave(lengths)
    items = torch.randint(1, top + 1, (n,), generator=g)
    clicked = torch.where(lengths > 0, (items - 1) % 2 == kind, torch.rand(n, generator=g) < 0.5).float()
    return Clicks(torch.randint(1, 30, (n,), generator=g), items, clicked, Ragged(history, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])), torch.arange(n))


def table(**features):
    return item_table(pd.DataFrame(dict(item_id=range(1, N + 1))), **features)


def shape(lazy_rows=20_000, width=4, **config):
    return DinConfig(features_of(table(), log(), width=width, lazy_rows=lazy_rows), **{"attention": [8], "mlp": [8], "dropout": 0.1, "unknown_rate": 0.1, **config})


def train_in_shares(folder):
    "Without dropout or chance, in batches that two processes halve: with dense tables, with lazy ones, and with codes and vectors."
    forbid_writing()
    codes = torch.cat([torch.zeros(1, 3, dtype=torch.int64), torch.randint(1, 9, (N, 3), generator=torch.Generator().manual_seed(0))])
    full = table(codes=codes, vectors=torch.randn(N, 5, generator=torch.Generator().manual_seed(1)))
    quiet = {"dropout": 0.0, "unknown_rate": 0.0}
    settings = TrainSettings(**HOW | {"batch_size": 60})
    for name, config, items in (("dense", shape(**quiet), None), ("lazy", shape(lazy_rows=1, **quiet), None),
                                ("features", DinConfig(features_of(full, log(), width=4, lazy_rows=1), [8], [8]), full)):
        train_din(config, settings, log(), log(200, 1), items, Path(folder) / name)
