"""Histograms on the device: counts over the fixed cells of monitor.metrics, several splits at once, no host sync."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from monitor.metrics import inner_edges, n_cells
from monitor.records import Histogram


@dataclass(frozen=True, slots=True, eq=False)
class DeviceHistograms:
    """One metric over S splits, on the device. `a + b` is the histogram of the joined tokens.

    counts int64 [S, cells]; n, n_nonfinite int64 [S]; total, sumsq, low, high float64 [S] over finite values.
    """

    counts: Tensor
    n: Tensor
    n_nonfinite: Tensor
    total: Tensor
    sumsq: Tensor
    low: Tensor
    high: Tensor

    def __add__(self, other: DeviceHistograms) -> DeviceHistograms:
        return DeviceHistograms(
            self.counts + other.counts,
            self.n + other.n,
            self.n_nonfinite + other.n_nonfinite,
            self.total + other.total,
            self.sumsq + other.sumsq,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}/{spec.name}": getattr(self, spec.name) for spec in fields(self)}


def _cells(values: Tensor, edges_id: str) -> Tensor:
    """Cell index of each value: low <= value < high, compared in float32."""
    edges = torch.as_tensor(np.array(inner_edges(edges_id)), device=values.device)
    return torch.bucketize(values.float(), edges, right=True)


def device_histograms(values: Tensor, splits: Tensor, edges_id: str) -> DeviceHistograms:
    """Histograms of values float [M] over each of splits bool [S, M]. Non-finite values are counted separately."""
    finite = torch.isfinite(values)
    counted = splits & finite
    return _count(_cells(torch.where(finite, values, 0.0), edges_id), values, counted, splits, n_cells(edges_id))


def joint_histograms(a: Tensor, b: Tensor, splits: Tensor, edges_id: str) -> DeviceHistograms:
    """Joint counts of (a, b), both [M], over cells "x*y", row-major; sums and bounds are those of a * b."""
    edges_a, edges_b = edges_id.split("*")
    finite = torch.isfinite(a) & torch.isfinite(b)
    clean_a, clean_b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
    cell = _cells(clean_a, edges_a) * n_cells(edges_b) + _cells(clean_b, edges_b)
    return _count(cell, clean_a * clean_b, splits & finite, splits, n_cells(edges_id))


def _count(cell: Tensor, values: Tensor, counted: Tensor, splits: Tensor, cells: int) -> DeviceHistograms:
    counts = torch.zeros(len(splits), cells, dtype=torch.int64, device=cell.device)
    counts.scatter_add_(1, cell.expand(len(splits), -1), counted.long())
    inside = torch.where(counted, values.double(), 0.0)
    n = counted.sum(1)
    inf = torch.full((), torch.inf, dtype=torch.float64, device=cell.device)
    if values.numel() == 0:
        low, high = inf.expand(len(splits)), -inf.expand(len(splits))
    else:
        low = torch.where(counted, values.double(), inf).amin(1)
        high = torch.where(counted, values.double(), -inf).amax(1)
    return DeviceHistograms(counts, n, splits.sum(1) - n, inside.sum(1), (inside * inside).sum(1), low, high)


def host_histograms(
    metric: str, edges_id: str, splits: tuple[str, ...], host: dict[str, np.ndarray]
) -> list[Histogram]:
    """The frozen Histograms of one metric from the host copy of `DeviceHistograms.tensors(metric)`."""
    return [
        Histogram(
            metric=metric,
            split=split,
            edges_id=edges_id,
            counts=host[f"{metric}/counts"][i],
            n=int(host[f"{metric}/n"][i]),
            n_nonfinite=int(host[f"{metric}/n_nonfinite"][i]),
            sum=float(host[f"{metric}/total"][i]),
            sumsq=float(host[f"{metric}/sumsq"][i]),
            min=float(host[f"{metric}/low"][i]),
            max=float(host[f"{metric}/high"][i]),
        )
        for i, split in enumerate(splits)
    ]
