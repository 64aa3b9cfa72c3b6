"""An S3 server's bad days: a proxy on loopback that fails, breaks off or delays a seeded share of all answers."""

import http.client
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class Flaky:
    """Forwards to `endpoint`; of the answers `share` are bad, and all of them while `down` is set."""

    def __init__(self, endpoint: str, share: float = 0.1, seed: int = 0) -> None:
        self.target = urlsplit(endpoint).netloc
        self.share, self.drawn, self.lock = share, random.Random(seed), threading.Lock()
        self.down = threading.Event()
        self.answers: Counter[str] = Counter()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                body = self._body()
                kind = proxy.draw()
                if kind in ("500", "503"):
                    self._answer(int(kind), [], b"<Error><Code>InternalError</Code></Error>")
                    return
                status, headers, data = proxy.ask(self.command, self.path, dict(self.headers), body)
                if kind == "slow":
                    time.sleep(1.0)
                if kind == "cut" and len(data) > 1 and self.command == "GET":
                    # Half of what was promised, and the connection is gone.
                    self._answer(status, headers, data, send=len(data) // 2)
                    self.close_connection = True
                    return
                self._answer(status, headers, data)

            def _body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    found = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        found += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return found
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _answer(self, status: int, headers: Any, data: bytes, send: int | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                if not any(name.lower() == "content-length" for name, _ in headers):
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[:send])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def draw(self) -> str:
        with self.lock:
            bad = self.down.is_set() or self.drawn.random() < self.share
            kind = "503" if self.down.is_set() else self.drawn.choice(["500", "503", "slow", "cut"]) if bad else "good"
            self.answers[kind] += 1
            return kind

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=30)
        kept = {name: value for name, value in headers.items() if name.lower() not in {*HOP, "expect"}}
        if headers.get("Transfer-Encoding", "").lower() == "chunked":
            kept["X-Amz-Decoded-Content-Length"] = kept.get("X-Amz-Decoded-Content-Length", str(len(body)))
        connection.request(method, path, body=body, headers={**kept, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        found = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOP]
        if method == "HEAD" and (length := answer.getheader("Content-Length")):
            found.append(("Content-Length", length))
        connection.close()
        return answer.status, found, data

    def __enter__(self) -> "Flaky":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
