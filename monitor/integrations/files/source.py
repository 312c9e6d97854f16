"""open_reader: which reader a file or folder needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from monitor.errors import MonitorError, nearest
from monitor.integrations.aliases import shortened
from monitor.integrations.files.flat import CsvReader, JsonLinesReader, WholeFileReader, parquet_rows, state_rows
from monitor.integrations.files.reading import Reader
from monitor.integrations.files.tensorboard import MARK, EventsReader
from monitor.integrations.files.wandb import WandbReader

READERS: dict[str, Callable[[Path, bool], Reader]] = {  # by the end of the name; (path, live)
    ".csv": lambda path, live: CsvReader(path, live=live),
    ".jsonl": lambda path, live: JsonLinesReader(path, live=live),
    ".parquet": lambda path, live: WholeFileReader(lambda: path, parquet_rows),
    ".json": lambda path, live: WholeFileReader(lambda: path, state_rows),
    ".wandb": lambda path, live: WandbReader(path, live=live),
}
KINDS = f"{', '.join(READERS)} or a TensorBoard event file"
STATE = "trainer_state.json"


def open_reader(source: str, *, live: bool = False) -> Reader | None:
    """The reader of the file or folder `source`; None for a folder without a file of a known kind.

    live: the source is still being written, so what is incomplete at its end may come later. Raises MonitorError for a
    file of another kind, a missing file, and a folder with several runs; MissingPackageError for what cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(source, path, live)
    if MARK in path.name and path.is_file():
        return EventsReader(lambda: [path])
    if not path.is_file():
        folder = path.parent
        siblings = [p.name for p in folder.iterdir() if p.suffix in READERS] if folder.is_dir() else []
        raise MonitorError(f"No file {source!r}.{nearest(path.name, siblings)}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise MonitorError(f"{source!r} ends in {path.suffix!r}, expected one of {KINDS}. Rename or convert it.")
    return reader(path, live)


def _in_folder(source: str, folder: Path, live: bool) -> Reader | None:
    if _states(folder):
        return _noted(WholeFileReader(lambda: _newest_state(folder), state_rows), _newest_state(folder))
    runs = {path.resolve() for at in ("", "*/") for path in folder.glob(f"{at}run-*.wandb")}  # latest-run is a link
    if runs:
        path = _only(source, sorted(runs))
        return _noted(WandbReader(path, live=live), path)
    homes = {path.parent for path in folder.rglob(f"*{MARK}*") if path.is_file()}
    if homes:
        home = _only(source, sorted(homes))
        reader = EventsReader(lambda: [path for path in home.glob(f"*{MARK}*") if path.is_file()])
        return reader if home == folder else _noted(reader, home)
    return None


def _states(folder: Path) -> list[Path]:
    own = folder / STATE
    return [own] if own.is_file() else list(folder.glob(f"checkpoint-*/{STATE}"))


def _newest_state(folder: Path) -> Path:
    """Each checkpoint holds the history up to it."""
    return max(_states(folder), key=lambda path: (path.stat().st_mtime, path.name))


def _only(source: str, found: Sequence[Path]) -> Path:
    if len(found) > 1:
        raise MonitorError(f"{source!r} holds {len(found)} runs. Name one: {shortened([str(path) for path in found])}")
    return found[0]


def _noted(reader: Reader, path: Path) -> Reader:
    reader.notes.append(f"reads {path}")
    return reader
