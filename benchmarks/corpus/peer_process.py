"""Runs rlwatch and rl-doctor live over recorded series, in an environment that holds them and nothing of ours.

`peers.py` starts this script there. A request on stdin, one JSON object a line:

    {"peer": "rlwatch", "records": [{metric: value, ...}, ...], "config": {...}, "settings": [SETTINGS, ...]}

and one line of JSON back: for each SETTINGS a list of [rule, severity, step, records seen, said]. `said` is true where
the peer told its user, false where it found the same again and kept quiet. SETTINGS: {"rules": {rule: {name: value}},
"off": [rule, ...], "monitor": {name: value}}; what is not named keeps the peer's default.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

VERSIONS = {"rlwatch": "0.5.1", "rldoctor": "0.2.0"}  # as `pip` names them
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a database on a disk takes most of rlwatch's time


def rlwatch_live(records, config, settings):
    """`attach` and a `log_step` for each record, as its README shows; it says each thing once a cooldown."""
    import rlwatch

    rules = {rule: dict(values) for rule, values in settings["rules"].items()}
    for rule in settings["off"]:
        rules[rule] = {"enabled": False}
    found = []
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        monitor = rlwatch.attach(framework="manual", run_id="run", storage={"log_dir": folder}, **rules)
        for seen, record in enumerate(records, 1):
            alerts = monitor.log_step(record["step"], **{k: v for k, v in record.items() if k != "step"})
            found += [[alert.detector, alert.severity, record["step"], seen, True] for alert in alerts]
        monitor.stop()
        atexit.unregister(monitor.stop)  # or the process keeps every monitor to its end
    return found


def rldoctor_live(records, config, settings):
    """A `LiveMonitor` that logs each record; thresholds are constants of the detectors' modules, as its README says."""
    import rl_doctor.detectors as detectors
    from rl_doctor.detectors.base import Severity
    from rl_doctor.live import LiveMonitor

    found, options = [], dict(settings["monitor"])
    options["alert_at"] = Severity[options.get("alert_at", "WARNING")]
    with contextlib.ExitStack() as changed:
        for rule, values in settings["rules"].items():
            module = sys.modules[detectors.get(rule).__module__]
            for name, value in values.items():
                changed.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        monitor = LiveMonitor(config=config, skip=settings["off"], on_finding=lambda finding: None, **options)
        checked = None
        for seen, record in enumerate(records, 1):
            said = {finding.detector for finding in monitor.log(record, step=record["step"])}
            if monitor.latest is not checked:
                checked = monitor.latest
                found += [
                    [finding.detector, finding.severity.name.lower(), record["step"], seen, finding.detector in said]
                    for finding in checked.problems
                    if finding.severity >= Severity.WARNING
                ]
    return found


LIVE = {"rlwatch": rlwatch_live, "rldoctor": rldoctor_live}


def main() -> None:
    for name, version in VERSIONS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found != version:
            sys.exit(f"{name} is {found}")
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a peer prints is not an answer
        for line in sys.stdin:
            request = json.loads(line)
            live = LIVE[request["peer"]]
            answer = [live(request["records"], request["config"], settings) for settings in request["settings"]]
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
