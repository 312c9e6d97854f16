"""From acknowledged on one machine to visible on another, over an S3 server: python -m benchmarks.bench_mirror

A recorder with a mirror records one step each second, tokens and texts included; `Puller` looks each half second, as
`rlvr store pull --follow --every 0.5` does. Measured for each step: seconds from `Recorder.acknowledged` to the step's
row in a query on the pulled store, and the requests of both sides. The server is moto on this machine
($RLVR_MOTO_SERVER, or see tests/monitor/s3.py), so the network itself adds nothing; a real one adds its round trips.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import RESULTS, no_options, write_rows
from monitor.recorder import Recorder
from monitor.records import RunInfo
from monitor.store.pull import Puller
from monitor.store.reader import open_store

STEPS = 60
PULL_S = 0.5


def main() -> None:
    no_options(__doc__)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "monitor"))
    from s3 import BUCKET, Proxy, environment, moto
    from store_data import samples, step_record, tokens

    with tempfile.TemporaryDirectory() as folder, moto(Path(folder, "moto.log")) as port:
        proxy = Proxy(port)
        proxy.up()
        os.environ |= environment(proxy.port)
        url, source, copy = f"s3://{BUCKET}/bench", Path(folder, "source"), Path(folder, "copy")
        acknowledged: dict[int, float] = {}
        visible: dict[int, float] = {}
        done = threading.Event()

        def read() -> None:
            puller = Puller(url, copy)
            while not done.is_set():
                if puller.look().segments:
                    with open_store(copy) as opened:
                        for (step,) in opened.sql("SELECT DISTINCT step FROM steps").rows:
                            visible.setdefault(step, time.perf_counter())
                done.wait(PULL_S)

        reader = threading.Thread(target=read)
        reader.start()
        with Recorder(source, RunInfo("a"), mirror=url) as recorder:
            for step in range(1, STEPS + 1):
                recorder.record(step_record(step), tokens(step), samples(step))
                recorder.flush()
                acknowledged[step] = time.perf_counter()
                time.sleep(1.0)
            writes = proxy.counts["PUT"] + proxy.counts["DELETE"]
            gets = proxy.counts["GET"]
        deadline = time.monotonic() + 30
        while len(visible) < STEPS and time.monotonic() < deadline:
            time.sleep(0.1)
        done.set()
        reader.join()
        proxy.down()
    waits = np.array([visible[step] - acknowledged[step] for step in acknowledged])
    row = {
        "steps": STEPS,
        "step_s": 1.0,
        "pull_every_s": PULL_S,
        "visible_p50_s": round(float(np.median(waits)), 2),
        "visible_p95_s": round(float(np.percentile(waits, 95)), 2),
        "visible_max_s": round(float(waits.max()), 2),
        "writes_per_step": round(writes / STEPS, 2),
        "reads_per_step": round(gets / STEPS, 2),
    }
    print(row)
    write_rows(RESULTS / "mirror.csv", [row], ["duckdb", "obstore"])


if __name__ == "__main__":
    main()
