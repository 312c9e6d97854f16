"""An S3 server for tests: moto's, in a process and an environment of its own, behind a proxy that fails when told to.

moto keeps its objects in memory, so it stays up while the proxy, which is all that clients see of it, goes down. It has
an environment of its own because botocore holds python-dateutil below version 3.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
import venv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from monitor.store.locks import FileLock

ROOT = Path(__file__).resolve().parents[2]
_MOTO = ("moto[s3]==5.2.5", "flask==3.1.3", "flask-cors==6.0.5")
BUCKET = "bucket"


def moto_command() -> str:
    """moto_server: $RLVR_MOTO_SERVER, one on the path, or that of `.venv-moto`, which is made. Skips without any."""
    given = os.environ.get("RLVR_MOTO_SERVER") or shutil.which("moto_server")
    if given:
        return given
    folder = ROOT / ".venv-moto"
    command = folder / "bin" / "moto_server"
    with FileLock(ROOT / ".venv-moto.lock", wait_s=600, patient=True):  # several test processes may come here
        if not command.exists():
            venv.create(folder, with_pip=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            done = subprocess.run([*pip, *_MOTO], capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(folder)
                pytest.skip(f"no package index has moto: {done.stderr.strip().splitlines()[-1:]}")
    return str(command)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def moto(log: Path) -> Iterator[int]:
    """A running server with an empty bucket; its port."""
    port = free_port()
    command = [moto_command(), "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert _ask(port, "PUT", f"/{BUCKET}", {}, b"")[0] == 200
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()


class Proxy:
    """Passes requests on to a server. `up` and `down` open and close its port.

    fail: gets (number of the request from 1, method, path) and says what goes wrong: "" nothing, "500", "403", "cut"
    the body of the answer ends early, "lost" it is done but the connection then breaks, or "slow" a second late.
    """

    def __init__(self, port: int) -> None:
        self.server_port, self.port = port, free_port()
        self.fail: Callable[[int, str, str], str] = lambda number, method, path: ""
        self.counts: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []
        self._http: ThreadingHTTPServer | None = None

    def up(self) -> None:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that gave up

        self._http = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and break those that are open at their next request."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        self.counts[request.command] += 1
        self.asked.append((request.command, request.path))
        wrong = self.fail(len(self.asked), request.command, request.path)
        if self._http is None:
            request.close_connection = True
            return
        if wrong == "slow":
            time.sleep(1.0)
        if wrong in ("500", "403"):
            status, headers, answer = (
                int(wrong),
                {"content-type": "application/xml"},
                b"<Error><Code>Test</Code></Error>",
            )
        else:
            status, headers, answer = _ask(
                self.server_port, request.command, request.path, dict(request.headers.items()), body
            )
        if wrong == "lost":
            request.close_connection = True
            return
        request.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                request.send_header(name, value)
        length = headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(answer))
        request.send_header("Content-Length", length)
        request.end_headers()
        if wrong == "cut":
            request.wfile.write(answer[: len(answer) // 2])
            request.close_connection = True
        elif request.command != "HEAD":
            request.wfile.write(answer)


def _ask(port: int, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def environment(port: int) -> dict[str, str]:
    """What a client needs to know."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
