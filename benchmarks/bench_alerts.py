"""How often the alert rules are wrong: false alarms on healthy simulated runs, recall and lead time on bad ones.

Every series is simulated: a noiseless curve of entropy times exp(AR(1) noise), with reward and response length beside
it. Thresholds were chosen on seeds 0-59 (`--tune`); the reported rows use seeds from 10,000 on.

    python benchmarks/bench_alerts.py [--seeds 100] [--tune] [--out benchmarks/results/alerts.csv]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import RESULTS, write_rows

from monitor.alerts.replay import replay
from monitor.records import Alert

REPORT_SEED = 10_000
Curve = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # u in [0, 1] [n] -> entropy in nats [n]


@dataclass(frozen=True, slots=True)
class Shape:
    """One family of runs. reward: start and end of its sigmoid, None for no column; length: its factor over the run."""

    name: str
    wanted: str  # "" for a healthy run, else the part of the rule name that has to fire
    curve: Curve
    noise: float = 0.10  # marginal standard deviation of ln(entropy)
    phi: float = 0.5  # AR(1) coefficient
    reward: tuple[float, float] | None = (0.25, 0.8)
    length: float = 1.0
    steps: tuple[int, ...] = (120, 200, 400)
    heavy_tails: bool = False


def _flat(u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.full_like(u, rng.uniform(0.2, 1.2))


def _geometric(start: float, end: float, begin: float = 0.0, stop: float = 1.0) -> Curve:
    def curve(u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return start * (end / start) ** np.clip((u - begin) / (stop - begin), 0, 1)

    return curve


def _linear(start: float, end: float, begin: float = 0.0, stop: float = 1.0) -> Curve:
    def curve(u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return start + (end - start) * np.clip((u - begin) / (stop - begin), 0, 1)

    return curve


def _transient(factor: float) -> Curve:
    def curve(u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return 0.5 * (1 + (factor - 1) * np.exp(-np.arange(len(u)) / 4.0))

    return curve


HEALTHY = (
    *(
        Shape(f"flat, noise {noise:.2f}, phi {phi:.1f}", "", _flat, noise, phi)
        for noise in (0.05, 0.10, 0.20, 0.30)
        for phi in (0.0, 0.5, 0.9)
    ),
    Shape("flat, no reward column", "", _flat, reward=None),
    Shape("flat, reward at its ceiling", "", _flat, reward=(0.95, 0.95)),
    Shape("flat, reward falls, length grows", "", _flat, reward=(0.6, 0.3), length=2.0),
    Shape("flat, jumpy small batch (t3, 0.30)", "", _flat, 0.30, 0.0, heavy_tails=True),
    Shape("slow decline 1.0 to 0.6, reward rises", "", _linear(1.0, 0.6)),
    Shape("slow decline 1.0 to 0.6, no reward column", "", _linear(1.0, 0.6), reward=None),
    Shape("slow rise 0.5 to 0.7, reward and length rise", "", _linear(0.5, 0.7), length=2.0),
    Shape("transient from 3x, no warm-up given", "", _transient(3.0)),
    Shape("transient from 0.3x, no warm-up given", "", _transient(0.3)),
)
BAD = (
    Shape("1.3 to 0.1, linear", "collapse", _linear(1.3, 0.1), reward=(0.3, 0.35)),
    Shape("1.3 to 0.1, geometric", "collapse", _geometric(1.3, 0.1), reward=(0.3, 0.35)),
    Shape("1.3 to 0.1, geometric, reward rises", "collapse", _geometric(1.3, 0.1)),
    Shape("1.3 to 0.1, no reward column", "collapse", _linear(1.3, 0.1, 0.3, 0.9), reward=None),
    Shape("1.0 to 0.05, late cliff (8 % of the run)", "collapse", _geometric(1.0, 0.05, 0.7, 0.78), reward=(0.5, 0.2)),
    Shape("1.0 to 0.1, noise 0.30", "collapse", _geometric(1.0, 0.1, 0.2, 0.8), 0.30, reward=(0.3, 0.35)),
    Shape("GRPO decay 0.54 to 0.12, reward .25 to .84", "collapse", _geometric(0.54, 0.12), reward=(0.25, 0.84)),
    Shape("0.6 to 2.0, linear, reward falls", "explosion", _linear(0.6, 2.0), reward=(0.6, 0.2)),
    Shape("0.6 to 2.0, late, reward falls", "explosion", _geometric(0.6, 2.0, 0.5, 0.9), reward=(0.6, 0.2)),
    Shape("0.5 to 1.2, length grows 3x", "explosion", _linear(0.5, 1.2), reward=(0.4, 0.4), length=3.0),
    Shape("0.5 to 1.5, no reward column", "explosion", _linear(0.5, 1.5, 0.2, 0.9), reward=None),
    Shape("0.4 to 3.0, late cliff (8 % of the run)", "explosion", _geometric(0.4, 3.0, 0.7, 0.78), reward=(0.5, 0.2)),
)


def simulate(shape: Shape, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(columns of one run, its noiseless entropy). The run's length is one of shape.steps, by seed."""
    rng = np.random.default_rng(seed)
    n = shape.steps[seed % len(shape.steps)]
    u = np.linspace(0.0, 1.0, n)
    truth = shape.curve(u, rng)
    shocks = rng.standard_t(3, n) / np.sqrt(3.0) if shape.heavy_tails else rng.standard_normal(n)
    shocks *= shape.noise * np.sqrt(1 - shape.phi**2)
    noise = np.empty(n)
    noise[0] = shocks[0] / np.sqrt(1 - shape.phi**2)
    for t in range(1, n):
        noise[t] = shape.phi * noise[t - 1] + shocks[t]
    columns = {"step": np.arange(n), "entropy": truth * np.exp(noise)}
    if shape.reward is not None:
        start, end = shape.reward
        reward = start + (end - start) / (1 + np.exp(-8 * (u - 0.4)))
        columns["reward"] = reward + 0.05 * rng.standard_normal(n)
        columns["response_length"] = 60 * shape.length**u * np.exp(0.05 * rng.standard_normal(n))
    return columns, truth


def settled_at(truth: np.ndarray) -> int:
    """First step at which the noiseless curve has covered 95 % of its whole change in ln(entropy)."""
    way = np.log(truth / truth[0])
    return int(np.argmax(np.abs(way) >= 0.95 * abs(way[-1])))


def measure(shape: Shape, seeds: range) -> dict[str, object]:
    """One row of the result: rates over the seeds, and the lead: steps from the first alert to `settled_at`."""
    fired, other, leads = 0, 0, []
    for seed in seeds:
        columns, truth = simulate(shape, seed)
        alerts: list[Alert] = [alert for alert in replay(columns) if alert.state == "firing"]
        hits = [alert for alert in alerts if shape.wanted in alert.rule]
        fired += bool(hits)
        other += any(shape.wanted not in alert.rule for alert in alerts)
        if hits and shape.wanted:
            leads.append(settled_at(truth) - hits[0].step)
    row: dict[str, object] = {"shape": shape.name, "wanted": shape.wanted or "nothing", "series": len(seeds)}
    row["fired"] = fired
    row["fired_share"] = round(fired / len(seeds), 4)
    row["wrong_rule_share"] = round(other / len(seeds), 4)
    row["lead_median_steps"] = round(float(np.median(leads)), 1) if leads else ""
    row["lead_p10_steps"] = round(float(np.quantile(leads, 0.1)), 1) if leads else ""
    row["before_settled_share"] = round(sum(lead > 0 for lead in leads) / len(seeds), 4) if shape.wanted else ""
    return row


def main() -> None:
    """Measure every shape, print a line for each and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="series per shape")
    parser.add_argument("--tune", action="store_true", help="use the tuning seeds and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "alerts.csv")
    args = parser.parse_args()
    first = 0 if args.tune else REPORT_SEED
    rows = []
    started = time.perf_counter()
    for shape in HEALTHY + BAD:
        rows.append(measure(shape, range(first, first + args.seeds)))
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    healthy = [row for row in rows if row["wanted"] == "nothing"]
    print(
        f"healthy: {sum(int(str(r['fired'])) for r in healthy)} of {len(healthy) * args.seeds} series raised an alert; "
        f"{time.perf_counter() - started:.0f} s"
    )
    if not args.tune:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
