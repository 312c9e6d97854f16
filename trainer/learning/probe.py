"""The change of H2 that a step's updates made, beside the first-order prediction of it.

The probe computes logits at a small sample of the batch's positions, before the first and after the last optimizer
update of a step. It works in full precision, because bf16 logits would hide a step at lr 1e-6. The batch's mask fixes
the sample, so the probe draws no random numbers and changes no run. Cost: two forward passes over ROWS rollouts, at
most optim.micro_batch rows and micro_tokens tokens at once, in probed steps only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from monitor.signals.diagnostics import renyi2_changes
from trainer.flow import TokenBatch
from trainer.policy import policy as policy_module
from trainer.policy.micro_batches import MicroBatches
from trainer.policy.policy import Policy

ROWS, POSITIONS = 8, 256


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Chosen positions of some rollouts and their logits before the update, float32 [M, V]."""

    batch: TokenBatch
    rows: Tensor
    columns: Tensor
    temperature: float
    micro: MicroBatches
    logits: Tensor


def take_probe(
    policy: Policy,
    batch: TokenBatch,
    temperature: float,
    micro: MicroBatches = MicroBatches(ROWS),  # noqa: B008, frozen
) -> Probe:
    """The sample and its logits as they are now. Call this before the step's first update."""
    stride = -(-len(batch) // ROWS)
    part = TokenBatch(*(getattr(batch, spec.name)[::stride] for spec in fields(batch)))
    count = max(1, min(POSITIONS, policy_module.SLAB_ELEMENTS // (4 * policy.vocabulary)))
    rows, columns = spread(part.mask, count)
    logits = policy.logits_at(part, rows, columns, temperature, micro)
    return Probe(part, rows, columns, temperature, micro, logits)


def finish_probe(policy: Policy, probe: Probe) -> tuple[Tensor, Tensor]:
    """(predicted, true) change of H2 since `take_probe`, float64 [M], nats."""
    after = policy.logits_at(probe.batch, probe.rows, probe.columns, probe.temperature, probe.micro)
    return renyi2_changes(probe.logits, after)


def spread(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(rows, columns), int64 [count] each: response positions evenly spread over mask [N, T], without a host sync.

    If the mask has fewer than `count` positions, some repeat. Example: mask [[1, 1, 0], [1, 1, 0]] and count 2 give the
    positions (0, 0) and (1, 0).
    """
    number = mask.flatten().cumsum(0)  # 1 at the first response position, 2 at the second, ...
    wanted = torch.arange(count, device=mask.device) * number[-1] // count + 1
    flat = torch.searchsorted(number, wanted)
    return flat // mask.shape[1], flat % mask.shape[1]
