"""Fills docs/alerts.md from the rules and the rows that say how often they are wrong: python -m docs.make_alerts"""

from __future__ import annotations

import csv
import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.bench_detectors import LATE_DAMAGE, OURS
from benchmarks.corpus import grid, labels
from benchmarks.corpus.peer_process import VERSIONS
from benchmarks.corpus.peers import CHOSEN, LIMITS
from benchmarks.corpus.peers import RULES as PEER_RULES
from monitor.alerts import verdict
from monitor.alerts.judgement import measured_rates
from monitor.alerts.replay import observe_all
from monitor.alerts.rules import RULES, Rule
from monitor.alerts.rules.entropy import FLOOR_SHARE, NOISE_WIDTH
from monitor.alerts.trends import MIN_TREND_ROWS, TREND_T
from monitor.alerts.window import BASELINE_ROWS, BEST_ROWS, LEVEL_ROWS, SLOPE_ROWS, START_ROWS, TREND_ROWS
from monitor.cli import COMMANDS

PAGE = Path(__file__).with_name("alerts.md")
RESULTS = PAGE.parent.parent / "benchmarks" / "results"
PARTS = ("test", "development")
COMMAND_PAGES = {
    "check": "integrations.md", "watch": "notifications.md", "alerts": "notifications.md", "preflight": "preflight.md",
}  # fmt: skip
OUTCOMES = {
    "healthy": "healthy", "stall": "stall", "no_signal": "no signal", "unclear": "unclear",
    "reward_lost": "reward lost", "diversity_lost": "diversity lost", "damaged": "all damaged",
    f"damaged from step {LATE_DAMAGE}": f"damaged from step {LATE_DAMAGE} on",
}  # fmt: skip
HEALTHY_WARNED, WARNED_IN_TIME, MEDIAN_LEAD = 0.01, 0.95, 0.25  # what is aimed at: at most, at least, at least
Row = dict[str, str]


def rows_of(file: str) -> list[Row]:
    """The rows of a CSV of benchmarks/results; none where it is missing."""
    path = RESULTS / file
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    made = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1), *(f"| {' | '.join(c)} |" for c in made)]


def of(count: int | str, whole: int | str, low: str = "", high: str = "") -> str:
    """3 of 20: 15 % [5, 36], the interval in percent."""
    if not int(whole):
        return "no run"
    interval = f" [{100 * float(low):.0f}, {100 * float(high):.0f}]" if low else ""
    return f"{int(count):,} of {int(whole):,}: {percent(int(count) / int(whole))}{interval}"


def percent(value: float | str) -> str:
    """Whole percents, and a digit more under one; nothing of an empty cell."""
    if value == "":
        return ""
    share = 100 * float(value)
    return f"{share:.1f} %" if 0 < share < 1 else f"{share:.0f} %"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def made_by(rows: Sequence[Row], module: str) -> str:
    origin = sorted({f"{row['machine']}; {row['versions']}; commit {row['commit']}" for row in rows})
    return f"{' / '.join(origin)}; `python -m {module}`."


# The rules and the engine


def commands() -> list[str]:
    pages = {name: page for name, page in COMMAND_PAGES.items() if name in COMMANDS}
    lines = [(f"`rlvr {name}`", COMMANDS[name][1], f"[{page}]({page})") for name, page in pages.items()]
    return table(("command", "what it does", "more"), lines)


def least() -> list[str]:
    """The rules that judge a series with the least that a run has."""
    window = observe_all(made_series())[0].window()
    able = [name for name, rule in RULES.items() if set(rule.needs) <= set(window.series) and rule().check(window)]
    return [f"With step, entropy and reward alone {len(able)} of the {len(RULES)} rules judge: {code(able)}."]


def settings(rule: type[Rule] = Rule) -> list[str]:
    """The settings of a rule that are its own or have another default; of Rule itself all of them."""
    shared = {} if rule is Rule else Rule.model_fields
    own = [
        (f"`{name}`", f"{field.default:.3g}" if isinstance(field.default, float) else str(field.default).lower(),
         str(field.description))
        for name, field in rule.model_fields.items()
        if name not in shared or field.default != shared[name].default
    ]  # fmt: skip
    return table(("setting", "default", "meaning"), own) if own else ["It has no settings of its own."]


def made_series() -> dict[str, list[float]]:
    """Step, entropy that decays from a third of the run on, and a reward that stands still."""
    steps = range(60)
    waver = [0.02 * math.sin(1.7 * step) for step in steps]
    entropy = [0.6 * math.exp(-0.04 * max(0, step - 20) + waver[step]) for step in steps]
    return {"step": list(steps), "entropy": entropy, "reward": [0.3 + wave for wave in waver]}


def example() -> list[str]:
    return ["> " + verdict(made_series(), step_s=30.0).sentence]


def computed() -> list[str]:
    deviation = "the larger of the plain and the robust estimate from row-to-row differences, each over sqrt(2)"
    early = "the run's `warmup_steps`, or `--warmup`; else from the first row"
    return table(("name", "definition"), [
        ("baseline", f"median of the first {BASELINE_ROWS} finite values of a series after warm-up ({early})"),
        ("log noise", "1.4826 x median absolute residual of the logarithms of these values around their line, times "
         "sqrt((1 + r) / (1 - r)), r their lag-1 correlation where it is clear"),
        ("start", f"mean of the first {START_ROWS} finite values of a series, those in warm-up too"),
        ("level", f"median of the last {LEVEL_ROWS} values: two outliers cannot move it"),
        ("mean", "of as many last values as the rule says: for shares of a few rollouts, whose medians jump"),
        ("best", f"highest (or lowest) mean of {BEST_ROWS} values in a row so far, and the step where it ended"),
        ("jitter", f"standard deviation of a row around its moving mean: {deviation}"),
        ("g, log-slope", f"least-squares slope of ln(value) per step over the last {SLOPE_ROWS} values"),
        ("t", "slope / standard error, the error times sqrt((1 + r) / (1 - r)), r the lag-1 correlation of residuals"),
        ("trend", f"rising or falling if abs(t) >= {TREND_T:g} over the last {TREND_ROWS} values, else flat; unknown "
         f"without the series or with fewer than {MIN_TREND_ROWS} values"),
        ("`widened`", f"a threshold that lies at least {NOISE_WIDTH:g} log noises away from the baseline"),
        ("floor", f"{percent(FLOOR_SHARE)} of the baseline: messages and verdict project a falling series to it"),
    ])  # fmt: skip


def rules() -> list[str]:
    lines = []
    for rule in RULES.values():
        uses = f"; uses {code(rule.uses)} where recorded" if rule.uses else ""
        lines += [
            *(f"### {rule.name}", "", *described(rule)),
            *(f"Watches `{rule.watches}`; needs {code(rule.needs)}{uses}.", ""),
            *(f'In the verdict: "{rule.says} since step ...: {rule.cure}."', ""),
            *(*settings(rule), "", *on_real_runs(rule.name), "", on_simulated_series(rule.name), ""),
        ]
    return lines[:-1]


def described(rule: type[Rule]) -> list[str]:
    """The paragraphs of the rule's docstring; series, and settings whose names are no words, are set as code."""
    settings = (name for name in rule.model_fields if "_" in name)
    names = sorted({*settings, *(key for key in (*rule.needs, *rule.uses) if "_" in key)}, key=len, reverse=True)
    text = re.sub(rf"(?<![`\w])({'|'.join(names)})(?![`\w])", r"`\1`", inspect.getdoc(rule) or "")
    return [line for paragraph in text.split("\n\n") for line in (" ".join(paragraph.split()), "")]


def on_real_runs(name: str) -> list[str]:
    """A line for each outcome, a column for each part."""
    if only_info(name):
        return ["It announces info at most unless `worst` is raised, so it warns of no run: no rates on real runs."]
    found = {(row["part"], row["group"]): row for row in rows_of("detectors.csv") if row["detector"] == name}
    parts = [part for part in PARTS if any(part == judged for judged, _ in found)]
    if not parts:
        return ["How often it is wrong on real runs was not measured yet."]
    if not any(int(row["warned"]) for row in found.values()):
        runs = sum(int(row["runs"]) for (_, group), row in found.items() if not group.startswith("damaged"))
        return [f"It fired in none of the {runs} real runs ({', '.join(parts)} part): its recall there is not known."]
    lines = [
        (label, *(rate(found[part, group]) if (part, group) in found else "no run" for part in parts))
        for group, label in OUTCOMES.items()
        if any((part, group) in found for part in parts)
    ]
    known = measured_rates().get(name, {"fired": 0, "bad": 0})
    harm = (
        f"Of {known['fired']} development runs in which it fired, unclear ones aside, {known['bad']} were damaged or "
    )
    harm += "had no learning signal."
    return table(("outcome", *(f"{part} part" for part in parts)), lines) + (["", harm] if known["fired"] else [])


def only_info(name: str) -> bool:
    return bool(RULES[name].model_fields["worst"].default == "info")


def rate(row: Row) -> str:
    """What a detector did with the runs of one outcome: of damaged ones in time and late, of others warned at all."""
    if not row["in_time"]:
        return of(row["warned"], row["runs"], row["low"], row["high"])
    text = f"in time {of(row['in_time'], row['runs'], row['low'], row['high'])}"
    text += f", late {row['late']}" if int(row["late"]) else ""
    return text + (f", median lead {percent(row['median_lead'])}" if row["median_lead"] else "")


def on_simulated_series(name: str) -> str:
    rows = rows_of("alerts.csv")
    if not rows:
        return "On simulated series it was not measured yet."
    right = [row for row in rows if name in row["right"].split()]
    other = [row for row in rows if name not in row["right"].split()]
    column = "info" if only_info(name) else "by_rule"
    hits = sum(fired(row, "by_rule").get(name, 0) for row in right)
    false = sum(fired(row, column).get(name, 0) for row in other)
    text = f"On simulated series: where it is right ({plural(len(right), 'shape')}) it fired in "
    text += f"{of(hits, series(right))}; elsewhere in {of(false, series(other))}"
    if false:
        worst = max(other, key=lambda row: fired(row, column).get(name, 0))
        text += f', most often in "{worst["shape"]}" ({fired(worst, column)[name]} of {worst["series"]})'
    return text + "."


def series(rows: Sequence[Row]) -> int:
    return sum(int(row["series"]) for row in rows)


def fired(row: Row, column: str) -> dict[str, int]:
    """{rule: simulated series in which it fired}, of a column of bench_alerts: "by_rule" or "info"."""
    return {rule: int(count) for rule, count in (entry.split(":") for entry in row[column].split())}


# Real runs


def drawn() -> list[str]:
    """What the grid's docstring says after its first line, and how many runs were judged."""
    runs = Counter(row["part"] for row in rows_of("detectors_runs.csv"))
    text = (inspect.getdoc(grid) or "").split("\n\n", 1)[1].replace("SECOND", f"{grid.SECOND} (`SECOND`)")
    judged = " and ".join(f"{runs[part]} of the {part} part" for part in PARTS if runs[part])
    return [*text.splitlines(), "", f"Planned are {grid.RUNS} runs. Judged are {judged or 'none yet'}."]


def labelled() -> list[str]:
    return (inspect.getdoc(labels) or "").split("\n\n", 1)[1].splitlines()


def judged() -> list[str]:
    """Which detectors, and which tunings have no rule left."""
    limits = " or ".join(f'{percent(share)} ("{name}")' for name, share in LIMITS.items())
    ours = ", ".join(f'"{name}"' for name in OURS)
    peers = " and ".join(f"{name} {version}" for name, version in VERSIONS.items())
    lines = [
        f"- {ours}: our rules as they are, with every recorded series, without evaluations, with these two alone.",
        f"- {peers}, live, with every metric that they know and the runs have (`benchmarks/corpus/peers.py`): at their "
        "defaults, and tuned on the development part to warn of most damage in time with at most "
        f"{limits} of its healthy runs warned (`benchmarks/corpus/peers.json`).",
    ]
    chosen = json.loads(CHOSEN.read_text())["settings"] if CHOSEN.exists() else {}
    silent = [
        f'"{peer} {name}"'
        for peer, tunings in chosen.items()
        for name, tuned in tunings.items()
        if set(tuned["off"]) >= set(PEER_RULES[peer])
    ]
    if silent:
        lines.append(
            "- No setting that was tried keeps within the limit and warns of any damage for "
            f"{', '.join(silent)}: tuned so, they are silent."
        )
    return lines


def part_table(part: str) -> list[str]:
    """All detectors on one part of the corpus, by outcome, and ours against what is aimed at."""
    rows = [row for row in rows_of("detectors.csv") if row["part"] == part and row["detector"] not in RULES]
    found = {(row["group"], row["detector"]): row for row in rows if int(row["runs"])}
    detectors = dict.fromkeys(row["detector"] for row in rows)
    if not found:
        return [f"The {part} part was not judged yet."]
    heads = ("outcome", "detector", "warned (damaged: in time)", "late", "silent", "critical", "median lead",
             "alerts a run")  # fmt: skip
    lines = [
        (label, name, *cells(found[group, name]))
        for group, label in OUTCOMES.items()
        for name in detectors
        if (group, name) in found
    ]
    absent = [peer for peer in VERSIONS if not any(name.startswith(peer) for name in detectors)]
    missing = ["", f"Not judged yet on this part: {', '.join(absent)}."] if absent else []
    return [*table(heads, lines), *missing, "", *aims(found), "", made_by(rows, "benchmarks.bench_detectors")]


def cells(row: Row) -> tuple[str, ...]:
    counted = row["in_time"] or row["warned"]
    rest = (row["late"], row["silent"], row["critical"], percent(row["median_lead"]))
    return (of(counted, row["runs"], row["low"], row["high"]), *rest, row["alerts_a_run"] if is_ours(row) else "")


def is_ours(row: Row) -> bool:
    return row["detector"] in OURS


def aims(found: dict[tuple[str, str], Row]) -> list[str]:
    """Ours against the targets; nothing where a group has no run."""
    healthy, damaged = found.get(("healthy", "ours")), found.get(("damaged", "ours"))
    lines = []
    if healthy:
        warned, critical = int(healthy["warned"]) / int(healthy["runs"]), int(healthy["critical"])
        lines += [
            ("healthy runs warned", f"at most {percent(HEALTHY_WARNED)}", rate(healthy), warned <= HEALTHY_WARNED),
            ("healthy runs with a critical alert", "none", of(critical, healthy["runs"]), critical == 0),
        ]
    if damaged:
        in_time, lead = int(damaged["in_time"]) / int(damaged["runs"]), damaged["median_lead"]
        reached = of(damaged["in_time"], damaged["runs"], damaged["low"], damaged["high"])
        lines += [
            ("damaged runs warned in time", f"at least {percent(WARNED_IN_TIME)}", reached, in_time >= WARNED_IN_TIME),
            ("median lead of those", f"at least {percent(MEDIAN_LEAD)}", percent(lead) or "none",
             bool(lead) and float(lead) >= MEDIAN_LEAD),
        ]  # fmt: skip
    told = [(what, aim, reached, "met" if met else "missed") for what, aim, reached, met in lines]
    return table(("ours, every series", "target", "reached", ""), told)


def wrong_runs() -> list[str]:
    """Damaged runs that were missed or warned late, and healthy ones that were warned."""
    rows = rows_of("detectors_runs.csv")
    if not rows:
        return ["No runs were judged yet."]
    damaged = [row for row in rows if row["damage_step"]]
    missed = [row for row in damaged if not row["first_warning"]]
    late = [row for row in damaged if row["first_warning"] and int(row["first_warning"]) >= int(row["damage_step"])]
    healthy = [row for row in rows if row["outcome"] == "healthy"]
    false = [row for row in healthy if row["first_warning"]]
    heads = ("run", "part", "outcome", "damage step", "first warning", "settings", "warned by")
    lines = [run_cells(row) for row in [*missed, *late, *false]]
    told = f"Of {len(damaged)} damaged runs {len(missed)} were missed and {len(late)} warned late; of {len(healthy)} "
    told += f"healthy runs {len(false)} were warned."
    return [told, *(["", *table(heads, lines)] if lines else [])]


def run_cells(row: Row) -> tuple[str, ...]:
    settings = (row["model"], row["task"], row["weighting"], f"lr {row['lr']}", f"epochs {row['epochs']}",
                f"entropy bonus {row['entropy_coef']}", f"temperature {row['temperature']}")  # fmt: skip
    return (row["run"], row["part"], OUTCOMES[row["outcome"]], row["damage_step"], row["first_warning"] or "none",
            ", ".join(settings), row["warned"].replace(" ", ", "))  # fmt: skip


def unseen() -> list[str]:
    """The rules that no real run has tried."""
    rows = [row for row in rows_of("detectors.csv") if row["detector"] in RULES and not only_info(row["detector"])]
    warned = {row["detector"] for row in rows if int(row["warned"])}
    quiet = [name for name in dict.fromkeys(row["detector"] for row in rows) if name not in warned]
    if not quiet:
        return []
    return [f"In no real run of the corpus fired {code(quiet)}: what is known of them is of simulated series."]


# Simulated series


def simulated() -> list[str]:
    rows = rows_of("alerts.csv")
    if not rows:
        return ["Not measured yet."]
    healthy, damaged = [row for row in rows if not row["right"]], [row for row in rows if row["right"]]
    calm = [
        (row["shape"], of(row["false_alarms"], row["series"]), row["false_critical"], others(row)) for row in healthy
    ]
    hurt = [
        (row["shape"], row["right"].replace(" ", ", "), of(row["fired"], row["series"]),
         percent(row["before_damage_share"]), row["lead_median_steps"], row["lead_p10_steps"], row["false_alarms"],
         others(row))
        for row in damaged
    ]  # fmt: skip
    total = of(sum(int(row["false_alarms"]) for row in healthy), series(healthy))
    return [
        f"Healthy shapes; false alarms in all their series together: {total}.",
        "",
        *table(("shape", "false alarms", "critical", "by (series)"), calm),
        "",
        "Damaged shapes:",
        "",
        *table(("shape", "right rules", "one of them fired", "before the damage", "lead, median", "lead, worst tenth",
                "false alarms", "by (series)"), hurt),
        "",
        made_by(rows, "benchmarks.bench_alerts"),
    ]  # fmt: skip


def others(row: Row) -> str:
    """The rules that warned without being right, with their numbers of series."""
    right = row["right"].split()
    return ", ".join(f"{rule} {count}" for rule, count in fired(row, "by_rule").items() if rule not in right)


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "commands": commands, "least": least, "settings": settings, "example": example, "computed": computed,
    "rules": rules, "drawn": drawn, "labels": labelled, "judged": judged, "test": lambda: part_table("test"),
    "development": lambda: part_table("development"), "wrong": wrong_runs, "simulated": simulated, "unseen": unseen,
}  # fmt: skip


def page(text: str) -> str:
    """The page with every block between its marks made anew."""

    def fill(found: re.Match[str]) -> str:
        return "\n".join([f"<!-- table {found[1]} -->", *BLOCKS[found[1]](), "<!-- end -->"])

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
