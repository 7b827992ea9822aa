"The challenge's prediction file: its form, its exactness, and what is refused."
import csv
import io
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

from recgen.clicks import submission as module
from recgen.clicks.submission import read_submission, submission_ids, write_submission
from recgen.core.errors import InputError, RunError
from recgen.core.files import write_parquet

def scores(n=5000, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 8  # many tiny ones


def test_a_plain_reader_finds_the_header_the_order_and_the_numbers(tmp_path):
    values = torch.tensor([0.0, 1.0, 1 / 3, 1e-30, 0.5])
    made = write_submission(tmp_path / "submission", [4, 0, 3, 1, 2], values)
    text = made["csv"].read_bytes().decode("ascii")
    assert text.startswith("ID,Task1&2\n4,") and "\r" not in text and text.endswith("\n") and made["rows"] == 5
    rows = list(csv.reader(io.StringIO(text)))
    assert [r[0] for r in rows[1:]] == list("40312") and torch.tensor([float(r[1]) for r in rows[1:]]).equal(values)
    with zipfile.ZipFile(made["zip"]) as archive:
        assert archive.namelist() == ["prediction.csv"] and archive.read("prediction.csv") == made["csv"].read_bytes() and archive.testzip() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost_so_the_files_auc_is_the_models(tmp_path, dtype):
    from recgen.evaluation.clicks import click_metrics
    values = scores().to(dtype) + (scores(5000, 1).double() * 1e-9).to(dtype)  # beyond float32 where it is float64
    values = values.clamp(0, 1)
    made = write_submission(tmp_path, range(5000), values)
    for file in (made["csv"], made["zip"]):
        back = torch.tensor(read_submission(file)["Task1&2"].to_numpy())
        assert back.to(dtype).equal(values)
    labels = (torch.rand(5000, generator=torch.Generator().manual_seed(3)) < values).long()
    assert click_metrics(back.to(dtype), labels) == click_metrics(values, labels)


def test_equal_predictions_are_equal_bytes_wherever_and_whenever(tmp_path, monkeypatch):
    one = write_submission(tmp_path / "a", range(100), scores(100))
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    two = write_submission(tmp_path / "b", np.arange(100), scores(100).numpy())
    assert one["zip"].read_bytes() == two["zip"].read_bytes() and one["csv"].read_bytes() == two["csv"].read_bytes()
    assert one["zip"].read_bytes() != write_submission(tmp_path / "c", range(100), scores(100, 1))["zip"].read_bytes()


def test_names_are_parameters(tmp_path):
    table = pd.DataFrame({"impression": ["b", "a"], "ID": [1, 1]})
    made = write_submission(tmp_path, table, [.5, .25], column="Task1", id_column="impression", archive="DIN_001.zip")
    assert made["csv"].read_text() == "ID,Task1\nb,0.5\na,0.25\n" and made["zip"].name == "DIN_001.zip"
    assert read_submission(made["zip"]).equals(pd.DataFrame({"ID": np.array(["b", "a"], object), "Task1": [.5, .25]}))
    for name in ("", "Task1,2", "ID", 'a"'):
        with pytest.raises(InputError, match="column's name"):
            write_submission(tmp_path, [1], [.5], column=name)
    for name in ("x.csv", "a/b.zip"):
        with pytest.raises(InputError, match="zip's name"):
            write_submission(tmp_path, [1], [.5], archive=name)


@pytest.mark.parametrize("ids, values, problem", [
    ([0, 1, 2], [.1, float("nan"), .3], "not probabilities"),
    ([0, 1, 2], [.1, 1.0000001, .3], "not probabilities"),
    ([0, 1, 2], [.1, -1e-9, .3], "not probabilities"),
    ([0, 1, 2], [.1, float("inf"), .3], "not probabilities"),
    ([0, 1, 1], [.1, .2, .3], "stand twice"),
    (["1", 1, 2], [.1, .2, .3], "stand twice"),
    ([0, None, 2], [.1, .2, .3], "are missing"),
    (["a", "", "c"], [.1, .2, .3], "are missing"),
    ([0, 1.5, 2], [.1, .2, .3], "not whole"),
    ([0, float("inf"), 2], [.1, .2, .3], "not whole"),
    ([0, 1, 2], [.1, .2], "not one score an ID"),
    ([0, 1], [[.1], [.2]], "not one score an ID"),
    ([], [], "not one score an ID"),
])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, ids, values, problem):
    made = write_submission(tmp_path, [7], [.5])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match=problem):
        write_submission(tmp_path, ids, values)
    with pytest.raises(InputError, match=problem):
        write_submission(tmp_path / "new", ids, values)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before and made["csv"] in before


def test_a_failing_disk_leaves_the_old_pair(tmp_path, monkeypatch):
    write_submission(tmp_path, [7], [.5])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "zip_bytes", full)
    with pytest.raises(RunError, match="no space"):
        write_submission(tmp_path, [8, 9], [.5, .6])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_ids_come_from_the_sources_column_in_its_order(tmp_path):
    write_parquet(tmp_path / "impressions" / "test.parquet", pd.DataFrame({"row_id": [11, 12, 13], "ID": [2, 0, 1], "impression": ["x", "y", "z"]}))
    assert submission_ids(tmp_path).tolist() == [2, 0, 1] and submission_ids(tmp_path, "impression").tolist() == ["x", "y", "z"] and submission_ids(tmp_path, "").tolist() == [0, 1, 2]
    made = write_submission(tmp_path / "submission", submission_ids(tmp_path), [.1, .2, .3])
    assert read_submission(made["csv"]).ID.tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="column is missing") as caught:
        submission_ids(tmp_path, "id")
    assert "ID" in str(caught.value)
    with pytest.raises(InputError, match="no file valid.parquet"):
        submission_ids(tmp_path, part="valid")


def test_whole_ids_that_became_floats_are_whole_again(tmp_path):
    made = write_submission(tmp_path, torch.tensor([3.0, 5.0]), [.1, .2])
    assert made["csv"].read_text().splitlines()[1] == "3,0.1"
    text = write_submission(tmp_path, ["007", "7"], [.1, .2])
    assert read_submission(text["zip"]).ID.tolist() == ["007", "7"]


@pytest.mark.parametrize("content, problem", [
    (b"", "cannot be read"),
    (b"ID,Task1,Task2\n0,.1,.2\n", "not a prediction file"),
    (b"id,Task1\n0,.1\n", "not a prediction file"),
    (b"ID,Task1\n0,.1\n0,.2\n", "stand twice"),
    (b"ID,Task1\n0,high\n", "not probabilities"),
    (b"ID,Task1\n0,\n", "not probabilities"),
    (b"ID,Task1\n", "not one score an ID"),
])
def test_other_files_are_no_prediction_files(tmp_path, content, problem):
    (tmp_path / "prediction.csv").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_submission(tmp_path / "prediction.csv")
    for broken in (b"not a zip", module.zip_bytes("other.csv", b"ID,Task1\n0,.1\n")):
        (tmp_path / "prediction.zip").write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read"):
            read_submission(tmp_path / "prediction.zip")


def test_half_precision_scores_are_written_as_what_they_are(tmp_path):
    values = torch.tensor([.1, .7], dtype=torch.bfloat16)
    assert torch.tensor(read_submission(write_submission(tmp_path, [0, 1], values)["csv"])["Task1&2"].to_numpy()).to(torch.bfloat16).equal(values)
