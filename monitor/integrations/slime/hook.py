"""Hook: what slime and miles hand to their log functions, recorded as a run."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.errors import MonitorError
from monitor.integrations.judging import alert_settings, exit_status, installed, judged_recorder
from monitor.integrations.like_wandb.names import STEPS, Names
from monitor.integrations.like_wandb.values import flat, number
from monitor.integrations.loop.measure import Measure
from monitor.records import RunInfo, SampleTable, StepRecord, TokenTable
from monitor.store.runs import free_name, run_names, safe_name

PACKAGES = ("rlvr-monitor", "slime", "miles", "torch", "transformers", "sglang", "ray")
OPTIONS = ("rlvr_store", "rlvr_run", "rlvr_alerts", "rlvr_correct_at")
_SECRET = re.compile(r"secret|password|api_?key|wandb_key|_token$")
_log = logging.getLogger("rlvr.monitor")


class Hook:
    """Records the rollouts and evaluations of one training. Its options are attributes of the trainer's arguments:

    rlvr_store: folder of the store, else RLVR_STORE, else "runs". rlvr_run: name of the run, else wandb_group, else
    "slime"; with -2 behind it if the store has it, unless the training goes on from a checkpoint (start_rollout_id):
    then the run goes on. rlvr_alerts: path of an alerts file, or false. rlvr_correct_at: a rollout whose reward reaches
    this is correct (1.0).

    Raises MonitorError if the run cannot be opened or an option is unknown; afterwards nothing raises into training.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        unknown = [name for name in vars(args) if name.startswith("rlvr_") and name not in OPTIONS]
        if unknown:
            raise MonitorError(f"The arguments have {', '.join(unknown)}, expected some of {', '.join(OPTIONS)}.")
        store = Path(self._arg("rlvr_store") or os.environ.get("RLVR_STORE") or "runs").expanduser().absolute()
        name = safe_name(str(self._arg("rlvr_run") or self._arg("wandb_group") or "slime"))
        goes_on = bool(self._arg("start_rollout_id")) and (store / "runs").is_dir() and name in run_names(store)
        seed = self._arg("seed")
        info = RunInfo(
            name=name if goes_on else free_name(store, name),
            model=str(self._arg("hf_checkpoint") or ""),
            task=str(self._arg("prompt_data") or ""),
            weighting="",  # the log functions do not tell it
            seed=seed if isinstance(seed, int) else 0,
            config={"slime": _plain(vars(args))},
            environment={"packages": installed(PACKAGES)},
        )
        alerts = self._arg("rlvr_alerts")
        settings = alert_settings(True if alerts is None else alerts)
        self.recorder = judged_recorder(store, info, settings=settings, resume=goes_on)
        _log.warning("rlvr records this training as run %s of %s.", info.name, store)
        self._names = Names(lambda text: self.recorder.event("name", text))
        correct_at = self._arg("rlvr_correct_at")
        self._correct_at = 1.0 if correct_at is None else float(correct_at)
        self._measure = Measure(self._correct_at, self._decoder(), self.recorder.event)
        self._told: set[str] = set()
        self._early: dict[int, dict[str, float]] = {}  # evaluations before the rollouts of their step
        self._last = -1
        atexit.register(self._at_exit)

    def rollouts(
        self, rollout_id: int, samples: Sequence[Any], extra: Mapping[str, Any] | None, seconds: float
    ) -> None:
        """As the trainer calls `log_rollout_data`, without its arguments. Never raises."""
        step = self._step(rollout_id)
        scalars: dict[str, float] = {}
        tokens: TokenTable | None = None
        table: SampleTable | None = None
        histograms: Any = ()
        try:
            scalars = self._named(extra) | {"perf/rollout_s": float(seconds)}
            if samples:
                record, tokens, table = self._measure(step, given(samples, self._args), 1.0, {}, False)
                measured = {key: value for key, value in record.scalars.items() if key != "perf/memory_gib"}
                scalars, histograms = {**scalars, **measured, **self._temperature()}, record.histograms
        except Exception as error:
            self.fault(error, step)
        for early in [other for other in self._early if other < step]:
            self.recorder.record(StepRecord(early, self._early.pop(early)))
        scalars |= self._early.pop(step, {})
        self.recorder.record(StepRecord(step, scalars, histograms), tokens, table)
        self._last = step
        self._end_after(rollout_id, is_evaluation=False)

    def evaluation(self, rollout_id: int, data: Mapping[str, Any], extra: Mapping[str, Any] | None) -> None:
        """As the trainer calls `log_eval_rollout_data`, without its arguments. Never raises."""
        step = self._step(rollout_id)
        scalars: dict[str, float] = {}
        try:
            scalars = self._named(extra)
            for name, found in data.items():
                scalars |= evaluation_scalars(str(name).replace("/", "_"), found, self._correct_at)
        except Exception as error:
            self.fault(error, step)
        if step > self._last:  # before the step's rollouts, which a second record of the step could not hold
            self._early[step] = self._early.get(step, {}) | scalars
        else:
            self.recorder.record(StepRecord(step, scalars))
        self._end_after(rollout_id, is_evaluation=True)

    def fault(self, error: Exception, step: Any) -> None:
        """An event of each different fault, once."""
        text = f"{type(error).__name__}: {error}"
        _log.warning("Step %s could not be recorded as a whole: %s", step, text)
        if text not in self._told:
            self._told.add(text)
            self.recorder.event("slime_error", text, step if isinstance(step, int) else None)

    def close(self, status: str) -> None:
        """Ends the run; a second call does nothing."""
        atexit.unregister(self._at_exit)
        for step in sorted(self._early):
            self.recorder.record(StepRecord(step, self._early.pop(step)))
        self.recorder.close(status)

    def _end_after(self, rollout_id: int, *, is_evaluation: bool) -> None:
        """The process is killed without a word: the run ends with the last call that the trainer will make."""
        total = self._arg("num_rollout")
        is_last = isinstance(total, int) and rollout_id == total - 1 and self._last == self._step(rollout_id)
        if is_last and is_evaluation == (self._arg("eval_interval") is not None):
            self.close("finished")

    def _arg(self, name: str) -> Any:
        return getattr(self._args, name, None)

    def _step(self, rollout_id: int) -> int:
        """The number that the trainer's own log has."""
        if not self._arg("wandb_always_use_train_step"):
            return int(rollout_id)
        rollouts = self._args.rollout_batch_size * self._args.n_samples_per_prompt
        return int(rollout_id * rollouts // self._args.global_batch_size)

    def _temperature(self) -> dict[str, float]:
        temperature = number(self._arg("rollout_temperature"))
        return {} if temperature is None else {"temperature": temperature}

    def _named(self, extra: Mapping[str, Any] | None) -> dict[str, float]:
        found = {name: value for name, raw in flat(extra or {}).items() if (value := number(raw)) is not None}
        found = {name: value for name, value in found.items() if name not in STEPS}
        self._names.see(found)
        return {key: value for name, value in found.items() if (key := self._names[name]) is not None}

    def _decoder(self) -> Callable[[list[int]], str] | None:
        """The tokenizer's, for the texts of tokens; without one they are shown by their ids."""
        path = self._arg("hf_checkpoint")
        if not path:
            return None
        try:
            from transformers import AutoTokenizer

            tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except Exception as error:
            self.recorder.event("no_tokenizer", f"Tokens have no texts, as {path} has no tokenizer: {error}")
            return None
        return tokenizer.decode

    def _at_exit(self) -> None:
        self.close(exit_status())


def given(samples: Sequence[Any], args: Any) -> dict[str, Any]:
    """Arguments of `Monitor.step` from Samples: N rollouts, T the longest response. The mask is the loss mask.

    Log-probabilities are those of the sampler, where each sample has them; the trainer makes its own later.
    """
    n, width = len(samples), max(max(sample.response_length for sample in samples), 1)
    token_ids, mask = np.zeros((n, width), np.int64), np.zeros((n, width), bool)
    logprobs = np.zeros((n, width), np.float32)
    has_logprobs = True
    for row, sample in enumerate(samples):
        length = sample.response_length
        if not length:
            continue
        token_ids[row, :length] = sample.tokens[-length:]
        mask[row, :length] = True if sample.loss_mask is None else np.asarray(sample.loss_mask, bool)
        found = sample.rollout_log_probs
        has_logprobs = has_logprobs and found is not None and len(found) == length
        if has_logprobs:
            logprobs[row, :length] = found
    prompts = [_text(sample.prompt) for sample in samples]
    rewards = [_reward(sample, args) for sample in samples]
    arguments: dict[str, Any] = {
        "token_ids": torch.from_numpy(token_ids),
        "mask": torch.from_numpy(mask),
        "group_ids": _groups([prompt if sample.group_index is None else sample.group_index
                              for sample, prompt in zip(samples, prompts, strict=True)]),
        "truncated": torch.tensor([_is_truncated(sample) for sample in samples]),
        "prompts": prompts,
        "texts": [str(sample.response) for sample in samples],
    }  # fmt: skip
    if has_logprobs:
        arguments["logprobs"] = torch.from_numpy(logprobs)
    if None not in rewards:
        arguments["rewards"] = torch.tensor(rewards, dtype=torch.float32)
    return arguments


def evaluation_scalars(split: str, found: Mapping[str, Any], correct_at: float) -> dict[str, float]:
    """Of one data set: pass@1 and, where each of its prompts has k > 1 rollouts, pass@k; length and truncation.

    A rollout without a reward is wrong, as in the trainer's own log.
    """
    scalars: dict[str, float] = {}
    samples = found.get("samples") or []
    rewards = [0.0 if reward is None else reward for reward in found.get("rewards") or []]
    if rewards and all(isinstance(reward, int | float) for reward in rewards):
        correct = np.asarray(rewards, np.float64) >= correct_at
        scalars["pass@1"] = float(correct.mean())
        if len(samples) == len(rewards):
            groups = _groups([_text(sample.prompt) for sample in samples]).numpy()
            (k, *others) = set(np.bincount(groups).tolist())
            if k > 1 and not others:
                scalars[f"pass@{k}"] = float((np.bincount(groups, correct) > 0).mean())
    if samples:
        scalars["response_length"] = float(np.mean([_length(sample) for sample in samples]))
    truncated = found.get("truncated") or [_is_truncated(sample) for sample in samples]
    if truncated:
        scalars["truncated_share"] = float(np.mean(truncated))
    return {f"eval/{split}/{name}": value for name, value in scalars.items()}


def _groups(keys: Sequence[Any]) -> Tensor:
    """int64 [n]: equal numbers for equal keys, from 0 in the order they come."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _reward(sample: Any, args: Any) -> float | None:
    """The reward that the trainer takes; None where it is no number."""
    reward, key = sample.reward, getattr(args, "reward_key", None)
    if key and isinstance(reward, Mapping):
        reward = reward.get(key)
    return float(reward) if isinstance(reward, int | float) else None


def _length(sample: Any) -> int:
    return sample.response_length if sample.loss_mask is None else int(sum(sample.loss_mask))


def _is_truncated(sample: Any) -> bool:
    return getattr(sample.status, "value", sample.status) == "truncated"


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are numbers, texts or lists of them, without keys of accounts."""
    simple = int | float | str | bool | None
    return {
        name: value
        for name, value in arguments.items()
        if not _SECRET.search(name)
        and (isinstance(value, simple) or (isinstance(value, list) and all(isinstance(one, simple) for one in value)))
    }
