"""A service of embeddings: what is sent, what is believed, what is waited out, what is kept on disk, and that the key is nowhere."""
import base64
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from recgen.core.errors import InputError, ParameterError, RunError
from recgen.sources import embedding_service
from recgen.sources.embedding_service import EmbeddingService, key_name, passes, pause, retry_after, service_address
from recgen.sources.text import encode_texts
from recgen.sources.vector_file import HEADER, VectorFile, text_key

KEY = "sk-proj-Very_Secret-0123456789abcdef"


def letters(text, width=26):
    "What the service says of a text: its letters, counted; 40 dimensions, the last of them its length."
    return [float(text.lower().count(chr(97 + i))) for i in range(width)] + [0.5] * 13 + [float(len(text))]


class Service(ThreadingHTTPServer):
    "A service whose answers can be told in advance: `plan` holds a function of (handler, texts) for each of the next requests, None for a good answer."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.heard, self.headers, self.bodies, self.busy, self.most, self.hold, self.lock, self.always = [], [], [], [], 0, 0, 0.0, threading.Lock(), None
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *about):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.heard.append(body["input"])
            server.headers.append(dict(self.headers))
            server.bodies.append((self.path, body))
            act = server.plan.pop(0) if server.plan else server.always
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            time.sleep(server.hold)
            act(self, body["input"]) if act else self.vectors(body)
        finally:
            with server.lock:
                server.busy -= 1

    def vectors(self, body, change=lambda data: data):
        width = body.get("dimensions")
        data = [{"object": "embedding", "index": i, "embedding": letters(t)[:width]} for i, t in enumerate(body["input"])]
        if body.get("encoding_format") == "base64":
            data = [{**d, "embedding": base64.b64encode(struct.pack(f"<{len(d['embedding'])}f", *d["embedding"])).decode()} for d in data]
        self.say(200, {"object": "list", "data": change(data), "model": body["model"], "usage": {"prompt_tokens": len(data), "total_tokens": 2 * len(data)}})

    def say(self, status, what, **headers):
        content = what.encode() if isinstance(what, str) else json.dumps(what).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


def status(number, what="no", **headers):
    return lambda handler, texts: handler.say(number, what, **headers)


def changed(change):
    return lambda handler, texts: handler.vectors({"input": texts, "model": "letters"}, change)


def drop(handler, texts):
    "Half an answer, then the connection is gone."
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def hang_up(handler, texts):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


@pytest.fixture
def server():
    service = Service()
    yield service
    service.shutdown()
    service.server_close()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def make(server, waits):
    return lambda model="letters", **options: EmbeddingService(model, **{"address": server.address, "wait": waits.append, "concurrency": 1, **options})


def names(n):
    return [f"item {chr(97 + i % 26)}{chr(97 + i // 26 % 26)} {i}" for i in range(n)]


def expected(texts):
    return np.array([letters(t) for t in texts], dtype=np.float32)


# --- what is sent


def test_batches_of_texts_become_vectors_in_their_rows(server, make):
    service = make(concurrency=3)
    texts = names(300) + names(7)
    assert (service.encode(texts) == expected(texts)).all() and service.encode(texts).dtype == np.float32
    assert sorted(map(len, server.heard)) == [44, 128, 128] and server.bodies[0][0] == "/v1/embeddings" and set(server.bodies[0][1]) == {"model", "input"}
    assert service.tokens == 600 and service.asked == 300 and "600 tokens" in service.remarks[0]


def test_lines_blanks_and_nothing(server, make):
    vectors = make(empty="untitled").encode(["a\nb \t c", "", "  \n ", "a b c", "\ud800x"])
    assert server.heard == [["a b c", "untitled", "?x"]]
    assert (vectors[0] == vectors[3]).all() and (vectors[1] == vectors[2]).all() and (vectors[1] == letters("untitled")).all()


def test_long_texts_are_cut_where_that_is_wished(server, make):
    vectors = make(max_characters=5).encode(["abcd efgh", "abcd xyz", "abcd"])
    assert server.heard == [["abcd"]] and (vectors == expected(["abcd"] * 3)).all()


def test_several_at_once_and_never_more(server, make):
    server.hold = 0.05
    texts = names(64)
    assert (encode_texts(texts, make(concurrency=4, batch_size=4), batch_size=8) == expected(texts)).all()  # all are asked before the first batch of 8
    assert 2 <= server.most <= 4 and len(server.heard) == 16


@pytest.mark.parametrize("encoding", ["", "float", "base64"])
def test_numbers_as_they_come(server, make, encoding):
    assert (make(encoding=encoding).encode(["soap", "comb"]) == expected(["soap", "comb"])).all()
    assert server.bodies[0][1].get("encoding_format", "") == encoding


def test_dimensions_both_ways(server, make, tmp_path):
    texts = names(5)
    unit = expected(texts)[:, :10] / np.linalg.norm(expected(texts)[:, :10], axis=1, keepdims=True)
    here, there = make(dimensions=10, cache=tmp_path), make(dimensions=10, cut="service", cache=tmp_path)
    assert np.allclose(here.encode(texts), unit, atol=1e-6) and "dimensions" not in server.bodies[0][1]
    assert np.allclose(there.encode(texts), unit, atol=1e-6) and server.bodies[1][1]["dimensions"] == 10
    assert np.allclose(np.linalg.norm(make(dimensions=7, cache=tmp_path).encode(texts), axis=1), 1) and make(cache=tmp_path).encode(texts).shape == (5, 40)
    assert len(server.heard) == 2  # another cut of what was kept whole costs nothing
    with pytest.raises(InputError, match="fewer dimensions") as e:
        make(dimensions=41).encode(names(300))
    assert "encoder_dimensions 40" in e.value.parts["mend"] and len(server.heard) < 5


def test_a_service_that_does_not_cut_is_found_out(server, make):
    server.plan = [changed(lambda data: data), status(400, {"error": {"message": "This model does not support specifying dimensions."}})]
    for _ in range(2):
        with pytest.raises(InputError) as e:
            make(dimensions=10, cut="service").encode(["soap"])
        assert 'cut="here"' in e.value.parts["mend"]


# --- what is waited out


PASSING = {"429": status(429), "429 for a time": status(429, "slow down", Retry_After=7), "500": status(500), "503": status(503, "<html>"), "529": status(529), "408": status(408), "dropped": drop, "hung up": hang_up}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again(server, make, waits, name):
    server.plan = [PASSING[name], PASSING[name]]
    assert (make().encode(names(3)) == expected(names(3))).all()
    assert len(server.heard) == 3 and len(waits) == 2
    if "time" in name:
        assert waits == [7, 7]
    else:
        assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_no_answer_in_time_is_asked_again(server, make, waits):
    server.plan = [lambda handler, texts: time.sleep(1)]
    assert make(timeout=0.2).encode(["soap"]).shape == (1, 40) and len(waits) == 1


def test_waiting_ends(server, make, waits):
    server.always = status(503, "overloaded")
    with pytest.raises(InputError, match="does not answer") as e:
        make(attempts=5).encode(names(2))
    assert len(server.heard) == 5 and len(waits) == 4 and "503" in e.value.parts["found"] and "overloaded" in e.value.parts["found"] and "goes on" in e.value.parts["mend"]
    server.always = status(429, "tomorrow", Retry_After=86_400)
    with pytest.raises(InputError, match="86400 seconds"):
        make().encode(names(2))
    assert len(server.heard) == 6 and len(waits) == 4


def test_nobody_there(waits):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(InputError, match="does not answer"):
        EmbeddingService("m", f"http://127.0.0.1:{port}/v1", wait=waits.append, attempts=3).encode(["soap"])
    assert len(waits) == 2


def test_pauses_grow_with_chance_and_believe_the_service():
    assert all(8 <= pause(4, 0) <= 16 for _ in range(50)) and len({pause(4, 0) for _ in range(50)}) > 40 and pause(0, 30) == 30 and pause(1000, 0) <= 60
    assert [retry_after(v) for v in (None, "", "x", "3", "-3", "Mon, 01 Jan 2001 00:00:00 GMT")] == [0, 0, 0, 3, 0, 0]
    assert [s for s in (200, 400, 401, 403, 404, 408, 413, 422, 425, 429, 500, 501, 502, 503, 504, 529) if passes(s, "")] == [408, 425, 429, 500, 502, 503, 504, 529]


# --- what is not


@pytest.mark.parametrize("number, said, problem, mend", [
    (401, "Incorrect API key provided: sk-proj-Ve***def", "does not accept the key", "SOME_KEY"), (403, "forbidden", "does not accept the key", "SOME_KEY"),
    (404, {"error": {"message": "The model `letters` does not exist"}}, "no such model", "address"), (400, "encoding_format is unknown", "refuses the request", "says"),
    (429, {"error": {"code": "insufficient_quota"}}, "no credit", "account"), (308, "elsewhere", "leads elsewhere", "leads to"), (501, "no embeddings here", "refuses", "says"),
], ids=str)
def test_what_does_not_pass_is_refused_at_once(server, make, waits, monkeypatch, number, said, problem, mend):
    monkeypatch.setenv("SOME_KEY", KEY)
    server.always = status(number, said)
    with pytest.raises(InputError, match=problem) as e:
        make(key_variable="SOME_KEY").encode(names(200))
    assert mend in e.value.parts["mend"] and len(server.heard) == 1 and not waits and "sk-proj" not in str(e.value)


def test_a_service_that_wants_a_key(server, make):
    server.always = status(401)
    with pytest.raises(InputError, match="wants a key") as e:
        make().encode(["soap"])
    assert "encoder_key NAME" in e.value.parts["mend"]


LONG = {"OpenAI": (400, {"error": {"message": "This model's maximum context length is 8192 tokens, however you requested 9001 tokens. Please reduce your prompt."}}),
        "TEI": (413, {"error": "Input validation error: `inputs` must have less than 512 tokens. Given: 700", "error_type": "Validation"}),
        "vLLM": (400, {"message": "This model's maximum context length is 512 tokens. However, you requested 700 tokens in the input for embedding generation."})}


@pytest.mark.parametrize("who", LONG)
def test_the_text_that_is_too_long_is_named(server, make, tmp_path, who):
    number, said = LONG[who]
    server.always = lambda handler, texts: handler.say(number, said) if any(len(t) > 100 for t in texts) else handler.vectors({"input": texts, "model": "m"})
    texts = names(20) + ["endless " * 30] + names(40)[20:]
    with pytest.raises(InputError, match="too long") as e:
        make(batch_size=16).encode(texts)
    assert e.value.parts["rows"].startswith("'endless endless") and len(e.value.parts["rows"]) < 80 and "text_template" in e.value.parts["mend"] and "max_characters" in e.value.parts["mend"]
    assert (make(max_characters=90).encode(texts)[:20] == expected(texts[:20])).all()


def test_batches_that_are_too_large_are_halved(server, make):
    server.always = lambda handler, texts: handler.say(422, {"error": "batch size 40 > maximum allowed batch size 32"}) if len(texts) > 32 else handler.vectors({"input": texts, "model": "m"})
    assert (make().encode(names(100)) == expected(names(100))).all() and [len(t) for t in server.heard] == [100, 50, 25, 25, 50, 25, 25]


# --- what is believed


def test_vectors_belong_to_their_index(server, make):
    server.plan = [changed(lambda data: data[::-1]), changed(lambda data: data[5:] + data[:5])]
    for _ in range(2):
        assert (make().encode(names(9)) == expected(names(9))).all()


def poke(value):
    def change(data):
        data[3]["embedding"][2] = value
        return data
    return change


BAD = {"fewer": lambda data: data[:-1], "more": lambda data: data + data[:1], "none": lambda data: [], "twice": lambda data: [data[0], *data[:-1]], "no index": lambda data: [{"embedding": d["embedding"]} for d in data],
       "NaN": poke(float("nan")), "infinite": poke(float("inf")), "null": poke(None), "text": poke("x"), "ragged": lambda data: [{**d, "embedding": d["embedding"][: 9 + (d["index"] == 2)]} for d in data],
       "empty": lambda data: [{**d, "embedding": []} for d in data], "base64 of nothing": lambda data: [{**d, "embedding": "!!!"} for d in data], "half a number": lambda data: [{**d, "embedding": "AAA="} for d in data],
       "no list": lambda data: {"0": data}, "nested": lambda data: [{**d, "embedding": [d["embedding"]]} for d in data], "no objects": lambda data: [d["embedding"] for d in data]}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_none_is_refused_and_not_kept(server, make, waits, tmp_path, name):
    server.plan = [None, changed(BAD[name])]
    with pytest.raises(InputError, match="not a vector for each text") as e:
        make(cache=tmp_path, batch_size=6).encode(names(12))
    assert names(12)[6] in e.value.parts["rows"] and "6 vectors" in e.value.parts["expected"] and not waits
    again = make(cache=tmp_path, batch_size=6)
    assert again.found == 6 and (again.encode(names(12)) == expected(names(12))).all() and server.heard[2:] == [names(12)[6:]]


@pytest.mark.parametrize("said", ["<html>Welcome</html>", "[1, 2]", '"text"', "", "{}", '{"data": null}', '{"error": "overloaded"}'])
def test_what_is_not_an_answer_at_all(server, make, said):
    server.plan = [status(200, said)]
    with pytest.raises(InputError, match="not a vector for each text"):
        make().encode(["soap"])


# --- what is kept


def test_nothing_is_asked_twice(server, make, tmp_path):
    first = make(cache=tmp_path).encode(names(50))
    second = make(cache=tmp_path)
    assert (second.encode(names(60)) == expected(names(60))).all() and (second.encode(names(50)) == first).all()
    assert server.heard == [names(50), names(60)[50:]] and second.found == 50 and second.asked == 10
    server.shutdown()
    assert (make(cache=tmp_path).encode(names(60)[::-1]) == expected(names(60)[::-1])).all()
    assert len(list(tmp_path.glob("*.vectors"))) == 1


def test_another_model_service_or_cut_is_another_vector(server, make, tmp_path):
    other = Service()
    for model, address, options in [("letters", server.address, {}), ("letters-2", server.address, {}), ("let/ters", server.address, {}), ("letters", server.address + "/eu", {}), ("letters", other.address, {}),
                                    ("letters", server.address, dict(dimensions=8, cut="service")), ("letters", server.address, dict(dimensions=9, cut="service"))]:
        service = make(model, address=address, cache=tmp_path, **options)
        service.encode(["soap"])
        assert service.asked == 1 and service.found == 0, (model, address)
    same = make(address=server.address.upper().replace("HTTP", "http").replace("/V1", "/v1/embeddings/"), cache=tmp_path)
    assert same.found == 1 and len(list(tmp_path.glob("*.vectors"))) == 7
    other.shutdown()
    other.server_close()


def test_what_was_answered_before_a_failure_stays(server, make, tmp_path):
    server.plan = [None, None, status(400, "no")]
    with pytest.raises(InputError, match="refuses"):
        make(cache=tmp_path, batch_size=10).encode(names(90))
    assert len(server.heard) <= 4  # a failure is the end of asking
    again = make(cache=tmp_path, batch_size=10)
    assert 20 <= again.found <= 30
    again.encode(names(90))
    assert again.asked == 90 - again.found


KILLED = """
import sys
from recgen.sources.embedding_service import EmbeddingService
EmbeddingService("letters", sys.argv[1], cache=sys.argv[2], batch_size=5, concurrency=2).encode(sys.argv[3:])
"""


def test_a_killed_process_has_lost_no_more_than_what_was_under_way(server, make, tmp_path):
    texts = names(200)
    server.hold = 0.05
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.address, str(tmp_path), *texts], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(server.heard) < 8 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    time.sleep(0.15)
    server.hold, before = 0, [t for batch in server.heard for t in batch]
    again = make(cache=tmp_path, batch_size=5)
    assert len(before) - 15 <= again.found <= len(before) < 200  # two under way, and one perhaps not yet written
    assert (again.encode(texts) == expected(texts)).all()
    after = [t for batch in server.heard for t in batch][len(before):]
    assert len(after) == 200 - again.found and len(set(before) & set(after)) <= 15


FACTS = {"service": "here/v1", "model": "letters", "dimensions": 0}


def filled(path, texts):
    kept = VectorFile(path, FACTS)
    kept.add([text_key(t) for t in texts], expected(texts))
    return kept


def test_a_file_torn_anywhere_gives_whole_vectors_or_none(tmp_path):
    path = tmp_path / "a.vectors"
    filled(path, ["soap", "comb"])
    whole, size = path.read_bytes(), VectorFile(path, FACTS).record().itemsize
    assert len(whole) == HEADER + 2 * size
    for end in [HEADER, HEADER + 1, HEADER + 31, HEADER + 33, HEADER + size - 1, HEADER + size, HEADER + size + 7, HEADER + 2 * size - 1]:
        path.write_bytes(whole[:end])
        kept = VectorFile(path, FACTS)
        assert len(kept) == (end - HEADER) // size
        kept.add([text_key("comb")], expected(["comb"]))
        again = VectorFile(path, FACTS)
        assert (again.get([text_key("comb")]) == expected(["comb"])).all() and (path.stat().st_size - HEADER) % size == 0
        if end >= HEADER + size:
            assert (again.get([text_key("soap")]) == expected(["soap"])).all()


def test_a_damaged_record_is_not_there_and_its_neighbours_are(tmp_path):
    path = tmp_path / "a.vectors"
    size = filled(path, names(9)).record().itemsize
    for offset in (3, 40, size - 1):
        raw = bytearray(path.read_bytes())
        raw[HEADER + 4 * size + offset] ^= 1
        (tmp_path / "b.vectors").write_bytes(raw)
        kept = VectorFile(tmp_path / "b.vectors", FACTS)
        assert len(kept) == 8 and text_key(names(9)[4]) not in kept
        rest = names(9)[:4] + names(9)[5:]
        assert (kept.get([text_key(t) for t in rest]) == expected(rest)).all()
    path.write_bytes(path.read_bytes() + bytes(size))  # a block that was allotted and never written
    assert len(VectorFile(path, FACTS)) == 9 and zlib.crc32(bytes(size - 4)) != 0


@pytest.mark.parametrize("content", [b"", b"something else", b"{}" + b" " * HEADER, json.dumps({**FACTS, "model": "other", "width": 40}).encode().ljust(HEADER), json.dumps({**FACTS, "width": 0}).encode().ljust(HEADER),
                                     json.dumps({**FACTS, "width": 40}).encode(), b"[1]".ljust(HEADER)], ids=lambda c: str(c[:20]))
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "a.vectors"
    path.write_bytes(content)
    with pytest.raises(InputError) as e:
        VectorFile(path, FACTS)
    assert e.value.parts["file"] == path and "remove the file" in e.value.parts["mend"] and path.read_bytes() == content


def test_two_who_fill_one_file(server, make, tmp_path):
    one, other = make(cache=tmp_path, batch_size=3), make(cache=tmp_path, batch_size=4)
    threads = [threading.Thread(target=one.encode, args=(names(40),)), threading.Thread(target=other.encode, args=(names(60)[::-1],))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    third = make(cache=tmp_path)
    assert third.found == 60 and (third.encode(names(60)) == expected(names(60))).all() and third.asked == 0


def test_a_model_that_changed_under_its_name_is_noticed(server, make, tmp_path):
    make(cache=tmp_path).encode(["soap"])
    server.plan = [changed(lambda data: [{**d, "embedding": d["embedding"][:12]} for d in data])]
    with pytest.raises(InputError, match="another number of dimensions") as e:
        make(cache=tmp_path).encode(["soap", "comb"])
    assert "remove this file" in e.value.parts["mend"] and make(cache=tmp_path).found == 1


def test_a_folder_that_cannot_be_written(server, make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        make(cache=tmp_path / "file" / "folder").encode(["soap"])


# --- the key


def everything(error):
    "All that an error and those behind it say."
    said = []
    while error is not None:
        said += [str(error), repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def test_the_key_is_sent_and_stands_nowhere_else(server, make, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    told, service = [], make(key_variable="SOME_KEY", cache=tmp_path, attempts=2)
    service.encode(["soap"])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    echo = {"error": {"message": f"bad key {KEY} in header Authorization: Bearer {KEY}"}}
    for act in (status(401, echo), status(403, echo), status(400, echo), status(404, echo), status(500, echo), status(429, echo), status(200, echo), status(200, KEY), status(400, f"too many tokens {KEY}"), drop, hang_up,
                changed(lambda data: [{**d, "index": KEY} for d in data])):
        server.always = act
        with pytest.raises(InputError) as e:
            service.encode([f"comb {len(told)}"])
        told.append(everything(e.value))
    out = capfd.readouterr()
    told += [repr(service), str(service.identity), str(service.remarks), str(vars(service)), str(vars(service.asker)), caplog.text, out.out, out.err]
    told += [p.name + p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*")]
    assert len(told) > 15 and "comb" in told[0] + told[7] and not [t for t in told if KEY in t or "Very_Secret" in t]


def test_which_key_goes_to_whom(server, make, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    make().encode(["soap"])
    assert "Authorization" not in server.headers[0]  # OpenAI's key is not for others
    assert key_name("", "api.openai.com/v1") == "OPENAI_API_KEY" and key_name("", "localhost/v1") == "" and EmbeddingService("m").asker.variable == "OPENAI_API_KEY"
    make(key_variable="OPENAI_API_KEY").encode(["soap"])
    assert server.headers[1]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ParameterError, match="OPENAI_API_KEY is not set"):
        EmbeddingService("text-embedding-3-small")


def test_a_password_file_does_not_take_the_keys_place(server, make, monkeypatch, tmp_path):
    monkeypatch.setattr(embedding_service, "is_own_machine", lambda name: False)  # as at any other service: the environment and its files are heard
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("SOME_KEY", KEY)
    make(key_variable="SOME_KEY").encode(["soap"])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key", [KEY + "\n x", "zwölf", "two words"])
def test_a_key_that_cannot_be_sent(make, monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ParameterError, match="SOME_KEY") as e:
        make(key_variable="SOME_KEY")
    assert key not in everything(e.value) and KEY not in everything(e.value)


@pytest.mark.parametrize("name", [KEY, "hf_abcdef0123456789", "a b", "A" * 80])
def test_a_key_in_place_of_its_name_is_not_repeated(make, name):
    with pytest.raises(ParameterError, match="not the name") as e:
        make(key_variable=name)
    assert name not in everything(e.value) and e.value.parts["column"] == "encoder_key"


# --- what is asked for


@pytest.mark.parametrize("wrong", [dict(model=""), dict(model="m" * 400), dict(dimensions=-1), dict(dimensions=1.5), dict(batch_size=0), dict(concurrency=0), dict(attempts=0), dict(cut="there"), dict(encoding="hex"), dict(empty=" "), dict(max_characters=-1),
                                   dict(address=""), dict(address="localhost:8000/v1"), dict(address="ftp://host/v1"), dict(address="http://host:99999/v1"), dict(address="https://host/v1?key=secret"), dict(address="https://a:secret@host/v1"), dict(address="a:secret@host")], ids=str)
def test_what_cannot_be_asked_for(make, wrong):
    with pytest.raises(ParameterError) as e:
        make(**wrong)
    assert "secret" not in everything(e.value)


def test_addresses_that_are_the_same():
    same = [service_address(a)[1] for a in ("https://api.openai.com/v1", "https://API.openai.com:443/v1/", " https://api.openai.com/v1/embeddings ", "http://api.openai.com:80/v1")]
    assert set(same) == {"api.openai.com/v1"} and service_address("http://[::1]:8080/v1")[1] == "[::1]:8080/v1"
    assert service_address("http://host:443/v1")[1] == "host:443/v1"


def test_its_names_say_no_address_with_a_secret(make, tmp_path):
    service = make(cache=tmp_path, dimensions=5)
    assert service.name == "letters" and service.revision == "" and service.folder is None and str(tmp_path) not in repr(service) + str(service.identity)
    assert service.identity == {"encoder": "openai", "encoder_model": "letters", "encoder_address": service.service, "encoder_dimensions": 5, "encoder_cut": "here"}
