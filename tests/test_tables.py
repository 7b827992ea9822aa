"The user's own tables: dialects, column maps, times, and what is refused."
import gzip
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgen.core.errors import InputError, ParameterError
from recgen.formats.dataset import Dataset
from recgen.sources.assemble import make_dataset
from recgen.sources.log import SECOND, ask, open_spool, read_log
from recgen.sources.tables import UNITS, column_map, read_items, table_source, table_sql, time_sql

ROWS = [(u, i, 1_400_000_000 + 60 * t) for u in ("ann", "bo") for t, i in enumerate(("007", "9", "comb, large", 'the "best"'))]


def csv_text(rows=ROWS, d=",", head=("customer", "sku", "when"), end="\n"):
    quoted = lambda v: '"' + str(v).replace('"', '""') + '"' if set(str(v)) & {d, '"', "\n"} else str(v)  # noqa: E731
    return end.join(d.join(map(quoted, row)) for row in [head, *rows]) + end


def items_of(source, **how):
    with read_log(source, **how) as log:
        keys = log.keys("item").to_pandas().set_index("id")["key"]
        return [(u, keys[i]) for frame in log.frames() for u, i in zip(frame["user_id"], frame["item_id"], strict=True)]


EXPECTED = [(1 + (u == "bo"), i) for u, i, _ in ROWS]


@pytest.mark.parametrize("name, data", [
    ("log.csv", csv_text().encode()),
    ("log.csv", csv_text(end="\r\n").encode()),
    ("log.csv", b"\xef\xbb\xbf" + csv_text().encode()),
    ("log.csv", csv_text(d=";").encode()),
    ("log.tsv", csv_text(d="\t").encode()),
    ("log.txt", csv_text(d="|").encode()),
    ("log.csv.gz", gzip.compress(csv_text().encode())),
    ("log.csv.zst", pa.compress(csv_text().encode(), codec="zstd", asbytes=True)),
    ("log [1]*.csv", csv_text().encode()),
    ("it's.csv", csv_text().encode()),
    ("log.jsonl", "\n".join(json.dumps(dict(zip(("customer", "sku", "when"), r, strict=True))) for r in ROWS).encode()),
])
def test_dialects_of_text_give_the_same_rows(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert items_of(table_source(tmp_path / name, "user=customer timestamp=when")) == EXPECTED


def test_parquet_and_folders_of_parts(tmp_path):
    frame = pd.DataFrame(ROWS, columns=["customer", "sku", "when"])
    frame.to_parquet(tmp_path / "log.parquet")
    assert items_of(table_source(tmp_path / "log.parquet", "user:customer timestamp:when")) == EXPECTED
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in range(3):
        frame.iloc[3 * k : 3 * k + 3].to_csv(folder / f"part-{k}.csv", index=False)
    (folder / "_SUCCESS").write_text("")
    assert items_of(table_source(folder, "user=customer timestamp=when")) == EXPECTED
    (folder / "part-9.csv").write_text("customer,sku\nann,1\n")
    with pytest.raises(InputError, match="different columns"):
        table_source(folder, "user=customer")
    (folder / "part-9.csv").unlink()
    frame.to_parquet(folder / "more.parquet")
    with pytest.raises(InputError, match="one known kind"):
        table_source(folder, "user=customer")


def test_ids_stay_what_they_are(tmp_path):
    frame = pd.DataFrame({"user": [1.0, 1.0, 1.0], "item": ["007", " 7 ", "7.0"]})
    frame.to_parquet(tmp_path / "log.parquet")
    with read_log(table_source(tmp_path / "log.parquet")) as log:
        assert log.keys("user")["key"].to_pylist() == ["1"] and log.keys("item")["key"].to_pylist() == ["007", "7", "7.0"]
    pd.DataFrame({"user": [1, 1.5, 1], "item": [1, 2, 3]}).to_parquet(tmp_path / "half.parquet")
    with pytest.raises(InputError, match="ids are missing") as e, read_log(table_source(tmp_path / "half.parquet")):
        pass
    assert e.value.parts["rows"] == "1" and "1.5" in e.value.parts["found"]


@pytest.mark.parametrize("values, seconds", [
    (["1400000000", "1400000060.9"], [1_400_000_000, 1_400_000_060]),
    (["1400000000123", "1400000060000"], [1_400_000_000, 1_400_000_060]),
    (["1400000000123456"], [1_400_000_000]),
    (["1400000000123456789"], [1_400_000_000]),
    (["2014-05-13T16:53:20Z", "2014-05-13 16:53:20", "2014-05-13"], [1_400_000_000, 1_400_000_000, 1_399_939_200]),
    (["2014-05-13T18:53:20+02:00"], [1_400_000_000]),
    (["-86400"], [-86_400]),
    (["soon", "", "nan", "inf", "1e400"], [None] * 5),
])
def test_times_become_microseconds_of_these_seconds(tmp_path, values, seconds):
    (tmp_path / "t.csv").write_text("time,x\n" + "".join(f"{v},1\n" for v in values))
    with open_spool() as connection:
        table = table_sql(tmp_path / "t.csv")
        found = ask(connection, f"SELECT {time_sql(connection, table, 'time', 'VARCHAR')} FROM {table}")
    assert [t if t is None else t // SECOND for t, in found] == seconds


def micros_of(values, kind: str, unit: str) -> list:
    "What becomes of a column of these values, cast to a type of DuckDB's."
    with open_spool() as connection:
        connection.register("given", pd.DataFrame({"text": values}, dtype="string"))
        connection.execute(f"CREATE TABLE times AS SELECT CAST(text AS {kind}) AS t FROM given")
        return [t for t, in ask(connection, f"SELECT {time_sql(connection, 'times', 't', kind, unit)} FROM times")]


@pytest.mark.parametrize("kind", ["VARCHAR", "BIGINT", "HUGEINT", "DECIMAL(38,9)"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_numbers_become_microseconds_exactly(kind, unit):
    rng, size = np.random.default_rng(0), UNITS[unit]
    seconds, within = rng.integers(-(9 * 10**9), 9 * 10**9, 3000), rng.integers(0, size, 3000)
    seconds[::7] = rng.integers(-3, 3, len(seconds[::7]))
    within[::3] = 0  # whole seconds, which a product of doubles may miss by one
    whole = [str(int(s) * size + int(w)) for s, w in zip(seconds, within, strict=True)] + [str(s * size) for s in (1_400_000_001, 1_583_378_629, -1)]
    texts = whole if kind in ("BIGINT", "HUGEINT") else whole + [f"{t}.{'9' * (i % 10)}{i % 10}"[: len(t) + 10] for i, t in enumerate(whole)]
    assert micros_of(texts, kind, unit) == [math.floor(Fraction(t) * 10**6 / size) for t in texts]


def test_doubles_become_the_microseconds_that_they_are_nearest_to():
    texts = [f"{s}.{ms:03d}" for s, ms in zip(range(1_400_000_000, 1_400_001_000), range(1000), strict=True)]
    for kind in ("DOUBLE", "VARCHAR"):
        assert micros_of(texts, kind, "s") == [int(t.replace(".", "")) * 1000 for t in texts]
        assert micros_of([t.replace(".", "") for t in texts], kind, "ms") == [int(t.replace(".", "")) * 1000 for t in texts]
    assert micros_of(["1400000001000000000", "nan", "inf", "-inf", "1e300"], "DOUBLE", "ns") == [1_400_000_001_000_000] + [None] * 4


@pytest.mark.parametrize("kind, unit, values, micros", [
    ("VARCHAR", "s", ["99999999999", "100000000000", "-99999999999", "-100000000000"], [99_999_999_999 * 10**6, None, -99_999_999_999 * 10**6, None]),
    ("BIGINT", "ms", ["99999999999999", "100000000000000", "9223372036854775807", "-9223372036854775808"], [99_999_999_999_999_000, None, None, None]),
    ("HUGEINT", "ns", ["9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809"], [9_223_372_036_854_775, None, -9_223_372_036_854_776, None]),
    ("VARCHAR", "ns", ["9223372036854775807.5", "9223372036854775808", "1e19"], [None, None, None]),
    ("VARCHAR", "s", ["15e-1", "-15e-1", "1.5e9", "294246-12-31", "294248-01-01", "infinity"], [1_500_000, -1_500_000, 1_500_000_000_000_000, 9_223_371_158_400_000_000, None, None]),
    ("DATE", "s", ["1969-12-31", "9999-12-31", "5000000-01-01", "infinity"], [-86_400 * 10**6, 253_402_214_400 * 10**6, None, None]),
    ("TIMESTAMP_NS", "s", ["1969-12-31 23:59:59.999999999", "2014-05-13 16:53:20.123456789"], [-1, 1_400_000_000_123_456]),
    ("TIMESTAMP WITH TIME ZONE", "s", ["2014-05-13 18:53:20.5+02:00", "infinity"], [1_400_000_000_500_000, None]),
])
def test_times_at_and_beyond_the_ends_of_the_range(kind, unit, values, micros):
    assert micros_of(values, kind, unit) == micros


def test_a_time_out_of_range_is_refused_with_its_line(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time\na,1,1400000000\na,2,100000000000\na,3,1400000002\n")
    with pytest.raises(InputError, match="timestamps are missing or cannot be read") as e, read_log(table_source(tmp_path / "log.csv", time_unit="s")):
        pass
    assert e.value.parts["rows"] == "line 3" and "100000000000" in e.value.parts["found"]


@pytest.mark.parametrize("kind, values", [("timestamp[us]", [1_400_000_000_000_000]), ("timestamp[ns, tz=UTC]", [1_400_000_000_000_000_000]), ("date32", [16203]), ("int64", [1_400_000_000]), ("float64", [1.4e9]), ("int32", [1_400_000_000])])
def test_typed_times_become_seconds(tmp_path, kind, values):
    types = {"timestamp[us]": pa.timestamp("us"), "timestamp[ns, tz=UTC]": pa.timestamp("ns", "UTC"), "date32": pa.date32(), "int64": pa.int64(), "float64": pa.float64(), "int32": pa.int32()}
    pq.write_table(pa.table({"user": ["a"] * 3, "item": ["x", "y", "z"], "time": pa.array(values * 3, types[kind])}), tmp_path / "t.parquet")
    with read_log(table_source(tmp_path / "t.parquet")) as log:
        assert set(next(log.frames())["timestamp"]) == {1_399_939_200 if kind == "date32" else 1_400_000_000}


def test_a_unit_can_be_said(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"a,{i},{1000 * i}\n" for i in range(3)))
    for unit, seconds in (("auto", [0, 1000, 2000]), ("ms", [0, 1, 2])):
        with read_log(table_source(tmp_path / "log.csv", time_unit=unit)) as log:
            assert next(log.frames())["timestamp"].tolist() == seconds


BAD = [
    ("", "the file is empty", {}),
    ("customer,sku,when\n", "no rows", {}),
    ("customer,sku,when\nann,1,5\nann,2\n", "does not fit", {"rows": "line 3", "expected": "3 columns"}),
    ("customer,sku,when\nann,1,5\nann,2,3,4\n", "does not fit", {"rows": "line 3", "found": "'ann,2,3,4'"}),
    ("customer,sku,when\nann,1,5\n,2,3\n", "ids are missing", {"rows": "line 3", "column": "customer"}),
    ("customer,sku,when\nann,1,5\nann,  ,3\n", "ids are missing", {"rows": "line 3", "column": "sku"}),
    ("customer,sku,when\nann,1,5\nann,2,\n", "timestamps are missing", {"rows": "line 3", "found": "nothing"}),
    ("customer,sku,when\nann,1,5\nann,2,later\n", "timestamps are missing", {"rows": "line 3", "found": "'later'"}),
    ("customer,sku,sku\nann,1,5\n", "stands twice", {"column": "sku"}),
    ("customer,,when\nann,1,5\n", "no column is known to be the item", {"found": "column1"}),
    ("customer,sku,SKU,when\nann,1,1,5\n", "stands twice", {"column": "sku, SKU"}),
    ("\n\n", "the file is empty", {}),
    ('customer,sku,when\nann,"a\nb",5\n\nann,2,later\n', "timestamps are missing", {"rows": "line 5"}),
    ("customer,sku,when\nann,1,1400000000\nann,2,1400000000000\n", "timestamps are missing", {"rows": "line 2", "found": "1400000000"}),
    ("customer,sku,when\nann,1,20240501\nann,2,20240502\n", "years and days", {"column": "when"}),
    ("customer,sku,when\nann,1,5\nnan,2,6\n", "ids are missing", {"rows": "line 3", "found": "nan"}),
    ("customer,sku,when\nann,1,5\nann,2,6\n", "fewer than 3", {"rows": "ann"}),
    ("a,b\n1,2\n", "a column is missing", {"column": "customer"}),
]


@pytest.mark.parametrize("text, problem, parts", BAD)
def test_bad_logs_are_refused_before_anything_is_written(tmp_path, text, problem, parts):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(InputError, match=problem) as e:
        make_dataset(table_source(tmp_path / "log.csv", "user=customer timestamp=when"), tmp_path / "out")
    assert "log.csv" in str(e.value.parts["file"]) and not (tmp_path / "out").exists()
    for part, value in parts.items():
        assert value in str(e.value.parts[part]), e.value


@pytest.mark.parametrize("name, data", [("log.csv", b"customer,sku\nann,\xff\xfe\n"), ("log.csv.gz", gzip.compress(csv_text().encode() * 50)[:60]), ("log.csv.gz", b"plain text"), ("log.parquet", b"PAR1 torn"),
                                        ("log.jsonl", b'{"customer": "ann", "sku": 1}\n{"customer": "a'), ("log.xlsx", b"PK"), ("log.csv", b"\xff\xfec\x00")])
def test_files_that_are_not_what_their_name_says(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as e, read_log(table_source(tmp_path / name, "user=customer item=sku")):
        pass
    assert name in str(e.value.parts["file"]) and e.value.parts.get("mend")


def test_a_broken_line_of_json_is_named(tmp_path):
    good = [json.dumps({"user": "a", "item": i}) for i in range(5000)]
    for wrong in ('{"user": "a", "it', '{"user": "a" "item": 1}'):
        (tmp_path / "log.jsonl").write_text("\n".join([*good[:4321], wrong, *good[4321:]]))
        with pytest.raises(InputError, match="a line cannot be read") as e, read_log(table_source(tmp_path / "log.jsonl")):
            pass
        assert e.value.parts["rows"] == "line 4322"


def test_latin_1_and_a_log_without_a_header(tmp_path):
    (tmp_path / "log.csv").write_bytes("zoë,1\nzoë,2\nzoë,3\n".encode("latin-1"))
    source = table_source(tmp_path / "log.csv", "user=column0 item=column1", header=False, encoding="latin-1")
    with read_log(source) as log:
        assert log.keys("user")["key"].to_pylist() == ["zoë"] and log.n_rows == 3


def test_column_maps():
    roles = {"user": ("user_id", "user"), "item": ("item",)}
    assert column_map("user=my user item=b", roles, ["my user", "b"], ("user", "item"), "x") == {"user": "my user", "item": "b"}
    assert column_map("", roles, ["USER", "Item", "z"], ("user", "item"), "x") == {"user": "USER", "item": "Item"}
    assert column_map("user=", roles, ["user", "item"], ("item",), "x") == {"item": "item"}
    for text in ("user", "user=a user=b", "buyer=a"):
        with pytest.raises(ParameterError, match="cannot be read"):
            column_map(text, roles, ["a", "b"], (), "x")


def test_items_of_a_table_join_by_id_and_not_by_row(tmp_path):
    (tmp_path / "log.csv").write_text(csv_text())
    (tmp_path / "goods.csv").write_text('sku,name,maker,path,price\n9,Nine,,A|B,1.5\nnever,Never,Kent,,2\n007,Seven,Kent,A,\n"comb, large",Comb,,,3\n')
    source = table_source(tmp_path / "log.csv", "user=customer timestamp=when", tmp_path / "goods.csv", "title=name brand=maker categories=path")
    facts = make_dataset(source, tmp_path / "out", name="shop")
    made = Dataset.load(tmp_path / "out")
    items = made.items.set_index("raw_id")
    assert made.items["raw_id"].tolist() == ["007", "9", "comb, large", 'the "best"', "never"]
    assert items["title"].to_dict() == {"007": "Seven", "9": "Nine", "comb, large": "Comb", 'the "best"': "", "never": "Never"}
    assert items.loc["9", "categories"].tolist() == ["A", "B"] and items.loc["007", "brand"] == "Kent" and items.loc["9", "price"] == "1.5"
    assert made.users["raw_id"].tolist() == ["ann", "bo"] and facts["n_items"] == 5 and facts["name"] == "shop"
    with pytest.raises(InputError, match="not empty"):
        make_dataset(source, tmp_path / "out", name="shop")
    for text, problem in (("sku,name\n9,a\n9,b\n", "items appear twice"), ("sku,name\n,a\n", "ids are missing"), ("code,name\n1,a\n", "no column is known")):
        (tmp_path / "goods.csv").write_text(text)
        with pytest.raises(InputError, match=problem):
            read_items(tmp_path / "goods.csv")


def test_ratings(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,stars\n" + "".join(f"a,{i},{v}\n" for i, v in enumerate((5, 4.5, -1))))
    with read_log(table_source(tmp_path / "log.csv")) as log:
        assert next(log.frames())["rating"].to_numpy().dtype == np.float32
    (tmp_path / "log.csv").write_text("user,item,stars\na,1,good\na,2,4\na,3,nan\n")
    with pytest.raises(InputError, match="ratings are missing") as e, read_log(table_source(tmp_path / "log.csv")):
        pass
    assert e.value.parts["rows"] == "line 2, line 4"
    with read_log(table_source(Path(tmp_path / "log.csv"), "rating=")) as log:
        assert "rating" not in next(log.frames())


def test_a_folders_name_is_no_column(tmp_path):
    place = tmp_path / "customer=7" / "when=5"
    place.mkdir(parents=True)
    (place / "log.csv").write_text(csv_text())
    pd.DataFrame(ROWS, columns=["customer", "sku", "when"]).to_parquet(place / "log.parquet")
    for name in ("log.csv", "log.parquet"):
        assert items_of(table_source(place / name, "user=customer timestamp=when")) == EXPECTED


def test_events_within_a_second_keep_their_order_and_are_not_one(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"u,{i},14000000000{ms}\n" for i, ms in (("a", "90"), ("b", "10"), ("c", "50"), ("a", "95"))))
    assert [i for _, i in items_of(table_source(tmp_path / "log.csv"))] == ["b", "c", "a", "a"]
    with read_log(table_source(tmp_path / "log.csv")) as log:
        assert log.repeated == 0 and next(log.frames())["timestamp"].tolist() == [1_400_000_000] * 4


def test_filtering_users_leaves_the_catalogue(tmp_path):
    (tmp_path / "log.csv").write_text(csv_text([*ROWS, ("cy", "seldom", 1_400_000_000)]))
    (tmp_path / "goods.csv").write_text('sku,name\n007,Seven\nnever,Never\nseldom,Seldom\n')
    source = table_source(tmp_path / "log.csv", "user=customer timestamp=when", tmp_path / "goods.csv")
    for how, kept in (({"min_user": 3}, {"007", "9", "comb, large", 'the "best"', "never", "seldom"}), ({"k_core": 2}, {"007", "9", "comb, large", 'the "best"'})):
        with read_log(source, **how) as log:
            assert set(log.keys("item")["key"].to_pylist()) == kept and log.count("user") == 2


def test_ids_of_json_are_not_touched(tmp_path):
    rows = [{"user": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A1" + str(i % 2), "item": [1, "x0", 2][i % 3]} for i in range(12)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with read_log(table_source(tmp_path / "log.jsonl")) as log:
        assert log.keys("user")["key"].to_pylist() == [rows[0]["user"], rows[1]["user"]] and sorted(log.keys("item")["key"].to_pylist()) == ["1", "2", "x0"]


def test_an_item_table_of_other_ids_is_refused(tmp_path):
    (tmp_path / "log.csv").write_text(csv_text())
    (tmp_path / "goods.csv").write_text("sku,name,key\nother,Thing,9\n")
    with pytest.raises(InputError, match="none of the log's items") as e:
        make_dataset(table_source(tmp_path / "log.csv", "user=customer timestamp=when", tmp_path / "goods.csv", "item=sku"), tmp_path / "out")
    assert "other" in str(e.value) and "007" in str(e.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("column, values", [("user", [True, False, True]), ("item", [[1], [2], [3]]), ("time", [True, False, True])])
def test_types_that_are_no_ids_or_times(tmp_path, column, values):
    frame = pd.DataFrame({"user": ["a"] * 3, "item": ["x", "y", "z"], "time": [1, 2, 3]})
    frame[column] = values
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(InputError, match="these are no") as e:
        table_source(tmp_path / "log.parquet")
    assert e.value.parts["column"] == column


def test_items_with_columns_of_several_kinds_are_refused_before_writing(tmp_path):
    (tmp_path / "log.csv").write_text(csv_text())
    (tmp_path / "goods.jsonl").write_text("\n".join(json.dumps({"sku": s, "name": s, "size": v}) for s, v in (("007", 5), ("9", "6"), ("comb, large", [1]))))
    try:
        made = make_dataset(table_source(tmp_path / "log.csv", "user=customer timestamp=when", tmp_path / "goods.jsonl"), tmp_path / "out")
        assert made["n_items"] == 4
    except InputError as e:
        assert e.parts["column"] == "size" and not (tmp_path / "out").exists()


def test_a_misspelt_column_gets_the_near_one(tmp_path):
    (tmp_path / "log.csv").write_text(csv_text())
    with pytest.raises(InputError) as e:
        table_source(tmp_path / "log.csv", "user=customer item=skuu timestamp=when")
    assert "did you mean sku?" in e.value.parts["mend"]
    with pytest.raises(InputError) as e:
        table_source(tmp_path / "log.csv", "user=customer item=sku timestamp=zzz")
    assert "did you mean" not in e.value.parts["mend"]


def test_lines_that_end_differently_are_called_so(tmp_path):
    lines = csv_text([(f"u{i}", f"i{i % 7}", 1_400_000_000 + i) for i in range(50)], end="\r\n").split("\r\n")
    (tmp_path / "log.csv").write_bytes("\r\n".join(lines[:20]).encode() + b"\n" + "\r\n".join(lines[20:]).encode())
    with pytest.raises(InputError) as e:
        items_of(table_source(tmp_path / "log.csv", "user=customer item=sku timestamp=when"))
    assert "sed -i" in e.value.parts["mend"] and "lines end differently" in e.value.parts["mend"]


def test_ones_own_table_has_no_licence_of_ours(tmp_path):
    (tmp_path / "log.csv").write_text(csv_text())
    assert table_source(tmp_path / "log.csv", "user=customer item=sku timestamp=when").licence == "not stated"
