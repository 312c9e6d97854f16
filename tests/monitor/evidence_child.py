"""Records the steps up to an alert's first, with thinned tokens, then waits to be killed, or dies before the commit."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from store_data import Scripted, samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store import segments

store, last, dies = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "before-commit"
write = segments.write_segment


def write_or_die(
    con: Any, root: Any, run: str, table: str, rows: Any, key: tuple[int, int, int, int], **more: Any
) -> Any:
    if dies and table == "steps" and key[3] == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(con, root, run, table, rows, key, **more)


segments.write_segment = write_or_die
engine = Scripted({last: [("leak", "pending", "warning")]})
recorder = Recorder(store, RunInfo("a"), engine=engine, tokens_every=1000, flush_s=0.0)
for step in range(1, last + 1):
    recorder.record(step_record(step), tokens(step), samples(step))
    recorder.flush()
print(recorder.acknowledged, flush=True)
time.sleep(60)
