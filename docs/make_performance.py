"""Fills the tables of docs/performance.md from the rows in benchmarks/results: python -m docs.make_performance"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("performance.md")
RESULTS = PAGE.parent.parent / "benchmarks" / "results"
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """Columns of a CSV by their heading: the row's key, or what makes the cell of a row."""

    file: str
    script: str
    columns: dict[str, str | Callable[[Row], str]]


def number(text: str) -> str:
    """Three significant digits and no more than there are; text as it is."""
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(part: str, whole: str) -> Callable[[Row], str]:
    return lambda row: f"{float(row[part]) / float(row[whole]):.1%}"


def percent(key: str) -> Callable[[Row], str]:
    return lambda row: f"{float(row[key]):.1%}"


def mib(key: str) -> Callable[[Row], str]:
    return lambda row: f"{float(row[key]):,.0f} MiB"


STEP: dict[str, str | Callable[[Row], str]] = {
    "model": "model", "arm": "arm", "response tokens": "response_tokens", "update, s": "update_s",
    "of uniform's": "update_against_uniform", "of TRL's (target 1)": "update_against_trl",
    "with recording, of TRL's (target 1)": "trained_against_trl", "whole step, s": "step_s",
    "of TRL's step (target 1)": "step_against_trl", "recording, of the step (target 3 %)": share("record_s", "step_s"),
    "memory": mib("peak_mib"),
}  # fmt: skip
UPDATES: dict[str, str | Callable[[Row], str]] = {
    "weighting": "weighting", "rollouts": "rollouts", "tokens": "tokens", "update, ms": "update_ms",
    "of uniform's (target 0.85)": "times_uniform", "recording, of the update (target 1 %)": percent("record_share"),
    "peak memory, GiB": "peak_gib",
}  # fmt: skip
ROLLOUT: dict[str, str | Callable[[Row], str]] = {
    "model": "model", "backend": "backend", "rollouts": "rollouts", "prompt tokens": "prompt_tokens",
    "response tokens": "response_tokens", "response tokens per s": "tokens_per_s", "of `generate`": "against_generate",
    "mismatch with the trainer, nats (mean)": "mismatch_mean", "(largest)": "mismatch_max",
}  # fmt: skip
TABLES = {
    "signals": Table("signals.csv", "bench_signals.py", {
        "case": "case", "rows": "rows", "positions": "positions", "vocabulary": "vocabulary", "signals, s": "signals_s",
        "plain, s": "plain_s", "ratio (target 2.5)": "ratio", "to plain in chunks": "ratio_chunked_plain",
        "the definition's": "definition_ratio", "largest error of the deviation, nats": "error_deviation",
    }),
    "step": Table("step_trl.csv", "bench_step.py", STEP),
    "attach": Table("attach.csv", "bench_attach.py", {
        "model": "model", "arm": "arm", "response tokens": "response_tokens", "step, s": "step_s",
        "extra pass, s": "extra_forward_s", "attach, s": "cost_s", "of TRL's step (target 3 %)": percent("cost_share"),
        "by whole steps": percent("difference_share"),
    }),
    "recording": Table("step.csv", "bench_step.py", {
        "weighting": "weighting", "step, s": "step_s", "rollouts, s": "rollout_s", "update, s": "update_s",
        "recording, s": "record_s", "share of the step (target 3 %)": percent("recording_share"),
        "bytes per token on disk": "bytes_per_token",
    }),
    "rollout": Table("rollout.csv", "bench_rollout.py", ROLLOUT),
    "bfloat16": Table("rollout_bfloat16.csv", "bench_rollout.py", {
        "model": "model", "log-probabilities of": "what", "tokens": "tokens", "mean difference, nats": "mean",
        "largest": "largest", "KL, nats": "kl",
    }),
    "plan": Table("plan.csv", "bench_plan.py", {
        "model and settings": "model", "phase": "phase", "predicted, MB": "predicted_mb", "measured, MB": "measured_mb",
        "off by (target 15 %)": lambda row: f"{float(row['off']):+.1%}",
    }),
    "plan-scaling": Table("plan_scaling.csv", "bench_plan_scaling.py", {
        "model": "model", "devices of 80 GB": "devices", "options": "options", "fits": "fits", "peak, GB": "peak_gb",
        "in": "phase", "largest parts, GB": "largest", "settings that the plan chose": "chosen",
    }),
    "run-page": Table("run_page.csv", "bench_run_page.py", {
        "what": "what", "steps of the run": "steps", "sent, KiB (target 60)": "kib_per_step",
        "server CPU, ms (target 60)": "server_cpu_ms_per_step", "a check without news, ms (target 10)":
        "server_cpu_ms_per_check", "seen after, s, median": "seen_median_s", "largest": "seen_max_s",
        "load of the machine": "load",
    }),
    "dashboard-long": Table("dashboard_long.csv", "bench_dashboard.py", {
        "page": "page", "until one sees": "shown", "runs": "runs", "steps of each": "steps",
        "from the server's start, s (target 2)": "start_and_first_page_s", "server CPU until then, s":
        "server_cpu_until_then_s", "again, s, median (target 1)": "warm_page_median_s", "largest": "warm_page_max_s",
        "load of the machine": "load", "commit": "commit",
    }),
    "import": Table("import.csv", "bench_import.py", {
        "code": "code", "rows": "rows", "series": "series", "CPU, s": "cpu_s", "wall, s": "wall_s",
        "CPU of a row, us": "us_per_row", "times": "times",
    }),
    "dashboard-tokens": Table("dashboard_tokens.csv", "bench_dashboard.py", {
        "what": "what", "tokens": "tokens", "times": "times", "on the screen after, s, median (target 1)": "median_s",
        "largest": "max_s", "load of the machine": "load",
    }),
    "recorder": Table("recorder.csv", "bench_recorder.py", {
        "tokens a step": "tokens_per_step", "scalars": "scalars", "histograms": "histograms", "texts": "texts",
        "record(), us (median)": "record_p50_us", "99 % (target 500)": "record_p99_us",
        "until durable, ms (median)": "durable_p50_ms", "99 %": "durable_p99_ms",
        "token rows per s (target 8 M)": "writer_tokens_per_s", "bytes a token row (target 12)": "bytes_per_token",
        "packed by xz": "packed_bytes_per_token",
    }),
    "recorder-fsync": Table("recorder_fsync.csv", "bench_recorder.py", {
        "fsync": "fsync", "tokens a step": "tokens_per_step", "acknowledged after, ms (median)": "acknowledged_p50_ms",
        "99 %": "acknowledged_p99_ms", "ratio of medians": "p50_ratio", "of 99 %": "p99_ratio",
        "steps per s, each waited for": "steps_per_s", "ratio": "steps_per_s_ratio",
    }),
    "bytes": Table("bytes.csv", "bench_bytes.py", {
        "tokens": "tokens", "tokens a step": "tokens_per_step", "bits of mantissa": "mantissa_bits",
        "largest error": lambda row: "exact" if row["error"] == "0" else row["error"],
        "bytes a token, a segment for each step": "bytes_apart", "merged": "bytes_merged", "token_id": "token_id",
        "logprob": "logprob", "entropy": "entropy", "renyi2": "renyi2", "deviation": "deviation", "weight": "weight",
        "rest": "rest",
    }),
    "store": Table("store.csv", "bench_store.py", {
        "question": "question", "unit": "unit", "a file for each step": "apart", "merged while running": "merged",
        "merged at the end": "ended", "ratio": "ratio",
    }),
    "store-waits": Table("store_waits.csv", "bench_store.py", {
        "what": "what", "quantile": "quantile", "without merging": "without", "merging": "merging", "ratio": "ratio",
    }),
    "gpu-kernels": Table("gpu_kernels.csv", "gpu.py", {
        "call": "call", "ms": "ms", "one read of the logits, ms (floor)": "one_read_ms",
        "times the read (target 1.8, stretch 1.3)": "times_one_read", "special functions, ms (floor)": "special_ms",
        "extra memory, MiB": "extra_mib",
    }),
    "updates": Table("updates.csv", "bench_updates.py", UPDATES),
    "passes": Table("passes.csv", "bench_passes.py", {
        "shape": "shape", "checkpointed layers": "checkpointed layers", "rollouts": "rollouts",
        "two passes, s": "two_passes_s", "one pass, s": "one_pass_s", "ratio": "ratio",
    }),
    "checkpoint": Table("checkpoint.csv", "bench_checkpoint.py", {
        "model": "model", "MiB": "mib", "written by": "written_by", "the step waits, s": "pause_s",
        "durable after, s": "durable_s", "ratio of waits": "pause_share",
    }),
    "commits": Table("commits.csv", "bench_commits.py", {
        "code": "code", "turns": "turns", "response tokens": "tokens", "response tokens per s": "tokens_per_s",
        "ratio": "tokens_per_s_ratio", "CPU of a token, s": "cpu_s_per_token", "its ratio": "cpu_s_per_token_ratio",
        "peak memory": mib("peak_mib"), "ratio of memory": "peak_mib_ratio",
    }),
    "smollm2": Table("smollm2.csv", "study_smollm2.py", {
        "task": "task", "arm": "arm", "seed": "seed", "steps": "steps", "reward, first 15 steps": "reward_first",
        "last 15": "reward_last", "cut off": "truncated_share",
        "held-out pass@1, before": "heldout_first", "after": "heldout_last",
        "entropy, first 15": "entropy_first", "entropy, last 15": "entropy_last",
    }),
    "gpu-updates": Table("gpu_updates.csv", "gpu.py", UPDATES),
    "gpu-step": Table("gpu_step.csv", "bench_step.py", STEP),
    "gpu-rollout": Table("gpu_rollout.csv", "bench_rollout.py", ROLLOUT),
}  # fmt: skip


def lines(table: Table) -> list[str]:
    """The table in Markdown and where its rows come from; one sentence where there are none."""
    path = RESULTS / table.file
    if not path.exists():
        where = " on a machine with a GPU" if "gpu" in table.file + table.script else ""
        return [f"Not measured yet: `benchmarks/{table.script}` writes these rows{where}."]
    with path.open(newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    made = [f"| {' | '.join(table.columns)} |", "|---|" + "---|" * (len(table.columns) - 1)]
    for row in rows:
        cells = [number(row[key]) if isinstance(key, str) else key(row) for key in table.columns.values()]
        made.append(f"| {' | '.join(cells)} |")
    origin = {f"{row['machine']}; {row['versions']}; commit {row['commit']}" for row in rows}
    return [*made, "", f"{' / '.join(sorted(origin))}; `benchmarks/{table.script}`."]


def page(text: str) -> str:
    """The page with every table between its marks made anew."""

    def fill(found: re.Match[str]) -> str:
        return "\n".join([f"<!-- table {found[1]} -->", *lines(TABLES[found[1]]), "<!-- end -->"])

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
