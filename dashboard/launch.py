"""`rlvr dashboard`: checks the store and the port, starts the server as a child and ends with it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from dashboard.data_path import STORE_VARIABLE
from monitor.children import PYTHON, child_environment

START_TIMEOUT_S = 60.0


class LaunchError(RuntimeError):
    """A store or port that cannot be served; its text is for the user."""


def check_store(store: str | Path) -> Path:
    """The absolute path of a store. Raises LaunchError if it is missing or no folder."""
    path = Path(store).expanduser().resolve()
    if path.is_file():
        raise LaunchError(f"{path} is a file, expected a store folder.")
    if not path.is_dir():
        raise LaunchError(f"No store at {path}. Give the folder that runs were recorded into: rlvr dashboard STORE.")
    return path


def check_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises LaunchError if it is taken or the host is not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError as error:
            raise LaunchError(f"Port {port} is not between 0 and 65535.") from error
        except OSError as error:
            raise LaunchError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port, or 0 for any free one."
            ) from error
        return int(probe.getsockname()[1])


def start(store: str | Path, host: str = "127.0.0.1", port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
    """Starts the server and waits until it answers; returns (process, URL).

    The process ends with this one, however this one ends. Raises LaunchError if it cannot start.
    """
    path, port = check_store(store), check_port(host, port)
    process = subprocess.Popen(
        [*PYTHON, "-m", "dashboard.serve", host, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=child_environment() | {STORE_VARIABLE: str(path)},
        start_new_session=True,  # Ctrl-C reaches only the launcher, which forwards it once
    )  # fmt: skip
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        _wait_until_up(process, url)
    except BaseException:
        stop(process)
        raise
    return process, url


def _wait_until_up(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            told = (process.stderr.read() if process.stderr else b"").decode(errors="replace").strip()
            raise LaunchError(f"The dashboard ended with code {process.returncode} before it answered. {told}")
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LaunchError(f"The dashboard did not answer at {url} within {START_TIMEOUT_S:.0f} s.")


def stop(process: subprocess.Popen[bytes], patience_s: float = 5.0) -> int:
    """Ends a server of `start`: politely, then not; returns its exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
    for pipe in (process.stdin, process.stderr):
        if pipe is not None:
            pipe.close()
    return process.wait()


def _has_display() -> bool:
    """Without one, webbrowser would start a text browser in the user's terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlvr dashboard", description="Show a store in the browser, live.")
    parser.add_argument("store", nargs="?", default="runs", metavar="STORE", help="folder of the store (default: runs)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=0, help="0 chooses a free port")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM. Returns 0, 2 for a store or port that cannot be served, 1 if the server died."""
    options = _parser().parse_args(argv)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell's background job inherits it as ignored
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    process: subprocess.Popen[bytes] | None = None
    try:
        process, url = start(options.store, options.host, options.port)
        print(f"Dashboard: {url}", flush=True)
        if not options.no_browser and _has_display():
            webbrowser.open(url)
        return 0 if process.wait() == 0 else 1
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        if process is not None:
            stop(process)
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
