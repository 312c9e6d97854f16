"""Texts of token ids, for the token_texts of a SampleTable."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TokenTexts:
    """Texts of token ids. Each id is decoded once. decode: a tokenizer's function from ids to a text."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[list[str]]:
        for token in {token for ids in completion_ids for token in ids} - self._texts.keys():
            self._texts[token] = self._decode([token])
        return [list(map(self._texts.__getitem__, ids)) for ids in completion_ids]
