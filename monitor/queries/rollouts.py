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


def tokens_of_cell(
    con: duckdb.DuckDBPyConnection,
    token_files: Sequence[str],
    step: int,
    metric: str,
    low: float,
    high: float,
    most: int,
) -> Frame:
    """The tokens of a step with low <= `metric` < high, compared in float32 as histograms count them.

    Highest value first, at most `most` of them; `n` is how many there are and `n_rollouts` in how many rollouts.
    """
    if not token_files:
        return {}
    if metric not in ("entropy", "renyi2", "deviation", "weight"):
        raise ValueError(f"Tokens have no column {metric!r}.")
    sql = (
        f"SELECT rank, sample, position, {metric} AS value, count(*) OVER () AS n, "
        "(SELECT count(*) FROM (SELECT DISTINCT rank, sample FROM found)) AS n_rollouts FROM found "
        "ORDER BY value DESC, rank, sample, position LIMIT ?"
    )
    found = (
        f"WITH found AS (SELECT rank, sample, position, {metric} FROM read_parquet(?, hive_partitioning = false) "
        f"WHERE step = ? AND isfinite({metric}) AND {metric} >= ?::FLOAT AND {metric} < ?::FLOAT) "
    )
    return frame(con, found + sql, [list(token_files), step, low, high, most])


def words_of_step(
    con: duckdb.DuckDBPyConnection, token_files: Sequence[str], sample_files: Sequence[str], step: int
) -> Frame:
    """Every text that a token of a step has: text, n, n_heavy, entropy (their sum, nats); {} without files.

    n_heavy counts the tokens whose weight is above the step's mean weight: with weights of 0 and 1 the selected ones.
    """
    if not token_files or not sample_files:
        return {}
    sql = """
        WITH texts AS (
            SELECT rank, sample, unnest(token_texts) AS text, generate_subscripts(token_texts, 1) - 1 AS position
            FROM read_parquet(?, hive_partitioning = false) WHERE step = ?
        ), of_step AS (
            SELECT rank, sample, position, entropy, weight, avg(weight::DOUBLE) OVER () AS mean_weight
            FROM read_parquet(?, hive_partitioning = false) WHERE step = ? AND isfinite(entropy) AND isfinite(weight)
        )
        SELECT text, count(*) AS n, count(*) FILTER (weight > mean_weight) AS n_heavy, sum(entropy::DOUBLE) AS entropy
        FROM of_step JOIN texts USING (rank, sample, position) GROUP BY text ORDER BY text
    """
    return frame(con, sql, [list(sample_files), step, list(token_files), step])


def profile_of_step(
    con: duckdb.DuckDBPyConnection, token_files: Sequence[str], sample_files: Sequence[str], step: int
) -> Frame:
    """tenth (0 to 9), correct, n, entropy (mean, nats) of the tokens of a step; {} without files.

    A token lies in tenth 10 position // n_tokens of its response.
    """
    if not token_files or not sample_files:
        return {}
    sql = """
        SELECT least(9, 10 * t.position // s.n_tokens) AS tenth, s.correct, count(*) AS n,
            avg(t.entropy::DOUBLE) AS entropy
        FROM (FROM read_parquet(?, hive_partitioning = false) WHERE step = ? AND isfinite(entropy)) t
        JOIN (FROM read_parquet(?, hive_partitioning = false) WHERE step = ? AND n_tokens > 0) s USING (rank, sample)
        GROUP BY ALL ORDER BY correct, tenth
    """
    return frame(con, sql, [list(token_files), step, list(sample_files), step])
