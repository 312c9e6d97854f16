"""Which rows go through the model together: at most so many rows, or so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trainer.flow import TokenBatch


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some rows of a batch, cut to their longest prompt and response. rows: int64 [n], where they stand in the batch.

    All rows in order, uncut, have rows None.
    """

    batch: TokenBatch
    rows: Tensor | None = None

    def of(self, column: Tensor) -> Tensor:
        """These rows of another column [N, T] of the batch, cut alike."""
        return column if self.rows is None else column[self.rows, : self.batch.mask.shape[1]]


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """The limits of one pass through the model.

    rows: most rows. tokens: most rows x columns; rows are then sorted by length, so that those of like length go
    together and little of a pass is padding. A row that is longer than that goes alone. None: rows in order, uncut.
    """

    rows: int
    tokens: int | None = None

    def hold(self, batch: TokenBatch) -> bool:
        """Whether the whole batch may go at once, as it is."""
        return len(batch) <= self.rows and (self.tokens is None or batch.input_ids.numel() <= self.tokens)

    def split(self, batch: TokenBatch) -> list[MicroBatch]:
        """The batch's rows, each in one part. With a limit of tokens this copies the rows' lengths to the host."""
        if self.hold(batch):
            return [MicroBatch(batch)]
        if self.tokens is None:
            every = torch.arange(len(batch), device=batch.mask.device)
            starts = range(0, len(batch), self.rows)
            return [MicroBatch(batch.rows(i, i + self.rows), every[i : i + self.rows]) for i in starts]
        found = torch.stack([batch.attention_mask.sum(1) - batch.mask.sum(1), batch.mask.sum(1)], 1).tolist()
        parts = []
        for rows in grouped(found, self.rows, self.tokens):
            prompt, width = (max(found[row][i] for row in rows) for i in (0, 1))
            parts.append(_cut(batch, rows, prompt, max(1, width)))
        return parts


def grouped(lengths: Sequence[tuple[int, int]], rows: int, tokens: int) -> list[list[int]]:
    """Rows by their (prompt, response) lengths, put together up to `rows` rows and `tokens` rows x columns.

    Columns are the longest prompt and the longest response of a part. The longest rows come first, so that a part that
    does not fit fails at once. Example: lengths (2, 8), (2, 1), (2, 2), (2, 7) and 20 tokens: [[0, 3], [2, 1]].
    """
    order = sorted(range(len(lengths)), key=lambda row: (-sum(lengths[row]), row))
    parts: list[list[int]] = []
    prompt = width = 0
    for row in order:
        longer = max(prompt, lengths[row][0]), max(width, lengths[row][1])
        if parts and len(parts[-1]) < rows and (len(parts[-1]) + 1) * sum(longer) <= tokens:
            parts[-1].append(row)
            prompt, width = longer
        else:
            parts.append([row])
            prompt, width = lengths[row]
    return parts


def _cut(batch: TokenBatch, rows: list[int], prompt: int, width: int) -> MicroBatch:
    """Left padding goes down to the longest prompt, right padding to the longest response."""
    on_host = torch.tensor(rows)
    index = on_host.to(batch.mask.device)
    longest = batch.mask.shape[1]
    start = batch.input_ids.shape[1] - longest - prompt
    found = {}
    for spec in fields(batch):
        column: Tensor = getattr(batch, spec.name)
        taken = column[on_host if column.device.type == "cpu" else index]
        if spec.name in ("input_ids", "attention_mask"):
            taken = taken[:, start : start + prompt + width]
        elif column.ndim == 2:
            taken = taken[:, :width]
        found[spec.name] = taken
    return MicroBatch(TokenBatch(**found), index)
