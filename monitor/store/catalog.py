"""The views and macros of a store, in two places: our own readers' are over checked files, store.duckdb's over globs.

Both have the same names, columns and meaning. store.duckdb is for any other DuckDB client; it is derived, and replaced
by a rename. Its globs match only names of segments, and its views see new segments at once. But a damaged file makes
the view of its table fail until the file is gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb

from monitor.metrics import EDGES_IDS, cell_bounds
from monitor.store.macros import comment_statements, macro_statements
from monitor.store.runs import DEAD_AFTER_S, FIRST_STEP_S, STALL_MIN_S, STALL_STEPS, STATUS_ORDER
from monitor.store.schema import FORMER_TYPES, SCHEMA_VERSION, TABLES
from monitor.store.segments import SEED_RUN, escape_glob, memory_connection, quote, write_seeds

CATALOG = "store.duckdb"
FORMAT = "v1.2.0"  # the oldest storage format; the views need DuckDB 1.3
_CATALOG_VERSION = 7  # raise this when a view or macro changes, so that older catalogs are rebuilt

RUN_COLUMNS = {
    "run": "VARCHAR",
    "created": "DOUBLE",
    "attempts": "JSON",
    "model": "VARCHAR",
    "task": "VARCHAR",
    "weighting": "VARCHAR",
    "seed": "BIGINT",
    "comparison": "VARCHAR",
    "warmup_steps": "BIGINT",
    "config": "JSON",
    "environment": "JSON",
}
BEAT_COLUMNS = {
    "run": "VARCHAR",
    "rank": "SMALLINT",
    "attempt": "SMALLINT",
    "status": "VARCHAR",
    "pid": "BIGINT",
    "host": "VARCHAR",
    "ts": "DOUBLE",
    "started": "DOUBLE",
    "acknowledged": "BIGINT",
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

RUNS_COLUMNS = {
    "run": "VARCHAR",
    "status": "VARCHAR",
    **{name: kind for name, kind in RUN_COLUMNS.items() if name != "run"},
    "attempt": "BIGINT",
    "acknowledged": "BIGINT",
    "last_step_ts": "DOUBLE",
    "tokens_dropped": "BIGINT",
    "bytes": "BIGINT",
    "ranks": "BIGINT",
    "lost_steps": "BIGINT",
    "busy": "VARCHAR",
}

# The status of a rank as far as SQL can tell. SQL sees no locks, so a killed process shows only once its heartbeat is
# old. Whether steps still come is judged at the time of the heartbeat, by the writer's own clock.
_RANK_STATUS = f"""CASE
    WHEN status <> 'running' THEN status
    WHEN epoch(now()) - ts > {DEAD_AFTER_S} THEN 'crashed'
    WHEN busy IS NOT NULL THEN 'running'
    WHEN last_step_ts IS NULL AND ts - greatest(started, active_ts) > {FIRST_STEP_S} THEN 'stalled'
    WHEN last_step_ts IS NOT NULL AND ts - greatest(last_step_ts, active_ts) >
        CASE WHEN median_step_s IS NULL THEN {FIRST_STEP_S}
        ELSE greatest({STALL_MIN_S}, {STALL_STEPS} * median_step_s) END THEN 'stalled'
    ELSE 'running' END"""

_RUNS_VIEW = f"""CREATE OR REPLACE VIEW runs AS
SELECT run, coalesce(b.status, 'crashed') AS status, r.* EXCLUDE (run), b.* EXCLUDE (run, status)
FROM run_files r FULL JOIN (
    SELECT run, {list(STATUS_ORDER)!r}[min(list_position({list(STATUS_ORDER)!r}, {_RANK_STATUS}))] AS status,
        max(attempt) AS attempt, max(acknowledged) AS acknowledged, max(last_step_ts) AS last_step_ts,
        sum(tokens_dropped)::BIGINT AS tokens_dropped, sum(bytes)::BIGINT AS bytes,
        count(*) AS ranks, coalesce(sum(lost_steps), 0)::BIGINT AS lost_steps, any_value(busy) AS busy
    FROM heartbeats WHERE (run, attempt) IN (SELECT run, max(attempt) FROM heartbeats GROUP BY run) GROUP BY run
) b USING (run)"""


# Views show one line of history: of each attempt, the committed steps below the first step of any later attempt. Steps
# of an earlier attempt beyond the point where a later one resumed stay in TABLE_all only.
def steps_query(steps: str = "steps_all") -> str:
    """A query for the rows of `steps` that lie on the line of history. steps: a relation with all rows of some runs."""
    return (
        f"SELECT s.* FROM {steps} s JOIN (SELECT run, attempt, min(first) OVER (PARTITION BY run ORDER BY attempt "
        "ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS left_at FROM (SELECT run, attempt, min(step) AS first "
        f"FROM {steps} GROUP BY run, attempt)) l ON s.run = l.run AND s.attempt = l.attempt "
        "WHERE l.left_at IS NULL OR s.step < l.left_at"
    )


def commits_query(steps: str = "steps_all") -> str:
    """A query for the (run, step, rank, attempt) that count, from the same.

    The rows of `steps` are few once equal ones are one, and a condition on `run` is one on them too.
    """
    return (
        "SELECT run, step, rank, attempt FROM (SELECT run, step, rank, attempt, min(step) OVER (PARTITION BY run "
        "ORDER BY attempt RANGE BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING) AS left_at FROM "
        f"(SELECT DISTINCT run, step, rank, attempt FROM {steps})) WHERE left_at IS NULL OR step < left_at"
    )


# The run of a segment's path, which ends in RUN/data/TABLE/g8/NAME, or in RUN/data/TABLE/NAME. A copy that a user
# keeps in another folder there so belongs to no run. DuckDB computes this once for 2,048 rows with one path; it would
# not if it were a CASE or split_part, which is one, and queries on all tokens would take twice as long.
RUN_OF_FILE = r"regexp_extract(filename, '([^/]+)/data(\.g[0-9]+)?/[^/]+/(g[0-9]+/)?[^/]+$', 1)"


def segments_query(table: str, sources: Sequence[str]) -> str:
    """A query that reads segments: `sources` are SQL expressions, each a path or a list of paths.

    Beside the table's columns it has `file`, the path. All files must have the table's columns. The first file must
    have the newest types, where these changed between schemas. A run is named by its folder, so that a copied or
    renamed run folder is a run of its own.
    """
    columns = {
        name: f'"{name}"::{kind}' if name in FORMER_TYPES else f'"{name}"' for name, kind in TABLES[table].items()
    }
    columns["run"] = RUN_OF_FILE
    selected = ", ".join(f'{column} AS "{name}"' for name, column in columns.items())
    reads = [f"read_parquet({source}, hive_partitioning = false, filename = true)" for source in sources]
    rows = (f"SELECT {selected}, filename AS file FROM {read}" for read in reads)
    return " UNION ALL ".join(rows) or no_rows(TABLES[table] | {"file": "VARCHAR"})


def no_rows(columns: Mapping[str, str]) -> str:
    """A query without rows that has the given columns."""
    return "SELECT " + ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in columns.items()) + " WHERE false"


def view_statements(root: str) -> list[str]:
    """The SQL of the views and macros that stand on run_files, heartbeats, edges and every TABLE_segments.

    root: what the paths of segments begin with.
    """
    made = [f"CREATE OR REPLACE VIEW {table}_all AS SELECT * EXCLUDE (file) FROM {table}_segments" for table in TABLES]
    made.append(f"CREATE OR REPLACE VIEW commits AS {commits_query()}")
    for table in TABLES:
        # Events belong to a run, not to a step, so those of replaced attempts stay visible.
        # An inner join, because only through such a one is a condition on `run` also one on the other side.
        replaced = "" if table == "events" else " JOIN commits USING (run, step, rank, attempt)"
        query = steps_query() if table == "steps" else f"SELECT t.* FROM {table}_all t{replaced}"
        made.append(f"CREATE OR REPLACE VIEW {table} AS {query}")
    return made + macro_statements(root)


def create_edges(con: duckdb.DuckDBPyConnection) -> None:
    """Make the table of the histograms' cells."""
    con.execute("CREATE OR REPLACE TABLE edges (edges_id VARCHAR, lows DOUBLE[], highs DOUBLE[])")
    for edges_id in EDGES_IDS:
        lows, highs = cell_bounds(edges_id)
        con.execute("INSERT INTO edges VALUES (?, ?, ?)", [edges_id, lows.tolist(), highs.tolist()])


def _json_query(glob: str, name: str, columns: Mapping[str, str]) -> str:
    """A query for fields of runs' JSON files. A file without a JSON object has no row; wrong types become NULL."""
    fields = ", ".join(
        f"try_cast(content->>'$.{column}' AS {kind}) AS {column}" for column, kind in columns.items() if column != "run"
    )
    text = f"SELECT filename, try(decode(content)) AS content FROM read_blob({quote(glob)})"
    named = f"regexp_full_match(filename, '.*/runs/[^/_.][^/]*/{name}')"
    return (
        f"SELECT split_part(filename, '/', -2) AS run, {fields} FROM (SELECT filename, CASE WHEN json_valid(content) "
        f"THEN content::JSON END AS content FROM ({text})) WHERE json_type(content) = 'OBJECT' AND {named}"
    )


def catalog_statements(store: Path) -> list[str]:
    """The SQL that makes every view and macro of store.duckdb but the table `edges`, in order."""
    runs = f"{escape_glob(str(store))}/runs"
    beats = _json_query(f"{runs}/*/heartbeat-r*.json", "heartbeat-r[0-9]+(-a[0-9]+)?[.]json", BEAT_COLUMNS)
    newest = "QUALIFY row_number() OVER (PARTITION BY run, rank ORDER BY attempt DESC, ts DESC) = 1"
    made = [
        f"CREATE OR REPLACE TABLE store_info AS SELECT {quote(str(store))} AS root, "
        f"{SCHEMA_VERSION} AS schema_version, {_CATALOG_VERSION} AS catalog_version",
        f"CREATE OR REPLACE VIEW run_files AS {_json_query(f'{runs}/*/run.json', 'run[.]json', RUN_COLUMNS)}",
        f"CREATE OR REPLACE VIEW heartbeats AS {beats} {newest}",
        _RUNS_VIEW,
    ]
    for table in TABLES:
        # The seed comes first, because the view takes its types. The other glob matches only names of segments.
        seed = f"{runs}/{SEED_RUN}/data/{table}/a000-r000-s{SCHEMA_VERSION:08d}-*.parquet"
        # `**` follows no links, which is why a replaced generation is not seen (monitor/store/compact.py).
        named = f"{runs}/*/data/{table}/**/a[0-9]*-r[0-9]*-s[0-9]*-[0-9]*-{'[0-9a-f]' * 8}.parquet"
        source = f"[{quote(seed)}, {quote(named)}]"
        made.append(f"CREATE OR REPLACE VIEW {table}_segments AS {segments_query(table, [source])}")
    return made + view_statements(str(store)) + comment_statements()


def _build(con: duckdb.DuckDBPyConnection, store: Path) -> None:
    create_edges(con)
    for statement in catalog_statements(store):
        con.execute(statement)


def ensure_catalog(store: Path) -> Path:
    """The path of an up-to-date store.duckdb, built anew if missing, moved or of an older version.

    `store` must be absolute. Readers that have the old file open keep it; later ones open the new one. Raises OSError.
    """
    path = store / CATALOG
    write_seeds(store)
    if not _is_current(path, store):
        tmp = store / f"{CATALOG}.{os.getpid()}-{time.monotonic_ns()}.tmp"
        try:
            with memory_connection() as con:
                con.execute(f"ATTACH {quote(str(tmp))} AS catalog_file (STORAGE_VERSION '{FORMAT}')")
                con.execute("USE catalog_file")
                _build(con, store)
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
