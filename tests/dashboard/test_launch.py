"""The launcher: clear refusals, a printed address, and never an orphan."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dashboard import launch
from dashboard.settings import OPTIONS, flags


def serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def gone(url: str, within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not serves(url):
            return True
        time.sleep(0.2)
    return False


def run_launcher(store: Path, cwd: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dashboard.launch", str(store), "--no-browser"],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(launch.__file__).parent.parent)},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"Dashboard: (http://127\.0\.0\.1:\d+)\n", line)
    assert found, line
    return process, found[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_launcher(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "store").mkdir()
    process, url = run_launcher(tmp_path / "store", cwd=tmp_path)
    assert serves(url)
    process.send_signal(how)
    process.communicate(timeout=20)
    assert gone(url), "an orphan still serves"
    assert process.returncode == (0 if how != signal.SIGKILL else -signal.SIGKILL)


def test_static_plotly_and_foreign_hosts(url: str) -> None:
    with urllib.request.urlopen(f"{url}/app/static/plotly.min.js", timeout=5) as answer:
        assert "javascript" in answer.headers["Content-Type"] and int(answer.headers["Content-Length"]) > 10**6
    assert not answers_as("evil.example", url)


def answers_as(host: str, url: str) -> bool:
    """Whether the server opens a WebSocket to a browser that knows it by this name."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=5) as raw:
        lines = [
            "GET /_stcore/stream HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", "",
        ]  # fmt: skip
        raw.sendall("\r\n".join(lines).encode())
        return b"101" in raw.recv(200).split(b"\r\n")[0]


def test_the_server_answers_under_the_names_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    process, url = launch.start(tmp_path / "store", names=("node7", "monitor.example.org"))
    try:
        told = {host: answers_as(host, url) for host in ("node7", "monitor.example.org", "localhost", "node8")}
    finally:
        launch.stop(process)
    assert told == {"node7": True, "monitor.example.org": True, "localhost": True, "node8": False}


def test_wrong_use_exits_with_2(tmp_path: Path, capsys) -> None:
    assert launch.main([str(tmp_path / "none"), "--no-browser"]) == 2
    assert "No store at" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert launch.main([str(tmp_path / "file"), "--no-browser"]) == 2
    assert "is a file" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert launch.main([str(tmp_path), "--no-browser", "--port", str(taken.getsockname()[1])]) == 2
    assert "already in use" in capsys.readouterr().err
    assert launch.main([str(tmp_path), "--no-browser", "--port", "70000"]) == 2
    assert "not between 0 and 65535" in capsys.readouterr().err


def test_flags_and_config_file_agree() -> None:
    path = Path(__file__).resolve().parents[2] / ".streamlit" / "config.toml"
    config = tomllib.loads(path.read_text())
    flat = {
        f"{section}.{name}": value
        for section, values in config.items()
        for name, value in (
            ((f"{kind}.{n}", v) for kind, colours in values.items() for n, v in colours.items())
            if section == "theme"
            else values.items()
        )
    }
    assert flat.pop("server.address") == "127.0.0.1" and flat.pop("server.allowedHosts") == ["127.0.0.1", "localhost"]
    assert flat == OPTIONS
    assert "--browser.gatherUsageStats=false" in flags("127.0.0.1", 1) and "--server.enableCORS=true" in flags("::1", 1)
