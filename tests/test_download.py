"""Published files onto disk: what a bad line, a full disk, a killed process or a sign-in page may not do to them."""
import errno
import gzip
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from http_server import HTML, Server, closed_port, retry_later

from recgen.core.errors import InputError, ParameterError, RunError
from recgen.sources import archives, download, published
from recgen.sources.archives import unpack
from recgen.sources.download import Part, fetch, seconds_to_wait, what_is_wrong
from recgen.sources.published import addresses, data_folder, obtain

BODY = random.Random(3).randbytes(700_001)
SHA = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY).hexdigest()
PATH = "/data/file.bin"


@pytest.fixture
def server():
    with Server() as s:
        yield s


@pytest.fixture
def take(server, tmp_path):
    "fetch with lines and waits written down; nothing really waits."

    def take(path=PATH, name="file.bin", **options):
        return fetch(server.url(path) if path.startswith("/") else path, tmp_path / "in" / name, log=take.lines.append, wait=take.waits.append, **options)

    take.lines, take.waits, take.folder = [], [], tmp_path / "in"
    take.left = lambda: sorted(p.name for p in take.folder.iterdir() if not p.name.endswith(".lock"))
    return take


# --- the plain way


def test_whole_file_is_fetched_once(server, take):
    server.put(PATH, BODY)
    path = take(sha256=SHA, md5=MD5.upper(), size=len(BODY))
    assert path.read_bytes() == BODY and take.left() == ["file.bin"] and not take.waits and not take.lines
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert take(sha256=SHA) == path and take() == path and len(server.requests) == 1  # it is there, with and without a checksum


def test_chunked_answer_without_a_length(server, take):
    server.put(PATH, BODY, chunked=True)
    assert take().read_bytes() == BODY and take.left() == ["file.bin"]


def test_relative_path_and_home_are_resolved(server, tmp_path, monkeypatch):
    server.put(PATH, BODY)
    monkeypatch.chdir(tmp_path)
    assert fetch(server.url(PATH), "deep/er/file.bin") == tmp_path / "deep/er/file.bin"


@pytest.mark.parametrize("url", ["", "file.gz", "ftp://example.org/a.gz", "http://"])
def test_no_address(take, url):
    with pytest.raises(ParameterError, match="address"):
        fetch(url, take.folder / "a.gz")
    assert not take.folder.exists()


# --- lines that break


def test_only_the_missing_bytes_are_asked_for(server, take):
    page = server.put(PATH, BODY, drop_after=300_000, drops=2)
    assert take(sha256=SHA).read_bytes() == BODY
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]
    assert [r.headers.get("if-range") for r in server.requests] == [None, page.tag, page.tag]
    assert len(take.waits) == 2 and all(0.5 <= w <= 1 for w in take.waits)  # each attempt brought bytes: the count began anew
    assert "broke off after 300,000 of 700,001" in take.lines[0] and take.left() == ["file.bin"]


def test_a_line_that_breaks_more_often_than_there_are_attempts(server, take):
    server.put(PATH, BODY, drop_after=50_000, drops=13)
    assert take(attempts=2, md5=MD5).read_bytes() == BODY and len(take.waits) == 13


def test_broken_chunked_answer_is_continued(server, take):
    server.put(PATH, BODY, chunked=True, drop_after=300_000, drops=1)
    assert take().read_bytes() == BODY and len(server.requests) == 2 and server.ranges[1].startswith("bytes=")


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_breaks_gives_the_same_file(server, take, seed):
    rng = random.Random(seed)
    page = server.put(PATH, BODY, drop_after=rng.randrange(1, 400_000), drops=3, ranges=rng.random() < 0.7, etag=rng.choice(["auto", "", 'W/"weak"']))
    page.answers = [retry_later(rng.choice([500, 503, 429]))]
    assert take(attempts=6, sha256=rng.choice(["", SHA])).read_bytes() == BODY and take.left() == ["file.bin"]


def test_server_without_ranges_starts_afresh(server, take):
    server.put(PATH, BODY, ranges=False, drop_after=300_000, drops=2)
    assert take(md5=MD5).read_bytes() == BODY and server.ranges == [None, "bytes=300000-", "bytes=300000-"]


def test_a_server_that_gives_a_piece_at_a_time(server, take):
    server.put(PATH, BODY, drop_after=300_000, drops=1, piece=150_000)
    assert take().read_bytes() == BODY and server.ranges == [None, "bytes=300000-", "bytes=450000-", "bytes=600000-"]


def torn(server, take, **options):
    "A run that ends with a part of 300,000 bytes, and the page."
    page = server.put(PATH, BODY, drop_after=300_000, drops=1, **options)
    page.answers = []
    with pytest.raises(InputError) as e:
        take(attempts=1)
    assert "file.bin.part" in str(e.value) and "300,000" in str(e.value)
    assert sorted(take.left()) == ["file.bin.part", "file.bin.part.json"]
    server.requests.clear()
    return page


def test_the_next_run_continues(server, take):
    torn(server, take)
    assert take().read_bytes() == BODY and server.ranges == ["bytes=300000-"]
    assert "continuing after 300,000 bytes" in take.lines[-1] and take.left() == ["file.bin"]


@pytest.mark.parametrize("heeds", [True, False])
def test_a_changed_file_is_not_mixed_with_the_old_part(server, take, heeds):
    page = torn(server, take)
    page.body, page.heeds = BODY[::-1], heeds
    assert take().read_bytes() == BODY[::-1]
    assert server.ranges == (["bytes=300000-"] if heeds else ["bytes=300000-", None])


def test_a_changed_date_is_a_changed_file_where_there_is_no_tag(server, take):
    page = torn(server, take, etag="")
    page.body, page.modified = BODY[::-1], "Sun, 02 Jan 2022 00:00:00 GMT"
    assert take().read_bytes() == BODY[::-1] and server.requests[0].headers["if-range"].startswith("Sat, 01 Jan")


def test_a_weak_tag_is_no_condition(server, take):
    "Two files may share a weak tag (RFC 9110, 8.8.1): the date is asked for instead."
    page = torn(server, take, etag='W/"same"')
    take()
    assert server.requests[0].headers["if-range"] == page.modified and server.ranges == ["bytes=300000-"]


def test_without_any_mark_of_the_version_only_a_checksum_allows_a_continuation(server, take):
    torn(server, take, etag="", modified="")
    assert take().read_bytes() == BODY and server.ranges == [None]
    (take.folder / "file.bin").unlink()
    torn(server, take, etag="", modified="")
    assert take(sha256=SHA).read_bytes() == BODY and server.ranges == ["bytes=300000-"]


def test_a_part_of_another_address_is_not_continued(server, take):
    torn(server, take)
    server.put("/other/file.bin", BODY[::-1])
    assert take("/other/file.bin").read_bytes() == BODY[::-1] and server.ranges == [None]


def test_a_damaged_side_file_means_a_fresh_start(server, take):
    torn(server, take)
    (take.folder / "file.bin.part.json").write_text('{"url": ')
    assert take().read_bytes() == BODY and server.ranges == [None]


def leave_part(take, server, data, total):
    part = Part(take.folder / "file.bin", server.url(PATH), sha256=SHA)
    part.restart({"etag": server.http.pages[PATH].tag}, total)
    with part.writing() as write:
        write(data)


def test_a_part_that_is_whole_already(server, take):
    "Killed between the last byte and the rename: with the length known nobody is asked, otherwise the server answers 416."
    take.folder.mkdir()
    server.put(PATH, BODY)
    leave_part(take, server, BODY, len(BODY))
    assert take(sha256=SHA).read_bytes() == BODY and server.ranges == [] and take.left() == ["file.bin"]
    (take.folder / "file.bin").unlink()
    leave_part(take, server, BODY, 0)
    assert take(sha256=SHA).read_bytes() == BODY and server.ranges == [f"bytes={len(BODY)}-"] and take.left() == ["file.bin"]


def test_a_part_that_is_longer_than_the_file(server, take):
    take.folder.mkdir()
    server.put(PATH, BODY)
    leave_part(take, server, BODY + b"more", 0)
    assert take(sha256=SHA).read_bytes() == BODY and server.ranges == [f"bytes={len(BODY) + 4}-", None]


# --- answers


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_passing_refusals_are_tried_again(server, take, status):
    server.put(PATH, BODY, answers=[retry_later(status)] * 3)
    assert take().read_bytes() == BODY
    assert len(take.waits) == 3 and all(2**n / 2 <= w <= 2**n for n, w in enumerate(take.waits))


def test_retry_after_is_obeyed(server, take):
    server.put(PATH, BODY, answers=[retry_later(429, 7), retry_later(503, time.time() + 90), (429, {"Retry-After": "soon"})])
    assert take().read_bytes() == BODY
    assert take.waits[0] == 7 and 80 <= take.waits[1] <= 91 and take.waits[2] <= 4


def test_a_server_that_wants_an_hour_is_not_waited_for(server, take):
    server.put(PATH, BODY, answers=[retry_later(429, 3600)])
    with pytest.raises(InputError, match="come back in 3,600 s"):
        take()
    assert not take.waits and len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_final_refusals_are_not(server, take, status):
    server.put(PATH, BODY, answers=[retry_later(status)] * 3)
    with pytest.raises(InputError) as e:
        take()
    assert str(status) in str(e.value) and server.url(PATH) in str(e.value) and str(take.folder / "file.bin") in str(e.value)
    assert len(server.requests) == 1 and not take.waits and take.left() == []


def test_all_attempts_fail(server, take):
    server.put(PATH, BODY, answers=[retry_later(500)] * 9)
    with pytest.raises(InputError, match=r"4 attempts .*500.*4 times"):
        take(attempts=4)
    assert len(server.requests) == 4 and len(take.waits) == 3 and take.left() == []


def test_offline(take):
    url = closed_port() + "/reviews_Beauty_5.json.gz"
    with pytest.raises(InputError) as e:
        take(url, name="reviews_Beauty_5.json.gz", attempts=3)
    text = str(e.value)
    assert "offline" in text and url in text and str(take.folder / "reviews_Beauty_5.json.gz") in text and "refused" in text and "0x" not in text
    assert len(take.waits) == 2 and take.left() == []


def test_waits_grow_to_a_minute_and_differ():
    many = [[seconds_to_wait(n, 0) for _ in range(50)] for n in range(1, 12)]
    assert all(min(60, 2**n) / 2 <= w <= min(60, 2**n) for n, ws in enumerate(many) for w in ws)
    assert all(len(set(ws)) > 40 for ws in many) and seconds_to_wait(1, 33.0) == 33


# --- not the published file


@pytest.mark.parametrize("sums", [{"sha256": SHA}, {"md5": MD5}])
def test_a_wrong_checksum_leaves_nothing(server, take, sums):
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    server.put(PATH, wrong, drop_after=300_000, drops=1)
    with pytest.raises(InputError) as e:
        take(**sums)
    (kind, expected), = sums.items()
    assert e.value.parts["found"] == f"{kind} {hashlib.new(kind, wrong).hexdigest()}" and e.value.parts["expected"] == f"{kind} {expected}"
    assert take.left() == [] and len(server.requests) == 2


def test_the_old_part_counts_in_the_checksum(server, take):
    torn(server, take)
    part = take.folder / "file.bin.part"
    part.write_bytes(b"\0" + part.read_bytes()[1:])
    with pytest.raises(InputError, match="was removed"):
        take(sha256=SHA)
    assert take.left() == []
    assert take(sha256=SHA).read_bytes() == BODY  # and the next run is clean


def test_a_published_size_is_held_against_the_server(server, take):
    server.put(PATH, BODY)
    with pytest.raises(InputError, match="another file") as e:
        take(size=700_000)
    assert "700,001" in e.value.parts["found"] and take.left() == [] and len(server.requests) == 1
    server.put(PATH, BODY, chunked=True)
    with pytest.raises(InputError, match="bytes 700,000"):
        take(size=700_000)
    assert take.left() == []


def test_a_body_shorter_than_its_length(server, take):
    server.put(PATH, BODY, length=800_000)
    with pytest.raises(InputError, match="could not be fetched"):
        take(attempts=3)
    assert not (take.folder / "file.bin").exists()


@pytest.mark.parametrize("name", ["a.json.gz", "a.zip", "a.parquet", "a.csv"])
def test_a_web_page_is_no_data(server, take, name):
    server.put("/" + name, HTML, type="text/html")
    with pytest.raises(InputError, match="web page") as e:
        take("/" + name, name)
    assert server.url("/" + name) in str(e.value) and take.left() == [] and len(server.requests) == 1


def test_first_bytes():
    assert "b'PK" in what_is_wrong("a.gz", b"PK\x03\x04") and what_is_wrong("a.zip", b"") and not what_is_wrong("a.html", HTML)
    assert not what_is_wrong("a.parquet", b"PAR1") and not what_is_wrong("a.gz", gzip.compress(b"")) and not what_is_wrong("a.dat", b"\xff<")


def test_gzip_is_kept_as_it_lies(server, take):
    "Some servers label a .gz file as a packed transfer; unpacking it on the way would give it a wrong name and checksum."
    packed = gzip.compress(b"line\n" * 100_000)
    server.put("/a.json.gz", packed, encoding="gzip", drop_after=100, drops=1)
    path = take("/a.json.gz", "a.json.gz", md5=hashlib.md5(packed).hexdigest())
    assert path.read_bytes() == packed and gzip.decompress(path.read_bytes()).startswith(b"line\nline")
    server.put("/a.csv", packed, encoding="gzip")
    with pytest.raises(InputError, match="packs the file"):
        take("/a.csv", "a.csv")
    assert take.left() == ["a.json.gz"]


def test_an_empty_answer_is_no_file(server, take):
    server.put(PATH, b"")
    with pytest.raises(InputError):
        take()
    assert take.left() == []


def test_a_file_that_does_not_fit_is_replaced_only_by_a_whole_one(server, take):
    take.folder.mkdir()
    (take.folder / "file.bin").write_bytes(b"old")
    with pytest.raises(InputError):
        take(closed_port() + PATH, attempts=1, md5=MD5)
    assert (take.folder / "file.bin").read_bytes() == b"old" and hashlib.md5(b"old").hexdigest() in take.lines[0]
    server.put(PATH, BODY)
    assert take(md5=MD5).read_bytes() == BODY
    (take.folder / "page.zip").write_bytes(HTML)  # a browser's "save as", where no checksum is known
    with pytest.raises(InputError):
        take(closed_port() + "/page.zip", "page.zip", attempts=1)
    assert "web page" in take.lines[-1]


# --- processes and disks

CHILD = """
import sys
from recgen.sources.download import fetch
print(fetch(sys.argv[1], sys.argv[2], log=lambda line: print(line, flush=True)).name, flush=True)
"""


def child(url, path):
    return subprocess.Popen([sys.executable, "-c", CHILD, url, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def test_killed_in_the_middle_then_continued(server, take):
    take.folder.mkdir()
    page = server.put(PATH, BODY, hold_after=600_000)
    process, part = child(server.url(PATH), take.folder / "file.bin"), take.folder / "file.bin.part"
    until(lambda: size_of(part) >= 500_000 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (take.folder / "file.bin").exists()
    there = part.stat().st_size
    page.release.set()
    assert take(sha256=SHA).read_bytes() == BODY and server.ranges == [None, f"bytes={there}-"] and there >= 500_000
    assert take.left() == ["file.bin"]


def test_two_processes_fetch_once(server, take):
    take.folder.mkdir()
    page = server.put(PATH, BODY, hold_after=300_000)
    path = take.folder / "file.bin"
    first = child(server.url(PATH), path)
    assert page.held.wait(30)
    second = child(server.url(PATH), path)
    line = second.stdout.readline()
    assert "another process is fetching it" in line
    page.release.set()
    outs = [p.communicate(timeout=30) for p in (first, second)]
    assert [p.returncode for p in (first, second)] == [0, 0], outs
    assert path.read_bytes() == BODY and len(server.requests) == 1 and take.left() == ["file.bin"]


class FullDisk:
    "A file on a disk with room for so many bytes."

    def __init__(self, f, room):
        self.f, self.room = f, room

    def write(self, data):
        n = min(len(data), self.room)
        self.f.write(data[:n])
        self.room -= n
        if n < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.f.close()


def test_a_disk_that_fills_up(server, take, monkeypatch):
    server.put(PATH, BODY)
    monkeypatch.setattr(download, "open", lambda p, mode="r": FullDisk(open(p, mode), 400_000) if mode == "ab" else open(p, mode), raising=False)
    with pytest.raises(RunError, match="no space left.*part is kept"):
        take(sha256=SHA)
    assert size_of(take.folder / "file.bin.part") == 400_000 and len(server.requests) == 1 and not take.waits
    monkeypatch.undo()
    assert take(sha256=SHA).read_bytes() == BODY and server.ranges == [None, "bytes=400000-"]


def test_a_disk_without_room_is_seen_beforehand(server, take, monkeypatch):
    server.put(PATH, BODY)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda p: namedtuple("usage", "total used free")(10, 9, 1_000))
    with pytest.raises(RunError, match="700,001 bytes are to come and 1,000 are free"):
        take()
    assert take.left() == []


def test_a_place_that_cannot_be_written(server, take, tmp_path):
    server.put(PATH, BODY)
    (tmp_path / "in").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="cannot write"):
        take()
    (tmp_path / "in").unlink()
    (tmp_path / "in" / "file.bin").mkdir(parents=True)
    with pytest.raises(InputError, match="a folder stands"):
        take()
    assert not server.requests


def test_a_read_only_folder(server, take):
    server.put(PATH, BODY)
    take.folder.mkdir(mode=0o500)
    if os.access(take.folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(RunError, match="cannot write"):
        take()
    assert not server.requests


def test_a_log_hears_of_progress(server, take, monkeypatch):
    monkeypatch.setattr(download, "LOG_EVERY", 0)
    server.put(PATH, BODY)
    take()
    assert take.lines[-1] == "file.bin: 0.7 MB of 0.7 MB (100%)" and len(take.lines) >= 3


def test_a_terminal_sees_a_bar(server, take, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    server.put(PATH, BODY, drop_after=300_000, drops=1)
    take()
    assert "file.bin" in screen.getvalue() and "700k" in screen.getvalue() and screen.getvalue().endswith("\r")  # taken away at the end


# --- archives


def zipped(path, members, **kwargs):
    with zipfile.ZipFile(path, "w", **kwargs) as z:
        for name, data in members:
            z.writestr(name, data)
    return path


def test_unpack(tmp_path):
    archive = zipped(tmp_path / "ml.zip", [("ml/", ""), ("ml/ratings.dat", b"1::2\n" * 9), ("ml/README", b"hello")], compression=zipfile.ZIP_DEFLATED)
    assert unpack(archive, tmp_path / "out", ["ratings.dat"]) == {"ratings.dat": tmp_path / "out/ml/ratings.dat"}
    assert not (tmp_path / "out/ml/README").exists()
    stamp = (tmp_path / "out/ml/ratings.dat").stat().st_mtime_ns
    found = unpack(archive, tmp_path / "out")
    assert set(found) == {"ml/ratings.dat", "ml/README"} and found["ml/README"].read_bytes() == b"hello"
    assert found["ml/ratings.dat"].stat().st_mtime_ns == stamp  # equal: left alone
    found["ml/ratings.dat"].write_bytes(b"1::2\n" * 8 + b"1::3\n")
    assert unpack(archive, tmp_path / "out", ["ml/ratings.dat"])["ml/ratings.dat"].read_bytes() == b"1::2\n" * 9


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil", "a\\..\\..\\evil", link("ml/link")], ids=str)
def test_unsafe_members(tmp_path, name):
    archive = zipped(tmp_path / "evil.zip", [("good", b"1"), (name, b"/etc")])
    with pytest.raises(InputError, match="a member of the archive"):
        unpack(archive, tmp_path / "out", ["good"])
    assert [p.name for p in tmp_path.iterdir()] == ["evil.zip"]


def test_encrypted_member(tmp_path):
    archive = zipped(tmp_path / "secret.zip", [("a", b"abc")])
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    archive.write_bytes(data)
    with pytest.raises(InputError, match="encrypted"):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named_and_not_written(tmp_path, compression):
    content = b"".join(b"%d::%d\n" % (i, i * i) for i in range(3_000))
    archive = zipped(tmp_path / "torn.zip", [("first", b"whole"), ("second", content)], compression=compression)
    data = bytearray(archive.read_bytes())
    data[3_000:3_200] = bytes(200)
    archive.write_bytes(data)
    with pytest.raises(InputError, match="its member second cannot be read"):
        unpack(archive, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["first"]


def test_torn_missing_and_wrong_archives(tmp_path):
    archive = zipped(tmp_path / "a.zip", [("x/a", b"1"), ("y/a", b"2")])
    with pytest.raises(InputError, match="several"):
        unpack(archive, tmp_path / "out", ["a"])
    with pytest.raises(InputError, match="no such member") as e:
        unpack(archive, tmp_path / "out", ["ratings.dat"])
    assert "x/a, y/a" in str(e.value)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        unpack(archive, tmp_path / "out")
    with pytest.raises(InputError, match="no such archive"):
        unpack(tmp_path / "none.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_folder_leads_nowhere_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/ml").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="outside the folder"):
        unpack(zipped(tmp_path / "a.zip", [("ml/a", b"1")]), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_room_to_unpack(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.zip", [("a", b"1" * 5_000)], compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda p: namedtuple("usage", "total used free")(10, 9, 4_999))
    with pytest.raises(RunError, match="5,000 bytes are needed"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the published addresses


@pytest.mark.parametrize("name, year, category", [("beauty", None, "Beauty"), ("toys", 2014, "Toys_and_Games"), ("sports", None, "Sports_and_Outdoors"),
                                                  ("Clothing Shoes and Jewelry", 2018, "Clothing_Shoes_and_Jewelry"), ("fashion", 2018, "AMAZON_FASHION"),
                                                  ("video-games", 2023, "Video_Games"), ("unknown", 2023, "Unknown")])
def test_amazon_names(name, year, category):
    files = addresses("amazon", name, year)
    assert all(category in r.url and r.url.endswith(file) and r.url.startswith("https://") for file, r in files.items())
    assert [r.holds for r in files.values()] == ["reviews", "items"] + ["ratings"] * (year == 2023)


@pytest.mark.parametrize("source, name, year, close", [
    ("amazon", "beuty", None, "Beauty"), ("amazon", "beauty", 2018, "Luxury_Beauty"), ("amazon", "toyz and games", 2023, "Toys_and_Games"),
    ("amazon", "beauty", 2015, "2014, 2018, 2023"), ("movielens", "ml-2m", None, "ml-20m"), ("movielens", "netflix", None, "ml-latest-small"),
    ("microlens", "microlens", None, "microlens-50k"), ("amazn", "beauty", None, "amazon"), ("movielens", "ml-1m", 2018, "no year"), ("amazon", "", None, "Beauty")])
def test_unknown_names_list_the_close_ones(source, name, year, close):
    with pytest.raises(ParameterError) as e:
        addresses(source, name, year)
    assert close in str(e.value)


def test_every_name_finds_itself():
    for year, release in published.AMAZON.items():
        for name in release["names"]:
            assert all(name in r.url for r in addresses("amazon", name.lower(), year).values())
    for name, md5 in published.MOVIELENS.items():
        (file, remote), = addresses("movielens", name).items()
        assert file == f"{name}.zip" and remote.md5 == md5 and len(md5) == (0 if "latest" in name else 32)
    assert all(r.url == "" and r.page.startswith("https://") for name in published.MICROLENS for r in addresses("microlens", name).values())


@pytest.fixture
def homes(tmp_path, monkeypatch):
    monkeypatch.setenv("RECGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RECGEN_DATA", str(tmp_path / "data"))
    return tmp_path


def test_folders(homes, monkeypatch):
    assert data_folder("amazon-2014", "Beauty") == homes / "cache/amazon-2014/Beauty"
    monkeypatch.delenv("RECGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(homes / "xdg"))
    assert data_folder("amazon-2014", "Beauty") == homes / "xdg/recgen/amazon-2014/Beauty"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_folder("amazon-2014", "Beauty") == Path("~/.cache/recgen/amazon-2014/Beauty").expanduser()


def test_obtain_fetches_into_the_cache_and_reads_shared_data_in_place(server, homes, monkeypatch):
    monkeypatch.setitem(published.AMAZON[2014], "files", {"reviews": server.url("/reviews_{}_5.json.gz"), "items": server.url("/meta_{}.json.gz")})
    for kind in ("reviews_Beauty_5", "meta_Beauty"):
        server.put(f"/{kind}.json.gz", gzip.compress(kind.encode()))
    (homes / "data/Beauty").mkdir(parents=True)
    (homes / "data/Beauty/meta_Beauty.json.gz").write_bytes(gzip.compress(b"2018's, perhaps"))  # one of two: not this data set
    found = obtain("amazon", "beauty")
    assert {f: p.parent for f, p in found.items()} == dict.fromkeys(["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"], homes / "cache/amazon-2014/Beauty")
    assert gzip.decompress(found["meta_Beauty.json.gz"].read_bytes()) == b"meta_Beauty" and len(server.requests) == 2
    (homes / "data/Beauty/reviews_Beauty_5.json.gz").write_bytes(gzip.compress(b"ours"))
    found = obtain("amazon", "beauty")
    assert found["reviews_Beauty_5.json.gz"] == homes / "data/Beauty/reviews_Beauty_5.json.gz" and len(server.requests) == 2
    assert sorted(p.name for p in (homes / "data/Beauty").iterdir()) == ["meta_Beauty.json.gz", "reviews_Beauty_5.json.gz"]
    with pytest.raises(ParameterError, match="reviews, items"):
        obtain("amazon", "beauty", holds=["ratings"])


def test_obtain_by_hand(homes):
    with pytest.raises(InputError) as e:
        obtain("microlens", "MicroLens-50k")
    folder = homes / "cache/microlens/microlens-50k"
    assert "recsys.westlake.edu.cn" in str(e.value) and str(folder) in str(e.value) and "MicroLens-50k_titles.csv" in e.value.parts["found"]
    folder.mkdir(parents=True)
    for file in ("MicroLens-50k_pairs.csv", "MicroLens-50k_titles.csv"):
        (folder / file).write_text("user,item\n")
    assert list(obtain("microlens", "microlens 50k").values()) == [folder / "MicroLens-50k_pairs.csv", folder / "MicroLens-50k_titles.csv"]
