"""`rlvr dashboard`: checks the store and the port, runs the server as a child process, and ends together with it."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path

import tyro

from dashboard.data_path import ALERTS_VARIABLE, STORE_VARIABLE
from monitor.children import PYTHON, child_environment
from monitor.commands.parsing import StoreFolder, parse
from monitor.errors import MonitorError

START_TIMEOUT_S = 60.0


class LaunchError(RuntimeError):
    """A store or port cannot be served. The text is for the user."""


def check_store(store: str | Path) -> Path:
    """The absolute path of a store. Raises LaunchError if it is missing or not a folder."""
    path = Path(store).expanduser().resolve()
    if path.is_file():
        raise LaunchError(f"{path} is a file, expected a store folder.")
    if not path.is_dir():
        raise LaunchError(f"No store at {path}. Give the folder that runs were recorded into: rlvr dashboard STORE.")
    return path


def check_port(host: str, port: int) -> int:
    """`port`, or for 0 a free port. Raises LaunchError if it is taken or `host` is no address of this machine."""
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


def check_alerts(path: str) -> str:
    """The absolute path of an alerts file; "" for none. Raises LaunchError if it cannot be used."""
    if not path:
        return ""
    from monitor.alerts.settings import load_alerts

    try:
        load_alerts(path)
    except MonitorError as error:
        raise LaunchError(str(error)) from None
    return str(Path(path).expanduser().resolve())


def start(
    store: str | Path, host: str = "127.0.0.1", port: int = 0, alerts: str = "", names: Sequence[str] = ()
) -> tuple[subprocess.Popen[bytes], str]:
    """Starts the server and waits until it answers; returns (process, URL). names: see `dashboard.settings.flags`.

    The server ends when this process does, however that happens. Raises LaunchError if the server cannot start.
    """
    path, alerts, port = check_store(store), check_alerts(alerts), check_port(host, port)
    process = subprocess.Popen(
        [*PYTHON, "-m", "dashboard.serve", host, str(port), *names],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=child_environment() | {STORE_VARIABLE: str(path), ALERTS_VARIABLE: alerts},
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
    """Ends a server of `start`, first by SIGTERM, after `patience_s` by SIGKILL; returns its exit code."""
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
    """Whether there is a display. Without one, webbrowser would start a text browser in the user's terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@dataclass(frozen=True)
class Options:
    """Show a store in the browser, live."""

    store: tyro.conf.Positional[StoreFolder] = "runs"  # folder of the store
    host: str = "127.0.0.1"  # address to listen on; 127.0.0.1: this machine only
    port: int = 0  # 0 chooses a free port
    name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # a name under which browsers reach it, if not by the host
    no_browser: bool = False  # only print the address
    alerts: str = ""  # alerts file whose routes the Alerts page shows and tests; none: no routes


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM. Returns 0, 2 for a store or port that cannot be served, 1 if the server died."""
    options = parse(Options, list(sys.argv[1:] if argv is None else argv), "dashboard")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too, because a shell's background job starts with SIGINT ignored
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    process: subprocess.Popen[bytes] | None = None
    try:
        process, url = start(options.store, options.host, options.port, options.alerts, options.name)
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
