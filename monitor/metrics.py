"""METRICS: the one table of everything that is recorded.

Names, units, labels, help texts, good directions and histogram edges are written here once; the
trainer, the store, the figures and docs/metrics.md read them from here.

Histogram cells are half-open, `low <= value < high`, over the whole real line: the first cell reaches
down to -inf and the last up to +inf. So every value is counted, and counts add exactly over micro-batches, ranks
and steps. Edges are float32 because the device compares float32 values with exactly these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from monitor.errors import nearest

Direction = Literal["up", "down", "band", "none"]
SPLITS = ("all", "selected", "correct", "incorrect")  # splits of the token histograms
DECIDED_NATS = 0.05  # a token below this entropy is called decided


@dataclass(frozen=True, slots=True)
class Metric:
    """One recorded quantity. `good` is the direction a user hopes for; "band": both very low and very high are bad."""

    key: str
    label: str
    unit: str
    help: str
    good: Direction = "none"
    edges: str | None = None  # id in EDGES if a histogram of it is recorded


def _log_edges(low: float, high: float, bins: int) -> np.ndarray:
    return np.geomspace(low, high, bins + 1).astype(np.float32)


def _symlog_edges(low: float, high: float, bins: int) -> np.ndarray:
    side = _log_edges(low, high, bins)
    return np.concatenate([-side[::-1], side])


def _weight_edges() -> np.ndarray:
    """0 and 1 have cells of their own: [0, 1e-6) and [1, 1 + 1e-6)."""
    one = np.float32(1.0)
    return np.concatenate(
        [
            np.array([0.0], np.float32),
            _log_edges(1e-6, 1.0, 24)[:-1],
            np.array([one, one + np.float32(1e-6)], np.float32),
            _log_edges(1.1, 100.0, 24),
        ]
    )


_EDGES_1D = {
    "nats96": lambda: _log_edges(1e-4, 12.0, 96),  # entropy, renyi2, surprisal: a near-zero cell below 1e-4
    "deviation96": lambda: _log_edges(1e-6, float(np.log(2.0)), 96),
    "log_ratio80": lambda: _symlog_edges(1e-6, 10.0, 40),
    "weight": _weight_edges,
    "nats24": lambda: _log_edges(1e-3, 12.0, 24),  # coarse axes of the joint counts
    "deviation24": lambda: _log_edges(1e-5, float(np.log(2.0)), 24),
    "probability20": lambda: np.linspace(0.0, 1.0, 21)[1:].astype(np.float32),
}


@cache
def inner_edges(edges_id: str) -> np.ndarray:
    """Finite cell borders, ascending float32 [cells - 1]. A joint id "a*b" has no borders of its own."""
    if edges_id not in _EDGES_1D:
        raise ValueError(f"Unknown edges {edges_id!r}. Known: {', '.join(_EDGES_1D)}.")
    edges = _EDGES_1D[edges_id]()
    edges.setflags(write=False)
    return edges


def cell_bounds(edges_id: str) -> tuple[np.ndarray, np.ndarray]:
    """(lows, highs) of every cell, float64 [cells], the first low -inf and the last high +inf."""
    inner = inner_edges(edges_id).astype(np.float64)
    return np.concatenate([[-np.inf], inner]), np.concatenate([inner, [np.inf]])


def n_cells(edges_id: str) -> int:
    """Number of cells; of a joint id "a*b" the product, counts being row-major [cells(a), cells(b)]."""
    return int(np.prod([len(inner_edges(part)) + 1 for part in edges_id.split("*")]))


EDGES_IDS = tuple(_EDGES_1D)


def _table(*metrics: Metric) -> dict[str, Metric]:
    return {metric.key: metric for metric in metrics}


METRICS: dict[str, Metric] = _table(
    # learning
    Metric("reward", "Reward", "", "Mean reward of the step's rollouts.", "up"),
    Metric("reward_std", "Reward spread", "", "Standard deviation of the reward over the step's rollouts."),
    Metric("correct_share", "Correct", "share", "Share of rollouts with reward >= the task's correct_at.", "up"),
    Metric("zero_variance_share", "Zero-variance groups", "share",
           "Share of groups whose rewards are all equal. Such groups give no advantage and no gradient.", "down"),
    Metric("sampling_rounds", "Sampling rounds", "rounds",
           "How often the step sampled its number of prompts, to replace groups whose rewards are all equal."),
    Metric("reward_sampled", "Reward, all sampled", "",
           "Mean reward of every rollout that was sampled for the step, those of replaced groups included: what the "
           "policy can do, while the reward of the step's rollouts is that of chosen groups.", "up"),
    Metric("reward_timeout_share", "Rewards out of time", "share",
           "Share of rewards whose function took longer than reward_seconds in a worker, or ended its process. Such a "
           "completion has no reward from it.", "down"),
    Metric("all_correct_share", "All-correct groups", "share",
           "Share of groups whose rollouts are all correct. Their prompts are learnt and teach nothing more."),
    Metric("all_wrong_share", "All-wrong groups", "share",
           "Share of groups without a correct rollout. Their prompts are too hard and teach nothing.", "down"),
    Metric("duplicate_share", "Same text", "share",
           "Chance that two rollouts of a group are equal token by token. A rising one means that variety is lost.",
           "down"),
    Metric("same_answer_share", "Same correct answer", "share",
           "Chance that two correct rollouts of a group gave the same canonical answer; recorded only for tasks that "
           "have canonical answers.", "down"),
    Metric("repetition_share", "Repetition", "share",
           "Share of a response's four-token sequences that occurred earlier in it; mean over responses.", "down"),
    Metric("response_length", "Response length", "tokens", "Mean number of response tokens."),
    Metric("truncated_share", "Truncated", "share", "Share of rollouts cut off at rollout.max_new_tokens.", "down"),
    # the distributions, recorded as histograms; the mean of each is also a scalar of the same key
    Metric("entropy", "Entropy", "nats", "Shannon entropy H1 of the policy's next-token distribution at each "
           "response position, at the sampling temperature; mean over all response tokens.", "band", "nats96"),
    Metric("renyi2", "Renyi-2 entropy", "nats", "-ln sum p^2 at each response position; mean over all response "
           "tokens. H2 <= H1. If only H1 rises, the tail of the distribution gets noisier; if only H2 falls, its peak "
           "gets sharper.",
           "band", "nats96"),
    Metric("surprisal", "Surprisal", "nats", "-ln p of the sampled token.", "none", "nats96"),
    Metric("deviation", "Deviation", "nats", "Jensen-Shannon divergence of a rollout's next-token distribution from "
           "the mean of its group's alive rollouts at the same response position (0 to 0.50 with 8 alive).",
           "none", "deviation96"),
    Metric("log_ratio", "Log-ratio", "nats", "ln p_new - ln p_old of the sampled token, over the tokens the update "
           "used (weight > 0).", "none",
           "log_ratio80"),
    Metric("weight", "Weight", "", "The token's weight in the loss.", "none", "weight"),
    Metric("entropy*deviation", "Entropy x deviation", "tokens", "Joint counts of entropy and deviation: they show "
           "which entropy the deviating tokens have.", "none", "nats24*deviation24"),
    Metric("probability*purity", "Probability x purity", "tokens", "Joint counts of the sampled token's p against "
           "beta = sum p^2: above the diagonal (p > beta) raising p lowers H2.", "none",
           "probability20*probability20"),
    # what the weighting picks
    Metric("selected_share", "Selected tokens", "share", "Share of response tokens with weight > 0."),
    Metric("entropy_selected", "Entropy, selected", "nats", "Mean entropy of tokens with weight > 0."),
    Metric("deviation_selected", "Deviation, selected", "nats", "Mean deviation of tokens with weight > 0."),
    Metric("decided_share", "Decided tokens", "share", "Share of response tokens with entropy below 0.05 nat."),
    Metric("selected_decided_share", "Decided among selected", "share",
           "Share of the tokens with weight > 0 whose entropy is below 0.05 nat."),
    Metric("unselectable_responses", "Unselectable responses", "responses",
           "Number of responses whose deviations are all 0. The ict weightings give them weight 1 everywhere."),
    Metric("weight_mean", "Mean weight", "", "sum(weight) / tokens: the update's step size as a share of the dense "
           "one's, with weighting.normalise = \"all\"."),
    Metric("effective_sample_share", "Effective sample share", "share",
           "(sum w)^2 / (tokens * sum w^2): 1 for equal weights."),
    # what the update is about to do to the entropy, and whether it did
    *(Metric(f"regime_{regime.lower()}_share{side}", f"Regime {regime}{name}", "share",
             f"Share of {tokens} whose sampled token has p {sign} beta = sum p^2: raising its logit {effect} H2.")
      for regime, sign, effect in (("H", ">", "lowers"), ("L", "<", "raises"))
      for side, name, tokens in (("", "", "response tokens"), ("_selected", ", selected", "tokens with weight > 0"),
                                 ("_positive", ", advantage > 0", "tokens with advantage > 0"),
                                 ("_negative", ", advantage < 0", "tokens with advantage < 0"))),
    *(Metric(f"predicted_{key}_change{side}", f"Predicted d{name}{label}", "nats",
             f"First-order change of {name} along each token's own policy-gradient step, per unit step of its logits; "
             f"mean over response tokens{how}. Below 0: the update lowers entropy.")
      for key, name in (("entropy", "H1"), ("renyi2", "H2"))
      for side, label, how in (("", "", ""), ("_weighted", ", weighted", ", weighted as in the loss"))),
    *(Metric(f"predicted_entropy_{side}{suffix}", f"Predicted dH1, {side}{label}", "nats",
             f"The part of the predicted dH1 that comes from tokens whose step {verb} the entropy; mean over response "
             f"tokens{how}. The lowering and the raising part add up to the predicted dH1.")
      for side, verb in (("lowering", "lowers"), ("raising", "raises"))
      for suffix, label, how in (("", "", ""), ("_weighted", ", weighted", ", weighted as in the loss"))),
    Metric("logprob_advantage_cov", "Cov(ln p, advantage)", "nats",
           "Covariance of the sampled tokens' ln p with their advantage, over response tokens. Above 0, the update "
           "reinforces likely tokens and entropy falls."),
    Metric("probe_predicted_change", "Predicted dH2, probe", "nats",
           "First-order change of H2 that the measured change dz of the logits implies: -2 sum_v dz_v (p2_v - p_v), "
           "p2 = p^2 / sum p^2. Mean over a fixed sample of positions, every record.probe_every steps."),
    Metric("probe_true_change", "True dH2, probe", "nats",
           "Change of H2 over the step's updates at the probe's positions, mean."),
    Metric("probe_error", "Probe error", "nats",
           "Mean |predicted - true| change of H2 at the probe's positions: what the first order misses.", "down"),
    Metric("probe_pearson", "Probe correlation", "",
           "Pearson r of predicted and true change of H2 over the probe's positions.", "up"),
    # the update
    Metric("loss", "Loss", "", "The scalar that was differentiated, mean over the step's optimizer updates."),
    Metric("kl", "KL to reference", "nats",
           "Estimate of KL(policy || reference) by loss.kl_estimator, before any bias correction; mean over the tokens "
           "the update used."),
    Metric("clip_share_low", "Clipped low", "share",
           "Share of the tokens the update used that were clipped: ratio < 1 - clip_low, advantage < 0."),
    Metric("clip_share_high", "Clipped high", "share",
           "Share of the tokens the update used that were clipped: ratio > 1 + clip_high, advantage > 0."),
    Metric("log_ratio_abs", "Mean |log-ratio|", "nats",
           "Mean |ln p_new - ln p_old| over the tokens the step's updates used."),
    Metric("sampler_mismatch", "Sampler mismatch", "nats",
           "Mean |ln p_trainer - ln p_sampler| of sampled tokens, before the update. It should be numerical noise; "
           "with rollout.top_k, top_p or min_p it is -ln of the probability of the tokens that may be drawn.",
           "down"),
    Metric("sampler_mismatch_k3", "Sampler mismatch, k3", "nats",
           "Mean of r - 1 - ln r, r = p_trainer / p_sampler of the sampled tokens: an estimate of "
           "KL(sampler || trainer) that a few large deviations dominate.", "down"),
    Metric("sampler_mismatch_beyond2", "Mismatch beyond 2", "share",
           "Share of sampled tokens whose p_trainer / p_sampler is above 2 or below 1/2.", "down"),
    Metric("sampler_mismatch_nonfinite", "Mismatch, non-finite", "tokens",
           "Number of sampled tokens whose ln p_trainer - ln p_sampler is not finite. Means leave them out.", "down"),
    Metric("sampler_ratio", "Importance weight", "",
           "Mean of w = min(p_trainer / p_sampler, loss.sampler_ratio_max) of the sampled tokens, by which the loss "
           "multiplies them. Only where loss.sampler_ratio_max is set."),
    Metric("sampler_ratio_cut", "Importance weights cut", "share",
           "Share of sampled tokens whose p_trainer / p_sampler is above loss.sampler_ratio_max.", "down"),
    Metric("sampler_ess", "Effective sample size", "share",
           "(sum w)^2 / (n sum w^2) of the importance weights w: the share of the n sampled tokens that would say as "
           "much if sampler and trainer agreed.", "up"),
    Metric("grad_norm", "Gradient norm", "", "Global gradient norm before clipping, mean over the step's updates."),
    Metric("lr", "Learning rate", "", "Learning rate of the step's last update."),
    Metric("temperature", "Sampling temperature", "",
           "Temperature of the step's sampler, signals and loss; it moves only under loss.entropy_target."),
    Metric("entropy_coef", "Entropy coefficient", "",
           "Coefficient of the entropy bonus in the step's loss; it moves only under loss.entropy_target."),
    Metric("budget_share", "Budget share", "",
           "Share of the entropy loss of uniform weights that a budget weighting allows the step, once its warm-up is "
           "over; it moves only under loss.entropy_target."),
    Metric("nonfinite", "Non-finite values", "values", "Number of non-finite signals in the step.", "down"),
    Metric("tokens", "Response tokens", "tokens", "Number of response tokens in the step."),
    # machine-dependent
    Metric("perf/step_s", "Step time", "s", "Wall time of the step, recording included.", "down"),
    Metric("perf/rollout_s", "Rollout time", "s", "Wall time of sampling.", "down"),
    Metric("perf/update_s", "Update time", "s", "Wall time of signals, loss, backward and optimizer.", "down"),
    Metric("perf/record_s", "Recording time", "s",
           "Time that recording took from the training thread, for statistics, host copy and hand-over.", "down"),
    Metric("perf/extra_forward_s", "Extra forward", "s",
           "Time of forward passes without gradient that only the weighting of an attached trainer needed.", "down"),
    Metric("perf/tokens_per_s", "Throughput", "tokens/s", "Response tokens per second of step time.", "up"),
    Metric("perf/memory_gib", "Peak memory", "GiB", "Peak memory of the device on CUDA, else of the process.", "down"),
    Metric("perf/queue", "Recorder queue", "steps", "Steps waiting in the recorder's queue.", "down"),
)  # fmt: skip

EVAL_SPLITS = ("heldout", "ood", "multipath", "train")
_EVAL = {
    "pass@": Metric("pass@", "pass@{k}", "share", "Unbiased estimate of the chance that at least one of k samples "
                    "is correct (Chen et al. 2021), mean over the split's prompts.", "up"),
    "distinct": Metric("distinct", "Distinct correct answers", "answers", "Distinct canonical forms among the "
                       "correct samples of a prompt, mean over prompts.", "up"),
    "response_length": Metric("response_length", "Response length", "tokens", "Mean tokens of evaluated responses."),
    "truncated_share": Metric("truncated_share", "Truncated", "share",
                              "Share of the evaluation's samples cut off at rollout.max_new_tokens.", "down"),
}  # fmt: skip
_REWARD = Metric("reward/", "Reward of {name}", "", "Mean of one of several reward functions over the step's rollouts.",
                 "up")  # fmt: skip


def metric(key: str) -> Metric:
    """The Metric of a recorded key; "eval/<split>/<name>" and "reward/<function>" keys have templates.

    Raises ValueError with the nearest known name for an unknown key.
    """
    if key in METRICS:
        return METRICS[key]
    function = key.removeprefix(_REWARD.key)
    if function and function != key:
        return Metric(key, _REWARD.label.format(name=function), _REWARD.unit, _REWARD.help, _REWARD.good)
    parts = key.split("/")
    if len(parts) == 3 and parts[0] == "eval":
        split, name = parts[1], parts[2]
        for prefix, template in _EVAL.items():
            k = name.removeprefix(prefix) if prefix == "pass@" else ""
            if k.isdigit() if prefix == "pass@" else name == prefix:
                label = template.label.format(k=k)
                return Metric(key, f"{label}, {split}", template.unit, template.help, template.good)
    raise ValueError(f"Unknown metric {key!r}.{nearest(key, METRICS)} Known metrics are listed in docs/metrics.md.")


NAME_LENGTH = 200  # characters of the name of a scalar
MOST_OTHERS = 2_000  # names of scalars that METRICS does not know; readers keep all series of a run in memory


def can_be_named(key: object) -> bool:
    """Whether a scalar may be recorded under this name: printable text of 1 to NAME_LENGTH characters."""
    return isinstance(key, str) and key.isprintable() and 0 < len(key) <= NAME_LENGTH


def is_known(key: str) -> bool:
    """Whether `metric` knows the key."""
    try:
        metric(key)
    except ValueError:
        return False
    return True
