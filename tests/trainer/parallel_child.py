"""One rank of test_parallel: replays its groups of a saved batch through five SGD updates and saves what it saw.

torchrun ... parallel_child.py BATCH.pt OUT LOSS MICRO_BATCH replicate|shard|shard-half WEIGHTING
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import fields

import torch
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from monitor.signals.stats import signal_statistics, step_record
from trainer.config import TrainConfig
from trainer.flow import TokenBatch
from trainer.policy.policy import Policy
from trainer.policy.sources import resolve_model
from trainer.runtime.ranks import Ranks, join_ranks, leave_ranks, whole
from trainer.update import Updater

STEPS, GROUP = 5, 4


class Traffic:
    """How often FSDP gathered so many bytes, and the types in which it summed gradients."""

    def __init__(self) -> None:
        self.gathered, self.reduced = Counter(), set()
        gather, reduce = DefaultAllGather.__call__, DefaultReduceScatter.__call__

        def gathering(comm, output_tensor, *rest, **named):
            self.gathered[output_tensor.nbytes] += 1
            return gather(comm, output_tensor, *rest, **named)

        def reducing(comm, output_tensor, input_tensor, *rest, **named):
            self.reduced.add(input_tensor.dtype)
            return reduce(comm, output_tensor, input_tensor, *rest, **named)

        DefaultAllGather.__call__, DefaultReduceScatter.__call__ = gathering, reducing


class Recording(torch.optim.SGD):
    """SGD that keeps the gradients of its first step."""

    def step(self, closure=None):
        if not hasattr(self, "first"):
            self.first = [whole(p.grad).clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def replay(batch: TokenBatch, ranks: Ranks, loss: str, micro_batch: int, mode: str, kind: str) -> dict[str, object]:
    """Weights and gradients of the first update, parameters after five, the record of the last step."""
    config = TrainConfig(
        rollout={"prompts": 4, "group_size": GROUP},
        weighting={"kind": kind, "warmup_steps": 0} | ({"keep": 0.3} if kind == "ict" else {}),
        loss={"kind": loss, "kl_coef": 0.01},
        optim={"grad_clip": 1e9, "micro_batch": micro_batch},
    )
    spread = ranks if mode.startswith("shard") else Ranks()
    policy = Policy.load(resolve_model("builtin"), torch.device("cpu"), spread=spread)
    reference = Policy.load(resolve_model("builtin"), torch.device("cpu"), spread=spread)
    if mode.startswith("shard"):
        assert (next(policy.model.parameters()).device.type == "meta") == (ranks.rank > 0), "rank 0 alone reads weights"
        for each in (policy, reference):
            each.shard(ranks, half_layers=mode == "shard-half")
    elif mode == "half":  # what CUDA's autocast does
        policy._half_layers = reference._half_layers = True
    updater = Updater(policy, reference, config, ranks)
    updater.optimizer = Recording(updater.trained, lr=0.05)
    updates = [updater.update(batch, step) for step in range(1, STEPS + 1)]
    update = updates[-1]
    statistics = signal_statistics(update.signals, batch.mask, update.weights, batch.correct)
    add = ranks.sum if ranks.world > 1 else None
    record, tokens = step_record(
        STEPS, update.signals, batch.token_ids, batch.mask, update.weights, statistics, update.loss_stats,
        scalars={"loss": update.loss}, sum_over_ranks=add,
    )  # fmt: skip
    return {
        "weights": updates[0].weights,
        "gradients": updater.optimizer.first,
        "parameters": [whole(p.detach()) for p in policy.trained().values()],
        "record": record,
        "tokens": tokens,
        "kept": {p.dtype for p in policy.trained().values()},
    }


def main() -> None:
    batch_file, out, loss, micro_batch, mode, kind = sys.argv[1:]
    torch.set_num_threads(1)
    ranks = join_ranks()
    columns = torch.load(batch_file)
    half = len(columns["rewards"]) // ranks.world
    rows = slice(ranks.rank * half, (ranks.rank + 1) * half)
    batch = TokenBatch(*(columns[spec.name][rows] for spec in fields(TokenBatch)))
    traffic = Traffic()
    found = replay(batch, ranks, loss, int(micro_batch), mode, kind)
    found |= {"gathered": traffic.gathered, "reduced": traffic.reduced}
    torch.save(found, f"{out}.{ranks.rank}")
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
