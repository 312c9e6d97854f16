"""Which models fit on how many devices of 80 GB, by `rlvr plan`: no device and no weights are needed.

    python benchmarks/bench_plan_scaling.py

MATH's prompts and responses (512 and 2,048 tokens), 64 prompts of 8 rollouts a step. Where a row does not fit, its
figures are those of the smallest passes with checkpointed layers. Some three minutes.
"""

from __future__ import annotations

import contextlib
import io
import json

from harness import RESULTS, no_options, write_rows

from trainer.commands.plan import main as plan

STEP = ("--rollout.prompts", "64", "--rollout.group-size", "8", "--rollout.max-new-tokens", "2048",
        "--prompt-tokens", "512", "--memory-gb", "80", "--optim.micro-batch", "16", "--optim.lr", "1e-6")  # fmt: skip
HALF = ("--shard", "--shard-gather", "bfloat16", "--record.probe-every", "0")
ROWS = (  # model, devices, options
    ("Qwen/Qwen2.5-1.5B", 1, ()),
    ("Qwen/Qwen2.5-1.5B", 8, ()),
    ("Qwen/Qwen2.5-7B", 1, ("--lora.rank", "16")),
    ("Qwen/Qwen2.5-7B", 8, ("--lora.rank", "16")),
    ("Qwen/Qwen2.5-7B", 8, ("--shard",)),
    ("meta-llama/Llama-3.1-70B", 8, ("--shard",)),
    ("meta-llama/Llama-3.1-70B", 64, ("--shard",)),
    ("Qwen/Qwen2.5-1.5B", 1, ("--optim.kind", "adamw_8bit")),
    ("Qwen/Qwen2.5-7B", 8, HALF),
    ("meta-llama/Llama-3.1-70B", 64, HALF),
)


def main() -> None:
    no_options(__doc__)
    rows = []
    for model, devices, options in ROWS:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            plan(["--model", model, "--ranks", str(devices), *STEP, *options, "--json"])
        found = json.loads(told.getvalue())
        phase, parts = max(found["phases"].items(), key=lambda item: sum(item[1].values()))
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:3]
        rows.append(
            {
                "model": model, "devices": devices, "options": " ".join(options) or "whole copies",
                "fits": "yes" if found["fits"] else "no", "peak_gb": f"{found['peak'] / 1e9:.1f}", "phase": phase,
                "largest": ", ".join(f"{part} {parts[part] / 1e9:.1f}" for part in largest),
                "chosen": ", ".join(f"{name} {value}" for name, value in found["settings"].items()) or "as given",
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    write_rows(RESULTS / "plan_scaling.csv", rows, ("torch", "transformers"))


if __name__ == "__main__":
    main()
