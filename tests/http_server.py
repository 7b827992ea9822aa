"""A local HTTP server whose misbehaviour is chosen: what a download or a service must survive, without a network.

    with Server() as server:
        page = server.put("/file.gz", body, drop_after=1000, drops=2)
        fetch(server.url("/file.gz"), …)
        assert [r.headers.get("range") for r in server.requests] == [None, "bytes=1000-", …]

A service that is posted to: `server.post("/v1/embeddings", handler)`, where `handler(data, request)` gets the decoded JSON and returns
what is to be sent as JSON, or `(status, data)`, or `(status, data, headers)`; None cuts the connection without an answer.
"""
import email.utils
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in to the network</title></head><body>Welcome</body></html>\n"


@dataclass
class Request:
    "One request as it arrived; header names in lower case."

    method: str
    path: str
    headers: dict
    body: bytes = b""


@dataclass
class Page:
    "What stands at a path, and how it is served. Anything may be changed while the server runs."

    body: bytes
    ranges: bool = True  # False: every answer is the whole file
    heeds: bool = True  # False: a range is sent whatever If-Range says
    etag: str = "auto"  # "auto": a strong one made from the body; "": none
    modified: str = "Sat, 01 Jan 2022 00:00:00 GMT"  # Last-Modified; "": none
    type: str = "application/octet-stream"
    encoding: str = ""  # Content-Encoding; the body is sent as it is
    length: int | None = None  # Content-Length of the whole file, where it is not the true one
    piece: int = 0  # the most bytes that one 206 gives; 0: the rest
    chunked: bool = False  # no Content-Length
    drop_after: int = 0  # bytes of an answer's body after which the connection is cut …
    drops: int = 0  # … in this many answers
    hold_after: int = 0  # bytes of an answer's body after which the server waits for `release`
    answers: list = field(default_factory=list)  # (status, headers, body) to be given first, one a request
    held: threading.Event = field(default_factory=threading.Event)  # set when `hold_after` bytes are out
    release: threading.Event = field(default_factory=threading.Event)

    @property
    def tag(self):
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"' if self.etag == "auto" else self.etag


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        "Silence."

    def note(self, body=b""):
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        with self.server.lock:
            self.server.requests.append(request)
        return request

    def send(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        request = self.note(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        handler = self.server.handlers.get(self.path)
        if handler is None:
            return self.send(404)
        try:
            data = json.loads(request.body)
        except ValueError:
            return self.send(400, b'{"error": "not JSON"}', {"Content-Type": "application/json"})
        answer = handler(data, request)
        if answer is None:
            return self.cut()
        status, data, headers = (*answer, {})[:3] if isinstance(answer, tuple) else (200, answer, {})
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send(status, body, {"Content-Type": "application/json", **headers})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.note()
        with self.server.lock:
            page = self.server.pages.get(self.path)
            answer = page.answers.pop(0) if page and page.answers else None
            cut = page.drop_after if page and not answer and page.drops > 0 else None
            if cut is not None:
                page.drops -= 1
        if page is None:
            return self.send(404, b"no such page")
        if answer:
            status, headers, body = (*answer, *({}, b"")[len(answer) - 1 :])
            return self.send(status, body, headers)
        self.serve(page, cut)

    def serve(self, page, cut):
        total = len(page.body) if page.length is None else page.length
        headers = {"Content-Type": page.type}
        headers |= {k: v for k, v in {"ETag": page.tag, "Last-Modified": page.modified, "Content-Encoding": page.encoding}.items() if v}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        condition = self.headers.get("If-Range")
        start, end, status = 0, total, 200
        if page.ranges:
            headers["Accept-Ranges"] = "bytes"
            if wanted and (condition in (None, page.tag, page.modified) or not page.heeds):
                start, status = int(wanted[1]), 206
                if start >= len(page.body):
                    return self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(page.body)}"})
                end = min(total, start + page.piece) if page.piece else total
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        headers |= {"Transfer-Encoding": "chunked"} if page.chunked else {"Content-Length": end - start}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        body = page.body[start:end]
        if page.hold_after and not page.release.is_set():
            self.write(body[: page.hold_after], page)
            page.held.set()
            page.release.wait(60)
            body = body[page.hold_after :]
        self.write(body if cut is None else body[:cut], page)
        if page.chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")
        if cut is not None or page.length is not None:
            self.cut()

    def write(self, body, page):
        for at in range(0, len(body), 1 << 16):
            piece = body[at : at + (1 << 16)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.chunked else piece)
        self.wfile.flush()

    def cut(self):
        "End the connection as a broken line does: no more bytes."
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        "A client that goes away in the middle is part of the tests."


class Server:
    "A threaded server on a free port of this machine, for a `with` block."

    def __enter__(self):
        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.lock, self.http.pages, self.http.handlers, self.http.requests = threading.Lock(), {}, {}, []
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *args):
        for page in self.http.pages.values():
            page.release.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def requests(self):
        return self.http.requests

    @property
    def ranges(self):
        "The Range header of every GET so far; None where there was none."
        return [r.headers.get("range") for r in self.requests if r.method == "GET"]

    def url(self, path="") -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def put(self, path, body, **options) -> Page:
        self.http.pages[path] = page = Page(body, **options)
        return page

    def post(self, path, handler):
        self.http.handlers[path] = handler


def retry_later(status, seconds=None):
    "An entry for `Page.answers`: a refusal, with Retry-After where seconds (or an HTTP date's epoch) are given."
    if seconds is None:
        return status, {}, b"busy"
    after = str(seconds) if seconds < 1e9 else email.utils.formatdate(seconds, usegmt=True)
    return status, {"Retry-After": after}, b"busy"


def closed_port() -> str:
    "The address of a port that nobody listens at."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"
