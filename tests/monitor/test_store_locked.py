"""A locked store answers plain SELECTs on its views, writes nothing, reads nothing else, and always ends in time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from store_data import N_TOKENS, record_run

from monitor.errors import StoreError
from monitor.store.locked import Limits, LockedSession
from monitor.store.reader import Store, open_store
from monitor.store.runs import get_run

SMALL = Limits(seconds=1, memory_mb=200, rows=1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("locked")
    record_run(path / "store", "a", range(1, 4))
    (path / "outside.txt").write_text("secret")
    (path / "store" / "runs" / "a" / "table.csv").write_text("x\n1\n")
    return path


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Store]:
    with open_store(folder / "store", locked=True, limits=SMALL) as store:
        yield store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITES = [
    "COPY (SELECT 1) TO 'STORE/x.csv'",
    "WITH x AS (COPY (SELECT 1) TO 'STORE/runs/a/run.json' (FORMAT csv)) SELECT * FROM x",
    "WITH x AS (COPY (SELECT 1 AS a) TO 'SEGMENT' (FORMAT parquet)) SELECT * FROM x",
    "SELECT * FROM (WITH x AS (COPY (SELECT 1) TO 'STORE/runs/a/new.csv') SELECT * FROM x)",
    "WITH x AS (DELETE FROM edges RETURNING *) SELECT * FROM x",
    "WITH x AS (INSERT INTO edges VALUES ('x', [], []) RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE edges SET edges_id = 'x' RETURNING *) SELECT * FROM x",
    "WITH RECURSIVE x AS (DELETE FROM runs RETURNING run) SELECT * FROM x",
    "DROP VIEW steps",
    "CREATE TABLE t AS SELECT 1",
    "CREATE MACRO read(p) AS TABLE SELECT * FROM read_text(p)",
    "EXPORT DATABASE 'STORE/dump'",
]
READS = [
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_text('STORE/../outside.txt')",
    "SELECT * FROM read_blob('STORE/runs/a/run.json')",
    "SELECT * FROM read_csv('/etc/pass*')",
    "SELECT * FROM read_parquet('SEGMENT')",
    "SELECT * FROM parquet_metadata('SEGMENT')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM sniff_csv('STORE/runs/a/table.csv')",
    "FROM '/etc/passwd'",
    "FROM 'STORE/runs/a/table.csv'",
    'SELECT * FROM "STORE/runs/a/table.csv"',
    """WITH "STORE/runs/a/table.csv" AS (SELECT 1) FROM 'STORE/runs/a/table.csv'""",
    "SELECT getenv('HOME')",
    "SELECT 'HOME'.getenv()",
    "SELECT current_setting('secret_directory')",
    "SELECT getvariable('x')",
    "SELECT system.main.getvariable('x')",
    "FROM duckdb_secrets()",
    "FROM duckdb_settings()",
    "FROM duckdb_functions()",
    "FROM query('SELECT 1')",
    "FROM query_table('steps')",
    "FROM query_table(['/etc/passwd'])",
    "FROM histogram('/etc/passwd', x)",
    "FROM information_schema.tables",
    "FROM system.main.duckdb_views",
    "FROM sqlite_master",
    "FROM json_execute_serialized_sql('{}')",
    "SELECT nextval('x')",
    "SELECT write_log('x')",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM steps WHERE step IN (SELECT size FROM read_blob('/etc/passwd'))",
    "SELECT [content FOR content IN (SELECT list(content) FROM read_text('/etc/passwd'))]",
    "SELECT 1 /* a comment */ FROM /* another */ read_text('/etc/passwd')",
    "SELECT 1 ORDER BY (SELECT count(*) FROM glob('/*'))",
    "SELECT 1 LIMIT (SELECT count(*) FROM glob('/*'))",
    "SELECT count(*) FILTER (EXISTS (FROM glob('/*'))) FROM steps",
    "SELECT sum(step) OVER (ORDER BY (SELECT count(*) FROM glob('/*'))) FROM steps",
    "FROM (PIVOT (FROM glob('/*')) ON file IN ('/etc') USING count(*))",
    "DESCRIBE SELECT * FROM read_text('/etc/passwd')",
    "SUMMARIZE '/etc/passwd'",
    "SHOW ALL TABLES",
    "SHOW DATABASES",
]
STATEMENTS = [
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY (SELECT 1) TO 'STORE/x.csv'",
    "SET threads = 1",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "ATTACH 'STORE/other.duckdb'",
    "ATTACH 'STORE/store.duckdb' AS s",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL range(3)",
    "CALL force_checkpoint()",
    "PREPARE p AS SELECT * FROM read_text('/etc/passwd')",
    "EXECUTE p",
    "EXPLAIN ANALYZE SELECT 1",
    "SET VARIABLE x = 1",
    "USE system",
    "CHECKPOINT",
    "",
    "-- nothing",
]


@pytest.mark.parametrize("query", WRITES + READS + STATEMENTS)
def test_what_is_no_plain_select_on_the_views_is_refused(folder: Path, locked: Store, query: str) -> None:
    segment = next((folder / "store" / "runs/a/data/tokens/g0").glob("*.parquet"))
    before = contents(folder)
    edges = locked.sql("SELECT count(*) FROM edges").rows
    with pytest.raises((StoreError, duckdb.Error)):
        locked.sql(query.replace("STORE", str(folder / "store")).replace("SEGMENT", str(segment)))
    assert contents(folder) == before
    assert locked.sql("SELECT count(*) FROM edges").rows == edges
    assert locked.sql("SELECT count(*) FROM tokens").rows == [(3 * N_TOKENS,)]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("WITH t AS (FROM steps) SELECT max(step) FROM t", [(3,)]),
        ("SELECT run, status FROM runs", [("a", "finished")]),
        ("SELECT count(*) FROM heartbeats, run_files, commits", [(3,)]),
        ("SELECT step, round(value, 2) FROM series('reward') ORDER BY step LIMIT 1", [(1, 0.01)]),
        ("SELECT hist_quantile([0, 2], 'alive', 0.5, 1, 1) IS NOT NULL FROM range(1)", [(True,)]),
        ("SELECT count(*) FROM (DESCRIBE steps)", [(7,)]),
        ("SELECT a FROM (VALUES (1), (2)) v(a) EXCEPT SELECT 2", [(1,)]),
        ("SELECT CASE WHEN true THEN {'a': [1, 2]}.a[1] END, 'ab' LIKE 'a%', 1 BETWEEN 0 AND 2", [(1, True, True)]),
        ("SELECT [x + 1 FOR x IN range(3) IF x > 0], list_transform([1], lambda x: x * 2)", [([2, 3], [2])]),
        ("SELECT count(*) FROM steps a JOIN steps b USING (run, step, name) WHERE a.step = ?", [(5,)]),
        ("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 5) SELECT sum(n) FROM t", [(15,)]),
        ("SELECT row_number() OVER (ORDER BY step) FROM steps QUALIFY row_number() OVER (ORDER BY step) = 1", [(1,)]),
        (
            "FROM (PIVOT (SELECT step, name FROM steps WHERE step = 1) ON name IN ('reward') USING count(*))",
            [(1, 1)],
        ),
        ("SELECT config->>'$.x', cast('2020-01-01' AS DATE) - INTERVAL 1 DAY < now() FROM runs", [(None, True)]),
        ("SELECT count(*) FROM steps TABLESAMPLE 100 PERCENT", [(15,)]),
        ("SELECT COLUMNS('st.*') FROM (SELECT step FROM steps ORDER BY ALL LIMIT 1)", [(1,)]),
    ],
)
def test_plain_selects_are_answered(locked: Store, query: str, rows: list) -> None:
    assert locked.sql(query, [2] if "?" in query else []).rows == rows


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM t) SELECT count(*) FROM t",
        "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT 1 FROM t) SELECT * FROM t",
        "SELECT length(repeat('x', 1000000000))",
        "SELECT repeat('x', 100000000) FROM range(100)",
        "SELECT count(*) FROM range(1000000000000)",
        "SELECT sum(a.step * b.step * c.step) FROM tokens a, tokens b, tokens c, tokens d",
        "SELECT range(1000000000)",
        "SELECT len(range(100000000))",
        "SELECT list(range) FROM range(10000000000)",
        "SELECT string_agg(range::VARCHAR) FROM range(10000000000)",
        "SELECT length(format('{:1000000000}', 1))",
        "SELECT regexp_matches(repeat('a', 100000000), '(a|aa)+$')",
        "SELECT levenshtein(repeat('a', 300000), repeat('b', 300000))",
        "SELECT * FROM range(100000000) ORDER BY random()",
        "SELECT reservoir_quantile(range, 0.5, 2000000000) FROM range(10)",  # DuckDB refuses every query after it
    ],
)
def test_endless_queries_end_within_the_limits(locked: Store, query: str) -> None:
    started = time.monotonic()
    with pytest.raises(StoreError, match="the most a locked store gives"):
        locked.sql(query)
    assert time.monotonic() - started < 60  # the limits are of a second; the queries alone take minutes
    assert locked.sql("SELECT max(step) FROM steps").rows == [(3,)]


def test_too_many_rows_are_refused_with_the_limit(locked: Store) -> None:
    assert len(locked.sql("SELECT * FROM range(1000)")) == 1000
    with pytest.raises(StoreError, match="more than 1,000 rows"):
        locked.sql("SELECT * FROM range(1001)")


def test_nested_text_is_refused_and_faulty_text_named(locked: Store) -> None:
    with pytest.raises((StoreError, duckdb.Error)):
        locked.sql("SELECT " + "(" * 5000 + "1" + ")" * 5000)
    with pytest.raises((StoreError, duckdb.Error)):
        locked.sql("SELECT " + "1+" * 900 + "1")
    with pytest.raises(duckdb.BinderException, match="nothing_here"):
        locked.sql("SELECT nothing_here FROM steps")
    with pytest.raises(StoreError, match=r"no table 'other'\. It has .*steps"):
        locked.sql("FROM other")


def test_damage_is_left_out_and_new_steps_are_seen(tmp_path: Path) -> None:
    record_run(tmp_path, "a", range(1, 3))
    with open_store(tmp_path, locked=True) as store:
        assert store.sql("SELECT count(*) FROM tokens").rows == [(2 * N_TOKENS,)]
        record_run(tmp_path, "b", range(1, 3))
        path = next((tmp_path / "runs/b/data/samples/g0").glob("*.parquet"))
        os.truncate(path, 100)
        assert store.sql("SELECT count(*) FROM tokens").rows == [(4 * N_TOKENS,)]
        assert store.unreadable() == []
        assert store.sql("SELECT count(*) > 0 FROM samples WHERE run = 'a'").rows == [(True,)]
        assert [one.path.name for one in store.unreadable()] == [path.name]


def test_threads_share_a_locked_store(folder: Path, locked: Store) -> None:
    got: list[object] = []

    def ask(step: int) -> None:
        got.append(locked.sql("SELECT DISTINCT step FROM steps WHERE step = ?", [step]).rows)

    threads = [threading.Thread(target=ask, args=(step,)) for step in (1, 2, 3) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted([[(step,)] for step in (1, 2, 3)] * 3)  # type: ignore[type-var]


def test_the_process_behind_bars_cannot_write_and_ends_with_its_asker(folder: Path) -> None:
    code = (
        "import os\nfrom monitor.store.locked import _forbid_writes\n"
        "try:\n    _forbid_writes()\nexcept OSError:\n    print('no Landlock'); raise SystemExit\n"
        "for path in (PATH, PATH + '.new'):\n"
        "    try:\n        open(path, 'w')\n        print('written')\n"
        "    except OSError:\n        print('refused')\n"
        "print(open(PATH).read())"
    ).replace("PATH", repr(str(folder / "outside.txt")))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if out == ["no", "Landlock"]:
        pytest.skip("this kernel has no Landlock")
    assert out == ["refused", "refused", "secret"]
    session = LockedSession(folder / "store", SMALL)
    assert session.run("SELECT 1 AS one", []).to_pylist() == [{"one": 1}]
    process = session._process
    assert process is not None and process.poll() is None
    session.close()
    assert process.poll() is not None


def test_a_module_of_the_working_folder_is_not_taken(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "monitor.py").write_text("raise SystemExit('wrong monitor')")
    (tmp_path / "duckdb.py").write_text("raise SystemExit('wrong duckdb')")
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with open_store(folder / "store", locked=True) as store:
            assert store.sql("SELECT count(*) FROM runs").rows == [(1,)]
    finally:
        os.chdir(before)
    assert get_run(folder / "store", "a").status == "finished"
