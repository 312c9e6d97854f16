"""`jsonl:<path>`: problems from a file of JSON lines with prompt and answer, scored as mathematics or text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monitor.errors import nearest
from trainer.rewards.math_answers import final_answer, is_right
from trainer.tasks.base import SPLITS, Prompt
from trainer.tasks.public_sets import DATASETS

HELDOUT_SHARE = 0.1  # of the rows, the last ones, if the file names no splits
RESERVED = ("prompts", "completions", "completion_ids")  # arguments of every reward function; no row may use them


class JsonlTask:
    """Rows {"prompt": str, "answer": str or number, "split"?: train|heldout|ood|multipath, ...}.

    If no row has a "split", the last 10 % of the rows are held out. If some have one, the others are train. Other keys
    become columns for reward functions. A completion is right if its <answer>...</answer> or \\boxed{} is the row's
    answer (`trainer.rewards.math_answers`). Where it has neither, what math-verify finds counts as its answer.
    Prompts that ask for \\boxed{} are sent without the system prompt, which asks for <answer>.
    Raises ValueError with the line number for rows that cannot be used.
    """

    correct_at = 1.0
    has_forms = False  # a row has one answer, so all right completions give the same
    system_prompt: str | None = (
        "Solve the problem step by step. Give the final answer, and nothing else, between <answer> and </answer>."
    )

    def __init__(self, path: str) -> None:
        self.name = f"jsonl:{path}"
        rows = _read_rows(Path(path).expanduser())
        named = any("split" in row for _, row in rows)
        held = max(1, round(HELDOUT_SHARE * len(rows))) if len(rows) > 1 else 0
        keys = list(dict.fromkeys(key for _, row in rows for key in row if key not in ("prompt", "split", "answer")))
        self._splits: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        for index, (line, row) in enumerate(rows):
            default = "heldout" if not named and index >= len(rows) - held else "train"
            split = row.get("split") or default
            columns = {"answer": str(row["answer"])} | {key: row.get(key) for key in keys}
            self._splits[split].append(Prompt(f"line-{line}", row["prompt"], split, columns))
        if not self._splits["train"]:
            raise ValueError(f"{path!r} has no row of split 'train': there is nothing to train on.")
        if all("\\boxed" in row["prompt"] for _, row in rows):
            self.system_prompt = None

    def prompts(self, split: str) -> list[Prompt]:
        """Prompts of a split, in the order of the file."""
        return self._splits.get(split, [])

    def reward(
        self, /, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float | None]:
        """1.0 where the completion's answer is that of the column "answer", else 0.0."""
        if "answer" not in columns:
            raise ValueError(f"{self.name}: the reward needs the column 'answer', got {', '.join(columns) or 'none'}.")
        return [float(is_right(gold, text)) for gold, text in zip(columns["answer"], completions, strict=True)]

    def gives_answer(self, completion: str) -> bool:
        """With <answer>...</answer> or \\boxed{}; without, the reward has to guess where the answer is."""
        return final_answer(completion) is not None

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """None: see has_forms."""
        return None


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, row) of each row that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        fetch = f" Run `rlvr fetch {path.stem}` to get it." if path.stem in DATASETS else ""
        raise ValueError(f"No file {str(path)!r}.{nearest(path.name, siblings)}{fetch}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}. Expected a UTF-8 file of JSON lines.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a JSON string may hold U+2028
        if line.strip():
            rows.append((number, _checked_row(path, number, line)))
    if not rows:
        raise ValueError(f'{str(path)!r} has no rows, expected one {{"prompt": ..., "answer": ...}} per line.')
    return rows


def _checked_row(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{str(path)!r} line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: {error.msg} at column {error.colno}. Expected one JSON object on each line."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}, expected an object with prompt and answer.")
    missing = [key for key in ("prompt", "answer") if row.get(key) is None]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}. Its keys: {', '.join(row) or 'none'}.")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError(f"{where}: prompt is {str(row['prompt'])[:40]!r}, expected a text.")
    if isinstance(row["answer"], (list, dict)):
        raise ValueError(f"{where}: answer is a {type(row['answer']).__name__}, expected a text or a number.")
    if not str(row["answer"]).strip():
        raise ValueError(f"{where}: answer is {row['answer']!r}, expected a text or a number.")
    if taken := [key for key in RESERVED if key in row]:
        raise ValueError(
            f"{where}: key {taken[0]!r} would be a column for reward functions, which are given {', '.join(RESERVED)} "
            "already. Rename the key in the file."
        )
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"{where}: split is {split!r}.{nearest(str(split), SPLITS)} Expected {', '.join(SPLITS)}.")
    return row
