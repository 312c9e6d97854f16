"""The Method page: its figures by hand, and its words where a run has nothing for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simulated
from test_browser import PATIENCE_S, opened, until
from test_pages import open_page, words

from dashboard import data
from dashboard.figures.distributions import cell_borders
from dashboard.figures.method import along_response, elbow, elbow_curve, pearson, predicted_against_true
from dashboard.figures.theme import LIGHT
from monitor.metrics import n_cells
from monitor.recorder import Recorder
from monitor.records import RunInfo, StepRecord
from monitor.store.reader import open_store


def counts(**of_cells: int) -> np.ndarray:
    made = np.zeros(n_cells("deviation96"), np.int64)
    for cell, n in of_cells.items():
        made[int(cell.removeprefix("c"))] = n
    return made


def test_the_elbow_by_hand() -> None:
    share, deviation, held = elbow_curve(counts(c0=70, c50=20, c90=10))
    borders = cell_borders("deviation96")
    low, high = (float(np.sqrt(borders[cell] * borders[cell + 1])) for cell in (50, 90))
    np.testing.assert_allclose(share, [0, 0.1, 0.3, 1])
    np.testing.assert_allclose(deviation, [high, high, low, 0])
    total = 10 * high + 20 * low
    np.testing.assert_allclose(held, [0, 10 * high / total, 1, 1])
    assert elbow_curve(counts(c0=5))[2].tolist() == [0, 0]  # nothing deviates


def test_the_elbow_says_what_is_kept() -> None:
    fig = elbow(LIGHT, counts(c0=70, c50=20, c90=10), 0.1, "#123456")
    held = elbow_curve(counts(c0=70, c50=20, c90=10))[2][1]
    assert fig.layout.annotations[0].text == f" kept 10% of the tokens, {held:.0%} of the deviation"
    assert not elbow(LIGHT, counts(c0=70, c90=10), 1.0, "#123456").layout.annotations  # uniform keeps all
    assert not elbow(LIGHT, counts(c0=70, c90=10), float("nan"), "#123456").layout.annotations


def test_predicted_against_true_tells_correlation_and_error() -> None:
    predicted, true = np.array([-1.0, 0.0, 1.0, 2.0]), np.array([-1.0, 0.5, 0.5, 2.0])
    fig = predicted_against_true(LIGHT, np.arange(4), predicted, true, "#123456")
    # errors 0, .5, .5, 0: mean .25
    r = np.corrcoef(predicted, true)[0, 1]
    assert fig.layout.title.subtitle.text == f"r {r:.2f}, mean error 0.25 nats"
    assert np.isnan(pearson(np.ones(5), np.arange(5.0))) and np.isnan(pearson(np.arange(2.0), np.arange(2.0)))


def test_entropy_along_the_response_is_the_mean_of_its_tokens(monkeypatch, store: Path) -> None:
    with open_store(store) as opened_store:
        rows = opened_store.sql(
            "SELECT 10 * position // n_tokens AS tenth, correct, entropy FROM tokens JOIN samples "
            "USING (run, step, rank, sample) WHERE run = 'ict-s0' AND step = 40"
        ).frame()
    profile = _profile(monkeypatch, store)
    for tenth, correct, n, entropy in zip(*(profile[key] for key in ("tenth", "correct", "n", "entropy")), strict=True):
        mine = rows["entropy"][(rows["tenth"] == tenth) & (rows["correct"] == correct)].astype(np.float64)
        assert n == len(mine) and entropy == pytest.approx(mine.mean())
    assert profile["n"].sum() == len(rows["tenth"])
    fig = along_response(LIGHT, profile, 40, "#123456")
    assert [trace.name for trace in fig.data] == ["correct", "incorrect"] and fig.data[0].x.tolist()[0] == 1


def _profile(monkeypatch, store: Path) -> dict[str, np.ndarray]:
    open_page(monkeypatch, store, "method", run="ict-s0")
    return data.profile("ict-s0", 40)


def test_each_chart_stands_beside_how_to_read_it(browser, url: str) -> None:
    with opened(browser, f"{url}/method?run=ict-s0") as page:
        for title in ("Sorted deviations", "Entropy, selected against all", "Entropy along the response, step 40"):
            page.locator(f".rlvr-plot[aria-label='{title}']").wait_for(timeout=PATIENCE_S * 1000, state="attached")
        for told in ("How unequal the deviations are.", "What gets selected.", "Where in the response."):
            assert page.get_by_text(told).count() == 1
        page.get_by_role("link", name="Which tokens it selects").click()
        until(page, lambda: "view=selected" in page.url and "run=ict-s0" in page.url)
        page.get_by_text("Selected more than others").wait_for(timeout=PATIENCE_S * 1000)


def test_a_run_of_scalars_alone_says_what_is_missing(monkeypatch, tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo(name="scalars")) as recorder:
        recorder.record(StepRecord(1, {"entropy": 0.5, "reward": 0.5}))
    assert "no deviations, no regimes and no probe" in words(open_page(monkeypatch, tmp_path, "method", run="scalars"))


def test_a_probe_and_regimes_are_drawn(monkeypatch, tmp_path: Path) -> None:
    with Recorder(tmp_path, simulated.info("probed", "ict", 0, 6)) as recorder:
        for step in range(1, 7):
            scalars = {"probe_predicted_change": -0.01 * step, "probe_true_change": -0.01 * step + 0.001,
                       "regime_h_share": 0.7, "regime_h_share_positive": 0.8}  # fmt: skip
            recorder.record(StepRecord(step, scalars))
    shown = words(open_page(monkeypatch, tmp_path, "method", run="probed"))
    assert "Does the theory hold here?" in shown and "Which updates lower the entropy." in shown
