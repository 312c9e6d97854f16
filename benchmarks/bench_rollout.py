"""Rollouts: response tokens per second of each backend, and how far its log-probabilities are from the trainer's.

    python benchmarks/bench_rollout.py

The built-in policy on `chain` samples groups of 8, SmolLM2-135M on reasoning-gym's chain_sum groups of 4. Arms take
turns, with a new seed in each round. "generate, prompts apart" draws the same tokens without sharing a group's prompt.
"transformers" is its own `generate` with a processor that draws from our generator, which shows what seeds and
log-probabilities cost there. On CPU the time is CPU time of one thread, which other work on the machine changes less
than wall time. On a GPU the model has the shape of Qwen2.5-0.5B with random weights and prompts, so without network;
the time is wall time, after a first round that compiles.

rollout_bfloat16.csv: what bfloat16 does to the log-probabilities of sampled tokens of SmolLM2-135M, on CPU: the
trained module under autocast, and the copies whose linear or all weights are bfloat16, as samplers use them on CUDA.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import RESULTS, no_options, write_rows
from torch import Tensor
from transformers import LogitsProcessor
from transformers.utils import logging
from updates import QWEN, random_policy

from trainer.flow import Rollouts
from trainer.policy.policy import Policy, pick_device
from trainer.policy.sources import ensure_model
from trainer.rollout import sampling as rollout
from trainer.rollout.generate import Drawn, generate, positions
from trainer.rollout.prompts import encode_prompts
from trainer.rollout.sampler_copy import SamplerCopy
from trainer.rollout.sampling import sample
from trainer.tasks import make_task

# model: task, prompts, rollouts of each, longest response, rounds
WORK = {"builtin": ("chain", 16, 8, 56, 5), "smollm2-135m": ("reasoning_gym:chain_sum", 4, 4, 40, 2)}
GPU_WORK = {"Qwen2.5-0.5B shape": ("", 8, 8, 256, 3)}  # prompts of 128 random tokens
TEMPERATURE = 1.0
Sampler = Callable[[Policy, list[list[int]], int, torch.Generator], Rollouts]


def backend(name: str) -> Sampler:
    def run(policy: Policy, prompts: list[list[int]], limit: int, generator: torch.Generator) -> Rollouts:
        return sample(policy, prompts, max_new_tokens=limit, temperature=TEMPERATURE, generator=generator, backend=name)

    return run


@torch.no_grad()
def apart(policy: Policy, prompts: list[list[int]], limit: int, generator: torch.Generator) -> Rollouts:
    """Our loop with every copy of a prompt run by itself."""
    ids, attention = rollout._left_padded(policy, prompts, max(map(len, prompts)))
    index = torch.arange(len(ids), device=policy.device)
    drawn = generate(policy, ids, attention, index, limit=limit, temperature=TEMPERATURE, generator=generator)
    return rollout._assemble(ids, attention, policy, drawn)


class _Draw(LogitsProcessor):
    """Draws by itself and leaves the token as the only possible one, which a greedy search then takes."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.logprobs = generator, []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logp = torch.log_softmax(scores.float() / TEMPERATURE, dim=-1)
        token = torch.multinomial(logp.exp(), 1, generator=self.generator)
        self.logprobs.append(logp.gather(1, token))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@torch.no_grad()
def theirs(policy: Policy, prompts: list[list[int]], limit: int, generator: torch.Generator) -> Rollouts:
    """transformers' `generate`, with seeds and log-probabilities through a processor."""
    ids, attention = rollout._left_padded(policy, prompts, max(map(len, prompts)))
    draw = _Draw(generator)
    with policy.autocast():
        out = policy.model.generate(
            input_ids=ids, attention_mask=attention.long(), max_new_tokens=limit, do_sample=False,
            logits_processor=[draw], pad_token_id=policy.pad_id, eos_token_id=policy.end_ids,
        )  # fmt: skip
    tokens = out[:, ids.shape[1] :]
    ends = torch.isin(tokens, torch.tensor(policy.end_ids, device=tokens.device)).long()
    ended = (ends.cumsum(1) - ends) > 0  # after the first end token
    logprobs = torch.where(ended, 0.0, torch.cat(draw.logprobs, dim=1))
    return rollout._assemble(ids, attention, policy, Drawn(tokens, logprobs, ended))


ARMS: dict[str, Sampler] = {
    "generate": backend("generate"),
    "generate, prompts apart": apart,
    "paged": backend("paged"),
    "transformers": theirs,
}


def seconds(policy: Policy, call: Callable[[], Rollouts]) -> tuple[float, Rollouts]:
    """CPU time of all threads on CPU, the wall on CUDA."""
    cuda = policy.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    begin = clock()
    rollouts = call()
    if cuda:
        torch.cuda.synchronize()
    return clock() - begin, rollouts


@torch.no_grad()
def mismatch(policy: Policy, rollouts: Rollouts) -> Tensor:
    """|ln p_trainer - ln p_sampler| of the sampled tokens."""
    mask = rollouts.mask
    logprob, _ = policy.logprobs(policy.hidden(rollouts)[mask], rollouts.token_ids[mask], TEMPERATURE)
    return (logprob - rollouts.sampler_logprobs[mask]).abs()


def workload(model: str, task_name: str, count: int, limit: int) -> tuple[Policy, list[list[int]]]:
    """The policy, and the token ids of `count` prompts."""
    if task_name:
        policy, task = Policy.load(ensure_model(model)), make_task(task_name)
        return policy, encode_prompts(policy, list(task.prompts("train"))[:count], task.system_prompt, limit)
    policy = random_policy(QWEN, pick_device())
    return policy, torch.randint(policy.vocabulary, (count, 128)).tolist()


def measure(model: str, work: tuple[str, int, int, int, int]) -> list[dict[str, Any]]:
    task_name, count, group, limit, rounds = work
    policy, distinct = workload(model, task_name, count, limit)
    policy.model.eval()
    prompts = [ids for ids in distinct for _ in range(group)]
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    tokens: dict[str, list[int]] = {arm: [] for arm in ARMS}
    off: dict[str, Tensor] = {}
    for seed in range(rounds + 1):  # the first is a warm-up
        for arm, run in ARMS.items():
            generator = torch.Generator(policy.device).manual_seed(seed)
            took, found = seconds(policy, lambda run=run, g=generator: run(policy, prompts, limit, g))
            times[arm].append(took)
            tokens[arm].append(int(found.mask.sum()))
            if seed == rounds:
                off[arm] = mismatch(policy, found)
    rates = {arm: [n / s for n, s in zip(tokens[arm][1:], times[arm][1:], strict=True)] for arm in ARMS}
    return [
        {
            "model": model, "backend": arm, "device": policy.device.type, "rollouts": len(prompts),
            "prompt_tokens": sum(map(len, prompts)), "response_tokens": round(statistics.mean(tokens[arm][1:])),
            "tokens_per_s": round(statistics.median(rates[arm]), 1),
            "against_generate": round(
                statistics.median(a / b for a, b in zip(rates[arm], rates["generate"], strict=True)), 3
            ),
            "first_call_s": round(times[arm][0], 2),
            "mismatch_mean": f"{float(off[arm].mean()):.1e}", "mismatch_max": f"{float(off[arm].max()):.1e}",
            "threads": torch.get_num_threads(),
        }
        for arm in ARMS
    ]  # fmt: skip


@torch.no_grad()
def bfloat16(model: str = "smollm2-135m") -> list[dict[str, Any]]:
    """Mean and largest |ln p| and KL between two ways to compute the same distributions."""
    policy, prompts = workload(model, WORK[model][0], 16, 48)
    found = backend("generate")(policy, prompts, 48, torch.Generator().manual_seed(0))
    mask, ids = found.mask, found.token_ids[found.mask].unsqueeze(1)

    def logp(module: Any, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            position = positions(found.attention_mask)
            inputs = {"attention_mask": found.attention_mask.long(), "position_ids": position, "use_cache": False}
            states = module.get_decoder()(input_ids=found.input_ids, **inputs).last_hidden_state
            logits = module.get_output_embeddings()(states[:, -mask.shape[1] - 1 : -1][mask])
        return torch.log_softmax(logits.float(), dim=-1)

    trained, exact = logp(policy.model, True), logp(policy.model, False)
    compared = {
        "autocast, from float32": (trained, exact),
        "linear weights bfloat16, from autocast": (logp(SamplerCopy(policy, "linear").model, True), trained),
        "all weights bfloat16, from autocast": (logp(SamplerCopy(policy, "all").model, False), trained),
    }
    return [
        {
            "model": model, "what": what, "tokens": len(ids),
            "mean": f"{float((a - b).gather(1, ids).abs().mean()):.4f}",
            "largest": f"{float((a - b).gather(1, ids).abs().max()):.4f}",
            "kl": f"{float((a.exp() * (a - b)).sum(1).mean()):.2e}",
        }
        for what, (a, b) in compared.items()
    ]  # fmt: skip


def main() -> None:
    no_options(__doc__)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    gpu = pick_device().type == "cuda"
    rows = [row for model, work in (GPU_WORK if gpu else WORK).items() for row in measure(model, work)]
    write_rows(RESULTS / ("gpu_rollout.csv" if gpu else "rollout.csv"), rows, ("torch", "transformers"))
    if not gpu:
        write_rows(RESULTS / "rollout_bfloat16.csv", bfloat16(), ("torch", "transformers"))


if __name__ == "__main__":
    main()
