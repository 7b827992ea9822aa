"""Amazon's reviews in the formats in which they are published, written from the Beauty data: counts, histories, items and relations come back, and what is wrong is refused with its place."""
import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recgen.core.errors import InputError, ParameterError
from recgen.core.files import write_parquet
from recgen.sources import amazon
from recgen.sources.amazon import (
    RELEASES,
    Metadata,
    amazon_file,
    amazon_source,
    brand_name,
    clean_text,
    find_log,
    find_metadata,
    metadata_line,
    numbered_lines,
    price_number,
)
from recgen.sources.log import read_log, write_interactions

TIME = 1_300_000_000
RELATIONS = ("also_bought", "also_viewed", "bought_together")


# The raw formats

def pack(path: Path, lines, newline: str = "\n") -> Path:
    "Lines as a .gz file, or plain by the name."
    raw = "".join(line + newline for line in lines).encode()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)
    return path


def review(year: int, user: str, item: str, rating: float, time: int) -> dict:
    "A line of a log as its year has it."
    if year == 2023:
        return {"rating": rating, "title": "Fine", "text": "It's \"good\"", "images": [], "asin": item + "-variant", "parent_asin": item, "user_id": user, "timestamp": time * 1000 + 123, "helpful_vote": 0, "verified_purchase": True}
    row = {"reviewerID": user, "asin": item, "reviewerName": 'J. "Jo" {x}', "helpful": [0, 1], "reviewText": "Fine é\n\tyes", "overall": rating, "summary": "ok", "unixReviewTime": time, "reviewTime": "07 23, 2014"}
    return row if year == 2014 else row | {"verified": True, "style": {"Size:": " 5\""}, "vote": "2"}


def product(year: int, item: dict, related: dict) -> dict:
    "A line of metadata as its year has it."
    brand, path = item["brand"] or "Unknown", item["categories"]
    if year == 2014:
        inner = {name: keys for name, keys in related.items() if keys} | {"buy_after_viewing": ["B000000000"]}
        return {"asin": item["asin"], "related": inner, "title": item["title"], "price": 12.99, "salesRank": {"Beauty": 7}, "imUrl": "http://x/y.jpg", "brand": brand, "categories": [path[:1], path], "description": "It's \"soft\" & \n warm"}
    if year == 2018:
        return {"category": path, "tech1": "", "description": ["It's <b>soft</b>", "&amp; warm"], "title": item["title"], "also_buy": related["also_bought"], "also_view": related["also_viewed"], "brand": brand, "feature": ["Round"], "rank": "7 in Beauty (", "price": "$12.99", "asin": item["asin"]}
    return {"main_category": "All Beauty", "title": item["title"], "average_rating": 4.1, "rating_number": 3, "features": ["Round"], "description": ["It's soft", "& warm"], "price": 12.99, "images": [{"large": "x"}], "videos": [], "store": brand, "categories": path,
            "details": {"Size": "5"}, "parent_asin": item["asin"], "bought_together": related["bought_together"] or None}


def literal(row: dict) -> str:
    return repr(row)


class Beauty:
    "The shared data under published ids: `rows` (user, item, rating, time), `items`, `related` {name: {asin: [asin]}}, `pairs`."

    def __init__(self, folder: Path, n_users: int = 10**9):
        self.items = {i["id"]: i for i in map(json.loads, (folder / "items.jsonl").read_text(encoding="utf-8").splitlines())}
        lines = [list(map(int, line.split())) for line in (folder / "sequences.txt").read_text().splitlines()[:n_users]]
        self.histories = {f"A{line[0]:012}": [self.items[i]["asin"] for i in line[1:]] for line in lines}
        self.rows = [(user, item, float(1 + (len(item) + t) % 5), TIME + 86_400 * t) for user, items in self.histories.items() for t, item in enumerate(items)]
        used = {item for items in self.histories.values() for item in items}
        self.items = {i["asin"]: i for i in self.items.values() if i["asin"] in used}
        asins = {i["id"]: asin for asin, i in self.items.items()}
        self.pairs, self.related = {}, {}
        for name in RELATIONS:
            pairs = [tuple(map(int, line.split())) for line in (folder / f"{name}.tsv").read_text().splitlines()]
            self.pairs[name] = {(asins[a], asins[b]) for a, b in pairs if a in asins and b in asins}
            self.related[name] = {asin: ["B00SURPLUS", asin] for asin in self.items}  # one that is not in the log, and itself
            for a, b in sorted(self.pairs[name]):
                self.related[name][a].append(b)

    def of(self, asin: str) -> dict:
        return {name: lists.get(asin, []) for name, lists in self.related.items()}

    def products(self, year: int) -> list:
        "Metadata lines: the items, and as many that nobody bought."
        surplus = [{"asin": f"X{n:09}", "title": "Surplus", "brand": "None", "categories": ["Beauty"]} for n in range(len(self.items))]
        return [product(year, i, self.of(i["asin"])) for pair in zip(self.items.values(), surplus, strict=True) for i in pair]


@pytest.fixture(scope="module")
def beauty(data):
    return Beauty(data / "beauty")


@pytest.fixture(scope="module")
def small(data):
    return Beauty(data / "beauty", 60)


def write_2014(folder: Path, beauty: Beauty) -> Path:
    "The two files of 2014: reviews sorted by item, as published, and literals."
    folder.mkdir(exist_ok=True)
    pack(folder / "reviews_Beauty_5.json.gz", (json.dumps(review(2014, *row)) for row in sorted(beauty.rows, key=lambda r: (r[1], r[0]))))
    pack(folder / "meta_Beauty.json.gz", map(literal, beauty.products(2014)))
    return folder


@pytest.fixture(scope="module")
def whole(beauty, tmp_path_factory):
    return write_2014(tmp_path_factory.mktemp("whole"), beauty)


@pytest.fixture
def folder(small, tmp_path):
    return write_2014(tmp_path / "raw", small)


def histories(log) -> dict:
    "{user: items in order} in published ids."
    frame = pd.concat(log.frames())
    users, items = (log.keys(kind)["key"].to_numpy(zero_copy_only=False) for kind in ("user", "item"))
    user, starts = np.unique(frame["user_id"], return_index=True)
    return {users[u - 1]: part.tolist() for u, part in zip(user, np.split(items[frame["item_id"] - 1], starts[1:]), strict=True)}


def check_items(frame: pd.DataFrame, beauty: Beauty):
    "Titles, brands and categories are what went in."
    assert set(frame["key"]) == set(beauty.items)
    for row in frame.to_dict("records"):
        item = beauty.items[row["key"]]
        assert row["title"] == clean_text(item["title"]) and row["categories"] == item["categories"], item
        assert (None if pd.isna(row["brand"]) else row["brand"]) == (brand_name(item["brand"]) if item["brand"] else None), item
    assert np.allclose(frame["price"], 12.99) and frame["price"].dtype == np.float32


def check_pairs(relations: dict, beauty: Beauty, names):
    assert sorted(relations) == [f"item__{n}__item" for n in names]
    for name in names:
        found = list(zip(*(relations[f"item__{name}__item"][end].tolist() for end in ("source", "target")), strict=True))
        assert len(found) == len(set(found)) and set(found) == beauty.pairs[name]


# What comes back

def test_beauty_2014_has_the_published_counts(whole, beauty, tmp_path):
    source = amazon_source(whole)
    assert source.k_core == 5 and not source.catalogue and "WWW 2016" in source.licence
    with read_log(source, k_core=source.k_core) as log:
        assert (log.count("user"), log.count("item"), log.n_rows, log.repeated) == (22_363, 12_101, 198_502, 0)
        assert histories(log) == beauty.histories
        keys = log.keys("item").to_pandas()["key"]
        frame = source.items(keys)
        assert frame["key"].tolist() == keys.tolist() and frame.attrs == {"items_without_metadata": 0, "repeated_metadata": 0, "titles_dropped": 0}
        check_items(frame, beauty)
        same = sum(row["title"] == beauty.items[row["key"]]["title"] for row in frame.to_dict("records"))
        assert same >= 12_090  # two have entities, three line ends
        check_pairs(source.relations(keys), beauty, RELATIONS)
        facts = write_interactions(tmp_path / "interactions.parquet", log)
        assert facts["n_interactions"] == 198_502 and facts["n_test"] == facts["n_valid"] == 22_363


def test_the_5_core_of_a_noisy_log_is_the_published_one(beauty, tmp_path):
    items = list(beauty.items)
    noise = [(f"N{u}", items[(u * 7 + i) % len(items)], 3.0, TIME + i) for u in range(2_000) for i in range(1 + u % 3)]
    noise += [(user, f"Z{n // 4}", 2.0, TIME + 7) for n, user in enumerate(list(beauty.histories)[:2_000])]
    noise += [(f"N{u}", f"Z{u}", 1.0, TIME) for u in range(300)]  # a fifth one, by a user who goes
    repeated = beauty.rows[:500]
    pack(touch(tmp_path / "raw") / "reviews_Beauty.json.gz", (json.dumps(review(2014, *row)) for row in [*noise, *beauty.rows, *repeated]))
    with read_log(amazon_source(tmp_path / "raw"), k_core=5) as log:
        assert (log.count("user"), log.count("item"), log.n_rows, log.repeated) == (22_363, 12_101, 198_502, 500)
        assert histories(log) == beauty.histories


def write_release(folder: Path, small: Beauty, year: int, kind: str):
    folder.mkdir()
    rows, products = [review(year, *row) for row in small.rows], small.products(year)
    if kind == "jsonl":
        pack(folder / "All_Beauty.jsonl.gz", map(json.dumps, rows))
    elif kind == "json":
        pack(folder / "All_Beauty_5.json.gz", map(json.dumps, rows))
    elif kind.startswith("csv"):
        columns = ["user_id", "parent_asin", "rating", "timestamp"]
        pack(folder / "All_Beauty.csv.gz", [",".join(columns + ["history"] * ("history" in kind)), *(",".join(str(r[c]) for c in columns) + ",B1 B2" * ("history" in kind) for r in rows)])
    else:
        place = folder / "raw_review_All_Beauty" if kind == "folders" else folder
        place.mkdir(exist_ok=True)
        half = len(rows) // 2 if kind == "folders" else len(rows)
        write_parquet(place / ("full-00000-of-00002.parquet" if kind == "folders" else "All_Beauty.parquet"), pd.DataFrame(rows[:half]))
        if kind == "folders":
            write_parquet(place / "full-00001-of-00002.parquet", pd.DataFrame(rows[half:]))
    if kind in ("parquet", "folders"):
        place = folder / "raw_meta_All_Beauty" if kind == "folders" else folder
        place.mkdir(exist_ok=True)
        frame = pd.DataFrame(products).drop(columns=["images", "videos", "details"]).assign(price="12.99")
        write_parquet(place / ("full-00000-of-00001.parquet" if kind == "folders" else "meta_All_Beauty.parquet"), frame)
    else:
        pack(folder / f"meta_All_Beauty.json{'' if year == 2018 else 'l'}.gz", map(json.dumps, products))
    return folder


@pytest.mark.parametrize("year, kind", [(2018, "json"), (2023, "jsonl"), (2023, "csv"), (2023, "csv_history"), (2023, "parquet"), (2023, "folders")])
def test_every_release_gives_the_same_log(small, tmp_path, year, kind):
    source = amazon_source(write_release(tmp_path / "a [b] *c", small, year, kind))  # a folder whose name is a pattern
    assert RELEASES[year].cite in source.licence
    with read_log(source) as log:
        assert histories(log) == small.histories
        frame = pd.concat(log.frames())
        assert sorted(frame["timestamp"]) == sorted(t for *_, t in small.rows) and sorted(frame["rating"]) == sorted(r for _, _, r, _ in small.rows)
        keys = log.keys("item").to_pandas()["key"]
        items = source.items(keys)
        check_items(items, small)
        assert items["description"].eq("It's soft & warm").all() and items["features"].eq("Round").all()
        names = ["also_bought", "also_viewed"] if year == 2018 else ["bought_together"]
        check_pairs(source.relations(keys), small, [n for n in names if small.pairs[n]])


AWKWARD = ["It's 5\" \\ \"double\" 'single'", "naïve ® 毛 🧴 \u2028 line", "tab\there", "{'asin': 'X000000001'}", "100% \\n not a line end", "'", '"', "# no comment", "a'''b\"\"\"c", "\\", "{} % %s"]


@pytest.mark.parametrize("year", [2014, 2018])
def test_awkward_titles_come_back(small, tmp_path, year):
    folder = tmp_path / "raw"
    folder.mkdir()
    items = list(small.items.values())[: len(AWKWARD)]
    rows = [dict(product(year, item, small.of(item["asin"])), title=title, description=title) for item, title in zip(items, AWKWARD, strict=True)]
    pack(folder / "meta_Beauty.json.gz", [literal(r) if year == 2014 else json.dumps(r, ensure_ascii=False) for r in rows])
    keys = pd.Series([i["asin"] for i in items])
    frame = Metadata(folder / "meta_Beauty.json.gz", "asin").items(keys)
    assert frame["title"].tolist() == [t.replace("\t", " ") for t in AWKWARD]


def test_only_lines_of_kept_items_are_parsed(folder, small, monkeypatch):
    seen = []
    monkeypatch.setattr(amazon, "metadata_line", lambda line, n, path: seen.append(n) or metadata_line(line, n, path))
    source = amazon_source(folder)
    keys = pd.Series(list(small.items)[:20])
    source.items(keys)
    source.relations(keys)
    assert len(seen) == 20  # of the surplus none, and the relations came with the items


def test_titles_of_a_page_and_other_defects(tmp_path):
    rows = [{"asin": "B1", "title": "var aPageStart = (new Date()).getTime();", "brand": "by\n    \n    OPI", "price": "$1,005.50 - $2,000.00", "category": ["Clothing", "Women &amp; Girls", "</span></span>", "Fit"]},
            {"asin": "B2", "title": "<span id=x>Comb</span>", "brand": "", "price": ".a-box-inner{background-color:#fff;}", "category": []},
            {"asin": "B3", "title": "Gift &amp;amp; GadgetTime <3", "brand": "Unknown", "price": "", "category": None, "also_buy": [], "also_view": ["B1", "B1", "B3", "B9", 4]},
            {"asin": "B3", "title": "The second line of an item", "also_view": ["B2"]},
            {"asin": "B4", "title": None, "brand": None, "price": None, "main_cat": "<img alt='x'/>", "description": "x" * 5000}]
    pack(tmp_path / "meta_Luxury_Beauty.json.gz", map(json.dumps, rows))
    known = Metadata(tmp_path / "meta_Luxury_Beauty.json.gz", "asin")
    frame = known.items(pd.Series(["B3", "B1", "B2", "B5", "B4"]))
    assert frame["title"].tolist() == ["Gift & GadgetTime <3", "", "", "", ""]
    assert [b if isinstance(b, str) else None for b in frame["brand"]] == [None, "OPI", None, None, None]
    assert frame["categories"].tolist() == [[], ["Clothing", "Women & Girls"], [], [], []]
    assert frame["price"].tolist()[1] == 1005.5 and np.isnan(frame["price"][[0, 2, 3, 4]]).all() and len(frame["description"][4]) == 2000
    assert frame.attrs == {"items_without_metadata": 1, "repeated_metadata": 1, "titles_dropped": 2}
    relations = known.relations(frame["key"])
    assert {n: f.values.tolist() for n, f in relations.items()} == {"item__also_viewed__item": [["B3", "B1"]]}
    assert known.items(pd.Series(["B2"]))["key"].tolist() == ["B2"] and known.relations(pd.Series(["B2"])) == {}  # other ids: read again


def test_prices():
    assert [price_number(p) for p in (3, 12.5, "$12.99", "from 5.00", "$5 - $9")] == [3, 12.5, 12.99, 5, 5]
    assert all(np.isnan(price_number(p)) for p in (None, "", "None", "—", -1, True, float("inf"), float("nan"), [3]))


def test_a_source_without_metadata_is_a_log(folder):
    (folder / "meta_Beauty.json.gz").unlink()
    source = amazon_source(folder)
    assert source.items is None and source.relations == {}


# What is chosen

def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_names_of_files():
    said = {name: (f.category, f.year, f.holds, f.core) if (f := amazon_file(name)) else None for name in
            ("reviews_Toys_and_Games_5.json.gz", "reviews_Books.json.gz", "AMAZON_FASHION_5.json.gz", "Books.json", "Books.jsonl", "Books.csv.gz", "meta_Books.jsonl.gz", "meta_Books.json.gz", "Books.train.csv.gz", "items.jsonl", "dataset.json", "notes.txt")}
    assert said == {"reviews_Toys_and_Games_5.json.gz": ("Toys_and_Games", 2014, "reviews", True), "reviews_Books.json.gz": ("Books", 2014, "reviews", False), "AMAZON_FASHION_5.json.gz": ("AMAZON_FASHION", 2018, "reviews", True),
                    "Books.json": ("Books", 2018, "reviews", False), "Books.jsonl": ("Books", 2023, "reviews", False), "Books.csv.gz": ("Books", 2023, "reviews", True), "meta_Books.jsonl.gz": ("Books", 2023, "items", False),
                    "meta_Books.json.gz": ("Books", 0, "items", False), "Books.train.csv.gz": None, "items.jsonl": None, "dataset.json": None, "notes.txt": None}


def test_the_5_core_stands_before_the_whole_log(tmp_path):
    folder = touch(tmp_path, "Video_Games.json.gz", "Video_Games_5.json.gz", "meta_Video_Games.json.gz", "Books.jsonl.gz", "Books.csv.gz")
    assert find_log(folder, "games").path.name == "Video_Games_5.json.gz" and find_log(folder, year=2023).path.name == "Books.csv.gz"
    assert find_log(folder, reviews="Video_Games.json.gz").year == 2018 and find_log(folder, reviews="Books.jsonl.gz", year=2018).year == 2018


@pytest.mark.parametrize("names, how, problem, mend", [
    (["reviews_Beauty_5.json.gz", "reviews_Baby_5.json.gz"], {}, "which category", "-p category Baby, or Beauty"),
    (["reviews_Automotive_5.json.gz", "Automotive_5.json.gz"], {}, "which year", "-p year 2018, or 2014"),
    (["Books.jsonl.gz", "Books.parquet"], {}, "several files", "take the others away"),
    (["reviews_Beauty_5.json.gz"], {"category": "toys"}, "no category in this folder", ""),
    (["reviews_Beauty_5.json.gz"], {"year": 2023}, "holds no Amazon reviews", "as they are published"),
    (["reviews_Beauty_5.json.gz"], {"year": 2015}, "no Amazon release", ""),
    (["mine.json.gz"], {"reviews": "mine.json.gz"}, "does not say which release", "-p year"),
    ([], {"reviews": "mine.json.gz"}, "no such file of reviews", ""),
    ([], {}, "holds no Amazon reviews", "as they are published"),
])
def test_what_is_not_clear_is_a_choice(tmp_path, names, how, problem, mend):
    with pytest.raises(InputError) as e:
        find_log(touch(tmp_path / "raw", *names), **how)
    assert problem in e.value.problem and mend in e.value.parts.get("mend", "")


def test_metadata_are_of_the_logs_release(tmp_path):
    folder = touch(tmp_path, "Books_5.json.gz", "Books.jsonl.gz", "meta_Books.json.gz", "meta_Books.jsonl.gz", "meta_Toys_and_Games.jsonl.gz")
    assert {year: find_metadata(folder, find_log(folder, year=year)).name for year in (2018, 2023)} == {2018: "meta_Books.json.gz", 2023: "meta_Books.jsonl.gz"}


def test_several_metadata(folder):
    (folder / "meta_Beauty.json").write_bytes(b"{}")
    with pytest.raises(InputError, match="several files hold the items") as e:
        amazon_source(folder)
    assert "take the others away" in e.value.parts["mend"]
    assert amazon_source(folder, metadata="meta_Beauty.json.gz").items is not None
    with pytest.raises(InputError, match="no such file of items"):
        amazon_source(folder, metadata="meta_Toys.json.gz")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        amazon_source(tmp_path / "none")
    with pytest.raises(ParameterError):
        amazon_source(tmp_path, year=1999)


# What is refused

GOOD = [{"reviewerID": f"A{u}", "asin": f"B{i}", "overall": 5.0, "unixReviewTime": TIME + i} for u in range(3) for i in range(4)]


def whole_file(rows) -> bytes:
    return gzip.compress("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode())


def with_line(**change):
    "The good log with line 6 changed."
    row = {**GOOD[5], **change}
    return whole_file([*GOOD[:5], {k: v for k, v in row.items() if v is not ...}, *GOOD[6:]])


@pytest.mark.parametrize("raw, problem, place", [
    (b"", "empty", ""),
    (gzip.compress(b""), "empty", ""),
    (gzip.compress(b"\n \n"), "empty", ""),
    (whole_file(GOOD)[:-12], "cannot be read", ""),
    (whole_file(GOOD)[:40], "torn", ""),
    (b"<html>not found</html>", "torn", ""),
    (gzip.compress(b"\x00\x01 no text"), "not a review", "line 1"),
    (whole_file(["[1, 2]", *GOOD]), "field is missing", "line 1"),
    (whole_file([repr(r) for r in GOOD]), "not a review", "line 1"),
    (whole_file([{k: v for k, v in r.items() if k != "asin"} for r in GOOD]), "field is missing", "asin"),
    (whole_file([*GOOD[:5], '{"reviewerID": "A1", "as', *GOOD[5:]]), "", "line"),
    (whole_file([*GOOD[:5], "[3]", *GOOD[5:]]), "", "line 6"),
    (with_line(asin=...), "ids are missing", "line 6"),
    (with_line(reviewerID=None), "ids are missing", "line 6"),
    (with_line(reviewerID=" "), "ids are missing", "line 6"),
    (with_line(asin={"id": "B1"}), "ids are missing", "line 6"),
    (with_line(asin=["B1"]), "ids are missing", "line 6"),
    (with_line(overall=float("nan")), "ratings are missing", "line 6"),
    (with_line(overall="five"), "ratings are missing", "line 6"),
    (with_line(overall=...), "ratings are missing", "line 6"),
    (with_line(unixReviewTime="soon"), "timestamps are missing", "line 6"),
    (with_line(unixReviewTime=...), "timestamps are missing", "line 6"),
    (with_line(unixReviewTime=float("inf")), "timestamps are missing", "line 6"),
])
def test_bad_reviews(tmp_path, raw, problem, place):
    path = touch(tmp_path / "raw") / "reviews_Beauty_5.json.gz"
    path.write_bytes(raw)
    with pytest.raises(InputError) as e, read_log(amazon_source(path.parent)) as log:
        write_interactions(tmp_path / "out" / "interactions.parquet", log)
    assert problem in str(e.value) and place in str(e.value) and path.name in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lines, problem, place", [
    (["user_id,parent_asin,rating", "A,B,5"], "column is missing", "timestamp"),
    (["user_id,parent_asin,rating,timestamp", "A,B,5,1600000000000", "A,C,5"], "line does not fit", "line 3"),
    (["user_id,parent_asin,rating,timestamp", "A,B,5,1600000000000", ",C,5,1600000000000"], "ids are missing", "line 3"),
    (["user_id,parent_asin,rating,timestamp"], "no rows", ""),
])
def test_bad_ratings_of_2023(tmp_path, lines, problem, place):
    path = pack(touch(tmp_path / "raw") / "Books.csv.gz", lines)
    with pytest.raises(InputError) as e, read_log(amazon_source(path.parent)):
        pass
    assert problem in str(e.value) and place in str(e.value) and path.name in str(e.value)


def test_a_parquet_file_of_which_half_is_there(small, tmp_path):
    folder = write_release(tmp_path / "raw", small, 2023, "parquet")
    keys = pd.Series(list(small.items))
    for name in ("meta_All_Beauty.parquet", "All_Beauty.parquet"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 2])
        with pytest.raises(InputError, match=name):
            amazon_source(folder).items(keys)
    write_parquet(folder / "All_Beauty.parquet", pd.DataFrame({"user_id": ["A"], "asin": ["B"], "rating": [1.0], "timestamp": [1]}))
    with pytest.raises(InputError, match="parent_asin"):
        amazon_source(folder)


ITEMS = [{"asin": f"B{i}", "title": f"Item {i}"} for i in range(4)]


@pytest.mark.parametrize("lines, problem, place", [
    (["{'asin': 'B1', 'title': 'x'"], "neither JSON nor a Python literal", "line 2"),
    (["{'asin': 'B1', 'title': 'x' + open('y').read()}"], "neither JSON nor a Python literal", "line 2"),
    (['{"asin": "B1", "title": "x'], "neither JSON nor a Python literal", "line 2"),
    (["{'asin': 'B1', 'title': '\\ud8'}"], "neither JSON nor a Python literal", "line 2"),
    (["{'asin': 'B1', 'x': " + "(" * 5000 + "}"], "neither JSON nor a Python literal", "line 2"),
    (["{'asin': 'B1', 'x': '" + "y" * (1 << 20) + "'}"], "too long", "line 2"),
    (["('asin', 'B1')"], "neither JSON nor a Python literal", "line 2"),
    (["", "{'title': 'no id'}"], "no id", "line 3"),
    (["{'asin': None, 'title': 'no id'}"], "no id", "line 2"),
    (["{'asin': '', 'title': 'no id'}", "{'asin': '', 'x': {'asin': 'B1'}}"], "no id", "line 3"),
])
def test_bad_metadata(tmp_path, lines, problem, place):
    path = pack(touch(tmp_path) / "meta_Beauty.json.gz", [repr(ITEMS[0]), *lines, *map(repr, ITEMS[1:])])
    with pytest.raises(InputError) as e:
        Metadata(path, "asin").items(pd.Series(["B0", "B1", "B2"]))
    assert problem in e.value.problem and place == e.value.parts["rows"] and e.value.parts["file"] == path


def test_a_literal_runs_nothing(tmp_path):
    path = pack(tmp_path / "meta_Beauty.json", ["{'asin': 'B1', 'title': __import__('pathlib').Path('" + (tmp_path / "made").as_posix() + "').mkdir()}"])
    with pytest.raises(InputError, match="neither JSON nor a Python literal"):
        Metadata(path, "asin").items(pd.Series(["B1"]))
    assert not (tmp_path / "made").exists()


def test_torn_and_endless_files(tmp_path, folder, small):
    keys = pd.Series(list(small.items))
    raw = (folder / "meta_Beauty.json.gz").read_bytes()
    damaged = bytearray(raw)
    damaged[-6] ^= 255  # the length or the checksum at the end
    for wrong in (raw[:-3], raw[: len(raw) // 2], bytes(damaged), b"PK\x03\x04 a zip file"):
        (folder / "meta_Beauty.json.gz").write_bytes(wrong)
        with pytest.raises(InputError, match="torn") as e:
            amazon_source(folder).items(keys)
        assert "meta_Beauty.json.gz" in str(e.value) and "line" in e.value.parts["rows"]
    (folder / "meta_Beauty.json.gz").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        amazon_source(folder)
    long = pack(tmp_path / "long.json.gz", ["short", "x" * (30 << 20)])  # 30 KB on the disk
    tracemalloc.start()
    with pytest.raises(InputError, match="too long") as e:
        list(numbered_lines(long, longest=1 << 20))
    assert e.value.parts["rows"] == "line 2" and tracemalloc.get_traced_memory()[1] < 10 << 20  # it was never held
    tracemalloc.stop()


def test_metadata_of_another_category(folder, tmp_path):
    with pytest.raises(InputError, match="know none of the log's items") as e:
        amazon_source(folder).items(pd.Series(["Q1", "Q2"]))
    assert "Q1" in e.value.parts["found"]
    write_parquet(tmp_path / "meta_Books.parquet", pd.DataFrame({"asin": ["B1"], "title": ["x"]}))
    with pytest.raises(InputError, match="parent_asin"):
        Metadata(tmp_path / "meta_Books.parquet", "parent_asin").items(pd.Series(["B1"]))


def test_metadata_written_as_strict_json(folder, small):
    pack(folder / "meta_Beauty.json.gz", map(json.dumps, small.products(2014)))  # as many people keep the files of 2014
    check_items(amazon_source(folder).items(pd.Series(list(small.items))), small)


def test_plain_files_and_windows_line_ends(small, tmp_path):
    folder = touch(tmp_path / "raw")
    pack(folder / "reviews_Beauty_5.json", (json.dumps(review(2014, *row)) for row in small.rows), "\r\n")
    pack(folder / "meta_Beauty.json", map(literal, small.products(2014)), "\r\n")
    source = amazon_source(folder)
    with read_log(source) as log:
        assert histories(log) == small.histories
    check_items(source.items(pd.Series(list(small.items))), small)
