"""Where a response ends: the model's end tokens, the end of the assistant's turn in its template, and rollout.stop.

A base model may carry the chat template of its instructed sibling, and yet name only its text separator as end token
(Qwen2.5: <|im_end|> closes a turn, <|endoftext|> is what the files say). Its responses would then never end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import ConfigError

_ANSWER = "RLVRANSWER"  # stands for the assistant's text where a template is asked how it goes on


class StopStrings:
    """Finds where a text is completed, however the tokens cut it. On the host: only decoding knows a token's text."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer, self.strings = tokenizer, tuple(strings)
        self.longest = max(map(len, strings))  # tokens, at most: most tokens have a character or more

    def inside(self, rows: list[list[int]]) -> list[bool]:
        """Of each row of token ids, whether its text contains a stop string."""
        return [any(each in text for each in self.strings) for text in self._texts(rows)]

    def lengths(self, rows: list[list[int]]) -> list[int | None]:
        """Of each row, the number of tokens up to the one that completes the first stop string; None without one.

        The text of more tokens contains it if that of fewer does, so the number is found by halving.
        """
        return [self._length(row) if found else None for row, found in zip(rows, self.inside(rows), strict=True)]

    def _length(self, row: list[int]) -> int:
        return 1 + bisect_left(range(len(row)), True, key=lambda last: self.inside([row[: last + 1]])[0])

    def _texts(self, rows: list[list[int]]) -> list[str]:
        found: list[str] = self._tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
        return found


def chat_template(setting: str, own: str | None) -> str | None:
    """The template that `rollout.chat_template` means. own: the model's. Raises ConfigError if a file cannot be read.

    "model": its own, None where it has none; "none": None; else the path of a file that holds a Jinja template.
    """
    if setting == "model":
        return own
    if setting == "none":
        return None
    try:
        return Path(setting).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"rollout.chat_template is {setting!r}, which cannot be read: {error}. Expected model, none, or the path "
            "of a file with a Jinja template."
        ) from None


def turn_end_id(tokenizer: Any) -> int | None:
    """The special token that closes the assistant's turn in the tokenizer's chat template, None if there is none.

    It is the first token after the answer in a rendered conversation, if it is one of the tokenizer's added tokens.
    Raises ConfigError for a template that cannot be rendered.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # Jinja's own errors, and whatever the template raises
        raise ConfigError(
            f"The chat template cannot be rendered: {type(error).__name__}: {error}. Expected one that takes a user's "
            "and an assistant's message. Set rollout.chat_template to none or to another file."
        ) from None
    _, found, rest = text.rpartition(_ANSWER)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    return int(ids[0]) if ids and ids[0] in tokenizer.added_tokens_decoder else None


def stop_tokens(tokenizer: Any, vocabulary: int, stop: Sequence[int | str]) -> tuple[list[int], list[str]]:
    """(token ids, other strings) of `rollout.stop`: a string that is one token by itself ends a response as its id.

    Raises ConfigError for an id that is not in the vocabulary.
    """
    known = tokenizer.get_vocab()
    ids, strings = [], []
    for each in stop:
        if isinstance(each, int):
            if not 0 <= each < vocabulary:
                raise ConfigError(
                    f"rollout.stop holds the token id {each}, but the model has ids 0 to {vocabulary - 1}. Give an "
                    "id of this model, or the text of the token."
                )
            ids.append(each)
        elif each in known and known[each] in tokenizer.added_tokens_decoder:
            ids.append(known[each])
        else:
            strings.append(each)
    return ids, strings
