"""The weightings that every other one has to beat: all tokens, and an equally small random choice of tokens."""

from __future__ import annotations

from torch import Tensor

from trainer.learning.weightings.inputs import WeightInputs, kept_per_row, random_scores, top_per_row


def uniform(inputs: WeightInputs) -> Tensor:
    """Every response token counts alike.

    Formula: w = 1.
    Scope: no threshold.
    Denominator: all tokens (in GRPO those of the response); both values of `normalise` agree.
    Source: GRPO, arXiv 2402.03300.
    """
    return inputs.mask.float()


def random(inputs: WeightInputs, *, keep: float) -> Tensor:
    """A random share of each response: the control that ICT has to beat.

    Formula: w = 1 on ceil(keep * T_i) positions drawn without replacement, else 0.
    Scope: the response.
    Denominator: the selected tokens of the response (normalise = "selected").
    Defaults: keep = 0.1.
    Source: arXiv 2606.19771v1, Table 3, where a random choice gives most of ICT's gain over GRPO.
    """
    return top_per_row(random_scores(inputs), inputs.mask, kept_per_row(inputs.mask, keep))


def random_undecided(inputs: WeightInputs, *, keep: float, min_entropy: float) -> Tensor:
    """A random share of the undecided tokens of each response: the control of `ict_undecided`.

    Formula: w = 1 on ceil(keep * M_i) positions drawn without replacement from the M_i tokens of response i with
    entropy > min_entropy, else 0.
    Scope: the response; min_entropy is absolute, nats.
    Denominator: the selected tokens of the response (normalise = "selected"), as in `ict_undecided`.
    Defaults: keep = 0.1, min_entropy = 0.05.
    Source: ours; the control that tells the effect of the ranking from that of leaving out decided tokens.
    """
    undecided = inputs.undecided(min_entropy)
    return top_per_row(random_scores(inputs), undecided, kept_per_row(undecided, keep))
