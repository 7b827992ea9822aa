"""The explorer without a browser: what it shows against plain references, what its fields do, and what is left where nobody is there."""
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from recgen.core.errors import InputError
from recgen.core.run import Run
from recgen.formats.dataset import Dataset
from recgen.formats.semantic_ids import SemanticIDs
from recgen.retrieval import pages, widgets
from recgen.retrieval.pages import find_items, history_tables, item_tables, open_run, page_bundle, read_history, tree_picture
from recgen.retrieval.recommender import Recommender
from recgen.retrieval.transformer import Tiger, TigerConfig

ROOT = Path(__file__).parent.parent
CODES = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(2))
TITLES = [f"{'red blue'.split()[c]} {'soap comb brush perfume'.split()[a]} {'small large huge'.split()[b]}" for a, b, c in CODES.tolist()]
ITEMS = pd.DataFrame({"item_id": range(1, 25), "raw_id": [f"B{i:03}" for i in range(1, 25)], "title": TITLES})
VECTORS = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))


def recommender(items=ITEMS, **changes):
    torch.manual_seed(0)
    return Recommender(Tiger(TigerConfig([4, 3, 2], 16, 16, 2, 32, 1, 1, **changes)), SemanticIDs(range(1, 25), CODES, [4, 3, 2]), items)


def log(**changes):
    frame = pd.DataFrame({"user_id": np.repeat([1, 2, 3], [4, 8, 6]), "item_id": [5, 1, 7, 2, *range(10, 18), 3, 1, 4, 1, 5, 9], "timestamp": range(18)})
    return Dataset(frame, ITEMS, {"name": "shop"}, **changes)


@pytest.fixture(scope="module")
def explorer():
    return open_run(recommender(), log(), VECTORS)


# --- finding


@pytest.mark.parametrize("text, best", [("7", 7), ("b017", 17), ("B01", 10), ("BLUE  Perfume", 20), ("huge red", 5), ("erfum", 19), ("24", 24)])
def test_the_most_exact_reading_comes_first(text, best):
    assert find_items(ITEMS, text)[0] == best


def test_a_number_beats_a_raw_id_and_that_a_title():
    items = ITEMS.assign(raw_id=["7" if i == 104 else str(i) for i in range(100, 124)], title=["7 red soaps", "107", *TITLES[2:]])
    assert find_items(items, "7")[:3] == [7, 5, 1] and find_items(items, "107")[:2] == [8, 2]


def test_every_match_is_found_and_no_other():
    for text in ("blue", "soap large", "s l", "b0"):
        words = text.split()
        expected = {i for i, (t, r) in enumerate(zip(TITLES, ITEMS.raw_id, strict=True), 1) if all(w in t for w in words) or r.lower().startswith(text)}
        found = find_items(ITEMS, text, 99)
        assert set(found) == expected and len(found) == len(expected), text


def test_titles_with_signs_missing_titles_and_lines():
    items = ITEMS.assign(title=["50% off (new) [a.b] \\d", None, "axb new 5", *TITLES[3:]])
    assert find_items(items, "(new)") == [1] and find_items(items, "a.b") == [1] and find_items(items, "\\d") == [1]
    assert find_items(items, "nan") == [] and find_items(items, "none") == []
    assert "\n" not in pages.item_label(ITEMS.assign(title="two\nlines"), 3) and read_history(ITEMS, "two\n3".replace("two", "blue")) == [2, 3]


def test_a_history_is_read_or_its_lines_are_named():
    assert read_history(ITEMS, " 3 \n\nB004\nblue comb huge\n7 · B007 · whatever\n") == [3, 4, 12, 7]
    assert read_history(ITEMS, "3, 4,5\n6") == [3, 4, 5, 6] and read_history(ITEMS, "") == []
    with pytest.raises(InputError) as e:
        read_history(ITEMS, "3\nsoup\n\n25 · B025 · gone\n0")
    assert e.value.parts["rows"] == "line 2 (“soup”), line 4 (“25 · B025 · gone”), line 5 (“0”)"
    with pytest.raises(InputError, match="line 1"):
        read_history(ITEMS.assign(title=["25 soaps", *TITLES[1:]]), "25 · B025 · gone")
    everything = "\n".join(pages.item_label(ITEMS, i, 12) for i in range(1, 25))
    assert read_history(ITEMS, everything) == list(range(1, 25))  # what the fields write, they can read


# --- what is shown


def test_levels_siblings_and_neighbours_are_right(explorer):
    item = 8  # codes 1, 0, 1
    levels, kin, near = item_tables(explorer, item, n=7).values()
    assert levels["code"].tolist() == CODES[item - 1].tolist() and levels["items so far"].tolist() == [6, 2, 1]
    assert levels.iloc[:, -1].tolist() == ["comb", "small", "blue"]
    same = [int((CODES[i - 1] == CODES[item - 1]).long().cumprod(0).sum()) for i in kin["number"]]
    assert kin["codes shared"].tolist() == same == sorted(same, reverse=True) and set(kin["number"]) == set(range(7, 13)) - {item}
    cosine = torch.nn.functional.cosine_similarity(VECTORS, VECTORS[item - 1], dim=1)
    cosine[item - 1] = -2
    assert near["number"].tolist() == (cosine.argsort(descending=True)[:7] + 1).tolist() and near["title"].tolist() == [TITLES[i - 1] for i in near["number"]]
    assert near["cosine"].tolist() == [f"{cosine[i - 1]:.2f}" for i in near["number"]]


def test_an_item_alone_and_a_run_without_vectors(explorer):
    tables = item_tables(pages.Explorer(explorer.recommender), 1)
    assert any("not known" in caption and table.empty for caption, table in tables.items())
    alone = recommender()
    alone.semantic_ids = SemanticIDs(range(1, 25), torch.arange(24)[:, None].expand(-1, 3), [24, 24, 24])
    assert "0 of 0" in list(item_tables(pages.Explorer(alone), 5))[1]


def test_recommendations_are_the_recommenders(explorer):
    had, offered = history_tables(explorer, [3, 9], k=4).values()
    expected = explorer.recommender.recommend([[3, 9]], k=4)
    assert offered["number"].tolist() == expected["item_id"].tolist() and offered["title"].tolist() == expected["title"].tolist() and had["number"].tolist() == [9, 3]


def test_what_a_user_took_is_said_of_this_very_history_only(explorer):
    assert explorer.histories.tolist()[0] == [5, 1, 7] and explorer.targets.tolist() == [2, 17, 9]
    captions, tables = zip(*history_tables(explorer, [5, 1, 7], k=24, user=1).items(), strict=True)
    marked = [row.number for row in tables[1].itertuples() if "took it" in row.title]
    assert marked == [2] and "took next: 2 ·" in captions[1]
    for other in (dict(history=[5, 1], user=1), dict(history=[5, 1, 7], user=2), dict(history=[5, 1, 7])):
        assert not any("took" in str(v) for pair in history_tables(explorer, k=24, **other).items() for v in pair)


def test_users_by_number_and_raw_id():
    users = pd.DataFrame({"user_id": [1, 2, 3], "raw_id": ["ann", "bob", "3000"]})
    explorer = open_run(recommender(), log(users=users))
    assert [explorer.user(t) for t in ("2", " ann ", "3000")] == [2, 1, 3]
    for wrong in ("0", "4", "", "carl", "²"):
        with pytest.raises(InputError, match="no such user"):
            explorer.user(wrong)
    with pytest.raises(InputError, match="no such user"):
        pages.Explorer(recommender()).user("1")


@pytest.mark.parametrize("call", [lambda e: item_tables(e, 0), lambda e: item_tables(e, 25), lambda e: history_tables(e, [3, 25])])
def test_items_that_are_not_there_are_refused(explorer, call):
    with pytest.raises(InputError, match="no such item"):
        call(explorer)


@pytest.mark.parametrize("wrong", [dict(history=5), dict(history=["B003"]), dict(history=[float("nan")]), dict(history=[0]), dict(item="x"), dict(item=25), dict(k=2.5), dict(k=0), dict(vectors=[]), dict(user="nobody")], ids=str)
def test_what_is_asked_wrongly_in_a_cell_is_said(wrong):
    with pytest.raises(InputError) as e:
        widgets.explore(recommender(), **{"dataset": log(), "vectors": VECTORS, **wrong})
    assert "expected" in e.value.parts


def test_a_history_as_text_and_as_numbers_of_numpy_are_the_same(explorer):
    assert explorer.example("3, 5")[:2] == explorer.example(np.array([3, 5]).tolist())[:2] == explorer.example(list(np.array([3, 5])))[:2] == (5, [3, 5])


def test_a_run_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        open_run(tmp_path / "nowhere")


def test_a_history_is_called_a_users_only_where_it_is(explorer):
    assert "of user 1" in next(iter(history_tables(explorer, [5, 1, 7], user=1))) and "given for user 1" in next(iter(history_tables(explorer, [5, 9], user=1)))


def test_another_catalogue_is_refused():
    with pytest.raises(InputError, match="another catalogue"):
        open_run(recommender(), vectors=VECTORS[:-1])
    with pytest.raises(InputError, match="another one"):
        open_run(recommender(ITEMS.assign(raw_id=ITEMS.raw_id[::-1].to_numpy())), log())


def test_the_picture_is_small_and_keeps_its_colours(explorer):
    png, said = tree_picture(explorer, [3, 9, 4])
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)
    assert len(png) < 40_000 and said.startswith("Beam tree: ")
    for colour in ((255, 255, 255), (0xD3, 0x54, 0x00), (0x1B, 0x4F, 0x72)):  # paper; items of the history; what was recommended
        assert (abs(pixels - colour).sum(2) < 40).any(), colour


def test_pages_escape_what_shops_write(explorer):
    strange = recommender(ITEMS.assign(title=['<img src=x onerror="1">', *TITLES[1:]]))
    html = page_bundle(item_tables(open_run(strange), 1), history_tables(open_run(strange), [1]))["text/html"]
    assert "<img" not in html and "&lt;img" in html


# --- a run folder


def test_a_run_folder_finds_its_dataset_and_vectors(tmp_path):
    "The chain 00 → 03 → 04 as manifests record it; a moved or changed folder is done without."
    from recgen.core.files import write_parquet, write_torch
    from recgen.formats.dataset import write_dataset

    data, graph, ids, run = (tmp_path / name for name in ("data", "graph", "ids", "run"))
    write_parquet(graph / "vec.parquet", pd.DataFrame({"ItemID": range(1, 25), "embedding": (VECTORS + 1).tolist()}))
    write_dataset(data, log(), {"vec.parquet": pd.DataFrame({"ItemID": range(1, 25), "mine": VECTORS.tolist()})})

    def finish(stage, folder, inputs, write, **params):
        made = Run(stage, {"seed": 0, **params}, inputs, "shop", str(folder))
        write(made.folder)
        made.finish({}, device="cpu")

    first = recommender()
    finish("03_tokenizer", ids, {"data_path": data, "embedding_column 0": graph}, first.semantic_ids.save, embedding_file="vec.parquet", embedding_column="mine+0:embedding")  # as 03 writes it

    def write(folder):
        first.semantic_ids.save(folder)
        write_parquet(folder / "items.parquet", ITEMS)
        write_torch(folder / "model.pt", first.model.state())

    finish("04_tiger", run, {"data_path": data, "semantic_ids": ids}, write, beams=20)
    found = open_run(run, device="cpu")
    assert found.histories.tolist()[0] == [5, 1, 7] and torch.allclose(found.vectors, torch.cat([VECTORS, VECTORS + 1], 1))
    assert list(history_tables(found, [3]).values())[1]["number"].tolist() == history_tables(open_run(first), [3])["Recommendations"]["number"].tolist()
    graph.rename(tmp_path / "gone")
    assert open_run(run, device="cpu").vectors is None
    data.rename(tmp_path / "elsewhere")
    alone = open_run(run, device="cpu")
    assert alone.histories is None and alone.vectors is None and len(item_tables(alone, 3)) == 3
    assert torch.allclose(open_run(run, tmp_path / "elsewhere", list(VECTORS.double().numpy())).vectors, VECTORS)


# --- the fields


def test_a_click_that_overtakes_what_was_typed_changes_nothing(panels):
    "JupyterLab sends fields and buttons through threads of their own: whichever comes last, the page fits the fields."
    _, history = panels
    history.go.click()  # with what was there before
    history.lines.value = "3\n4\n5"
    assert "3 items" in shown(history)
    history.take.click()  # nobody is in the field yet
    assert "no such user" in history.status.value
    history.user.value = "2"
    assert history.status.value == "" and "of user 2" in shown(history)
    history.k.value = 2
    assert shown(history).split("Recommendations")[1].count("<tr>") == 1 + 2


def test_many_threads_work_one_at_a_time_and_end_with_a_page_that_fits_the_fields(panels, monkeypatch):
    _, history = panels
    running, together = [], []

    def slow(*args):
        running.append(1)
        together.append(len(running))
        time.sleep(0.02)
        running.pop()
        return history_tables(*args)

    monkeypatch.setattr(widgets, "history_tables", slow)
    with ThreadPoolExecutor(4) as pool:
        for i in range(1, 9):
            pool.submit(setattr, history.lines, "value", f"{i}\n{i + 1}")
            pool.submit(history.go.click)
    had = [line.split(" ")[0] for line in history.lines.value.splitlines()]
    assert max(together) == 1 and history.status.value == ""
    assert f"<td class=\"number\">{had[1]}</td><td>B{int(had[1]):03}" in shown(history).split("Recommendations")[0]


@pytest.fixture
def panels(explorer, monkeypatch):
    "The fields, with a picture that costs nothing: `tree_picture` has a test of its own."
    monkeypatch.setattr(widgets, "tree_picture", lambda explorer, history, *options, **more: (str(history).encode(), "a tree"))
    box, item, history = widgets.make_widget(explorer, 5, [1, 2], k=3)
    yield item, history
    box.close()


def shown(panel) -> str:
    return panel.page.value


def test_searching_shows_the_best_match_and_offers_the_others(panels):
    item, _ = panels
    item.search.value = "blue perf"
    assert item.found == [20, 22, 24] and item.item == 20 and "blue perfume small" in shown(item)
    assert [b.description.split(" · ")[0] for b in item.matches if b.layout.display != "none"] == ["20", "22", "24"]
    item.matches[2].click()
    assert item.item == 24 and [b.button_style for b in item.matches[:3]] == ["", "", "info"] and "blue perfume huge" in shown(item)
    before = shown(item)
    item.search.value = "soup"
    assert "no item is called so" in item.status.value and shown(item) == before and item.item == 24
    item.search.value = "1"
    assert item.status.value == "" and item.item == 1


def test_a_typed_history_is_answered_or_its_fault_is_said_beside_it(panels, explorer):
    _, history = panels
    picture = history.picture.value
    history.lines.value = "3\nblue comb huge"
    history.go.click()
    assert "2 items" in shown(history) and history.picture.value not in ("", picture)
    second = shown(history)
    for text, said in (("3\nsoup", "line 2"), ("99", "line 1")):
        history.lines.value = text
        history.go.click()
        assert said in history.status.value and 'role="alert"' in history.status.value and shown(history) == second
    history.lines.value, history.user.value = "3", "nobody"
    history.go.click()
    assert "no such user" in history.status.value
    history.clear.click()
    history.go.click()
    assert history.status.value == "" and "anybody" in shown(history)


def test_users_and_items_fill_the_history(panels):
    item, history = panels
    history.user.value = "3"
    history.take.click()
    assert history.lines.value.splitlines()[0].startswith("3 · B003") and "of user 3" in shown(history) and "took next: 9" in shown(history)
    item.search.value = "B024"
    history.add.click()
    assert history.lines.value.splitlines()[-1].startswith("24 ·") and len(history.lines.value.splitlines()) == 6
    history.user.value = "17"
    history.take.click()
    assert "no such user" in history.status.value and len(history.lines.value.splitlines()) == 6
    history.k.value = 99
    assert history.k.value == 20


def test_no_fault_is_a_traceback(panels, monkeypatch, capsys):
    item, history = panels

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a <b>fault</b>")

    monkeypatch.setattr(widgets, "history_tables", broken)
    monkeypatch.setattr(widgets, "item_tables", broken)
    history.lines.value = "9"
    item.search.value = "soap"
    for panel in panels:
        assert "ZeroDivisionError: a &lt;b&gt;fault" in panel.status.value
    assert "Traceback" not in "".join(capsys.readouterr())


def test_a_model_that_knows_users_asks_for_one():
    explorer = open_run(recommender(num_user_embeddings=10), log())
    box, _, history = widgets.make_widget(explorer, 5, [1, 2])
    assert "the model knows its users" in history.status.value
    history.user.value = "2"
    history.go.click()
    assert history.status.value == "" and "of user 2" in shown(history)
    box.close()


def test_every_control_has_a_label(panels):
    import ipywidgets

    def all_of(widget):
        return [widget, *(w for child in getattr(widget, "children", ()) for w in all_of(child))]

    controls = [w for panel in panels for w in all_of(panel.box) if isinstance(w, (ipywidgets.Text, ipywidgets.Textarea, ipywidgets.BoundedIntText, ipywidgets.Button))]
    assert len(controls) == 6 + 8 and all(w.description for w in controls if w.layout.display != "none")


# --- where nobody is there


def test_static_output_says_the_same(explorer, monkeypatch):
    sent = []
    monkeypatch.setattr(widgets, "display", lambda data, **options: sent.append((data, options)))
    monkeypatch.setattr(widgets, "get_ipython", lambda: object())  # a notebook's, without a kernel that somebody answers
    widgets.explore(explorer.recommender, log(), VECTORS, user="3", k=2)
    assert [list(data) for data, _ in sent] == [["text/html", "text/plain"], ["image/png", "text/plain"]] and all(o["raw"] for _, o in sent)
    plain = sent[0][0]["text/plain"]
    for table in (item_tables(explorer, 5), history_tables(explorer, explorer.histories[2].tolist(), 2, 3)):
        assert all(caption in plain for caption in table)
    assert "of user 3" in plain


def test_a_script_gets_the_tables_as_text(explorer, capsys):
    widgets.explore(explorer.recommender, log(), VECTORS, user="3", k=2)
    printed = capsys.readouterr().out
    assert "Siblings" in printed and "of user 3" in printed and "<table" not in printed and "base64" not in printed


def test_somebody_gets_a_widget_with_the_tables_inside(explorer, monkeypatch):
    sent = []
    monkeypatch.setattr(widgets, "display", lambda data, **options: sent.append(data))
    monkeypatch.setattr(widgets, "somebody_is_there", lambda: True)
    widgets.explore(explorer.recommender, log(), VECTORS, history=[3, 4])
    (data,) = sent
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} and "Siblings" in data["text/html"] and "Siblings" in data["text/plain"]
    monkeypatch.setattr(widgets, "has_widgets", lambda: False)
    monkeypatch.setattr(widgets, "get_ipython", lambda: object())
    widgets.explore(explorer.recommender, log(), VECTORS, history=[3, 4])
    assert all("widget" not in kind for kind in sent[1]) and "image/png" in sent[2]


WITHOUT = """
import sys
sys.modules["ipywidgets"] = None
from recgen.retrieval import widgets
assert not widgets.has_widgets() and not widgets.somebody_is_there()
"""


def test_the_module_needs_no_widgets():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_who_sends_the_cell_says_whether_somebody_is_there():
    "A real kernel; a client that can be asked for input, as JupyterLab, and one that cannot, as nbclient."
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        for asked in (True, False):
            printed = []
            client.execute_interactive("from recgen.retrieval.widgets import somebody_is_there as s; print(s())", allow_stdin=asked, timeout=60,
                                       output_hook=lambda m, printed=printed: printed.append(m["content"].get("text", "")), stdin_hook=lambda m: None)
            assert "".join(printed).strip().endswith(str(asked)), printed
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_no_notebook_stores_dead_widgets():
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        book = nbformat.read(path, 4)
        assert "widgets" not in book.metadata, path.name
        assert "jupyter.widget-view" not in json.dumps([c.get("outputs", []) for c in book.cells]), path.name
