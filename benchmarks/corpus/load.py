"""Reads the runs of the corpus: those of a working folder, or the packed ones of sample_runs/corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

PACKED = Path(__file__).parents[2] / "sample_runs" / "corpus"
PARTS = ("development", "test")
FRESH = 131  # test runs below this number were looked at with an earlier rule set (docs/log.md), so they judge none now


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One run: who it is (name, part, config ...), its series [steps] with nan for missing values, its histograms."""

    about: dict[str, Any]
    series: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]  # "entropy/all" -> int [steps, cells]

    @property
    def name(self) -> str:
        return str(self.about["name"])


def working_runs(folder: Path, part: str) -> Iterator[Recorded]:
    """The finished runs of `part` in a folder of benchmarks.corpus.make; files of the other part stay shut."""
    for path in sorted(folder.glob("c*.npz")):
        if PARTS[int(path.stem[1:]) % 2] == part:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                columns = {key: file[key] for key in file.files if key != "about"}
            histograms = [key for key in columns if key.startswith("counts/")]
            counts = {key.removeprefix("counts/"): columns.pop(key) for key in histograms}
            yield Recorded(about, columns, counts)


def packed_names() -> set[str]:
    """Names of all packed runs."""
    paths = PACKED.glob("*-series.parquet")
    known = [path for path in paths if not path.name.startswith("histograms-")]
    return {one["name"] for path in known for one in json.loads(pq.read_schema(path).metadata[b"runs"])}


def packed_runs(part: str) -> Iterator[Recorded]:
    """The runs of `part` in sample_runs/corpus, by number."""
    for path in PACKED.glob(f"{part}-series.parquet"):
        table = pq.read_table(path)
        abouts = json.loads(table.schema.metadata[b"runs"])
        names = table["run"].to_numpy()
        columns = {key: table[key].to_numpy().astype(np.float64) for key in table.column_names if key != "run"}
        for about in abouts:
            rows = names == about["name"]
            series = {key: values[rows] for key, values in columns.items() if not key.startswith("counts/")}
            known = {key: values for key, values in series.items() if np.isfinite(values).any()}
            yield Recorded(about, known | {"step": series["step"].astype(np.int64)}, _histograms(path, about["name"]))


def judged_runs(part: str) -> Iterator[Recorded]:
    """The packed runs on which detectors are judged: of the test part those from FRESH on alone."""
    return (run for run in packed_runs(part) if part != "test" or int(run.about["number"]) >= FRESH)


def _histograms(path: Path, run: str) -> dict[str, np.ndarray]:
    """The histograms of a run, from the file beside."""
    table = pq.read_table(path.with_name(f"histograms-{path.name}"), filters=[("run", "==", run)])
    return {key: np.stack(table[key].to_numpy()) for key in table.column_names if key not in ("run", "step")}
