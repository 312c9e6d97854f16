"""What a terminal shows of a run's texts: square brackets and colons are no markup of rich."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.cli import main

REASON = "[/red] [link=http://a.example]here[/link] [bold]loud :smile:"
BROKEN = f"def broken(**columns):\n    raise ValueError({REASON!r})\n"
SMALL = (
    "--steps 1 --rollout.prompts 2 --rollout.group-size 2 --rollout.max-new-tokens 4 --eval.every 0 "
    "--weighting.warmup-steps 0 --run r --reward hostile_reward:broken"
).split()


def test_a_failed_run_tells_its_reason_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "hostile_reward.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", *SMALL]) == 1
    assert f"raised ValueError: {REASON}." in capsys.readouterr().err
    assert main(["show", "r"]) == 0
    assert REASON in capsys.readouterr().out.replace("\n", "")
