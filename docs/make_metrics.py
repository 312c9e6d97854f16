"""Writes docs/metrics.md from monitor.metrics: python -m docs.make_metrics"""

from __future__ import annotations

from pathlib import Path

from monitor.metrics import _EVAL, _REWARD, EDGES_IDS, EVAL_SPLITS, METRICS, SPLITS, Metric, cell_bounds

GOOD = {"up": "up", "down": "down", "band": "neither tail", "none": ""}


def _row(spec: Metric, key: str) -> str:
    edges = f"`{spec.edges}`" if spec.edges else ""
    return f"| `{key}` | {spec.label} | {spec.unit} | {GOOD[spec.good]} | {edges} | {spec.help} |"


def _edges(edges_id: str) -> str:
    lows, highs = cell_bounds(edges_id)
    return f"| `{edges_id}` | {len(lows)} | {highs[0]:.3g} | {lows[-1]:.4g} |"


def page() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from `monitor/metrics.py` by `python -m docs.make_metrics`. Entropies and divergences are in nats.",
        "Token metrics are taken at response positions only, at the sampling temperature, and their means weigh every",
        "response token alike. Keys under `perf/` depend on the machine.",
        "",
        "| key | label | unit | good | histogram edges | meaning |",
        "|---|---|---|---|---|---|",
        *(_row(spec, key) for key, spec in METRICS.items()),
        *(_row(spec, f"eval/<split>/{key}{'<k>' if key == 'pass@' else ''}") for key, spec in _EVAL.items()),
        _row(_REWARD, f"{_REWARD.key}<function>"),
        "",
        f"Evaluation splits: {', '.join(EVAL_SPLITS)}. Token histograms have the splits {', '.join(SPLITS)}.",
        "",
        "## Histogram cells",
        "",
        "Half-open cells `low <= value < high`; the first reaches down to -inf, the last up to +inf, so counts add",
        "exactly over micro-batches, ranks and steps. Joint metrics have edges `a*b`, counts row-major.",
        "",
        "| edges | cells | first cell below | last cell from |",
        "|---|---|---|---|",
        *(_edges(edges_id) for edges_id in EDGES_IDS),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "metrics.md").write_text(page())
