"""Questions about the rollouts of one step: their samples and tokens.

The functions take the segment files to read (`Tail.files`), so that no question opens all files of a run.
"""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from monitor.queries.frames import Frame, frame


def _read_step(con: duckdb.DuckDBPyConnection, files: Sequence[str], columns: str, where: str, values: list) -> Frame:
    if not files:
        return {}
    sql = f"SELECT {columns} FROM read_parquet(?, hive_partitioning = false) WHERE {where} ORDER BY rank, sample"
    return frame(con, sql + (", position" if "position" in columns else ""), [list(files), *values])


def samples_of_step(con: duckdb.DuckDBPyConnection, files: Sequence[str], step: int) -> Frame:
    """The rollouts of a step, with prompt, completion and token texts; {} without files."""
    columns = (
        "rank, sample, group_id, prompt_id, split, reward, correct, advantage, n_tokens, truncated, "
        "prompt, completion, token_texts"
    )
    return _read_step(con, files, columns, "step = ?", [step])


def tokens_of_step(
    con: duckdb.DuckDBPyConnection, files: Sequence[str], step: int, samples: Sequence[int], rank: int = 0
) -> Frame:
    """The response tokens of some rollouts of a step, by sample and position; {} without files."""
    columns = "rank, sample, position, token_id, logprob, entropy, renyi2, deviation, alive, weight"
    where = "step = ? AND sample IN (SELECT unnest(?)) AND rank = ?"
    return _read_step(con, files, columns, where, [step, list(samples), rank])
