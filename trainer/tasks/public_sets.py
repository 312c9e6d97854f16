"""Public problem sets as JSONL files for `jsonl:` tasks: `rlvr fetch gsm8k` writes gsm8k.jsonl. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ModelError

ASK = " Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's, used in arXiv 2606.19771
SPLITS = {"train": "train", "test": "heldout"}  # the set's split -> our split


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A set of problems on the Hugging Face hub."""

    repo: str
    configuration: str | None
    problem: str  # column
    answer: str  # column


DATASETS = {
    "gsm8k": PublicSet("openai/gsm8k", "main", "question", "answer"),
    # 12,000 problems to train on and the 500 of MATH-500 held out
    "math": PublicSet("nlile/hendrycks-MATH-benchmark", None, "problem", "answer"),
}


def fetch_dataset(name: str, out: Path) -> int:
    """Downloads a set of DATASETS and writes it to `out` by rename; returns the number of problems.

    Raises ModelError, with what to do, if there is no network or the file exists.
    """
    import datasets

    if out.exists():
        raise ModelError(f"{str(out)!r} exists. Delete it first, or use it: --task jsonl:{out}.")
    source = DATASETS[name]
    try:
        splits = {split: datasets.load_dataset(source.repo, source.configuration, split=split) for split in SPLITS}
    except Exception as error:  # datasets raises what its HTTP client raises
        raise ModelError(
            f"Cannot download {source.repo} from the Hugging Face hub: {type(error).__name__}. This needs a "
            f"network: run the same command on a machine that has one, and copy {out.name} here."
        ) from None
    part = out.with_suffix(".tmp")
    rows = [json.dumps(row) for split, rows in splits.items() for row in problem_rows(source, split, rows)]
    part.write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.replace(part, out)
    return len(rows)


def problem_rows(source: PublicSet, split: str, rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """{"prompt", "answer", "split"} of each problem of a split.

    GSM8K's answers end in "#### 1,234": only the number is kept. Example: "6*7=<<6*7=42>>42\\n#### 42" -> "42".
    """
    for row in rows:
        answer = row[source.answer]
        before, mark, final = answer.rpartition("####")
        answer = final.strip().replace(",", "") if mark and before else answer
        yield {"prompt": row[source.problem].strip() + ASK, "answer": answer, "split": SPLITS[split]}
