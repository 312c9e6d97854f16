"""The alerts file: what it changes, and what it refuses with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.alerts import DEFAULT_RULES
from monitor.alerts.settings import AlertsError, AlertSettings, Route, load_alerts
from monitor.records import Alert

SECRET = "https://hooks.example.com/T0/B0/very-secret"


def load(tmp_path: Path, text: str) -> AlertSettings:
    (tmp_path / "alerts.toml").write_text(text)
    return load_alerts(tmp_path / "alerts.toml")


def alert(rule: str = "entropy_collapse", severity: str = "warning", state: str = "firing") -> Alert:
    return Alert(rule, severity, state, 30, 28, 0.1, 1.0, 0.3, "Entropy fell.")  # type: ignore[arg-type]


def test_a_section_changes_one_rule_and_leaves_the_others(tmp_path: Path) -> None:
    text = '[rules.entropy_collapse]\nshare = 0.25\nworst = "warning"\nfor_rows = 4\ncooldown_steps = 50\n'
    rules = {rule.name: rule for rule in load(tmp_path, text).rules}
    changed = rules["entropy_collapse"]
    assert (changed.share, changed.worst, changed.for_rows, changed.cooldown_steps) == (0.25, "warning", 4, 50)
    assert [rules[rule.name] for rule in DEFAULT_RULES[1:]] == list(DEFAULT_RULES[1:])
    assert load(tmp_path, "") == AlertSettings()


def test_a_route_says_what_it_wants(tmp_path: Path) -> None:
    text = (
        '[[routes]]\nurl_env = "U"\n[[routes]]\nurl_file = "~/u"\nrules = ["crashed", "entropy_*"]\nruns = ["big-*"]\n'
    )
    first, second = load(tmp_path, text).routes
    assert (first.source, second.source) == ("$U", "~/u")
    assert first.wants("a", alert()) and not first.wants("a", alert(severity="info"))
    assert not first.wants("a", alert(state="pending")) and first.wants("a", alert(state="resolved"))
    assert second.wants("big-1", alert()) and not second.wants("a", alert())
    assert not second.wants("big-1", alert("stalled"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rules.entropy_colapse]\n", "unknown rule 'entropy_colapse'. Did you mean 'entropy_collapse'?"),
        ("[rules.entropy_collapse]\nshar = 0.2\n", "unknown setting 'shar'. Did you mean 'share'?"),
        ("[rules.entropy_collapse]\nshare = 2\n", "rules.entropy_collapse: share is 2: input should be less than 1."),
        ('[rules.entropy_collapse]\nworst = "critcal"\n', "Did you mean 'critical'?"),
        ("[rules]\nentropy_collapse = 3\n", "rules.entropy_collapse must be a section"),
        ("[rule.x]\n", "unknown section 'rule'. Did you mean 'rules'?"),
        ("[[routes]]\n", "routes 1: expected exactly one of url_env (a variable) and url_file (a file)."),
        ('[[routes]]\nurl_env = "U"\nseverities = ["warn"]\n', "Did you mean 'warning'?"),
        ('[[routes]]\nurl_env = "U"\nrules = ["crash"]\n', "no rule is called 'crash'. Did you mean 'crashed'?"),
        ('[[routes]]\nurl_env = "U"\nrun = ["a"]\n', "unknown setting 'run'. Did you mean 'runs'?"),
        ("routes = 1\n", "routes must be sections, each under its own [[routes]]."),
        ("[rules\n", "is not valid TOML"),
    ],
)
def test_what_it_refuses(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AlertsError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["url", "urls", "url_env", "url_file", "severities"])
def test_an_address_in_the_file_is_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    with pytest.raises(AlertsError) as caught:
        load(tmp_path, f'[[routes]]\n{key} = "{SECRET}"\n')
    assert "very-secret" not in str(caught.value)
    if key == "url":
        assert "because an address is a secret and this file is not" in str(caught.value)


def test_an_address_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(AlertsError, match="The environment variable NOT_SET of a route is not set"):
        Route(url_env="NOT_SET").address()
    with pytest.raises(AlertsError, match="cannot be read: No such file"):
        Route(url_file=str(tmp_path / "none")).address()
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(AlertsError, match="is empty"):
        Route(url_file=str(tmp_path / "empty")).address()
    (tmp_path / "url").write_text(f"{SECRET}\n")
    assert Route(url_file=str(tmp_path / "url")).address() == SECRET
    with pytest.raises(AlertsError, match=r"Cannot read the alerts file .*none.toml'"):
        load_alerts(tmp_path / "none.toml")


def test_the_example_of_the_page_is_an_alerts_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/notifications.md").read_text()
    example = load(tmp_path, page.split("```toml\n")[1].split("```")[0])
    rules = {rule.name: rule for rule in example.rules}
    assert (rules["entropy_collapse"].share, rules["entropy_explosion"].enabled) == (0.25, False)  # type: ignore
    assert example.routes == (Route(url_env="RLVR_ALERTS_URL"),)
