"""What `Monitor.step` was given: checked, measured, and made into the records of a step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from monitor.records import SampleTable, StepRecord, TokenTable
from monitor.signals import TokenSignals, token_signals
from monitor.signals.completions import repetition, same_text
from monitor.signals.memory import peak_memory_gib
from monitor.signals.outcomes import group_index, outcome_scalars
from monitor.signals.slabs import CUDA_SLAB_ELEMENTS, SLAB_ELEMENTS, slab_signals
from monitor.signals.stats import signal_statistics, step_record, to_host
from monitor.token_texts import TokenTexts

SOURCES = ("logits", "hidden_states", "logprobs")
# the dimensions of each argument, and what it holds; a letter's size is that of the first argument given
SHAPES = {
    "logits": ("NTV", "float"),
    "hidden_states": ("NTD", "float"),
    "logprobs": ("NT", "float"),
    "entropies": ("NT", "float"),
    "head_weight": ("VD", "float"),
    "head_bias": ("V", "float"),
    "mask": ("NT", "bool"),
    "token_ids": ("NT", "int"),
    "weights": ("NT", "float"),
    "sampler_logprobs": ("NT", "float"),
    "group_ids": ("N", "int"),
    "rewards": ("N", "number"),
    "correct": ("N", "bool"),
    "truncated": ("N", "bool"),
    "advantages": ("N", "number"),  # or "NT"
}
TEXTS = ("prompts", "texts")
SAID = {"entropy": "entropy", "renyi2": "Renyi-2 entropy", "deviation": "deviation"}  # which may be unknown
POSITIVE = 0.01  # nats; a log-probability above this is no rounding


class Measure:
    """Called with what each step was given. event: gets (kind, sentence, step), for what is said once."""

    def __init__(
        self,
        correct_at: float,
        decode: Callable[[list[int]], str] | None,
        event: Callable[[str, str, int], None],
    ) -> None:
        self._correct_at, self._decode, self._event = correct_at, decode, event
        self._texts = TokenTexts(decode or (lambda ids: f" {ids[0]}"))
        self._has_told = False

    def __call__(
        self, step: int, given: Mapping[str, Any], temperature: float, scalars: Mapping[str, Any], is_first: bool
    ) -> tuple[StepRecord, TokenTable | None, SampleTable | None]:
        """The records of a step, with one copy to the host. is_first: look at values too, which waits for the device.

        Raises ValueError for arguments that do not fit.
        """
        batch = checked(given, temperature)
        check_numbers(scalars)
        if is_first:
            check_values(batch)
        groups, rewards, correct = batch.get("group_ids"), batch.get("rewards"), batch.get("correct")
        if correct is None and rewards is not None:
            correct = rewards >= self._correct_at
        found: dict[str, Any] = {**_outcomes(batch, correct), "perf/memory_gib": peak_memory_gib()}
        tokens = None
        if any(name in batch for name in SOURCES):
            mask = batch["mask"]
            signals, lacking = _signals(batch, temperature)
            weights = batch.get("weights", mask)
            statistics = signal_statistics(
                signals,
                mask,
                weights.float(),
                torch.zeros(len(mask), dtype=torch.bool) if correct is None else correct,
                advantages=batch.get("advantages"),
                sampler_logprobs=batch.get("sampler_logprobs"),
                lacking=lacking,
            )
            found |= {"temperature": temperature} if "logprobs" not in batch else {}
            record, tokens = step_record(
                step, signals, batch["token_ids"], mask, weights, statistics, scalars={**found, **scalars}
            )
            if correct is None:
                known = tuple(h for h in record.histograms if h.split not in ("correct", "incorrect"))
                record = replace(record, histograms=known)
            self._tell(lacking, groups, step)
            unknown = {name: pa.nulls(len(tokens), pa.float32()) for name in lacking}
            tokens = replace(tokens, **unknown)  # type: ignore[arg-type]  # NULL in the store
        else:
            record = StepRecord(step, {key: float(value) for key, value in {**found, **scalars}.items()})
        return record, tokens, self._samples(batch, correct, tokens)

    def _tell(self, lacking: Sequence[str], groups: Tensor | None, step: int) -> None:
        if not lacking or self._has_told:
            return
        self._has_told = True
        if lacking == ("deviation",):
            self._event("no_groups", "The steps have no group_ids, so the deviation is not recorded.", step)
            return
        names = [SAID[name] for name in lacking]
        self._event(
            "no_distributions",
            f"The steps hold no distributions, so {', '.join(names[:-1])} and {names[-1]} are not recorded.",
            step,
        )

    def _samples(self, batch: Mapping[str, Any], correct: Tensor | None, tokens: TokenTable | None) -> SampleTable:
        n = batch["n"]
        wanted: dict[str, Any] = {name: batch[name] for name in ("rewards", "truncated") if name in batch}
        if correct is not None:
            wanted["correct"] = correct
        if "mask" in batch:
            wanted["n_tokens"] = batch["mask"].sum(1)
        if "advantages" in batch:
            wanted["advantages"] = _of_rollouts(batch["advantages"], batch.get("mask"))
        host = to_host(wanted) if wanted else {}
        lengths = host.get("n_tokens", np.zeros(n)).astype(np.int32)
        ids: list[list[int]] = [[] for _ in range(n)]
        if tokens is not None:  # its rows are those of one rollout after another
            ids = [part.tolist() for part in np.split(tokens.token_id, np.cumsum(lengths)[:-1])]
        prompts, texts = batch.get("prompts", [""] * n), batch.get("texts")
        if texts is None:
            texts = [self._decode(row) if self._decode and row else "" for row in ids]
        groups = batch["group_ids"].tolist() if "group_ids" in batch else list(range(n))
        unknown: Any = pa.nulls  # NULL in the store
        return SampleTable(
            sample=np.arange(n, dtype=np.int32),
            group_id=np.array(groups, np.int64).astype(np.int32),
            prompt_id=[_prompt_id(text) or str(group) for text, group in zip(prompts, groups, strict=True)],
            split=["train"] * n,
            reward=host["rewards"] if "rewards" in host else unknown(n, pa.float32()),
            correct=host["correct"] if "correct" in host else unknown(n, pa.bool_()),
            advantage=host["advantages"].astype(np.float32) if "advantages" in host else unknown(n, pa.float32()),
            n_tokens=lengths,
            truncated=host["truncated"] if "truncated" in host else unknown(n, pa.bool_()),
            prompt=list(prompts),
            completion=list(texts),
            token_texts=self._texts(ids),
        )


def checked(given: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The arguments as tensors on one device, group_ids on the host, and "n", the number of rollouts.

    Raises ValueError for what is missing, and for shapes and dtypes that do not fit each other.
    """
    sources = [name for name in SOURCES if name in given]
    if len(sources) > 1:
        raise ValueError(f"step was given {' and '.join(sources)}, expected one of them. Leave the others out.")
    if ("hidden_states" in given) != ("head_weight" in given) or ("head_bias" in given and "head_weight" not in given):
        raise ValueError(
            "hidden_states and head_weight belong together (head_bias may come too). Give both or neither."
        )
    if "entropies" in given and "logprobs" not in given:
        raise ValueError("step was given entropies without logprobs. From logits they are computed: leave them out.")
    for name in ("mask", "token_ids"):
        if sources and name not in given:
            raise ValueError(f"step was given {sources[0]} without {name}. Pass {name}=, {_meaning(name)}.")
    if not sources and (alone := [name for name in ("weights", "sampler_logprobs") if name in given]):
        raise ValueError(
            f"step was given {alone[0]} without {', '.join(SOURCES[:2])} or {SOURCES[2]}. Pass one of them."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0.")
    sizes: dict[str, tuple[int, str]] = {}
    batch: dict[str, Any] = {}
    for name in SHAPES:
        if name in given:
            tensor = _tensor(name, given[name])
            _check_shape(name, tensor, sizes)
            batch[name] = tensor
    for name in TEXTS:
        if name in given:
            batch[name] = _strings(name, given[name], sizes)
    batch["n"] = sizes["N"][0]
    first = next((name for name in (*SOURCES, "mask", "token_ids") if name in batch), None)
    device = torch.device("cpu") if first is None else batch[first].device
    for name, value in batch.items():
        if isinstance(value, Tensor):
            batch[name] = value.cpu() if name == "group_ids" else value.to(device)
    return batch


def check_numbers(scalars: Mapping[str, Any]) -> None:
    """Raises ValueError for a scalar that is neither a number nor a tensor of one."""
    for key, value in scalars.items():
        is_one = value.numel() == 1 if isinstance(value, Tensor) else np.ndim(value) == 0
        try:
            if not is_one or not isinstance(value, Tensor):
                float(value)
        except (TypeError, ValueError, RuntimeError):
            what = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {value!r:.80}"
            raise ValueError(f"scalars: {key} {what}, expected a number or a tensor of one. Leave it out.") from None


def check_values(batch: Mapping[str, Any]) -> None:
    """Raises ValueError for token ids beyond the vocabulary and for log-probabilities with the wrong sign."""
    mask = batch.get("mask")
    if mask is None or not bool(mask.any()):
        return
    size = next((batch[name].shape[at] for name, at in (("logits", 2), ("head_weight", 0)) if name in batch), None)
    if size is not None:
        ids = batch["token_ids"][mask]
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"token_ids hold {low if low < 0 else high} where mask is True, expected 0 to {size - 1} for logits of "
                f"{size} values. Is the mask shifted, or does it count padding?"
            )
    if "logprobs" in batch and (most := float(batch["logprobs"][mask].max())) > POSITIVE:
        raise ValueError(f"logprobs hold {most:.4g} where mask is True, expected ln p <= 0. Is the sign turned?")


def _meaning(name: str) -> str:
    return {"mask": "bool [N, T], True at response tokens", "token_ids": "int [N, T], the sampled tokens"}[name]


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r:.80}, expected a tensor or numbers: {error}") from None
    tensor: Tensor = value.detach()
    kind = SHAPES[name][1]
    is_int = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    fits = {
        "float": tensor.is_floating_point(),
        "int": is_int,
        "bool": tensor.dtype == torch.bool,
        "number": not tensor.is_complex(),
    }
    if not fits[kind]:
        cast = {"float": "float()", "int": "long()", "bool": "bool()", "number": "float()"}[kind]
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {kind}. Use {name}.{cast}.")
    return tensor.float() if kind == "number" else tensor


def _check_shape(name: str, tensor: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
    """Compares a tensor's shape with the sizes known so far, and adds those that are new."""
    letters = "NT" if name == "advantages" and tensor.ndim == 2 else SHAPES[name][0]
    known = {letter: sizes.get(letter) for letter in letters}
    clash = [found[1] for letter, size in zip(letters, tensor.shape, strict=False)
             if (found := known[letter]) is not None and found[0] != size]  # fmt: skip
    if tensor.ndim != len(letters) or clash:
        wanted = ", ".join(letter if (found := known[letter]) is None else str(found[0]) for letter in letters)
        like = f" like {clash[0]}" if clash else ""
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected [{', '.join(letters)}] = ({wanted}){like}. Cut all of "
            "them to the response positions."
        )
    for letter, size in zip(letters, tensor.shape, strict=True):
        sizes.setdefault(letter, (size, name))


def _strings(name: str, value: Any, sizes: dict[str, tuple[int, str]]) -> list[str]:
    found = list(value) if not isinstance(value, str) else None
    if found is None or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} is {value!r:.80}, expected a list of strings, one for each rollout.")
    n, like = sizes.setdefault("N", (len(found), name))
    if len(found) != n:
        raise ValueError(f"{name} has {len(found)} strings, expected {n}, one for each rollout, like {like}.")
    return found


def _signals(batch: Mapping[str, Any], temperature: float) -> tuple[TokenSignals, tuple[str, ...]]:
    """(TokenSignals with moments, names of the signals that are not known); columns of those hold nan."""
    ids, mask, groups = batch["token_ids"], batch["mask"], batch.get("group_ids")
    of_rows = torch.arange(len(mask)) if groups is None else groups
    if "logprobs" in batch:
        logprob = torch.where(mask, batch["logprobs"].float(), 0.0)
        unknown = torch.full_like(logprob, torch.nan)
        if "entropies" not in batch:
            return TokenSignals(logprob, unknown, unknown, unknown, alive(mask, of_rows)), tuple(SAID)
        entropy = torch.where(mask, batch["entropies"].float(), 0.0)
        return TokenSignals(logprob, entropy, unknown, unknown, alive(mask, of_rows)), ("renyi2", "deviation")
    if "logits" in batch:
        signals = token_signals(batch["logits"], ids, mask, of_rows, temperature=temperature, moments=True)
    else:
        weight, bias = batch["head_weight"], batch.get("head_bias")
        most = CUDA_SLAB_ELEMENTS if weight.is_cuda else SLAB_ELEMENTS

        def project(states: Tensor) -> Tensor:
            return functional.linear(states.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

        hidden = batch["hidden_states"]
        signals = slab_signals(hidden, project, most // len(weight), ids, mask, of_rows, temperature=temperature)
    if groups is None:
        return replace(signals, deviation=torch.full_like(signals.deviation, torch.nan)), ("deviation",)
    return signals, ()


def alive(mask: Tensor, group_ids: Tensor) -> Tensor:
    """How many rollouts of its group have a response token where a rollout has one, int32 [N, T]; mask bool [N, T]."""
    index, n_groups = group_index(group_ids, mask)
    counts = torch.zeros(n_groups, mask.shape[1], dtype=torch.int32, device=mask.device)
    return counts.index_add(0, index, mask.int())[index] * mask


def _outcomes(batch: Mapping[str, Any], correct: Tensor | None) -> dict[str, Tensor]:
    mask, ids, groups = batch.get("mask"), batch.get("token_ids"), batch.get("group_ids")
    texts: dict[str, Tensor] = {}
    if mask is not None:
        texts["lengths"] = mask.sum(1)
    if mask is not None and ids is not None:
        texts["repetition"] = repetition(ids, mask)
        if groups is not None:
            texts["same_text"] = same_text(ids, mask, groups)
    rewards, truncated = batch.get("rewards"), batch.get("truncated")
    return outcome_scalars(rewards=rewards, correct=correct, truncated=truncated, group_ids=groups, **texts)


def _of_rollouts(advantages: Tensor, mask: Tensor | None) -> Tensor:
    """[N]: of advantages [N, T] the mean over a rollout's tokens."""
    if advantages.ndim == 1:
        return advantages
    inside = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    return torch.where(inside, advantages, 0.0).sum(1) / inside.sum(1).clamp(min=1)


def _prompt_id(text: str) -> str:
    """An id that follows from the text, so that a prompt that comes again is known; "" without one."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8] if text else ""
