"""The macros of a store, and what its views and macros say of themselves: the same here and in store.duckdb.

Macros that name a step read only the segments whose names say that they may hold it. For them `TABLE_segments` has the
column `file`, a row's path; a condition on it alone costs no look into a file.
"""

from __future__ import annotations

from dataclasses import dataclass

from monitor.metrics import SPLITS

# Same rule as monitor.records.quantiles_from_counts: linear in the cell that holds rank q * n.
_QUANTILES = (
    "CREATE OR REPLACE MACRO hist_cell(counts, place) AS list_position("
    "[list_sum(counts[:i]) >= place AND counts[i] > 0 FOR i IN range(1, len(counts) + 1)], true)",
    "CREATE OR REPLACE MACRO hist_interpolate(counts, edge_lows, edge_highs, cell, place, low, high) AS "
    "greatest(edge_lows[cell], low) + (place - coalesce(list_sum(counts[:cell - 1]), 0)) / counts[cell] "
    "* (least(edge_highs[cell], high) - greatest(edge_lows[cell], low))",
    "CREATE OR REPLACE MACRO hist_quantile(counts, id, q, low, high) AS hist_interpolate(counts, "
    "(SELECT lows FROM edges WHERE edges_id = id), (SELECT highs FROM edges WHERE edges_id = id), "
    "hist_cell(counts, q * list_sum(counts)), q * list_sum(counts), low, high)",
)
_SHOWN = {"p05": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}  # percent
_TOKEN_METRICS = ("entropy", "deviation", "logprob", "renyi2", "weight", "alive")
# What the path of a segment says is looked at while a query is planned, once for each file, so it has to be cheap: the
# run by the beginning of the path, the steps by the digits at fixed places before its end. Character 26 from the end is
# a dash if the last step has eight digits; longer ones are looked for in the file. With file[-34:-27], which may raise,
# DuckDB would look into every file.
_OF_RUN = "starts_with(file, '{root}/runs/' || of_run || '/data')"
_AT = "lpad(at_step::VARCHAR, 8, '0')"
_HOLDS_STEP = f"substr(file, -26, 1) <> '-' OR (substr(file, -34, 8) <= {_AT} AND substr(file, -25, 8) >= {_AT})"
_OF_SEGMENT = f"{_OF_RUN} AND ({_HOLDS_STEP}) AND step = at_step"


@dataclass(frozen=True, slots=True)
class Macro:
    """A table macro. tables: what it reads. No parameter may have a column's name: DuckDB takes one for the other."""

    parameters: str
    tables: tuple[str, ...]
    comment: str
    query: str


def _cell(percent: int) -> str:
    """Which cell of the counts of a row `s` holds a quantile, and at what rank in it: -(100 rank 2^16 + cell).

    In integers, so that no rounding moves it into another cell. One pass over the counts, for all rows at once: what
    each cell holds is taken away until a cell has the rest.
    """
    return (
        "list_reduce(s.counts, lambda rest, n, cell: CASE WHEN rest <= 0 THEN rest WHEN 100 * n >= rest "
        f"THEN -(rest * 65536 + cell) ELSE rest - 100 * n END, {percent} * s.total) AS at{percent}"
    )


def _quantile(percent: int) -> str:
    """The quantile of a row `c`, linear in the cell that holds it, whose borders are in `e`."""
    cell = f"(-c.at{percent} % 65536)"
    part = f"(-c.at{percent} // 65536) / (100 * c.counts[{cell}])"
    low = f"greatest(e.lows[{cell}], c.min)"
    return f"{low} + {part} * (least(e.highs[{cell}], c.max) - {low})"


MACROS = {
    "series": Macro(
        "metric",
        ("steps",),
        "run, step, value of one scalar, mean over ranks.",
        "SELECT s.run, s.step, avg(s.value) AS value FROM steps s WHERE s.name = metric GROUP BY ALL ORDER BY ALL",
    ),
    "compare": Macro(
        "a, b",
        ("steps",),
        "Every scalar of two runs, step by step: name, step, a, b, difference = b - a. NULL where a run has none.",
        "SELECT c.name, c.step, c.of_a AS a, c.of_b AS b, c.of_b - c.of_a AS difference FROM (SELECT s.name, s.step, "
        "avg(s.value) FILTER (s.run = a) AS of_a, avg(s.value) FILTER (s.run = b) AS of_b FROM steps s "
        "WHERE s.run = a OR s.run = b GROUP BY s.name, s.step) c ORDER BY ALL",
    ),
    "fan": Macro(
        "of_run, of_metric, of_split",
        ("steps", "histograms"),
        "Quantiles of a metric at each step, from histograms added up over ranks: step, n, mean, p05 to p95. "
        f"of_split: {', '.join(SPLITS)}.",
        "SELECT c.step, c.total AS n, c.mean, "
        + ", ".join(f"{_quantile(percent)} AS {name}" for name, percent in _SHOWN.items())
        + " FROM (SELECT s.*, "
        + ", ".join(map(_cell, _SHOWN.values()))
        + " FROM (SELECT r.*, list_sum(r.counts)::BIGINT AS total FROM (SELECT q.*, CASE WHEN len(q.every) = 1 "
        "THEN q.every[1] ELSE [list_sum([one[i] FOR one IN q.every])::BIGINT FOR i IN range(1, len(q.every[1]) + 1)] "
        "END AS counts FROM (SELECT h.step, h.edges_id, list(h.counts) AS every, min(h.min) AS min, max(h.max) AS max, "
        "sum(h.sum) / sum(h.n) AS mean FROM histograms h "
        "WHERE h.run = of_run AND h.metric = of_metric AND h.split = of_split GROUP BY h.step, h.edges_id"
        ") q) r) s WHERE s.total > 0) c JOIN edges e USING (edges_id) ORDER BY c.step",
    ),
    "entropy_fan": Macro(
        "of_run",
        ("steps", "histograms"),
        "Quantiles of the token entropy at each step, nats: step, n, mean, p05 to p95.",
        "FROM fan(of_run, 'entropy', 'all')",
    ),
    "commits_at": Macro(
        "of_run, at_step",
        ("steps",),
        "attempt, rank of the rows that count of one step of a run: those of the view `commits`.",
        # no later attempt has a step at or before this one
        f"SELECT DISTINCT s.attempt, s.rank FROM steps_segments s WHERE {_OF_SEGMENT} AND s.attempt = ("
        "SELECT coalesce(max(later.attempt), 1) FROM steps_segments later "
        f"WHERE {_OF_RUN} AND NOT contains(file, '/a001-r') AND later.step <= at_step)",
    ),
    "tokens_at": Macro(
        "of_run, at_step",
        ("steps", "tokens"),
        "The raw tokens of one step of a run, as in `tokens`.",
        "SELECT s.* EXCLUDE (file) FROM tokens_segments s "
        f"SEMI JOIN commits_at(of_run, at_step) c USING (attempt, rank) WHERE {_OF_SEGMENT}",
    ),
    "samples_at": Macro(
        "of_run, at_step",
        ("steps", "samples"),
        "The rollouts of one step of a run, as in `samples`.",
        "SELECT s.* EXCLUDE (file) FROM samples_segments s "
        f"SEMI JOIN commits_at(of_run, at_step) c USING (attempt, rank) WHERE {_OF_SEGMENT}",
    ),
    "tokens_of": Macro(
        "of_run, at_step, of_sample",
        ("steps", "tokens", "samples"),
        "The tokens of one rollout (of each rank that has it) with their texts, by position.",
        "SELECT t.rank, t.position, r.token_texts[t.position + 1] AS text, "
        "t.* EXCLUDE (run, attempt, step, rank, sample, position) FROM tokens_at(of_run, at_step) t "
        "LEFT JOIN (SELECT s.attempt, s.rank, s.token_texts FROM samples_segments s "
        f"WHERE {_OF_SEGMENT} AND s.sample = of_sample) r USING (attempt, rank) "
        "WHERE t.sample = of_sample ORDER BY t.rank, t.position",
    ),
    "bin_tokens": Macro(
        "of_run, at_step, of_metric, low, high",
        ("steps", "tokens", "samples"),
        f"The tokens of a step whose metric ({', '.join(_TOKEN_METRICS)}) is from low up to, not including, high, "
        "with their texts: what a cell of a histogram counts.",
        "SELECT t.rank, t.sample, t.position, r.token_texts[t.position + 1] AS text, t.value, "
        "t.* EXCLUDE (run, attempt, step, rank, sample, position, value) FROM (SELECT *, CASE of_metric "
        + " ".join(f"WHEN '{name}' THEN m.{name}" for name in _TOKEN_METRICS)
        + " ELSE error('of_metric is none of "
        + ", ".join(_TOKEN_METRICS)
        + "') END AS value "
        "FROM tokens_at(of_run, at_step) m) t "
        f"LEFT JOIN (SELECT s.attempt, s.rank, s.sample, s.token_texts FROM samples_segments s WHERE {_OF_SEGMENT}) r "
        "USING (attempt, rank, sample) "
        "WHERE t.value >= low AND t.value < high ORDER BY t.rank, t.sample, t.position",
    ),
    "episodes": Macro(
        "of_run",
        ("steps", "alerts"),
        "Alerts of a run that fired: rule, severity (the highest), first_step, worst_step (when it was first that "
        "severe), end_step (NULL while it fires), message (of worst_step).",
        "SELECT e.rule, e.worst.severity AS severity, e.first_step, e.worst.step AS worst_step, "
        "CASE WHEN e.last = 'resolved' THEN e.end_step END AS end_step, e.worst.message AS message FROM ("
        "SELECT a.rule, a.first_step, min_by({'severity': a.severity, 'step': a.step, 'message': a.message}, "
        "{'rank': -list_position(['info', 'warning', 'critical'], a.severity), 'ts': a.ts, 'step': a.step}) "
        "FILTER (a.state = 'firing') AS worst, max_by(a.state, {'ts': a.ts, 'step': a.step}) AS last, "
        "max(a.step) FILTER (a.state = 'resolved') AS end_step FROM alerts a "
        "WHERE a.run = of_run AND a.state <> 'pending' GROUP BY a.rule, a.first_step) e "
        "WHERE e.worst IS NOT NULL ORDER BY e.first_step, e.rule",
    ),
}

VIEW_COMMENTS = {
    "runs": "One row for a run: status, configuration, how far it has come.",
    "steps": "Scalars of the committed steps: one row for each name (docs/metrics.md) and rank.",
    "histograms": "Histograms of the committed steps: one row for each metric, split and rank; cells in `edges`.",
    "tokens": "Raw tokens of the committed steps, one row for each response token. For one step use tokens_at().",
    "samples": "Rollouts of the committed steps with their texts. For one step use samples_at().",
    "alerts": "Transitions of alerts: pending, firing, resolved. Alerts as a whole: episodes().",
    "events": "What happened to the runs; step may be NULL.",
    "commits": "The (run, step, rank, attempt) that count: one line of history for each run.",
    "heartbeats": "The newest heartbeat of each rank.",
}


def macro_statements(root: str) -> list[str]:
    """The SQL of all macros, in an order in which each finds those that it uses.

    root: what the paths of segments begin with, the store's; "" in an export.
    """
    quoted = root.replace("'", "''")
    tables = (
        f"CREATE OR REPLACE MACRO {name}({m.parameters}) AS TABLE {m.query.replace('{root}', quoted)}"
        for name, m in MACROS.items()
    )
    return [*_QUANTILES, *tables]


def comment_statements() -> list[str]:
    """The SQL that lets the database say what its views and macros are."""
    views = [f"COMMENT ON VIEW {name} IS {_quoted(text)}" for name, text in VIEW_COMMENTS.items()]
    return views + [f"COMMENT ON MACRO TABLE {name} IS {_quoted(m.comment)}" for name, m in MACROS.items()]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
