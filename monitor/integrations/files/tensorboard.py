"""Reader of TensorBoard's event files, through tensorboard's own loader; needs neither TensorFlow nor torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from monitor.extras import require
from monitor.integrations.files.reading import TIME, BegunAnew, Row

MARK = ".tfevents."  # in the name of every event file


class EventsReader:
    """The scalars of one run's event files, a row for each step; where files overlap, as after a restart, the newest.

    find: the files, to which a restart adds one. A last record that is still being written is left out, as tensorboard
    does, and comes once it is complete. Raises MissingPackageError.
    """

    def __init__(self, find: Callable[[], Sequence[Path]]) -> None:
        require("Reading TensorBoard's event files", ["tensorboard"], "tensorboard")
        self.names = {"step": "step"}
        self.notes: list[str] = []
        self.config: dict[str, Any] = {}
        self._find = find
        self._loaders: dict[Path, Any] = {}
        self._sizes: dict[Path, int] = {}
        self._scalars: set[str] = set()

    def read(self) -> list[Row]:
        rows: list[Row] = []
        for path in sorted(self._find(), key=lambda path: path.name):  # names begin with the time they were made
            size = path.stat().st_size
            if size < self._sizes.get(path, 0):
                raise BegunAnew(path)
            if size > self._sizes.get(path, -1):
                self._sizes[path] = size
                rows += self._new_rows(path)
        return rows

    def _new_rows(self, path: Path) -> list[Row]:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray

        loader = self._loaders.setdefault(path, EventFileLoader(str(path)))
        steps: dict[int, dict[str, float]] = {}
        for event in loader.Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":  # stands in the first value of a tag only
                    self._scalars.add(value.tag)
                    self.names[value.tag] = value.tag
                if value.tag in self._scalars:
                    row = steps.setdefault(event.step, {TIME: event.wall_time})
                    row[value.tag] = float(make_ndarray(value.tensor).item())
        return [(f"{path.name} step {step}", {"step": step} | steps[step]) for step in steps]
