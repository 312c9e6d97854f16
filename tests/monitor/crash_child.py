"""Records complete steps for ever and prints each acknowledged one, until test_recorder_crash kills it."""

from __future__ import annotations

import sys
import time

from store_data import samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store import background, compact

store, run, resume = sys.argv[1], sys.argv[2], "resume" in sys.argv[3]
if "often" in sys.argv[3]:
    compact.TOGETHER = background.TOGETHER = 4
    background._PAUSE_S = 0.0
fsync = next((policy for policy in ("interval", "none") if policy in sys.argv[3]), "every-step")
recorder = Recorder(store, RunInfo(run), resume=resume, flush_s=0.0, fsync=fsync)
told = None
for step in range(int(sys.argv[4]), 1_000_000):
    recorder.record(step_record(step), tokens(step), samples(step))
    while recorder.queue_depth > 3:
        time.sleep(0.001)
    if recorder.acknowledged != told:
        told = recorder.acknowledged
        print(told, flush=True)
