"""Everything that can be set, with its documentation, limits and vetted default. Never imports torch.

A configuration comes from the defaults, then a TOML file, then dotted options: `rlvr train run.toml --optim.lr 1e-4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.base import SettingsGroup as _Group
from trainer.config.weighting import OFF_POLICY, WEIGHTINGS, Budget, Ict, Weighting, make_weighting


class RolloutConfig(_Group):
    prompts: int = Field(16, ge=1, description="prompts in a step")
    group_size: int = Field(8, ge=1, description="rollouts of each prompt (G); a group needs at least 2")
    max_new_tokens: int = Field(56, ge=1, description="longest response, tokens")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the loss uses the same")
    top_k: int = Field(0, ge=0, description="sample from the k likeliest tokens only; 0: from all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens that hold this probability together; 1: from all"
    )
    min_p: float = Field(
        0.0, ge=0, lt=1, description="sample from tokens at least min_p times as likely as the likeliest; 0: from all"
    )
    stop: tuple[int | str, ...] = Field(
        (), description="texts and token ids that end a response, besides the end tokens of model and chat template; "
        "the text stays part of the response"
    )  # fmt: skip
    chat_template: str = Field(
        "model", description="how a prompt becomes a conversation. model: the tokenizer's own template, none where it "
        "has none; none: the plain text; else the path of a file with a Jinja template"
    )  # fmt: skip
    system_prompt: str | None = Field(
        None, description="what stands before each prompt, as the system's message where there is a template; none: "
        "the task's own; empty: nothing"
    )  # fmt: skip
    extra_rounds: int = Field(
        0, ge=0, description="dynamic sampling: how often a step may sample as many prompts again, to replace groups "
        "whose rewards are all equal; 0: keep them"
    )  # fmt: skip
    max_batch: int = Field(1024, ge=1, description="rollouts sampled at once")
    backend: Literal["auto", "generate", "paged", "vllm"] = Field(
        "auto", description="generate: one token for all rollouts at a time (on CUDA with fixed shapes and a compiled "
        "step); paged: transformers' continuous batching; vllm: an engine of vLLM in this process, which gets the "
        "weights before each sampling; auto: generate or paged, by device and size"
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_a_group(self) -> RolloutConfig:
        if self.group_size < 2:
            raise ValueError(
                f"rollout.group_size is {self.group_size}: the advantage compares the rollouts of one prompt, and "
                "one rollout has nothing to be compared with. Set it to 2 or more (8 is usual)."
            )
        return self


class LossConfig(_Group):
    kind: Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"] = Field(
        "grpo", description="grpo: mean over responses of their token means; bnpo: mean over a micro-batch's tokens; "
        "dapo: mean over all tokens; dr_grpo: sum divided by responses x max_new_tokens; cispo: dapo with the ratio "
        "capped, not clipped; gspo: one ratio for each response (docs/method.md)"
    )  # fmt: skip
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above 1 + clip_high (DAPO: 0.28)")
    clip_delta: float | None = Field(
        None, description="largest ratio where the advantage is negative; must exceed 1 + clip_high; none: no bound"
    )
    kl_coef: float = Field(0.0, ge=0, description="coefficient of the KL to the reference; 0: no reference is loaded")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k3", description="k1: the log-ratio, needs kl_bias_correction; k2: half its square, with the gradient of the "
        "reverse KL; k3: exp(gap) - gap - 1, with the gradient of the forward KL"
    )  # fmt: skip
    kl_reference: Literal["initial", "old"] = Field(
        "initial", description="initial: the policy before training; old: the one that sampled the step's rollouts"
    )
    kl_bias_correction: bool = Field(
        False,
        description="multiply each token's KL by its own ratio: it then estimates the reverse KL without bias, "
        "off-policy too",
    )
    kl_outside_mask: bool = Field(False, description="the KL acts on all response tokens, not only on weighted ones")
    entropy_coef: float = Field(0.0, description="entropy bonus on the selected tokens; positive raises entropy")
    entropy_target: float | None = Field(
        None, gt=0, description="mean token entropy, nats, to hold by changing what entropy_actuator names; none: off"
    )
    entropy_actuator: Literal["coefficient", "temperature", "budget"] = Field(
        "coefficient", description="what the entropy control changes. coefficient: the entropy bonus, starting at "
        "entropy_coef, between 0 and entropy_coef_max; temperature: the sampling temperature, between temperature_min "
        "and temperature_max; budget: weighting.share of a budget weighting, between budget_min and budget_max"
    )  # fmt: skip
    entropy_step: float = Field(5e-3, gt=0, description="change of entropy_coef in a step")
    entropy_coef_max: float = Field(0.2, gt=0, description="largest controlled entropy_coef")
    temperature_step: float = Field(0.1, gt=0, lt=1, description="largest relative change of temperature in a step")
    temperature_min: float = Field(0.5, gt=0, description="lowest controlled temperature")
    temperature_max: float = Field(1.5, gt=0, description="highest controlled temperature")
    budget_step: float = Field(
        0.1, gt=0, lt=1, description="what a step at 100 % of distance from entropy_target adds to the share for good"
    )
    budget_min: float = Field(-1.0, ge=-1, le=1, description="lowest controlled share; below 0 it raises entropy")
    budget_max: float = Field(1.0, ge=-1, le=1, description="highest controlled share")
    sampler_ratio_max: float | None = Field(
        None, ge=1, description="correct for a sampler that computes other probabilities: multiply each token's term "
        "by p_trainer / p_sampler, at most this (2 is usual); none: no correction"
    )  # fmt: skip
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
                f"loss.entropy_coef is {self.entropy_coef}, but the entropy control starts there: expected 0 to "
                f"loss.entropy_coef_max, now {self.entropy_coef_max}."
            )
        return self


class OptimConfig(_Group):
    lr: float = Field(1e-4, gt=0, description="AdamW learning rate, the largest of the schedule")
    kind: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw: two float32 moments, 8 bytes a trained parameter; adamw_8bit: moments of 8 bits, "
        "2 bytes, whose rounding changes the updates a little (needs bitsandbytes; not with shard)"
    )  # fmt: skip
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls after warm-up, to min_lr_share at the last step"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to lr")
    min_lr_share: float = Field(0.0, ge=0, le=1, description="share of lr to which linear and cosine schedules fall")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    epochs: int = Field(1, ge=1, description="passes over a step's rollouts")
    mini_batches: int = Field(
        1, ge=1, description="optimizer updates in an epoch; each takes whole groups, and their numbers differ by at "
        "most one; at most rollout.prompts / number of processes"
    )  # fmt: skip
    micro_batch: int = Field(
        256, ge=1, description="most rollouts in one pass through the model, which may be fewer than a group; changes "
        "memory, not gradients (except for loss.kind bnpo)"
    )  # fmt: skip
    micro_tokens: int | None = Field(
        None, ge=1, description="most tokens (rollouts x the longest prompt and response) in one pass; rollouts are "
        "then sorted by length and cut to the longest, and one that is longer goes alone; none: no limit, no cut"
    )  # fmt: skip
    gradient_checkpointing: bool = Field(
        False, description="keep a decoder layer's input alone for the backward pass and compute the rest again: less "
        "memory, a third more time in the update"
    )  # fmt: skip


class LoraConfig(_Group):
    rank: int = Field(0, ge=0, description="rank of the adapters trained on all linear layers; 0: train all parameters")
    alpha: int = Field(32, gt=0, description="the adapters' output is scaled by alpha / rank")


class EvalConfig(_Group):
    every: int = Field(
        40, ge=0, description="steps between evaluations; one also comes before the first and after the last; 0: never"
    )
    prompts: int = Field(16, ge=1, description="prompts of each split")
    choice: Literal["random", "first"] = Field(
        "random", description="which of a split's prompts. random: the same random ones in every run, those of a "
        "smaller number among those of a larger one; first: the first ones, as runs recorded before this setting did"
    )  # fmt: skip
    samples: int = Field(16, ge=1, description="samples of each prompt, at the sampling temperature")
    k: int = Field(4, ge=1, description="k of pass@k, at most eval.samples")
    splits: tuple[str, ...] = Field(("heldout", "ood", "multipath"), description="splits to evaluate")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if self.k > self.samples:
            raise ValueError(f"eval.k is {self.k} but eval.samples is {self.samples}: pass@k needs at least k samples.")
        return self


class CheckpointConfig(_Group):
    every: int = Field(50, ge=0, description="steps between checkpoints; one also follows the last step; 0: never")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    background: Literal["auto", "always", "never"] = Field(
        "auto", description="write a checkpoint while training goes on, from a copy of weights and optimizer in the "
        "host's memory; auto: on a GPU, which needs that copy anyway"
    )  # fmt: skip


class RecordConfig(_Group):
    tokens_every: int = Field(
        1, ge=1, description="record raw tokens of every n-th step and around alerts; histograms see all"
    )
    max_gb: float | None = Field(
        None, description="stop recording raw tokens, but around alerts, once the run takes this many GB"
    )
    fsync: Literal["every-step", "interval", "none"] = Field(
        "every-step", description="what survives a power cut. every-step: all acknowledged steps; interval: all but "
        "those of about the last five seconds; none: what the system has written by itself"
    )  # fmt: skip
    mantissa_bits: int | None = Field(
        None, ge=1, le=22, description="bits of mantissa that raw tokens keep, so that they take less room; weights "
        "stay exact, and so do histograms, scalars and alerts; none: tokens are exact"
    )  # fmt: skip
    probe_every: int = Field(
        10, ge=0, description="steps between probes, which compare the predicted with the true entropy change; 0: never"
    )


class SignalsConfig(_Group):
    reference: Literal["group", "leave_one_out"] = Field(
        "group",
        description="what deviation is measured from. group: the group's mean; leave_one_out: the mean of the "
        "group's other rollouts",
    )
    scale: Literal["raw", "capped"] = Field(
        "raw", description="what weightings see. raw: the deviation; capped: the deviation divided by its largest "
        "possible value for the number of rollouts alive. The record always holds the raw deviation"
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_a_cap(self) -> SignalsConfig:
        if self.scale == "capped" and self.reference != "group":
            raise ValueError(
                f"signals.scale is 'capped' with signals.reference {self.reference!r}, whose cap is ln 2 for any "
                "number of rollouts, so dividing by it changes nothing. Set scale to raw or reference to group."
            )
        return self


class TrainConfig(_Group):
    """Configuration of `rlvr train`. Without arguments it trains the built-in policy on the built-in task."""

    model: str = Field(
        "builtin",
        description="builtin, builtin-small, builtin-paths, smollm2-135m, a local folder or a Hugging Face id",
    )
    task: str = Field(
        "chain",
        description="chain, chain:<low>-<high>, paths, reasoning_gym:<dataset>, jsonl:<path>, or "
        "package.module:function, which returns a task of your own",
    )
    reward: str | None = Field(
        None, description="package.module:function with TRL's signature, several with weights as 'task,my:short=0.2', "
        "of which the first says what is correct; none: the task's own"
    )  # fmt: skip
    reward_workers: int = Field(
        0, ge=0, description="processes that compute rewards, one prompt's completions at a time; 0: this process "
        "does, without a time limit"
    )  # fmt: skip
    reward_seconds: float = Field(
        10.0, gt=0, description="longest time of a reward function in a worker; a completion that takes longer alone "
        "has no reward"
    )  # fmt: skip
    steps: int = Field(200, ge=1, description="training steps")
    seed: int = Field(0, ge=0, description="seed of prompts and sampling; on one CPU a run is bit-reproducible")
    store: str = Field("runs", description="folder of the store")
    mirror: str | None = Field(
        None, description="also copy the run to this URL as it is recorded: s3://BUCKET/PREFIX, gs://, az:// "
        '("Beyond one disk" in docs/store.md)'
    )  # fmt: skip
    run: str | None = Field(None, description="name of the run; none: made from the weighting and the seed")
    comparison: str = Field("", description="runs with equal comparison and seed are paired on the Compare page")
    wandb: Literal["off", "offline", "online"] = Field("off", description="mirror scalars and alerts to wandb")
    alerts: str | None = Field(
        None, description="TOML file of alert rules and of routes to Slack, e-mail, ... (docs/notifications.md); none: "
        "the default rules, told in the terminal"
    )  # fmt: skip
    guard: bool = Field(
        False, description="act on alerts with the recommended actions (docs/actions.md); false: those of the alerts "
        "file, and without any a checkpoint when an alert fires"
    )  # fmt: skip
    shard: bool = Field(False, description="FSDP2: spread parameters and optimizer over the processes of torchrun")
    shard_gather: Literal["float32", "bfloat16"] = Field(
        "float32", description="how a sharded decoder layer is gathered for a pass; parameters, sums of gradients and "
        "optimizer stay float32. bfloat16: half the traffic and memory; CUDA's autocast would round the same weights, "
        "and norms are rounded too; a CPU then computes in bfloat16 as well"
    )  # fmt: skip
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's choice")
    save: str | None = Field(None, description="folder for the final policy; none: STORE/policies/RUN")
    rollout: RolloutConfig = RolloutConfig()
    weighting: Weighting = Ict()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    eval: EvalConfig = EvalConfig()
    record: RecordConfig = RecordConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    signals: SignalsConfig = SignalsConfig()

    @classmethod
    def of_run(cls, stored: Mapping[str, Any], **changed: Any) -> TrainConfig:
        """The configuration that a run's record holds, with top-level fields changed. Raises ConfigError.

        Older records hold the parameters of every weighting; those of other kinds than the run's are dropped. Those
        that do not say which prompts they evaluate took the first ones.
        """
        tree = dict(stored) | changed
        if isinstance(evaluation := tree.get("eval"), Mapping):
            tree["eval"] = {"choice": "first", **evaluation}
        weighting = tree.get("weighting", {})
        if isinstance(weighting, Mapping):
            kind = WEIGHTINGS.get(str(weighting.get("kind")))
            fields = weighting if kind is None else kind.model_fields
            tree["weighting"] = {k: value for k, value in weighting.items() if k in fields and value is not None}
        return cls(**tree)

    @field_validator("weighting", mode="before")
    @classmethod
    def _one_kind(cls, given: Any) -> Any:
        return make_weighting(given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _leaves_the_policy(self) -> TrainConfig:
        if self.weighting.kind in OFF_POLICY and self.optim.epochs == self.optim.mini_batches == 1:
            raise ValueError(
                f"weighting.kind {self.weighting.kind!r} acts only once the policy differs from the one that sampled. "
                "With one epoch and one mini-batch it never does: the run would be uniform. Set optim.mini_batches or "
                "optim.epochs to 2 or more."
            )
        return self

    @model_validator(mode="after")
    def _lora_is_whole(self) -> TrainConfig:
        if self.shard and self.lora.rank:
            raise ValueError(
                f"shard is true and lora.rank is {self.lora.rank}: adapters are small, so they are trained in whole "
                "copies. Leave out --shard, or set lora.rank to 0."
            )
        return self

    @model_validator(mode="after")
    def _gathers_layers(self) -> TrainConfig:
        if self.shard_gather == "bfloat16" and not self.shard:
            raise ValueError(
                "shard_gather is 'bfloat16' with shard false: without shards nothing is gathered. Add --shard, or "
                "leave out --shard-gather."
            )
        if self.shard_gather == "bfloat16" and self.record.probe_every:
            raise ValueError(
                f"record.probe_every is {self.record.probe_every} with shard_gather 'bfloat16': the probe compares the "
                "policy in float32 before and after an update, whose change bfloat16 rounds away. Set "
                "record.probe_every to 0, or shard_gather to float32."
            )
        return self

    @model_validator(mode="after")
    def _shards_keep_moments(self) -> TrainConfig:
        if self.shard and self.optim.kind == "adamw_8bit":
            raise ValueError(
                "optim.kind is 'adamw_8bit' with shard true: its moments share scales in blocks, which cannot be "
                "spread over ranks. Set optim.kind to adamw, whose 8 bytes a parameter are spread (from four ranks on "
                "no more than 8-bit moments take), or leave out --shard."
            )
        return self

    @model_validator(mode="after")
    def _shards_pass_in_step(self) -> TrainConfig:
        if self.shard and self.optim.micro_tokens:
            raise ValueError(
                f"optim.micro_tokens is {self.optim.micro_tokens} with shard true: sharded ranks run every pass "
                "together, and by tokens they would make different numbers of passes. Set optim.micro_batch instead."
            )
        return self

    @model_validator(mode="after")
    def _shards_sample_in_step(self) -> TrainConfig:
        backend = self.rollout.backend
        if self.shard and backend in ("paged", "vllm"):
            raise ValueError(
                f"rollout.backend is {backend!r} with shard true: sharded ranks run every pass together, and the "
                f"{backend} backend cannot. Leave out --shard, or set rollout.backend to generate."
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> TrainConfig:
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps} but the run has {self.steps} steps, so it would end "
                f"before it reached optim.lr. Set optim.warmup_steps to {self.steps - 1} or less."
            )
        return self

    @model_validator(mode="after")
    def _groups_divide(self) -> TrainConfig:
        if self.optim.mini_batches > self.rollout.prompts:
            raise ValueError(
                f"optim.mini_batches is {self.optim.mini_batches} but a step has {self.rollout.prompts} groups, and a "
                f"mini-batch needs at least one whole group. Set optim.mini_batches to {self.rollout.prompts} or less, "
                f"or rollout.prompts to {self.optim.mini_batches} or more."
            )
        return self

    @model_validator(mode="after")
    def _loss_can_act(self) -> TrainConfig:
        loss, tau = self.loss, self.rollout.temperature
        if loss.kl_coef and loss.kl_reference == "old" and self.optim.epochs == self.optim.mini_batches == 1:
            raise ValueError(
                "loss.kl_reference is 'old' but each step has one update, and it starts from the policy that sampled, "
                "so the KL is 0. Set optim.epochs or optim.mini_batches above 1, or loss.kl_reference to initial."
            )
        controlled = loss.entropy_target is not None and loss.entropy_actuator == "temperature"
        if controlled and not loss.temperature_min <= tau <= loss.temperature_max:
            raise ValueError(
                f"rollout.temperature is {tau}, but the entropy control starts there: expected loss.temperature_min to "
                f"loss.temperature_max, now {loss.temperature_min} to {loss.temperature_max}."
            )
        return self

    @model_validator(mode="after")
    def _budget_can_move(self) -> TrainConfig:
        loss, weighting = self.loss, self.weighting
        if loss.entropy_target is None or loss.entropy_actuator != "budget":
            return self
        if not isinstance(weighting, Budget):
            kinds = [kind for kind, model in WEIGHTINGS.items() if issubclass(model, Budget)]
            raise ValueError(
                f"loss.entropy_actuator is 'budget', but weighting.kind is {weighting.kind!r}, which has no budget. "
                f"Set weighting.kind to {' or '.join(kinds)}, or loss.entropy_actuator to coefficient or temperature."
            )
        if not loss.budget_min <= weighting.share <= loss.budget_max:
            raise ValueError(
                f"weighting.share is {weighting.share}, but the entropy control starts there: expected loss.budget_min "
                f"to loss.budget_max, now {loss.budget_min} to {loss.budget_max}."
            )
        return self
