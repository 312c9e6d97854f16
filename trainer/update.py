"""One step's optimizer updates: signals and weights from the old policy, then the loss on the selected tokens."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from monitor.signals import TokenSignals
from monitor.signals.stats import Statistics, loss_statistics
from trainer.config import TrainConfig
from trainer.errors import NonFiniteError
from trainer.flow import LossTerms, TokenBatch
from trainer.learning.entropy_control import EntropyControl
from trainer.learning.loss import (
    LOSSES,
    LossTotals,
    loss_totals,
    over_constant,
    over_responses,
    policy_loss,
    sampler_correction,
)
from trainer.learning.optimizers import make_optimizer
from trainer.learning.probe import finish_probe, take_probe
from trainer.learning.schedule import learning_rate
from trainer.learning.weightings import BY_GROUP, WeightInputs, capped_deviation, token_penalty, token_weights
from trainer.policy.attention import attention_received
from trainer.policy.micro_batches import MicroBatches
from trainer.policy.policy import Policy, Reference
from trainer.runtime.ranks import Ranks, whole


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a step's updates used and did. signals and weights cover the whole batch; scalars are 0-d device tensors.

    weights: those that the loss used, 0 for responses that it leaves out. Where weights change within a step, they are
    the last epoch's. probe: (predicted, true) changes of H2 at the probe's positions; None in steps without a probe.
    """

    signals: TokenSignals
    weights: Tensor
    loss_stats: Statistics
    loss: Tensor
    grad_norm: Tensor
    probe: tuple[Tensor, Tensor] | None = None


class Updater:
    """Owns the optimizer. `update(batch, step)` runs epochs x mini-batches of updates on one rollout batch.

    No pass through the model has more than optim.micro_batch rows or optim.micro_tokens tokens. Signals compare the
    rows of a group, so they need the hidden states [G, T, D] of a whole group (or of as many whole groups as
    micro_batch holds) together; the head then runs on slabs of them. These hidden states are the only tensors with more
    rows than a pass. Where a step has one update and `one_pass_by_groups` holds, a pass has whole groups, and the
    forward that trains them also gives their signals; else the signals cost a forward without gradient.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        config: TrainConfig,
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> None:
        self.policy, self.reference, self.config, self.ranks = policy, reference, config, ranks
        self.micro = micro_batches(config)
        self.trained = list(policy.trained().values())
        self.optimizer = make_optimizer(config.optim, self.trained)
        self.control = EntropyControl(config)
        self.weight_generator = torch.Generator().manual_seed(config.seed + 7_919 * ranks.rank)

    def change(self, config: TrainConfig) -> None:
        """Takes other settings of optim.lr, loss, weighting and rollout.temperature from the next step on."""
        self.config = config
        self.control.change(config)

    def update(self, batch: TokenBatch, step: int) -> Update:
        """Trains on the batch. Raises NonFiniteError before a non-finite gradient touches the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        every = self.config.record.probe_every
        if not every or step % every:
            return self._updates(batch, step)
        probe = take_probe(self.policy, batch, self.control.temperature, self.micro)
        update = self._updates(batch, step)
        return replace(update, probe=finish_probe(self.policy, probe))

    def _updates(self, batch: TokenBatch, step: int) -> Update:
        optim = self.config.optim
        if optim.epochs == optim.mini_batches == 1:
            if self.micro.hold(batch):
                return self._on_policy(batch, [batch], step)
            if one_pass_by_groups(self.config):
                return self._on_policy(batch, self._whole_groups(batch), step)
        signals = self._whole_signals(batch)
        inputs = self._inputs(signals, batch, step)
        moving = self.config.weighting.kind == "divergence" and inputs.steps_active > 0
        weights = None if moving else token_weights(inputs, self.control.weighting)
        group = self.config.rollout.group_size
        parts = [
            (first * group, end * group) for first, end in mini_batch_groups(len(batch) // group, optim.mini_batches)
        ]
        outcomes = [
            self._mini_batch(batch.rows(*part), inputs.rows(*part), None if weights is None else weights[slice(*part)])
            for _ in range(optim.epochs)
            for part in parts
        ]
        stats, losses, norms, used = zip(*outcomes, strict=True)
        return Update(
            signals,
            torch.cat(used[-len(parts) :]),
            reduce(operator.add, stats),
            torch.stack(losses).mean(),
            torch.stack(norms).mean(),
        )

    def _on_policy(self, batch: TokenBatch, parts: list[TokenBatch], step: int) -> Update:
        """One forward with gradient feeds the signals, then the weights, then the loss: no extra pass.

        Of several parts the denominators must not depend on the weights: they are known before the first pass.
        """
        totals = self._totals(batch, batch.loss_mask.float()) if len(parts) > 1 else None
        found, used, losses, stats = [], [], [], []
        for rows in parts:
            hidden = self.policy.hidden(rows)
            signals = self._signals(hidden.detach(), rows)
            weights = token_weights(self._inputs(signals, rows, step), self.control.weighting)
            terms = self._terms(hidden, rows, signals.logprob, weights, totals or self._totals(rows, weights))
            terms.loss.backward()
            found.append(signals)
            used.append(weights)
            losses.append(terms.loss.detach())
            stats.append(_statistics(terms, rows, weights))
        loss, norm = self._optimizer_step(torch.stack(losses).sum())
        return Update(TokenSignals.concat(found, dim=0), torch.cat(used), reduce(operator.add, stats), loss, norm)

    def _whole_groups(self, batch: TokenBatch) -> list[TokenBatch]:
        """The batch in parts of as many whole groups as a pass may have rows, at least one."""
        group = self.config.rollout.group_size
        size = max(1, self.micro.rows // group) * group
        return [batch.rows(start, start + size) for start in range(0, len(batch), size)]

    def _mini_batch(
        self, batch: TokenBatch, inputs: WeightInputs, weights: Tensor | None
    ) -> tuple[Statistics, Tensor, Tensor, Tensor]:
        """One optimizer update; returns its statistics, loss, gradient norm and weights. Computes weights if None."""
        weighting, old = self.config.weighting, inputs.signals.logprob
        if weights is None:
            inputs = replace(inputs, current_logprobs=self._whole_signals(batch).logprob)
            weights = token_weights(inputs, weighting)
        totals, penalty = self._totals(batch, weights), token_penalty(inputs, weighting)
        losses, stats = [], []
        for part in self.micro.split(batch):
            rows, chosen = part.batch, part.of(weights)
            extra = None if penalty is None else part.of(penalty)
            terms = self._terms(self.policy.hidden(rows), rows, part.of(old), chosen, totals, extra)
            terms.loss.backward()
            losses.append(terms.loss.detach())
            stats.append(_statistics(terms, rows, chosen))
        return reduce(operator.add, stats), *self._optimizer_step(torch.stack(losses).sum()), weights

    def _terms(
        self,
        hidden: Tensor,
        batch: TokenBatch,
        old_logprobs: Tensor,
        weights: Tensor,
        totals: LossTotals,
        penalty: Tensor | None = None,
    ) -> LossTerms:
        """The loss. Logits are made only where it has a gradient: selected positions, or all with kl_outside_mask."""
        loss, temperature = self.config.loss, self.control.temperature
        outside = loss.kl_outside_mask and loss.kl_coef > 0
        selected = batch.loss_mask if outside else batch.loss_mask & (weights != 0)
        token_ids = batch.token_ids[selected]
        logprob, entropy = self.policy.logprobs(hidden[selected], token_ids, temperature)
        logprobs = old_logprobs.masked_scatter(selected, logprob)
        entropies = torch.zeros_like(old_logprobs).masked_scatter(selected, entropy)
        reference = old_logprobs if loss.kl_coef and loss.kl_reference == "old" else None
        if self.reference is not None:
            with torch.no_grad():
                states = self.reference.hidden(batch)[selected]
                found, _ = self.reference.logprobs(states, token_ids, temperature)
            reference = torch.zeros_like(old_logprobs).masked_scatter(selected, found)
        correction = None
        if loss.sampler_ratio_max is not None:
            correction = sampler_correction(old_logprobs, batch.sampler_logprobs, loss.sampler_ratio_max)
        return policy_loss(
            logprobs,
            old_logprobs,
            batch.advantages,
            batch.loss_mask,
            weights,
            loss,
            ref_logprobs=reference,
            entropies=entropies,
            entropy_coef=self.control.coefficient,
            penalty=penalty,
            correction=correction,
            totals=totals,
            normalise=self.config.weighting.normalise,
        )

    def _optimizer_step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over ranks, clips, checks, steps; returns the loss and the gradient norm before clipping."""
        loss = self.ranks.sum(loss.detach())
        self.ranks.sum_gradients(self.trained)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.grad_clip))
        if not torch.isfinite(norm + loss):  # costs the step's one host sync; a non-finite step would ruin the weights
            raise NonFiniteError(f"The loss is {loss:.4g} and the gradient norm {norm:.4g}, not finite.")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm.detach()

    def _signals(self, hidden: Tensor, batch: TokenBatch) -> TokenSignals:
        return self.policy.signals(hidden, batch, self.control.temperature, self.config.signals.reference)

    @torch.no_grad()
    def _whole_signals(self, batch: TokenBatch) -> TokenSignals:
        """Signals of the policy as it is now, for a batch of any number of whole groups."""
        found = [self._signals(self.policy.states(rows, self.micro), rows) for rows in self._whole_groups(batch)]
        return TokenSignals.concat(found, dim=0)

    def _inputs(self, signals: TokenSignals, batch: TokenBatch, step: int) -> WeightInputs:
        weighting = self.config.weighting
        active = step - weighting.warmup_steps
        if self.config.signals.scale == "capped":
            signals = replace(signals, deviation=capped_deviation(signals))
        watched = weighting.kind == "attention" and active > 0
        attention = attention_received(self.policy, batch, self.config.optim.micro_batch) if watched else None
        mask, advantages = batch.loss_mask, batch.advantages
        return WeightInputs(
            signals,
            mask,
            advantages,
            self.weight_generator,
            active,
            attention=attention,
            sum_over_ranks=self.ranks.sum,
        )

    def _totals(self, batch: TokenBatch, weights: Tensor) -> LossTotals:
        normalise, longest = self.config.weighting.normalise, self.config.rollout.max_new_tokens
        totals = loss_totals(batch.loss_mask, weights, normalise, longest)
        sums = self.ranks.sum(torch.stack([totals.responses, totals.weight, totals.tokens]))
        return LossTotals(sums[0], sums[1], sums[2], longest)


def micro_batches(config: TrainConfig) -> MicroBatches:
    return MicroBatches(config.optim.micro_batch, config.optim.micro_tokens)


def one_pass_by_groups(config: TrainConfig) -> bool:
    """Whether a pass of whole groups can be measured, weighted and trained at once, in a step with one update.

    Its weights must depend on nothing beyond its groups, and the denominators of its loss on no weights: those of grpo,
    gspo and dr_grpo count responses of the batch and the pass's own weights, those of the others sum weights, which
    are known before if they are tokens (normalise "all", or uniform). An entropy bonus divides by that sum, too.
    Passes by tokens (optim.micro_tokens) sort the rows and so part groups.
    """
    weighting, loss, group = config.weighting, config.loss, config.rollout.group_size
    by_response = LOSSES[loss.kind].denominator in (over_responses, over_constant)
    counts_tokens = weighting.kind == "uniform" or weighting.normalise == "all"
    return (
        weighting.kind in BY_GROUP
        and loss.kind != "bnpo"  # whose gradient depends on which rows are in a pass
        and (by_response or counts_tokens)
        and (not loss.entropy_coef or counts_tokens)
        and (loss.entropy_target is None or loss.entropy_actuator != "coefficient" or counts_tokens)
        and config.optim.micro_tokens is None
        and config.optim.micro_batch >= group
    )


def mini_batch_groups(groups: int, mini_batches: int) -> list[tuple[int, int]]:
    """(first, end) of each mini-batch's groups. Together they cover all groups in order; sizes differ by at most one.

    mini_batches is at most groups. Example: 16 groups in 3 mini-batches: (0, 5), (5, 10), (10, 16).
    """
    bounds = [i * groups // mini_batches for i in range(mini_batches + 1)]
    return list(itertools.pairwise(bounds))


def _statistics(terms: LossTerms, batch: TokenBatch, weights: Tensor) -> Statistics:
    return loss_statistics(
        batch.mask, weights, batch.correct, terms.log_ratio, terms.clipped_low, terms.clipped_high, terms.kl
    )
