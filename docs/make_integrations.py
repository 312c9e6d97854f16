"""Writes docs/integrations.md, the tables from monitor.integrations.aliases: python -m docs.make_integrations"""

from __future__ import annotations

from pathlib import Path

from monitor.integrations.aliases import ALIASES, STEP_COLUMNS

HEAD = """# Files of other trainers and trackers

Made by `python -m docs.make_integrations`.

`rlvr check SOURCE` judges a run that was recorded elsewhere; nothing is converted first.

| source | what is read | `pip install` |
|---|---|---|
| `x.csv` | a header and rows; also W&B's export of a chart: of `run - key` the key, without `__MIN` and `__MAX` | |
| `x.jsonl` | an object a line; also verl's file logger, `{"step": n, "data": {...}}`; prime-rl's `metrics.jsonl` | |
| `x.parquet` | columns of numbers | |
| `trainer_state.json`, `checkpoint-N`, or a folder of these (the newest) | `log_history` of TRL, transformers | |
| `run-ID.wandb`, or the folder `offline-run-...` | the history before it is sent | `"rlvr-monitor[wandb]"` |
| `events.out.tfevents...`, or a folder of one run's | scalars; of two, the newest file's | `tensorboard` |
| any other name | the run of that name in `--store`, with its warm-up | |

    rlvr check outputs/checkpoint-200 --json
    rlvr check wandb/offline-run-20261124_211854-kl0icsst
    rlvr check metrics.csv --map step=iteration,entropy=policy/H

Which columns were used, and which were not known, stands on stderr and in the JSON (`mapping`, `unmapped`).

- A column named by a key of [metrics.md](metrics.md), `eval/<split>/<name>` included, or by an alias below is used. The
  prefix `train/` is taken off where a known name is left. Tails are never guessed: `loss/entropy_bonus` is no entropy.
- A column called exactly as the key goes before an alias. Of one trainer's aliases for a key the upper one is used.
  Other pairs are an error that names both; `--map KEY=COLUMN` chooses, and goes before everything.
- The step is the first of STEPS. An epoch is no step. Without one, `--map step=COLUMN`.
- Rows of a step are put together, so evaluations may be logged apart. An empty field is a missing value; `nan` and
  `inf` are broken ones. verl's file logger writes both as null: there they are missing.
- A record at the end that is still being written is left out, so the file of a live run can be judged.

## Aliases

Names stand here only if they mean what metrics.md says, in its unit. `{split}` is a data set's name (`/` in it becomes
`_`), `{k}` and `{n}` are numbers. Rewards of evaluations and means over both sides of the clip have no key: they stay
unmapped. verl's `best@k` is drawn by bootstrap and a little below pass@k; OpenRLHF's `pass` is of rewards of 0 and 1.
"""


def page() -> str:
    """The text of docs/integrations.md."""
    lines = [HEAD.replace("STEPS", ", ".join(f"`{name}`" for name in STEP_COLUMNS))]
    for trainer, aliases in ALIASES.items():
        lines += [f"### {trainer}", "", "| column | key |", "|---|---|"]
        for alias in aliases:
            beside = f" (beside `{alias.beside}`)" if alias.beside else ""
            lines.append(f"| `{alias.column}`{beside} | `{alias.key}` |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "integrations.md").write_text(page())
