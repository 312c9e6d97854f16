"""Arms of a comparison: `ict`, `ict:keep=0.3`, `random:keep=0.3,lr=1e-4`. Imports no torch.

An arm is a weighting, followed by a colon and settings if it has any. A setting is a field of the group `weighting` by
its own name, `lr` for optim.lr, or any option of the groups weighting, loss, optim and signals by its dotted name, e.g.
loss.kl_coef=0.01. Model, task, rollouts, evaluation and steps are the same for all arms: otherwise nothing could be
compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from monitor.errors import nearest
from trainer.config import WEIGHTINGS, ConfigError, TrainConfig, changed_weighting

GRAMMAR = "Expected WEIGHTING or WEIGHTING:key=value,key=value, e.g. ict:keep=0.3,lr=3e-4."
SHARED_GROUPS = ("rollout", "eval", "record", "checkpoint")  # equal for all arms


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison. Example: Arm("ict:keep=0.3", "ict", (("weighting.keep", "0.3"),))."""

    text: str  # as the user wrote it; the arm's label in tables
    kind: str
    settings: tuple[tuple[str, str], ...] = ()  # (dotted option, value)

    @property
    def slug(self) -> str:
        """The label as a part of a run's name: ict:keep=0.3 -> ict-keep0.3."""
        text = re.sub(r"=(?=[\d.])", "", self.text)
        return re.sub(r"[^A-Za-z0-9._-]", "-", text)

    def options(self) -> list[str]:
        """The arm as options of `rlvr train`. A value `none` in the group weighting becomes the kind's default."""
        fields = WEIGHTINGS[self.kind].model_fields
        pairs = [("weighting.kind", self.kind)]
        for key, value in self.settings:
            group, _, name = key.partition(".")
            default = group == "weighting" and value.lower() == "none" and name in fields
            pairs.append((key, str(fields[name].default) if default else value))
        return [text for key, value in pairs for text in (f"--{key}", value)]


def parse_arm(text: str) -> Arm:
    """The arm that a text of the module's grammar names. Raises ConfigError with the nearest known name."""
    kind, colon, rest = text.partition(":")
    if kind not in WEIGHTINGS:
        raise ConfigError(
            f"Arm {text!r}: unknown weighting {kind!r}.{nearest(kind, WEIGHTINGS)} Known: {', '.join(WEIGHTINGS)}."
        )
    settings: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"Arm {text!r}: {part!r} is not key=value. {GRAMMAR}")
        option = _option(text, key)
        if option in settings:
            raise ConfigError(f"Arm {text!r} sets {option} twice.")
        settings[option] = value
    return Arm(text, kind, tuple(settings.items()))


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Two or more different arms, the first of them the baseline. Raises ConfigError."""
    arms = [parse_arm(text) for text in texts]
    if len(arms) < 2:
        raise ConfigError(
            f"A comparison needs at least two arms, got {', '.join(texts) or 'none'}. The first is the baseline, e.g. "
            "--arms uniform ict random."
        )
    seen: dict[tuple[str, frozenset[tuple[str, str]]], str] = {}
    for arm in arms:
        known = seen.setdefault((arm.kind, frozenset(arm.settings)), arm.text)
        if known is not arm.text or [a.slug for a in arms].count(arm.slug) > 1:
            raise ConfigError(f"Arms {known!r} and {arm.text!r} are the same: name each arm once.")
    return arms


def arm_config(base: TrainConfig, arm: Arm, **top: Any) -> TrainConfig:
    """The configuration of an arm's run: `base` with the arm's settings and top-level fields. Raises ConfigError."""
    tree: dict[str, Any] = base.model_dump() | top
    weighting: dict[str, Any] = {"kind": arm.kind}
    for option, value in arm.settings:
        group, name = option.split(".")
        if group == "weighting":
            weighting[name] = None if value.lower() == "none" else value
        else:
            tree[group] = tree[group] | {name: None if value.lower() == "none" else value}
    weighting = changed_weighting(tree["weighting"], weighting)
    tree["weighting"] = {name: value for name, value in weighting.items() if value is not None}
    try:
        return TrainConfig(**tree)
    except ConfigError as error:
        raise ConfigError(f"Arm {arm.text!r}: {error}") from None


def both_normalisations(arms: Sequence[Arm], base: TrainConfig) -> list[Arm]:
    """Each sparse arm twice: with weighting.normalise=selected, then =all. Other arms stay as they are.

    With "selected" the denominators of the loss are sums of weights, so sum(weight) / denominator is 1 as in the
    dense update. With "all" it is the kept share, so the step is smaller. Arms that set normalise are not doubled.
    """
    result: list[Arm] = []
    for arm in arms:
        kept = arm_config(base, arm).weighting.parameters.get("keep", 1.0)
        if arm.kind == "uniform" or kept >= 1 or any(option == "weighting.normalise" for option, _ in arm.settings):
            result.append(arm)
            continue
        for normalise in ("selected", "all"):
            text = f"{arm.text}{',' if arm.settings else ':'}normalise={normalise}"
            result.append(parse_arm(text))
    return result


def _option(arm: str, key: str) -> str:
    """The dotted option that a key of an arm means."""
    groups = {name: set(type(group).model_fields) for name, group in TrainConfig() if isinstance(group, BaseModel)}
    fields = {name: None for model in WEIGHTINGS.values() for name in model.model_fields if name != "kind"}
    short = {name: f"weighting.{name}" for name in fields} | {"lr": "optim.lr"}
    if key in short:
        return short[key]
    group, dot, _ = key.partition(".")
    allowed = {name: fields for name, fields in groups.items() if name not in SHARED_GROUPS}
    if group in SHARED_GROUPS or (not dot and key in TrainConfig.model_fields):
        raise ConfigError(
            f"Arm {arm!r}: {key} is the same for all arms. Give it once, as an option: --{key} VALUE (seeds: --seeds)."
        )
    allowed["weighting"] = set(fields)
    known = [*short, *(f"{name}.{field}" for name, fields in allowed.items() for field in sorted(fields))]
    if key not in known:
        raise ConfigError(
            f"Arm {arm!r}: unknown key {key!r}.{nearest(key, known)} Known: {', '.join(short)}, and dotted options "
            f"of {', '.join(allowed)}."
        )
    return key
