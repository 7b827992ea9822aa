"""evaluation.ablation: what runs were varied in, the axes that tell them apart, and what stands in which cell."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from recgen.core.errors import ParameterError
from recgen.evaluation.ablation import SHADES, ablation, cell_text, draw_ablation, grid_axes, grid_title, in_order, pivot, varied
from recgen.evaluation.comparison import Entry, comparison, grouped
from recgen.evaluation.evaluator import EvaluationResult

def ranking(hits, users=300, seed=0):
    draws = np.random.default_rng(seed)
    rank = np.where(draws.random(users) < hits, draws.integers(1, 11, users), 0)
    return pd.DataFrame({"user_id": range(1, users + 1), "target": 7, "rank": rank, "rank_filtered": rank})


def entry(label, hits=0.2, leaky="", stage="04_tiger", seed=0, setting="", parameters=None, **facts):
    return Entry(label, EvaluationResult(ranking(hits), label, leaky=leaky), facts, {"dataset": "shop"}, setting or label, (("04_tiger", seed),), stage=stage, parameters=parameters or {})


def figures(values, leaky=(), lower=False):
    "A table as comparison and click_comparison make it, and the settings of its runs on two axes."
    runs = [{"run": f"r{i}", "value": v, "low": v - 0.01, "high": v + 0.01, "leaky": "also_bought" if i in leaky else ""} for i, (v, _, _) in enumerate(values)]
    name = "logloss" if lower else "filtered/ndcg@10"
    table = pd.DataFrame(runs).rename(columns={"value": name, "low": f"{name}/low", "high": f"{name}/high"})
    settings = pd.DataFrame({"run": table.run, "embeddings": [e for _, e, _ in values], "tokenizer": [t for _, _, t in values]})
    return table, settings


TWO = ["embeddings", "tokenizer"]


# --- what was varied


def test_only_parameters_that_differ_are_kept_and_seeds_are_not():
    groups = grouped([entry("a", parameters={"04_tiger.epochs": 3, "04_tiger.seed": 0, "04_tiger.device": "cpu", "03_tokenizer.mode": "kmeans"}, embeddings="text"),
                      entry("b", parameters={"04_tiger.epochs": 5, "04_tiger.seed": 1, "04_tiger.device": "cuda", "03_tokenizer.mode": "kmeans"}, embeddings="text"), entry("popularity", stage="baseline", retrieval="popularity")])
    settings = varied(groups)
    assert list(settings.columns) == ["run", "embeddings", "04_tiger.epochs"] and settings["04_tiger.epochs"].tolist() == ["3", "5"] and settings.run.tolist() == ["a", "b"]


def test_a_stage_that_a_run_does_not_have_is_no_difference_of_its_parameters():
    settings = varied(grouped([entry("TIGER", parameters={"04_tiger.epochs": 3, "00_data.seed": 0}), entry("HGT", stage="01_hgt", parameters={"01_hgt.epochs": 9})]))
    assert list(settings.columns) == ["run"] and grid_axes(settings) == []


def test_seeds_of_one_setting_are_one_row():
    groups = grouped([entry("a", seed=0, setting="x"), entry("a", seed=1, setting="x"), entry("b", embeddings="HGT")])
    assert varied(groups).run.tolist() == ["a", "b"]


def test_the_world_alone_varies_nothing():
    assert len(varied(grouped([entry("popularity", stage="06_compare", retrieval="popularity"), entry("EASE", stage="06_compare", retrieval="EASE")]))) == 0
    assert grid_axes(varied({})) == []


# --- the axes


def test_facts_come_first_then_what_tells_most_apart():
    settings = pd.DataFrame({"run": list("abcd"), "tokenizer": ["k", "k", "k", "r"], "04_tiger.warm": ["1", "1", "2", "1"], "04_tiger.rate": ["1", "2", "3", "1"]})
    assert grid_axes(settings) == ["tokenizer", "04_tiger.rate"]
    assert grid_axes(settings[["run", "04_tiger.warm", "04_tiger.rate"]][:3]) == ["04_tiger.rate"]
    assert grid_axes(settings, ["04_tiger.warm"]) == ["04_tiger.warm"]


def test_runs_that_nothing_tells_apart_end_the_search_for_axes():
    assert grid_axes(pd.DataFrame({"run": list("abc"), "tokenizer": ["k", "r", "r"], "embeddings": "text"})) == ["tokenizer"]


@pytest.mark.parametrize("wanted", [["embeddings"], ["04_tiger.rate"], ["tokenizer", "seed"]])
def test_an_axis_in_which_nothing_differs(wanted):
    with pytest.raises(ParameterError, match="no two runs differ") as e:
        grid_axes(pd.DataFrame({"run": list("ab"), "tokenizer": ["k", "r"], "embeddings": "text"}), wanted)
    assert "tokenizer" in str(e.value)


@pytest.mark.parametrize("values, expected", [(["256", "64", "1024", "64"], ["64", "256", "1024"]), (["0.003", "1e-3"], ["1e-3", "0.003"]), (["text", "HGT", "text", "64"], ["text", "HGT", "64"]), ([], [])])
def test_values_of_an_axis_stand_in_order(values, expected):
    assert in_order(values) == expected


# --- the cells


def test_each_run_is_in_its_cell_with_its_figures():
    table, settings = figures([(0.3, "text", "k"), (0.1, "HGT", "r"), (0.2, "text", "r")])
    cells = ablation(table.sample(frac=1, random_state=1), settings, TWO, "ndcg@10")
    assert cells[["embeddings", "tokenizer", "run", "value"]].to_numpy().tolist() == [["text", "k", "r0", 0.3], ["text", "r", "r2", 0.2], ["HGT", "r", "r1", 0.1]]
    assert np.allclose(cells.high - cells.low, 0.02) and (cells.runs == 1).all()
    wide = pivot(cells, TWO, "ndcg@10")
    assert wide.loc["HGT", "k"] == "" and wide.loc["text", "k"] == ".3000 [.2900, .3100]" and list(wide.columns) == ["k", "r"]


@pytest.mark.parametrize("lower, best", [(False, "r1"), (True, "r0")])
def test_a_cell_of_several_runs_shows_the_best_and_says_so(lower, best):
    table, settings = figures([(0.3, "text", "k"), (0.5, "text", "k"), (0.4, "text", "k"), (0.2, "HGT", "k")], lower=lower)
    cell = ablation(table, settings, TWO, "logloss" if lower else "ndcg@10").iloc[0]
    assert cell.run == best and cell.runs == 3 and cell_text(cell)[-1] == "best of 3"


@pytest.mark.parametrize("lower, leak", [(False, 0.9), (True, 0.01)])
def test_a_leaky_run_fills_only_a_cell_of_its_own_and_is_never_the_best(lower, leak):
    table, settings = figures([(0.3, "text", "k"), (leak, "text", "k"), (leak, "HGT", "k"), (0.2, "HGT", "r")], leaky=(1, 2), lower=lower)
    metric = "logloss" if lower else "ndcg@10"
    cells = ablation(table, settings, TWO, metric)
    assert cells.run.tolist() == ["r0", "r2", "r3"] and cells.leaky.tolist() == ["", "also_bought", ""] and "leaky" in cell_text(cells.iloc[1])
    assert (cells.runs == 1).all()  # the best of those that may be compared
    title = grid_title(cells, TWO, metric)
    assert title.endswith(("HGT, r" if lower else "text, k") + " is best; 3 of 4 cells were run")
    assert grid_title(cells[1:2], TWO, metric).endswith("every cell is leaky")


def test_what_is_not_there_is_called_none():
    table, settings = figures([(0.3, "", "k"), (0.2, "text", "")])
    cells = ablation(table, settings, TWO, "ndcg@10")
    assert "none, k is best" in grid_title(cells, TWO, "ndcg@10") and pivot(cells, TWO, "ndcg@10").loc["none", "k"].startswith(".3000")


# --- the picture


def texts_of(axis):
    return [t.get_text() for t in axis.texts]


def test_the_picture_leaves_what_was_not_run_empty_and_hatches_leaks():
    table, settings = figures([(0.3, "text", "k"), (0.1, "HGT", "r"), (0.9, "text", "r")], leaky=(2,))
    figure = draw_ablation(ablation(table, settings, TWO, "ndcg@10"), TWO, "ndcg@10")
    (axis,) = figure.axes
    drawn = [p for p in axis.patches if p.get_hatch()]
    assert len(drawn) == 1 and drawn[0].get_xy() == (0.5, -0.5)  # text by r
    assert sorted(t for t in texts_of(axis) if t.startswith(".")) == [".1000", ".3000", ".9000"] and any("leaky" in t for t in texts_of(axis))
    filled = {p.get_xy(): p.get_facecolor()[:3] for p in axis.patches if not p.get_hatch()}  # the later patch of a place is the cell
    assert filled[(-0.5, 0.5)] == (1, 1, 1) and filled[(-0.5, -0.5)] == SHADES(1.0)[:3] and filled[(0.5, 0.5)] == SHADES(0.0)[:3]  # empty, best, worst: the leak has no part in the scale
    assert axis.get_xlabel() == "tokenizer" and axis.get_ylabel() == "embeddings" and "text, k is best" in figure.get_suptitle()
    plt.close(figure)


def test_less_loss_is_darker():
    table, settings = figures([(0.3, "text", "k"), (0.1, "HGT", "k")], lower=True)
    figure = draw_ablation(ablation(table, settings, TWO, "logloss"), TWO, "logloss")
    cells = {p.get_xy()[1]: sum(p.get_facecolor()[:3]) for p in figure.axes[0].patches}
    assert cells[0.5] < cells[-0.5] < 3
    plt.close(figure)


def test_a_third_axis_makes_panels_in_order_and_one_axis_a_column():
    rates, widths = ["0.003", "0.001", "0.003", "0.001", "0.001"], ["64", "128", "256", "64", "256"]
    groups = grouped([entry(f"r{i}", 0.1 + 0.05 * i, embeddings="HGT" if i == 2 else "text", parameters={"04_tiger.rate": r, "04_tiger.width": w}) for i, (r, w) in enumerate(zip(rates, widths, strict=True))])
    table, settings = comparison(groups, resamples=50), varied(groups)
    axes = ["embeddings", "04_tiger.rate", "04_tiger.width"]
    cells = ablation(table, settings, axes, "ndcg@10")
    figure = draw_ablation(cells, axes, "ndcg@10")
    shown = [a.get_title(loc="left") for a in figure.axes if a.get_visible()]
    assert shown == ["width 64", "width 128", "width 256"] and pivot(cells, axes, "ndcg@10").index.names == ["04_tiger.width", "embeddings"]
    assert len({(a.get_xlim(), a.get_ylim()) for a in figure.axes if a.get_visible()}) == 1  # cells of one size
    one = draw_ablation(ablation(table, settings, axes[2:], "ndcg@10"), axes[2:], "ndcg@10")
    assert [t.get_text() for t in one.axes[0].get_yticklabels()] == ["64", "128", "256"] and len(pivot(ablation(table, settings, axes[2:], "ndcg@10"), axes[2:], "ndcg@10")) == 3
    plt.close("all")


def test_cells_of_one_value_have_a_shade():
    table, settings = figures([(0.3, "text", "k"), (0.3, "HGT", "k")])
    figure = draw_ablation(ablation(table, settings, TWO, "ndcg@10"), TWO, "ndcg@10")
    assert all(np.isfinite(p.get_facecolor()).all() for p in figure.axes[0].patches)
    plt.close(figure)
