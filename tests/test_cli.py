"""The recgen command: what it says, what it refuses, what it lists and recommends; a toy stage stands for the real ones where a run is not the point."""
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from papermill.cli import _resolve_type
from stage_runs import NOTEBOOKS, REPO, tiny

from recgen.cli import cli
from recgen.commands import notebooks, pipelines
from recgen.commands.notebooks import nearest, parameter_text, read_stage, stage_called, stage_names, stage_values, typed_values
from recgen.commands.runs import compare_runs, find_runs, folder_size, list_runs, run_called
from recgen.commands.tables import cut, formatted, text_table
from recgen.core.errors import InputError, ParameterError
from recgen.core.params import check_values, convert
from recgen.core.run import Run, release_all
from recgen.formats.semantic_ids import SemanticIDs

def call(*words, ok=0):
    "The command in this process: its output. AssertionError for another exit status."
    done = CliRunner().invoke(cli, [str(w) for w in words], prog_name="recgen")
    assert done.exit_code == ok, (done.exit_code, done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


# --- what it says


def test_help_and_import_need_nothing_heavy():
    code = "import sys, recgen.cli; recgen.cli.cli.main(['--help'], standalone_mode=False); print([m for m in ('torch', 'pandas', 'pyarrow', 'papermill', 'nbformat', 'IPython') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.parametrize("words", [["--help"], ["help"], ["help", "run"], *([c, "--help"] for c in cli.commands)], ids=" ".join)
def test_every_command_has_a_help(words):
    assert len(call(*words)) > 80


@pytest.mark.parametrize("name", stage_names())
def test_a_stages_help_is_its_parameters_cell(name):
    stage, module = read_stage(name), importlib.import_module("recgen.stages." + name[3:])
    assert stage.aliases == getattr(module, "ALIASES", {})
    text = call("run", name, "--help")
    assert text == call("help", name[:2]) and stage.line in text
    rows = {line.split()[0] for line in text.splitlines() if re.match(r"  \w", line)}
    assert rows >= set(stage.declared) and all(alias in text for alias in stage.aliases)
    said = " ".join(text.split())
    assert all(" ".join(d.help.split()) in said for d in stage.declared.values())


def test_a_name_of_a_command_and_a_stage_says_both():
    assert "recgen help 00_data" in call("help", "data") and "--check" in call("help", "data")


def test_the_table_keeps_to_its_width():
    for width in (90, 120, 200):
        assert max(map(len, parameter_text(read_stage("tiger"), width).splitlines())) <= width


def test_stages_by_any_name():
    for name in stage_names():
        assert {stage_called(name), stage_called(name[3:]), stage_called(name[:2]), stage_called(name + ".ipynb")} == {name}
    with pytest.raises(ParameterError, match="tokenizer"):
        stage_called("tokenzer")
    assert nearest("epoch", ["epochs", "batch_size"]) == "epochs" and nearest("xyzzy", ["epochs"]) == ""


# --- values


@pytest.mark.parametrize("name", stage_names())
def test_defaults_written_out_are_the_defaults(name):
    stage = read_stage(name)
    assert stage_values(stage, pairs=[(n, str(d.default)) for n, d in stage.declared.items()]) == {n: d.default for n, d in stage.declared.items()}


@pytest.mark.parametrize("kind, text", [(int, "12"), (int, "1e3"), (float, "1e-3"), (float, "3"), (bool, "true"), (bool, "False"), (str, "kmeans"), (str, "1.5"), (list, "[1, 2]"), (list, "a,b"), (list, "['x']")])
def test_values_are_those_of_papermill(kind, text):
    "What a stage makes of papermill's -p, it makes of ours."
    declared = typed_values(notebooks.Stage("03_x", "", {"x": notebooks.read_declarations(f"x: {kind.__name__} = {kind()!r}  # it")["x"]}), {"x": text})
    assert declared == {"x": convert(_resolve_type(text), kind)} and type(declared["x"]) is kind


def test_files_come_before_pairs_and_aliases_are_one_parameter(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nlearning_rate: 1e-3\n")
    (tmp_path / "b.yaml").write_text("n_epoch: 4\n")
    stage = read_stage("tiger")
    assert stage_values(stage, [tmp_path / "a.yaml", tmp_path / "b.yaml"]) == {"epochs": 4, "learning_rate": 0.001}
    assert stage_values(stage, [tmp_path / "a.yaml"], [("n_epoch", "5"), ("clip", "2")]) == {"epochs": 5, "learning_rate": 0.001, "grad_clip": 2.0}
    with pytest.raises(ParameterError, match="two names"):
        typed_values(stage, {"epochs": 3, "n_epoch": 3})
    assert check_values(stage_values(stage, [tmp_path / "a.yaml"]), stage.declared)["epochs"] == 3


@pytest.mark.parametrize("text, words", [("- 1\n- 2\n", "not names with values"), ("a: [1\n", "cannot be read"), ("epocs: 3\n", "epochs"), ("epochs: many\n", "'many'"), ("epochs: null\n", "None")])
def test_bad_settings_files_are_named(text, words, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        stage_values(read_stage("tiger"), [path])
    assert words in str(e.value) and "bad.yaml" in str(e.value)


@pytest.mark.parametrize("words, said", [
    (["run", "tokenizer", "-p", "epocs", "3"], "epochs"), (["run", "tokenizer", "-p", "epochs", "many"], "'many'"), (["run", "tokens"], "tokenizer"), (["run"], "STAGE"),
    (["tokenizer"], "recgen run tokenizer"), (["pipelin"], "pipeline"), (["run", "03", "-p", "mode"], "requires 2 arguments"), (["run", "03", "-f", "nowhere.yaml"], "nowhere.yaml"),
    (["pipeline"], "--list"), (["pipeline", "nothing"], "demo"), (["pipeline", "demo", "-p", "99_x.epochs", "1"], "99_x.epochs"), (["pipeline", "demo", "-p", "epochs", "1"], "03_tokenizer.n_clusters"),
    (["pipeline", "demo", "-p", "tokenizer.epocs", "1"], "epochs"), (["pipeline", "demo", "-p", "ctr.epochs", "1"], "04_tiger"), (["pipeline", "demo", "--only", "hgt"], "04_tiger"),
    (["pipeline", "demo", "--from", "nowhere"], "no such stage"), (["pipeline", "demo", "--grid", "x.yaml"], "leave NAME out"),
    (["recommend", "x"], "for whom"), (["recommend", "x", "--users", "all"], "--out"), (["recommend", "x", "--user", "1"], "no such run"), (["ids", "x"], "no such run"), (["runs", "--compare", "x"], "two runs"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_what_is_asked_wrongly_has_status_2_and_starts_nothing(words, said, runs):
    assert said in call(*words, ok=2)
    assert not list(runs.iterdir()) and not list(Path.cwd().iterdir())


def test_a_group_of_processes_is_refused(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "-p num_processes 4" in call("run", "tiger", ok=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "no parameter" in call("run", "tiger", "-p", "x", "1", ok=2)


# --- pipelines


def test_plans_join_folders_and_know_what_is_read():
    steps = pipelines.plan_pipeline({"00_data": {}, "03_tokenizer": {}, "05_ctr": {"codes": "{03_tokenizer}", "modalities": ["image", "{03_tokenizer}:x"]}, "06_compare": {}}, Path("/x"))
    data, tokens, ctr, compare = steps
    assert tokens.values["data_path"] == ctr.values["data_path"] == str(data.folder) and ctr.values["codes"] == str(tokens.folder) and ctr.values["modalities"] == ["image", f"{tokens.folder}:x"]
    assert compare.values["runs"] == f"CTR={ctr.folder}" and pipelines.needed(steps, [ctr]) == {"00_data", "03_tokenizer"}
    own = pipelines.plan_pipeline({"00_data": {}, "03_tokenizer": {"data_path": "elsewhere"}}, Path("/x"), {"data.n_users": "7"})
    assert own[1].values["data_path"] == "elsewhere" and own[0].values["n_users"] == 7, "what a file says itself stays"


@pytest.mark.parametrize("name", pipelines.pipeline_names())
def test_every_pipeline_can_be_planned(name, runs):
    steps = pipelines.plan_pipeline(pipelines.pipeline_settings(name), runs / name)
    text = call("pipeline", name, "--plan")
    assert all(s.stage in text and "{" not in str(s.values.get("codes", "")) for s in steps) and not list(runs.iterdir())
    for step in steps:
        check_values({k: v for k, v in step.values.items()}, read_stage(step.stage).declared)


@pytest.mark.parametrize("path", sorted((NOTEBOOKS / "grids").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_grid_can_be_planned(path, runs):
    text = call("pipeline", "--grid", path.stem, "--plan")
    assert text == call("pipeline", "--grid", path, "--plan") and "06_compare" in text.splitlines()[-1]
    steps = pipelines.plan_search(path, runs / "g")
    assert len({s.folder for s in steps}) == len(steps)
    for step in steps[:-1]:
        assert all(Path(step.values[k]) in {s.folder for s in steps} for k in pipelines.READS[step.stage] if k in step.values)


# --- runs


@pytest.fixture
def some_runs(runs):
    "Two finished runs and one that was stopped."
    made = []
    for rate, figure in ((0.001, 0.05), (0.003, 0.06), (0.01, None)):
        run = Run("04_tiger", {"learning_rate": rate, "epochs": 4, "seed": 0}, dataset="toy")
        run.path("model.pt").write_bytes(b"0" * 3000)
        os.link(run.path("model.pt"), run.path("same.pt"))
        if figure:
            run.finish({"test/item/filtered/ndcg@10": figure, "train/epochs": 4})
        else:
            run.path("metrics.jsonl").write_text('{"epoch": 2}\n')
        made.append(run.folder)
    yield made
    release_all()


def test_runs_are_listed(some_runs, runs):
    rows = json.loads(call("runs", "--format", "json"))
    assert [r["folder"] for r in rows] == [str(f) for f in some_runs] and [r["value"] for r in rows] == [0.05, 0.06, None]
    assert [r["state"] for r in rows[:2]] == ["finished"] * 2 and rows[2]["state"].startswith("running (process") and rows[2]["state"].endswith("epoch 2")
    assert 3000 < rows[0]["bytes"] < 6000, "two names of one file are one file"
    release_all()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (some_runs[2] / ".holder.json").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname(), "since": ""}))
    text = call("runs")
    assert "stopped, epoch 2" in text and "ndcg@10" in text and some_runs[0].name in text
    assert call("runs", "--stage", "tokenizer", ok=0).startswith("no runs") and len(json.loads(call("runs", "--stage", "tiger", "--format", "json"))) == 3
    assert call("runs", some_runs[0], "--format", "csv").count("\n") == 2
    assert "no such folder" in call("runs", "nowhere", ok=1)


def test_damage_and_strange_files_do_not_stop_the_list(some_runs, runs):
    (some_runs[0] / "manifest.json").write_text("{")
    (some_runs[1] / "manifest.json").write_text("[]")
    (runs / "stray").mkdir()
    (runs / "stray" / "manifest.json").write_text('{"stage": "04_tiger", "metrics": {}}')
    states = {r["run"]: r["state"] for r in list_runs(runs)}
    assert [states[f.relative_to(runs).as_posix()] for f in some_runs[:2]] == ["damaged"] * 2 and states["stray"] == "finished"
    assert len(find_runs(runs)) == 4 and folder_size(runs / "nothing") == 0
    for odd in ('{"stage": ["x"]}', '{"stage": "04_tiger", "metrics": [1], "parameters": 3}', '{"metrics": {}}'):
        (runs / "stray" / "manifest.json").write_text(odd)
        assert {r["run"]: r["state"] for r in list_runs(runs)}["stray"] == "damaged"
    (some_runs[2] / ".holder.json").write_text(json.dumps({"pid": 10**20, "host": socket.gethostname()}))
    assert "stopped" in call("runs")
    for words in (["--compare", some_runs[1], "stray"], ["--compare", "stray", some_runs[1]]):
        assert "not a run's manifest" in call("runs", *words, ok=1)


def test_runs_side_by_side(some_runs, runs):
    a, b, c = some_runs
    text = call("runs", "--compare", a.name[:4], b)
    assert "learning_rate" in text and "0.001" in text and "0.003" in text and "0.0600" in text and "epochs" not in text.replace("train/epochs", "")
    found = json.loads(call("runs", "-c", a, b, "--format", "json", "--metrics", "train/*"))[0]
    assert [r[""] for r in found["differs"]] == ["learning_rate"] and [r[""] for r in found["figures"]] == ["train/epochs"]
    assert "not finished" in call("runs", "--compare", a, c, ok=1) and "twice" in call("runs", "--compare", a, a, ok=1)
    for words in (["--compare", a, b, "--stage", "tiger"], ["--compare", a, b, "--full", "--format", "json"], ["--metrics", "*"]):
        assert "--metrics" in call("runs", *words, ok=2)
    assert compare_runs([a, b])["figures"][0] == {"": "test/item/filtered/ndcg@10", a.name: 0.05, b.name: 0.06}
    for place in ("x", "y"):
        (runs / place / "mine").mkdir(parents=True)
        (runs / place / "mine" / ".run.json").write_text("{}")
    assert run_called("x/mine") == runs / "x" / "mine"
    with pytest.raises(ParameterError, match="several"):
        run_called("mine")


# --- recommendations, IDs, data: on a tiny trained run


@pytest.fixture(scope="module")
def trained():
    return tiny("04_tiger")


@pytest.mark.slow
def test_recommendations_for_users_are_the_runs_own(trained, tmp_path):
    lists = pd.read_parquet(trained / "recommendations.parquet")
    asked = lists["user_id"].unique()[:3].tolist()
    found = json.loads(call("recommend", trained, *(w for u in asked for w in ("--user", u)), "--held-out", "--format", "json", "--device", "cpu"))
    for answer, user in zip(found, asked, strict=True):
        wanted = lists[lists["user_id"] == user]
        assert answer["user"] == str(user) and [r["item"] for r in answer["items"]] == wanted["item_id"].tolist() and [r["title"] for r in answer["items"]] == wanted["title"].tolist()
        assert not {h["item"] for h in answer["history"]} & {r["item"] for r in answer["items"]}
    now = json.loads(call("recommend", trained, "--user", asked[0], "--format", "json", "--no-names", "-k", 3))[0]
    assert len(now["history"]) == len(found[0]["history"]) + 1 and len(now["items"]) == 3 and "title" not in now["items"][0]
    path = tmp_path / "all.csv"
    assert "300 users" in call("recommend", trained, "--users", "all", "--out", path, "--held-out")
    table = pd.read_csv(path)
    assert table[table["user_id"].isin(asked)]["item_id"].tolist() == lists[lists["user_id"].isin(asked)]["item_id"].tolist()


@pytest.mark.slow
def test_recommendations_for_histories_and_raw_ids(trained, tmp_path):
    items = pd.read_parquet(trained / "items.parquet").set_index("item_id")["raw_id"]
    found = [json.loads(call("recommend", trained, "--history", text, *more, "--format", "json"))[0]["items"]
             for text, more in (("5,9,31", []), ("5 9 31", []), (",".join(items.loc[[5, 9, 31]]), ["--raw"]))]
    assert found[0] == found[1] == found[2] and len(found[0]) == 10 and not {5, 9, 31} & {r["item"] for r in found[0]}
    for words in (["--history", "99999"], ["--history", "nobody's", "--raw"]):
        assert "knows none of these items" in call("recommend", trained, *words, ok=1)
    assert "note: 1 history entries are not in the catalogue" in call("recommend", trained, "--history", "5,99999")
    users = tmp_path / "users.txt"
    users.write_text("7\n3\n")
    call("recommend", trained, "--users", users, "--out", tmp_path / "some.parquet", "-k", 2)
    assert pd.read_parquet(tmp_path / "some.parquet")["user_id"].tolist() == [7, 7, 3, 3]
    for words, said, code in ((["--user", "301"], "1 … 300", 1), (["--user", "²"], "1 … 300", 1), (["--history", "five"], "five", 2), (["--history", "²"], "whole number", 2), (["--users", users, "--out", "x.txt"], ".parquet or .csv", 2), (["--users", "nowhere.txt", "--out", "x.csv"], "nowhere.txt", 1)):
        assert said in call("recommend", trained, *words, ok=code)
    assert "run of 03_tokenizer" in call("recommend", tiny("03_tokenizer"), "--user", "1", ok=1)


@pytest.mark.slow
def test_ids_are_shown_and_exported(trained, tmp_path):
    table = SemanticIDs.load(trained)
    text = call("ids", trained, "--item", 12)
    codes = table.codes([12])[0].tolist()
    raw = pd.read_parquet(trained / "items.parquet").set_index("item_id")["raw_id"][12]
    assert f"item 12 ({raw}): {','.join(map(str, codes))}" in text and text == call("ids", trained, "--raw", "--item", raw) and pd.read_parquet(trained / "items.parquet").set_index("item_id")["title"][12] in text
    found = json.loads(call("ids", tiny("03_tokenizer"), "-i", 12, "--format", "json", "--limit", 0))[0]
    for step in found["prefixes"]:
        n = len(step["prefix"])
        assert step["prefix"] == codes[:n] and step["items"] == int((table.codes()[:, :n] == table.codes([12])[:, :n]).all(1).sum())
    assert sum(len(s["new"]) for s in found["prefixes"]) == found["prefixes"][-1]["items"] - 1
    rows = json.loads(call("ids", trained, "--prefix", codes[0], "--format", "json", "--limit", 0))
    assert sum(r["items"] for r in rows) == found["prefixes"][-1]["items"]
    assert "200 items, 3 levels" in call("ids", trained)
    for kind in ("json", "csv", "parquet"):
        call("ids", trained, "--out", tmp_path / f"ids.{kind}")
    assert SemanticIDs.load(tmp_path / "ids.json").codes().equal(table.codes()) and SemanticIDs.load(tmp_path / "ids.parquet").codes().equal(table.codes())
    csv = pd.read_csv(tmp_path / "ids.csv")
    assert csv[[f"code_{i}" for i in range(3)]].to_numpy().tolist() == table.codes().tolist() and csv["title"].notna().all()
    for words, said, code in ((["--item", 999], "no such item", 1), (["--prefix", "77"], "no such prefix", 2), (["--prefix", "x"], "3,17", 2), (["--prefix", "²"], "3,17", 2), (["--out", "x.txt"], ".parquet", 2),
                              (["--item", "B1"], "--raw", 1), (["--raw", "--item", "nobody's"], "no such item", 1), (["--item", 5, "--prefix", 1], "at a time", 2)):
        assert said in call("ids", trained, *words, ok=code)


@pytest.mark.slow
def test_data_is_described_and_checked(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny("00_data"), folder)
    text = call("data", folder)
    assert re.search(r"users +300", text) and "DIFFERS" not in text and "item_emb.parquet" in text
    facts = json.loads(call("data", folder, "--format", "json"))[0]
    assert facts["facts"]["items"] == "200" and {f["hash"] for f in facts["files"] if f["file"] == "items.parquet"} == {"as described"}
    assert "FAILS" not in call("data", folder, "--check")
    path = next((folder / "relations").glob("item__*__item.parquet"))
    frame = pd.read_parquet(path)
    frame.assign(target=frame["target"].where(frame.index > 0, 999)).to_parquet(path)
    said = call("data", folder, "--check", ok=1)
    assert "id 999" in said and "holds  item_emb.parquet" in said and "DIFFERS" in call("data", folder)
    (folder / "item_emb.parquet").unlink()
    assert "is not there" in call("data", folder, "--check", ok=1)
    assert "no dataset folder" in call("data", tmp_path, ok=1) and "no such run" in call("data", tmp_path / "x", ok=2)


def test_a_folder_written_by_hand_is_described(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    pd.DataFrame({"user_id": [1, 1, 1, 2, 2, 2, 2], "item_id": [1, 2, 3, 3, 2, 1, 3], "timestamp": range(7)}).to_parquet(folder / "interactions.parquet")
    pd.DataFrame({"item_id": [1, 2, 3], "raw_id": list("abc"), "title": ["x", "y", "z"]}).to_parquet(folder / "items.parquet")
    text = call("data", folder)
    assert re.search(r"interactions +7\n", text) and re.search(r"training rows +3\n", text) and re.search(r"name +mine\n", text)
    assert "FAILS" not in call("data", folder, "--check")
    pd.DataFrame({"user_id": [1, 1], "item_id": [1, 9], "timestamp": [1, 2]}).to_parquet(folder / "interactions.parquet")
    assert "FAILS" in call("data", folder, "--check", ok=1)


@pytest.mark.parametrize("name, text", [("dataset.json", "[]"), ("manifest.json", "[]"), ("interactions.parquet", None)])
@pytest.mark.parametrize("more", [[], ["--check"]], ids=["facts", "checks"])
def test_a_damaged_folder_is_named_not_a_traceback(name, text, more, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny("00_data"), folder)
    if text is None:
        (folder / name).write_bytes((folder / name).read_bytes()[:700])
    else:
        (folder / name).write_text(text)
    assert name.split(".")[0] in call("data", folder, *more, ok=1)


def test_a_run_that_is_being_written_is_waited_for(some_runs, runs):
    said = call("recommend", some_runs[2], "--history", "5", ok=1)
    assert f"process {os.getpid()} is writing to it, epoch 2" in said and "wait for it" in said
    release_all()
    (some_runs[2] / ".holder.json").unlink(missing_ok=True)
    assert "resumes where it stopped" in call("recommend", some_runs[2], "--history", "5", ok=1)
    other = Run("00_data", {"seed": 0}, dataset="toy")
    other.finish({})
    said = call("recommend", "nothing", "--history", "5", ok=2)
    assert some_runs[0].name in said and "00_data" not in said


@pytest.mark.slow
def test_nothing_is_written_into_a_finished_run(trained, tmp_path):
    before = {p: p.read_bytes() for p in trained.rglob("*.parquet")}
    for words in (["ids", trained, "--out", trained / "semantic_ids.parquet"], ["recommend", trained, "--users", "all", "--out", trained / "items.parquet"], ["recommend", trained, "--users", "all", "--out", trained / "new" / "x.csv"]):
        assert "inside a run folder" in call(*words, ok=1)
    assert {p: p.read_bytes() for p in trained.rglob("*.parquet")} == before


@pytest.mark.slow
@pytest.mark.parametrize("name, content, said", [("a.csv", b"", "no users"), ("a.csv", b'user_id,x\n"1,2\n', "as CSV"), ("a.txt", "7é".encode("latin-1"), "UTF-8"), ("a.csv", b"user_id,x\nNA,1\n", "NA"), ("a.csv", b"user_id,x\n", "no users")])
def test_files_of_users_that_cannot_be_read(trained, name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert said in call("recommend", trained, "--users", tmp_path / name, "--out", tmp_path / "out.csv", ok=1) and not (tmp_path / "out.csv").exists()


def test_a_folder_of_runs_may_be_called_like_a_pipeline(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "00_data").mkdir(parents=True)
    assert "03_tokenizer" in call("pipeline", "demo", "--out", "demo", "--plan")
    (tmp_path / "mine").mkdir()
    for kind in ("yaml", "yml"):
        (tmp_path / "mine" / f"00_data.{kind}").write_text("n_users: 20\n")
    assert "two files" in call("pipeline", "mine", "--plan", ok=1)


def test_paths_that_would_break_a_pipelines_comparison_are_refused_first(runs, tmp_path):
    assert "comma" in call("pipeline", "--grid", "tiger-search", "--out", tmp_path / "a,b", "--plan", ok=2)
    (tmp_path / "loop.yaml").write_text("base: &a {x: *a}\n")
    assert "refers to itself" in call("pipeline", "--grid", tmp_path / "loop.yaml", "--plan", ok=1)
    assert "nothing is left" in call("pipeline", "demo", "--from", "04", "--only", "03", "--plan", ok=2)


def test_a_grid_of_hundreds_is_planned(runs, tmp_path):
    (tmp_path / "many.yaml").write_text(f"base: demo\ngrid:\n  04_tiger.seed: {list(range(400))}\n")
    assert call("pipeline", "--grid", tmp_path / "many.yaml", "--plan").count("\n04_tiger/") == 400


def test_what_the_system_refuses_is_one_line(runs, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", "there")
    monkeypatch.setattr("recgen.commands.runs.list_runs", refuse)
    said = call("runs", ok=1)
    assert said.startswith("Error: permission denied") and "there" in said


# --- rows


def test_rows_survive_each_form():
    rows = [{"a": 1, "b": "x, \"y\"\nz", "c": [1, 2], "d": None}, {"a": 22, "b": "緑茶", "c": [], "d": 0.5}]
    assert json.loads(formatted(rows, "json")) == rows
    back = pd.read_csv(__import__("io").StringIO(formatted(rows, "csv")), dtype=str)
    assert back["b"].tolist() == [r["b"] for r in rows] and back["c"].tolist()[0] == "1 2"
    assert len(text_table(rows).splitlines()) == 3 and text_table([]) == "" and cut("緑茶緑茶", 5) == "緑茶…"
