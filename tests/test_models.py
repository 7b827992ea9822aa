"""A model as one file: what is written, and what is refused when it is read."""
from dataclasses import dataclass

import pandas as pd
import pytest
import torch

from recgen.core.errors import InputError
from recgen.core.files import write_torch
from recgen.core.models import load_model, model_state
from recgen.evaluation.evaluator import validation_line
from recgen.retrieval.sasrec import SasRec, SasRecConfig, SasRecTask
from recgen.retrieval.training import TigerTask
from recgen.retrieval.transformer import Tiger, TigerConfig
from recgen.stages.tiger import finding

@dataclass
class Shape:
    width: int = 3


class Line(torch.nn.Linear):
    def __init__(self, config):
        if config.width < 1:
            raise InputError("there is no such model", column="width", found=config.width)
        super().__init__(config.width, 1)
        self.config = config


def build(config):
    return Line(Shape(**config))


def load(path):
    return load_model(build, path, "line", "train a line")


def test_a_model_comes_back_as_it_was(tmp_path):
    line = Line(Shape(4)).train()
    write_torch(tmp_path / "model.pt", {**model_state(line), "epoch": 3})  # what else is in the file is left alone
    again = load(tmp_path / "model.pt")
    assert again.config == Shape(4) and not again.training
    assert again.weight.equal(line.weight) and again.bias.equal(line.bias)


def test_the_state_is_plain_and_detached():
    state = model_state(Line(Shape(2)))
    assert state["config"] == {"width": 2} and set(state["model"]) == {"weight", "bias"}
    assert all(not v.requires_grad and v.device.type == "cpu" for v in state["model"].values())


@pytest.mark.parametrize("state, found", [({"weights": 1}, "weights"), ([1, 2], "list"), ({"config": 3, "model": {}}, "config"), ({"config": {}}, "config"), ({}, "keys")])
def test_something_else_is_told_apart(tmp_path, state, found):
    write_torch(tmp_path / "model.pt", state)
    with pytest.raises(InputError, match="this is not a checkpoint of a line") as e:
        load(tmp_path / "model.pt")
    assert found in str(e.value) and "config, model" in str(e.value) and "train a line" in str(e.value) and "model.pt" in str(e.value)


@pytest.mark.parametrize("config, weights", [({"width": 5}, Line(Shape(4)).state_dict()), ({"height": 4}, Line(Shape(4)).state_dict()), ({"width": 4}, {"weight": torch.zeros(1, 4)}),
                                             ({"width": 4}, [1]), ({"width": "4"}, {})])
def test_another_models_shape_or_weights_are_refused(tmp_path, config, weights):
    write_torch(tmp_path / "model.pt", {"config": config, "model": weights})
    with pytest.raises(InputError, match="the checkpoint is of another model") as e:
        load(tmp_path / "model.pt")
    assert "model.pt" in str(e.value)


def test_a_shape_that_the_model_refuses_keeps_the_models_own_words(tmp_path):
    write_torch(tmp_path / "model.pt", {"config": {"width": 0}, "model": {}})
    with pytest.raises(InputError, match="no such model"):
        load(tmp_path / "model.pt")


def test_a_torn_file_is_refused(tmp_path):
    write_torch(tmp_path / "model.pt", model_state(Line(Shape(4))))
    (tmp_path / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:200])
    with pytest.raises(InputError, match="train a line"):
        load(tmp_path / "model.pt")


def test_the_two_retrieval_models_write_the_same_kind_of_file_and_refuse_each_other(tmp_path):
    tiger, sasrec = Tiger(TigerConfig([3, 3], 8, 8, 2, 8, 1, 1)), SasRec(SasRecConfig(n_items=5, d_model=8, ff_dim=8))
    for model, other, name in ((tiger, SasRec, "tiger.pt"), (sasrec, Tiger, "sasrec.pt")):
        write_torch(tmp_path / name, model.state())
        again = type(model).load_from_checkpoint(tmp_path / name)
        assert all(v.equal(again.state_dict()[k]) for k, v in model.state_dict().items())
        with pytest.raises(InputError, match="another model"):
            other.load_from_checkpoint(tmp_path / name)


RECORD = {"epoch": 3, "step": 9, "loss": 1.23456, "learning_rate": 0.1, "valid/loss": 2.0, "valid/item/filtered/recall@5": 0.5, "valid/item/filtered/recall@10": 0.25, "valid/item/filtered/ndcg@10": 0.125}


def test_an_epochs_line_says_what_was_found_and_of_which_model():
    assert validation_line(RECORD) == "Epoch 3: Loss=1.2346, recall@10=0.2500, ndcg@10=0.1250"
    assert TigerTask.log_line(None, RECORD) == validation_line(RECORD)
    assert SasRecTask.log_line(None, RECORD) == "SASRec epoch 3: Loss=1.2346, recall@10=0.2500, ndcg@10=0.1250"
    assert SasRecTask.log_line(None, {"epoch": 1, "loss": 2.0}) == "SASRec epoch 1: Loss=2.0000"


# --- the finding of 04_tiger, computed from ranks


def ranked(hits, users=200):
    "Per-user ranks: the first `hits` users' targets are first, all others missed."
    return pd.DataFrame({"user_id": range(1, users + 1), "target": 7, "rank": 1, "rank_filtered": [int(u < hits) for u in range(users)]})


def found(**hits):
    users = {name: ranked(n) for name, n in hits.items()}
    shares = [n / 200 for n in hits.values()]
    return finding(pd.DataFrame({"filtered/recall@10": shares, "filtered/ndcg@10": shares}, index=list(hits)), users).split("\n")


def test_the_finding_names_the_best_its_lead_and_where_tiger_is():
    lines = found(TIGER=40, kNN=80, SASRec=79)
    assert lines[0] == "Recall@10: kNN is best with 0.4000" and lines[3] == "NDCG@10: kNN is best with 0.4000"
    assert lines[1].startswith("  over SASRec: +0.0050 [") and lines[1].endswith("not clear: the interval holds 0")
    assert lines[2].startswith("  over TIGER: +0.2000 [+0.1") and lines[2].endswith("], clear")
    assert len(lines) == 6


def test_the_finding_of_a_winning_tiger_has_one_difference():
    lines = found(TIGER=80, kNN=40)
    assert lines[0].startswith("Recall@10: TIGER is best") and lines[1].startswith("  over kNN: +0.2000") and len(lines) == 4
