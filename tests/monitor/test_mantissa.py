"""Raw tokens with a rounded mantissa: the bound of the error, what stays exact, and that a run says so."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from store_data import samples, step_record, tokens

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo, TokenTable
from monitor.store.compact import compact_run
from monitor.store.reader import open_store
from monitor.store.rows import ROUNDED, round_mantissa, token_rows

LARGEST, SMALLEST = np.finfo(np.float32).max, np.finfo(np.float32).smallest_normal


def by_definition(values: np.ndarray, bits: int) -> np.ndarray:
    """In float64: m 2^e with 1/2 <= |m| < 1 becomes rint(m 2^(bits + 1)) 2^(e - bits - 1); rint takes ties to even."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)


def test_one_bit_of_mantissa_leaves_1_and_1_5_times_powers_of_two() -> None:
    given = [1.0, 1.2, 1.25, 1.3, 1.75, -1.3, 0.0, -0.0, 3.2]
    # 1.25 lies between 1.0 (mantissa 0) and 1.5 (mantissa 1), 1.75 between 1.5 and 2.0 (mantissa 0): even ones win
    assert round_mantissa(np.array(given, np.float32), 1).tolist() == [1.0, 1.0, 1.0, 1.5, 2.0, -1.5, 0.0, 0.0, 3.0]


def test_what_the_bound_could_not_be_kept_for_stays_as_it_is() -> None:
    given = np.array([np.inf, -np.inf, np.nan, LARGEST, -LARGEST, SMALLEST / 3, -1e-45, SMALLEST], np.float32)
    np.testing.assert_array_equal(round_mantissa(given, 7).view(np.uint32), given.view(np.uint32))


@pytest.mark.parametrize("bits", range(1, 23))
def test_the_rounded_number_is_the_nearest_one_and_off_by_at_most_half_of_the_last_bit(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = (rng.choice([-1.0, 1.0], 20_000) * np.exp2(rng.uniform(-125, 127, 20_000))).astype(np.float32)
    values[:100] = (1 + (2 * np.arange(100) + 1) * 2.0 ** -(bits + 1)).astype(np.float32)  # ties
    rounded = round_mantissa(values, bits)
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded.astype(np.float64), by_definition(values, bits))
    error = np.abs(rounded.astype(np.float64) - values) / np.abs(values.astype(np.float64))
    assert error.max() <= 2.0 ** -(bits + 1)
    assert not (rounded.view(np.uint32) & np.uint32((1 << (23 - bits)) - 1)).any()
    np.testing.assert_array_equal(round_mantissa(rounded, bits), rounded)
    ordered = round_mantissa(np.sort(values), bits)
    assert (np.diff(ordered) >= 0).all()


def test_rows_without_a_value_stay_without_and_the_caller_s_arrays_stay_exact() -> None:
    table = replace(tokens(1), renyi2=[None, *([0.1] * 199)])
    entropy = table.entropy.copy()
    rows = token_rows(1, table, 7)
    # 0.1 = 1.6 2^-4, and 1.6 2^7 = 204.8: the nearest with 7 bits is 205 2^-11
    assert rows["renyi2"].to_pylist() == [None, *([205 / 2048] * 199)]
    np.testing.assert_array_equal(table.entropy, entropy)
    assert rows.schema == token_rows(1, table).schema


def record(store: Path, run: str, mantissa_bits: int | None) -> None:
    with Recorder(store, RunInfo(run), flush_s=0.0, mantissa_bits=mantissa_bits) as recorder:
        for step in range(1, 6):
            recorder.record(replace(step_record(step), ts=float(step)), tokens(step), samples(step))
            assert recorder.flush()


def test_only_four_columns_of_raw_tokens_are_rounded_also_once_they_are_merged(tmp_path: Path) -> None:
    record(tmp_path, "exact", None)
    record(tmp_path, "rounded", 7)
    compact_run(tmp_path, "rounded", grace_s=0.0)
    with open_store(tmp_path) as store:
        tables = {"steps": "name NOT LIKE 'perf/%'", "histograms": "true", "samples": "true"}
        for table, of_policy in tables.items():
            query = f"SELECT * EXCLUDE (run) FROM {table} WHERE {of_policy} AND run = ? ORDER BY ALL"
            exact, rounded = (store.sql(query, [run]) for run in ("exact", "rounded"))
            assert len(exact) and exact.arrow.equals(rounded.arrow)
        for step in range(1, 6):
            frame = store.sql(f"FROM tokens_at('rounded', {step}) ORDER BY sample, position").frame()
            for spec in fields(TokenTable):
                given = getattr(tokens(step), spec.name)
                wanted = round_mantissa(given, 7) if spec.name in ROUNDED else given
                np.testing.assert_array_equal(frame[spec.name], wanted, err_msg=spec.name)
    assert "weight" not in ROUNDED


def test_the_run_says_that_its_tokens_are_rounded(tmp_path: Path) -> None:
    record(tmp_path, "exact", None)
    record(tmp_path, "rounded", 7)
    marks = {
        run: json.loads((tmp_path / f"runs/{run}/run.json").read_text())["attempts"] for run in ("exact", "rounded")
    }
    assert [mark.get("mantissa_bits") for mark in marks["exact"]] == [None]
    assert [mark.get("mantissa_bits") for mark in marks["rounded"]] == [7]
    with open_store(tmp_path) as store:
        told = store.sql("SELECT run, message FROM events WHERE kind = 'tokens_rounded'").rows
    assert told == [("rounded", "Raw tokens keep 7 bits of mantissa: a value is off by at most 2^-8 of itself.")]


@pytest.mark.parametrize("bits", [0, 23, -1])
def test_other_numbers_of_bits_are_refused(tmp_path: Path, bits: int) -> None:
    message = f"mantissa_bits is {bits}, expected 1 to 22 of the 23 bits of a float32's mantissa."
    with pytest.raises(StoreError, match=message):
        Recorder(tmp_path, RunInfo("a"), mantissa_bits=bits)
    assert not (tmp_path / "runs").exists()
