"""Where responses end (template, stop texts, ids), how prompts become conversations, and sampling from a part."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_backends import TEXTS, assert_agree
from test_preflight import draws, mixed
from tiny import tiny_policy

from trainer.base_models.make_base import build_tokenizer
from trainer.commands.preflight import main as preflight
from trainer.commands.train import parse_config
from trainer.config import ConfigError, RolloutConfig, TrainConfig
from trainer.policy.endings import StopStrings, turn_end_id
from trainer.policy.policy import Policy
from trainer.preflight import figures_of, findings, unended_sentence
from trainer.rollout.prompts import encode_prompts, system_prompt
from trainer.rollout.sampling import sample
from trainer.rollout.truncation import Truncation
from trainer.tasks import Prompt, make_task


class ByteLevelTokens:
    """A tokenizer whose tokens are bytes: a, the two of é, and the full stop."""

    def batch_decode(self, rows, **_):
        return [b"".join([b"", b"a", b"\xc3", b"\xa9", b"."][i] for i in row).decode(errors="replace") for row in rows]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_policy(template: str | None = CHATML) -> Policy:
    """The tiny policy with the two tokens of ChatML added, of which its generation config says nothing."""
    policy = tiny_policy(vocabulary=21)
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    policy.tokenizer.chat_template = template
    return policy


def draw(policy, backend="generate", limit=24, seed=0, truncation=Truncation(), temperature=0.9):  # noqa: B008
    prompts = encode_prompts(policy, [Prompt(t, t, "train") for t in TEXTS], None, limit)
    return sample(
        policy, prompts, max_new_tokens=limit, temperature=temperature, backend=backend, truncation=truncation,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def test_the_end_of_a_turn_comes_from_the_template():
    policy = chat_policy()
    end, closing = policy.tokenizer.eos_token_id, policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert policy.end_ids == [end]  # what model and tokenizer say by themselves
    assert policy.converse(RolloutConfig()).end_ids == [end, closing]
    assert chat_policy().converse(RolloutConfig(chat_template="none")).end_ids == [end]
    spoken = chat_policy("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert turn_end_id(spoken.tokenizer) is None  # no special token closes the turn


def test_a_template_decides_the_prompt_and_the_system_message(tmp_path):
    prompt, task = [Prompt("p", "57:", "train")], make_task("chain")
    texts = {}
    (tmp_path / "mine.jinja").write_text("{{ messages[-1]['content'] }}{{ messages[0]['content'] }}")
    for setting in ("model", "none", str(tmp_path / "mine.jinja")):
        config = TrainConfig(rollout={"chat_template": setting, "system_prompt": "9"})
        policy = chat_policy().converse(config.rollout)
        (ids,) = encode_prompts(policy, prompt, system_prompt(config, task), 8)
        texts[setting] = policy.tokenizer.convert_ids_to_tokens(ids)
    own, plain, mine = ("".join(each) for each in texts.values())
    assert own.count("<|im_start|>") == 3 and own.count("<|im_end|>") == 2  # system, user, and the assistant's turn
    assert plain.startswith("9") and plain.endswith("57:") and "<|im" not in plain
    assert mine == "57:9"
    assert system_prompt(TrainConfig(), make_task("reasoning_gym:chain_sum"))  # the task's own
    assert system_prompt(TrainConfig(rollout={"system_prompt": ""}), make_task("reasoning_gym:chain_sum")) is None


def test_a_template_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"chat_template is '.*gone.jinja', which cannot be read: .*Expected model, n"
    ):
        chat_policy().converse(RolloutConfig(chat_template=str(tmp_path / "gone.jinja")))
    with pytest.raises(
        ConfigError, match=r"cannot be rendered: TemplateError: only one turn\. .*chat_template to none"
    ):
        chat_policy("{{ raise_exception('only one turn') }}").converse(RolloutConfig())
    with pytest.raises(ConfigError, match=r"rollout\.stop holds the token id 21, but the model has ids 0 to 20"):
        chat_policy().converse(RolloutConfig(stop=(21,)))


def test_stops_come_from_a_file_and_from_the_command_line_as_texts_and_ids(tmp_path):
    (tmp_path / "c.toml").write_text('[rollout]\nstop = ["<|im_end|>", 7, "12"]\n')
    assert parse_config([str(tmp_path / "c.toml")]).rollout.stop == ("<|im_end|>", 7, "12")
    config = parse_config(["--rollout.stop", "<|im_end|>", "7", "--rollout.top-p", "0.9"])
    assert config.rollout.stop == ("<|im_end|>", 7) and config.rollout.top_p == 0.9
    policy = chat_policy(None).converse(config.rollout)
    assert policy.end_ids == [policy.tokenizer.eos_token_id, 20, 7] and policy.stop_strings is None
    assert TrainConfig.of_run(json.loads(config.model_dump_json())) == config


def test_a_stop_text_is_found_however_tokens_cut_it():
    stops = StopStrings(build_tokenizer(), ["34", "="])
    rows = [build_tokenizer().convert_tokens_to_ids(list(text)) for text in ("13345", "3=434", "44333")]
    # 1 3 3 4 5: "34" is whole at the fourth token; 3 = 4 3 4: "=" comes first, at the second
    assert stops.lengths(rows) == [4, 2, None] and stops.inside(rows) == [True, True, False]
    byte_level = ByteLevelTokens()  # "é" is two tokens, and half of it is no text
    assert StopStrings(byte_level, ["é."]).lengths([[1, 2, 3, 4, 1]]) == [4]


@pytest.mark.parametrize("backend", ["generate", "paged"])
def test_a_response_ends_with_its_stop_text_and_holds_nothing_after_it(backend):
    stop = [a + b for a in "0123456789+-=" for b in "13579+"]
    policy = tiny_policy().converse(RolloutConfig(stop=tuple(stop)))
    rollouts = draw(policy, backend)
    end, stopped = policy.tokenizer.eos_token_id, 0
    for ids, mask, cut in zip(rollouts.token_ids, rollouts.mask, rollouts.truncated, strict=True):
        kept = ids[mask].tolist()
        text = "".join(policy.tokenizer.convert_ids_to_tokens(kept))
        places = [place for each in stop if (place := text.find(each)) >= 0]
        assert not places or len(text) == min(places) + 2  # the first one ends it; characters are tokens here
        stopped += bool(places)
        assert bool(cut) == (not places and kept[-1] != end)
        assert mask[: len(kept)].all() and (ids[~mask] == policy.pad_id).all()
    assert stopped >= 5
    assert_agree(policy, rollouts)  # the log-probabilities of what was kept, and 0 after it


def test_rows_that_stop_early_leave_the_batch(monkeypatch):
    """A stop text frees its row like an end token does."""
    from trainer.rollout import generate

    monkeypatch.setattr(generate, "COMPACT_EVERY", 1)
    monkeypatch.setattr(generate, "_draw", lambda logp, generator: logp[:, 3:6].argmax(-1) + 3)  # no end token
    policy = tiny_policy()
    policy.converse(RolloutConfig(stop=tuple(policy.tokenizer.convert_ids_to_tokens([3, 4, 5]))))
    steps = []
    step = generate.GrowingCache.step
    monkeypatch.setattr(
        generate.GrowingCache, "step", lambda self, token: steps.append(len(token)) or step(self, token)
    )
    rollouts = draw(policy)
    assert steps == [] and rollouts.mask.sum(1).tolist() == [1] * len(TEXTS) and not rollouts.truncated.any()


def test_truncation_by_hand():
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()
    # top_p .7: .5 + .3 is the least above it, Z = .8; four equal ones: three hold .75
    assert Truncation(top_p=0.7)(logp)[0].exp().tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert Truncation(top_p=0.7)(logp)[1].exp().sum() == pytest.approx(1)
    assert sorted(Truncation(top_p=0.7)(logp)[1].exp().tolist()) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert Truncation(top_k=2)(logp).exp().flatten().tolist() == pytest.approx(
        [0.625, 0.375, 0, 0] + [0.25] * 4
    )  # ties
    # min_p .25: at least .125; Z = .95
    assert Truncation(min_p=0.25)(logp)[0].exp().tolist() == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])
    # top_k 3 first: (.5263, .3158, .1579); of these top_p .6 keeps two
    assert Truncation(top_k=3, top_p=0.6)(logp)[0].exp().tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert Truncation(top_p=1e-9)(logp)[0].exp().tolist() == [1, 0, 0, 0]  # one token always stays
    assert Truncation()(logp) is logp and Truncation(top_k=9)(logp).exp()[0].tolist() == pytest.approx(logp[0].exp())


@pytest.mark.parametrize(
    "truncation", [Truncation(3), Truncation(0, 0.8), Truncation(0, 1, 0.2), Truncation(6, 0.9, 0.1)]
)
@pytest.mark.parametrize("backend", ["generate", "paged"])
def test_both_backends_sample_from_the_same_part_and_the_signals_from_the_whole(policy, backend, truncation):
    """ln q of the sampler is that of the trainer's own truncated softmax; the trainer's ln p is lower by ln Z."""
    rollouts = draw(policy, backend, truncation=truncation)
    mask = rollouts.mask
    with torch.no_grad():
        hidden = policy.hidden(rollouts)[mask]
        logp = torch.log_softmax(policy.project(hidden).double() / 0.9, -1)
        logprob, _ = policy.logprobs(hidden, rollouts.token_ids[mask], 0.9)
    logq, ids = truncation(logp), rollouts.token_ids[mask].unsqueeze(1)
    kept = logp.masked_fill(logq.isinf(), -torch.inf).logsumexp(-1)  # ln Z
    assert torch.isfinite(logq.gather(1, ids)).all()  # no token outside the part was drawn
    torch.testing.assert_close(
        rollouts.sampler_logprobs[mask].double(), logq.gather(1, ids).squeeze(1), atol=2e-5, rtol=0
    )
    torch.testing.assert_close(logprob.double() - rollouts.sampler_logprobs[mask], kept, atol=2e-5, rtol=0)
    assert float(kept.exp().mean()) < 0.97


def test_preflight_names_the_tokens_at_which_rollouts_would_have_ended():
    config = TrainConfig(rollout={"max_new_tokens": 512})
    cut = np.ones((4, 16), bool)
    cut[0, :2] = False  # 62 of 64
    given = draws(mixed(0, 0, 4), truncated=cut, unended={"<|im_end|>": 60, "<|im_start|>": 30})
    told = '97% of 64 rollouts were cut at 512 tokens; they contain <|im_end|>: set rollout.stop to ["<|im_end|>"].'
    assert unended_sentence(given, config) == told  # 30 of 62 is under half
    found = findings(figures_of(given, 8), config, told)
    assert [(each.name, each.severity) for each in found] == [("unended", "critical")]
    few = draws(mixed(0, 0, 4), truncated=np.arange(64).reshape(4, 16) < 16, unended={"<|im_end|>": 16})
    assert unended_sentence(few, config) is None  # a quarter is not more than a quarter
    assert unended_sentence(draws(mixed(0, 0, 4), truncated=cut), config) is None


def test_the_command_finds_the_token_of_a_base_policy_and_the_stop_mends_it(tmp_path, capsys):
    policy = chat_policy(None)
    with torch.no_grad():  # tied or not, the head's row of <|im_end|> wins often, and the end token never
        head = policy.model.get_output_embeddings().weight
        head[20], head[policy.tokenizer.eos_token_id] = 3 * head[:19].abs().mean(0), 0
    policy.save(tmp_path / "base")
    options = [
        "--model", str(tmp_path / "base"), "--task", "chain:60-99", "--rollout.max-new-tokens", "12",
        "--rollout.group-size", "4", "--preflight-prompts", "3", "--samples", "4", "--threads", "1",
    ]  # fmt: skip
    assert preflight(options) == 1
    told = capsys.readouterr().out
    assert "of 12 rollouts were cut at 12 tokens; they contain <|im_end|>: set rollout.stop to" in told
    preflight([*options, "--rollout.stop", "<|im_end|>"])
    assert "they contain" not in capsys.readouterr().out
