"""Replay: the Run page of an ended run as it stood after a step, standing still or playing. It is all in the URL.

replay=STEP shows the page after that step, play=on lets it go on, speed=N by N steps a second. Every answer of
`dashboard.data` ends at that step (`data.show_until`), so the page is made by the same code as that of a live run, and
while it plays its curves grow as those of a live run do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import streamlit as st

from dashboard import data
from dashboard.escape import markdown
from dashboard.views import shared
from monitor.store.tail import RunEntry

SPEEDS = (1, 2, 5, 10, 25, 50, 100)  # steps a second
PARAMETERS = ("replay", "play", "speed")  # of the URL
PLAYED_S = 30.0  # how long a whole run is to take unless the reader chooses another speed


@dataclass(frozen=True, slots=True)
class Tape:
    """Where a replay stands. take: of the reader's jumps, plays and pauses the number; clock: when it began to play.

    step: where it stood then, or stands; last: the last step of the run.
    """

    run: str
    step: int
    last: int
    speed: int
    take: int
    clock: float | None = None

    @property
    def now(self) -> int:
        """The step after which the run is shown."""
        played = 0.0 if self.clock is None else self.speed * (time.monotonic() - self.clock)
        return min(self.last, self.step + int(played))

    @property
    def shown(self) -> int:
        """The step that the page shows: the clock goes on while it is made."""
        step = data.until(self.run)
        return self.last if step is None else step

    @property
    def is_over(self) -> bool:
        """Whether the page shows the whole run."""
        return self.shown >= self.last

    @property
    def name(self) -> str:
        """Tells the points of this page from those of the pages before."""
        return f"@{self.shown}.{self.take}"


@dataclass(frozen=True, slots=True)
class Played:
    """How a page follows its tape: as it would follow the run itself."""

    tape: Tape
    live: shared.Follows

    def is_due(self, *, is_new: bool) -> bool:
        """Whether the page must be made anew; as `Live.is_due`, with the tape in the place of the store."""
        step = self.tape.now
        moved = step != data.until(self.tape.run)
        data.show_until(self.tape.run, step)
        return (moved and self.tape.is_over) or self.live.is_due(is_new=moved)

    def send(self) -> None:
        """Send the points up to where the tape is."""
        self.live.send()


def _span(entry: RunEntry) -> tuple[int, int] | None:
    """The first and last step of a run that can be replayed: an ended one with two steps or more."""
    if entry.status not in shared.ENDED:
        return None
    source = data.whole(entry.name)
    first = min((int(source.series(key)[0][0]) for key in source.keys), default=0)
    return (first, source.newest_step) if first < source.newest_step else None


def offer(entry: RunEntry) -> None:
    """The button that begins a replay."""
    span = _span(entry)
    if span is not None and "replay" not in st.query_params:
        st.button("Replay", icon=":material/replay:", on_click=_go_to, args=(span[0], True),
                  help="Shows the page as it stood at each step: verdict, curves, alerts.")  # fmt: skip


def bar(entry: RunEntry) -> Tape | None:
    """The control of a replay; lets this reader see the run as it stood. None where the URL asks for no replay."""
    wanted = st.query_params.get("replay", "")
    span = _span(entry)
    if not wanted or span is None:
        st.session_state.pop("tape", None)
        return None
    first, last = span
    known = [speed for speed in SPEEDS if speed * PLAYED_S >= last - first]
    with st.container(horizontal=True, vertical_alignment="bottom", key="replay"):
        where, speed_at = st.container(width="stretch"), st.container(width=150)
        with speed_at:
            speed = shared.choose(
                st.selectbox, "Speed", "speed", SPEEDS, known[0] if known else SPEEDS[-1],
                format_func=lambda n: f"{n} step{'' if n == 1 else 's'} a second",
            )  # fmt: skip
        tape = _tape(entry.name, wanted, first, last, speed)
        data.show_until(entry.name, tape.now)
        shared.set_parameter("replay", str(tape.shown))
        plays = tape.clock is not None and not tape.is_over
        with where:
            if plays:  # no slider: the browser could send its former place, which would be taken for a jump
                st.progress(
                    (tape.shown - first) / (last - first),
                    markdown("The page after step {} of {}", tape.shown, tape.last),
                )
            else:
                _slider(tape, first)
        if plays:
            st.button("Pause", icon=":material/pause:", on_click=_go_to, args=(None, False))
        else:
            st.button("Play", icon=":material/play_arrow:", on_click=_go_to,
                      args=(first if tape.is_over else tape.shown, True))  # fmt: skip
        st.button("Leave the replay", icon=":material/close:", type="tertiary", on_click=_leave)
    if not plays and tape.clock is not None:
        shared.put_parameter("play", "")
    return tape


def _tape(run: str, wanted: str, first: int, last: int, speed: int) -> Tape:
    """The tape that plays already, or that of the URL."""
    at = min(last, max(first, int(wanted))) if wanted.isascii() and wanted.isdigit() else first
    take, before = st.session_state.get("take", 0), st.session_state.get("tape")
    plays = st.query_params.get("play") == "on"
    if plays and isinstance(before, Tape) and before.clock and (before.run, before.take) == (run, take):
        tape = before if before.speed == speed else Tape(run, before.now, last, speed, take, time.monotonic())
    else:
        tape = Tape(run, at, last, speed, take, time.monotonic() if plays else None)
    st.session_state["tape"] = tape
    return tape


def _slider(tape: Tape, first: int) -> None:
    key = f"replay_at-{st.session_state.get('plays', 0)}"  # one that has stood elsewhere before it played is another
    st.session_state[key] = tape.shown
    st.slider(
        markdown("The page after step {} of {}", tape.shown, tape.last), first, tape.last, key=key,
        on_change=lambda: _go_to(st.session_state[key], False),
    )  # fmt: skip


def _go_to(step: int | None, plays: bool) -> None:
    """Stand at a step, or play from there; None: where the tape is now."""
    tape = st.session_state.get("tape")
    if step is None and isinstance(tape, Tape):
        step = tape.now
    st.session_state["take"] = st.session_state.get("take", 0) + 1
    shared.put_parameter("replay", str(step))
    shared.put_parameter("play", "on" if plays else "")
    if plays:
        st.session_state["plays"] = st.session_state.get("plays", 0) + 1
        shared.put_parameter("updates", "live")


def _leave() -> None:
    for name in PARAMETERS:
        shared.put_parameter(name, "")
