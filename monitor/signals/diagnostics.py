"""What an update is about to do to the entropy, what it did, and whether sampler and trainer agree.

Every figure is a ratio of sums: `*_sums` run on the device and add over parts of a batch, `diagnostic_scalars` divides
once on the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from monitor.signals.types import TokenSignals

Sums = dict[str, Tensor]  # name -> 0-d float64
PREDICTED = (
    "predicted_entropy_change",
    "predicted_renyi2_change",
    "predicted_entropy_lowering",  # the part of tokens whose step lowers the entropy
    "predicted_entropy_raising",  # the part of tokens whose step raises it; both add up to the change
)
_SIDES = ("", "_selected", "_positive", "_negative")  # all, weight > 0, advantage > 0, advantage < 0


def entropy_change(signals: TokenSignals, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """(dH1, dH2): the exact derivative of each token's entropies along its own policy-gradient step.

    The step moves the logits z (after division by the temperature) of the token's position by A (1[v = o] - p_v) per
    unit step size, o the sampled token with p = p_o and H = H1, beta = sum p^2:
        dH1 = -A [p (ln p + H) - sum_v p_v^2 (ln p_v + H)]
        dH2 = -2A [(p^2 / beta - p) - (sum p^3 / beta - beta)]
    Both have mean 0 over o ~ p. Each position steps alone: effects of a shared network on other positions, clipping,
    and KL and entropy terms are left out.

    signals: with moments; advantages float [N] or [N, T]. Returns float64 [N, T], nats per unit step, 0 where the mask
    is False. The absolute error is about 1e-7 |A| (1 + H).
    Raises: ValueError if the signals have no moments.
    Source: dH1 arXiv 2606.19236, theorem 3.1; dH2 derived here from eq. 3.1 of arXiv 2606.19771v1.
    """
    if signals.sum_p3 is None or signals.sum_p2_logp is None:
        raise ValueError("signals have no moments sum_p3 and sum_p2_logp. Call token_signals(..., moments=True).")
    logp, entropy = signals.logprob.double(), signals.entropy.double()
    p, beta = logp.exp(), torch.exp(-signals.renyi2.double())
    cubes, squares_logp = signals.sum_p3.double(), signals.sum_p2_logp.double()
    advantage = torch.where(signals.alive > 0, _of_tokens(advantages.double()), 0.0)
    shannon = -advantage * (p * (logp + entropy) - (squares_logp + beta * entropy))
    renyi2 = -2 * advantage * ((p * p / beta - p) - (cubes / beta - beta))
    return shannon, renyi2


def _of_tokens(advantages: Tensor) -> Tensor:
    """[N, 1] of advantages [N], which then hold for all tokens of a response; [N, T] as they are."""
    return advantages if advantages.ndim == 2 else advantages.unsqueeze(1)


def update_sums(
    signals: TokenSignals, mask: Tensor, weights: Tensor, advantages: Tensor, with_regimes: bool = True
) -> Sums:
    """Sums of the regimes, the predicted entropy change and Cov(ln p, A). mask, weights [N, T], advantages [N or N, T].

    with_regimes: False where H2 is not known.

    A token is in regime H if p(o) > beta, where raising it lowers H2, and in regime L if p(o) < beta. Source:
    arXiv 2606.19771v1, eq. 6.
    """
    advantages = advantages.to(mask.device).double()
    advantage = torch.where(mask, _of_tokens(advantages), 0.0)
    gap = signals.logprob + signals.renyi2  # ln p - ln beta
    sides = torch.stack([mask, mask & (weights > 0), advantage > 0, advantage < 0]).flatten(1)
    counts = torch.stack([torch.ones_like(mask), gap > 0, gap < 0]).flatten(1).double() @ sides.double().T
    sums = {
        f"{name}{side}": counts[i, j]
        for i, name in enumerate(("side_n", "regime_h_share", "regime_l_share") if with_regimes else ("side_n",))
        for j, side in enumerate(_SIDES)
    }
    logprob, weight = torch.where(mask, signals.logprob.double(), 0.0), torch.where(mask, weights.double(), 0.0)
    sums |= {
        "logprob": logprob.sum(),
        "advantage": advantage.sum(),
        "logprob_advantage": (logprob * advantage).sum(),
        "weight": weight.sum(),
    }
    if signals.sum_p3 is not None:
        for key, change in zip(("entropy", "renyi2"), entropy_change(signals, advantages), strict=True):
            sums[f"predicted_{key}_change"] = change.sum()
            sums[f"predicted_{key}_change_weighted"] = (weight * change).sum()
            if key == "entropy":
                for side, part in (("lowering", change.clamp(max=0.0)), ("raising", change.clamp(min=0.0))):
                    sums[f"predicted_entropy_{side}"] = part.sum()
                    sums[f"predicted_entropy_{side}_weighted"] = (weight * part).sum()
    return sums


def mismatch_sums(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, ratio_max: float | None = None) -> Sums:
    """Sums of the trainer's against the sampler's log-probabilities of the sampled tokens, all [N, T], nats.

    With d = ln p_trainer - ln p_sampler the sums are of |d|, of k3 = e^d - 1 - d, whose mean estimates
    KL(sampler || trainer), and of |d| > ln 2. Tokens with a non-finite d are counted and left out of these sums.
    ratio_max: the loss's bound on w = min(e^d, ratio_max), its importance weights; adds the sums of w, w^2 and of
    e^d > ratio_max.
    """
    d = (logprobs - sampler_logprobs).double()
    finite = mask & torch.isfinite(d)
    d = torch.where(finite, d, 0.0)
    weights: Sums = {}
    if ratio_max is not None:
        w = torch.where(finite, d.clamp(max=np.log(ratio_max)).exp(), 0.0)
        weights = {
            "sampler_ratio": w.sum(),
            "sampler_ratio_squares": w.square().sum(),
            "sampler_ratio_cut": (d > np.log(ratio_max)).sum().double(),
        }
    return weights | {
        "mismatch_n": finite.sum().double(),
        "sampler_mismatch": d.abs().sum(),
        "sampler_mismatch_k3": (torch.expm1(d) - d).sum(),
        "sampler_mismatch_beyond2": (d.abs() > np.log(2.0)).sum().double(),
        "sampler_mismatch_nonfinite": (mask & ~finite).sum().double(),
    }


def renyi2_changes(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(predicted, true) change of H2 between two sets of logits [M, V] of the same positions, float64 [M], nats.

    predicted = -2 sum_v dz_v (p2_v - p_v), with dz = after - before, and p and p2 = p^2 / sum p^2 of `before`.
    true = H2(after) - H2(before). All is float64, because a step at lr 1e-6 moves H2 by less than float32 resolves.
    Source: arXiv 2606.19771v1, eq. 3.1 and A.3.5.
    """
    old, new = (torch.log_softmax(z.double(), -1) for z in (before, after))
    p = old.exp()
    squared = torch.softmax(2 * old, -1)
    dz = torch.where(p > 0, new - old, 0.0)  # shifting all of dz changes nothing: p2 and p both sum to 1
    predicted = -2 * (dz * (squared - p)).sum(-1)
    return predicted, torch.logsumexp(2 * old, -1) - torch.logsumexp(2 * new, -1)


def probe_sums(predicted: Tensor, true: Tensor) -> Sums:
    """Sums from which the probe's means, mean absolute error and Pearson r follow. Non-finite pairs are left out."""
    finite = torch.isfinite(predicted) & torch.isfinite(true)
    x, y = (torch.where(finite, values.double(), 0.0) for values in (predicted, true))
    return {
        "probe_n": finite.sum().double(),
        "probe_x": x.sum(),
        "probe_y": y.sum(),
        "probe_xx": (x * x).sum(),
        "probe_yy": (y * y).sum(),
        "probe_xy": (x * y).sum(),
        "probe_error": (x - y).abs().sum(),
    }


def diagnostic_scalars(sums: Mapping[str, float]) -> dict[str, float]:
    """The scalars (keys of METRICS) that follow from the given sums. A share of zero tokens is left out."""
    found: dict[str, float] = {}
    if "side_n" in sums:
        found |= _update_scalars(sums)
    if sums.get("mismatch_n"):
        keys = ("sampler_mismatch", "sampler_mismatch_k3", "sampler_mismatch_beyond2")
        found |= {key: sums[key] / sums["mismatch_n"] for key in keys}
        if squares := sums.get("sampler_ratio_squares"):
            found |= {key: sums[key] / sums["mismatch_n"] for key in ("sampler_ratio", "sampler_ratio_cut")}
            found["sampler_ess"] = sums["sampler_ratio"] ** 2 / (sums["mismatch_n"] * squares)
    if "mismatch_n" in sums:
        found["sampler_mismatch_nonfinite"] = sums["sampler_mismatch_nonfinite"]
    if sums.get("answer_pairs"):
        found["same_answer_share"] = sums["same_answers"] / sums["answer_pairs"]
    if sums.get("probe_n"):
        found |= _probe_scalars(sums)
    return found


def _update_scalars(sums: Mapping[str, float]) -> dict[str, float]:
    found = {
        f"{regime}{side}": sums[f"{regime}{side}"] / sums[f"side_n{side}"]
        for regime in ("regime_h_share", "regime_l_share")
        for side in _SIDES
        if f"{regime}{side}" in sums and sums[f"side_n{side}"]
    }
    if n := sums["side_n"]:
        mean_product = sums["logprob_advantage"] / n
        found["logprob_advantage_cov"] = mean_product - sums["logprob"] / n * (sums["advantage"] / n)
        for key in PREDICTED:
            if key in sums:
                found[key] = sums[key] / n
                found[f"{key}_weighted"] = sums[f"{key}_weighted"] / sums["weight"] if sums["weight"] else 0.0
    return found


def _probe_scalars(sums: Mapping[str, float]) -> dict[str, float]:
    n = sums["probe_n"]
    x, y = sums["probe_x"] / n, sums["probe_y"] / n
    found = {"probe_predicted_change": x, "probe_true_change": y, "probe_error": sums["probe_error"] / n}
    spread = (sums["probe_xx"] / n - x * x) * (sums["probe_yy"] / n - y * y)
    if spread > 0:  # r is undefined for a policy that did not move
        found["probe_pearson"] = float(np.clip((sums["probe_xy"] / n - x * y) / np.sqrt(spread), -1.0, 1.0))
    return found
