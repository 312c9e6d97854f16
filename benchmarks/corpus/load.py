"""Reads the runs of the corpus: those of a working folder, or the packed ones of sample_runs/corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKED = Path(__file__).parents[2] / "sample_runs" / "corpus"
PARTS = ("development", "test")


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
