"""Every stage notebook in a real browser: all cells run, all pictures are seen, the explorer answers. Run by `make test-browser`; pytest alone does not collect it."""
import os
import re
import signal
import time
from pathlib import Path

import nbformat
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from . import lab as browser

STAGES = sorted(p.stem for p in (browser.ROOT / "nbs").glob("0*.ipynb"))
PICTURES = Path(os.environ.get("RECGEN_RUNS") or browser.ROOT / "runs").resolve() / "browser"
SECONDS = 300 if os.environ.get("CI") else 900  # a stage takes 20 to 60 alone on two cores; a busy machine several times that
SMALL = {"04_tiger": {"epochs": 1, "eval_every": 1, "valid_users": 100, "embedding_dim": 32, "attn_dim": 32, "num_heads": 2, "ff_dim": 64, "sasrec_epochs": 2}} if os.environ.get("CI") else {}
MEASURED = {"07_benchmarks": 3}  # its stored pictures show more than a bare run measures: so many at least


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    if not (browser.BROWSER and browser.DRIVER):
        pytest.fail("there is no browser to test with: apt-get install chromium chromium-driver")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, the browser and the server end, too
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="session")
def lab(folder):
    with browser.jupyter_lab(folder) as lab:
        yield lab


@pytest.fixture(scope="session")
def driver(folder, lab):
    with browser.chromium(folder) as driver:
        yield driver


def images_of(cell) -> int:
    "Pictures that a stored cell shows."
    return sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in cell.get("outputs", []))


def open_notebook(driver, lab, folder, name: str, **small):
    "A stage's notebook, its parameters changed in the copy."
    path = folder / "work" / "nbs" / f"{name}.ipynb"
    book = nbformat.read(path, 4)
    cell = next((c for c in book.cells if "parameters" in c.metadata.get("tags", [])), None)
    for key, value in small.items():
        cell.source, n = re.subn(rf"(?m)^({key}: \w+ = )[^#\n]+?(?=  #|$)", rf"\g<1>{value!r}", cell.source)
        assert n == 1, key
    nbformat.write(book, path)
    cells = [c for c in book.cells if c.cell_type == "code"]
    notebook = browser.Notebook(driver, lab, name, [c.source for c in cells])
    notebook.pictures = [images_of(c) for c in cells]  # of each code cell, as stored
    return notebook


def check_pictures(notebook):
    "AssertionError with the text of a cell that shows fewer pictures than it should, or an empty one."
    found, least = notebook.images(), MEASURED.get(notebook.name)
    assert least is None or sum(map(len, found)) >= least, f"{notebook.name}: {sum(map(len, found))} pictures instead of {least}"
    for source, widths, n in zip(notebook.sources, found, [0] * len(found) if least else notebook.pictures, strict=True):
        assert all(widths), f"{notebook.name}: a picture is broken in\n\n{source}"
        assert len(widths) >= n, f"{notebook.name}: {len(widths)} pictures instead of {n} in\n\n{source}"


@pytest.mark.parametrize("name", [s for s in STAGES if s != "04_tiger"])
def test_stage(driver, lab, folder, name):
    notebook = open_notebook(driver, lab, folder, name, **SMALL.get(name, {}))
    try:
        notebook.run_all(SECONDS)
        check_pictures(notebook)
    finally:
        notebook.screenshots(PICTURES)


@pytest.fixture(scope="module")
def tiger(driver, lab, folder):
    "04_tiger, open and run."
    notebook = open_notebook(driver, lab, folder, "04_tiger", **SMALL.get("04_tiger", {}))
    try:
        notebook.run_all(SECONDS)
        check_pictures(notebook)
    finally:
        notebook.screenshots(PICTURES)
    return notebook


def labelled(notebook, label: str):
    "The control that a label belongs to, brought into view."
    caption = notebook.find(f"//*[contains(@class, 'recgen-explorer')]//label[text()='{label}']")
    control = notebook.driver.find_element(By.ID, caption.get_attribute("for"))
    notebook.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", control)
    return control


def type_into(control, text: str, *then):
    "Replace what a field holds."
    control.send_keys(Keys.CONTROL, "a", Keys.NULL, text, *then)


def texts(notebook, selector: str) -> list:
    "The text of each such part of the explorer, read at one instant."
    return notebook.driver.execute_script("return [...document.querySelectorAll('.recgen-explorer ' + arguments[0])].map(e => e.innerText.replaceAll('\xa0', ' '))", selector)


def table_text(notebook, caption: str) -> str:
    "The text of the explorer's table whose caption begins so; '' where there is none."
    return next((t for t in texts(notebook, "figure") if t.startswith(caption)), "")


def picture(notebook) -> str:
    "The beam tree's source, once it is drawn."
    return notebook.driver.execute_script("const i = document.querySelector('.recgen-explorer img'); return i && i.complete && i.naturalWidth > 200 ? i.src : ''")


def test_explorer_shows_an_item(tiger):
    before = table_text(tiger, "Siblings")
    assert before and table_text(tiger, "Neighbours").count("\n") > 3
    search = labelled(tiger, "Item")
    type_into(search, "1")
    browser.wait_until(lambda: table_text(tiger, "Semantic ID of 1 ·"), 20, "item 1's semantic ID")
    word = max(re.findall(r"[A-Za-z]+", table_text(tiger, "Siblings").splitlines()[-1]), key=len)
    type_into(search, word)
    found = browser.wait_until(lambda: (found := [t for t in texts(tiger, "button.recgen-match") if t]) and len(found) > 1 and all(word in t for t in found) and found, 20, f"items called {word}")
    browser.wait_until(lambda: found[0] in table_text(tiger, "Semantic ID"), 20, "the best match")
    search.send_keys(Keys.TAB, Keys.TAB, Keys.ENTER)  # on to the second button, by keyboard alone
    browser.wait_until(lambda: found[1] in table_text(tiger, "Semantic ID"), 20, "the second match's semantic ID")
    assert table_text(tiger, "Siblings") != before
    search = labelled(tiger, "Item")
    type_into(search, "no such thing")
    said = browser.wait_until(lambda: texts(tiger, "[role=alert]"), 20, "a message")
    assert "no item is called so" in said[0]


def test_explorer_recommends(tiger):
    drawn = browser.wait_until(lambda: picture(tiger), 20, "the first beam tree")
    lines = labelled(tiger, "History")
    type_into(lines, "3\n5\n8")
    tiger.find("//button[normalize-space()='Recommend']").click()
    browser.wait_until(lambda: "3 items" in table_text(tiger, "History"), 30, "the typed history")
    assert table_text(tiger, "Recommendations").count("\n") >= 5
    browser.wait_until(lambda: picture(tiger) not in ("", drawn), 20, "another beam tree")
    type_into(labelled(tiger, "History"), "3\nno such thing")
    tiger.find("//button[normalize-space()='Recommend']").click()
    said = browser.wait_until(lambda: [t for t in texts(tiger, "[role=alert]") if "line 2" in t], 20, "a message")
    assert "no such thing" in said[0]
    user = labelled(tiger, "User")
    type_into(user, "2", Keys.TAB, Keys.ENTER)  # the button is next
    browser.wait_until(lambda: "of user 2" in table_text(tiger, "History"), 30, "user 2's history")


def test_explorer_fits_a_narrow_window(tiger):
    "Nothing sticks out at 800 pixels, and every control has its label."
    tiger.driver.set_window_size(800, 1000)
    try:
        time.sleep(1)
        box = tiger.driver.find_element(By.CSS_SELECTOR, ".recgen-explorer")
        tiger.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", box)
        tiger.driver.save_screenshot(str(PICTURES / "explorer-800px.png"))
        wide, there = tiger.driver.execute_script("return [arguments[0].scrollWidth, arguments[0].clientWidth]", box)
        assert wide <= there + 1, f"{wide} pixels in {there}"
        bare = [e.get_attribute("outerHTML")[:200] for e in box.find_elements(By.CSS_SELECTOR, "input, select, textarea") if e.is_displayed() and not e.get_property("labels")]
        assert not bare
    finally:
        tiger.driver.set_window_size(1280, 1000)


BROKEN = {  # what happens in a cell: what the check must say
    "raise ValueError('oh no')": "this cell shows an error[^~]*raise ValueError[^~]*oh no",
    "import os, time; time.sleep(1); os._exit(1)": "JupyterLab says[^~]*os._exit",
    "print('no picture')": "0 pictures instead of 1",
    "from IPython.display import HTML; HTML('<img src=\"nowhere.png\">')": "a picture is broken",
    "import time; time.sleep(60)": "waited 10 s[^~]*time.sleep",
}


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_what_is_broken_is_noticed(driver, lab, folder, number):
    source, name = list(BROKEN)[number], f"broken-{number}"
    stored = nbformat.v4.new_output("display_data", {"image/png": ""})
    cells = [nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell(source, outputs=[stored])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}}), folder / "work" / "nbs" / f"{name}.ipynb")
    with pytest.raises(AssertionError) as said:
        notebook = open_notebook(driver, lab, folder, name)
        notebook.run_all(10 if "sleep" in source else 60)
        check_pictures(notebook)
    assert re.search(BROKEN[source], str(said.value)), str(said.value)
