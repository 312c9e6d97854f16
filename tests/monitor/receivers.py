"""Real receivers of alerts on this machine: a web server and a mail server that refuse, hang and recover."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebReceiver:
    """Takes JSON. status: what it answers with. hang: it reads a request and answers once `release` is set."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []  # answered with 200
        self.asked = 0
        self.status, self.hang, self.release = 200, False, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked += 1
                status = outer.status
                if outer.hang:
                    outer.release.wait(60)
                    status = 500
                if status == 200:
                    outer.got.append(body)
                try:
                    self.send_response(status)
                    self.end_headers()
                except OSError:  # it did not wait
                    pass

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def address(self, secret: str = "tok-0123456789") -> str:
        return f"json://reader:{secret}@127.0.0.1:{self.port}/{secret}/?cto=2&rto=2"

    @property
    def titles(self) -> list[str]:
        return [body["title"] for body in list(self.got)]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class MuteServer:
    """Takes connections and never says a word, not even an SMTP server's greeting."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.setblocking(False)
        self._taken: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])

    @property
    def asked(self) -> int:
        """How many have connected so far."""
        while True:
            try:
                self._taken.append(self._listener.accept()[0])
            except BlockingIOError:
                return len(self._taken)

    def close(self) -> None:
        for one in (self._listener, *self._taken):
            one.close()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fails the test if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
