"""For test_store_locks: opens a run when told to, prints whether it could, and records until its input ends."""

from __future__ import annotations

import os
import sys
import time

from store_data import step_record

from monitor.errors import StoreError
from monitor.recorder import Recorder
from monitor.records import RunInfo

store, run, how = sys.argv[1:4]
print("ready", flush=True)
sys.stdin.readline()
try:
    recorder = Recorder(store, RunInfo(run), resume=how == "resume", flush_s=0.0)
except StoreError as error:
    print(f"refused: {error}", flush=True)
    sys.exit(3)
recorder.record(step_record(1))
recorder.flush()
child = os.fork() if how == "fork" else None
if child == 0:  # shares what was open at the fork, and outlives its parent
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(f"opened {child or ''}", flush=True)
sys.stdin.readline()
recorder.close()
