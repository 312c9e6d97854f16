"""The Tokens page: tokens by a cell of a histogram, by text and by the keyboard, and the words behind a change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import simulated
from test_browser import PATIENCE_S, emit, opened, plot, until
from test_pages import open_page, words

from dashboard.views.tokens import _places
from monitor.metrics import cell_bounds
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.reader import open_store

CELL = 60  # of entropy: .132 to .149 nats


def counted(store: Path, run: str, step: int, cell: int) -> int:
    """The count that the histogram has."""
    with open_store(store) as opened_store:
        sql = (
            "SELECT counts[?] AS n FROM histograms WHERE run = ? AND step = ? AND metric = 'entropy' AND split = 'all'"
        )
        return int(opened_store.sql(sql, [cell + 1, run, step]).frame()["n"][0])


@pytest.mark.parametrize("cell", [0, CELL, 80])
def test_a_cell_has_as_many_tokens_as_its_histogram_says(monkeypatch, store: Path, cell: int) -> None:
    app = open_page(monkeypatch, store, "tokens", run="ict-s0", step="17", cell=f"entropy:{cell}")
    n = counted(store, "ict-s0", 17, cell)
    assert n > 0 and f"**{n:,} token" in words(app) and "of step 17 with entropy" in words(app)


@pytest.mark.parametrize("cell", ["entropy:96000", "entropy:-1", "nothing:3", "entropy", "entropy:x"])
def test_a_cell_that_does_not_exist_is_no_question(monkeypatch, store: Path, cell: str) -> None:
    app = open_page(monkeypatch, store, "tokens", run="ict-s0", step="17", cell=cell)
    assert "of step 17 with" not in words(app) and app.segmented_control


def test_text_is_found_whatever_its_case_and_however_it_is_cut() -> None:
    # "The answer: 42": " ans" and "wer" are two tokens, and "42" begins inside ": 42"
    texts = ["The", " ans", "wer", ": 42", ".", " answer"]
    assert _places(texts, "ANSWER") == [1, 5]
    assert _places(texts, "42") == [3] and _places(texts, "wer: 4") == [2] and _places(texts, "no") == []


def test_a_text_is_found_in_every_rollout_of_the_step(monkeypatch, store: Path) -> None:
    with open_store(store) as opened_store:
        texts = opened_store.sql("SELECT token_texts FROM samples WHERE run = 'ict-s0' AND step = 17").frame()
    n = sum(len(_places(list(one), simulated.EVIL)) for one in texts["token_texts"])
    app = open_page(monkeypatch, store, "tokens", run="ict-s0", step="17", find=simulated.EVIL)
    assert n >= 1 and f"**{n:,} place" in words(app)


def test_the_words_that_are_selected_and_those_that_lost_entropy(monkeypatch, store: Path) -> None:
    app = open_page(monkeypatch, store, "tokens", run="ict-s0", step="17", view="selected")
    # 3 of the tokens of each rollout are selected
    with open_store(store) as opened_store:
        sql = "SELECT count(*) AS n FROM tokens WHERE run = 'ict-s0' AND step = 17 AND weight > 0"
        kept = int(opened_store.sql(sql).frame()["n"][0])
    assert f"the {kept:,} that weigh more than the mean" in words(app) and len(app.dataframe) == 2
    app = open_page(monkeypatch, store, "tokens", run="uniform-s0", step="17", view="selected")
    assert "same weight" in words(app)
    app = open_page(monkeypatch, store, "tokens", run="uniform-s0", step="40", view="lost", since="1")
    sentence = r"went from ([\d.]+) to ([\d.]+) nats between step 1 and step 40.*the loss of ([\d.]+)"
    told = re.search(sentence, words(app))
    before, after, lost = (float(part.rstrip(".")) for part in told.groups())
    assert before - after == pytest.approx(lost, abs=2e-3) and lost > 0
    app = open_page(monkeypatch, store, "tokens", run="uniform-s0", step="1", view="lost")
    assert "first step with tokens" in words(app)


def test_a_click_on_a_cell_leads_to_its_tokens_and_one_of_them_to_its_rollout(browser, store: Path, url: str) -> None:
    with opened(browser, f"{url}/run?run=ict-s0") as page:
        title = "Entropy of tokens"
        until(page, lambda: page.locator(f".rlvr-plot[aria-label='{title}']").count())
        page.locator(f".rlvr-plot[aria-label='{title}']").scroll_into_view_if_needed()
        until(page, lambda: plot(page, title, "p._fullData[0].type") == "heatmap")
        where = f"{{x: 17, pointNumber: [{CELL}, 16], fullData: p._fullData[0]}}"
        emit(page, title, f"'plotly_click', {{points: [{where}]}}")
        page.get_by_role("menuitem", name="Read the tokens of this cell").click(timeout=PATIENCE_S * 1000)
        n = counted(store, "ict-s0", 17, CELL)
        until(page, lambda: page.locator(".rlvr-found button").count() == n)
        assert f"cell=entropy%3A{CELL}" in page.url and "step=17" in page.url
        low, high = (bounds[CELL] for bounds in cell_bounds("nats96"))
        value = float(page.locator(".rlvr-found .rlvr-number").last.inner_text())
        assert low - 5e-4 <= value <= high + 5e-4
        where = page.locator(".rlvr-found .rlvr-where").last.inner_text()
        sample, position = map(int, re.fullmatch(r". rollout (\d+) · (\d+)", where).groups())
        page.locator(".rlvr-found button").last.click()
        until(page, lambda: f"at={sample}%3A{position}" in page.url)
        told = page.locator(".rlvr-values")
        until(page, lambda: f"position {position} of rollout {sample}" in told.inner_text())
        assert "rlvr-lit" in page.locator(".rlvr-tokens .rlvr-at").get_attribute("class")
        shown = float(re.search(r"entropy\s+([\d.]+) nats", told.inner_text()).group(1))
        assert low - 1e-4 <= shown <= high + 1e-4


def test_the_arrow_keys_walk_and_the_focused_token_stands_in_the_address(browser, url: str) -> None:
    with opened(browser, f"{url}/tokens?run=ict-s0&step=9&group=0&at=1:4") as page:
        told = page.locator(".rlvr-values")
        until(page, lambda: told.count() and "position 4 of rollout 1" in told.inner_text())
        for key, where in (("ArrowRight", (5, 1)), ("ArrowDown", (5, 2)), ("Home", (0, 2)), ("ArrowLeft", (0, 2)),
                           ("ArrowUp", (0, 1)), ("End", (simulated.LENGTH - 1, 1))):  # fmt: skip
            page.keyboard.press(key)
            assert "position {} of rollout {}".format(*where) in told.inner_text(), key
        until(page, lambda: f"at=1%3A{simulated.LENGTH - 1}" in page.url)
        kept = page.url
    with opened(browser, kept) as page:
        until(page, lambda: page.locator(".rlvr-at").count() == 1)
        assert f"position {simulated.LENGTH - 1} of rollout 1" in page.locator(".rlvr-values").inner_text()


def test_a_chosen_word_is_looked_for(browser, url: str) -> None:
    with opened(browser, f"{url}/tokens?run=ict-s0&step=9&find={simulated.WORDS[0].strip()}") as page:
        page.wait_for_selector(".rlvr-found button", timeout=PATIENCE_S * 1000)
        assert page.locator(".rlvr-found b").first.inner_text().strip() != ""
        page.get_by_role("button", name="Clear").click()
        until(page, lambda: not page.locator(".rlvr-found button").count() and "find=" not in page.url)


def test_eight_thousand_tokens_are_drawn_within_a_second_of_reaching_the_browser(browser, url: str) -> None:
    """The browser's own work: building, colouring and laying out."""
    with opened(browser, f"{url}/tokens?run=ict-s0&step=9") as page:
        page.wait_for_selector(".rlvr-tokens span", timeout=PATIENCE_S * 1000)
        seconds = page.evaluate(
            """() => {
              const shown = document.querySelector('.rlvr-rollouts').rlvrRollouts, data = structuredClone(shown.data);
              const n = 500;
              data.id = 'large';
              data.rollouts = Array.from({length: 16}, (_, i) => ({...data.rollouts[0], sample: i, kept: n,
                texts: Array.from({length: n}, (_, k) => ' token' + k)}));
              const floats = new Float32Array(16 * n).map((_, i) => (i % 97) / 40);
              const bytes = new Uint8Array(floats.buffer);
              let text = '';
              for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
              for (const key of Object.keys(data.values)) data.values[key] = {dtype: 'f4', bdata: btoa(text)};
              const began = performance.now();
              shown.update(data);
              document.body.offsetHeight;
              return (performance.now() - began) / 1000;
            }"""
        )
        assert page.locator(".rlvr-tokens span").count() == 8000
        print(f"8,000 tokens in {seconds:.2f} s")
        assert seconds < 5, "a busy machine takes a few times the 0.3 s of a quiet one"


def test_steps_of_which_only_the_texts_were_kept_say_where_tokens_are(monkeypatch, tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo(name="thin")) as recorder:
        for number in range(1, 9):
            record, tokens, samples = simulated.step(number, weighting="ict", seed=0, total=8)
            recorder.record(record, tokens if number == 3 else None, samples)
    app = open_page(monkeypatch, tmp_path, "tokens", run="thin", step="6")
    assert "only the texts were kept" in words(app)
    app = open_page(monkeypatch, tmp_path, "tokens", run="thin", step="6", cell=f"entropy:{CELL}")
    assert "Step 6 has no raw tokens; the nearest one is shown" in words(app) and app.select_slider[0].value == 3


def test_the_page_says_which_colours_need_what_the_store_does_not_keep(monkeypatch, tmp_path: Path) -> None:
    with Recorder(tmp_path, RunInfo(name="run")) as recorder:
        for number in (1, 2):
            record, tokens, samples = simulated.step(number, weighting="ict", seed=0, total=2)
            record.scalars["log_ratio_abs"] = 0.25 * number
            if number == 2:
                record.scalars["predicted_entropy_change"] = -0.125
            recorder.record(record, tokens, samples)
    told = words(open_page(monkeypatch, tmp_path, "tokens", run="run", step="1"))
    assert "are no colours" in told and "Of the whole step 1: Mean |log-ratio|: 0.25 nats" in told
    assert "Predicted dH1: not recorded" in told
    told = words(open_page(monkeypatch, tmp_path, "tokens", run="run", step="2"))
    assert "Mean |log-ratio|: 0.5 nats; Predicted dH1: -0.125" in told
