"""store.duckdb: views and macros over the segments, for any DuckDB client. Derived; replaced by rename."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

import duckdb

from monitor.metrics import EDGES_IDS, cell_bounds
from monitor.store.runs import DEAD_AFTER_S, FIRST_STEP_S, STALL_MIN_S, STALL_STEPS, STATUS_ORDER
from monitor.store.schema import SCHEMA_VERSION, TABLES
from monitor.store.segments import memory_connection, quote, write_seeds

CATALOG = "store.duckdb"
_FORMAT = "v1.2.0"  # DuckDB 1.2 and later can open it
_CATALOG_VERSION = 2  # raise it when a view or macro changes: older catalogs are then built anew

_RUN_COLUMNS = {
    "schema_version": "INTEGER",
    "created": "DOUBLE",
    "attempts": "JSON",
    "name": "VARCHAR",
    "model": "VARCHAR",
    "task": "VARCHAR",
    "weighting": "VARCHAR",
    "seed": "BIGINT",
    "comparison": "VARCHAR",
    "warmup_steps": "BIGINT",
    "config": "JSON",
    "environment": "JSON",
}
_BEAT_COLUMNS = {
    "run": "VARCHAR",
    "rank": "SMALLINT",
    "attempt": "SMALLINT",
    "status": "VARCHAR",
    "pid": "BIGINT",
    "host": "VARCHAR",
    "ts": "DOUBLE",
    "started": "DOUBLE",
    "acknowledged": "INTEGER",
    "last_step_ts": "DOUBLE",
    "median_step_s": "DOUBLE",
    "active_ts": "DOUBLE",
    "busy": "VARCHAR",
    "busy_since": "DOUBLE",
    "lost_steps": "BIGINT",
    "lost_why": "VARCHAR",
    "tokens_dropped": "BIGINT",
    "segments": "BIGINT",
    "bytes": "BIGINT",
    "queue": "BIGINT",
    "errors": "BIGINT",
}

# The status of a rank as far as SQL can see: no locks, so a killed process shows only once its heartbeat is old.
# Whether steps come is judged at the time of the heartbeat, by the writer's own clock.
_RANK_STATUS = f"""CASE
    WHEN status <> 'running' THEN status
    WHEN epoch(now()) - ts > {DEAD_AFTER_S} THEN 'crashed'
    WHEN busy IS NOT NULL THEN 'running'
    WHEN last_step_ts IS NULL AND ts - greatest(started, active_ts) > {FIRST_STEP_S} THEN 'stalled'
    WHEN ts - greatest(last_step_ts, active_ts) > greatest({STALL_MIN_S}, {STALL_STEPS} * coalesce(median_step_s, 0))
        AND last_step_ts IS NOT NULL THEN 'stalled'
    ELSE 'running' END"""

_RUNS_VIEW = f"""CREATE OR REPLACE VIEW runs AS
SELECT r.name AS run, coalesce(b.status, 'crashed') AS status, r.* EXCLUDE (name, schema_version),
    b.* EXCLUDE (run, status)
FROM run_files r LEFT JOIN (
    SELECT run, {list(STATUS_ORDER)!r}[min(list_position({list(STATUS_ORDER)!r}, {_RANK_STATUS}))] AS status,
        max(attempt) AS attempt, max(acknowledged) AS acknowledged, max(last_step_ts) AS last_step_ts,
        sum(tokens_dropped)::BIGINT AS tokens_dropped, sum(bytes)::BIGINT AS bytes,
        count(*) AS ranks, coalesce(sum(lost_steps), 0)::BIGINT AS lost_steps, any_value(busy) AS busy
    FROM heartbeats WHERE (run, attempt) IN (SELECT run, max(attempt) FROM heartbeats GROUP BY run) GROUP BY run
) b ON b.run = r.name"""

# Same rule as monitor.records.quantiles_from_counts: linear in the cell that holds rank q * n.
_QUANTILE_MACROS = (
    "CREATE OR REPLACE MACRO hist_cell(counts, place) AS list_position("
    "[list_sum(counts[:i]) >= place AND counts[i] > 0 FOR i IN range(1, len(counts) + 1)], true)",
    "CREATE OR REPLACE MACRO hist_interpolate(counts, edge_lows, edge_highs, cell, place, low, high) AS "
    "greatest(edge_lows[cell], low) + (place - coalesce(list_sum(counts[:cell - 1]), 0)) / counts[cell] "
    "* (least(edge_highs[cell], high) - greatest(edge_lows[cell], low))",
    "CREATE OR REPLACE MACRO hist_quantile(counts, id, q, low, high) AS hist_interpolate(counts, "
    "(SELECT lows FROM edges WHERE edges_id = id), (SELECT highs FROM edges WHERE edges_id = id), "
    "hist_cell(counts, q * list_sum(counts)), q * list_sum(counts), low, high)",
    "CREATE OR REPLACE MACRO series(metric) AS TABLE SELECT run, step, avg(value) AS value FROM steps "
    "WHERE name = metric GROUP BY run, step ORDER BY run, step",
)


def _escaped_glob(path: Path) -> str:
    """A folder's path as the fixed start of a glob: its own *, ? and [ mean themselves."""
    return re.sub(r"([*?\[])", r"[\1]", str(path))


def _json_view(name: str, glob: str, columns: dict[str, str]) -> str:
    spec = ", ".join(f"{column}: '{kind}'" for column, kind in columns.items())
    key = "name" if "name" in columns else "run"
    source = f"read_json({quote(glob)}, columns = {{{spec}}}, format = 'auto', ignore_errors = false)"
    return f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM {source} WHERE {key} IS NOT NULL"


def catalog_statements(store: Path) -> list[str]:
    """The SQL that makes every view, macro and table of the catalog of a store, in order."""
    runs = f"{_escaped_glob(store)}/runs/*"
    made = [
        f"CREATE OR REPLACE TABLE store_info AS SELECT {quote(str(store))} AS root, "
        f"{SCHEMA_VERSION} AS schema_version, {_CATALOG_VERSION} AS catalog_version",
        "CREATE OR REPLACE TABLE edges (edges_id VARCHAR, lows DOUBLE[], highs DOUBLE[])",
        _json_view("run_files", f"{runs}/*run.json", _RUN_COLUMNS),
        _json_view("heartbeats", f"{runs}/*heartbeat-r*.json", _BEAT_COLUMNS),
        _RUNS_VIEW,
    ]
    for table in TABLES:
        glob = quote(f"{runs}/data/{table}/*.parquet")
        made.append(
            f"CREATE OR REPLACE VIEW {table}_all AS SELECT * FROM read_parquet({glob}, hive_partitioning = false)"
        )
    made.append(
        "CREATE OR REPLACE VIEW commits AS SELECT run, step, rank, max(attempt) AS attempt FROM steps_all GROUP BY ALL"
    )
    for table in TABLES:
        # Events happen to a run, not to a step: also those of replaced attempts stay visible.
        replaced = "" if table == "events" else " SEMI JOIN commits USING (run, step, rank, attempt)"
        made.append(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM {table}_all{replaced}")
    return made + list(_QUANTILE_MACROS)


def build_catalog(con: duckdb.DuckDBPyConnection, store: Path) -> None:
    """Make the catalog's views, macros and tables in the current database of a connection."""
    for statement in catalog_statements(store):
        con.execute(statement)
    for edges_id in EDGES_IDS:
        lows, highs = cell_bounds(edges_id)
        con.execute("INSERT INTO edges VALUES (?, ?, ?)", [edges_id, lows.tolist(), highs.tolist()])


def ensure_catalog(store: Path) -> Path:
    """The path of an up-to-date store.duckdb, built anew if missing, moved or of an older version.

    `store` is absolute. Readers that hold the old file keep it; the next one to open gets the new. Raises OSError.
    """
    path = store / CATALOG
    if not _is_current(path, store):
        write_seeds(store)
        tmp = store / f"{CATALOG}.{os.getpid()}-{time.monotonic_ns()}.tmp"
        try:
            with memory_connection() as con:
                con.execute(f"ATTACH {quote(str(tmp))} AS catalog_file (STORAGE_VERSION '{_FORMAT}')")
                con.execute("USE catalog_file")
                build_catalog(con, store)
                con.execute("USE memory")
                con.execute("DETACH catalog_file")
            os.replace(tmp, path)
        finally:
            for left in (tmp, tmp.with_name(f"{tmp.name}.wal")):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
    return path


def _is_current(path: Path, store: Path) -> bool:
    if not path.exists():
        return False
    try:
        with memory_connection() as con:
            con.execute(f"ATTACH {quote(str(path))} AS catalog_file (READ_ONLY)")
            found = con.execute("SELECT root, schema_version, catalog_version FROM catalog_file.store_info").fetchall()
            con.execute("DETACH catalog_file")
    except duckdb.Error:  # not ours, damaged, or held by a shell that opened it for writing: make a new one
        return False
    return found == [(str(store), SCHEMA_VERSION, _CATALOG_VERSION)]
