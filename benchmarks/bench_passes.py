"""What one pass less saves: updates of several micro-batches whose signals have a pass of their own, or the same.

    python benchmarks/bench_passes.py

Random weights at the shape of SmolLM2-135M and of a Qwen2.5-0.5B layer stack with a small vocabulary, 16 rollouts, one
group a micro-batch, one update a step. The two kinds of update take turns in one process; the time is CPU time with one
thread for tensors. Some five minutes.
"""

from __future__ import annotations

import statistics
from unittest.mock import patch

import torch
from harness import RESULTS, no_options, write_rows
from updates import GROUP, QWEN, clock, random_batch, random_policy

from trainer import update as update_module
from trainer.config import TrainConfig
from trainer.update import Updater

SHAPES = {
    "SmolLM2-135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "Qwen2.5-0.5B, 8 layers, 4,096 tokens": QWEN | {"vocab_size": 4_096, "num_hidden_layers": 8},
}  # fmt: skip
GROUPS, PROMPT, WIDTH, TURNS = 2, 16, 48, 3


def main() -> None:
    no_options(__doc__)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    rows = []
    for shape, sizes in SHAPES.items():
        for checkpointing in (False, True):
            policy = random_policy(sizes, device)
            if checkpointing:
                policy.checkpoint_layers()
            batch = random_batch(policy, GROUPS, PROMPT, WIDTH)
            config = TrainConfig.model_validate(
                {
                    "weighting": {"kind": "ict", "warmup_steps": 0, "keep": 0.1},
                    "rollout": {"group_size": GROUP, "max_new_tokens": WIDTH},
                    "record": {"probe_every": 0},
                    "optim": {"lr": 1e-6, "micro_batch": GROUP},
                }
            )
            updater = Updater(policy, None, config)
            took: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(TURNS + 1):
                for once in (True, False) if turn % 2 else (False, True):
                    with patch.object(update_module, "one_pass_by_groups", lambda _, once=once: once):
                        started = clock(device)
                        updater.update(batch, turn + 1)
                    if turn:
                        took[once].append(clock(device) - started)
            before, now = (statistics.median(took[once]) for once in (False, True))
            rows.append(
                {
                    "shape": shape, "checkpointed layers": "yes" if checkpointing else "no", "rollouts": len(batch),
                    "two_passes_s": f"{before:.3f}", "one_pass_s": f"{now:.3f}", "ratio": f"{now / before:.3f}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    write_rows(RESULTS / "passes.csv", rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
