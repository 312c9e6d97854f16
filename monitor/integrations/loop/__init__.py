"""A training loop of one's own, watched: `monitor = init(...)`, `monitor.step(...)` once a step, `monitor.finish()`."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from monitor.extras import require
from monitor.integrations.judging import alert_settings, exit_status, installed, judged_recorder, tell
from monitor.recorder import Recorder
from monitor.records import Alert, RunInfo, StepRecord
from monitor.store.reader import open_store

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("rlvr-monitor", "torch", "transformers", "vllm", "numpy", "duckdb")
_log = logging.getLogger("rlvr.monitor")
_TOLD = 20  # different faults that become events; the rest are only logged
Numbers = Any  # a tensor, an array or a list of numbers


def init(
    *,
    run: str,
    store: str | Path = "runs",
    config: Mapping[str, Any] | None = None,
    model: str = "",
    task: str = "",
    weighting: str = "uniform",
    seed: int = 0,
    warmup_steps: int = 0,
    alerts: bool | str | Path = True,
    on_alert: Callable[[Alert], None] = tell,
    correct_at: float = 1.0,
    tokenizer: Any = None,
    resume: bool = False,
    rank: int = 0,
    mirror: str | None = None,
) -> Monitor:
    """Open a run of the store for a training loop of your own; give its steps to the Monitor that this returns.

    Args:
        run: name of the run, new unless `resume`. store: folder of the store, made if missing.
        config, model, task, weighting, seed: what the run is, for its page and for comparisons.
        warmup_steps: steps before the alerts take their baseline.
        alerts: True: the default rules judge each step; False: none do; the path of an alerts file: its rules and
            routes. on_alert: gets each transition of an alert, in the recorder's thread; by default it is logged.
        correct_at: a rollout whose reward reaches this is correct.
        tokenizer: gives each token its text on the Tokens page, and the completions where `step` gets no texts.
            Anything with `decode(list of ids)`.
        resume: go on with a run that exists, as its next attempt. Steps without a number follow its last one.
        mirror: URL of an object store, s3://BUCKET/PREFIX say, to which a thread copies what is recorded (see "Beyond
            one disk" in docs/store.md).
        rank: of this process, where several train together: each opens the run and records its own rows. Means and
            alerts are then those of the rows of rank 0.

    Raises StoreError if the run cannot be opened, AlertsError for the alerts file. Afterwards nothing that goes wrong
    in the monitor reaches the loop.

    Example:
        monitor = rlvr_monitor.init(store="runs", run="mine")
        monitor.step(logits=logits, token_ids=ids, mask=mask, group_ids=groups, rewards=rewards)
    """
    info = RunInfo(
        name=run,
        model=model,
        task=task,
        weighting=weighting,
        seed=seed,
        warmup_steps=warmup_steps,
        config=dict(config or {}),
        environment={"packages": installed(PACKAGES)},
    )
    recorder = judged_recorder(
        store, info, settings=alert_settings(alerts), rank=rank, resume=resume, on_alert=on_alert, mirror=mirror
    )
    last = 0
    if resume:
        with open_store(store) as opened:
            last = int(opened.sql("SELECT coalesce(max(step), 0) FROM steps WHERE run = ?", [run]).rows[0][0])
    return Monitor(recorder, last, correct_at, None if tokenizer is None else tokenizer.decode)


class Monitor:
    """A run that a loop of your own records. Made by `rlvr_monitor.init`; usable in a `with` block.

    recorder: the run's Recorder, for `busy("evaluation")`, `event(...)`, `flush()` and `lost_steps`.
    """

    def __init__(
        self, recorder: Recorder, last_step: int, correct_at: float, decode: Callable[[list[int]], str] | None
    ) -> None:
        self.recorder = recorder
        self._last, self._correct_at, self._decode = last_step, correct_at, decode
        self._measure: Any = None  # of monitor.integrations.loop.measure, which needs torch
        self._taken = 0
        self._told: set[str] = set()
        self._ended: float | None = None  # when the last step did
        atexit.register(self._at_exit)

    def step(
        self,
        step: int | None = None,
        *,
        logits: Tensor | None = None,
        hidden_states: Tensor | None = None,
        head_weight: Tensor | None = None,
        head_bias: Tensor | None = None,
        logprobs: Tensor | None = None,
        entropies: Tensor | None = None,
        temperature: float = 1.0,
        token_ids: Tensor | None = None,
        mask: Tensor | None = None,
        group_ids: Numbers = None,
        rewards: Numbers = None,
        correct: Numbers = None,
        truncated: Numbers = None,
        advantages: Numbers = None,
        weights: Tensor | None = None,
        sampler_logprobs: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        scalars: Mapping[str, Any] | None = None,
    ) -> None:
        """Measure, record and judge one step of N rollouts of up to T response tokens. Give what the loop has.

        The policy's distributions, one of:
            logits: float [N, T, V], any floating dtype, before the softmax; [:, t] predicts response token t.
            hidden_states float [N, T, D], head_weight [V, D] and perhaps head_bias [V]: the head runs here, on one
                slab of positions at a time, so that [N, T, V] never exists: 64 MiB of float32 logits, 512 MiB of bf16
                on CUDA.
            logprobs: float [N, T], nats, of the sampled tokens, and perhaps entropies [N, T], nats, that the loop has
                computed. Then there is no Renyi-2 entropy, no deviation and without entropies no entropy; an event
                says so once.
        temperature: what logits are divided by, the sampling temperature; logprobs have it in them already.

        The rollouts:
            token_ids int [N, T] and mask bool [N, T]: needed with a distribution. Column t is response position t.
            group_ids: int [N], equal for rollouts of one prompt; best on the CPU, from a device it costs a wait.
                Without it no deviation and no figures of groups.
            rewards float [N]; correct bool [N], else rewards >= correct_at; truncated bool [N].
            advantages: float [N], or [N, T] where tokens have their own: regimes and predicted entropy changes.
            weights: float [N, T], of each token in the loss, by default 1.
            sampler_logprobs: float [N, T], nats, as the sampler reported them: the mismatch with the trainer.
            prompts, texts: N strings each; texts are the completions.
        scalars: numbers or 0-d tensors under keys of docs/metrics.md ("loss", "grad_norm", "lr", ...) or names of your
            own. They go before what is measured here.
        step: number of the step, by default one more than the last. The last one may come again with further scalars.

        Nothing is kept after the call, and no gradient flows. Costs: the signals, one copy to the host, and a fetch of
        group_ids from a device. Raises ValueError before anything is recorded if the arguments of the first step do
        not fit each other. From then on nothing raises: what fails is an event `step_error` of the run, and of that
        step the scalars alone are recorded.
        """
        begun = time.perf_counter()
        given = {
            "logits": logits, "hidden_states": hidden_states, "head_weight": head_weight, "head_bias": head_bias,
            "logprobs": logprobs, "entropies": entropies, "token_ids": token_ids, "mask": mask,
            "group_ids": group_ids, "rewards": rewards,
            "correct": correct, "truncated": truncated, "advantages": advantages, "weights": weights,
            "sampler_logprobs": sampler_logprobs, "prompts": prompts, "texts": texts,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        is_first = self._taken == 0
        if is_first and step is not None and (isinstance(step, bool) or not hasattr(step, "__index__") or step < 0):
            raise ValueError(f"step is {step!r}, expected a whole number >= 0. Leave it out to count up from 1.")
        numbers = dict(scalars or {})
        try:
            number = self._last + 1 if step is None else int(step)
            record, tokens, samples = self._made(number, given, temperature, numbers, is_first)
        except Exception as error:
            if is_first and isinstance(error, ValueError):
                raise
            number = self._last + 1 if step is None else self._number(step)
            self._fault(error, number)
            record, tokens, samples = StepRecord(number, numbers), None, None
        self._taken, self._last = self._taken + 1, max(self._last, number)
        times = self._times(begun, 0 if tokens is None else len(tokens)) if given else {}
        self.recorder.record(StepRecord(number, {**times, **record.scalars}, record.histograms), tokens, samples)

    def finish(self, status: Literal["finished", "stopped", "failed"] = "finished") -> None:
        """Write what waits and end the run. A second call does nothing. Without any, the end of the process does it."""
        atexit.unregister(self._at_exit)
        self.recorder.close(status)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.finish("finished" if kind is None else "failed" if issubclass(kind, Exception) else "stopped")

    def _made(
        self, number: int, given: Mapping[str, Any], temperature: float, scalars: Mapping[str, Any], is_first: bool
    ) -> Any:
        if not given:
            return StepRecord(number, scalars), None, None
        if self._measure is None:
            require("Monitor.step with more than scalars", ["torch"], "torch")
            from monitor.integrations.loop.measure import Measure

            self._measure = Measure(self._correct_at, self._decode, self.recorder.event)
        return self._measure(number, given, temperature, scalars, is_first)

    def _number(self, step: Any) -> int:
        try:
            return int(step)
        except (TypeError, ValueError):
            return self._last + 1

    def _fault(self, error: Exception, step: int) -> None:
        """An event of each different fault: one in every step must not fill the store."""
        text = f"{type(error).__name__}: {error}"
        _log.warning("step %d could not be measured: %s", step, text)
        if text not in self._told and len(self._told) < _TOLD:
            self._told.add(text)
            self.recorder.event("step_error", f"{text} Of this step only the scalars are recorded.", step)

    def _times(self, begun: float, tokens: int) -> dict[str, float]:
        now, before = time.perf_counter(), self._ended
        self._ended = now
        found = {"perf/record_s": now - begun}
        if before is not None:
            found |= {"perf/step_s": now - before, "perf/tokens_per_s": tokens / (now - before)}
        return found

    def _at_exit(self) -> None:
        self.finish(exit_status())
