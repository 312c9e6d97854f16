"""Pages of runs whose tokens lack signals: of a loop or trainer that has log-probabilities alone, or entropies too."""

from __future__ import annotations

import numpy as np
import pytest
from test_pages import open_page

import rlvr_monitor
from dashboard.app import PAGES

torch = pytest.importorskip("torch", reason="Monitor.step needs torch")
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")


@pytest.fixture(scope="module")
def partly_known(tmp_path_factory):
    """Runs "logprobs" and "entropies" of 24 steps, 2 groups of 4 rollouts."""
    path, made = tmp_path_factory.mktemp("partly"), torch.Generator().manual_seed(0)
    for run in ("logprobs", "entropies"):
        with rlvr_monitor.init(store=path, run=run) as monitor:
            for _ in range(24):
                monitor.step(
                    logprobs=-torch.rand(8, 6, generator=made), token_ids=torch.randint(0, 9, (8, 6), generator=made),
                    entropies=torch.rand(8, 6, generator=made) if run == "entropies" else None,
                    mask=torch.ones(8, 6, dtype=torch.bool), group_ids=np.arange(8) // 4,
                    rewards=torch.rand(8, generator=made).round(), texts=["text"] * 8, prompts=["prompt"] * 8,
                )  # fmt: skip
    return path


@pytest.mark.parametrize("run", ["logprobs", "entropies"])
@pytest.mark.parametrize("page", [path for path, *_ in PAGES])
def test_every_page_shows_what_there_is(monkeypatch, partly_known, page, run):
    app = open_page(monkeypatch, partly_known, page, run=run)
    assert not app.error
