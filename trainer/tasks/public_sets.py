"""Public problem sets as JSONL files for `jsonl:` tasks: `rlvr fetch gsm8k` writes gsm8k.jsonl. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.errors import nearest
from trainer.errors import ModelError
from trainer.tasks.base import SPLITS as OURS

ASK = " Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's, used in arXiv 2606.19771
SPLITS = {"train": "train", "test": "heldout"}  # the set's split -> our split


@dataclass(frozen=True, slots=True)
class PublicSet:
    """A set of problems on the Hugging Face hub."""

    repo: str
    configuration: str | None
    problem: str  # column
    answer: str  # column
    ask: str = ASK  # what is added to each problem
    splits: Mapping[str, str] = field(default_factory=lambda: SPLITS)  # the set's split -> our split


DATASETS = {
    "gsm8k": PublicSet("openai/gsm8k", "main", "question", "answer"),
    # 12,000 problems to train on and the 500 of MATH-500 held out
    "math": PublicSet("nlile/hendrycks-MATH-benchmark", None, "problem", "answer"),
}


def fetch_dataset(source: PublicSet, out: Path) -> int:
    """Downloads a set and writes it to `out` by rename; returns the number of problems.

    Raises ModelError, with what to do, if there is no network, the file exists, or a column or split does not.
    """
    import datasets

    if out.exists():
        raise ModelError(f"{str(out)!r} exists. Delete it first, or use it: --task jsonl:{out}.")
    try:
        splits = {
            split: datasets.load_dataset(source.repo, source.configuration, split=split) for split in source.splits
        }
    except Exception as error:  # datasets raises what its HTTP client raises
        raise ModelError(
            f"Cannot download {source.repo} from the Hugging Face hub: {type(error).__name__}. This needs a "
            f"network: run the same command on a machine that has one, and copy {out.name} here."
        ) from None
    for split, rows in splits.items():
        for column in (source.problem, source.answer):
            if column not in rows.column_names:
                hint = nearest(column, rows.column_names)
                raise ModelError(
                    f"{source.repo} has no column {column!r} in its split {split!r}.{hint} "
                    f"It has {', '.join(rows.column_names)}."
                )
    part = out.with_suffix(".tmp")
    rows = [json.dumps(row) for split, rows in splits.items() for row in problem_rows(source, split, rows)]
    part.write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.replace(part, out)
    return len(rows)


def problem_rows(source: PublicSet, split: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """{"prompt", "answer", "split"} of each problem of a split.

    GSM8K's answers end in "#### 1,234": only the number is kept. Example: "6*7=<<6*7=42>>42\\n#### 42" -> "42".
    """
    for row in rows:
        answer = str(row[source.answer])
        before, mark, final = answer.rpartition("####")
        answer = final.strip().replace(",", "") if mark and before else answer
        yield {"prompt": str(row[source.problem]).strip() + source.ask, "answer": answer, "split": source.splits[split]}


def own_set(repo: str, problem: str, answer: str, *, configuration: str | None, ask: str, splits: str) -> PublicSet:
    """A set that a user names, with its columns; splits as "train=train,test=heldout". Raises ModelError."""
    mapped = dict[str, str]()
    for part in splits.split(","):
        theirs, equals, ours = (text.strip() for text in part.partition("="))
        if not (theirs and equals and ours in OURS):
            raise ModelError(
                f"--splits is {splits!r}, with a part {part!r}: expected SPLIT OF THE SET=SPLIT OF OURS, "
                f"e.g. train=train,test=heldout. Ours are {', '.join(OURS)}."
            )
        mapped[theirs] = ours
    return PublicSet(repo, configuration, problem, answer, ask, mapped)
