"""An update on a CPU at the shape of Qwen2.5-0.5B with random weights: ict (k = 10 %) against uniform; updates.csv.

    python benchmarks/bench_updates.py

There are 16 rollouts of at most 32 tokens, with prompts of 16. Each run has a process of its own, one after another.
The time is CPU time with one thread for tensors. With a vocabulary of 151,936 logits are what a sparse update saves: it
makes those with gradient at the selected positions only.
Needs 12 GB of memory and about twelve minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from harness import RESULTS, no_options, write_rows
from updates import ON_CPU, measured


def main() -> None:
    no_options(__doc__)
    rows = []
    for turn in (1, 2):
        pair = {}
        for kind in ("uniform", "ict") if turn == 1 else ("ict", "uniform"):
            child = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True)
            pair[kind] = json.loads(child.stdout.splitlines()[-1])
            print(f"turn {turn}, {kind}: {pair[kind]['update_ms']} ms", flush=True)
        for row in pair.values():
            ratio = float(row["update_ms"]) / float(pair["uniform"]["update_ms"])
            rows.append({"turn": turn} | row | {"times_uniform": f"{ratio:.3f}"})
    write_rows(RESULTS / "updates.csv", rows, ("torch", "transformers"))


if __name__ == "__main__":
    if sys.argv[1:] in (["uniform"], ["ict"]):  # its own child
        torch.set_num_threads(1)
        print(json.dumps(measured(sys.argv[1], torch.device("cpu"), ON_CPU)))
    else:
        main()
