"""Can a run learn? What rollouts of a policy show, what is wrong, and what helps. Pure: arrays in, findings out.

Only rewards that differ within a group make a gradient, so the shares of groups decide; the other figures say why. Each
stands beside a published criterion where there is one (`reference`): a line to look at, not a truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from monitor.records import StepRecord
from monitor.signals.diagnostics import diagnostic_scalars
from monitor.stats.paired import bootstrap_interval
from trainer.config import TrainConfig
from trainer.evaluate import pass_at_k

LOW_ENTROPY = 0.18  # nats, before any training: high risk (arXiv 2606.18487)
FEW_LIVE = 0.5  # share of groups; the criterion of p*(G)
MANY = 0.25  # of the rollouts: cut off, without an answer, without a reward. miles' dashboard has it for the first
MANY_REPEATED = 0.5  # ours: runs of four tokens, or pairs of rollouts, that are the same
MISMATCH = 0.01  # ours: share of tokens whose probability sampler and trainer see a factor of 2 apart
FIRST_ROLLOUTS = 200  # of a training run, after which `FirstRollouts` judges it
MIN_PROMPTS = 3  # for an interval


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """n rollouts of each of P prompts by one policy. Arrays [P, n].

    correct, truncated bool; lengths in tokens; repetition and same_text as in `monitor.signals.completions`. answered:
    the task finds an answer in it (None: only a reward of the user's own would know). rewarded: the reward function
    gave a number, not None. unended: {text of a special token that ends no response: how many of the truncated
    rollouts contain it}. sums: over all response tokens, "tokens", "entropy" (nats), "decided" and those of
    `monitor.signals.diagnostics.mismatch_sums`.
    """

    rewards: np.ndarray
    correct: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    repetition: np.ndarray
    same_text: np.ndarray
    answered: np.ndarray | None
    rewarded: np.ndarray
    sums: Mapping[str, float]
    unended: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval over prompts, None where there is none."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong and, in one sentence, what helps. critical: as it stands, learning is unlikely."""

    name: str
    severity: Literal["warning", "critical"]
    message: str


Figures = dict[str, Estimate]  # keys: see `reference`; a figure that is not known is left out


def signal_floor(group_size: int) -> float:
    """p*(G) = 1 - 2^(-1/G): a prompt that is solved with this chance has half of its groups all wrong.

    From (1 - p)^G = 1/2. Example: 0.083 for G = 8. Source: arXiv 2606.18487.
    """
    return 1.0 - 2.0 ** (-1.0 / group_size)


def group_shares(rewards: np.ndarray, correct: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt, the chance that a group of G has equal rewards, (all wrong, all correct), float64 [P] each.

    rewards float [P, n], correct bool [P, n], n >= G. Unbiased: with m of n rollouts at a reward, the chance that G of
    them drawn without replacement all have it is C(m, G) / C(n, G), whose mean over samples is p^G exactly; the plug-in
    (m / n)^G is too large. The two add up over rewards, by whether they are correct, and one less both is the share of
    live groups: with rewards 0 and 1 the mean of it is 1 - p^G - (1 - p)^G.
    Example: 1 of 4 correct, G = 2: all wrong C(3,2)/C(4,2) = 1/2, all correct 0, live 1/2.
    """
    samples = rewards.shape[1]
    wrong, right = np.zeros(len(rewards)), np.zeros(len(rewards))
    for row, values in enumerate(rewards):
        _, first, counts = np.unique(values, return_index=True, return_counts=True)
        equal = 1.0 - pass_at_k(samples - counts, samples, group_size)  # pass@k: not all k of those that miss
        is_right = correct[row][first]
        wrong[row], right[row] = equal[~is_right].sum(), equal[is_right].sum()
    return wrong, right


def figures_of(draws: Draws, group_size: int) -> Figures:
    """The figures of draws; of each share of rollouts or groups, the prompt is the unit of its interval."""
    samples = draws.correct.shape[1]
    n_correct = draws.correct.sum(1)
    wrong, right = group_shares(draws.rewards, draws.correct, group_size)
    whole = samples // group_size
    groups = draws.rewards[:, : whole * group_size].reshape(-1, whole, group_size)
    tokens = max(draws.sums["tokens"], 1.0)
    found = {
        "entropy": Estimate(draws.sums["entropy"] / tokens),
        "decided_share": Estimate(draws.sums["decided"] / tokens),
        "pass@1": _share(n_correct / samples),
        "pass@G": _share(pass_at_k(n_correct, samples, group_size)),
        "live_share": _share(1.0 - wrong - right),
        "equal_wrong_share": _share(wrong),
        "equal_correct_share": _share(right),
        "live_share_measured": _share((np.ptp(groups, axis=2) > 0).mean(1)),
        "truncated_share": _share(draws.truncated.mean(1)),
        "response_length": Estimate(float(draws.lengths.mean()), *_interval(draws.lengths.mean(1))),
        "no_reward_share": _share(1.0 - draws.rewarded.mean(1)),
        "repetition_share": _share(draws.repetition.mean(1)),
        "duplicate_share": _share(draws.same_text.mean(1) / (samples - 1)),
    }
    ended = ~draws.truncated
    if draws.answered is not None and ended.any():
        found["no_answer_share"] = Estimate(float((ended & ~draws.answered).sum() / ended.sum()))
    for key in ("sampler_mismatch", "sampler_mismatch_beyond2"):
        if key in (mismatch := diagnostic_scalars(draws.sums)):
            found[key] = Estimate(mismatch[key])
    return found


def _share(of_prompt: np.ndarray) -> Estimate:
    """The mean of shares [P], with a bootstrap interval over prompts; Wilson's where all prompts have 0, or all 1.

    There resampling would say that nothing else is possible. Source: Wilson 1927, for P draws.
    """
    n, mean = len(of_prompt), float(of_prompt.mean())
    if n >= MIN_PROMPTS and (mean == 0 or np.all(of_prompt == 1)):
        from scipy.stats import binomtest

        wilson = binomtest(round(mean * n), n).proportion_ci(method="wilson")
        return Estimate(mean, float(wilson.low), float(wilson.high))
    return Estimate(mean, *_interval(of_prompt))


def _interval(of_prompt: np.ndarray) -> tuple[float | None, float | None]:
    return bootstrap_interval(of_prompt) if len(of_prompt) >= MIN_PROMPTS else (None, None)


def figures_of_steps(steps: Sequence[Mapping[str, float]]) -> Figures:
    """The figures that scalars of METRICS of training steps hold, all of equal size; means over tokens by tokens.

    With n = G the estimates of `group_shares` are the shares that were met.
    """
    weights = np.array([step["tokens"] for step in steps])

    def mean(key: str) -> float:
        return float(np.mean([step[key] for step in steps]))

    equal = np.array([step["zero_variance_share"] for step in steps])
    right = np.minimum(equal, [step["all_correct_share"] for step in steps])  # a shaped reward may tell them apart
    found = {
        "pass@1": mean("correct_share"),
        "pass@G": 1.0 - mean("all_wrong_share"),
        "live_share": float(1.0 - equal.mean()),
        "equal_wrong_share": float((equal - right).mean()),
        "equal_correct_share": float(right.mean()),
    }
    found |= {key: mean(key) for key in ("truncated_share", "response_length", "repetition_share", "duplicate_share")}
    for key in ("entropy", "decided_share", "sampler_mismatch", "sampler_mismatch_beyond2"):
        if all(key in step for step in steps):
            found[key] = float(np.average([step[key] for step in steps], weights=weights))
    return {key: Estimate(value) for key, value in found.items()}


def findings(figures: Figures, config: TrainConfig, unended: str | None = None) -> list[Finding]:
    """What is wrong, the worst first. unended: see `unended_sentence`."""
    value = {key: estimate.mean for key, estimate in figures.items()}
    found = [*_groups(value, config), *_rollouts(value, config)]
    if unended:
        found = [finding for finding in found if finding.name != "truncated"] + [
            Finding("unended", "critical", unended)
        ]
    return sorted(found, key=lambda finding: finding.severity != "critical")


def unended_sentence(draws: Draws, config: TrainConfig) -> str | None:
    """Which special tokens the truncated rollouts contain, if most of them do: they would end there, were they told to.

    None where at most a quarter of the rollouts (MANY) is truncated, or no token is in half of the truncated ones.
    """
    cut = int(draws.truncated.sum())
    tokens = [token for token, rollouts in draws.unended.items() if rollouts >= 0.5 * cut]
    if cut <= MANY * draws.truncated.size or not tokens:
        return None
    listed = ", ".join(f'"{token}"' for token in tokens)
    return (
        f"{cut / draws.truncated.size:.0%} of {draws.truncated.size} rollouts were cut at "
        f"{config.rollout.max_new_tokens} tokens; they contain {' and '.join(tokens)}: set rollout.stop to [{listed}]."
    )


def _groups(value: Mapping[str, float], config: TrainConfig) -> list[Finding]:
    """Too few groups whose rewards differ. All wrong and all correct have opposite cures."""
    live, wrong, right = value["live_share"], value["equal_wrong_share"], value["equal_correct_share"]
    per_step, group_size = config.rollout.prompts, config.rollout.group_size
    idle = (1.0 - live) ** per_step  # steps without a live group
    if live >= FEW_LIVE:
        return []
    harder = "harder prompts, or leave out those that are always right"
    easier = f"easier prompts, a larger rollout.group_size (now {group_size}), or a policy that is right more often"
    mixed = min(wrong, right) > 0.2
    cure = "prompts between the two" if mixed else easier if wrong > right else harder
    groups = (
        f"{live:.1%} of groups have rewards that differ ({wrong:.1%} are equal and all wrong, {right:.1%} equal and "
        "all correct)"
    )
    steps = f", so that {idle:.0%} of steps of {per_step} groups have no gradient at all" if idle > 0.005 else ""
    name = "mixed_groups" if mixed else "all_wrong_groups" if wrong > right else "all_correct_groups"
    return [Finding(name, "critical" if idle > 0.5 else "warning", f"Only {groups}{steps}: take {cure}.")]


def _rollouts(value: Mapping[str, float], config: TrainConfig) -> list[Finding]:
    """What may be wrong with the policy, its completions and their reading."""
    rollout, found = config.rollout, []

    def warn(name: str, message: str) -> None:
        found.append(Finding(name, "warning", message))

    def share(key: str) -> float:
        return value.get(key, 0.0)

    if value.get("entropy", LOW_ENTROPY) < LOW_ENTROPY:
        warn(
            "low_entropy",
            f"The entropy is {value['entropy']:.3f} nat before training, where under {LOW_ENTROPY} is a high risk: "
            f"raise rollout.temperature (now {rollout.temperature:g}), or take a policy that still explores.",
        )
    if (cut := share("truncated_share")) > MANY:
        warn(
            "truncated",
            f"{cut:.0%} of rollouts are cut off at rollout.max_new_tokens (now {rollout.max_new_tokens}), maybe "
            "before their answer: raise it, or ask for shorter answers.",
        )
    if (unread := share("no_answer_share")) > MANY:
        warn(
            "no_answer",
            f"{unread:.0%} of rollouts that ended give no answer where the reward looks for one: show the form in the "
            "prompts, or take a policy that keeps to it.",
        )
    if (none := share("no_reward_share")) > MANY:
        warn(
            "no_reward",
            f"The reward function gives None for {none:.0%} of rollouts, which counts as 0: have it return a number "
            "for each, or take prompts that it applies to.",
        )
    if (repeated := share("repetition_share")) > MANY_REPEATED:
        warn(
            "repetition",
            f"{repeated:.0%} of runs of four tokens stood in the same rollout before: take another policy or prompt "
            "format, or raise rollout.temperature.",
        )
    if (same := share("duplicate_share")) > MANY_REPEATED:
        warn(
            "duplicates",
            f"Two rollouts of a group are the same text in {same:.0%} of pairs: raise rollout.temperature (now "
            f"{rollout.temperature:g}), or take a policy that still explores.",
        )
    if (beyond := share("sampler_mismatch_beyond2")) > MISMATCH:
        partial = rollout.top_k or rollout.top_p < 1 or rollout.min_p
        cure = "leave out rollout.top_k, top_p and min_p" if partial else "set rollout.backend to generate"
        message = (
            f"Sampler and trainer differ by more than a factor of 2 in the probability of {beyond:.1%} of tokens, so "
            f"that gradients are of another policy than the one that sampled: {cure}."
        )
        found.append(Finding("sampler_mismatch", "critical", message))
    return found


def reference(key: str, group_size: int) -> str:
    """The criterion that a figure stands beside, with its source, or what it means."""
    floor = signal_floor(group_size)
    told = {
        "entropy": f"under {LOW_ENTROPY} before training: high risk (arXiv 2606.18487)",
        "pass@1": f"signal floor p*({group_size}) = {floor:.3f}: half of the groups all wrong (arXiv 2606.18487)",
        "pass@G": "one success nearly saturates a problem at high k (arXiv 2606.15455)",
        "live_share": f"of rewards 0 and 1: mean of 1 - p^{group_size} - (1-p)^{group_size} over prompts",
        "equal_wrong_share": "above 50 %: under the signal floor; easier prompts, larger groups",
        "equal_correct_share": "no gradient either; harder prompts",
        "live_share_measured": "under 50 % miles' dashboard advises",
        "truncated_share": f"above {MANY:.0%} miles' dashboard advises",
        "no_answer_share": f"none published; ours: {MANY:.0%}",
        "no_reward_share": f"counts as 0; none published; ours: {MANY:.0%}",
        "repetition_share": f"none published; ours: {MANY_REPEATED:.0%}",
        "duplicate_share": f"none published; ours: {MANY_REPEATED:.0%}",
        "decided_share": "none published; what sparse weightings by rank mostly pick",
        "sampler_mismatch": "rounding: about 1e-6 in float32, 1e-2 in bfloat16",
        "sampler_mismatch_beyond2": f"none published; ours: {MISMATCH:.0%}",
    }
    return told.get(key, "")


class FirstRollouts:
    """Judges a training run once by its first FIRST_ROLLOUTS rollouts, which it has anyway: called with each record.

    Returns what is wrong, in at most two sentences, or None. A resumed run is past that and never judged.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._of_step = config.rollout.prompts * config.rollout.group_size
        self._steps: list[Mapping[str, float]] = []

    def __call__(self, record: StepRecord) -> str | None:
        wanted = -(-FIRST_ROLLOUTS // self._of_step)
        if record.step > wanted or record.step != len(self._steps) + 1:
            return None
        self._steps.append(record.scalars)
        if len(self._steps) < wanted:
            return None
        found = findings(figures_of_steps(self._steps), self._config)
        told = " ".join(finding.message for finding in found[:2])
        return f"The first {wanted * self._of_step} rollouts: {told}" if found else None
