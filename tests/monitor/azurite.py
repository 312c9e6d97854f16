"""An Azure server for tests: azurite, of npm, in a process of its own, with objects in memory."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path

import pytest
from s3 import BUCKET, ROOT, free_port

from monitor.store.locks import FileLock

_AZURITE = "azurite@3.35.0"
ACCOUNT = "devstoreaccount1"  # that of every azurite, and its key, which the documentation gives
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def azurite_command() -> str:
    """azurite-blob: $RLVR_AZURITE, one on the path, or that of `.venv-azurite`, which is made. Skips without any."""
    given = os.environ.get("RLVR_AZURITE") or shutil.which("azurite-blob")
    if given:
        return given
    folder = ROOT / ".venv-azurite"
    command = folder / "node_modules" / ".bin" / "azurite-blob"
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, and azurite is not there")
    with FileLock(ROOT / ".venv-azurite.lock", wait_s=600, patient=True):  # several test processes may come here
        if not command.exists():
            install = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", _AZURITE]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                pytest.skip(f"no package index has azurite: {done.stderr.strip().splitlines()[-1:]}")
    return str(command)


@contextmanager
def azurite(log: Path) -> Iterator[int]:
    """A running server with an empty container; its port."""
    port = free_port()
    command = [azurite_command(), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert _make_container(port) == 201
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()


def _make_container(port: int) -> int:
    """The status of the request. It is signed by hand, because the client of the mirror makes no containers."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = [*(f"{name}:{value}" for name, value in headers.items()), f"/{ACCOUNT}/{ACCOUNT}/{BUCKET}"]
    text = "PUT" + "\n" * 12 + "\n".join([*lines, "restype:container"])
    signed = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signed}", "Content-Length": "0"}
        connection.request("PUT", f"/{ACCOUNT}/{BUCKET}?restype=container", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def environment(port: int) -> dict[str, str]:
    """What a client needs to know."""
    return {
        "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/{ACCOUNT}",
    }
