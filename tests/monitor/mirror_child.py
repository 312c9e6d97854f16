"""For test_mirror_s3: one rank of a run on a node of its own. Records steps and prints each acknowledged one."""

from __future__ import annotations

import sys
import time

from store_data import samples, step_record, tokens

from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store import background, compact

store, url, rank, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
compact.TOGETHER = background.TOGETHER = 8  # so that merges fall into a run of some seconds
background._PAUSE_S = 0.1
with Recorder(store, RunInfo("a"), rank=rank, flush_s=0.0, mirror=url) as recorder:
    for step in range(1, steps + 1):
        recorder.record(step_record(step), tokens(step), samples(step))
        recorder.flush()
        print(recorder.acknowledged, flush=True)
        time.sleep(0.05)
print("closed", flush=True)
