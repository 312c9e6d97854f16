"""The alerts file: which rules judge a run, with which thresholds, which routes tell of it, and which actions follow.

Addresses of receivers are secrets. The file names the environment variable or the file that holds one, never the
address itself, so that it can be shared, committed and recorded with a run.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from monitor.alerts.actions import ACTIONS, DEFAULT_ACTIONS, Action, AlertFilter
from monitor.alerts.rules import DEFAULT_RULES, RULES, Rule
from monitor.errors import MonitorError, nearest
from monitor.records import Alert, Severity

STATUS_RULES = ("stalled", "crashed")  # what `rlvr watch` says of a run's heartbeat, called like rules in routes


class AlertsError(MonitorError):
    """An alerts file, or an address that it names, that cannot be used."""


class Route(AlertFilter):
    """One receiver and the alerts that it wants. Exactly one of url_env and url_file says where its address is."""

    url_env: str | None = Field(None, min_length=1, description="environment variable that holds the address")
    url_file: str | None = Field(None, min_length=1, description="file whose first line is the address")
    runs: tuple[str, ...] = Field(("*",), min_length=1, description="names or patterns of wanted runs")
    states: tuple[Literal["firing", "resolved"], ...] = Field(
        ("firing", "resolved"), min_length=1, description="wanted transitions"
    )

    @field_validator("url_env", "url_file")
    @classmethod
    def _no_address(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError("it holds an address, expected the name of what holds it")
        return value

    @classmethod
    def known_rules(cls) -> list[str]:
        return [*RULES, *STATUS_RULES]

    @model_validator(mode="after")
    def _one_source(self) -> Route:
        if (self.url_env is None) == (self.url_file is None):
            raise ValueError("expected exactly one of url_env (a variable) and url_file (a file)")
        return self

    @property
    def source(self) -> str:
        """Where the address is, e.g. "$RLVR_ALERTS_URL" or "~/.config/rlvr/slack.url": what messages call the route."""
        return f"${self.url_env}" if self.url_env else str(self.url_file)

    def wants(self, run: str, alert: Alert) -> bool:
        named = any(fnmatchcase(run, pattern) for pattern in self.runs)
        return named and alert.state in self.states and self.wants_alert(alert)

    def address(self) -> str:
        """The secret. Raises AlertsError if it is not there."""
        if self.url_env:
            found = os.environ.get(self.url_env, "").strip()
            if not found:
                raise AlertsError(f"The environment variable {self.url_env} of a route is not set. Export the address.")
            return found
        path = Path(str(self.url_file)).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise AlertsError(f"The file {self.url_file!r} of a route cannot be read: {why}.") from None
        if not lines:
            raise AlertsError(f"The file {self.url_file!r} of a route is empty. Write the address into its first line.")
        return lines[0]


@dataclass(frozen=True, slots=True)
class AlertSettings:
    """What an alerts file says. Without a file: the default rules, no route, and a checkpoint when an alert fires."""

    rules: tuple[Rule, ...] = DEFAULT_RULES
    routes: tuple[Route, ...] = ()
    actions: tuple[Action, ...] = DEFAULT_ACTIONS


def load_alerts(path: str | Path) -> AlertSettings:
    """Read and check an alerts file; addresses are not looked at yet. Raises AlertsError.

    Example: load_alerts("alerts.toml").rules
    """
    where = Path(path).expanduser()
    try:
        found = tomllib.loads(where.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise AlertsError(f"Cannot read the alerts file {str(path)!r}: {why}. Expected a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise AlertsError(f"{str(path)!r} is not valid TOML: {error}.") from None
    sections = ("rules", "routes", "actions")
    for name in found.keys() - set(sections):
        raise AlertsError(f"{str(path)!r}: unknown section {name!r}.{nearest(name, sections)}")
    try:
        actions = _actions(found["actions"]) if "actions" in found else DEFAULT_ACTIONS
        return AlertSettings(_rules(found.get("rules", {})), _routes(found.get("routes", [])), actions)
    except AlertsError as error:
        raise AlertsError(f"{str(path)!r}: {error}") from None


def _rules(sections: Any) -> tuple[Rule, ...]:
    """The default rules, those that have a section with its values."""
    if not isinstance(sections, Mapping):
        raise AlertsError("rules must be sections, e.g. [rules.entropy_collapse].")
    for name, section in sections.items():
        if name not in RULES:
            raise AlertsError(f"unknown rule {name!r}.{nearest(name, RULES)} Rules: {', '.join(RULES)}.")
        if not isinstance(section, Mapping):
            raise AlertsError(f"rules.{name} must be a section, e.g. [rules.{name}] with enabled = false below it.")
    return tuple(
        _checked(RULES[rule.name], sections.get(rule.name, {}), f"rules.{rule.name}") for rule in DEFAULT_RULES
    )


def _routes(sections: Any) -> tuple[Route, ...]:
    _check_list(sections, "routes")
    for number, section in enumerate(sections, 1):
        if "url" in section:
            raise AlertsError(
                f"routes {number}: url is not taken, because an address is a secret and this file is not. Put the "
                "address into an environment variable and name it: url_env = 'RLVR_ALERTS_URL', or into a file that "
                "only you can read: url_file = '~/.config/rlvr/alerts.url'."
            )
    return tuple(_checked(Route, section, f"routes {number}") for number, section in enumerate(sections, 1))


def _actions(sections: Any) -> tuple[Action, ...]:
    _check_list(sections, "actions")
    return tuple(_action(section, f"actions {number}") for number, section in enumerate(sections, 1))


def _action(section: Mapping[str, Any], where: str) -> Action:
    do = section.get("do")
    if do not in ACTIONS:
        raise AlertsError(f"{where}: do is {do!r}.{nearest(str(do), ACTIONS)} Expected one of {', '.join(ACTIONS)}.")
    return cast(Action, _checked(ACTIONS[do], section, where))


def _check_list(sections: Any, name: str) -> None:
    if not isinstance(sections, list) or not all(isinstance(section, Mapping) for section in sections):
        raise AlertsError(f"{name} must be sections, each under its own [[{name}]].")


def _checked(model: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """An instance of a model. Raises AlertsError, which never shows the values of a route: one may be an address."""
    try:
        return model(**values)
    except ValidationError as error:
        shows = not issubclass(model, Route)
        raise AlertsError(" ".join(_sentences(error, model, where, shows))) from None


def _sentences(error: ValidationError, model: type[BaseModel], where: str, shows: bool) -> Iterable[str]:
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0]) if detail["loc"] else ""
        field = f"{where}: {name}" if name else where
        if detail["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            yield f"{where}: unknown setting {name!r}.{nearest(name, model.model_fields)} Settings: {known}."
        elif isinstance(cause := detail.get("ctx", {}).get("error"), ValueError):
            yield f"{field}: {cause}."
        else:
            value = f" is {detail['input']!r}:" if shows else ":"
            hint = ""
            if detail["type"] == "literal_error" and name in ("severities", "worst"):
                hint = nearest(str(detail["input"]), get_args(Severity))
            yield f"{field}{value} {detail['msg'][0].lower()}{detail['msg'][1:]}.{hint}"
