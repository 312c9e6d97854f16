"""`jsonl:<path>`: problems from a file of JSON lines with a prompt and an answer, scored by math-verify."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from monitor.errors import nearest
from trainer.tasks.base import SPLITS, Prompt
from trainer.tasks.public_sets import DATASETS
from trainer.tasks.reasoning_gym import extract_answer

HELDOUT_SHARE = 0.1  # of the rows, the last ones, if the file names no splits
_LONGEST = 4000  # characters of a completion, from its end, that are parsed: answers stand there
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


class JsonlTask:
    """Rows {"prompt": str, "answer": str or number, "split"?: train|heldout|ood|multipath, ...}.

    Without any "split" the last 10 % of the rows are held out; a row without one is train if others have one. Other
    keys become columns for reward functions. A completion is right if math-verify finds its <answer>...</answer>, or
    without that its own final answer, equal to the row's; answers that are no mathematics are compared as text.
    Prompts that say where the answer goes, by asking for \\boxed{}, are sent without the system prompt.
    Raises ValueError with the line number for rows that cannot be used.
    """

    correct_at = 1.0
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
        self._gold: dict[str, list[Any]] = {}

    def prompts(self, split: str) -> list[Prompt]:
        """Prompts of a split, in the order of the file."""
        return self._splits.get(split, [])

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float | None]:
        """1.0 where the completion's answer equals the column "answer", else 0.0."""
        if "answer" not in columns:
            raise ValueError(f"{self.name}: the reward needs the column 'answer', got {', '.join(columns) or 'none'}.")
        return [float(self._is_right(gold, text)) for gold, text in zip(columns["answer"], completions, strict=True)]

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """None: a row has one answer, so right completions do not differ in it."""
        return None

    def _is_right(self, gold: str, completion: str) -> bool:
        answer = extract_answer(completion)
        given = (answer if answer is not None else completion)[-_LONGEST:]
        if gold not in self._gold:
            self._gold[gold] = _parsed(gold, exact=True)
        if answer is not None and _as_text(given) == _as_text(gold):
            return True
        if not self._gold[gold]:
            boxed = _BOXED.findall(given)
            return _as_text(boxed[-1] if boxed else given) == _as_text(gold)
        return bool(verify(self._gold[gold], _parsed(given, exact=answer is not None), timeout_seconds=_timeout()))


def _timeout() -> Any:
    """math-verify's time limit works by SIGALRM, which only the main thread may set: none elsewhere."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def _parsed(text: str, *, exact: bool) -> list[Any]:
    """math-verify's reading of a text; if `exact`, of the text as one formula where it has no marks of its own."""
    if exact and "\\" in text and "$" not in text and "boxed" not in text:
        text = f"${text}$"
    return list(parse(text, parsing_timeout=_timeout()))


def _as_text(text: str) -> str:
    return " ".join(text.split()).casefold()


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
            f"{where} is not JSON: {error.msg} at column {error.colno}. Expected one object a line."
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
    split = row.get("split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"{where}: split is {split!r}.{nearest(str(split), SPLITS)} Expected {', '.join(SPLITS)}.")
    return row
