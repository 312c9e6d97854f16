"""Plain tensors in, a StepRecord out: the statistics of a step, computed on the device, copied to the host once.

Any training loop can use it (docs/own_loop.md). Call `signal_statistics` once for each rollout batch, `loss_statistics`
once for each optimizer update, and add up what these return. Call `step_record` at the end of the step. Statistics are
sums and counts; only `step_record` divides, so nothing is a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from monitor.metrics import DECIDED_NATS, METRICS, SPLITS
from monitor.records import Histogram, StepRecord, TokenTable
from monitor.signals.diagnostics import diagnostic_scalars, mismatch_sums, probe_sums, update_sums
from monitor.signals.histograms import DeviceHistograms, device_histograms, host_histograms, joint_histograms
from monitor.signals.types import TokenSignals

JOINT_SPLITS = ("all", "selected")
_SIGNAL_METRICS = ("entropy", "renyi2", "surprisal", "deviation", "weight")
_JOINT_METRICS = ("entropy*deviation", "probability*purity")
_MOMENTS = ("n", "n_nonfinite", "total", "sumsq")
_COLUMNS = ("logprob", "entropy", "renyi2", "deviation", "alive", "weight")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Additive statistics on the device: histograms by metric, and named sums (0-d float64)."""

    histograms: dict[str, DeviceHistograms]
    sums: dict[str, Tensor]

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            {key: self.histograms[key] + other.histograms[key] for key in self.histograms},
            {key: self.sums[key] + other.sums[key] for key in self.sums},
        )


def _edges(metric: str) -> str:
    edges = METRICS[metric].edges
    assert edges is not None, metric
    return edges


def _splits(mask: Tensor, weights: Tensor, correct: Tensor) -> Tensor:
    """bool [4, N*T] in the order of SPLITS."""
    right = correct.to(mask.device).bool().unsqueeze(1)
    return torch.stack([mask, mask & (weights > 0), mask & right, mask & ~right]).flatten(1)


def signal_statistics(
    signals: TokenSignals,
    mask: Tensor,
    weights: Tensor,
    correct: Tensor,
    *,
    advantages: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    sampler_ratio_max: float | None = None,
    probe: tuple[Tensor, Tensor] | None = None,
    lacking: Collection[str] = (),
) -> Statistics:
    """Histograms and sums of a rollout batch.

    signals, mask (bool), weights (float): [N, T]; correct: bool [N]. The others are optional, and each adds figures:
    advantages float [N], or [N, T] where tokens have their own, adds the regimes and, if the signals have moments, the
    predicted entropy changes.
    sampler_logprobs float [N, T], nats, adds the mismatch of sampler and trainer; with sampler_ratio_max, the loss's
    bound on their ratio, also the importance weights.
    probe (predicted, true) float [M] each, of `renyi2_changes`, adds how well the prediction held.
    lacking: which of entropy, renyi2 and deviation nobody measured, say where only log-probabilities are known. Their
    columns hold nan; nothing that needs them is counted.
    Returns Statistics on the same device.
    """
    splits = _splits(mask, weights, correct)
    values = {
        "entropy": signals.entropy,
        "renyi2": signals.renyi2,
        "surprisal": -signals.logprob,
        "deviation": signals.deviation,
        "weight": weights,
    }
    flat = {key: value.float().flatten() for key, value in values.items() if key not in lacking}
    histograms = {key: device_histograms(value, splits, _edges(key)) for key, value in flat.items()}
    joint: dict[str, tuple[Tensor, Tensor]] = {}
    sums: dict[str, Tensor] = {}
    if "entropy" in flat:
        decided = flat["entropy"] < DECIDED_NATS
        sums["decided"] = (splits[0] & decided).sum().double()
        sums["selected_decided"] = (splits[1] & decided).sum().double()
    if "deviation" in flat:
        silent = mask.any(1) & (torch.where(mask, signals.deviation, 0.0).sum(1) == 0)
        sums["unselectable_responses"] = silent.sum().double()
    if "entropy" in flat and "deviation" in flat:
        joint["entropy*deviation"] = (flat["entropy"], flat["deviation"])
    if "renyi2" in flat:
        joint["probability*purity"] = (torch.exp(-flat["surprisal"]), torch.exp(-flat["renyi2"]))
    for key, (a, b) in joint.items():
        histograms[key] = joint_histograms(a, b, splits[: len(JOINT_SPLITS)], _edges(key))
    if advantages is not None:
        sums |= update_sums(signals, mask, weights, advantages, with_regimes="renyi2" in flat)
    if sampler_logprobs is not None:
        sums |= mismatch_sums(signals.logprob, sampler_logprobs, mask, sampler_ratio_max)
    if probe is not None:
        sums |= probe_sums(*probe)
    return Statistics(histograms, sums)


def loss_statistics(
    mask: Tensor,
    weights: Tensor,
    correct: Tensor,
    log_ratio: Tensor,
    clipped_low: Tensor,
    clipped_high: Tensor,
    kl: Tensor,
) -> Statistics:
    """Statistics of one optimizer update over the tokens it used (weight > 0).

    Tensors are [N, T], as the loss used them; correct is bool [N]. Log-ratios exist only at tokens with weight > 0.
    """
    mask = mask & (weights > 0)
    log_ratio = log_ratio.detach().float()
    histogram = device_histograms(log_ratio.flatten(), _splits(mask, weights, correct), _edges("log_ratio"))

    def total(values: Tensor) -> Tensor:
        return torch.where(mask, values.detach().double(), 0.0).sum()

    sums = {
        "update_tokens": mask.sum().double(),
        "log_ratio_abs": total(log_ratio.abs()),
        "clip_share_low": total(clipped_low),
        "clip_share_high": total(clipped_high),
        "kl": total(kl),
    }
    return Statistics({"log_ratio": histogram}, sums)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies tensors of any dtypes and shapes to numpy in one transfer."""
    flat = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in flat.values()]).cpu().numpy()
    host, start = {}, 0
    for key, tensor in flat.items():
        size = tensor.numel() * tensor.element_size()
        dtype = torch.empty((), dtype=tensor.dtype).numpy().dtype
        host[key] = np.frombuffer(packed[start : start + size].tobytes(), dtype).reshape(tuple(tensor.shape))
        start += size
    return host


def step_record(
    step: int,
    signals: TokenSignals,
    token_ids: Tensor,
    mask: Tensor,
    weights: Tensor,
    signal_stats: Statistics,
    loss_stats: Statistics | None = None,
    *,
    scalars: Mapping[str, float | Tensor],
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> tuple[StepRecord, TokenTable]:
    """The record of a step and its tokens, with one device-to-host copy.

    `scalars` are added to the record as they are: floats, or 0-d tensors, which the same copy takes along. Tokens are
    numbered by row of the batch (`sample`) and response position. With several ranks, `sum_over_ranks` must add a
    float64 vector over them. It is called once. Means and shares are then those of all ranks; histograms and tokens
    stay those of this rank.
    """
    tensors: dict[str, Tensor] = {"token_id": token_ids.int(), "mask": mask}
    tensors |= {f"token/{key}": getattr(signals, key) for key in _COLUMNS[:-1]}
    tensors["token/weight"] = weights.float()
    for stats in (signal_stats, loss_stats):
        if stats is not None:
            tensors |= {f"sum/{key}": value for key, value in stats.sums.items()}
            for key, histogram in stats.histograms.items():
                tensors |= histogram.tensors(key)
    if sum_over_ranks is not None:
        tensors |= _summed(tensors, sum_over_ranks)
    tensors |= {f"scalar/{key}": value for key, value in scalars.items() if isinstance(value, Tensor)}
    host = to_host(tensors)
    histograms = _host_histograms(host)
    values = _scalars(_whole(histograms, host), host)
    values |= {key: float(host[f"scalar/{key}"]) if isinstance(v, Tensor) else float(v) for key, v in scalars.items()}
    return StepRecord(step, values, tuple(histograms.values())), _token_table(host)


def _summed(tensors: Mapping[str, Tensor], add: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All sums, and as "whole/..." the counts and moments of the histograms, added over ranks in one vector."""
    own = {
        key: tensor.double().reshape(-1)
        for key, tensor in tensors.items()
        if key.startswith("sum/") or key.endswith(tuple(f"/{moment}" for moment in _MOMENTS))
    }
    parts = add(torch.cat(list(own.values()))).split([len(vector) for vector in own.values()])
    added = dict(zip(own, parts, strict=True))
    return {
        key if key.startswith("sum/") else f"whole/{key}": vector.view(tensors[key].shape)
        for key, vector in added.items()
    }


def _whole(
    histograms: dict[tuple[str, str], Histogram], host: dict[str, np.ndarray]
) -> dict[tuple[str, str], Histogram]:
    """The histograms with the moments of all ranks, for means and shares. Their counts stay those of this rank."""
    if not any(key.startswith("whole/") for key in host):
        return histograms
    found = {}
    for (key, split), histogram in histograms.items():
        i = (JOINT_SPLITS if key in _JOINT_METRICS else SPLITS).index(split)
        n, bad, total, sumsq = (float(host[f"whole/{key}/{moment}"][i]) for moment in _MOMENTS)
        found[key, split] = replace(histogram, n=int(n), n_nonfinite=int(bad), sum=total, sumsq=sumsq)
    return found


def _host_histograms(host: dict[str, np.ndarray]) -> dict[tuple[str, str], Histogram]:
    found: list[Histogram] = []
    for key in (*_SIGNAL_METRICS, "log_ratio", *_JOINT_METRICS):
        if f"{key}/counts" in host:
            splits = JOINT_SPLITS if key in _JOINT_METRICS else SPLITS
            found += host_histograms(key, _edges(key), splits, host)
    return {(histogram.metric, histogram.split): histogram for histogram in found}


def _scalars(histograms: dict[tuple[str, str], Histogram], host: dict[str, np.ndarray]) -> dict[str, float]:
    """The means and shares that follow from the step's sums and counts."""
    weight = histograms["weight", "all"]
    tokens = max(weight.n, 1)
    measured = [key for key in ("entropy", "renyi2", "surprisal", "deviation") if (key, "all") in histograms]
    values = {key: histograms[key, "all"].mean for key in measured}
    values |= {
        f"{key}_selected": histograms[key, "selected"].mean for key in ("entropy", "deviation") if key in measured
    }
    if "entropy" in measured:
        values["decided_share"] = float(host["sum/decided"]) / tokens
        selected = max(histograms["entropy", "selected"].n, 1)
        values["selected_decided_share"] = float(host["sum/selected_decided"]) / selected
    if "deviation" in measured:
        values["unselectable_responses"] = float(host["sum/unselectable_responses"])
    values |= {
        "selected_share": histograms["weight", "selected"].n / tokens,
        "weight_mean": weight.sum / tokens,
        "effective_sample_share": weight.sum**2 / (tokens * weight.sumsq) if weight.sumsq else 0.0,
        "tokens": float(weight.n),
        "nonfinite": float(sum(h.n_nonfinite for (_, split), h in histograms.items() if split == "all")),
    }
    if "sum/update_tokens" in host:
        updated = max(float(host["sum/update_tokens"]), 1.0)
        for key in ("log_ratio_abs", "clip_share_low", "clip_share_high", "kl"):
            values[key] = float(host[f"sum/{key}"]) / updated
    sums = {key.removeprefix("sum/"): float(value) for key, value in host.items() if key.startswith("sum/")}
    return values | diagnostic_scalars(sums)


def _token_table(host: dict[str, np.ndarray]) -> TokenTable:
    sample, position = np.nonzero(host["mask"])
    columns = {key: host[f"token/{key}"][sample, position] for key in _COLUMNS}
    return TokenTable(
        sample=sample.astype(np.int32),
        position=position.astype(np.int32),
        token_id=host["token_id"][sample, position],
        **columns,
    )
