"""Reader of TensorBoard's event files, through tensorboard's own loader; needs neither TensorFlow nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monitor.extras import require
from monitor.integrations.files.table import Row, Table

MARK = ".tfevents."  # in the name of every event file


def read_events(paths: Sequence[Path]) -> Table:
    """The scalars of one run's event files, a row for each step; where files overlap, as after a restart, the newest.

    A last record that is still being written is left out, as tensorboard does. Raises MissingPackageError.
    """
    require("Reading TensorBoard's event files", ["tensorboard"], "tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    scalars: dict[str, str] = {}
    rows: list[Row] = []
    for path in sorted(paths, key=lambda path: path.name):  # names begin with the time that the file was made
        steps: dict[int, dict[str, float]] = {}
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":  # stands in the first value of a tag only
                    scalars[value.tag] = value.tag
                if value.tag in scalars:
                    steps.setdefault(event.step, {})[value.tag] = float(make_ndarray(value.tensor).item())
        rows += [(f"{path.name} step {step}", {"step": step} | steps[step]) for step in sorted(steps)]
    return Table({"step": "step"} | scalars, rows)
