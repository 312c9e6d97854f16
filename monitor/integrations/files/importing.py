"""Importer: records what another trainer or tracker writes into a run of the store, once or while it is written.

Nothing but the run itself says how far it was recorded: the steps that it holds are compared with those of the source.
So an importer that was killed goes on where the last durable step ends, and one that finds nothing new writes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monitor.alerts.engine import AlertEngine
from monitor.alerts.rules import DEFAULT_RULES, Rule
from monitor.errors import MonitorError, StoreError
from monitor.integrations.files.columns import Columns
from monitor.integrations.files.history import History, Step, Stored, already_held
from monitor.integrations.files.reading import BegunAnew, Reader, Row
from monitor.integrations.files.rollouts import Rollouts, StepRollouts
from monitor.integrations.files.source import KINDS, STATE, open_reader
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo, StepRecord
from monitor.store.reader import open_store
from monitor.store.runs import read_info
from monitor.store.schema import run_dir

ROLLOUTS_S = 5.0
PATIENCE_S = 600.0  # without new rows, after which no step waits for series that lag behind, or for a later dump
_QUEUE = 16_384  # steps that may wait for the disk
_ROLLOUTS_QUEUE = 64  # with rollouts, which a recorder that falls behind would leave out


class Importer:
    """Records `source`, a file or folder as `rlvr check` reads it, as the run called `run`.

    chosen: {key or "step": column} that go before what is found. live: the source is still being written: a missing
    one is waited for, and each look records what is new but the last step, whose rows may not all be there. say: gets
    what there is to tell, in sentences. trainer: of TRAINERS, whose names of columns are used; None: those of all.
    on_alert: gets each transition.
    rollouts: folder with the rollouts of each step; while live, a step waits up to ROLLOUTS_S seconds for its own, and
    up to PATIENCE_S for what the trainer dumps of them later.

    Raises MonitorError for a source that cannot be read, and StoreError for a run that is not an import of it.
    """

    def __init__(
        self,
        source: str,
        store: str,
        run: str,
        chosen: Mapping[str, str],
        *,
        live: bool,
        say: Callable[[str], None],
        trainer: str | None = None,
        warmup_steps: int | None = None,
        rules: Sequence[Rule] = DEFAULT_RULES,
        on_alert: Callable[[Alert], None] | None = None,
        rollouts: str | None = None,
    ) -> None:
        self.source, self.store, self.run = source, Path(store).expanduser().absolute(), run
        self.n_recorded = self.n_held = 0
        self.first: int | None = None  # step of this import, and
        self.last: int | None = None
        self._live, self._rules, self._on_alert = live, rules, on_alert
        self._said: set[str] = set()
        self._tell = say
        self._info = read_info(run_dir(self.store, run) / "run.json")
        self._path = str(Path(source).expanduser().absolute())
        stored = self._stored_source()
        known = int((self._info or {}).get("warmup_steps", 0))
        self._warmup_steps = known if warmup_steps is None else warmup_steps
        chosen = dict(stored.get("mapping") or {}) | dict(chosen)
        self.columns = Columns(source, chosen, self._say, live=live, trainer=trainer)
        self._reader: Reader | None = None
        self._history: History | None = None
        self._recorder: Recorder | None = None
        self._recorded: int | None = None  # its last step
        self._looked = self._found = time.time()  # the last look, and the last one that found a row
        self._rollouts = Rollouts(rollouts) if rollouts else None
        self._waiting: deque[tuple[Step, float]] = deque()  # steps for their rollouts, since when
        self._attempt = 0  # of the source, see Step

    def look(self) -> int:
        """Read what is new of the source, and record it; the number of steps that were handed over."""
        self._looked = time.time()
        try:
            rows = self._read()
        except BegunAnew:
            self._begin_anew()
            rows = self._read()
        found = [values for row in rows if (values := self.columns.values(row)) is not None]
        self._found = self._looked if found else self._found
        if self._history is None:
            if not found:
                return 0
            self._history = self._begin(found)
            steps = self._history.take_ready(idle=False) if self._live else self._history.take()
        else:
            for values in found:
                self._history.add(values)
            quiet = self._looked - self._found > PATIENCE_S
            steps = self._history.take() if quiet else self._history.take_ready(idle=not found)
        self._waiting += ((step, time.monotonic()) for step in steps)
        return self._record_ready(all_of_them=not self._live)

    def close(self, status: str) -> str:
        """Record the steps that wait, unless the import has failed, and end with `status`.

        Returns the status that was written, "" if none was.
        """
        if self._history is not None and status != "failed":
            self._waiting += ((step, 0.0) for step in self._history.take())
            self._record_ready(all_of_them=True)
            if self._history.too_late and self._recorder is not None:
                told = f"{self._history.too_late} values came for steps before the last one and are not recorded."
                self._recorder.event("late_values", told)
                self._say(told)
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return ""
        recorder.close(status)
        return "failed" if recorder.lost_steps else status

    # ---- the source --------------------------------------------------------------------------------------------

    def _read(self) -> list[Row]:
        """The new rows; none while the source is not there or has no column of the step."""
        try:
            if self._reader is None and not self._open_source():
                return []
            assert self._reader is not None
            rows = self._reader.read()
        except FileNotFoundError:
            self._say(f"{self.source} is gone. Waiting for it to come back.")
            return []
        except UnicodeDecodeError as error:
            raise MonitorError(f"{self.source!r} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
        except MonitorError as error:
            if not self._live or self._reader is None:
                raise
            self._say(f"{error} Reading it again when it has changed.")  # a file that is just being written anew
            return []
        for note in self._reader.notes:
            self._say(note)
        self._reader.notes.clear()
        if not self.columns.see(self._reader.names):
            return []
        return rows

    def _open_source(self) -> bool:
        path = Path(self.source).expanduser()
        if self._live and not path.exists():
            self._say(f"There is no {self.source} yet. Waiting for it.")
            return False
        self._reader = open_reader(self.source, live=self._live)
        if self._reader is None:
            told = f"{self.source!r} is a folder without {STATE}, .wandb or event files"
            if not self._live:
                raise MonitorError(f"{told}. Expected these, or a file: {KINDS}.")
            self._say(f"{told}, so far. Waiting for one.")
        return self._reader is not None

    def _begin_anew(self) -> None:
        self._reader, self._history = None, None
        if self._recorder is not None:
            self._recorder.flush()

    # ---- what the run holds ------------------------------------------------------------------------------------

    def _stored_source(self) -> dict[str, Any]:
        if self._info is None:
            return {}
        stored = (self._info.get("environment") or {}).get("source")
        if not isinstance(stored, dict):
            raise StoreError(
                f"Run {self.run!r} in store {str(self.store)!r} was not imported but recorded by its trainer. "
                "Choose another --run."
            )
        return stored

    def _begin(self, found: Sequence[Any]) -> History:
        """The history of all that the source holds, without the steps that the run holds already."""
        history = History()
        history.add_all(found)
        stored = self._stored_steps()
        held = already_held(history.waiting, stored) if stored else 0
        if held is None:
            former = self._stored_source().get("path")
            if former != self._path:
                raise StoreError(
                    f"Run {self.run!r} was imported from {former!r}, and {self._path!r} does not go on from there. "
                    "Choose another --run."
                )
            self._say(f"{self.source} was begun anew: attempt {stored[-1].attempt + 1} of the run.")
            self._close_attempt()
        elif held:
            self.n_held = held
            self._attempt = history.take_first(held)[-1].attempt
            if self._live and self._recorder is None:
                self._open(None)
        return history

    def _stored_steps(self) -> list[Stored]:
        """Every step of every attempt of the run, in the order they were recorded."""
        if self._info is None and self._recorder is None:
            return []
        query = "SELECT attempt, step, name, value FROM steps_all WHERE run = ? AND rank = 0 ORDER BY attempt, step"
        found: dict[tuple[int, int], dict[str, float]] = {}
        with open_store(self.store) as opened:
            for attempt, step, name, value in opened.sql(query, [self.run]).rows:
                found.setdefault((attempt, step), {})[name] = value
        return [Stored(attempt, step, scalars) for (attempt, step), scalars in found.items()]

    # ---- recording ---------------------------------------------------------------------------------------------

    def _record_ready(self, *, all_of_them: bool) -> int:
        """Record the steps that wait, up to one that still waits for its rollouts; how many."""
        count = 0
        while self._waiting and (all_of_them or self._is_ready(*self._waiting[0])):
            self._record(self._waiting.popleft()[0])
            count += 1
        return count

    def _is_ready(self, step: Step, since: float) -> bool:
        if self._rollouts is None or self._rollouts.is_complete(step.step):
            return True
        most = PATIENCE_S if self._rollouts.waits_for_training(step.step) else ROLLOUTS_S
        return time.monotonic() - since > most

    def _rollouts_of(self, step: int) -> StepRollouts | None:
        if self._rollouts is None:
            return None
        try:
            return self._rollouts.read(step)
        except (MonitorError, OSError) as error:
            if not self._live:
                raise
            self._say(f"{error} The rollouts of step {step} are left out.")
            return None

    def _record(self, step: Step) -> None:
        if step.attempt != self._attempt:
            self._close_attempt()
            self._attempt = step.attempt
        is_new = self._recorder is None or step.step != self._recorded
        found = self._rollouts_of(step.step) if is_new else None
        if self._recorder is None:
            self._open(step.step)
        assert self._recorder is not None
        ts = self._looked if step.ts is None else step.ts  # one moment for all: how long a step took is not known
        if found is None:
            self._recorder.record(StepRecord(step.step, step.scalars, ts=ts))
        else:
            record = StepRecord(step.step, step.scalars, found.histograms, ts)
            self._recorder.record(record, found.tokens, found.samples)
        self.n_recorded += 1
        self._recorded = step.step
        self.first, self.last = step.step if self.first is None else self.first, step.step
        if self._recorder.queue_depth >= (_QUEUE if found is None else _ROLLOUTS_QUEUE):
            self._recorder.flush()

    def _open(self, first: int | None) -> None:
        """Open the next attempt of the run, whose first step is `first`; None: behind all that it holds."""
        exists = self._info is not None
        engine = AlertEngine(self._rules, self._warmup_steps)
        if exists:
            self._replay(engine, first)
        source = {"path": self._path, "mapping": self.columns.mapping}
        config = self._reader.config if self._reader is not None else {}
        seed = config.get("seed")
        info = RunInfo(
            name=self.run,
            weighting="",  # files do not tell it
            warmup_steps=self._warmup_steps,
            seed=seed if type(seed) is int else 0,
            config=config,
            environment={"source": source},
        )
        self._recorder = Recorder(self.store, info, resume=exists, engine=engine, on_alert=self._on_alert)
        self._info = read_info(run_dir(self.store, self.run) / "run.json")

    def _replay(self, engine: AlertEngine, first: int | None) -> None:
        """Show the engine what the run holds before `first`: its baselines, and the alerts that fire."""
        query = (
            "SELECT step, name, value FROM steps WHERE run = ? AND rank = 0 AND (step < ? OR ?) "
            "AND name IN (SELECT unnest(?)) ORDER BY step"
        )
        rows: dict[int, dict[str, float]] = {}
        with open_store(self.store) as opened:
            asked = [self.run, first or 0, first is None, list(engine.series)]
            for step, name, value in opened.sql(query, asked).rows:
                rows.setdefault(step, {})[name] = value
        for step, scalars in rows.items():
            engine.observe(step, scalars)

    def _close_attempt(self) -> None:
        if self._recorder is not None:
            self._recorder.close("stopped")
            self._recorder = None

    def _say(self, text: str) -> None:
        """Tell it once."""
        if text not in self._said:
            self._said.add(text)
            self._tell(text)
