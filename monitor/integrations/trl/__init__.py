"""TRL's trainers, watched from inside: `attach(trainer, ...)` before `trainer.train()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monitor.extras import require


def attach(
    trainer: Any,
    *,
    store: str | Path,
    run: str,
    weighting: str | None = None,
    guard: bool | str | Path = False,
    correct_at: float = 1.0,
    mirror: str | None = None,
) -> None:
    """Record a GRPOTrainer or RLOOTrainer of TRL as a run of the store, judge it, and weight its loss if asked to.

    Call it once, before `trainer.train()`. The trainer stays as it is: methods of this one object are wrapped. Its
    generation, rewards and optimizer are its own. Of every token the log-probability, both entropies and the group
    deviation are exact: they come from hidden states of the trainer's own forward passes and its own head.

    Args:
        trainer: a trl.GRPOTrainer, or an RLOOTrainer, which can be recorded only.
        store: folder of the store, made if missing. run: name of the run, new unless training resumes.
        weighting: how tokens count in the loss, as `rlvr compare` names arms, e.g. "ict:keep=0.1,warmup_steps=0" or
            "ict_budget"; None: as the trainer counts them. GRPO alone, with loss_type grpo, bnpo, dr_grpo, dapo or
            cispo. `warmup_steps` counts optimizer steps.
        guard: True saves a checkpoint and divides the learning rate by 3 when an alert fires. The path of an alerts
            file takes its [[actions]], of which checkpoint, stop and lower_lr are possible here, and its rules and
            routes.
        correct_at: a rollout whose reward reaches this is correct.
        mirror: URL of an object store, s3://BUCKET/PREFIX say, to which each process copies what it has recorded (see
            "Beyond one disk" in docs/store.md).

    A weight w reaches the loss through the advantage, A_it = w_it c A_i, so clip and ratio stay TRL's. With
    normalise = "selected" c replaces TRL's count of tokens by the sum of weights: T_i / sum_t w_it for grpo, the same
    of a micro-batch for bnpo, of the rollout batch on all processes for dapo and cispo; dr_grpo and "all" have c = 1.
    This equals the project's own loss with loss.kl_outside_mask, on- and off-policy. What differs: TRL's KL term and
    entropy bonus count all tokens; its logged clip ratios leave out tokens of weight 0, unlike those recorded here;
    where a rollout batch is split into several optimizer steps, dapo and cispo divide by that batch's mean sum of
    weights a step, as TRL does with tokens.

    A step is a rollout batch with all its updates. Its number is TRL's global_step after the last of them. Where TRL
    makes no pass for old log-probabilities, the forward pass of the loss is read; only a weighting then needs one more
    pass, without gradient (perf/extra_forward_s). Rollouts that mask_truncated_completions leaves out have no tokens
    in the record.

    Raises AttachError if the trainer or the weighting cannot be used, StoreError when training starts if the run
    cannot be opened. Afterwards nothing raises into training: what fails is an event of the run, and from then on the
    trainer's own log is recorded, with weight 1 for every token. So is that of a TRL whose inside has changed.
    """
    require("rlvr_monitor.attach", ["torch", "trl"], "trl")
    from monitor.integrations.trl.attached import Attached

    Attached(trainer, store, run, weighting, guard, correct_at, mirror)
