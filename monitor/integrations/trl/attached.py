"""A trainer of TRL with our ears in it: its methods wrapped, its steps recorded, its loss weighted.

A rollout batch is followed from `_generate_and_score_completions`, which gives it, through `_compute_loss`, which has
it in shuffled micro-batches (each row carries its number), to the end of the optimizer step that used its last one.
Hidden states come from the pass that TRL makes for old log-probabilities, or else from the passes of the loss, whose
policy is still the one that sampled.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback

from monitor.alerts.engine import AlertEngine
from monitor.by_name import resolve
from monitor.errors import MonitorError
from monitor.integrations.aliases import ALIASES
from monitor.integrations.judging import history, tell
from monitor.integrations.trl import rollouts as rollouts_
from monitor.integrations.trl.guard import Guard, guard_settings
from monitor.integrations.trl.inside import OUTPUTS, Body, Head, unlike
from monitor.integrations.trl.ranks import Ranks
from monitor.integrations.trl.rollouts import Rollouts, Used
from monitor.integrations.trl.weights import AttachError, batch_scale, check_weighting, token_advantages
from monitor.integrations.weighted import Weighting
from monitor.metrics import METRICS
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.signals.memory import peak_memory_gib
from monitor.store.runs import run_names
from monitor.token_texts import TokenTexts

ROWS = "rlvr_rows"  # key of the rows' numbers in TRL's batches
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")  # losses with a bound on the ratio
PACKAGES = ("rlvr-monitor", "trl", "transformers", "torch", "accelerate", "peft", "vllm")
Result = TypeVar("Result")
_log = logging.getLogger("rlvr.monitor")


class Attached(TrainerCallback):
    """See `rlvr_monitor.attach`. `error`: why only TRL's own log is recorded, or None."""

    def __init__(
        self,
        trainer: Any,
        store: str | Path,
        run: str,
        weighting: str | None,
        guard: bool | str | Path,
        correct_at: float,
        mirror: str | None = None,
    ) -> None:
        self._is_grpo = _is_grpo(trainer)
        if getattr(trainer, "rlvr_attached", None) is not None:
            raise AttachError("This trainer is attached already. Call attach once for each trainer.")
        self.trainer, self.store, self.run, self.correct_at = trainer, Path(store), run, correct_at
        self.mirror = mirror
        self.ranks = Ranks(trainer.accelerator)
        self.settings = guard_settings(guard)
        self.weighting: Weighting | None = None
        lacking = unlike(trainer)
        self.error: str | None = f"TRL {_version('trl')} has no {', '.join(lacking)} as expected" if lacking else None
        if weighting is not None:
            if lacking:
                raise AttachError(f"weighting {weighting!r} cannot act: {self.error}. Take trl 1.16, or leave it out.")
            check_weighting(trainer, weighting, self._is_grpo)
            self.weighting = resolve("trainer.learning.attached:AttachedWeighting")(
                weighting, trainer.args.seed, self.ranks.rank
            )
        self.recorder: Recorder | None = None
        self.guard: Guard | None = None
        self._start_over()
        trainer.rlvr_attached = self
        trainer.add_callback(self)
        self._wrap("train", self._train)
        self._wrap("evaluate", self._evaluate)
        if not lacking:
            self._wrap("_generate_and_score_completions", self._generate)
            self._wrap("_get_per_token_logps_and_entropies", self._score)
            self._wrap("_calculate_rewards", self._reward)
            self._wrap("_compute_loss", self._loss)
            for name, wrapper in (("_generate", self._sample), ("_get_grad_norm", self._norm)):
                if hasattr(trainer, name):
                    self._wrap(name, wrapper)

    def _start_over(self) -> None:
        self._fallen = False
        self._body: Body | None = None
        self._head: Head | None = None
        self._texts: TokenTexts | None = None
        self._passes: list[tuple[Tensor, list[Tensor]]] | None = None  # while TRL scores: (log-probabilities, states)
        self._in_loss: list[tuple[Tensor, list[Tensor]]] | None = None  # while it computes a loss
        self._rewards: tuple[tuple[Any, ...], Tensor] | None = None
        self._current: Rollouts | None = None
        self._left = 0  # micro-batches that will still have the current rollout batch
        self._complete: list[Rollouts] = []
        self._losses: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self._updates: list[Tensor] = []  # losses of the optimizer steps since the last record
        self._norms: list[Tensor | float] = []
        self._evaluated: list[Tensor] = []
        self._lr = 0.0
        self._watches: dict[str, _Watch] = {name: _Watch() for name in ("rollout", "reward", "record", "extra_forward")}
        self._begun = time.perf_counter()

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(self.trainer, name)
        setattr(self.trainer, name, functools.wraps(original)(functools.partial(wrapper, original)))

    @property
    def _on(self) -> bool:
        """Whether rollout batches are followed. It is the same on all ranks, unlike `error`."""
        return self.recorder is not None and not self._fallen

    # --- what TRL calls

    def _train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException as error:
            self._close("failed" if isinstance(error, Exception) else "stopped")
            raise

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.recorder is None:
            return original(*args, **kwargs)
        self._evaluated = []
        with self.recorder.busy("evaluation"):
            found = original(*args, **kwargs)
        if self._on and self._evaluated:
            self._guarded(self._record_evaluation)
        self._begun = time.perf_counter()  # an evaluation is not part of a step
        return found

    def _sample(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._passes is None else self._watches["rollout"]:
            return original(*args, **kwargs)

    def _generate(self, original: Callable[..., Any], inputs: Any) -> Any:
        if not (self._on and self.trainer.model.training):
            return original(inputs)
        self._passes, self._rewards = [], None
        try:
            out = original(inputs)
            with self._watches["record"]:
                self._take(out)
        finally:
            self._passes = self._rewards = None
        return out

    def _score(self, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = self._in_loss if self._in_loss is not None else self._passes
        if not self._on or wanted is None or (wanted is self._passes and model is not self.trainer.model):
            return original(model, *args, **kwargs)
        names = ("input_ids", "attention_mask", "logits_to_keep")
        width = {**dict(zip(names, args, strict=False)), **kwargs}.get("logits_to_keep")
        known = wanted is self._in_loss and self._current is not None and self._current.signals is not None
        listening = None if known else self._guarded(lambda: self._ears().listening(int(width or 0)))
        with listening or nullcontext([]) as heard:
            result = original(model, *args, **kwargs)
        wanted.append((result[0], heard))
        return result

    def _reward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._passes is None else self._watches["reward"]:
            found = original(*args, **kwargs)
        if self._on and not self.trainer.model.training:
            self._guarded(lambda: self._evaluated.append(rollouts_.total_rewards(self.trainer, found)))
        if self._passes is not None:
            names = ("inputs", "prompts", "completions", "completion_ids_list")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._rewards = (tuple(given[name] for name in names), found)
        return found

    def _loss(self, original: Callable[..., Any], model: Any, inputs: Any) -> Any:
        batch = self._current
        if not self._on or batch is None or ROWS not in inputs:
            return original(model, inputs)
        weighted = self._guarded(lambda: self._weighted(batch, inputs))
        self._in_loss = []
        try:
            loss = original(model, weighted or inputs)
            with self._watches["record"]:
                self._guarded(lambda: self._use(batch, weighted or inputs, loss))
        finally:
            self._in_loss = None
        self._left -= 1
        if self._left == 0:
            self._complete.append(batch)
            if self.trainer.accelerator.distributed_type.name == "DEEPSPEED":  # its backward pass updates the weights
                self._measure_complete()
        return loss

    def _norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        norm = original(*args, **kwargs)
        if self._on and norm is not None:
            self._norms.append(norm)
        return norm

    # --- a rollout batch

    def _take(self, out: dict[str, Any]) -> None:
        """Follows a new rollout batch; its signals and weights where they are possible or needed now."""
        batch = self._guarded(lambda: self._made(out))
        if not self._agreed() or batch is None:
            return
        self._current = batch
        out[ROWS] = torch.arange(len(batch.mask), device=batch.mask.device)
        self._left = self.trainer.args.steps_per_generation * self.trainer.num_iterations
        if self.weighting is not None and batch.hidden is None:
            with self._watches["extra_forward"].on(batch.mask.device):
                batch.hidden = self._guarded(lambda: self._ears().extra_forward(out))
            if not self._agreed():
                return
        if batch.hidden is not None:
            self._guarded(lambda: self._measure(batch))
        if self.weighting is not None and self._agreed():
            self._guarded(lambda: self._weigh(batch, self.weighting))

    def _made(self, out: dict[str, Any]) -> Rollouts:
        lacking = [name for name in OUTPUTS if name not in out]
        if lacking or self._rewards is None or self._passes is None:
            raise AttachError(f"TRL's rollout batch has no {', '.join(lacking) or 'rewards'}.")
        batch = rollouts_.made(self.trainer, out, *self._rewards, self.ranks, self.correct_at)  # type: ignore[arg-type]
        old = out.get("old_per_token_logps")
        for logprobs, heard in self._passes if self._is_grpo else self._passes[:1]:
            if logprobs is old or not self._is_grpo:
                batch.old, batch.hidden = logprobs, torch.cat(heard)
        batch.with_reference = "ref_per_token_logps" in out
        batch.with_clip = not self._is_grpo or self.trainer.loss_type in CLIPPED
        return batch

    def _measure(self, batch: Rollouts) -> None:
        self._head = self._head or Head(self.trainer)
        batch.signals = rollouts_.group_signals(batch, self._head, self.trainer.temperature, self.ranks)
        batch.hidden = None

    def _weigh(self, batch: Rollouts, weighting: Weighting | None) -> None:
        assert weighting is not None and batch.signals is not None
        step = self.trainer.state.global_step + 1
        batch.weights = weighting.weights(batch.signals, batch.mask, batch.advantages, step, self.ranks)
        batch.scale = batch_scale(batch, weighting, self.trainer.loss_type, self.ranks)

    def _weighted(self, batch: Rollouts, inputs: dict[str, Any]) -> dict[str, Any] | None:
        if self.weighting is None or batch.weights is None:
            return None
        rows = inputs[ROWS]
        advantages = token_advantages(
            inputs["advantages"],
            batch.weights[rows],
            batch.mask[rows],
            self.trainer.loss_type,
            self.weighting.normalise,
            batch.scale,
        )
        return {**inputs, "advantages": advantages}

    def _use(self, batch: Rollouts, inputs: dict[str, Any], loss: Tensor) -> None:
        """Keeps what a micro-batch's loss used."""
        assert self._in_loss
        logprobs, heard = self._in_loss[0]
        rows, mask = inputs[ROWS], batch.mask[inputs[ROWS]]
        logprobs = logprobs.detach().float()
        old = logprobs if batch.old is None else batch.old[rows].float()
        log_ratio = torch.where(mask, logprobs - old, 0.0)
        low, high = self._clipped(log_ratio, mask, inputs["advantages"])
        gap = torch.zeros_like(log_ratio)
        if batch.with_reference:
            gap = torch.where(mask, inputs["ref_per_token_logps"].float() - logprobs, 0.0)
        batch.used.append(Used(rows, log_ratio, low, high, torch.exp(gap) - gap - 1))
        if batch.signals is None:
            batch.hear(rows, torch.cat(heard))
        self._losses.append(loss.detach())

    def _clipped(self, log_ratio: Tensor, mask: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """bool [b, T] each: tokens that the lower and the upper bound of the loss held back."""
        trainer, ratio = self.trainer, log_ratio.exp()
        if not self._is_grpo:  # RLOO: the ratio of the response
            ratio = log_ratio.sum(1, keepdim=True).exp()
        elif trainer.importance_sampling_level == "sequence":
            ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
        sign = advantages if advantages.ndim == 2 else advantages.unsqueeze(1)
        if self._is_grpo and trainer.loss_type == "cispo":
            low, high = torch.zeros_like(ratio, dtype=torch.bool), (ratio > trainer.epsilon_high) & (sign > 0)
        else:
            low = (ratio < 1 - trainer.epsilon_low) & (sign < 0)
            high = (ratio > 1 + trainer.epsilon_high) & (sign > 0)
        return mask & low, mask & high

    def _ears(self) -> Body:
        self._body = self._body or Body(self.trainer)
        return self._body

    # --- transformers' events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the run. Raises StoreError: a monitor that cannot start says so before anything is trained."""
        self._start_over()
        resumed = state.global_step > 0 and self.run in _known_runs(self.store)
        rules, warmup = self.settings.rules, 0 if self.weighting is None else self.weighting.warmup_steps
        engines = [AlertEngine(rules, warmup, total_steps=state.max_steps) for _ in range(2)]
        past = history(self.store, self.run, engines[0].series) if resumed and self.ranks.rank == 0 else {}
        for step, scalars in past.items():
            for engine in engines if step <= state.global_step else ():
                engine.observe(step, scalars)

        def opened() -> Recorder:
            sinks: list[Any] = []
            if self.settings.routes and self.ranks.rank == 0:
                sinks.append(resolve("monitor.alerts.delivery:AlertSink")(self.store, self.settings.routes))
            return Recorder(
                self.store,
                self._info(args, warmup),
                rank=self.ranks.rank,
                resume=resumed,
                engine=engines[0] if self.ranks.rank == 0 else None,
                sinks=sinks,
                on_alert=tell,
                mirror=self.mirror,
            )

        self.recorder = _rank_0_first(self.ranks, opened)
        if self.settings.actions:
            self.guard = Guard(self.settings.actions, engines[1], self.trainer, self.ranks, self.recorder.event)
        if self.error is not None:
            self._fall_back()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure_complete()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on:
            self._guarded(self._after_update)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on and self._complete:
            self._finish(state.global_step, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unfinished = self._current if self._left else None
        if self._on and unfinished is not None and unfinished.signals is not None and unfinished.used:
            self._complete.append(unfinished)  # training ended between the updates of a rollout batch
            self._finish(state.global_step, control)
        self._close("stopped" if state.global_step < state.max_steps else "finished")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Records TRL's own scalars where nothing better is had."""
        if self.recorder is not None and self._fallen and logs:
            names = {alias.column: alias.key for alias in ALIASES["TRL 1.16"]}
            scalars = {names.get(key, key): value for key, value in logs.items() if value is not None}
            scalars = {key: float(value) for key, value in scalars.items() if key in METRICS}
            if scalars:
                self.recorder.record(StepRecord(state.global_step, scalars))
                if self.guard is not None:
                    self.guard.after(state.global_step, scalars, control)

    # --- a step

    def _measure_complete(self) -> None:
        """Signals of the rollout batches that have been used up, while the head is still that of the policy."""
        waiting = [batch for batch in self._complete if batch.signals is None] if self._on else []
        if not waiting:
            return
        with self._watches["record"]:
            for batch in waiting if self._agreed() else ():
                self._guarded(functools.partial(self._measure, batch))

    def _after_update(self) -> None:
        self._lr = float(self.trainer.optimizer.param_groups[0]["lr"])  # the schedule moves on only after this
        if self._losses:
            losses = torch.stack([loss.float() for loss in self._losses])
            self._updates.append(losses.sum() if self._is_grpo else losses.mean())  # RLOO's are divided only later
            self._losses = []

    def _finish(self, step: int, control: Any) -> None:
        """Records a step: the rollout batches whose last update it had. Nothing raises out of it."""
        batches, self._complete = self._complete, []
        with self._watches["record"]:
            if not self._agreed():
                return
            made = self._guarded(lambda: self._record(step, batches))
            if self._current in batches:
                self._current = None
        if self.guard is not None and self._agreed() and made is not None:
            self.guard.after(step, made.scalars, control)

    def _record(self, step: int, batches: Sequence[Rollouts]) -> StepRecord:
        trainer, recorder = self.trainer, self.recorder
        assert recorder is not None
        self._texts = self._texts or TokenTexts(trainer._tokenizer.decode)
        scalars: dict[str, float | Tensor] = {"lr": self._lr, "temperature": float(trainer.temperature)}
        if getattr(trainer, "_entropy_bonus_enabled", False):
            scalars["entropy_coef"] = float(trainer.entropy_coef)
        if self._updates:
            scalars["loss"] = self.ranks.sum(torch.stack(self._updates).mean()) / self.ranks.world
        if self._norms:
            norms = [torch.as_tensor(norm, dtype=torch.float32).reshape(()) for norm in self._norms]
            scalars["grad_norm"] = torch.stack([norm.to(batches[0].mask.device) for norm in norms]).mean()
        names = list(trainer.reward_func_names)
        record, tokens, samples = rollouts_.record_of(step, batches, scalars, names, self._texts, self.ranks)
        record = StepRecord(step, {**record.scalars, **self._times(len(tokens))}, record.histograms)
        recorder.record(record, tokens=tokens, samples=samples)
        self._updates, self._norms = [], []
        return record

    def _record_evaluation(self) -> None:
        """The share of correct rollouts of TRL's evaluation, which every rank knows."""
        trainer, recorder = self.trainer, self.recorder
        assert recorder is not None
        size = int(getattr(trainer, "num_generations_eval", trainer.num_generations))
        scalars = rollouts_.evaluation_scalars(torch.cat(self._evaluated), size, self.correct_at)
        recorder.record(StepRecord(trainer.state.global_step, scalars))
        if self.guard is not None:
            self.guard.after(trainer.state.global_step, scalars, trainer.control)

    def _times(self, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        step_s, self._begun = now - self._begun, now
        found = {f"perf/{name}_s": watch.take() for name, watch in self._watches.items()}
        found["perf/update_s"] = max(
            0.0, step_s - sum(found[f"perf/{part}_s"] for part in ("rollout", "reward", "record"))
        )
        found["perf/record_s"] -= found["perf/extra_forward_s"]  # which was made inside
        del found["perf/reward_s"]
        if self.weighting is None:
            del found["perf/extra_forward_s"]
        return found | {
            "perf/step_s": step_s,
            "perf/tokens_per_s": tokens / step_s,
            "perf/memory_gib": peak_memory_gib(),
        }

    # --- what goes wrong

    def _guarded(self, work: Callable[[], Result]) -> Result | None:
        """The result, or None after an error, of which the run then takes note: monitoring must not end training."""
        if self.error is not None:
            return None
        try:
            return work()
        except Exception as error:
            _log.warning("attach failed", exc_info=True)
            self.error = f"{type(error).__name__}: {error}"
            if self.ranks.world == 1:
                self._fall_back()
            return None

    def _agreed(self) -> bool:
        """Whether every rank is well. If one is not, all of them fall back together."""
        if self._fallen or self.ranks.all(self.error is None):
            return not self._fallen
        self.error = self.error or "Another process failed"
        self._fall_back()
        return False

    def _fall_back(self) -> None:
        lost = " Its weighting no longer acts: every token has weight 1." if self.weighting is not None else ""
        message = f"{self.error}. From here on only the scalars of TRL's own log are recorded.{lost}"
        _log.warning(message)
        self._fallen, self._current, self._complete = True, None, []
        if self.recorder is not None:
            self.recorder.event("attach_error", message, self.trainer.state.global_step)

    def _close(self, status: str) -> None:
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close(status)

    def _info(self, args: Any, warmup: int) -> RunInfo:
        model = getattr(self.trainer.model, "config", None)
        return RunInfo(
            name=self.run,
            model=str(getattr(model, "_name_or_path", "") or type(self.trainer.model).__name__),
            weighting="uniform" if self.weighting is None else self.weighting.kind,
            seed=int(args.seed),
            warmup_steps=warmup,
            config={
                "trainer": type(self.trainer).__name__,
                "weighting": {"kind": "uniform"} if self.weighting is None else self.weighting.settings(),
                "trl": {key: value if _is_plain(value) else str(value) for key, value in args.to_dict().items()},
            },
            environment={
                "packages": {name: _version(name) for name in PACKAGES if _version(name)},
                "device": str(args.device),
                "processes": self.ranks.world,
            },
        )


class _Watch:
    """Adds up times of `with` blocks, seconds: wall, or on a CUDA device that of the device, read without waiting."""

    def __init__(self) -> None:
        self._seconds, self._start = 0.0, 0.0
        self._events: list[tuple[Any, Any]] = []
        self._cuda = False

    def on(self, device: torch.device) -> _Watch:
        self._cuda = device.type == "cuda"
        return self

    def __enter__(self) -> None:
        if self._cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events.append(pair)
            pair[0].record()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._start

    def take(self) -> float:
        """The sum so far; starts again. On CUDA the device must have passed the last block."""
        found = self._seconds + sum(first.elapsed_time(last) / 1e3 for first, last in self._events)
        self._seconds, self._events = 0.0, []
        return found


def _is_grpo(trainer: Any) -> bool:
    """True for a GRPOTrainer, False for an RLOOTrainer. Raises AttachError for anything else."""
    from trl import GRPOTrainer, RLOOTrainer

    if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
        raise AttachError(
            f"attach was given a {type(trainer).__name__}, expected a trl.GRPOTrainer or trl.RLOOTrainer. For a loop "
            "of your own see docs/own_loop.md, for files of other trainers docs/integrations.md."
        )
    return isinstance(trainer, GRPOTrainer)


def _rank_0_first(ranks: Ranks, opened: Callable[[], Recorder]) -> Recorder:
    """Rank 0 opens its recorder first. If it cannot, no other rank starts. Raises MonitorError on all."""
    recorder, refused = None, None
    if ranks.rank == 0:
        try:
            recorder = opened()
        except MonitorError as error:
            refused = error
    message = ranks.share(None if refused is None else str(refused))
    if message:
        raise refused or MonitorError(message)
    return recorder or opened()


def _known_runs(store: Path) -> list[str]:
    return run_names(store) if (store / "runs").is_dir() else []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
