"""What a pass through a model takes in memory, found without the memory: on tensors that have shapes and no values.

The model's own code runs on fake tensors, and every storage that lives is counted. So any architecture is right by
itself, with autocast, checkpointed layers and adapters. Only few layers run: memory is linear in their number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.config import LoraConfig
from trainer.policy import policy as policy_module
from trainer.policy.lora import with_adapters
from trainer.policy.policy import Policy, _Halves
from trainer.runtime.ranks import Ranks

T = TypeVar("T")
SLABS = 3  # of logits that are run: from the third on nothing new lives at a time


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside it: those alive `now`, and the most that were at once, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage()._cdata in given:  # a view of a weight, say
                continue
            if (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def lap(self) -> int:
        """The most at once since the last lap."""
        found, self.peak = self.peak, self.now
        return found

    def _free(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


@dataclass(frozen=True, slots=True)
class Setup:
    """How the model is trained. half: under bfloat16 autocast, as on CUDA; else in float32, as on a CPU."""

    half: bool
    checkpointing: bool
    lora: LoraConfig
    reference: bool  # a KL to the initial policy: one more pass without gradient while the graph lives
    entropy: bool  # an entropy bonus: the logits have a second gradient
    half_layers: bool = False  # layers are gathered in bfloat16, so autocast casts none of their weights


class ImaginedPolicy(Policy):
    """A policy whose tensors have no values. hidden takes all rows as equally long: the most memory that they can."""

    def __init__(self, model: Any, setup: Setup) -> None:
        self.model, self.device, self._setup = model, torch.device("cpu"), setup
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self._halves = _Halves(model)
        self.in_step = Ranks()
        if setup.checkpointing:
            self.checkpoint_layers()

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._setup.half)

    def passed(self, ids: Tensor, width: int) -> Tensor:
        """Hidden states [rows, width, D], in as many passes as `Policy.hidden` makes on the device."""
        rows = len(ids)
        parts = ids.split(-(-rows // (1 if self._setup.half else policy_module.LENGTH_PARTS)))
        with self.autocast():
            states = [self.padded_hidden(part, torch.ones_like(part, dtype=torch.bool), width) for part in parts]
        if self._setup.half:
            return states[0]
        return torch.cat([nn.functional.pad(each, (0, 0, 0, 1))[:, :width] for each in states])[torch.arange(rows)]


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a model. Tied ones count once."""

    all: int
    trained_tensors: tuple[int, ...]  # of each trained tensor
    linear: int  # of linear layers, the head included
    head: int
    layer: int  # of one decoder layer
    outside: int  # embedding, head and last norm

    @property
    def trained(self) -> int:
        return sum(self.trained_tensors)

    @property
    def largest(self) -> int:
        """Of the largest trained tensor."""
        return max(self.trained_tensors)


class Passes:
    """What passes of one model take; each question is worked out once. shape: the model's configuration."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape
        self._known: dict[Any, Any] = {}

    def __call__(self, question: Callable[..., T], *given: Any) -> T:
        """`question(shape, *given)`. Example: passes(states_bytes, setup, 8, 512)."""
        if (question, *given) not in self._known:
            self._known[question, *given] = question(self.shape, *given)
        found: T = self._known[question, *given]
        return found


def counted(config: Any, lora: LoraConfig) -> Counts:
    """The parameters of the model that a configuration describes."""
    with imagined():
        model = _model(config, lora, None)
        linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        layers = model.get_decoder().layers
        every = list(model.parameters())
        in_layers = sum(p.numel() for p in layers.parameters())
        return Counts(
            all=sum(p.numel() for p in every),
            trained_tensors=tuple(p.numel() for p in every if p.requires_grad),
            linear=sum(p.numel() for p in linear.values()),
            head=model.get_output_embeddings().weight.numel(),
            layer=sum(p.numel() for p in layers[0].parameters()),
            outside=sum(p.numel() for p in every) - in_layers,
        )


@contextmanager
def imagined() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def update_bytes(config: Any, setup: Setup, rows: int, prompt: int, width: int) -> tuple[int, int]:
    """(what the graph keeps, the most at once) of forward and backward of one micro-batch, bytes.

    Beside weights, gradients and optimizer states. Every token is selected, as it is while weightings warm up.
    """

    def run(policy: ImaginedPolicy) -> list[int]:
        with LiveBytes() as live:
            trained = [p for p in policy.model.parameters() if p.requires_grad]
            for p in trained:
                p.grad = torch.zeros_like(p)  # inside, because what autograd adds to a fake one takes its place
            gradients = live.now
            ids = torch.zeros(rows, prompt + width, dtype=torch.long)
            hidden = policy.passed(ids, width).flatten(0, 1)[torch.arange(rows * width)]
            forward, graph = live.lap(), live.now
            span = max(1, policy_module.SLAB_ELEMENTS // policy.vocabulary)
            chosen = torch.arange(min(len(hidden), SLABS * span))
            token_ids = torch.zeros(len(chosen), dtype=torch.long)
            logprob, entropy = policy.logprobs(hidden[: len(chosen)], token_ids, 1.0)
            if setup.reference:
                with torch.no_grad():
                    if setup.lora.rank:
                        with policy.model.disable_adapter():
                            states = policy.passed(ids, width)
                    else:
                        states = policy.passed(ids, width)
                    states = states.flatten(0, 1)[torch.arange(rows * width)]
                    policy.logprobs(states[: len(chosen)], token_ids, 1.0)
                del states
            loss = live.lap()
            total = (logprob + entropy if setup.entropy else logprob).sum()
            del logprob, entropy  # as the loss does: what has no gradient keeps nothing alive
            total.backward()
            return [each - gradients for each in (graph, forward, loss, live.lap())]

    kept, *peaks = _over_layers(config, setup, run)
    return kept, max(peaks)


def states_bytes(config: Any, setup: Setup, rows: int, columns: int) -> int:
    """Most bytes of a pass without gradient through the body; the layers come one after the other."""

    def run(policy: ImaginedPolicy) -> list[int]:
        with torch.no_grad(), LiveBytes() as live:
            policy.passed(torch.zeros(rows, columns, dtype=torch.long), columns - 1)
            return [live.lap()]

    return _over_layers(config, setup, run)[0]


def _over_layers(config: Any, setup: Setup, run: Callable[[ImaginedPolicy], list[int]]) -> list[int]:
    """What `run` returns, with all layers: each figure is a straight line in their number."""
    layers = config.get_text_config().num_hidden_layers
    with imagined():
        models = [_model(config, setup.lora, few) for few in (1, 2)]
        if setup.half_layers:
            for model in models:
                _halve(model.get_decoder().layers)
        one, two = (run(ImaginedPolicy(model, setup)) for model in models)
    return [first + (second - first) * (layers - 1) for first, second in zip(one, two, strict=True)]


def _halve(layers: nn.Module) -> None:
    """Parameters in bfloat16. `Module.to` would exchange the tensors, which imagined ones do not allow."""
    for module in layers.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().bfloat16(), requires_grad=p.requires_grad))


def _model(config: Any, lora: LoraConfig, layers: int | None) -> Any:
    from transformers import AutoModelForCausalLM

    changed = type(config)(**config.to_dict())
    changed._attn_implementation = "sdpa"
    if layers is not None:
        text = changed.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    model = AutoModelForCausalLM.from_config(changed, dtype=torch.float32)
    if not lora.rank:
        return model
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):  # peft moves adapters to where they are
        return with_adapters(model, lora)
