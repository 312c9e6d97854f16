"""Writes docs/integrations.md, the tables from monitor.integrations.aliases: python -m docs.make_integrations"""

from __future__ import annotations

from pathlib import Path

from monitor.integrations.aliases import ALIASES, STEP_COLUMNS

HEAD = """# Other trainers

Made by `python -m docs.make_integrations`.

| trainer | how | what is recorded |
|---|---|---|
| TRL 1.16, `GRPOTrainer` | [`attach`](#trl), one line | all that ours records, exact; its loss is weighted if asked |
| TRL 1.16, `RLOOTrainer` | `attach` | the same; no weighting |
| any that logs to W&B | [`rlvr tap`](#code-that-logs-to-wb), or one changed import | its scalars, tables of rollouts |
| verl 0.9.1 | [its logger `rlvr`](#verl) | its scalars, each token without H2 and deviation; some weightings |
| a loop of your own | [own_loop.md](own_loop.md) | the same |
| slime, miles | [their log functions](#slime-and-miles) | rollouts: rewards, texts, the sampler's tokens; evaluations |
| verl 0.9.1 | [`rlvr import`](#rlvr-import): its file log, live | scalars; `--rollouts`: texts, rewards |
| prime-rl | `rlvr import`: its file monitor, live | scalars; `--rollouts`: tokens, entropy histograms |
| slime, miles | `rlvr import`: TensorBoard or W&B files, live | scalars; `--rollouts`: their dumps, tokens |
| OpenRLHF 0.11.2 | `rlvr import`: TensorBoard or W&B files, live | scalars |
| TRL without `attach`, transformers | `rlvr import`: checkpoints | scalars, as fresh as the last save |
| any with CSV, JSON lines, Parquet, TensorBoard, W&B | `rlvr import`, live | scalars; `--rollouts` of your own |

Files tell what the trainer computed: where it logs no entropy, there is none. Deviation needs the logits of whole
groups, so only `attach` and a loop of your own have it.

## TRL

```python
from rlvr_monitor import attach
from trl import GRPOConfig, GRPOTrainer

args = GRPOConfig(output_dir="trl", num_generations=8, per_device_train_batch_size=8, max_steps=20)
trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=dataset)
attach(trainer, store="runs", run="mine")
# attach(trainer, store="runs", run="mine", weighting="ict_budget", guard=True)  # weights its loss, acts on alerts
trainer.train()
```

Then `rlvr dashboard runs`, also while it trains. `attach` wraps methods of this one trainer; TRL, the model and the
training itself stay as they are, and without a weighting the weights come out the same bit by bit.

- **Recorded**: every token's log-probability, H1, H2, deviation and weight, their histograms, texts, rewards (of
  several functions each mean as `reward/<function>`), advantages, clip and KL figures, gradient norm, learning rate,
  predicted entropy changes, vLLM's log-probabilities against the trainer's, times; of TRL's evaluations pass@1, and
  pass@k for `num_generations_eval` k, as split `heldout`. Not: the probe, and `same_answer_share`, for which a task
  must know canonical answers.
- **Exact**: hidden states are read in TRL's own forward passes and go through its own head, so nothing is estimated.
  A test holds every signal to 2e-4 nat of an ordinary float64 forward. Where TRL scores with dropout, so do we.
- **Cost**: the head and the signals ([performance.md](performance.md)). A further pass, without gradient, is made only
  for a weighting where TRL makes none for old log-probabilities: one update a rollout batch, without vLLM. Its time
  is `perf/extra_forward_s`. Hidden states of a rollout batch, tokens x hidden size, are kept until its last update.
- **Step**: a rollout batch with all its updates, numbered by TRL's `global_step` after the last. With
  `num_iterations=2` steps are 2, 4, 6. Several rollout batches for one optimizer step are one step.
- **Several processes**: each records its rows. Where a group lies on two of them, they exchange hidden states, a slab
  at a time. PEFT, gradient checkpointing, conversations and tools' masks are tested; on FSDP2, ZeRO-3 and images the
  same code paths as TRL's are taken, but no test runs them. vLLM in TRL's process was run on a CPU; the weights were
  handed over in another way, because TRL's `load_weights` fails there. vLLM's server was not run.
- **Weightings**: those of [method.md](method.md), except `divergence`, `kl_cov` and `attention`, for `loss_type` grpo,
  bnpo, dr_grpo, dapo and cispo. They equal our own trainer's loss with `loss.kl_outside_mask`, on- and off-policy.
  Not equal: TRL's KL term and entropy bonus count every token; TRL's logged `clip_ratio` leaves out tokens of weight 0,
  ours does not count them at all; where a rollout batch is split into several optimizer steps, dapo and cispo divide
  by its mean sum of weights a step; responses that `mask_truncated_completions` empties still count in grpo's mean.
- **Guard**: `guard=True` saves a checkpoint and divides the learning rate by 3 when an alert fires. An alerts file
  ([actions.md](actions.md)) in its place: `guard="alerts.toml"`, with `checkpoint`, `stop` and `lower_lr`; other
  actions are refused.
- **What fails** never ends training: it is an event `attach_error` of the run, and from then on the scalars of TRL's
  log are recorded. So they are from the start where a newer TRL has changed inside, and a weighting is refused there.
  After a failure every weight is 1: look for the event.
- A resumed training (`trainer.train(resume_from_checkpoint=...)`) opens the next attempt of its run.

## rlvr import

`rlvr import [TRAINER] SOURCE --run NAME` records files as a run of the store like any other: dashboard, alerts,
`rlvr watch`, SQL and comparisons work on it. `--follow` does it while the trainer writes them. TRAINER is trl, verl,
prime-rl, openrlhf, slime or miles: then only its [aliases](#aliases) count; without it all of them do. Without `--run`
the run is called as the file or folder.

verl:

```sh
VERL_FILE_LOGGER_PATH=verl.jsonl python -m verl.trainer.main_ppo CONFIG \
  trainer.logger='["console","file"]' trainer.rollout_data_dir=rollouts &
rlvr import verl verl.jsonl --rollouts rollouts --follow
```

prime-rl, with its file monitor on and `trainer.enable_token_export = true`; newer versions write traces in its place:

```sh
rlvr import prime-rl outputs/metrics.jsonl --run prime --rollouts outputs/token_exports --follow
rlvr import prime-rl outputs/monitors/file/metrics.jsonl --run newer --rollouts outputs/monitors/file/traces --follow
```

slime and miles, both with `--use-tensorboard` and `--dump-details`, and with `--use-rollout-entropy` for entropies:

```sh
TENSORBOARD_DIR=logs python train.py ARGUMENTS --use-tensorboard --dump-details details --use-rollout-entropy &
rlvr import slime logs --run slime --rollouts details --follow
```

OpenRLHF, and whatever else writes TensorBoard files:

```sh
python -m openrlhf.cli.train_ppo_ray CONFIG --logger.tensorboard_dir logs &
rlvr import openrlhf logs --run openrlhf --follow
```

Whatever logs to W&B, also offline:

```sh
WANDB_MODE=offline python train.py &
rlvr import wandb/latest-run --run tracked --follow
```

TRL without `attach`, after each save:

```sh
rlvr import trl outputs --run trl
```

- **Names**: a column that a key or an alias names is recorded under the key, with the rules [below](#columns). Every
  other column with finite numbers is recorded under its own name and drawn in the section "Other series" of the page
  Run; no rule judges it. The command prints both lists, and what it left out.
- **Again**: importing again adds what is new, and where nothing is new it writes nothing. How far a run was imported is
  told by its own steps, compared with the source's; there is no other state. So an importer that was killed goes on
  behind the last durable step. Each import that adds something is an attempt of the run ([store.md](store.md)).
- **Begun anew**: if the source is no longer what the run holds, a shorter or another file of the same name, the next
  attempt begins with its first step. Where a log goes back, as after a resume from a checkpoint, the next attempt
  begins there. A source that goes back more than 20 times is no log: its rows are sorted by step.
- **Follow**: a row is durable about a second after it was written. A missing source is waited for; a torn line, a file
  that is being rewritten, rotation and new event files are understood; a broken line costs that line. The newest step
  waits for one look (`--every`, 0.3 s), as its values may come in several rows. Values that come after that are added
  as long as no later step has come, else left out with an event. Where one process logs a step behind another, as
  prime-rl's do into one file, a step waits for every known series that has come in nearly all steps, for 8 steps or 10
  minutes at most; the first two steps are recorded without. Ctrl-C and SIGTERM end it with exit code 0.
- **Status**: running while it is followed, and stalled if no row comes ([store.md](store.md)); stopped when following
  was ended; finished after an import once, whatever became of the trainer: files do not tell that.
- **Times** are the source's where it has wall times (TensorBoard, W&B, prime-rl, a column `_timestamp`), else those of
  the import. Alerts carry the same.
- **Rollouts**: `--rollouts FOLDER` holds a file for each step, `N.jsonl` or `N.parquet`, with a row for each rollout
  (verl's; or `prompt`, `completion`, `reward`, `correct`, `advantage`, `group`, and lists `token_id`, `logprob`,
  `entropy`, `deviation`, `weight`, `token_texts`) or for each token (`sample`, `position`, the same names as single
  values, `text`); or `step_N/rank_R.jsonl` of prime-rl's token export. What is absent stays absent. Rollouts of one
  group, uid or prompt are a group. A followed step waits up to 5 s for its rollouts. The reader of verl's dumps is
  tested on what verl's own code wrote; prime-rl's forms were read in its source and not run.
- **Traces of prime-rl's file monitor**: a step's rollouts are the traces that its batch took (`ship`), one for each
  branch; those that no batch took, and agents that are not trained, are left out. Messages, weighted reward, group,
  advantage, truncation, and of the tokens that the policy sampled the sampler's log-probabilities; where the trainer
  has told its own of a whole branch, these and the entropies. Compressed chunks are read too. A followed step waits
  for its batch, and up to 10 minutes for the trainer if that told of other batches.
- **Dumps of slime and miles**: FOLDER is that of `--dump-details`, or of `--save-debug-rollout-data` and
  `--save-debug-train-data` whose files are called `{rollout_id}.pt`, a word and `_` before it or not. Needs torch. The
  files are pickles, and a pickle can run code: torch reads them with `weights_only=True`, which makes numbers, texts,
  lists, tensors and arrays and refuses all else; a file that asks for more is named, and nothing of it is run. Of a
  rollout: texts, reward (one of several parts only as the trainer chose it, in slime's newer dumps), truncation, group,
  and of the tokens that its loss mask selects the sampler's log-probabilities. The trainer's dump replaces these by its
  own, and adds entropies and an advantage that all tokens share; it is joined by position or `index`, so not where
  several samples have one index. Left out: evaluations, which do not tell of which data set they are, and parts of
  context-parallel groups in older dumps. A followed step waits up to 10 minutes for `train_data`, once that folder is
  there. N is looked for under the log's step N, which is the rollout's number where a rollout has one update. All of
  these forms were read in the source of both; tests make such files, but neither trainer was run.

## Files of other trainers and trackers

`rlvr check SOURCE` judges a run that was recorded elsewhere and writes nothing. It reads the same files:

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

### Columns

- A column named by a key of [metrics.md](metrics.md), `eval/<split>/<name>` included, or by an alias below is used. The
  prefix `train/` is taken off where a known name is left. Tails are never guessed: `loss/entropy_bonus` is no entropy.
- A column called exactly as the key goes before an alias. Of one trainer's aliases for a key the upper one is used.
  Other pairs are an error that names both; `--map KEY=COLUMN` chooses, and goes before everything.
- The step is the first of STEPS. An epoch is no step. Without one, `--map step=COLUMN`.
- Rows of a step are put together, so evaluations may be logged apart. An empty field is a missing value; `nan` and
  `inf` are broken ones. verl's file logger writes both as null: there they are missing.
- A record at the end that is still being written is left out, so the file of a live run can be judged.

### Aliases

Names stand here only if they mean what metrics.md says, in its unit. `{split}` is a data set's name (`/` in it becomes
`_`), `{k}` and `{n}` are numbers. Rewards of evaluations and means over both sides of the clip have no key: they stay
unmapped. verl's `best@k` is drawn by bootstrap and a little below pass@k; OpenRLHF's `pass` is of rewards of 0 and 1.
"""

LOGGERS = """## Code that logs to W&B

Unchanged, by a command in front of it. `import wandb` in it and in its children then finds a module of ours: it needs
no account and sends nothing. With `--real` the real wandb works as ever, and what it is given is recorded here too:

```sh
rlvr tap -- python train.py
rlvr tap --real --store runs --run tracked -- python train.py
```

Or by one changed import:

```python
import rlvr_monitor.wandb as wandb

wandb.init(project="maths", name="tracked", config={"lr": 1e-6})
for step in range(1, 31):
    scalars = {"actor/entropy": 0.8 / step, "critic/score/mean": 0.02 * step, "my/own": 3.0}
    wandb.log(scalars, step=step)
wandb.finish()
```

Tests run it with the loggers of transformers 5.23, TRL 1.16, verl 0.9.1 and OpenRLHF 0.11.2.

- **Recorded**: numbers, under the keys that [metrics.md](metrics.md) and the [aliases](#aliases) give their names; any
  other name as it is, nested dicts joined by dots. A `Table` with a column of completions and one of prompts or rewards
  becomes samples, a `Histogram` of values under a key with cells a histogram. Our alert rules judge it live.
- **Step**: `step=`, else a column that `define_metric` names as a step, else `step`, `global_step`,
  `train/global_step`, `training/global_step`, `eval/global_step`, or a column of steps in a table; else the count of
  rows, as W&B counts them. A row without any belongs to the step before it. A step is recorded when the next one
  begins, or after 2 s without more of it.
- **Run**: in the store RLVR_STORE, else `runs`; called `name`, WANDB_NAME, `id`, or the project and a random ending. A
  name that is there gets -2. `resume` with an `id` that was recorded here goes on with that run. The configuration is
  that of the first row; later changes are events `config`.
- **Events**: `wandb.alert`, what was put into `summary` by hand, and once each what is left out: texts, images,
  artifacts, `watch`, `plot`, `Api`, and whatever else W&B does. Modes: `disabled` records nothing, all others the same.
- A run without `finish` ends with its process: finished, failed after an uncaught exception, stopped after Ctrl-C.
- `rlvr tap` passes signals and exit codes on, for it becomes the command. Python started with `-I` or `-E` does not
  look at PYTHONPATH, so it stays untapped. Where recording cannot start, the command goes on and a line says so.

## verl

Installed beside verl means available:

```sh
python -m verl.trainer.main_ppo CONFIG trainer.logger='["console","rlvr"]' \\
  +trainer.rlvr.store=runs +trainer.rlvr.run=mine
```

- **Options** under `trainer.rlvr`, all optional: `store` (else RLVR_STORE, else `runs`), `run` (else the experiment's
  name, with -2 if it is there), `resume=true` to go on with that run, `alerts` (a file, or false), `correct_at` (1.0),
  `weighting` (e.g. `top_entropy:keep=0.2`).
- **Recorded**: every scalar, by alias or under its own name; configuration, model, alerts live. Of the batch that the
  metrics are of: token ids, log-probabilities, entropies, advantages, sampler log-probabilities, scores, prompts and
  completions, so histograms of entropy and surprisal, Cov(ln p, A), mismatch, samples, and figures of groups by `uid`.
  What is measured from tokens goes before verl's own figure of the same key.
- **Not**: deviation, H2, and what needs them (regimes, predicted entropy changes, selections): they need the logits of
  whole groups, which verl's workers never hand out.
- **Weightings**: of [method.md](method.md) `top_entropy`, `random`, `random_undecided`, `stapo`, `rsi`, `stare`,
  `advantage_reweight` and `clip_cov`, for the policy losses vanilla, cispo and gpg and every `loss_agg_mode`; others
  are refused before training, as are all in bypass mode. Each token's advantage is multiplied while the actor is
  updated, and is as it was in metrics and records. Tests hold verl's own losses and gradients to a float64 formula.
  Not equal to ours: verl's KL loss, entropy bonus and clip figures count every token; with several mini-batches
  `token-mean` divides by the tokens of each, where a weight counts by its mean over the rollout batch.
- **Where**: `RayPPOTrainer`, and the v1 `PPOTrainer` before it clears its TransferQueue; of other trainers of verl the
  scalars. In bypass mode verl has no log-probabilities of its own and no entropies.
- Tests run verl 0.9.1's own plugin loader, Tracking, DataProto, policy losses, metrics and TransferQueue on a CPU;
  its workers were not run. What fails is an event `verl_error`, and training goes on. VERL_USE_EXTERNAL_PLUGINS=none
  keeps verl from loading it.

## slime and miles

```sh
python train.py ARGUMENTS --custom-config-path rlvr.yaml \\
  --custom-rollout-log-function-path rlvr_monitor.slime.log_rollout_data \\
  --custom-eval-rollout-log-function-path rlvr_monitor.slime.log_eval_rollout_data
```

with `rlvr.yaml`, in which all lines are optional:

```yaml
rlvr_store: /data/runs    # else RLVR_STORE, else runs; a relative one is looked for where Ray started the process
rlvr_run: mine            # else wandb_group, else slime; with -2 if it is there
rlvr_alerts: alerts.toml  # else the default rules; false: none
rlvr_correct_at: 1.0      # a rollout whose reward reaches this is correct
```

- **Recorded**: of each rollout step rewards, groups, lengths, truncation, repetition, texts, the extra metrics under
  their own names, and of the tokens that the loss mask selects the sampler's log-probabilities, where every rollout has
  them; of evaluations pass@1 at `rlvr_correct_at`, pass@k where each prompt has k rollouts, length and truncation.
  Alerts live. Steps are numbered as in the trainer's own log. The trainer's arguments are the run's configuration.
- **Not**: what the trainer computes afterwards, as entropy, loss and gradient norm, which these functions do not get:
  follow its TensorBoard files and dumps by [`rlvr import`](#rlvr-import), as another run, or use `rlvr tap`.
- **Cost**: the functions are called between sampling and training. A million response tokens took 2.1 s on one core.
- **Run**: a training that goes on from a checkpoint goes on with the run of its name. The last rollout step, or the
  last evaluation, ends the run, as Ray ends the process without a word.
- **What fails** never ends training: it is an event `slime_error`, and of that step the scalars alone are recorded.
  Where the run cannot be opened, a warning says so. Both functions return False: the trainer's own log goes on.
- Their signature, and that True would switch the own log off, were read in the source of both; tests call them as that
  does. Neither trainer was run.

"""


def page() -> str:
    """The text of docs/integrations.md."""
    before, files = HEAD.split("## Files of other trainers", 1)
    text = f"{before}{LOGGERS}## Files of other trainers{files}"
    lines = [text.replace("STEPS", ", ".join(f"`{name}`" for name in STEP_COLUMNS))]
    for trainer, aliases in ALIASES.items():
        lines += [f"#### {trainer}", "", "| column | key |", "|---|---|"]
        for alias in aliases:
            beside = f" (beside `{alias.beside}`)" if alias.beside else ""
            lines.append(f"| `{alias.column}`{beside} | `{alias.key}` |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (Path(__file__).parent / "integrations.md").write_text(page())
