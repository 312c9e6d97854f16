"""Public problem sets as JSONL files for `jsonl:` tasks: `rlvr fetch gsm8k` writes gsm8k.jsonl. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ModelError

ASK = " Please reason step by step, and put your final answer within \\boxed{}."  # arXiv 2606.19771, Qwen's own


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset of the Hugging Face hub as Parquet; its test split becomes the split "heldout"."""

    repo: str
    files: str  # with {split}: train or test
    problem: str  # column
    answer: str  # column


DATASETS = {
    "gsm8k": Dataset("openai/gsm8k", "main/{split}-*.parquet", "question", "answer"),
    # 12,000 problems to train on and the 500 of MATH-500 held out
    "math": Dataset("nlile/hendrycks-MATH-benchmark", "data/{split}-*.parquet", "problem", "answer"),
}


def fetch_dataset(name: str, out: Path) -> int:
    """Downloads a set of DATASETS and writes it to `out` by rename; returns the number of problems.

    Raises ModelError without a network, with what to do, or if the file exists.
    """
    from huggingface_hub import snapshot_download

    if out.exists():
        raise ModelError(f"{str(out)!r} exists. Delete it first, or use it: --task jsonl:{out}.")
    source = DATASETS[name]
    patterns = [source.files.format(split=split) for split in ("train", "test")]
    try:
        folder = snapshot_download(source.repo, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:  # huggingface_hub raises what its HTTP client raises
        raise ModelError(
            f"Cannot download {source.repo} from the Hugging Face hub: {type(error).__name__}. This needs a "
            f"network: run the same command on another machine, and bring {out.name} here."
        ) from None
    part = out.with_suffix(".tmp")
    rows = [json.dumps(row) for row in problem_rows(source, Path(folder))]
    part.write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.replace(part, out)
    return len(rows)


def problem_rows(source: Dataset, folder: Path) -> Iterator[dict[str, str]]:
    """{"prompt", "answer", "split"} of each problem of a downloaded dataset.

    GSM8K's answers end in "#### 1,234": only the number is kept. Example: "6*7=<<6*7=42>>42\\n#### 42" -> "42".
    """
    import duckdb

    for split, ours in (("train", "train"), ("test", "heldout")):
        path = str(folder / source.files.format(split=split))
        query = f'SELECT "{source.problem}", "{source.answer}" FROM read_parquet(?)'
        for problem, answer in duckdb.connect().execute(query, [path]).fetchall():
            before, mark, final = answer.rpartition("####")
            answer = final.strip().replace(",", "") if mark and before else answer
            yield {"prompt": problem.strip() + ASK, "answer": answer, "split": ours}
