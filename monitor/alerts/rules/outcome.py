"""Rules on what the run is for: reward that is lost, answers that become few, groups that teach nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.window import BEST_ROWS, Window
from monitor.records import SEVERITY_RANK, Severity


def entropy_phrase(window: Window) -> str:
    """What the entropy does meanwhile: whoever watches it alone may see nothing."""
    level, base = window.level(), window.baseline()
    if math.isnan(level) or not base > 0:
        return ""
    ratio = level / base
    if 0.7 <= ratio <= 1.3:
        return f" Entropy hardly shows it: {level:.3g} nat, {ratio:.0%} of its baseline."
    return f" Entropy is {level:.3g} nat, {ratio:.0%} of its baseline."


class RewardLost(Rule):
    """Reward has fallen clearly below the run's own best, whatever the entropy does.

    now = mean of the last `recent_rows` rows, best = highest mean of 10 rows in a row so far, sd = standard deviation
    of a row from row-to-row differences, z = (best - now) / (sd sqrt(1/10 + 1/recent_rows)). Breached if z >= z_least
    and, for a reward that is never negative, now <= share * best. Held while now <= release * best (negative rewards:
    while z >= z_least / 2). Critical at or below critical_share * best.
    """

    name: ClassVar[str] = "reward_lost"
    says: ClassVar[str] = "Reward is being lost"
    cure: ClassVar[str] = "go back to a checkpoint from before the fall and lower the learning rate"
    floor: ClassVar[float | None] = 0.10
    watches: ClassVar[str] = "reward"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    uses: ClassVar[tuple[str, ...]] = ("entropy",)

    recent_rows: int = Field(8, ge=2, le=40, description="rows whose mean is the reward now")
    share: float = Field(0.65, gt=0, lt=1, description="of the best: lost")
    release: float = Field(0.90, gt=0, le=1, description="of the best: recovered")
    critical_share: float = Field(0.50, gt=0, lt=1, description="of the best: critical")
    z_least: float = Field(5.0, gt=0, description="standard errors that the fall must exceed")

    def is_clear(self, window: Window) -> bool:
        best = window.bests.get("reward")
        return best is None or (best.low >= 0 and window.mean("reward", self.recent_rows) > self.share * best.high)

    def check(self, window: Window) -> Finding | None:
        fall = window.fall("reward", self.recent_rows)
        if fall is None:
            return None
        best, now, z = fall.best, fall.now, fall.z
        positive = best.low >= 0
        low = now <= self.share * best.high if positive else True
        held = now <= self.release * best.high if positive else z >= self.z_least / 2
        critical = positive and now <= self.critical_share * best.high
        ratio = f", {now / best.high:.0%} of it" if positive and best.high > 0 else ""
        return Finding(
            breached=low and z >= self.z_least,
            held=held,
            severity="critical" if critical else "warning",
            value=now,
            baseline=best.high,
            threshold=self.share * best.high if positive else best.high - self.z_least * fall.error,
            message=f"Reward was {best.high:.3g} up to step {best.high_step} and is {now:.3g} now{ratio}."
            + entropy_phrase(window),
            action="Go back to a checkpoint from before the fall. Lower the learning rate; with a sparse weighting let "
            "it choose among undecided tokens, or divide by all tokens (weighting.normalise all).",
        )


class DiversityLost(Rule):
    """The policy gives fewer different right answers: it exploits what it found and stops exploring.

    Evaluations, where they count distinct answers: now = mean of the last two, peak = highest mean of two in a row.
    Breached if now <= share * peak with peak >= least_answers. Rollouts, where same answers are recorded: same = mean
    same_answer_share (else duplicate_share) of the last 6 rows. Breached if same >= same_share, and rising or four
    times its baseline. Info while the newest evaluation still finds more than agree * peak answers and same is under
    twice same_share: it counts what the rollouts only hint at, for an answer given most of the time hides many others.
    Critical at critical_share of the peak, or at twice same_share, unless the reward rises: such a run is not lost.
    """

    name: ClassVar[str] = "diversity_lost"
    says: ClassVar[str] = "Right answers become the same"
    cure: ClassVar[str] = "go back before the loss and lower the learning rate"
    watches: ClassVar[str] = "same_answer_share"
    needs: ClassVar[tuple[str, ...]] = ("reward",)
    uses: ClassVar[tuple[str, ...]] = ("same_answer_share", "duplicate_share", "eval/heldout/distinct", "entropy")

    share: float = Field(0.70, gt=0, lt=1, description="of the peak of distinct answers in evaluations: lost")
    critical_share: float = Field(0.50, gt=0, lt=1, description="of that peak: critical")
    least_answers: float = Field(2.0, gt=0, description="a lower peak of distinct answers has nothing to lose")
    agree: float = Field(0.80, gt=0, le=1, description="of that peak: evaluations above it overrule the rollouts")
    same_share: float = Field(0.25, gt=0, lt=1, description="chance that two right rollouts of a group agree: lost")

    def is_clear(self, window: Window) -> bool:
        return not any(key in window.series for key in self.uses[:3])

    def check(self, window: Window) -> Finding | None:
        findings = [found for found in (self._rollouts(window), self._evaluations(window)) if found is not None]
        worst = max(findings, key=lambda found: (found.breached, SEVERITY_RANK[found.severity])) if findings else None
        if worst is not None and worst.severity == "critical" and window.trend("reward") == "rising":
            return replace(worst, severity="warning")
        return worst

    def _rollouts(self, window: Window) -> Finding | None:
        key = "same_answer_share" if "same_answer_share" in window.series else "duplicate_share"
        same, base = window.mean(key, 6), window.baseline(key)
        if math.isnan(same) or len(window.last(key)[1]) < 6:
            return None
        grown = window.trend(key) == "rising" or (base >= 0 and same >= 4 * max(base, 0.01))
        pairs = self._pairs(window)
        overruled = len(pairs) > 0 and window.level("eval/heldout/distinct", 1) > self.agree * pairs.max()
        low: Severity = "info" if overruled else "warning"
        what = "right answers" if key == "same_answer_share" else "rollouts"
        return Finding(
            breached=same >= self.same_share and grown,
            held=same >= 0.7 * self.same_share,
            severity="critical" if same >= 2 * self.same_share else low,
            value=same,
            baseline=base,
            threshold=self.same_share,
            message=f"Two {what} to one prompt are the same in {same:.0%} of the pairs"
            + (f"; it was {base:.1%} at the start." if base >= 0 else ".")
            + entropy_phrase(window),
            action=_EXPLORE,
            series=key,
        )

    def _evaluations(self, window: Window) -> Finding | None:
        steps, pairs = window.last("eval/heldout/distinct", 10_000)[0], self._pairs(window)
        if not len(pairs):
            return None
        peak, now = float(pairs.max()), float(pairs[-1])
        return Finding(
            breached=now <= self.share * peak,
            held=now <= (self.share + 1) / 2 * peak,
            severity="critical" if now <= self.critical_share * peak else "warning",
            value=now,
            baseline=peak,
            threshold=self.share * peak,
            message=f"Evaluations found {peak:.3g} distinct right answers to a prompt around step "
            f"{int(steps[int(np.argmax(pairs)) + 1])} and {now:.3g} now." + entropy_phrase(window),
            action=_EXPLORE,
            series="eval/heldout/distinct",
        )

    def _pairs(self, window: Window) -> np.ndarray:
        """Distinct answers, means of two evaluations in a row; empty under four, or where there is nothing to lose."""
        values = window.last("eval/heldout/distinct", 10_000)[1]
        pairs = (values[1:] + values[:-1]) / 2
        return pairs if len(values) >= 4 and pairs.max() >= self.least_answers else pairs[:0]


class GeneralizationGap(Rule):
    """Training gets better and held-out problems do not: the policy learns its prompts by heart.

    gap = mean correct_share (else reward) of the last 10 rows - mean held-out pass@1 of the last two evaluations.
    first = baseline of correct_share - mean of the first four evaluations. Breached if gap >= first + margin. It takes
    rewards in 0 to 1.
    """

    name: ClassVar[str] = "generalization_gap"
    says: ClassVar[str] = "Training leaves the held-out problems behind"
    cure: ClassVar[str] = "stop at the best evaluation, or train on more prompts"
    watches: ClassVar[str] = "eval/heldout/pass@1"
    needs: ClassVar[tuple[str, ...]] = ("eval/heldout/pass@1",)
    uses: ClassVar[tuple[str, ...]] = ("correct_share", "reward")

    for_rows: int = Field(1, ge=1, description="evaluations in a row before it fires, gets worse or resolves")
    margin: float = Field(0.20, gt=0, lt=1, description="by which the gap has grown")

    def check(self, window: Window) -> Finding | None:
        key = "correct_share" if "correct_share" in window.series else "reward"
        values = window.last("eval/heldout/pass@1", 10_000)[1]
        now, begin = window.mean(key, 10), window.baseline(key)
        if len(values) < 4 or not (begin >= 0 and now <= 1):
            return None
        heldout, first = float(values[-2:].mean()), float(values[:4].mean())
        gap, first_gap = now - heldout, begin - first
        return Finding(
            breached=gap >= first_gap + self.margin,
            held=gap >= first_gap + self.margin / 2,
            severity="warning",
            value=heldout,
            baseline=now,
            threshold=now - first_gap - self.margin,
            message=f"{now:.0%} of the training rollouts are right and {heldout:.0%} of the held-out ones; the gap was "
            f"{first_gap:+.0%} and is {gap:+.0%}.",
            action="Go back to the checkpoint of the best evaluation; train on more prompts or for fewer steps.",
        )


_EXPLORE = (
    "Go back to a checkpoint from before the loss and lower the learning rate (rlvr train --guard does both), or train "
    "with a budget weighting from the start."
)


class NoLearningSignal(Rule):
    """Hardly any group has both right and wrong rollouts, so hardly any gradient is left.

    dead = mean zero_variance_share of the last `recent_rows` rows, live = 1 - dead. Breached if dead >= share. It is a
    warning if the groups are mostly all wrong (all_wrong_share, else a mean reward under 5 %) and either none is left,
    dead >= none_left over `none_rows` rows (a few groups are all dead by chance, many are not), or the run had more:
    live <= half of its own best mean of 10 rows, by z_least standard errors of jitter sqrt(1/10 + 1/`recent_rows`).
    Else info: a policy that begins with few live groups may learn from them all the same, and groups that are all right
    are what success looks like.
    """

    name: ClassVar[str] = "no_learning_signal"
    says: ClassVar[str] = "Hardly any group teaches"
    cure: ClassVar[str] = "take prompts of another difficulty or a larger group"
    watches: ClassVar[str] = "zero_variance_share"
    needs: ClassVar[tuple[str, ...]] = ("zero_variance_share",)
    uses: ClassVar[tuple[str, ...]] = ("all_wrong_share", "all_correct_share", "reward")

    recent_rows: int = Field(5, ge=2, le=40, description="rows whose mean is judged")
    share: float = Field(0.75, gt=0, le=1, description="of the groups without a gradient")
    none_left: float = Field(0.95, gt=0, le=1, description="of the groups without a gradient: as good as all of them")
    none_rows: int = Field(15, ge=2, le=40, description="rows whose mean must reach none_left")
    z_least: float = Field(4.0, gt=0, description="standard errors that the fall of live groups must exceed")
    release: float = Field(0.60, gt=0, le=1, description="of the groups: recovered")

    def is_clear(self, window: Window) -> bool:
        return not window.mean(self.watches, self.recent_rows) >= self.share

    def check(self, window: Window) -> Finding | None:
        values = window.last("zero_variance_share", self.recent_rows)[1]
        if len(values) < self.recent_rows:
            return None
        dead = float(values.mean())
        wrong = window.mean("all_wrong_share", self.recent_rows)
        reward = window.mean("reward", self.recent_rows)
        hard = wrong >= dead / 2 if not math.isnan(wrong) else reward < 0.05
        which = "all wrong" if hard else "all right"
        best = window.bests.get(self.watches)
        long = window.last(self.watches, self.none_rows)[1]
        none = len(long) == self.none_rows and float(long.mean()) >= self.none_left
        error = window.jitter(self.watches) * math.sqrt(1 / BEST_ROWS + 1 / self.recent_rows)
        lost = best is not None and 1 - dead <= (1 - best.low) / 2 and dead - best.low >= self.z_least * error
        return Finding(
            breached=dead >= self.share,
            held=dead >= self.release,
            severity="warning" if hard and (none or lost) else "info",
            value=dead,
            baseline=window.baseline("zero_variance_share"),
            threshold=self.share,
            message=f"{dead:.0%} of the groups teach nothing: their rollouts are {which} (mean reward {reward:.3g}).",
            action="Take easier prompts, a larger group, or a better start: no update can find what no rollout shows."
            if hard
            else "The prompts are learnt: take harder ones, or stop.",
        )
