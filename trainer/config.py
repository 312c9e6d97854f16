"""Everything that can be set, with its documentation, limits and vetted default. Never imports torch.

A configuration comes from the defaults, then a TOML file, then dotted options: `rlvr train run.toml --optim.lr 1e-4`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from monitor.metrics import nearest

# name -> share of tokens kept by default; the functions are in trainer/weighting.py, apart from this because of torch
WEIGHTINGS = {"uniform": 1.0, "ict": 0.10, "ict_frequent": 0.90, "random": 0.10, "top_entropy": 0.20}


class ConfigError(ValueError):
    """A setting that cannot work; the message says which, its value, what was expected and what to do."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(" ".join(_readable(detail, type(self)) for detail in error.errors())) from None


def _readable(detail: Any, group: type[BaseModel]) -> str:
    """One of pydantic's findings as a sentence, without its type codes and links."""
    if isinstance(cause := detail.get("ctx", {}).get("error"), ValueError):
        return str(cause)
    name = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"Unknown setting {name!r}.{nearest(str(detail['loc'][-1]), group.model_fields)} See rlvr train --help."
    return f"{name} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}."


class RolloutConfig(_Group):
    prompts: int = Field(16, ge=1, description="prompts in a step")
    group_size: int = Field(8, ge=1, description="rollouts of each prompt (G); a group needs at least 2")
    max_new_tokens: int = Field(56, ge=1, description="longest response, tokens")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the loss uses the same")
    max_batch: int = Field(1024, ge=1, description="rollouts sampled at once")

    @model_validator(mode="after")
    def _has_a_group(self) -> RolloutConfig:
        if self.group_size < 2:
            raise ValueError(
                f"rollout.group_size is {self.group_size}: the advantage compares the rollouts of one prompt, and "
                "one rollout has nothing to be compared with. Set it to 2 or more (8 is usual)."
            )
        return self


class WeightingConfig(_Group):
    kind: str = Field("ict", description=f"which tokens the update uses: {', '.join(WEIGHTINGS)}")
    keep: float | None = Field(
        None, description="share of a response's tokens kept, in (0, 1]; none: the kind's default"
    )
    warmup_steps: int = Field(20, ge=0, description="steps before the weighting acts: until then every weight is 1")
    normalise: Literal["selected", "all"] = Field(
        "selected", description="denominators count the weights (as ICT does) or all tokens"
    )

    @model_validator(mode="after")
    def _known(self) -> WeightingConfig:
        if self.kind not in WEIGHTINGS:
            raise ValueError(
                f"Unknown weighting {self.kind!r}.{nearest(self.kind, WEIGHTINGS)} Known: {', '.join(WEIGHTINGS)}."
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(
                f"weighting.keep is {self.keep}, expected a share in (0, 1], e.g. 0.1 for a tenth of the tokens."
            )
        return self

    @property
    def kept_share(self) -> float:
        return WEIGHTINGS[self.kind] if self.keep is None else self.keep


class LossConfig(_Group):
    kind: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"] = Field(
        "grpo", description="grpo: mean over responses of their token means; bnpo: mean over a micro-batch's tokens; "
        "dapo: over all tokens; dr_grpo: sum over max_new_tokens; cispo: dapo with the ratio capped, not clipped; "
        "gspo: one ratio for a response (docs/method.md)"
    )  # fmt: skip
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above 1 + clip_high (DAPO: 0.28)")
    clip_delta: float | None = Field(
        None, description="largest ratio where the advantage is negative, above 1 + clip_high; none: unbounded"
    )
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the reference policy; 0 loads none")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="k1: log-ratio, needs kl_bias_correction; k2: half its square (gradient of the reverse KL); "
        "k3: of the forward KL"
    )  # fmt: skip
    kl_reference: Literal["initial", "old"] = Field(
        "initial", description="initial: the policy before training; old: the one that sampled the step's rollouts"
    )
    kl_bias_correction: bool = Field(
        False, description="KL times the ratio: the reverse KL without bias, off-policy too"
    )
    kl_outside_mask: bool = Field(False, description="the KL acts on all response tokens, not only on weighted ones")
    entropy_coef: float = Field(0.0, description="entropy bonus on the selected tokens; positive raises entropy")
    entropy_target: float | None = Field(
        None, gt=0, description="mean token entropy to keep, nats, by changing entropy_actuator each step; none: off"
    )
    entropy_actuator: Literal["coefficient", "temperature"] = Field(
        "coefficient", description="coefficient: the entropy bonus, from entropy_coef on, in 0 to entropy_coef_max; "
        "temperature: the sampling temperature, in temperature_min to temperature_max"
    )  # fmt: skip
    entropy_step: float = Field(5e-3, gt=0, description="change of entropy_coef in a step")
    entropy_coef_max: float = Field(0.2, gt=0, description="largest controlled entropy_coef")
    temperature_step: float = Field(0.1, gt=0, lt=1, description="largest relative change of temperature in a step")
    temperature_min: float = Field(0.5, gt=0, description="lowest controlled temperature")
    temperature_max: float = Field(1.5, gt=0, description="highest controlled temperature")
    mask_truncated: bool = Field(False, description="leave truncated responses out of loss and denominators")
    drop_zero_variance: bool = Field(
        False, description="leave groups of equal rewards out of loss and denominators (KL and bonus included)"
    )
    scale_by_std: bool = Field(True, description="divide advantages by the group's standard deviation")

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.clip_delta is not None and not (self.kind != "cispo" and self.clip_delta > 1 + self.clip_high):
            raise ValueError(
                f"loss.clip_delta is {self.clip_delta} with loss.kind {self.kind} and clip_high {self.clip_high}: "
                "expected more than 1 + clip_high, e.g. 4, and a kind other than cispo, which caps every ratio."
            )
        if self.kl_coef and self.kl_estimator == "k1" and not self.kl_bias_correction:
            raise ValueError(
                "loss.kl_estimator k1 has a mean gradient of 0: it would only add noise. Set loss.kl_bias_correction, "
                "or take k2 or k3."
            )
        controlled = self.entropy_target is not None and self.entropy_actuator == "coefficient"
        if controlled and not 0 <= self.entropy_coef <= self.entropy_coef_max:
            raise ValueError(
                f"loss.entropy_coef is {self.entropy_coef}, from where the control starts: expected 0 to "
                f"loss.entropy_coef_max, now {self.entropy_coef_max}."
            )
        return self


class OptimConfig(_Group):
    lr: float = Field(1e-4, gt=0, description="AdamW learning rate, constant")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    epochs: int = Field(1, ge=1, description="passes over a step's rollouts")
    mini_batches: int = Field(1, ge=1, description="optimizer updates in an epoch; groups stay whole")
    micro_batch: int = Field(
        256, ge=1, description="rollouts in a forward pass; changes memory, not gradients (but bnpo's)"
    )


class EvalConfig(_Group):
    every: int = Field(
        40, ge=0, description="steps between evaluations, also before the first and after the last; 0: never"
    )
    prompts: int = Field(16, ge=1, description="prompts of each split")
    samples: int = Field(16, ge=1, description="samples of each prompt, at the sampling temperature")
    k: int = Field(4, ge=1, description="k of pass@k, at most eval.samples")
    splits: tuple[str, ...] = Field(("heldout", "ood", "multipath"), description="splits to evaluate")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if self.k > self.samples:
            raise ValueError(f"eval.k is {self.k} but eval.samples is {self.samples}: pass@k needs at least k samples.")
        return self


class RecordConfig(_Group):
    tokens_every: int = Field(1, ge=1, description="record raw tokens of every n-th step; histograms always see all")
    max_gb: float | None = Field(None, description="stop recording raw tokens once the run takes this many GB")


class SignalsConfig(_Group):
    reference: Literal["group", "leave_one_out"] = Field(
        "group", description="deviation is measured from the group's mean, with or without the row itself"
    )


class TrainConfig(_Group):
    """Configuration of `rlvr train`. Without arguments it trains the built-in policy on the built-in task."""

    model: str = Field("builtin", description="builtin, smollm2-135m, a local folder or a Hugging Face id")
    task: str = Field("chain", description="chain, reasoning_gym:<dataset> or jsonl:<path>")
    reward: str | None = Field(None, description="package.module:function with TRL's signature; none: the task's own")
    steps: int = Field(200, ge=1, description="training steps")
    seed: int = Field(0, ge=0, description="seed of prompts and sampling; a CPU run is bit-reproducible")
    store: str = Field("runs", description="folder of the store")
    run: str | None = Field(None, description="name of the run; none: made from weighting and seed")
    comparison: str = Field("", description="runs with equal comparison and seed are paired on the Compare page")
    wandb: Literal["off", "offline", "online"] = Field("off", description="mirror scalars and alerts to wandb")
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's choice")
    save: str | None = Field(None, description="folder for the final policy; none: STORE/policies/RUN")
    rollout: RolloutConfig = RolloutConfig()
    weighting: WeightingConfig = WeightingConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    record: RecordConfig = RecordConfig()
    signals: SignalsConfig = SignalsConfig()

    @model_validator(mode="after")
    def _groups_divide(self) -> TrainConfig:
        if self.optim.mini_batches > self.rollout.prompts:
            raise ValueError(
                f"optim.mini_batches is {self.optim.mini_batches} but a step has {self.rollout.prompts} groups: "
                "a mini-batch needs at least one whole group."
            )
        return self

    @model_validator(mode="after")
    def _loss_can_act(self) -> TrainConfig:
        loss, tau = self.loss, self.rollout.temperature
        if loss.kl_coef and loss.kl_reference == "old" and self.optim.epochs == self.optim.mini_batches == 1:
            raise ValueError(
                "loss.kl_reference is old but each step has one update, of the very policy that sampled: the KL is 0. "
                "Set optim.epochs or optim.mini_batches above 1, or loss.kl_reference to initial."
            )
        controlled = loss.entropy_target is not None and loss.entropy_actuator == "temperature"
        if controlled and not loss.temperature_min <= tau <= loss.temperature_max:
            raise ValueError(
                f"rollout.temperature is {tau}, from where the control starts: expected loss.temperature_min to "
                f"temperature_max, now {loss.temperature_min} to {loss.temperature_max}."
            )
        return self
