"""Dynamic sampling: which groups give way, how rows of two widths are joined, and a real run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_train import rows, run

from trainer.flow import Rollouts, Scored
from trainer.rollout.replacement import flat_groups, with_groups_replaced

PAD = 9


def made(
    prompts: list[list[int]], responses: list[list[int]], rewards: list[float], name: str
) -> tuple[Rollouts, Scored]:
    """Rollouts of the given token ids; sampler log-probabilities are -1, -2 ... along each response."""
    p, t = max(map(len, prompts)), max(map(len, responses))
    ids = torch.full((len(prompts), p + t), PAD)
    seen, mask = torch.zeros((len(prompts), p + t), dtype=torch.bool), torch.zeros((len(prompts), t), dtype=torch.bool)
    logprobs = torch.zeros(len(prompts), t)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, p - len(prompt) : p + len(response)] = torch.tensor(prompt + response)
        seen[row, p - len(prompt) : p + len(response)] = True
        mask[row, : len(response)] = True
        logprobs[row, : len(response)] = -torch.arange(1.0, len(response) + 1)
    texts = [f"{name}{row}" for row in range(len(prompts))]
    truncated = torch.tensor([len(response) == t for response in responses])
    scored = Scored(texts, texts, responses, rewards, {"task": [*rewards]}, [*rewards])  # type: ignore[arg-type]
    return Rollouts(ids, seen, mask, logprobs, truncated), scored


def test_groups_of_equal_rewards_are_flat() -> None:
    scored = made([[1]] * 6, [[2]] * 6, [1, 1, 0, 1, 0, 0], "a")[1]
    assert flat_groups(scored, 2) == [True, False, True] and flat_groups(scored, 3) == [False, False]


def test_flat_groups_give_way_in_order_and_rows_keep_their_tokens() -> None:
    # groups of two: a0 a1 flat, a2 a3 not, a4 a5 flat; of the others b0 b1 flat, b2 b3 not
    first, of_first = made(
        [[1], [1], [1, 2], [1, 2], [3], [3]], [[4], [4, 5], [4], [5], [6], [7]], [1, 1, 0, 1, 0, 0], "a"
    )
    second, of_second = made([[7, 7, 7]] * 2 + [[8]] * 2, [[4]] * 2 + [[1, 2, 3], [5, 6]], [0, 0, 1, 0], "b")
    rollouts, scored = with_groups_replaced(first, of_first, second, of_second, 2, PAD)
    assert scored.completions == ["b2", "b3", "a2", "a3", "a4", "a5"]  # one group was left over
    assert scored.rewards == [1, 0, 0, 1, 0, 0] and scored.given == {"task": [1, 0, 0, 1, 0, 0]}
    assert scored.sampled == [1, 1, 0, 1, 0, 0, 0, 0, 1, 0]
    # prompts of 3 columns, responses of 3
    expected = [[PAD, PAD, 8, 1, 2, 3], [PAD, PAD, 8, 5, 6, PAD], [PAD, 1, 2, 4, PAD, PAD], [PAD, 1, 2, 5, PAD, PAD],
                [PAD, PAD, 3, 6, PAD, PAD], [PAD, PAD, 3, 7, PAD, PAD]]  # fmt: skip
    assert rollouts.input_ids.tolist() == expected
    assert rollouts.attention_mask.tolist() == [[token != PAD for token in row] for row in expected]
    assert rollouts.mask.tolist() == [[token != PAD for token in row[3:]] for row in expected]
    assert rollouts.sampler_logprobs[0].tolist() == [-1, -2, -3] and rollouts.sampler_logprobs[2].tolist() == [-1, 0, 0]
    assert rollouts.truncated.tolist() == [True, False, False, False, False, False]
    assert rollouts.token_ids.tolist() == [row[3:] for row in expected]


@pytest.mark.parametrize("extra", [0, 8])
def test_a_run_replaces_groups_and_records_what_it_cost(tmp_path, extra: int) -> None:
    options = ["--run", "d", "--steps", "3", "--weighting.kind", "uniform", "--eval.every", "0", "--seed", "3"]
    assert run(tmp_path, *options, "--rollout.extra-rounds", str(extra)) == 0
    series = {
        name: np.array(
            [value for (value,) in rows(tmp_path, f"SELECT value FROM steps WHERE name = '{name}' ORDER BY step")]
        )
        for name in ("zero_variance_share", "sampling_rounds", "reward_sampled", "reward")
    }
    groups = rows(tmp_path, "SELECT step, group_id, count(DISTINCT reward), count(*), count(DISTINCT prompt_id) "
                            "FROM samples GROUP BY ALL ORDER BY ALL")  # fmt: skip
    assert all(n == 4 and prompts == 1 for *_, n, prompts in groups)  # whole groups of one prompt
    if not extra:
        assert not len(series["sampling_rounds"]) and series["zero_variance_share"].max() > 0
        return
    assert series["zero_variance_share"].tolist() == [0, 0, 0] and all(distinct > 1 for _, _, distinct, *_ in groups)
    assert (series["sampling_rounds"] >= 1).all() and series["sampling_rounds"].max() > 1
    whole = series["sampling_rounds"] == 1
    np.testing.assert_allclose(series["reward_sampled"][whole], series["reward"][whole], rtol=1e-6)
