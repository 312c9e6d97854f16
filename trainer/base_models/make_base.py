"""Makes the shipped base policies: small Llamas that half-know a built-in task, each failing in its own way.

    python -m trainer.base_models.make_base [chain | chain_small | paths] [--out DIR]

All learn next tokens of random right answers, each after the prompt that it answers.

- chain (0.8 M parameters, model "builtin"): chains (trainer/tasks/chain.py) after the target that they reach; in a
  short second stage 30 % of the targets are unrelated numbers. So the policy computes correctly but follows the target
  only in part: it is right about one time in four, and has much to learn and entropy to lose. Takes about 10 minutes on
  one CPU core.
- chain_small (0.2 M parameters, model "builtin-small"): two narrow layers, stopped early. The policy follows the target
  and fails by wrong sums, which a sparse update can make worse (docs/log.md). Takes about 2 minutes.
- paths (0.5 M parameters, model "builtin-paths"): random walks (trainer/tasks/paths.py) after their start and goal,
  stopped early; in a second stage 40 % of the goals are unrelated cells. The policy half-knows both the grid and the
  goal: of its samples at temperature 1 on held-out prompts 32 % are right, 32 % run into a wall or the edge, 27 % end
  at another cell, and 6 % cross their own path. Takes about 3 minutes.

A policy is an ordinary Hugging Face folder; its tokenizer has one token per character, and ";" ends a sequence.
training.json beside the weights holds the losses. The weights are not bit-reproducible across machines.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.tasks.chain import MAX_STEPS, MIN_STEPS, apply
from trainer.tasks.paths import CELLS, MAX_MOVES, MOVES, STEPS

LOW, HIGH = 10, 150  # targets in the training data of chains; reinforcement learning uses 10 to 99
CONTEXT = 80


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {char: i for i, char in enumerate(["<pad>", "<unk>", *"0123456789+-*=,:;"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token=";", model_max_length=CONTEXT
    )


def random_chain(rng: random.Random) -> tuple[str, str] | None:
    """The target of a random valid chain, and the chain as text; None if the target is out of range."""
    n_steps = rng.choices(range(MIN_STEPS, MAX_STEPS + 1), weights=[75, 15, 7, 3])[0]
    value, parts = rng.randint(1, 9), []
    for _ in range(n_steps):
        op, b = rng.choice("++-*"), rng.randint(1, 9)
        result = apply(op, value, b)
        if not 0 <= result <= 199:
            op = "-" if result > 199 else "+"
            result = apply(op, value, b)
        parts.append(f"{value}{op}{b}={result}")
        value = result
    return (f"{value}", ",".join(parts) + ";") if LOW <= value < HIGH else None


def other_target(rng: random.Random, prompt: str) -> str:
    return f"{rng.randrange(LOW, HIGH)}"


def random_path(rng: random.Random) -> tuple[str, str]:
    """The prompt "start,goal" of a random walk that enters no cell twice, and its moves as text."""
    cells, moves = [rng.choice(CELLS)], ""
    for _ in range(rng.choices(range(1, MAX_MOVES + 1), weights=range(MAX_MOVES, 0, -1))[0]):  # mostly short
        ways = [(move, cell) for move in MOVES if (cell := STEPS.get((cells[-1], move))) and cell not in cells]
        if not ways:
            break
        move, cell = rng.choice(ways)
        moves += move
        cells.append(cell)
    return f"{cells[0]},{cells[-1]}", moves + ";"


def other_goal(rng: random.Random, prompt: str) -> str:
    start, _, _ = prompt.partition(",")
    return f"{start},{rng.choice([cell for cell in CELLS if cell != start])}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape of a policy, its texts, and its steps on texts with their own prompts, then with a share of unrelated ones.

    answer: a random prompt, and a right answer to it. unrelated: another prompt in place of a given one.
    """

    hidden: int
    layers: int
    answer: Callable[[random.Random], tuple[str, str] | None]
    unrelated: Callable[[random.Random, str], str]
    related_steps: int
    unrelated_steps: int
    share: float


RECIPES = {
    "chain": Recipe(128, 4, random_chain, other_target, related_steps=1300, unrelated_steps=200, share=0.3),
    "chain_small": Recipe(96, 2, random_chain, other_target, related_steps=900, unrelated_steps=0, share=0.0),
    "paths": Recipe(96, 4, random_path, other_goal, related_steps=1400, unrelated_steps=200, share=0.4),
}


def build_texts(recipe: Recipe, n: int, seed: int) -> list[str]:
    """n texts "prompt:answer", the prompts uniform over those that occur. Rare prompts repeat their answers."""
    rng = random.Random(seed)
    pairs = [pair for pair in (recipe.answer(rng) for _ in range(3 * n)) if pair is not None]
    count = Counter(prompt for prompt, _ in pairs)
    chosen = rng.choices(pairs, weights=[1 / count[prompt] for prompt, _ in pairs], k=n)
    return [f"{prompt}:{answer}" for prompt, answer in chosen]


def with_unrelated_prompts(recipe: Recipe, texts: list[str], seed: int) -> list[str]:
    """The texts with `recipe.share` of their prompts replaced by unrelated ones."""
    rng = random.Random(seed)
    pairs = [text.split(":") for text in texts]
    return [
        f"{recipe.unrelated(rng, prompt) if rng.random() < recipe.share else prompt}:{answer}"
        for prompt, answer in pairs
    ]


def train(model: Any, tokenizer: Any, texts: list[str], steps: int, lr: float, seed: int) -> list[float]:
    """Next-token prediction with AdamW, batches of 64, one-cycle learning rate; returns the mean loss per 100 steps."""
    torch.manual_seed(seed)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses, begin = [], time.time()
    for step in range(1, steps + 1):
        rows = torch.randint(len(ids), (64,))
        width = int(mask[rows].sum(1).max())
        batch = ids[rows, :width]
        loss = model(input_ids=batch, labels=batch.masked_fill(mask[rows, :width] == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {np.mean(losses[-100:]):.4f} {time.time() - begin:.0f} s", flush=True)
    return np.array(losses[: steps // 100 * 100]).reshape(-1, 100).mean(1).round(4).tolist()


def build_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.hidden * 11 // 4,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="chain", choices=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder; none: the one that ships")
    args = parser.parse_args()
    recipe, out = RECIPES[args.name], args.out or Path(__file__).parent / args.name
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    texts = build_texts(recipe, 200_000, args.seed)
    losses = {"related prompts": train(model, tokenizer, texts, recipe.related_steps, 3e-3, args.seed)}
    if recipe.unrelated_steps:
        texts = with_unrelated_prompts(recipe, build_texts(recipe, 40_000, args.seed + 1), args.seed)
        losses[f"{100 * recipe.share:.0f} % unrelated"] = train(
            model, tokenizer, texts, recipe.unrelated_steps, 1e-3, args.seed
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"seed": args.seed, "loss_by_100_steps": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
