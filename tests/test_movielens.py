"""MovieLens in the files of its releases, written from ML-100K: counts, histories, films and people come back, and what is wrong is refused with its place."""
import csv
from pathlib import Path

import pandas as pd
import pytest

from recgen.core.errors import InputError
from recgen.sources.log import read_log, write_interactions
from recgen.sources.movielens import DIALECTS, GENRES, OCCUPATIONS, find_release, movielens_source, read_movies, read_people

class Films:
    "ML-100K: `ratings` (user, film, rating, time) in the file's order, `films` {id: (title with its year, year or None, genres)}, `people` {id: (age, gender, occupation, zip)}; all text."

    def __init__(self, folder: Path):
        table = {kind: [line.split("\t") for line in (folder / f"ml-100k.{kind}").read_text(encoding="utf-8").splitlines()[1:]] for kind in ("inter", "item", "user")}
        self.ratings = table["inter"]
        self.films = {key: (f"{title} ({year})" if year != "unkonwn" else "unknown", int(year) if year.isdigit() else 1995 if year == "V" else None, genres.split()) for key, title, year, genres in table["item"]}  # "… (1995) (V)" is on video
        self.people = {key: rest for key, *rest in table["user"]}

    def genres(self, key) -> list:
        return [g for g in self.films[key][2] if g != "unknown"]


@pytest.fixture(scope="module")
def films(data):
    return Films(data / "ml100k")


def write(path: Path, lines, encoding: str = "utf-8"):
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))


def write_100k(folder: Path, f: Films) -> Path:
    folder.mkdir(parents=True)
    write(folder / "u.data", ("\t".join(row) for row in f.ratings))
    write(folder / "u.item", ("|".join([key, title, f"01-Jan-{year}" if year else "", "", "http://us.imdb.com/M/title-exact?x" if year else "", *("1" if g in genres else "0" for g in GENRES)]) for key, (title, year, genres) in f.films.items()), "latin-1")
    write(folder / "u.genre", [f"{g}|{n}" for n, g in enumerate(GENRES)] + [""])
    write(folder / "u.user", ("|".join([key, *rest]) for key, rest in f.people.items()))
    write(folder / "u1.base", ["1\t1\t5\t874965758"])  # GroupLens' own splits lie beside it
    return folder


JOBS = {"technician": 17, "other": 0, "writer": 20, "executive": 7, "administrator": 3, "student": 4, "lawyer": 11, "educator": 1, "scientist": 15, "entertainment": 2, "programmer": 12, "librarian": 0, "homemaker": 9, "artist": 2, "engineer": 17, "marketing": 14, "none": 19, "healthcare": 6, "retired": 13, "salesman": 14, "doctor": 6}


def write_dat(folder: Path, f: Films, encoding: str = "latin-1", people: bool = True) -> Path:
    folder.mkdir(parents=True)
    write(folder / "ratings.dat", ("::".join(row) for row in f.ratings))
    write(folder / "movies.dat", (f"{key}::{title}::{'|'.join(f.genres(key)) or '(no genres listed)'}" for key, (title, _, _) in f.films.items()), encoding)
    if people:
        write(folder / "users.dat", (f"{key}::{gender}::{age}::{JOBS[job]}::{place}" for key, (age, gender, job, place) in f.people.items()))
    return folder


def write_csv(folder: Path, f: Films) -> Path:
    folder.mkdir(parents=True)
    tables = {"ratings": [["userId", "movieId", "rating", "timestamp"], *f.ratings], "links": [["movieId", "imdbId", "tmdbId"], *([key, f"{int(key):07}", "" if key == "1" else str(9 * int(key))] for key in f.films)],
              "movies": [["movieId", "title", "genres"], *([key, title, "|".join(f.genres(key)) or "(no genres listed)"] for key, (title, _, _) in f.films.items())], "tags": [["userId", "movieId", "tag", "timestamp"], ["1", "1", 'so, "good"', "1"]]}
    for name, rows in tables.items():
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(rows)
    return folder


WRITERS = {"100K": write_100k, "dat": write_dat, "csv": write_csv}


def named(log) -> pd.DataFrame:
    "The rows under published ids."
    users, items = (log.keys(kind)["key"].to_numpy(zero_copy_only=False) for kind in ("user", "item"))
    frame = pd.concat(log.frames())
    return frame.assign(user=users[frame["user_id"] - 1], film=items[frame["item_id"] - 1])


@pytest.mark.parametrize("kind", WRITERS)
def test_100k_has_the_published_counts(films, tmp_path, kind):
    source = movielens_source(WRITERS[kind](tmp_path / "ml [x]", films))
    assert source.k_core == 0 and "Harper" in source.licence
    with read_log(source) as log:
        assert (log.count("user"), log.count("item"), log.n_rows, log.repeated) == (943, 1_682, 100_000, 0)
        rows = named(log)
        assert sorted(zip(rows["user"], rows["film"], rows["rating"], rows["timestamp"], strict=True)) == sorted((u, i, float(r), int(t)) for u, i, r, t in films.ratings)
        one = rows[rows["user"] == "196"]
        expected = sorted((int(t), n, i) for n, (u, i, _, t) in enumerate(films.ratings) if u == "196")  # equal seconds: as the file has them
        assert one["film"].tolist() == [i for *_, i in expected]
        keys = {kind: log.keys(kind).to_pandas()["key"] for kind in ("user", "item")}
        assert keys["user"].iloc[0] == films.ratings[0][0] and keys["item"].iloc[0] == films.ratings[0][1]
        assert write_interactions(tmp_path / "interactions.parquet", log)["n_interactions"] == 100_000
    items = source.items(keys["item"])
    assert items["key"].tolist() == keys["item"].tolist()
    for row in items.to_dict("records"):
        title, year, _ = films.films[row["key"]]
        assert row["title"] == title and row["categories"] == films.genres(row["key"]) and (None if pd.isna(row["year"]) else row["year"]) == year, row
    assert sum("é" in title for title in items["title"]) >= 6
    if kind == "csv":
        assert source.users is None
        assert dict(zip(items["key"], items["imdb_id"], strict=True))["1682"] == "0001682" and items["tmdb_id"].isna().sum() == 1
    else:
        people = source.users(keys["user"])
        assert people["key"].tolist() == keys["user"].tolist() and people["age"].dtype == "int32"
        for row in people.to_dict("records"):
            age, gender, job, place = films.people[row["key"]]
            assert (str(row["age"]), row["gender"], row["zip_code"]) == (age, gender, place) and row["occupation"] == (job if kind == "100K" else OCCUPATIONS[JOBS[job]])
    if kind == "100K":
        assert items.set_index("key")["release_date"]["1"] == "01-Jan-1995" and items["release_date"].isna().sum() == 1


def test_10m_is_utf8_has_no_users_and_halves_of_stars(films, tmp_path):
    folder = write_dat(tmp_path / "ml-10M100K", films, "utf-8", people=False)
    write(folder / "tags.dat", ["15::4973::excellent!::1215184630"])
    rows = [[u, i, str(float(r) - 0.5), t] for u, i, r, t in films.ratings]
    write(folder / "ratings.dat", map("::".join, rows))
    source = movielens_source(folder)
    assert source.users is None
    with read_log(source) as log:
        frame = pd.concat(log.frames())
        assert frame["rating"].dtype == "float32" and sorted(frame["rating"].unique()) == [0.5, 1.5, 2.5, 3.5, 4.5]
        titles = source.items(log.keys("item").to_pandas()["key"])["title"]
    assert "Misérables, Les (1995)" in set(titles)


def test_films_that_nobody_rated(films, tmp_path):
    folder = write_csv(tmp_path / "ml", films)
    write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *(",".join(r) for r in films.ratings if int(r[1]) <= 1_000)])
    for catalogue, n in ((False, 1_000), (True, 1_682)):
        source = movielens_source(folder, catalogue)
        with read_log(source, min_user=3) as log:
            assert log.count("item") == n or catalogue  # a filter drops what nobody took
            assert len(source.items(None)) == 1_682
        with read_log(source, min_user=0, split="time") as log:
            assert log.count("item") == n
            assert source.items(log.keys("item").to_pandas()["key"])["title"].str.len().gt(0).all()


def test_titles_years_and_genres(tmp_path):
    names = {"1": ('"Great" Cats, The: A (Story) (1998)', 1998), "2": ("Death Note: Desu nôto (2006–2007)", 2006), "3": ("Series (2009- )", 2009), "4": ("2001", None), "5": ("Babylon 5", None), "6": ("Brazil (1985) ", 1985), "7": ("Nine (09)", None), "8": ("Land Before Time III (1995) (V)", 1995)}
    folder = tmp_path / "ml"
    folder.mkdir()
    with open(folder / "movies.csv", "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["movieId", "title", "genres"], *([k, t, "Comedy|Sci-Fi" if k == "1" else "(no genres listed)"] for k, (t, _) in names.items())])
    frame = read_movies(folder, DIALECTS["csv"])
    assert [None if pd.isna(y) else y for y in frame["year"]] == [y for _, y in names.values()]
    assert frame["title"].tolist() == [t.strip() for t, _ in names.values()] and frame["categories"].tolist() == [["Comedy", "Sci-Fi"]] + [[]] * 7


def test_the_release_is_found_in_the_folder_that_the_zip_made(films, tmp_path):
    write_dat(tmp_path / "ml-1m", films)
    assert find_release(tmp_path) == (tmp_path / "ml-1m", DIALECTS["dat"])
    write_100k(tmp_path / "ml-100k", films)
    with pytest.raises(InputError, match="several MovieLens releases") as e:
        find_release(tmp_path)
    assert "ml-100k/u.data" in e.value.parts["found"]
    (tmp_path / "ml-1m" / "ratings.csv").touch()
    with pytest.raises(InputError, match="several MovieLens releases"):
        find_release(tmp_path / "ml-1m")


@pytest.mark.parametrize("make", [None, ()])
def test_no_release(tmp_path, make):
    folder = tmp_path / "ml"
    if make is not None:
        folder.mkdir()
        (folder / "README.txt").touch()
    with pytest.raises(InputError) as e:
        movielens_source(folder)
    assert e.value.parts["file"] == folder and "ratings.csv" in e.value.parts["expected"]


ROWS = [f"{u}::{m}::4::{978300000 + m}" for u in (1, 2) for m in (1, 2, 3)]
MOVIES = ["1::Toy Story (1995)::Animation|Comedy", "2::Heat (1995)::Crime", "3::Seven (1995)::Crime"]
USERS = ["1::F::1::10::48067", "2::M::56::16::70072"]


@pytest.mark.parametrize("file, line, new, problem", [
    ("ratings.dat", 2, "1::2::good::978300002", "ratings are missing"),
    ("ratings.dat", 2, "1::2::nan::978300002", "ratings are missing"),
    ("ratings.dat", 2, "1::2::::978300002", "ratings are missing"),
    ("ratings.dat", 2, "1::2::4::soon", "timestamps are missing"),
    ("ratings.dat", 2, "1::2::4::inf", "timestamps are missing"),
    ("ratings.dat", 2, "::2::4::978300002", "ids are missing"),
    ("ratings.dat", 2, "1:: ::4::978300002", "ids are missing"),
    ("ratings.dat", 2, "1::2::4", "line does not fit"),
    ("ratings.dat", 2, "1::2::4::978300002::1", "line does not fit"),
    ("ratings.dat", 2, "1\t2\t4\t978300002", "line does not fit"),
    ("ratings.dat", None, "", "empty"),
    ("movies.dat", 2, "2::Heat (1995)", "another number of columns"),
    ("movies.dat", 2, "::Heat (1995)::Crime", "ids are missing"),
    ("movies.dat", 2, "1::Heat (1995)::Crime", "ids stand twice"),
    ("movies.dat", 2, "4::Heat (1995)::Crime", "films of the ratings are not listed"),
    ("movies.dat", None, "", "missing or empty"),
    ("movies.dat", None, None, "missing or empty"),
    ("users.dat", 2, "2::M::old::16::70072", "user's age"),
    ("users.dat", 2, "2::M::-1::16::70072", "user's age"),
    ("users.dat", 2, "2::M::5.5::16::70072", "user's age"),
    ("users.dat", 2, "2::M::56::21::70072", "user's occupation"),
    ("users.dat", 2, "2::M::56::16", "another number of columns"),
    ("users.dat", 2, "3::M::56::16::70072", "users of the ratings are not listed"),
    ("users.dat", None, "", "missing or empty"),
])
def test_bad_files(tmp_path, file, line, new, problem):
    lines = {"ratings.dat": ROWS, "movies.dat": MOVIES, "users.dat": USERS}
    for name, good in lines.items():
        write(tmp_path / name, good)
    if line:
        write(tmp_path / file, [*lines[file][: line - 1], new, *lines[file][line:]])
    elif new is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError) as e:
        source = movielens_source(tmp_path)
        with read_log(source) as log:
            source.items(log.keys("item").to_pandas()["key"])
            source.users(log.keys("user").to_pandas()["key"])
    assert problem in e.value.problem and Path(e.value.parts["file"]).name == file
    if line and "not listed" not in problem:
        assert f"line {1 if 'twice' in problem else line}" in e.value.parts["rows"]


@pytest.mark.parametrize("name, text, problem", [
    ("ratings.csv", "user,movie,rating,timestamp\n1,1,4,978300000\n", "column is missing"),
    ("ratings.csv", "userId,movieId,rating,timestamp\n", "no rows"),
    ("ratings.csv", 'userId,movieId,rating,timestamp\n1,1,4,978300000\n1,"1,4,978300000\n', ""),
    ("ratings.csv", "userId,movieId,rating,timestamp\n1,1,4,978300000\n1,1,4\n", "line does not fit"),
    ("movies.csv", "movieId,title,genres\n1,Heat, Very (1995),Crime\n", ""),
    ("movies.csv", "id,title,genres\n1,Heat,Crime\n", "column is missing"),
    ("movies.csv", "movieId,title,genres\n1,Heat,Crime\n1,Heat,Crime\n", "twice"),
    ("movies.csv", None, "no such file"),
    ("links.csv", "movieId,imdbId,tmdbId\n1,2\n", "line does not fit"),
])
def test_bad_csv_files(tmp_path, name, text, problem):
    good = {"ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(f"1,1,4.5,{978300000 + t}\n" for t in range(3)), "movies.csv": 'movieId,title,genres\n1,"Heat, Very (1995)",Crime\n', "links.csv": "movieId,imdbId,tmdbId\n1,2,\n"}
    for file, content in {**good, name: text}.items():
        if content is not None:
            (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as e, read_log(movielens_source(tmp_path)):
        pass
    assert problem in e.value.problem and name in str(e.value)
    for file, content in good.items():
        (tmp_path / file).write_text(content)
    with read_log(movielens_source(tmp_path)) as log:
        assert log.n_rows == 3


def test_a_flag_that_is_none(tmp_path, films):
    folder = write_100k(tmp_path / "ml", films)
    lines = (folder / "u.item").read_bytes().split(b"\n")
    lines[6] = lines[6][:-1] + b"2"
    (folder / "u.item").write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match="flag") as e:
        movielens_source(folder)
    assert e.value.parts["rows"] == "line 7"


def test_ages_of_1m_are_brackets(tmp_path):
    write(tmp_path / "users.dat", ["1::F::1::0::48067", "2::M::56::20::70072-1234"])
    frame = read_people(tmp_path, DIALECTS["dat"])
    assert frame["age"].tolist() == [1, 56] and frame["occupation"].tolist() == ["other or not specified", "writer"] and frame["zip_code"].tolist() == ["48067", "70072-1234"]
