"""Packs the finished runs of a working folder into sample_runs/corpus: python -m benchmarks.corpus.pack --work FOLDER

Runs that were packed before and are not in FOLDER stay. For each part there is one wide table of series
(development-series.parquet: run, step, a float32 column for each scalar) with who the runs are in its metadata, and
one of histograms beside it. No outcome is looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.corpus.load import PACKED, PARTS, Recorded, working_runs

HISTOGRAM_EVERY = 4  # steps between the histograms that are kept


def series_table(runs: list[Recorded]) -> pa.Table:
    """Rows of all runs below each other; nan where a run has no value."""
    keys = sorted({key for run in runs for key in run.series if key != "step"})
    columns: dict[str, pa.Array] = {
        "run": pa.array([run.name for run in runs for _ in run.series["step"]]).dictionary_encode(),
        "step": pa.array(np.concatenate([run.series["step"] for run in runs]), pa.int32()),
    }
    for key in keys:
        parts = [run.series.get(key, np.full(len(run.series["step"]), np.nan)) for run in runs]
        columns[key] = pa.array(np.concatenate(parts).astype(np.float32))
    return pa.table(columns).replace_schema_metadata({"runs": json.dumps([run.about for run in runs])})


def histogram_table(runs: list[Recorded]) -> pa.Table:
    """Counts of every HISTOGRAM_EVERY-th step with histograms."""
    names, steps = [], []
    counts: dict[str, list[np.ndarray]] = {key: [] for key in runs[0].counts}
    for run in runs:
        for row, step in enumerate(run.series["step"]):
            if step % HISTOGRAM_EVERY == 1:
                names.append(run.name)
                steps.append(int(step))
                for key, values in run.counts.items():
                    counts[key].append(values[row].astype(np.int32))
    table = {"run": pa.array(names).dictionary_encode(), "step": pa.array(steps, pa.int32())}
    return pa.table(table | {key: pa.array(list(rows), pa.list_(pa.int32())) for key, rows in counts.items()})


def joined(path: Path, fresh: pa.Table, names: set[str]) -> pa.Table:
    """The packed table without the runs `names`, and below it the fresh one; runs in the metadata likewise."""
    if not path.exists():
        return fresh
    old = pq.read_table(path)
    kept = old.filter(pc.invert(pc.is_in(old["run"].cast(pa.string()), pa.array(sorted(names)))))
    table = pa.concat_tables(
        [part.set_column(0, "run", part["run"].cast(pa.string())) for part in (kept, fresh)], promote_options="default"
    )
    table = table.sort_by([("run", "ascending"), ("step", "ascending")])
    table = table.set_column(0, "run", table["run"].dictionary_encode())
    if b"runs" not in (fresh.schema.metadata or {}):
        return table.replace_schema_metadata()
    before, after = (json.loads(part.schema.metadata[b"runs"]) for part in (old, fresh))
    abouts = sorted([*(one for one in before if one["name"] not in names), *after], key=lambda one: str(one["name"]))
    return table.replace_schema_metadata({"runs": json.dumps(abouts)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    PACKED.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        runs = list(working_runs(options.work, part))
        if not runs:
            continue
        path = PACKED / f"{part}-series.parquet"
        tables = ((path, series_table(runs)), (path.with_name(f"histograms-{path.name}"), histogram_table(runs)))
        for target, fresh in tables:
            table = joined(target, fresh, {run.name for run in runs})
            pq.write_table(table, target, compression="zstd", compression_level=19)
            print(f"{target.name}: {table.num_rows} rows, {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
