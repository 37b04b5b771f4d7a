"""A server on this machine that answers as published files' servers do, and as they fail."""

from collections.abc import Iterator
import contextlib
import dataclasses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import threading


@dataclasses.dataclass
class File:
    """What one path answers.

    Attributes:
        data: the file.
        etag: of it; None sends none.
        modified: its date; likewise.
        ranges: whether parts are sent.
        length: whether the length is told; without it the end of the connection ends the file.
        cuts: bytes after which the connection breaks, one an answer until none are left.
        statuses: that are answered first, one an answer.
        headers: further ones.
        to: where it redirects.
        token: without which it answers 401, as the hub does for gated files.
        begun: is set once bytes flow.
        gate: is waited for before the last bytes.
    """

    data: bytes = b""
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    length: bool = True
    cuts: list[int] = dataclasses.field(default_factory=list)
    statuses: list[int] = dataclasses.field(default_factory=list)
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    to: str | None = None
    token: str | None = None
    begun: threading.Event = dataclasses.field(default_factory=threading.Event)
    gate: threading.Event | None = None


@dataclasses.dataclass
class Server:
    """A running server.

    Attributes:
        url: without a slash at its end.
        files: by path.
        asked: the path and headers of all requests.
    """

    url: str
    files: dict[str, File]
    asked: list[tuple[str, dict[str, str]]]

    def ranges(self) -> list[str | None]:
        """The Range of every request."""
        return [headers.get("range") for _, headers in self.asked]


@contextlib.contextmanager
def serving(files: dict[str, File] | None = None) -> Iterator[Server]:
    """Serves `files`, which may change meanwhile."""
    server = Server("", files or {}, [])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args):
            pass

        def do_GET(self):
            asked = {name.lower(): value for name, value in self.headers.items()}
            server.asked.append((self.path, asked))
            self.close_connection = True
            file = server.files.get(self.path)
            if file is None:
                self.answer(404, {"Content-Length": "0"})
            elif file.token and asked.get("authorization") != f"Bearer {file.token}":
                self.answer(401, {"Content-Length": "0"})
            elif file.statuses:
                self.answer(file.statuses.pop(0), {"Content-Length": "0", **file.headers})
            elif file.to:
                self.answer(302, {"Location": file.to, "Content-Length": "0", **file.headers})
            else:
                self.send(file, asked)

        def answer(self, status: int, headers: dict[str, str]):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def send(self, file: File, asked: dict[str, str]):
            size = len(file.data)
            tells = {"ETag": file.etag, "Last-Modified": file.modified}
            headers = {name: value for name, value in tells.items() if value} | file.headers
            start = 0
            same = asked.get("if-range") in (None, file.etag, file.modified)
            if file.ranges and same and "range" in asked:
                start = int(asked["range"].removeprefix("bytes=").removesuffix("-"))
                if start >= size:
                    self.answer(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                    return
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            if file.length:
                headers["Content-Length"] = str(size - start)
            self.answer(206 if "Content-Range" in headers else 200, headers)
            end = file.cuts.pop(0) if file.cuts else size
            middle = max(start, end - 1) if file.gate else start
            self.wfile.write(file.data[start:middle])
            self.wfile.flush()
            file.begun.set()
            if file.gate:
                file.gate.wait(20)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(file.data[middle:end])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
