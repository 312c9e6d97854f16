"""How the alert rules judge simulated runs: false alarms on healthy shapes, and recall and lead on damaged ones.

    python -m benchmarks.bench_alerts [--seeds 21] [--tune] [--only TEXT] [--out benchmarks/results/alerts.csv]

A run is a few noiseless curves with noise on top: entropy times exp(AR(1) noise), reward plus normal noise, shares as
draws of 64 rollouts, evaluations as draws of 16 samples of 12 prompts, other series times lognormal noise. Every run
has the series of USUAL, as a healthy run records them; a shape names those that go another way. Rules are judged live,
one row at a time.

A shape names the rules that are right to fire in it, several where the damage shows in several series. Any other alert
of severity warning or worse is a false alarm, in a damaged run as in a healthy one; info alerts of other rules are
counted apart. Thresholds were chosen on other seeds (`--tune`). Rates on real runs: benchmarks/bench_detectors.py.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import RESULTS, write_rows
from monitor.alerts.replay import replay

REPORT_SEED = 10_000  # reported rows use seeds from here on, tuning those from 0 on
ROLLOUTS = 64  # of a step: how finely shares of rollouts are drawn
REWARD_NOISE, OTHER_NOISE = 0.05, 0.2
EVALUATED_EVERY, PROMPTS, SAMPLES = 10, 12, 16  # steps between evaluations, and of what one is made
DISTINCT, PASSED = "eval/heldout/distinct", "eval/heldout/pass@1"
RAISING, LOWERING = "predicted_entropy_raising_weighted", "predicted_entropy_lowering_weighted"
FOLLOWS = {"renyi2": ("entropy", 0.6), "correct_share": ("reward", 1.0), PASSED: ("reward", 1.0)}  # unless a shape says
Rng = np.random.Generator
Curve = Callable[[np.ndarray, Rng], np.ndarray]  # u in [0, 1] [n], the run's course -> noiseless values [n]
Columns = dict[str, np.ndarray]  # object arrays: None is a missing value


def between(low: float, high: float) -> Curve:
    """A constant, another for each run."""
    return lambda u, rng: np.full_like(u, rng.uniform(low, high))


def linear(start: float, end: float, begin: float = 0.0, stop: float = 1.0) -> Curve:
    return lambda u, rng: start + (end - start) * np.clip((u - begin) / (stop - begin), 0, 1)


def geometric(start: float, end: float, begin: float = 0.0, stop: float = 1.0) -> Curve:
    return lambda u, rng: start * (end / start) ** np.clip((u - begin) / (stop - begin), 0, 1)


def sigmoid(start: float, end: float, middle: float = 0.4) -> Curve:
    return lambda u, rng: start + (end - start) / (1 + np.exp(-8 * (u - middle)))


def jump(before: Curve, factor: float, at: float = 0.6) -> Curve:
    """Another level from one row to the next, as after a resume from a broken checkpoint."""
    return lambda u, rng: before(u, rng) * np.where(u < at, 1.0, factor)


def transient(level: float, factor: float) -> Curve:
    return lambda u, rng: level * (1 + (factor - 1) * np.exp(-np.arange(len(u)) / 4.0))


def sawtooth(high: float, low: float, rows: int = 30) -> Curve:
    """Falls from high to low in `rows` rows, and again."""
    return lambda u, rng: high * (low / high) ** (np.arange(len(u)) % rows / rows)


def bursts(level: float, factor: float, share: float, begin: float = 0.0) -> Curve:
    """Single rows, a random share of those from `begin` on, at `factor` times the level."""

    def curve(u: np.ndarray, rng: Rng) -> np.ndarray:
        return np.where((rng.random(len(u)) < share) & (u >= begin), factor, 1.0) * level

    return curve


FLAT = between(0.2, 1.2)
USUAL: dict[str, Curve] = {
    "entropy": FLAT,
    "reward": sigmoid(0.25, 0.8),
    "response_length": linear(60, 60),
    "zero_variance_share": linear(0.25, 0.35),
    "all_wrong_share": linear(0.20, 0.10),
    "all_correct_share": linear(0.05, 0.25),
    "truncated_share": linear(0.04, 0.04),
    "repetition_share": linear(0.02, 0.02),
    "same_answer_share": linear(0.04, 0.08),
    "decided_share": linear(0.45, 0.55),
    "selected_decided_share": linear(0.30, 0.40),
    "selected_share": linear(0.10, 0.10),
    "kl": linear(0.001, 0.05),
    "sampler_mismatch": linear(0.005, 0.005),
    "clip_share_low": linear(0.005, 0.005),
    "clip_share_high": linear(0.01, 0.01),
    "grad_norm": linear(0.3, 0.3),
    RAISING: linear(0.8e-3, 0.8e-3),
    LOWERING: linear(-1e-3, -1e-3),
    DISTINCT: linear(5, 7),
}


def whole(columns: Columns, rng: Rng) -> Columns:
    return columns


def missing(columns: Columns, rng: Rng) -> Columns:
    """A fifth of the values of each series are None."""
    return {key: v if key == "step" else np.where(rng.random(len(v)) < 0.2, None, v) for key, v in columns.items()}


def broken_points(columns: Columns, rng: Rng) -> Columns:
    """One entropy in 30 is nan, one inf, never two rows in a row."""
    rows = np.arange(rng.integers(5, 15), len(columns["step"]) - 1, 15)
    values = columns["entropy"].copy()
    values[rows] = [np.nan if i % 2 else np.inf for i in range(len(rows))]
    return columns | {"entropy": values}


def broken_from(key: str, value: float, at: float = 0.5) -> Callable[[Columns, Rng], Columns]:
    """Every value from `at` on is not finite."""

    def spoil(columns: Columns, rng: Rng) -> Columns:
        values = columns[key].copy()
        values[int(at * len(values)) :] = value
        return columns | {key: values}

    return spoil


def sparser(columns: Columns, rng: Rng) -> Columns:
    """Logged every step up to the middle of the run, every fifth from then on."""
    steps = columns["step"]
    kept = (np.arange(len(steps)) < len(steps) // 2) | (np.arange(len(steps)) % 5 == 0)
    return {key: values[kept] for key, values in columns.items()}


@dataclass(frozen=True, slots=True)
class Shape:
    """One family of runs. right: the rules that are right to fire, none in a healthy run.

    series: curves in place of the usual ones, or of those that follow another (FOLLOWS). shows: the series whose course
    says when the damage is done. only: the recorded series; empty: all. spoil: what happens to the rows on their way
    into the log.
    """

    name: str
    right: tuple[str, ...] = ()
    series: Mapping[str, Curve] = field(default_factory=dict)
    shows: str = "entropy"
    noise: float = 0.10  # marginal standard deviation of ln(entropy)
    phi: float = 0.5  # AR(1) coefficient of that noise
    heavy_tails: bool = False
    only: tuple[str, ...] = ()
    steps: tuple[int, ...] = (120, 200, 400)
    spoil: Callable[[Columns, Rng], Columns] = whole


def entropy(curve: Curve, reward: Curve | None = None, **others: Curve) -> dict[str, Curve]:
    return {"entropy": curve} | ({"reward": reward} if reward else {}) | others


COLLAPSE, EXPLOSION, LOST, DIVERSITY = ("entropy_collapse", "entropy_explosion", "reward_lost", "diversity_lost")
ENTROPY_ALONE = ("entropy",)
SMALL_GAIN, LOSS = sigmoid(0.30, 0.35), sigmoid(0.6, 0.15)

HEALTHY = (
    *(
        Shape(f"flat, noise {noise:.2f}, phi {phi:.1f}", noise=noise, phi=phi)
        for noise in (0.05, 0.10, 0.20, 0.30)
        for phi in (0.0, 0.5, 0.9)
    ),
    Shape("flat, entropy alone is recorded", only=ENTROPY_ALONE),
    Shape("flat, reward at its ceiling", series=entropy(FLAT, linear(0.95, 0.95))),
    Shape("flat, jumpy small batch: Student t with 3 degrees of freedom", noise=0.30, phi=0.0, heavy_tails=True),
    Shape("flat low, 0.05 nat", series=entropy(linear(0.05, 0.05))),
    Shape("flat low from the first row, 0.03 nat", series=entropy(linear(0.03, 0.03))),
    Shape("flat high, 2.5 nat", series=entropy(linear(2.5, 2.5))),
    Shape("slow decline 1.0 to 0.6 nat, reward rises", series=entropy(linear(1.0, 0.6))),
    Shape("slow decline 1.0 to 0.6 nat, entropy alone", series=entropy(linear(1.0, 0.6)), only=ENTROPY_ALONE),
    Shape("slow rise 0.5 to 0.7 nat, reward and length rise",
          series=entropy(linear(0.5, 0.7), response_length=geometric(60, 120))),
    Shape("transient from 3 times the level, no warm-up given", series=entropy(transient(0.5, 3.0))),
    Shape("transient from 0.3 times the level, no warm-up given", series=entropy(transient(0.5, 0.3))),
    Shape("sawtooth, 0.6 down to 0.4 nat every 30 rows", series=entropy(sawtooth(0.6, 0.4))),
    Shape("bursts: one row in 20 at 3 times the entropy", series=entropy(bursts(0.5, 3.0, 0.05))),
    Shape("small jump after a resume: entropy times 0.8", series=entropy(jump(linear(0.6, 0.6), 0.8))),
    Shape("missing points: a fifth of all values", spoil=missing),
    Shape("non-finite points: single rows of nan and inf", spoil=broken_points),
    Shape("logged every step, then every fifth", spoil=sparser),
    Shape("prompts learnt: groups all right", series={
        "reward": sigmoid(0.3, 0.97), "zero_variance_share": sigmoid(0.2, 0.9), "all_wrong_share": linear(0.02, 0.02),
        "all_correct_share": sigmoid(0.15, 0.88)}),
    Shape("longer answers: truncation 4 to 25 %, reward rises", series={
        "truncated_share": linear(0.04, 0.25), "response_length": geometric(60, 120)}),
    Shape("KL 0 to 0.4 nat, reward rises", series={"kl": linear(0.001, 0.4)}),
    Shape("few live groups from the start, reward rises", series={
        "zero_variance_share": linear(0.80, 0.60), "all_wrong_share": linear(0.80, 0.55),
        "all_correct_share": linear(0.0, 0.05), "reward": sigmoid(0.05, 0.2)}),
    Shape("blind selection at a low rate, reward rises", series={"selected_decided_share": linear(0.95, 0.95)}),
    Shape("same answers 4 to 33 % of the pairs, evaluations find as many", series={
        "same_answer_share": linear(0.04, 0.33)}),
    Shape("entropy bonus: decided tokens 55 to 52 %, reward rises", series={"decided_share": linear(0.55, 0.52)}),
    Shape("gradient bursts: one row in 25 at 15 times", series={"grad_norm": bursts(0.3, 15, 0.04)}),
    Shape("reward dips to 80 % of it and comes back",
          series={"reward": lambda u, rng: sigmoid(0.3, 0.7, 0.2)(u, rng) * np.where(abs(u - 0.6) < 0.08, 0.8, 1.0)}),
)  # fmt: skip
DAMAGED = (
    Shape("1.3 to 0.1 nat, linear", (COLLAPSE,), entropy(linear(1.3, 0.1), SMALL_GAIN)),
    Shape("1.3 to 0.1 nat, geometric", (COLLAPSE,), entropy(geometric(1.3, 0.1), SMALL_GAIN)),
    Shape("1.3 to 0.1 nat, geometric, reward rises", (COLLAPSE,), entropy(geometric(1.3, 0.1))),
    Shape("1.3 to 0.1 nat, entropy alone", (COLLAPSE,), entropy(linear(1.3, 0.1, 0.3, 0.9)), only=ENTROPY_ALONE),
    Shape("1.0 to 0.05 nat, late cliff within 8 % of the run, reward falls", (COLLAPSE, LOST),
          entropy(geometric(1.0, 0.05, 0.7, 0.78), linear(0.5, 0.2, 0.7, 0.78))),
    Shape("1.0 to 0.1 nat, noise 0.30", (COLLAPSE,), entropy(geometric(1.0, 0.1, 0.2, 0.8), SMALL_GAIN), noise=0.30),
    Shape("decay of GRPO 0.54 to 0.12 nat, reward 0.25 to 0.84", (COLLAPSE,),
          entropy(geometric(0.54, 0.12), sigmoid(0.25, 0.84))),
    Shape("slow leak 0.9 to 0.2 nat within 400 rows", (COLLAPSE,), entropy(geometric(0.9, 0.2), linear(0.4, 0.4)),
          steps=(400,)),
    Shape("sawtooth, 0.8 down to 0.08 nat every 60 rows", (COLLAPSE,),
          entropy(sawtooth(0.8, 0.08, 60), linear(0.4, 0.4))),
    Shape("cliff after a resume: entropy to a quarter, reward to a third", (COLLAPSE, LOST),
          entropy(jump(linear(0.6, 0.6), 0.25), jump(linear(0.6, 0.6), 0.33))),
    Shape("cliff after a resume: entropy four times, reward to a third", (EXPLOSION, LOST),
          entropy(jump(linear(0.6, 0.6), 4.0), jump(linear(0.6, 0.6), 0.33))),
    Shape("1.0 to 0.1 nat, a fifth of all values missing", (COLLAPSE,), entropy(geometric(1.0, 0.1), SMALL_GAIN),
          spoil=missing),
    Shape("1.0 to 0.1 nat, logged every step, then every fifth", (COLLAPSE,),
          entropy(geometric(1.0, 0.1), SMALL_GAIN), spoil=sparser),
    Shape("0.6 to 2.0 nat, linear, reward falls", (EXPLOSION, LOST), entropy(linear(0.6, 2.0), sigmoid(0.6, 0.2))),
    Shape("0.6 to 2.0 nat, late, reward falls", (EXPLOSION, LOST),
          entropy(geometric(0.6, 2.0, 0.5, 0.9), sigmoid(0.6, 0.2))),
    Shape("0.5 to 1.2 nat, length grows threefold", (EXPLOSION,),
          entropy(linear(0.5, 1.2), linear(0.4, 0.4), response_length=geometric(60, 180))),
    Shape("0.5 to 1.5 nat, entropy alone", (EXPLOSION,), entropy(linear(0.5, 1.5, 0.2, 0.9)), only=ENTROPY_ALONE),
    Shape("0.4 to 3.0 nat, late cliff within 8 % of the run, reward falls", (EXPLOSION, LOST),
          entropy(geometric(0.4, 3.0, 0.7, 0.78), linear(0.5, 0.2, 0.7, 0.78))),
    Shape("reward lost at flat entropy, 0.6 to 0.15", (LOST,), {"reward": LOSS}, "reward"),
    Shape("reward lost at flat entropy, entropy and reward alone", (LOST,), {"reward": LOSS}, "reward",
          only=("entropy", "reward")),
    Shape("reward lost within 8 % of the run, entropy flat", (LOST,), {"reward": linear(0.6, 0.1, 0.6, 0.68)},
          "reward"),
    Shape("reward lost, a fifth of all values missing", (LOST,), {"reward": LOSS}, "reward", spoil=missing),
    Shape("same answers 4 to 50 %, reward climbs", (DIVERSITY,), {"same_answer_share": linear(0.04, 0.50, 0.2, 0.9)},
          "same_answer_share"),
    Shape("distinct answers of evaluations 8 to 3, reward climbs", (DIVERSITY,),
          {DISTINCT: linear(8, 3, 0.2, 0.9)}, DISTINCT),
    Shape("groups all wrong 20 to 95 %, reward goes", ("no_learning_signal", LOST), {
        "zero_variance_share": sigmoid(0.25, 0.95), "all_wrong_share": sigmoid(0.20, 0.95),
        "all_correct_share": linear(0.0, 0.0), "reward": sigmoid(0.3, 0.01)}, "zero_variance_share"),
    Shape("training 30 to 80 % right, held-out problems stay at 30 %", ("generalization_gap",), {
        "reward": sigmoid(0.3, 0.8), PASSED: linear(0.3, 0.3)}, "reward"),
    Shape("decided tokens 60 to 30 %, reward falls", ("forgetting", LOST), {
        "decided_share": linear(0.60, 0.30, 0.1, 0.6), "reward": LOSS}, "decided_share"),
    Shape("noisy tails: H1 0.5 to 0.75 nat, H2 flat", ("tail_noise",), {
        "entropy": linear(0.5, 0.75), "renyi2": linear(0.3, 0.3)}),
    Shape("sharp peaks: H2 0.4 to 0.12 nat, H1 0.6 to 0.5", ("peak_sharpening",), {
        "entropy": linear(0.6, 0.5), "renyi2": geometric(0.4, 0.12)}, "renyi2"),
    Shape("what raises entropy falls to an eighth", ("entropy_flow",), {RAISING: geometric(0.8e-3, 0.1e-3)}, RAISING),
    Shape("selection gone blind, reward follows", ("blind_selection", LOST), {
        "selected_decided_share": linear(0.40, 0.97, 0.1, 0.5), "reward": sigmoid(0.5, 0.1, 0.7)}, "reward"),
    Shape("truncation runaway 4 to 80 %, reward falls", ("truncation_runaway", LOST), {
        "truncated_share": sigmoid(0.04, 0.80), "response_length": sigmoid(60, 180), "reward": LOSS},
          "truncated_share"),
    Shape("truncation runaway 4 to 80 %, reward flat", ("truncation_runaway",), {
        "truncated_share": sigmoid(0.04, 0.80), "response_length": sigmoid(60, 180), "reward": linear(0.4, 0.4)},
          "truncated_share"),
    Shape("repetition 2 to 50 %, reward falls", ("repetition", LOST), {
        "repetition_share": sigmoid(0.02, 0.50), "reward": LOSS}, "repetition_share"),
    Shape("KL runaway 0.01 to 2 nat, reward flat", ("kl_runaway",), {
        "kl": geometric(0.01, 2.0), "reward": linear(0.4, 0.4)}, "kl"),
    Shape("sampler mismatch 0.005 to 0.4 nat", ("sampler_mismatch",), {
        "sampler_mismatch": geometric(0.005, 0.4, 0.3)}, "sampler_mismatch"),
    Shape("clipped tokens 1 to 40 %", ("clip_saturation",), {"clip_share_high": linear(0.01, 0.40, 0.3)},
          "clip_share_high"),
    Shape("gradient bursts: four rows in ten at 30 times", ("gradient_spikes",), {
        "grad_norm": bursts(0.3, 30, 0.4, begin=0.5)}, "grad_norm"),
    Shape("entropy is nan from the middle on", ("nonfinite_entropy",), spoil=broken_from("entropy", np.nan)),
    Shape("gradient norm is inf from the middle on", ("nonfinite_loss",), spoil=broken_from("grad_norm", np.inf)),
)  # fmt: skip


def simulate(shape: Shape, seed: int) -> tuple[Columns, int]:
    """(columns of one run, the step at which its damage is done). The run's length is one of shape.steps, by seed."""
    rng = np.random.default_rng(seed)
    n = shape.steps[seed % len(shape.steps)]
    u, steps = np.linspace(0.0, 1.0, n), np.arange(n)
    truths = {key: curve(u, rng) for key, curve in (USUAL | dict(shape.series)).items()}
    truths |= {key: share * truths[of] for key, (of, share) in FOLLOWS.items() if key not in shape.series}
    shown = truths[shape.shows]
    done = settled_at(shown) if np.ptp(shown) > 0 else n // 2  # where values break, they break in the middle
    wander = np.exp(correlated(n, shape, rng))
    columns = {key: noisy(key, truth, wander, rng).astype(object) for key, truth in truths.items()}
    for key in (DISTINCT, PASSED):
        columns[key][steps % EVALUATED_EVERY != 0] = None
    kept = {key: values for key, values in columns.items() if not shape.only or key in shape.only}
    return shape.spoil({"step": steps} | kept, rng), done


def noisy(key: str, truth: np.ndarray, wander: np.ndarray, rng: Rng) -> np.ndarray:
    """Values as they would be logged. wander: the noise that both entropies share."""
    if key in ("entropy", "renyi2"):
        return truth * wander
    if key == "reward":
        return np.clip(truth + REWARD_NOISE * rng.standard_normal(len(truth)), 0, 1)
    if key == DISTINCT:
        return rng.binomial(PROMPTS * SAMPLES, truth / SAMPLES) / PROMPTS
    if key == PASSED:
        return rng.binomial(PROMPTS * SAMPLES, truth) / (PROMPTS * SAMPLES)
    if key.endswith("_share") and key not in ("selected_share", "repetition_share"):
        return rng.binomial(ROLLOUTS, truth) / ROLLOUTS
    return truth * np.exp(OTHER_NOISE * rng.standard_normal(len(truth)))


def correlated(n: int, shape: Shape, rng: Rng) -> np.ndarray:
    """AR(1) noise [n] of standard deviation shape.noise."""
    shocks = rng.standard_t(3, n) / np.sqrt(3.0) if shape.heavy_tails else rng.standard_normal(n)
    shocks *= shape.noise * np.sqrt(1 - shape.phi**2)
    noise = np.empty(n)
    noise[0] = shocks[0] / np.sqrt(1 - shape.phi**2)
    for t in range(1, n):
        noise[t] = shape.phi * noise[t - 1] + shocks[t]
    return noise


def settled_at(truth: np.ndarray) -> int:
    """First row at which a noiseless curve has gone 95 % of the farthest it gets from its start, in logarithms."""
    way = np.abs(np.log(truth / truth[0]))
    return int(np.argmax(way >= 0.95 * way.max()))


def measure(shape: Shape, seeds: range) -> dict[str, Any]:
    """One row: in how many series a right rule fired and in how many another warned, and the lead of the right ones.

    lead: steps from the first right alert to the damage (`simulate`), negative where it came after. by_rule: series in
    which each right rule fired, or another warned. info: series in which another rule had no more than info to say.
    """
    fired, false, critical, leads = 0, 0, 0, []
    by_rule, info = Counter[str](), Counter[str]()
    for seed in seeds:
        columns, done = simulate(shape, seed)
        alerts = [alert for alert in replay(columns) if alert.state == "firing"]
        right = [alert for alert in alerts if alert.rule in shape.right]
        wrong = [alert for alert in alerts if alert.rule not in shape.right and alert.severity != "info"]
        counted = {alert.rule for alert in (*right, *wrong)}
        by_rule.update(counted)
        info.update({alert.rule for alert in alerts} - counted)
        fired += bool(right)
        false += bool(wrong)
        critical += any(alert.severity == "critical" for alert in wrong)
        if right:
            leads.append(done - right[0].step)
    damaged = bool(shape.right)
    return {
        "shape": shape.name,
        "right": " ".join(shape.right),
        "series": len(seeds),
        "fired": fired if damaged else "",
        "fired_share": round(fired / len(seeds), 4) if damaged else "",
        "false_alarms": false,
        "false_share": round(false / len(seeds), 4),
        "false_critical": critical,
        "by_rule": counts(by_rule),
        "info": counts(info),
        "lead_median_steps": round(float(np.median(leads)), 1) if leads else "",
        "lead_p10_steps": round(float(np.quantile(leads, 0.1)), 1) if leads else "",
        "before_damage_share": round(sum(lead > 0 for lead in leads) / len(seeds), 4) if damaged else "",
    }


def counts(by_rule: Counter[str]) -> str:
    return " ".join(f"{rule}:{count}" for rule, count in sorted(by_rule.items()))


def main() -> None:
    """Measure every shape, print a line for each and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=21, help="series per shape")
    parser.add_argument("--tune", action="store_true", help="use the tuning seeds and write nothing")
    parser.add_argument("--only", default="", help="only the shapes with this text in their name, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "alerts.csv")
    args = parser.parse_args()
    first = 0 if args.tune else REPORT_SEED
    rows = []
    started = time.perf_counter()
    for shape in HEALTHY + DAMAGED:
        if args.only in shape.name:
            rows.append(measure(shape, range(first, first + args.seeds)))
            print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    healthy = [row for row in rows if not row["right"]]
    false = sum(row["false_alarms"] for row in healthy)
    print(f"healthy: false alarms in {false} of {len(healthy) * args.seeds} series")
    print(f"{time.perf_counter() - started:.0f} s")
    if not (args.tune or args.only):
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
