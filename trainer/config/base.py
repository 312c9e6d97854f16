"""What every group of settings shares: it is frozen, refuses unknown names, and reports errors as sentences.

Imports no torch.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from monitor.errors import nearest


class ConfigError(ValueError):
    """A setting cannot work. The message says which one, its value, what was expected and what to do."""


class SettingsGroup(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(" ".join(_readable(detail, type(self)) for detail in error.errors())) from None


def _readable(detail: Any, group: type[BaseModel]) -> str:
    """One of pydantic's findings as a sentence, without its type codes and links."""
    if isinstance(cause := detail.get("ctx", {}).get("error"), ValueError):
        return str(cause)
    name = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"Unknown setting {name!r}.{nearest(str(detail['loc'][-1]), group.model_fields)} See rlvr train --help."
    return f"{name} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}."
