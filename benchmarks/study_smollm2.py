"""A real language model learns on a CPU: SmolLM2-135M-Instruct on sums and on word problems like GSM8K's, by two arms.

Every run is an ordinary `rlvr train smollm2-chain-sum` with the options of TASKS. The reward is shaped
(`trainer.rewards:close_to_answer`: 1 for the right number, up to .5 for one that is near), because the model is rarely
right. Runs that ended are not trained again, those that were cut off go on.

    nice python -m benchmarks.study_smollm2 --work FOLDER [--jobs 1] [--seeds 0 1]
        an hour or more of a core for each run; `rlvr fetch smollm2-135m` once
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.harness import RESULTS, write_rows
from monitor.store.reader import open_store
from trainer.commands.train import parse_config
from trainer.compare.arms import parse_arm
from trainer.compare.jobs import Job, run_jobs, settle

STEPS = 60
TASKS: dict[str, tuple[str, ...]] = {  # name -> options
    "chain_sum": ("--task", "reasoning_gym:chain_sum"),
    "gsm_number": (
        "--task", "reasoning_gym:gsm_symbolic", "--rollout.max-new-tokens", "16", "--rollout.chat-template", "model",
        "--rollout.system-prompt", "Reply with one number and nothing else.",
    ),
    # in free text most responses are cut off before an answer
    "gsm_symbolic": ("--task", "reasoning_gym:gsm_symbolic", "--rollout.max-new-tokens", "64"),
}  # fmt: skip
ARMS = ("uniform", "ict_budget:share=0.3")
SHARED = (
    "smollm2-chain-sum", "--steps", str(STEPS), "--eval.every", "30", "--eval.prompts", "24", "--eval.samples", "4",
    "--rollout.prompts", "4", "--rollout.group-size", "8", "--optim.micro-batch", "8", "--weighting.warmup-steps", "5",
    "--checkpoint.every", "10", "--checkpoint.keep", "1", "--threads", "1",
)  # fmt: skip
WINDOW = 15  # steps at the start and at the end whose means are compared
SERIES = ("reward", "correct_share", "entropy", "truncated_share", "perf/tokens_per_s", "perf/memory_gib")


def job(store: Path, task: str, arm: str, seed: int) -> Job:
    name = f"{task}-{parse_arm(arm).slug}-s{seed}"
    options = [*SHARED, *TASKS[task], *parse_arm(arm).options()]
    options += ["--seed", str(seed), "--comparison", task, "--store", str(store)]
    return settle(store, name, options, parse_config(options))


def row(store: Path, name: str, task: str, arm: str, seed: int) -> dict[str, object] | None:
    """What became of a run; None if it has not ended."""
    with open_store(store) as opened:
        if name not in {state.name for state in opened.runs()} or opened.run(name).status != "finished":
            return None
        found = {
            series: np.array(
                opened.sql(f"SELECT value FROM steps WHERE run = '{name}' AND name = '{series}' ORDER BY step").rows
            ).ravel()
            for series in (*SERIES, "eval/heldout/pass@1")
        }
    reward = found["reward"]
    slope = np.polyfit(np.arange(len(reward)), reward, 1)[0]
    means = {
        f"{series}_{when}": round(float(found[series][part].mean()), 4)
        for series in ("reward", "correct_share", "entropy")
        for when, part in (("first", slice(None, WINDOW)), ("last", slice(-WINDOW, None)))
    }
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "steps": len(reward),
        **means,
        "reward_slope": round(float(slope), 6),
        "heldout_first": round(float(found["eval/heldout/pass@1"][0]), 4),
        "heldout_last": round(float(found["eval/heldout/pass@1"][-1]), 4),
        "truncated_share": round(float(found["truncated_share"].mean()), 3),
        "tokens_per_s": round(float(np.median(found["perf/tokens_per_s"])), 1),
        "memory_gib": round(float(found["perf/memory_gib"].max()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the store, kept between calls")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--report", action="store_true", help="write the rows of the runs that have ended, train none")
    parser.add_argument("--out", type=Path, default=RESULTS / "smollm2.csv")
    args = parser.parse_args()
    planned = [(task, arm, seed) for seed in args.seeds for task in TASKS for arm in ARMS]
    if not args.report:
        (args.work / "runs").mkdir(parents=True, exist_ok=True)
        run_jobs(args.work, [job(args.work, *one) for one in planned], args.jobs, [], Console())
    rows = [row(args.work, f"{t}-{parse_arm(a).slug}-s{s}", t, a, s) for t, a, s in planned]
    write_rows(args.out, [one for one in rows if one], ("torch", "transformers"))


if __name__ == "__main__":
    main()
