"""What is there for callers, does nothing, and says once that it does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

Tell = Callable[[str], None]


class Nothing:
    """Stands for what is not recorded: may be called, entered, indexed and asked for anything; it is false and empty.

    tell: gets its name when it is used.
    """

    def __init__(self, name: str, tell: Tell) -> None:
        self.__dict__.update(_name=name, _tell=tell)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._tell(self._name)
        # a decorator without arguments must give the function back
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self._name}.{name}", self._tell)

    def __setattr__(self, name: str, value: Any) -> None:
        self._tell(self._name)

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        self._tell(self._name)

    def write(self, data: Any) -> int:
        """As a file that is thrown away."""
        self._tell(self._name)
        return len(data)

    def __repr__(self) -> str:
        return f"<{self._name}: not recorded>"


class Error(Exception):
    """As wandb.Error."""


class CommError(Error):
    """As wandb.CommError."""


class UsageError(Error):
    """As wandb.UsageError: init cannot do what was asked."""


class ConfigError(Error):
    """As wandb's: a key of the configuration has another value already."""


class Settings(dict[str, Any]):
    """As wandb.Settings: holds whatever it is given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def module(name: str, tell: Tell, **known: Any) -> ModuleType:
    """A module that has what is known and Nothing under every other name."""
    made = ModuleType(name)
    made.__dict__.update(known, __path__=[])

    def absent(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        return Nothing(f"{name}.{attribute}", tell)

    made.__dict__["__getattr__"] = absent
    return made
