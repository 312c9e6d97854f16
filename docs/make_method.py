"""Writes docs/method.md from the losses' and weightings' tables and docstrings: python -m docs.make_method"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

from trainer.learning.entropy_control import EntropyControl
from trainer.learning.loss import (
    LOSSES,
    entropy_term,
    kl_estimate,
    kl_term,
    policy_loss,
    sampler_correction,
    sequence_log_ratio,
)
from trainer.learning.weightings import WEIGHT_FUNCTIONS, capped_deviation, token_weights


def _explained(name: str, thing: Callable[..., object] | type) -> list[str]:
    """A heading and the docstring as it stands in the code, as a block of preformatted text."""
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    return [f"### {name}", "", *textwrap.indent(text, "    ").splitlines(), ""]


def _first_line(thing: Callable[..., object]) -> str:
    """`psi = ...` or `D: ...` of a part's docstring, without its name."""
    return (inspect.getdoc(thing) or "").splitlines()[0].removeprefix("psi = ").removeprefix("D: ").rstrip(".")


def _losses() -> list[str]:
    parts = {function.__name__: function for kind in LOSSES.values() for function in (kind.psi, kind.denominator)}
    return [
        "## Losses",
        "",
        "`loss.kind`; names and definitions as in TRL 1.16, against whose `GRPOTrainer._compute_loss` value and",
        "gradient of each are tested. `loss = sum(weight * psi) / D`; the functions in brackets are explained below.",
        "",
        "| kind | summary | ratio of a | psi | denominator D | source |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{name}` | {kind.summary} | {'response' if kind.ratio == 'sequence' else 'token'} | "
            f"{_first_line(kind.psi)} (`{kind.psi.__name__}`) | "
            f"{_first_line(kind.denominator)} (`{kind.denominator.__name__}`) | {kind.source} |"
            for name, kind in LOSSES.items()
        ),
        "",
        "Every D but that of `bnpo` is fixed on the whole batch of an optimizer update before it is split, so",
        "micro-batches and ranks do not change the gradient.",
        "",
        *_explained("policy_loss", policy_loss),
        *(line for name, function in parts.items() for line in _explained(name, function)),
        *(
            line
            for function in (sequence_log_ratio, sampler_correction, kl_term, kl_estimate, entropy_term)
            for line in _explained(function.__name__, function)
        ),
        "## Entropy control",
        "",
        *_explained("EntropyControl", EntropyControl),
    ]


def _weightings() -> list[str]:
    return [
        "## Weightings",
        "",
        "`weighting.kind`; from the old policy's signals, once for each rollout batch (`divergence`: before each",
        "optimizer update), without gradient.",
        "",
        *_explained("token_weights", token_weights),
        *(line for name, function in WEIGHT_FUNCTIONS.items() for line in _explained(name, function)),
        "### signals.scale = capped",
        "",
        *_explained("capped_deviation", capped_deviation)[2:],
    ]


def page() -> str:
    """The text of docs/method.md."""
    lines = [
        "# Method",
        "",
        "Generated from the code by `python -m docs.make_method`: each weighting and loss with its formula, source,",
        "scope and denominator. All logarithms are natural; entropies and divergences are in nats. `arXiv NNNN.NNNNN`",
        "is `https://arxiv.org/abs/NNNN.NNNNN`.",
        "",
        *_weightings(),
        *_losses(),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "method.md").write_text(page())
