"""Where verl's trainers have a whole batch: their methods are wrapped, and give what they have to a Backend.

RayPPOTrainer has a DataProto and calls `compute_data_metrics` with it; the entropies are taken where it scores the old
log-probabilities, as it drops them there. The v1 PPOTrainer keeps its batch in a TransferQueue, which it clears after
`_compute_metrics`. Both update the actor in `_update_actor`; around it a weighting puts weighted advantages in place.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monitor.integrations.verl.backend import Backend
from monitor.integrations.verl.weights import batch_weights, token_advantages

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
        _around(trainer, "_update_actor", _weighted_queue)
    else:
        _around(trainer, "_update_actor", _weighted_batch)
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
    data, tensors, rows = _from_queue(batch, QUEUED)
    uids = data.pop("uid").tolist() if "uid" in data.keys() else None  # noqa: SIM118  a TensorDict iterates over rows
    uids = None if uids is None else [uids[row] for row in rows.tolist()]
    prompts = data.select("prompts").to_padded_tensor() if "prompts" in data.keys() else {}  # noqa: SIM118
    backend.take(given(tensors, uids, _texts(self, prompts, rows), _weights(self, tensors)), _decode(self))


def _from_queue(batch: Any, names: Iterable[str]) -> tuple[Any, dict[str, Tensor], Tensor]:
    """What the queue gave; of its rows that are no padding the tensors [N, T]; and the numbers of these rows."""
    import transfer_queue as tq

    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))
    there = [name for name in (*FIELDS, "rm_scores") if name in data.keys()]  # noqa: SIM118
    padded = data.select(*there).to_padded_tensor()
    width = padded["response_mask"].shape[1]
    rows = torch.tensor([row for row, tag in enumerate(batch.tags) if not tag.get("is_padding", False)])
    return data, {name: _wide(padded[name], width)[rows] for name in there}, rows


@contextmanager
def _weighted_queue(self: Any, backend: Backend, batch: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Weighted advantages in the queue of a v1 trainer."""
    if backend.weighting is None:
        yield
        return
    import transfer_queue as tq
    from tensordict import TensorDict

    data, tensors, rows = _from_queue(batch, ("response_mask", "old_log_probs", "entropy", "advantages"))
    plain, lengths = tensors["advantages"], data["response_mask"].offsets().diff()[rows].tolist()
    keys = [batch.keys[row] for row in rows.tolist()]

    def put(advantages: Tensor) -> None:
        cut = [row[:length] for row, length in zip(advantages, lengths, strict=True)]
        fields = TensorDict({"advantages": torch.nested.as_nested_tensor(cut, layout=torch.jagged)}, len(keys))
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields)

    put(_weighed(self, backend, tensors | {"entropys": tensors["entropy"]}))
    try:
        yield
    finally:
        _guarded(type(self), lambda _: put(plain))


@contextmanager
def _weighted_batch(self: Any, backend: Backend, batch: Any) -> Iterator[None]:
    """Weighted advantages in the batch of a RayPPOTrainer."""
    if backend.weighting is None:
        yield
        return
    held, entropies = batch.batch, getattr(self, "rlvr_entropies", None)
    plain = held["advantages"]
    held["advantages"] = _weighed(
        self, backend, dict(held.items()) | ({} if entropies is None else {"entropys": entropies})
    )
    try:
        yield
    finally:
        held["advantages"] = plain


def _weighed(self: Any, backend: Backend, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weighted advantages; the weights are kept, for the record of the step."""
    assert backend.weighting is not None
    weights: Tensor = batch_weights(tensors, backend.weighting, int(self.global_steps))
    self.rlvr_weights = weights
    mask = tensors["response_mask"].bool()
    return token_advantages(tensors["advantages"], weights, mask, backend.loss_mean, backend.weighting.normalise)


def _weights(self: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of this step's update, once."""
    weights: Tensor | None = getattr(self, "rlvr_weights", None)
    self.rlvr_weights = None
    return {} if weights is None or weights.shape != tensors["responses"].shape else {"weights": weights}


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
            tensors = dict(batch.batch.items())
            extra = ({"entropies": entropies} if fits else {}) | (_weights(asking, tensors) if asking else {})
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


def _around(trainer: type, name: str, act: Callable[..., AbstractContextManager[None]]) -> None:
    """Calls a method inside a context; what fails in the context is told, and the method runs all the same."""
    original = getattr(trainer, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            _guarded(trainer, lambda backend: stack.enter_context(act(self, backend, *args, **kwargs)))
            return original(self, *args, **kwargs)

    setattr(trainer, name, wrapped)


def _guarded(trainer: Any, work: Callable[[Backend], None]) -> None:
    try:
        work(trainer.rlvr_backend)
    except Exception as error:
        trainer.rlvr_backend.fault(error)
