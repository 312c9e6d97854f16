"""WandbSink: mirrors a run's scalars, a few histograms and its alerts to Weights & Biases.

It is off by default. The store stays the source of truth, and token tables never go to wandb. Whatever happens to wandb
(no network, no key, an exception, a slow disk) costs the run nothing, because the mirror works in a thread of its own
behind a bounded queue.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from monitor.extras import require_extras
from monitor.metrics import cell_bounds
from monitor.records import Alert, Histogram, RunInfo, StepRecord

HISTOGRAMS = ("entropy", "deviation", "log_ratio", "weight")  # of split "all"
_QUEUE_STEPS = 512
_CLOSE_S = 60.0  # the longest that close() waits, so that a dead connection cannot keep the trainer from ending
_STOP = object()
_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def closed_edges(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """(counts [n], edges [n + 1]) of the cells from the first filled one to the last.

    The outermost cells reach to -inf and +inf; they are closed with the data's own min and max. Raises ValueError for a
    histogram without data.
    """
    filled = np.flatnonzero(histogram.counts)
    if len(filled) == 0:
        raise ValueError(f"Histogram {histogram.metric}/{histogram.split} is empty: it has no edges to close.")
    first, last = int(filled[0]), int(filled[-1])
    lows, highs = cell_bounds(histogram.edges_id)
    edges = np.append(lows[first : last + 1], highs[last])
    if not np.isfinite(edges[0]):
        edges[0] = min(histogram.min, np.nextafter(edges[1], -np.inf))
    if not np.isfinite(edges[-1]):
        edges[-1] = max(histogram.max, np.nextafter(edges[-2], np.inf))
    return histogram.counts[first : last + 1], edges


class WandbSink:
    """A sink of the Recorder. `start`, `step` and `close` return at once and never raise.

    mode: "offline" only writes under `dir`. "online" sends; if wandb cannot connect within init_timeout_s, the sink
    reports that and falls back to offline. `failures` counts calls of wandb that raised. `dropped` counts steps left
    out because wandb was too slow. The first of each is reported through `report`. Raises MissingPackageError if wandb
    is not installed.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"] = "offline",
        project: str = "rlvr-monitor",
        dir: str | Path | None = None,
        init_timeout_s: float = 30.0,
        report: Callable[[str], None] = _to_stderr,
    ) -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"wandb mode is {mode!r}, expected 'offline' or 'online'.")
        require_extras("The mirror to wandb", "wandb")
        self.mode: str = mode
        self.failures = 0
        self.dropped = 0
        self.run_dir: Path | None = None  # known once wandb has started
        self._project, self._dir, self._init_timeout_s, self._report = project, dir, init_timeout_s, report
        self._queue: queue.Queue[Any] = queue.Queue(_QUEUE_STEPS)
        self._thread: threading.Thread | None = None
        self._exit_code = 0

    def start(self, info: RunInfo) -> None:
        """Begin to mirror. wandb is imported and started in the sink's own thread."""
        self._thread = threading.Thread(target=self._work, args=(info,), name="wandb-sink", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord, alerts: Sequence[Alert] = ()) -> None:
        """Hand over one step."""
        try:
            self._queue.put_nowait((record, tuple(alerts)))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._say(f"wandb is {_QUEUE_STEPS} steps behind: steps are left out of the mirror, not of the store.")

    def verdict(self, sentence: str) -> None:
        """Hand over what there is to say of the run now; the newest one stands in the wandb run's summary."""
        with suppress(queue.Full):  # a newer one will come
            self._queue.put_nowait((sentence, ()))

    def close(self, status: str = "finished") -> None:
        """Finish the wandb run; waits for that at most a minute. status: a RunStatus."""
        self._exit_code = 0 if status in ("finished", "stopped") else 1
        if self._thread is None:
            return
        try:
            self._queue.put(_STOP, timeout=_CLOSE_S)
        except queue.Full:
            self._say("wandb stopped taking steps; its mirror of this run is incomplete. The store is complete.")
            return
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._say(f"wandb did not finish within {_CLOSE_S:.0f} s. Send the rest later: wandb sync {self.run_dir}")

    def _say(self, text: str) -> None:
        try:
            self._report(text)
        except Exception:  # a broken terminal must not stop the run either
            self.failures += 1

    def _work(self, info: RunInfo) -> None:
        try:
            run = self._init(info)
        except Exception as error:
            self._failed("start", error)
            run = None
        while (item := self._queue.get()) is not _STOP:
            if run is not None:
                try:
                    self._log(run, *item)
                except Exception as error:
                    self._failed(f"log {item[0] if isinstance(item[0], str) else f'step {item[0].step}'}", error)
        if run is not None:
            try:
                run.finish(exit_code=self._exit_code)
            except Exception as error:
                self._failed("finish", error)

    def _failed(self, what: str, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            self._say(
                f"wandb could not {what}: {type(error).__name__}: {error}. Training and the store go on without it; "
                "further failures are only counted."
            )

    def _init(self, info: RunInfo) -> Any:
        if self.mode == "online":
            try:
                return self._open(info, "online")
            except Exception as error:
                self.mode = "offline"
                self._say(
                    f"wandb cannot go online ({type(error).__name__}: {error}). Recording offline instead; check the "
                    "network and `wandb login`, and send it later with `wandb sync`."
                )
        return self._open(info, "offline")

    def _open(self, info: RunInfo, mode: Literal["offline", "online"]) -> Any:
        import wandb

        # without a key wandb.init would ask for one on the terminal, and this thread would hang
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is configured")
        if self._dir is not None:
            Path(self._dir).mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            mode=mode,
            project=self._project,
            name=info.name,
            group=info.comparison or None,
            dir=None if self._dir is None else str(self._dir),
            config={"model": info.model, "task": info.task, "weighting": info.weighting, "seed": info.seed}
            | dict(info.config),
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, init_timeout=self._init_timeout_s
            ),
        )
        self.run_dir = Path(run.dir).parent
        return run

    def _log(self, run: Any, record: StepRecord | str, alerts: Sequence[Alert]) -> None:
        import wandb

        if isinstance(record, str):
            run.summary["verdict"] = record
            return
        row: dict[str, Any] = dict(record.scalars)
        for histogram in record.histograms:
            if histogram.metric in HISTOGRAMS and histogram.split == "all" and histogram.n:
                row[f"histogram/{histogram.metric}"] = wandb.Histogram(np_histogram=closed_edges(histogram))
        run.log(row, step=record.step)
        for alert in alerts:
            if alert.state == "firing":
                run.alert(
                    title=f"{alert.rule} at step {alert.step}",
                    text=f"{alert.message} {alert.action}".strip(),
                    level=_LEVELS[alert.severity],
                    wait_duration=0,
                )
