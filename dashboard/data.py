"""All cached reads of the dashboard. A frame is cached until the version of a run that it shows changes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import numpy as np
import streamlit as st

from dashboard.alert_rows import AlertHistory, PastAlert
from dashboard.data_path import ALERTS_VARIABLE, STORE_VARIABLE
from dashboard.overview_rows import OverviewRows, Sender, Sent, flat, group_keys
from dashboard.shown_arms import Arm, by_seed
from monitor.alerts.marks import Marks, read_marks
from monitor.alerts.outlook import window_of
from monitor.alerts.window import Window
from monitor.metrics import metric
from monitor.queries import alerts, differences, distributions, frames, rollouts, series
from monitor.queries.followed import Followed, Past
from monitor.queries.frames import Frame
from monitor.stats.comparison import live_comparison, paired_comparison
from monitor.store.reader import Store, open_store
from monitor.store.tail import RunEntry, Tail

VIEWS = ("runs", "steps", "histograms", "tokens", "samples", "alerts", "events", "edges", "heartbeats")
T = TypeVar("T")


def store_path() -> Path:
    """The store that this server shows; chosen at its start, never by the URL."""
    return _resolved(os.environ.get(STORE_VARIABLE, "runs"))


@cache
def _resolved(store: str) -> Path:
    return Path(store).expanduser().resolve()


@st.cache_resource(show_spinner=False)
def _tail(store: str) -> Tail:
    return Tail(store, histograms=False)


def tail() -> Tail:
    return _tail(str(store_path()))


def poll() -> int:
    """Reads what is new; the version changes only when data did."""
    return tail().poll()


def runs() -> list[RunEntry]:
    """Every run: the running ones first, then the others, each newest first."""
    entries = tail().runs.values()
    return sorted(entries, key=lambda e: (e.status != "running", -float(e.info.get("created") or 0), e.name))


def run(name: str) -> RunEntry | None:
    return tail().runs.get(name)


@st.cache_resource(show_spinner=False)
def _overview(identity: int, _of: Tail) -> tuple[OverviewRows, Sender]:
    return OverviewRows(_of), Sender()


def overview_rows() -> dict[str, dict[str, Any]]:
    """{run: row} of the Overview. What did not change is not read again."""
    return _overview(id(tail()), tail())[0].read()


def overview_sent(rows: dict[str, dict[str, Any]], group: str) -> Sent:
    """What the browser needs of the rows, with each run's value of the option `group`."""
    sender = _overview(id(tail()), tail())[1]
    return sender.send(rows, group, lambda run: _flat_config(run).get(group, ""))


def _flat_config(name: str) -> dict[str, str]:
    entry = run(name)
    return flat(dict(entry.info.get("config") or {})) if entry else {}


def group_options() -> list[str]:
    """The configuration options in which the store's runs differ."""
    described = tuple((entry.name, entry.info_state) for entry in tail().runs.values())
    return _cached(
        str(store_path()), (), "group_options", described,
        lambda: group_keys({name: _flat_config(name) for name, _ in described}),
    )  # fmt: skip


@st.cache_resource(show_spinner=False)
def _history(identity: int, _of: Tail) -> AlertHistory:
    return AlertHistory(_of)


def alert_history() -> list[tuple[PastAlert, Marks]]:
    """Every alert that fired in any run, with the marks of its run."""
    return _history(id(tail()), tail()).read()


def alerts_file() -> str:
    """The alerts file that this server was started with; "" without one. Like the store, never chosen by the URL."""
    return os.environ.get(ALERTS_VARIABLE, "")


@st.cache_resource(show_spinner=False, on_release=Store.close)
def _locked(store: str) -> Store:
    return open_store(store, locked=True)


def locked_store() -> Store:
    """The connection for queries that readers type. Its process starts with the first query."""
    return _locked(str(store_path()))


@st.cache_resource(show_spinner=False)
def _views(store: str) -> dict[str, list[str]]:
    return {view: [str(row[0]) for row in _locked(store).sql(f"DESCRIBE {view}").rows] for view in VIEWS}


def views() -> dict[str, list[str]]:
    """The views that a query can read, each with its columns."""
    return _views(str(store_path()))


@st.cache_resource(max_entries=400, show_spinner=False)
def _cached(store: str, versions: tuple[int, ...], question: str, arguments: tuple, _ask: Callable[[], Any]) -> Any:
    return _ask()


def _ask(question: Callable[..., T], shown: Sequence[str], *arguments: Any) -> T:
    """`question(cursor, *arguments)`, remembered until one of the `shown` runs changes."""
    source = tail()
    return _cached(
        str(source.store), source.run_version(*shown), question.__name__, arguments,
        lambda: question(source.cursor(), *arguments),
    )  # fmt: skip


def scalars(names: Sequence[str], keys: Sequence[str]) -> Frame:
    return _ask(series.scalar_series, names, tuple(names), tuple(keys))


def transitions(name: str) -> Frame:
    return alerts.alert_transitions(_past(name, _ask(alerts.alert_log, (name,), (name,))))


def marks(name: str) -> Marks:
    """What people said of a run's alerts: read anew each time, because no version of the run changes with it."""
    return read_marks(store_path(), name)


def verdicts(name: str) -> Frame:
    return _ask(alerts.verdicts, (name,), (name,), until(name))


def actions(name: str) -> Frame:
    return _past(name, _ask(alerts.actions, (name,), (name,)))


def milestones(name: str) -> Frame:
    """step, what, message of the checkpoints, resumes and evaluations of a run, by step."""
    found = _past(name, _ask(alerts.milestones, (name,), name))
    source = followed(name)
    told = dict[int, list[str]]()
    for key in source.keys:
        if key.startswith("eval/") and key.endswith("/pass@1"):
            label = metric(key).label
            for step, value in zip(*source.series(key), strict=True):
                told.setdefault(int(step), []).append(f"{label}: {value:.1%}")
    rows = [*zip(found["step"], found["what"], found["message"], strict=True)]
    rows += [(step, "evaluation", ", ".join(texts)) for step, texts in told.items()]
    rows.sort(key=lambda row: (row[0], row[1]))
    return {
        "step": np.array([int(row[0]) for row in rows], np.int64),
        "what": np.array([str(row[1]) for row in rows], object),
        "message": np.array([str(row[2]) for row in rows], object),
    }


def events(name: str) -> Frame:
    return _past(name, _ask(alerts.events, (name,), (name,)))


@st.cache_resource(show_spinner=False)
def _all_followed(store: str) -> dict[str, tuple[Followed, list[int]]]:
    return {}


def show_until(name: str, step: int | None) -> None:
    """Lets this reader see the run as it stood after `step`: nothing later is in any answer. None: all of it."""
    st.session_state["until"] = (name, step)


def until(name: str) -> int | None:
    """The last step of a run that this reader is to see; None: the newest."""
    of, step = st.session_state.get("until", ("", None))
    return step if of == name else None


def _past(name: str, rows: Frame) -> Frame:
    """The rows up to the last step that this reader is to see; those of no step are of no known time, and left out."""
    last = until(name)
    return rows if last is None else frames.select(rows, rows["step"] <= last)


def followed(name: str) -> Followed | Past:
    """All scalars of a run, and its histograms when asked for; a look costs what is new since the last one."""
    last = until(name)
    return whole(name) if last is None else Past(whole(name), last)


def whole(name: str) -> Followed:
    """`followed`, whatever the reader is to see."""
    source, entry = tail(), run(name)
    found, looked = _all_followed(str(source.store)).setdefault(name, (Followed(name), []))
    if entry is not None and looked != [entry.version]:
        version = entry.version
        found.look(source.cursor(), entry.basis)
        looked[:] = [version]
    return found


SPENT_SERIES = {"tokens": ("tokens", 1.0), "hours": ("perf/step_s", 1 / 3600)}  # what a step spends, and its unit


def spent(name: str, what: str, at: np.ndarray) -> np.ndarray:
    """How many response tokens, or hours of training, a run had spent after each of the steps `at`."""
    series, unit = SPENT_SERIES[what]
    steps, values = followed(name).series(series)
    total = np.cumsum(np.concatenate([[0.0], np.nan_to_num(values)])) * unit
    return total[np.searchsorted(steps, at, side="right")]


def step_at(name: str, what: str, at: float) -> int:
    """The first step after which a run had spent `at` or more; its newest where it never had."""
    steps, _ = followed(name).series(SPENT_SERIES[what][0])
    found = int(np.searchsorted(spent(name, what, steps), at * (1 - 1e-6)))  # the browser has it in float32
    return int(steps[min(found, len(steps) - 1)]) if len(steps) else 0


def counts_of(name: str, metric: str, split: str = "all") -> Frame:
    """step, counts [S, cells], n, sum, min, max, edges_id of every step of a run."""
    tail().want_histograms(name, metric)
    return followed(name).counts(tail().cursor(), metric, split)


def new_columns(name: str, metric: str, after: int, most: int) -> Frame:
    """`counts_of` the steps later than `after`, in columns about as wide as those of all steps in at most `most`."""
    tail().want_histograms(name, metric)
    question = f"{distributions.HISTOGRAMS} AND step > ? ORDER BY step"
    rows = distributions.summed(_past(name, frames.frame(tail().cursor(), question, [name, metric, "all", after])))
    width = max(1, math.ceil(newest_step(name) / most))
    return distributions.pooled(rows, math.ceil(len(rows["step"]) / width))


def urgent(name: str) -> object:
    """What changes where something else than further steps came: a run, a status, an alert or an event of this run."""
    runs, entry = tail().runs, run(name)
    others = tuple((one.name, one.status, one.info_state) for one in runs.values())
    shown = until(name) is not None and (frames.n_rows(transitions(name)), frames.n_rows(actions(name)))
    return others, history(name), entry and entry.stamps[1:3], shown


def history(name: str) -> tuple[int, int]:
    """What changes where the steps that a run had may be others now: rows were taken back, or a new attempt began."""
    entry = run(name)
    attempts = [int(beat.get("attempt", 0)) for beat in entry.heartbeats] if entry else []
    return (entry.basis if entry else 0), max(attempts, default=0)


def window(name: str, keys: Sequence[str]) -> Window:
    """The series of a run as the alert rules see them: the newest values, how they began, and their best."""
    entry, source = run(name), followed(name)
    warmup_steps = differences.setting(entry and entry.info, "warmup_steps", int) or 0
    return window_of({key: source.series(key) for key in keys}, warmup_steps)


def newest_step(name: str) -> float:
    """The newest committed step of a run; 0 without any."""
    return float(max(0, followed(name).newest_step))


@st.cache_resource(show_spinner=False)
def _lagging(store: str) -> dict[tuple[str, float], tuple[float, int]]:
    return {}


def _lagging_version(name: str, lag_s: float) -> int:
    """A version of a run that changes at most every `lag_s` while it runs: for what need not follow each step."""
    entry, known = run(name), _lagging(str(store_path()))
    if entry is None:
        return -1
    since, version = known.get((name, lag_s), (0.0, -1))
    if version != entry.version and (time.monotonic() - since >= lag_s or entry.status != "running"):
        known[name, lag_s] = (time.monotonic(), entry.version)
    return known[name, lag_s][1]


def is_behind(name: str) -> bool:
    """Whether something that was remembered with a lag is due to be asked for again."""
    entry = run(name)
    known = [(lag_s, *found) for (of, lag_s), found in _lagging(str(store_path())).items() if of == name]
    return entry is not None and any(
        version != entry.version and time.monotonic() - since >= lag_s for lag_s, since, version in known
    )


def remembered(name: str, question: str, arguments: tuple, ask: Callable[[], T], *, lag_s: float = 0.0) -> T:
    """`ask()`, remembered until the run changes; where that is often, for `lag_s` seconds."""
    version = _lagging_version(name, lag_s) if lag_s else tail().run_version(name)[0]
    return _cached(str(store_path()), (version,), question, (name, until(name), *arguments), ask)


def remembered_of(names: Sequence[str], question: str, arguments: tuple, ask: Callable[[], T]) -> T:
    """`ask()`, remembered until one of several runs changes."""
    return _cached(str(store_path()), tail().run_version(*names), question, (tuple(names), *arguments), ask)


def joint(name: str, newest: int) -> np.ndarray:
    """Joint counts of entropy and deviation over the last `newest` steps."""
    since = followed(name).newest_step - newest
    tail().want_histograms(name, "entropy*deviation")
    return distributions.joint_counts(tail().cursor(), name, "entropy*deviation", after=since, until=until(name))


def difference(baseline: Sequence[str], other: Sequence[str], metric: str = "entropy") -> Frame:
    """`difference_of` the distributions of two arms."""

    def ask() -> Frame:
        mine, theirs = ([counts_of(name, metric) for name in arm] for arm in (other, baseline))
        return differences.difference_of(theirs, mine)

    return remembered_of((*baseline, *other), "difference", (tuple(baseline), metric), ask)


def final_figures(names: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    return _ask(differences.final_figures, names, tuple(names), tuple(keys))


def comparison(arms: Sequence[Arm], names: Sequence[str] = ()) -> dict[str, Any] | None:
    """`live_comparison` of the arms, the first of which is the baseline; None where one has two runs of one seed."""
    found = _paired(arms)
    return found and _ask(live_comparison, [run for arm in arms for run in arm.runs], *found, tuple(names))


def can_pair(arms: Sequence[Arm]) -> bool:
    """Whether no arm has two runs of one seed."""
    return _paired(arms) is not None


def comparison_verdicts(arms: Sequence[Arm]) -> dict[str, str] | None:
    """{arm: the sentence about it against the first}; None where an arm has two runs of one seed."""
    found = comparison(arms)
    return None if found is None else found["verdicts"]


def whole_comparison(name: str, arms: Sequence[Arm]) -> dict[str, Any] | None:
    """All that `rlvr compare` would store of the arms; None where an arm has two runs of one seed."""
    found = _paired(arms)
    if found is None:
        return None
    sides, configs, k = found
    return paired_comparison(tail().cursor(), name, sides, configs, k=k)


def _paired(arms: Sequence[Arm]) -> tuple[dict[str, dict[int, str]], dict[str, dict[str, Any]], int] | None:
    """(runs of each arm by seed, their configurations, k of pass@k); None where an arm has two runs of one seed."""
    sides = dict[str, dict[int, str]]()
    for arm in arms:
        of = by_seed([entry for name in arm.runs if (entry := run(name))])
        if of is None:
            return None
        sides[arm.name] = of
    shown = [name for arm in arms for name in arm.runs]
    configs = {name: dict(entry.info.get("config") or {}) for name in shown if (entry := run(name))}
    k = next((k for of in configs.values() if (k := differences.setting(of, "eval.k", int))), 4)
    return sides, configs, k


def partings(arms: Sequence[Arm]) -> list[str]:
    """For each arm but the first, where its runs part from the baseline's runs of equal seed, in words."""
    found = _paired(arms)
    if found is None:
        return []
    base, told = found[0][arms[0].name], list[str]()
    for arm in arms[1:]:
        steps = dict[int, int | None]()
        for seed, other in found[0][arm.name].items():
            if seed in base and base[seed] != other:
                steps[seed] = _ask(differences.first_difference, (base[seed], other), base[seed], other)
        if steps:
            parts = [f"seed {seed}: {'nowhere' if step is None else step}" for seed, step in sorted(steps.items())]
            told.append(f"First step at which {arm.name} and {arms[0].name} differ in entropy, reward or loss: "
                        f"{', '.join(parts)}.")  # fmt: skip
    return told


def sample_steps(name: str) -> np.ndarray:
    """Committed steps whose rollouts are stored."""
    return _up_to(name, _ask(_steps_with, (name,), name, "samples"))


def token_steps(name: str) -> np.ndarray:
    """Committed steps whose raw tokens are stored."""
    return _up_to(name, _ask(_steps_with, (name,), name, "tokens"))


def _up_to(name: str, steps: np.ndarray) -> np.ndarray:
    last = until(name)
    return steps if last is None else steps[steps <= last]


def _steps_with(con: duckdb.DuckDBPyConnection, name: str, table: str) -> np.ndarray:
    committed = frames.frame(con, "SELECT DISTINCT step FROM committed WHERE run = ? ORDER BY step", [name])["step"]
    return committed[np.isin(committed, list(tail().steps_with(name, table)))]


def _of_step(question: Callable[..., Frame], name: str, tables: Sequence[str], step: int, *arguments: Any) -> Frame:
    """Reads the files of one step, and once more if compaction removed them meanwhile."""
    for _ in range(2):
        try:
            files = (tuple(tail().files(name, table, step)) for table in tables)
            return _ask(question, (name,), *files, step, *arguments)
        except duckdb.Error:
            continue
    return {}


def samples(name: str, step: int) -> Frame:
    return _of_step(rollouts.samples_of_step, name, ("samples",), step)


def tokens(name: str, step: int, chosen: Sequence[int], rank: int = 0) -> Frame:
    return _of_step(rollouts.tokens_of_step, name, ("tokens",), step, tuple(int(sample) for sample in chosen), rank)


def cell_tokens(name: str, step: int, metric: str, low: float, high: float, most: int) -> Frame:
    """The tokens of a step whose `metric` lies in a cell of its histogram, with how many there are."""
    return _of_step(rollouts.tokens_of_cell, name, ("tokens",), step, metric, low, high, most)


def words(name: str, step: int) -> Frame:
    """Every token text of a step with its counts and its entropy."""
    return _of_step(rollouts.words_of_step, name, ("tokens", "samples"), step)


def profile(name: str, step: int) -> Frame:
    """Entropy along the responses of a step, apart for correct and incorrect ones."""
    return _of_step(rollouts.profile_of_step, name, ("tokens", "samples"), step)
