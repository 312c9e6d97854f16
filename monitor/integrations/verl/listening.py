"""Where verl's trainers have a whole batch: their methods are wrapped, and give what they have to a Backend.

RayPPOTrainer has a DataProto and calls `compute_data_metrics` with it; the entropies are taken where it scores the old
log-probabilities, as it drops them there. The v1 PPOTrainer keeps its batch in a TransferQueue, which it clears after
`_compute_metrics`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.integrations.verl.backend import Backend

# of a batch: verl's names for what `Monitor.step` takes
FIELDS = {
    "responses": "token_ids",
    "response_mask": "mask",
    "old_log_probs": "logprobs",
    "entropys": "entropies",
    "entropy": "entropies",
    "rollout_log_probs": "sampler_logprobs",
    "advantages": "advantages",
}
QUEUED = ("uid", "prompts", "rm_scores", *(name for name in FIELDS if name != "entropys"))


def listen(trainer: type, backend: Backend) -> None:
    """Wraps a class of trainers, once; from then on its batches go to this backend."""
    first = not hasattr(trainer, "rlvr_backend")
    trainer.rlvr_backend = backend  # type: ignore[attr-defined]
    if not first:
        return
    if hasattr(trainer, "_compute_metrics"):
        _before(trainer, "_compute_metrics", _take_queue)
    else:
        _after(trainer, "_compute_old_log_prob", _keep_entropies)
        module = sys.modules[trainer.__module__]
        module.compute_data_metrics = _heard(module.compute_data_metrics, trainer)  # type: ignore[attr-defined]


def given(
    tensors: Mapping[str, Tensor],
    uids: Any = None,
    prompts: list[str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of `Monitor.step` from a batch: tensors [N, T] by verl's names, uids of the prompts [N]."""
    found: dict[str, Any] = {FIELDS[name]: tensors[name] for name in FIELDS if name in tensors} | dict(extra or {})
    found["mask"] = found["mask"].bool()
    scores = next((tensors[name] for name in ("token_level_scores", "rm_scores") if name in tensors), None)
    if scores is not None:
        found["rewards"] = scores.sum(-1)
    if uids is not None:
        found["group_ids"] = torch.from_numpy(np.unique(np.asarray(uids, str), return_inverse=True)[1].reshape(-1))
    if "logprobs" not in found:
        for name in ("entropies", "sampler_logprobs"):
            found.pop(name, None)
    if prompts is not None:
        found["prompts"] = prompts
    return found


def _take_queue(self: Any, backend: Backend, batch: Any, *args: Any, **kwargs: Any) -> None:
    """The batch of a v1 trainer, from its queue."""
    import transfer_queue as tq

    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(QUEUED))
    keep = np.array([not tag.get("is_padding", False) for tag in batch.tags], dtype=bool)
    names = list(data.keys())  # of a TensorDict, which iterates over its rows
    uids = data.pop("uid").tolist() if "uid" in names else None
    data = data.to_padded_tensor()
    width = data["responses"].shape[1]
    chosen = torch.from_numpy(np.flatnonzero(keep))
    tensors = {name: _wide(data[name], width)[chosen] for name in names if name in (*FIELDS, "rm_scores")}
    uids = None if uids is None else [uid for uid, there in zip(uids, keep, strict=True) if there]
    backend.take(given(tensors, uids, _texts(self, data, chosen)), _decode(self))


def _keep_entropies(self: Any, backend: Backend, result: Any) -> None:
    scored = result[0] if isinstance(result, tuple) else result
    entropies = scored.batch.get("entropys")
    self.rlvr_entropies = None if entropies is None else entropies.clone()
    type(self).rlvr_trainer = self  # the one that calls compute_data_metrics next


def _heard(original: Callable[..., Any], trainer: Any) -> Callable[..., Any]:
    """`compute_data_metrics`, which gets a RayPPOTrainer's whole batch."""

    @functools.wraps(original)
    def heard(batch: Any, *args: Any, **kwargs: Any) -> Any:
        backend: Backend = trainer.rlvr_backend
        try:
            asking = getattr(trainer, "rlvr_trainer", None)
            entropies = getattr(asking, "rlvr_entropies", None)
            fits = entropies is not None and entropies.shape == batch.batch["responses"].shape
            extra = {"entropies": entropies} if fits else {}
            tensors = dict(batch.batch.items())
            backend.take(
                given(tensors, batch.non_tensor_batch.get("uid"), _texts(asking, tensors), extra), _decode(asking)
            )
        except Exception as error:
            backend.fault(error)
        return original(batch, *args, **kwargs)

    return heard


def _wide(tensor: Tensor, width: int) -> Tensor:
    """[N, T] cut or padded with zeros to a number of positions."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


def _texts(trainer: Any, tensors: Mapping[str, Any], rows: Tensor | None = None) -> list[str] | None:
    """The prompts as texts, where the trainer has a tokenizer."""
    tokenizer = getattr(trainer, "tokenizer", None)
    if tokenizer is None or "prompts" not in tensors:
        return None
    prompts = tensors["prompts"] if rows is None else tensors["prompts"][rows]
    return [str(text) for text in tokenizer.batch_decode(prompts, skip_special_tokens=True)]


def _decode(trainer: Any) -> Any:
    tokenizer = getattr(trainer, "tokenizer", None)
    return None if tokenizer is None else tokenizer.decode


def _before(trainer: type, name: str, act: Callable[..., None]) -> None:
    original = getattr(trainer, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        _guarded(trainer, lambda backend: act(self, backend, *args, **kwargs))
        return original(self, *args, **kwargs)

    setattr(trainer, name, wrapped)


def _after(trainer: type, name: str, act: Callable[..., None]) -> None:
    original = getattr(trainer, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        _guarded(trainer, lambda backend: act(self, backend, result))
        return result

    setattr(trainer, name, wrapped)


def _guarded(trainer: Any, work: Callable[[Backend], None]) -> None:
    try:
        work(trainer.rlvr_backend)
    except Exception as error:
        trainer.rlvr_backend.fault(error)
