"""The second built-in task: find a way over a grid with walls, move by move.

Prompt "13,52:" asks for a path from row 1, column 3 to row 5, column 2 of GRID (rows from the top, columns from the
left, both from 0). An answer is 1 to 16 moves, ended by ";", e.g. "22224;". Moves are digits as on a number pad, 8 up,
2 down, 4 left and 6 right, because the built-in tokenizer has digits and no letters. Every move must stay on the grid
and off the walls, no cell may be entered twice (the start counts as entered), and the last move must enter the goal.
Paths need not be shortest, so every prompt has many right answers. In `chain` an answer states each result, and a
policy fails by wrong sums. Here nothing is stated: a policy must know the grid and keep count of where it is, and fails
by walking into a wall, in a circle, or to another cell.

Splits divide pairs of cells; a pair stands in one split, in one direction. `ood` has 64 pairs that are 10 moves or more
apart, farther than reinforcement learning ever sees. All others are 4 to 8 apart: `multipath` has those with 7 shortest
paths or more, `heldout` 64 of the rest, and `train` what is left. The pairs are shuffled once, with a fixed seed, so
that the first prompts of a split are a fair sample of it.
"""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

from trainer.tasks.base import SPLITS, Prompt

GRID = (  # "#" is a wall
    "........",
    ".##..#..",
    "......#.",
    "..#.....",
    ".##..##.",
    "......#.",
    ".#.#....",
    "...#....",
)
CELLS = tuple(f"{row}{col}" for row, line in enumerate(GRID) for col, place in enumerate(line) if place == ".")
MOVES = {"8": (-1, 0), "2": (1, 0), "4": (0, -1), "6": (0, 1)}  # character -> (rows, columns)
MAX_MOVES = 16
NEAR, FAR = range(4, 9), 10  # shortest moves of the prompts of all splits but ood; the least of those of ood
MANY_WAYS = 7  # shortest paths that put a prompt into multipath
HELDOUT, OOD = 64, 64  # prompts
STEPS = {  # (cell, move) -> the cell that it enters; no row where a wall or the edge stops it
    (cell, move): entered
    for cell in CELLS
    for move, (rows, cols) in MOVES.items()
    if (entered := f"{int(cell[0]) + rows}{int(cell[1]) + cols}") in CELLS
}
_WRITTEN = re.compile(rf"[{''.join(MOVES)}]{{1,{MAX_MOVES}}}")


def written_moves(completion: str) -> str | None:
    """The 1 to 16 moves of a completion, right or wrong; None for any other text."""
    text = completion.strip().removesuffix(";")
    return text if _WRITTEN.fullmatch(text) else None


def cells_of(start: str, moves: str) -> list[str] | None:
    """The start and each cell that is entered, None if a move leaves the grid, meets a wall or enters a cell again.

    >>> cells_of("13", "22224")
    ['13', '23', '33', '43', '53', '52']
    """
    cells = [start]
    for move in moves:
        entered = STEPS.get((cells[-1], move))
        if entered is None or entered in cells:
            return None
        cells.append(entered)
    return cells


def ways(start: str) -> dict[str, tuple[int, int]]:
    """{cell: (moves of a shortest path from `start`, number of shortest paths)} of every cell that can be reached."""
    found, frontier = {start: (0, 1)}, [start]
    for cell in frontier:  # grows as it is read: cells in the order of their distance
        distance, paths = found[cell]
        for move in MOVES:
            entered = STEPS.get((cell, move))
            if entered is None:
                continue
            if entered not in found:
                found[entered] = (distance + 1, 0)
                frontier.append(entered)
            if found[entered][0] == distance + 1:
                found[entered] = (distance + 1, found[entered][1] + paths)
    return found


@cache
def _splits() -> dict[str, list[Prompt]]:
    rng = random.Random(0)
    pairs = [
        ((a, b) if rng.random() < 0.5 else (b, a), *reached[b])
        for i, a in enumerate(CELLS)
        for reached in (ways(a),)
        for b in CELLS[i + 1 :]
    ]
    rng.shuffle(pairs)
    near = [(pair, paths) for pair, distance, paths in pairs if distance in NEAR]
    few = [pair for pair, paths in near if paths < MANY_WAYS]
    chosen = {
        "train": few[HELDOUT:],
        "heldout": few[:HELDOUT],
        "ood": [pair for pair, distance, _ in pairs if distance >= FAR][:OOD],
        "multipath": [pair for pair, paths in near if paths >= MANY_WAYS],
    }
    return {
        split: [Prompt(f"{a}-{b}", f"{a},{b}:", split, {"start": a, "goal": b}) for a, b in chosen[split]]
        for split in SPLITS
    }


class PathsTask:
    """See the module's docstring. Reward 1.0 for a path from the start to the goal by its rules, else 0.0."""

    name = "paths"
    correct_at = 1.0
    has_forms = True
    system_prompt = None

    def prompts(self, split: str) -> list[Prompt]:
        return _splits()[split]

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        rows = zip(completions, columns["start"], columns["goal"], strict=True)
        return [float(_path(completion, start, goal) is not None) for completion, start, goal in rows]

    def gives_answer(self, completion: str) -> bool:
        """Written as moves, as many as are allowed, wherever they lead."""
        return written_moves(completion) is not None

    def canonical(self, prompt: Prompt, completion: str) -> str | None:
        """The path itself, as its moves: no two paths count as one."""
        return _path(completion, prompt.columns["start"], prompt.columns["goal"])


def _path(completion: str, start: str, goal: str) -> str | None:
    """The moves of a completion that is right, else None."""
    moves = written_moves(completion)
    cells = cells_of(start, moves) if moves else None
    return moves if cells and cells[-1] == goal else None
