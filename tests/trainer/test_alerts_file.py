"""`rlvr train --alerts FILE`: its rules judge the run, its routes carry the news, its faults are told before work."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from monitor.store.reader import open_store
from trainer.commands.train import main

SMALL = "--threads 1 --rollout.prompts 2 --rollout.group-size 2 --eval.every 0 --checkpoint.every 0".split()
RULE = "[rules.no_learning_signal]\nshare = 0.01\nrelease = 0.01\nrecent_rows = 2\nfor_rows = 1\n"
ROUTE = '[[routes]]\nurl_env = "ALERTS_URL"\nseverities = ["info", "warning", "critical"]\n'


def train(tmp_path: Path, text: str, *options: str) -> int:
    (tmp_path / "alerts.toml").write_text(text)
    return main([*SMALL, "--store", str(tmp_path / "s"), "--alerts", str(tmp_path / "alerts.toml"), *options])


def test_its_rules_judge_and_its_routes_deliver(tmp_path, monkeypatch):
    """Two groups of two: within twelve steps some have equal rewards, and a hundredth of such is set to be too many."""
    pytest.importorskip("apprise")
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("ALERTS_URL", f"json://u:tok-123456@127.0.0.1:{server.server_port}/")
    try:
        assert train(tmp_path, RULE + ROUTE, "--steps", "12", "--run", "a") == 0
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    with open_store(tmp_path / "s") as store:
        query = "SELECT step FROM alerts WHERE rule = 'no_learning_signal' AND state = 'firing' ORDER BY step"
        fired = [step for (step,) in store.sql(query).rows]
    assert fired and f"no_learning_signal in run a at step {fired[0]}" in bodies[0]
    for path in (tmp_path / "s").rglob("*"):
        assert not path.is_file() or b"tok-123456" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rules.no_learning_signl]\n", "Did you mean 'no_learning_signal'?"),
        ('[[routes]]\nurl = "slack://a/b/c"\n', "url is not taken, because an address is a secret"),
        (
            '[[routes]]\nurl_env = "NOT_SET_ANYWHERE"\n',
            "The environment variable NOT_SET_ANYWHERE of a route is not set",
        ),
    ],
)
def test_a_faulty_file_is_refused_before_work_starts(tmp_path, capsys, text, message):
    assert train(tmp_path, text) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
