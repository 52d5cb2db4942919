"""Turns run folders, or the records of the public challenge, into one self-contained HTML page and PNG plots.

    python records/report.py runs/first [runs/second ...] [--output DIR]
    python records/report.py --import CHECKOUT [--output DIR]      the public records and ours: page, plots, records.csv, records.json
    python records/report.py --table                               writes the table of our records in records/README.md again

Reads `run.jsonl` of each folder (never the prose of `log.txt`) and writes `report.html` and the plots to `--output`, by default the folder
`report` inside the first run. Several runs are compared: scores against bytes and seconds, and, where their settings differ, what each difference
did to the score. CHECKOUT is a copy of the challenge's repository; `leaderboard.py` reads it, by default into `runs/leaderboard`. A page needs no
script, no network and no other file.

Exit code 0: every folder is reported; 1: some are, and the page says which are not; 2: none is.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

Event = dict[str, Any]
Series = tuple[np.ndarray, np.ndarray]

ABSENT = "—"
UNRECORDED = "not recorded"
EVENT_KINDS = frozenset({"config", "env", "phase", "step", "val", "export", "eval", "result"})


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Values
# Whatever a file holds becomes a float (NaN where it is not a finite number) or one line of text, so that nothing later can trip over it.


def number(event: Event | None, key: str) -> float:
    """Returns `event[key]` as a float; NaN where there is no event, no such key or no finite number."""
    value = event.get(key) if event else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return math.nan
    return float(value)


def text(event: Event | None, key: str) -> str:
    """Returns `event[key]` as one line of text, a dash where there is none."""
    value = event.get(key) if event else None
    return ABSENT if value is None or value == "" else one_line(value)


def one_line(value: object) -> str:
    """Returns `value` as text without line breaks or characters that cannot be shown."""
    return "".join(c if c.isprintable() else " " for c in (value if isinstance(value, str) else json.dumps(value))).strip()


def mapping(event: Event | None, key: str) -> Event:
    """Returns `event[key]` where it is an object, otherwise an empty one."""
    value = event.get(key) if event else None
    return value if isinstance(value, dict) else {}


def decimals(value: float, digits: int) -> str:
    """Returns `value` with `digits` decimals and thousands separators, a dash for NaN."""
    return ABSENT if math.isnan(value) else f"{value:,.{digits}f}"


def count(value: float) -> str:
    """Returns a whole number with thousands separators, a dash for NaN."""
    return decimals(value, 0)


def bpb(value: float) -> str:
    """Returns bits per byte with the four digits in which the field reports them."""
    return decimals(value, 4)


def duration(seconds: float) -> str:
    """Returns seconds with two decimals below ten seconds, where a clock would hide them, and otherwise `clock`; a dash for NaN."""
    if math.isnan(seconds):
        return ABSENT
    return clock(seconds) if abs(seconds) >= 10 else f"{seconds:.2f} s"


def clock(seconds: float) -> str:
    """Returns `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Runs
# A run is what its event file says after replay: a resumed run goes back to its checkpoint, so what it logged beyond that point is replaced.


class Role(NamedTuple):
    """Bytes of one group of weights in the artifact; NaN where not recorded."""

    name: str
    params: float
    bytes: float
    bits_per_weight: float


@dataclass
class Run:
    """What one run folder holds: the latest event of each kind, and the step and validation events that are still part of the run."""

    folder: Path
    config: Event | None = None
    env: Event | None = None
    phases: list[Event] = field(default_factory=list)
    steps: list[Event] = field(default_factory=list)
    vals: list[Event] = field(default_factory=list)
    export: Event | None = None
    evals: dict[str, Event] = field(default_factory=dict)
    result: Event | None = None
    resumed_at: list[float] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    label: str = ""

    def replay(self, event: Event) -> None:
        """Takes in the next event of the file. Unknown kinds are ignored."""
        match event["event"]:
            case "config":
                self.config = event
            case "env":
                self.env = event
            case "phase":
                self.phases = [*before(self.phases, number(event, "step")), event]
            case "val":
                self.vals = [*before(self.vals, number(event, "step")), event]
            case "step":
                self._replay_step(event)
            case "export":
                self.export = event
            case "eval":
                self.evals[text(event, "name")] = event
            case "result":
                self.result = event

    def _replay_step(self, event: Event) -> None:
        step = number(event, "step")
        if self.steps and step <= number(self.steps[-1], "step"):
            self.steps = before(self.steps, step)
            # Phases and validation come before or after the step event of the same number, so that number itself stays.
            self.phases, self.vals = before(self.phases, step + 1), before(self.vals, step + 1)
        self.steps.append(event)
        # Scores and sizes belong to weights that further training has replaced.
        self.export, self.evals, self.result = None, {}, None

    @property
    def run_id(self) -> str:
        """The run's own name, or that of its folder where no event gives one."""
        names = (text(self.config, "run_id"), text(self.result, "run_id"), one_line(self.folder.resolve().name))
        return next(name for name in names if name != ABSENT)

    @property
    def settings(self) -> Event:
        return mapping(self.config, "settings")

    @property
    def final_bpb(self) -> float:
        return number(self.result, "val_bpb")

    @property
    def scores(self) -> dict[str, Event]:
        """Evaluation name to its event; the `result` event has the last word."""
        final = {one_line(name): score for name, score in mapping(self.result, "scores").items() if isinstance(score, dict)}
        return {**self.evals, **final}

    @property
    def roles(self) -> list[Role]:
        """The artifact's parts, largest first; what the weights do not account for is the container."""
        listed = self.export.get("roles") if self.export else None
        rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
        roles = [Role(text(row, "role"), *(number(row, key) for key in ("params", "bytes", "bits_per_weight"))) for row in rows]
        roles = sorted((role for role in roles if role.bytes >= 0), key=lambda role: -role.bytes)
        rest = self.size("bytes_model") - sum(role.bytes for role in roles)
        return [*roles, Role("container", math.nan, rest, math.nan)] if roles and rest > 0 else roles

    def size(self, key: str) -> float:
        """Returns one of the `bytes_…` numbers; NaN before export."""
        final = number(self.result, key)
        return number(self.export, key) if math.isnan(final) else final

    @property
    def over_cap(self) -> bool:
        return self.size("bytes_total") > self.size("bytes_cap")

    @property
    def status(self) -> str:
        if self.result:
            return "finished" if self.steps else "finished, trained elsewhere"
        if self.steps:
            step, steps = (count(number(self.steps[-1], key)) for key in ("step", "steps"))
            return f"unfinished, step {step}" if steps == ABSENT else f"unfinished, step {step} of {steps}"
        return "evaluated only" if self.evals else "exported only" if self.export else "no step logged yet"


def before(events: list[Event], step: float) -> list[Event]:
    """Returns the events whose step is less than `step`."""
    return [event for event in events if number(event, "step") < step]


def read_run(folder: Path) -> Run:
    """Returns the run in `folder`, labelled with its run id. Raises ValueError where there is none and OSError where it cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run folder such as runs/<RUN_ID>")
    path = folder / "run.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: not a run folder, it holds no run.jsonl")
    run = Run(folder)
    events, run.notices = read_events(path)
    if not events:
        raise ValueError(f"{path}: not a run, none of its lines is a run event")
    restarted = False
    for event in events:
        if event["event"] == "step" and restarted and run.steps:
            run.resumed_at.append(number(event, "step"))
        restarted = event["event"] == "config" or (restarted and event["event"] != "step")
        run.replay(event)
    run.notices += run_notices(run)
    run.label = run.run_id
    return run


def read_events(path: Path) -> tuple[list[Event], list[str]]:
    """Returns the run events of `path` in order, and a notice for each kind of line left out. Unknown events are left out without a notice."""
    content = path.read_text(encoding="utf-8", errors="replace")
    lines = [(position, line) for position, line in enumerate(content.split("\n"), start=1) if line.strip()]
    events, damaged = [], []
    for position, line in lines:
        event = parse_event(line)
        if event is None:
            damaged.append(position)
        elif event["event"] in EVENT_KINDS:
            events.append(event)
    notices = []
    if damaged and damaged[-1] == lines[-1][0] and not content.endswith("\n"):
        damaged.pop()
        notices.append("The last line of run.jsonl is torn (the run was interrupted while writing it) and is left out.")
    if damaged:
        notices.append(f"Damaged lines of run.jsonl are left out: {listing(map(str, damaged))}.")
    return events, notices


def parse_event(line: str) -> Event | None:
    """Returns the event in `line`, None where it is damaged: no JSON object, no event name, or no step number where the kind has one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    needs_step = event["event"] in ("phase", "step", "val")
    return None if needs_step and math.isnan(number(event, "step")) else event


def listing(items: Iterable[str], most: int = 8) -> str:
    """Returns the items separated by commas, the ones after `most` only counted."""
    shown = list(items)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def run_notices(run: Run) -> list[str]:
    """Returns what a reader must know before trusting this run's numbers."""
    notices = []
    if run.resumed_at:
        points = listing(count(step) for step in run.resumed_at)
        notices.append(f"The run was resumed (first step logged afterwards: {points}); where steps repeat, the later ones are shown.")
    if not run.result:
        notices.append(f"The run has no result: {run.status}.")
    broken = [event for event in run.steps if "train_loss" in event and math.isnan(number(event, "train_loss"))]
    if broken:
        notices.append(f"The training loss is not a finite number at {count(len(broken))} logged steps, first at {count(number(broken[0], 'step'))}.")
    if run.over_cap:
        excess = run.size("bytes_total") - run.size("bytes_cap")
        notices.append(f"The artifact is {count(excess)} bytes over the cap of {count(run.size('bytes_cap'))}: the score does not qualify.")
    return notices


def label_runs(runs: list[Run]) -> None:
    """Makes the labels of `runs` distinct: runs that share a run id are told apart by their folders."""
    shared = {run.run_id for run in runs if sum(other.run_id == run.run_id for other in runs) > 1}
    for run in runs:
        if run.run_id in shared:
            run.label = f"{run.run_id} ({one_line(str(run.folder))})"


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Comparison
# Scores are ranked only where they mean the same thing; otherwise the page says why not.


def setting(run: Run, name: str) -> str:
    """Returns the value of a setting as text, "not recorded" where the run does not give it."""
    return one_line(run.settings[name]) if name in run.settings else UNRECORDED


def score_obstacles(runs: Sequence[Run]) -> list[str]:
    """Returns the reasons why the scores of `runs` cannot be compared, none if they can."""
    obstacles = []
    if differ(setting(run, "DATA_PATH") for run in runs):
        obstacles.append("The runs differ in DATA_PATH: their scores were made on different data and must not be compared.")
    scored = {count(number(event, "bytes")) for run in runs for event in run.evals.values() if not math.isnan(number(event, "bytes"))}
    if differ(scored):
        obstacles.append(f"The evaluations scored different amounts of text ({listing(sorted(scored))} bytes): their scores must not be compared.")
    if differ(setting(run, "FINAL_EVAL") for run in runs if run.result):
        obstacles.append("The runs differ in FINAL_EVAL: compare them under an evaluation that both have, not by their final score.")
    return obstacles


def comparison_notices(runs: Sequence[Run]) -> list[str]:
    """Returns everything that makes some number of `runs` incomparable."""
    notices = score_obstacles(runs)
    if any(differ(setting(run, name) for run in runs) for name in ("TOKENIZER_PATH", "VOCAB_SIZE")):
        notices.append("The runs differ in their tokenizer: losses in nats per token are not comparable between them, bits per byte are.")
    if mixed_hardware(runs):
        notices.append("The runs differ in hardware: times and throughput are not comparable between them.")
    return notices


def mixed_hardware(runs: Sequence[Run]) -> bool:
    return any(differ(hardware(run, key) for run in runs) for key in ("device", "world_size"))


def differ(values: Iterable[str]) -> bool:
    return len(set(values)) > 1


def hardware(run: Run, key: str) -> str:
    """Returns the result's word on where the run ran, or else that of the environment event."""
    final = text(run.result, key)
    return text(run.env, key) if final == ABSENT else final


class Difference(NamedTuple):
    """What a change did: scores with it less scores without it, in bits per byte, one for each seed that was run both ways."""

    label: str
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with one seed."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else math.nan

    @property
    def words(self) -> str:
        return f"{self.mean:+.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


# These say which run it is, where it lies and what is written about it; runs that differ in nothing else repeat one configuration.
BOOKKEEPING = frozenset(
    "SEED RUN_ID RUNS_DIR STAGES RESUME CHECKPOINT ARTIFACT CHECKPOINT_EVERY TRAIN_LOG_EVERY VAL_LOSS_EVERY SCORES_FILE DOCUMENTS_FILE AUDIT "
    "AUDIT_TOKENS IGNORE_ENV".split()
)


def configurations(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs that have a score, grouped by their settings, in the order in which each configuration first appears."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if not math.isnan(run.final_bpb):
            known = {name: value for name, value in run.settings.items() if name not in BOOKKEEPING}
            groups.setdefault(json.dumps(known, sort_keys=True), []).append(run)
    return list(groups.values())


def differences(runs: Sequence[Run]) -> tuple[str, list[Difference]]:
    """Returns what the first configuration is called, and how every other one differs from it in the seeds that both have."""
    groups = configurations(runs)
    if len(groups) < 2 or score_obstacles(runs):
        return "", []
    base, scores = groups[0][0], scores_by_seed(groups[0])
    found = []
    for group in groups[1:]:
        values = [score - scores[seed] for seed, score in scores_by_seed(group).items() if seed in scores]
        if values:
            found.append(Difference(described(group[0], [base, group[0]]), values))
    return described(base, [group[0] for group in groups]), found


def described(run: Run, runs: Sequence[Run]) -> str:
    """Returns the values that `run` has of the settings in which `runs` differ; the preset first, for it says more than any setting that it changes."""
    names = sorted({name for each in runs for name in each.settings} - BOOKKEEPING, key=lambda name: (name != "PRESET", name))
    return listing((f"{name}={setting(run, name)}" for name in names if differ(setting(each, name) for each in runs)), most=3)


def scores_by_seed(runs: Sequence[Run]) -> dict[str, float]:
    """Returns the mean final score of each seed."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        scores.setdefault(seed_of(run), []).append(run.final_bpb)
    return {seed: statistics.fmean(values) for seed, values in scores.items()}


def seed_of(run: Run) -> str:
    """Returns the result's word on the seed, or else the setting."""
    return text(run.result, "seed") if run.result else setting(run, "SEED")


def best_bpb(runs: Sequence[Run]) -> float:
    """Returns the lowest final score among runs that fit the cap; NaN where fewer than two scores can be compared."""
    scores = [run.final_bpb for run in runs if not math.isnan(run.final_bpb) and not run.over_cap]
    return min(scores) if len(scores) > 1 and not score_obstacles(runs) else math.nan


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Plots
# Each function draws all runs into one figure, or returns None where no run has the data.

COLOURS = ("#1f5fa8", "#d2502d", "#2a8c68", "#8a4fa3", "#b8861b", "#3a9ec2", "#b03a6b", "#5c6670")
LINE_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
CAP_COLOUR = "#b3261e"
PLOT_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": "#3b424a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7eaed",
    "grid.linewidth": 0.8,
    "xtick.color": "#5c6670",
    "ytick.color": "#5c6670",
    "legend.frameon": False,
    "text.color": "#23282d",
}
PLOT_INCHES = (9.6, 4.6)
PLOT_DPI = 160
# What fits the width of a plot at its font size.
LEGEND_CHARACTERS = 120
# Skipping this much of the start keeps the fall from a random model's loss from flattening the part that people compare.
OPENING_FRAC = 0.04
# Below this share of the cap, an axis that reached the cap would leave the bars too short to read.
SMALL_CAP_FRAC = 0.25


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def line_style(index: int) -> Any:
    """Returns a dash pattern that changes whenever the colours start over."""
    return LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]


def plot_text(value: str, most: int = 44) -> str:
    """Returns `value` for a figure: shortened, with nothing matplotlib would read as mathematics or as "leave out of the legend"."""
    short = value if len(value) <= most else f"{value[: most - 1]}…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def series(events: Sequence[Event], x_key: str, y_key: str) -> Series:
    """Returns the points of `events` that have both numbers."""
    points = np.array([(number(event, x_key), number(event, y_key)) for event in events], dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[:, 0], points[:, 1]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns the centred running mean over about a fiftieth of `values`; at the ends it averages what there is."""
    window = np.ones(2 * (len(values) // 100) + 1)
    if not len(values):
        return values
    return np.convolve(values, window, mode="same") / np.convolve(np.ones_like(values), window, mode="same")


def legend_label(run: Run) -> str:
    """Returns the run's name with its final score, or its last validation where there is none."""
    if not math.isnan(run.final_bpb):
        return plot_text(run.label) + f"   {bpb(run.final_bpb)} bpb"
    steps, scores = series(run.vals, "step", "val_bpb")
    return plot_text(run.label) + (f"   {bpb(scores[-1])} bpb at step {count(steps[-1])}" if len(scores) else "")


def draw_loss(runs: Sequence[Run], x_key: str) -> Figure | None:
    """Returns training loss (raw thin, smoothed thick) and validation points over `x_key`."""
    figure = Figure(figsize=PLOT_INCHES, layout="constrained")
    axes = figure.add_subplot()
    seen: list[Series] = []
    for index, run in enumerate(runs):
        x, loss = series(run.steps, x_key, "train_loss")
        val_x, val_loss = series(run.vals, x_key, "val_loss")
        axes.plot(x, loss, color=colour(index), alpha=0.22, linewidth=0.7)
        axes.plot(x, smoothed(loss), color=colour(index), linestyle=line_style(index), linewidth=1.7, label=legend_label(run))
        axes.plot(val_x, val_loss, "o", color=colour(index), markerfacecolor="white", markeredgewidth=1.5, markersize=5.5, zorder=3)
        seen += [(x, smoothed(loss)), (val_x, val_loss)]
    if not any(len(x) for x, _ in seen):
        return None
    axes.plot([], [], "o", color="#5c6670", markerfacecolor="white", markeredgewidth=1.5, markersize=5.5, label="validation")
    axes.set_ylim(*loss_frame(seen))
    axes.set_ylabel("loss (nats per token)")
    set_run_axis(axes, x_key)
    if len(runs) == 1:
        mark_phases(axes, runs[0], x_key)
    add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Puts the legend above the plot, in as many columns as its longest entry leaves room for, where it hides no curve."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, LEGEND_CHARACTERS // (8 + max(map(len, labels))))
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)))


def set_run_axis(axes: Axes, x_key: str) -> None:
    """Labels the horizontal axis, which runs from the start of training."""
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    if x_key == "train_seconds":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=11, steps=[1, 1.5, 3, 6, 10], integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds)))
        axes.set_xlabel("training time")
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: count(step)))
        axes.set_xlabel("step")


def loss_frame(curves: Sequence[Series]) -> tuple[float, float]:
    """Returns the vertical limits that show every curve after its opening."""
    kept = np.concatenate([y[x >= x.min() + OPENING_FRAC * np.ptp(x)] for x, y in curves if len(x)])
    low, high = float(kept.min()), float(kept.max())
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def mark_phases(axes: Axes, run: Run, x_key: str) -> None:
    """Marks where the run's phase changed, with what changed."""
    x, steps = series(run.steps, x_key, "step")
    for earlier, later in zip(run.phases, run.phases[1:], strict=False):
        changes = [plot_text(words(later[key])) for key, words in PHASE_WORDS.items() if key in later and later[key] != earlier.get(key)]
        if changes and len(x):
            place = float(np.interp(number(later, "step"), steps, x))
            axes.axvline(place, color="#9aa1a9", linewidth=0.9, linestyle=":")
            axes.annotate(
                "\n".join(changes), (place, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2), textcoords="offset points",
                ha="right", va="top", fontsize=8.5, color="#5c6670", linespacing=1.4,
            )  # fmt: skip


PHASE_WORDS: dict[str, Callable[[Any], str]] = {
    "order": lambda order: f"{len(order)} layers run" if isinstance(order, list) else f"layers {one_line(order)}",
    "seq_len": lambda seq_len: f"length {one_line(seq_len)}",
    "qat": lambda qat: "QAT off" if qat is False else "QAT on" if qat is True else f"QAT {one_line(qat)}",
}


def draw_throughput(runs: Sequence[Run]) -> Figure | None:
    """Returns tokens per second over steps, from zero so that differences keep their proportion."""
    figure = Figure(figsize=(PLOT_INCHES[0], 3.6), layout="constrained")
    axes = figure.add_subplot()
    highest = 0.0
    for index, run in enumerate(runs):
        x, speed = series(run.steps, "step", "tokens_per_second")
        axes.plot(x, speed, color=colour(index), alpha=0.25, linewidth=0.7)
        axes.plot(x, smoothed(speed), color=colour(index), linestyle=line_style(index), linewidth=1.7, label=plot_text(run.label))
        highest = max(highest, *speed, 0.0)
    if not highest:
        return None
    axes.set_ylim(0, 1.1 * highest)
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel("tokens per second")
    set_run_axis(axes, "step")
    add_legend(figure)
    return figure


class Bar(NamedTuple):
    """One bar of the size plot."""

    row: int
    run: int
    bytes: float
    words: str
    over_cap: bool


def draw_sizes(runs: Sequence[Run]) -> Figure | None:
    """Returns bytes per role, code and total as horizontal bars, with the cap."""
    sized = [(index, run) for index, run in enumerate(runs) if not math.isnan(run.size("bytes_total"))]
    if not sized:
        return None
    names = [*role_names([run for _, run in sized]), "code", "total"]
    bars = [bar for index, run in sized for bar in size_bars(run, index, names)]
    height = 0.8 / len(sized)
    places = {index: (place - (len(sized) - 1) / 2) * height for place, (index, _) in enumerate(sized)}
    figure = Figure(figsize=(PLOT_INCHES[0], 1.5 + len(names) * max(0.34, 0.2 * len(sized))), layout="constrained")
    axes = figure.add_subplot()
    for bar in bars:
        place = bar.row + places[bar.run]
        axes.barh(place, bar.bytes, height=0.92 * height, color=CAP_COLOUR if bar.over_cap else colour(bar.run), alpha=0.9)
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.annotate(bar.words, (bar.bytes, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5, bbox=clear)
    axes.set_yticks(range(len(names)), [plot_text(name, 28) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: count(size)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel("bytes")
    largest = max(run.size("bytes_total") for _, run in sized)
    axes.set_xlim(0, max(1.3 * largest, *(1.06 * cap for cap in mark_caps(axes, largest, [run.size("bytes_cap") for _, run in sized])), 1.0))
    for index, run in sized:
        axes.barh(0, 0, color=colour(index), label=plot_text(run.label))
    add_legend(figure)
    return figure


def role_names(runs: Sequence[Run]) -> list[str]:
    """Returns the roles of all runs, largest first, the container last."""
    largest: dict[str, float] = {}
    for role in (role for run in runs for role in run.roles):
        largest[role.name] = max(role.bytes, largest.get(role.name, 0))
    return sorted(largest, key=lambda name: (name == "container", -largest[name]))


def size_bars(run: Run, index: int, names: Sequence[str]) -> list[Bar]:
    """Returns the bars of one run; `names` are the rows."""
    bars = []
    for role in run.roles:
        bits = f"   {role.bits_per_weight:.2f} bits per weight" if not math.isnan(role.bits_per_weight) else ""
        bars.append(Bar(names.index(role.name), index, role.bytes, count(role.bytes) + bits, False))
    for name, size in (("code", run.size("bytes_code")), ("total", run.size("bytes_total"))):
        if not math.isnan(size):
            words = count(size) + ("   over the cap" if name == "total" and run.over_cap else "")
            bars.append(Bar(len(names) - 1 if name == "total" else len(names) - 2, index, size, words, name == "total" and run.over_cap))
    return bars


def mark_caps(axes: Axes, largest: float, caps: Iterable[float]) -> list[float]:
    """Returns the caps drawn as lines; of the others, so far above `largest` that the rest could not be read, it says in words where they are."""
    known = sorted({cap for cap in caps if not math.isnan(cap)})
    visible = [cap for cap in known if largest >= SMALL_CAP_FRAC * cap]
    for cap in visible:
        mark_limit(axes, cap, f"cap {count(cap)}")
    for cap in (cap for cap in known if cap not in visible):
        words = f"{largest / cap:.1%} of the cap of {count(cap)} bytes, which is far to the right  →"
        axes.annotate(words, (1, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points",
                      ha="right", va="bottom", color=CAP_COLOUR, fontsize=9)  # fmt: skip
    return visible


def mark_limit(axes: Axes, x: float, words: str) -> None:
    """Draws a vertical line that nothing may be to the right of."""
    axes.axvline(x, color=CAP_COLOUR, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.annotate(words, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                  ha="center", va="bottom", color=CAP_COLOUR, fontsize=9)  # fmt: skip


class Point(NamedTuple):
    """A score and what it took."""

    x: float
    score: float  # bits per byte
    label: str
    colour: str
    ranked: bool = True  # may lie on the frontier; drawn hollow where not


def frontier(points: Iterable[Point]) -> list[Point]:
    """Returns the ranked points that no other one matches in score with as little, from the least x to the best score."""
    kept: list[Point] = []
    for point in sorted(point for point in points if point.ranked):
        if not kept or point.score < kept[-1].score:
            kept.append(point)
    return kept


def draw_frontier(points: Sequence[Point], label: str) -> Figure | None:
    """Returns scores against what they took, and the step line of the best score that each x allows; None for fewer than two points."""
    points = [point for point in points if not math.isnan(point.x) and not math.isnan(point.score)]
    if len(points) < 2:
        return None
    figure = Figure(figsize=PLOT_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for point in points:
        axes.plot(point.x, point.score, "o", color=point.colour, markerfacecolor=point.colour if point.ranked else "white", markersize=6, zorder=3)
    best = frontier(points)
    if best:
        x = [*(point.x for point in best), max(point.x for point in points if point.ranked)]
        axes.plot(x, [*(point.score for point in best), best[-1].score], drawstyle="steps-post", color="#5c6670", linewidth=1.2)
    axes.margins(x=0.08, y=0.12)
    axes.set_ylabel("bits per byte")
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    return figure


def label_points(figure: Figure, points: Iterable[Point]) -> None:
    """Writes each point's label beside it, the first points first, where there is room; call it when nothing else moves any more."""
    axes = figure.axes[0]
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [marker.get_window_extent().padded(-1) for marker in axes.lines if marker.get_marker() == "o"]
    for point in points:
        for right, up in ((7, 6), (7, -6), (-7, 6), (-7, -6), (0, 13), (0, -13)):
            words = axes.annotate(
                plot_text(point.label), (point.x, point.score), xytext=(right, up), textcoords="offset points", fontsize=8.5, color=point.colour,
                ha="left" if right > 0 else "right" if right < 0 else "center", va="center", annotation_clip=True, in_layout=False,
            )  # fmt: skip
            box = words.get_window_extent()
            if frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 and not box.count_overlaps(taken):
                taken.append(box)
                break
            words.remove()


def draw_run_frontier(runs: Sequence[Run], x_of: Callable[[Run], float], label: str, caps: Sequence[float] = ()) -> Figure | None:
    """Returns the runs' final scores against one of their numbers, with its caps; None where they cannot be compared."""
    if score_obstacles(runs):
        return None
    points = [Point(x_of(run), run.final_bpb, run.label, colour(index), not run.over_cap) for index, run in enumerate(runs)]
    figure = draw_frontier(points, label)
    if figure:
        axes = figure.axes[0]
        drawn = mark_caps(axes, max(point.x for point in points if not math.isnan(point.x)), caps)
        axes.set_xlim(right=max(axes.get_xlim()[1], *(1.01 * cap for cap in drawn), 0.0))
        label_points(figure, dict.fromkeys([*frontier(points), *sorted(points, key=lambda point: point.score)]))
    return figure


def draw_against_bytes(runs: Sequence[Run]) -> Figure | None:
    return draw_run_frontier(runs, lambda run: run.size("bytes_total"), "bytes of code and weights", [run.size("bytes_cap") for run in runs])


def draw_against_seconds(runs: Sequence[Run], key: str, label: str) -> Figure | None:
    """Returns scores against seconds of the result, None where they were measured on different hardware."""
    return None if mixed_hardware(runs) else draw_run_frontier(runs, lambda run: number(run.result, key), label)


def draw_differences(base: str, found: Sequence[Difference]) -> Figure | None:
    """Returns what each change did to the score as bars with their standard error; None for no change."""
    if not found:
        return None
    figure = Figure(figsize=(PLOT_INCHES[0], 1.2 + 0.36 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, difference in enumerate(found):
        single = len(difference.values) == 1
        axes.barh(place, difference.mean, height=0.62, color="#c9ced4" if single else COLOURS[0], alpha=0.9)
        if not single:
            axes.errorbar(difference.mean, place, xerr=difference.error, color="#23282d", capsize=4, linewidth=1.3)
        axes.plot(difference.values, [place] * len(difference.values), "o", color="#23282d", markersize=3)
        words = f"{difference.words}   n = {len(difference.values)}"
        axes.annotate(words, (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(range(len(found)), [plot_text(difference.label, 60) for difference in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color="#23282d", linewidth=0.9)
    axes.margins(x=0.1)
    axes.set_xlabel(f"bits per byte against {plot_text(base, 80)}; less is better")
    return figure


def png(figure: Figure) -> bytes:
    """Returns the figure as PNG, the same bytes for the same data."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page, which has the reader's fonts, shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=PLOT_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


class Plot(NamedTuple):
    """A plot of the page and the file it is also written to."""

    file: str
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure | None]


LOSS_CAPTION = (
    "Thin: every logged step. Thick: running mean over about 2 % of them. Circles: validation. "
    f"The frame leaves out the fall of the first {OPENING_FRAC:.0%} of each run."
)
SIZES_CAPTION = "Compressed size of each group of weights, of the code, and of all together. Container: what else the artifact holds."
PLOTS = (
    Plot("loss_over_steps.png", "Loss over steps", LOSS_CAPTION, lambda runs: draw_loss(runs, "step")),
    Plot("loss_over_time.png", "Loss over training time", LOSS_CAPTION, lambda runs: draw_loss(runs, "train_seconds")),
    Plot("throughput.png", "Throughput", "Tokens per second at each logged step, and their running mean.", draw_throughput),
    Plot("bytes_by_role.png", "Bytes against the cap", SIZES_CAPTION, draw_sizes),
)
FRONTIER_CAPTION = (
    "Final score of each run. The line is the best score that as much allows; hollow runs are over the byte cap and not on it. "
    "A label that would cover another is left out."
)
DIFFERENCES_CAPTION = (
    "The final score of each configuration less that of the first run's, over the seeds that both have: mean, its standard error, and a dot for each seed. "
    "Grey: one seed, whose spread is unknown."
)
# Of several runs, and left out where nothing can be compared: the page says why.
COMPARISON_PLOTS = (
    Plot("differences.png", "What the settings changed", DIFFERENCES_CAPTION, lambda runs: draw_differences(*differences(runs))),
    Plot("score_against_bytes.png", "Score against bytes", FRONTIER_CAPTION, draw_against_bytes),
    Plot("score_against_training.png", "Score against training time", FRONTIER_CAPTION,
         lambda runs: draw_against_seconds(runs, "train_seconds", "seconds of training")),
    Plot("score_against_evaluation.png", "Score against evaluation time", FRONTIER_CAPTION,
         lambda runs: draw_against_seconds(runs, "eval_seconds", "seconds of evaluation")),
)  # fmt: skip


def draw_all(runs: Sequence[Run]) -> dict[str, bytes]:
    """Returns file name to PNG for every plot that has data."""
    return pngs({plot.file: functools.partial(plot.draw, runs) for plot in (*COMPARISON_PLOTS, *PLOTS)})


def pngs(drawings: Mapping[str, Callable[[], Figure | None]]) -> dict[str, bytes]:
    """Returns file name to PNG for every drawing that has data."""
    with matplotlib.rc_context(PLOT_STYLE):
        figures = {file: draw() for file, draw in drawings.items()}
        return {file: png(figure) for file, figure in figures.items() if figure}


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Page
# Functions whose name ends in `_html` return markup; everything that comes from a file is escaped where it enters one.

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #23282d; --soft: #5c6670; --line: #e1e5e9; --rule: #b9c0c7; --wash: #f6f7f9; --paper: #fff;
        --warn: #fff8e6; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6e9; --soft: #a3abb3; --line: #343a41; --rule: #59626b; --wash: #23282d; --paper: #181b1f; --warn: #33290f; --link: #8ab8ec; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: var(--paper);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
a { color: var(--link); }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 0.7rem; font-size: 1.2rem; }
p.stamp, figcaption { color: var(--soft); font-size: 0.88rem; }
p.stamp { margin: 0.3rem 0 1.4rem; }
.notices { margin: 1.2rem 0; padding: 0.75rem 1rem; border-left: 4px solid #d9910a; background: var(--warn); border-radius: 0 4px 4px 0; }
.notices p { margin: 0.2rem 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 0.8rem; margin: 1.4rem 0; }
.card { padding: 0.9rem 1.1rem; background: var(--wash); border-radius: 8px; }
.card .name { color: var(--soft); font-size: 0.85rem; }
.card .value { font-size: 1.75rem; font-weight: 600; line-height: 1.3; letter-spacing: -0.01em; font-variant-numeric: tabular-nums; }
.card .rest { color: var(--soft); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; min-width: 55%; }
th, td { padding: 0.3rem 0.9rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child { padding-left: 0.2rem; text-align: left; }
tbody th { font-weight: 400; white-space: nowrap; }
tbody td { min-width: 6.5rem; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid var(--rule); vertical-align: bottom; overflow-wrap: anywhere; }
tr.group th { padding-top: 1.1rem; color: var(--soft); font-size: 0.78rem; font-weight: 600; letter-spacing: 0.06em; text-transform: uppercase; }
td.best { font-weight: 700; }
td.best::after { content: " ★"; color: #d9910a; }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); column-gap: 2.5rem; }
.groups table { width: 100%; }
.dot { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.45em; border-radius: 50%; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
figcaption { margin-top: 0.45rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3rem; padding-top: 0.8rem; border-top: 1px solid var(--line); color: var(--soft); font-size: 0.85rem; }
"""
# Refuses every script and every outside resource, should one ever slip into the page.
PAGE_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


BEST_MARK = ' class="best"'


class Row(NamedTuple):
    """One line of the table of results."""

    name: str
    value: Callable[[Run], str]


def last_validation(run: Run) -> str:
    steps, scores = series(run.vals, "step", "val_bpb")
    return f"{bpb(scores[-1])} at step {count(steps[-1])}" if len(scores) else ABSENT


def quantisation_cost(run: Run) -> str:
    """Returns the bits per byte lost between the trained weights and the artifact, with sign."""
    cost = number(run.result, "quant_val_bpb") - number(run.result, "pre_quant_val_bpb")
    return ABSENT if math.isnan(cost) else f"{cost:+.4f}"


def cap_share(run: Run) -> str:
    share = run.size("bytes_total") / run.size("bytes_cap") if run.size("bytes_cap") else math.nan
    return ABSENT if math.isnan(share) else f"{share:.2%}" + (" (over)" if run.over_cap else "")


def distance(run: Run, best: float) -> str:
    """Returns how far the run's final score is from the best one."""
    if math.isnan(run.final_bpb):
        return ABSENT
    return "over the cap" if run.over_cap else f"{run.final_bpb - best:+.4f}"


def from_result(key: str, show: Callable[[float], str]) -> Callable[[Run], str]:
    """Returns a column that shows a number of the result; before there is one, that of the last step (which shares some names)."""

    def value(run: Run) -> str:
        final = number(run.result, key)
        return show(number(run.steps[-1], key) if math.isnan(final) and run.steps else final)

    return value


def score_row(name: str) -> Row:
    """Returns the row of one evaluation: its score and how long it took."""

    def value(run: Run) -> str:
        score = run.scores.get(name)
        seconds = number(score, "seconds")
        return bpb(number(score, "val_bpb")) + ("" if math.isnan(seconds) else f" in {duration(seconds)}")

    return Row(f"evaluation: {name}", value)


def short_hash(run: Run, key: str) -> str:
    return text(run.env, key)[:12]


def result_groups(runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Returns the rows of the table of results, by group."""
    best = best_bpb(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    behind = [Row("behind the best", lambda run: distance(run, best))]
    return {
        "Score (bits per byte)": [
            Row("final score", lambda run: bpb(run.final_bpb)),
            *(behind if not math.isnan(best) else []),
            Row("final evaluation", lambda run: setting(run, "FINAL_EVAL")),
            *(score_row(name) for name in names),
            Row("before quantisation", lambda run: bpb(number(run.result, "pre_quant_val_bpb"))),
            Row("after quantisation", lambda run: bpb(number(run.result, "quant_val_bpb"))),
            Row("cost of quantisation", quantisation_cost),
            Row("last validation in training", last_validation),
            Row("final loss (nats per token)", lambda run: bpb(number(run.result, "val_loss"))),
        ],
        "Size (bytes)": [
            Row("total", lambda run: count(run.size("bytes_total"))),
            Row("cap", lambda run: count(run.size("bytes_cap"))),
            Row("share of the cap", cap_share),
            Row("model", lambda run: count(run.size("bytes_model"))),
            Row("code", lambda run: count(run.size("bytes_code"))),
            Row("parameters", lambda run: count(number(run.result, "params"))),
        ],
        "Training": [
            Row("status", lambda run: run.status),
            Row("steps", lambda run: count(number(run.result, "steps") if run.result else number(run.steps[-1], "step") if run.steps else math.nan)),
            Row("training time", from_result("train_seconds", duration)),
            Row("evaluation time", lambda run: duration(number(run.result, "eval_seconds"))),
            Row("time per step (ms)", from_result("step_ms", lambda ms: decimals(ms, 1))),
            Row("tokens per second", from_result("tokens_per_second", count)),
        ],
        "Origin": [
            Row("data (DATA_PATH)", lambda run: setting(run, "DATA_PATH")),
            Row("preset", lambda run: text(run.result or run.config, "preset")),
            Row("seed", seed_of),
            Row("device", lambda run: hardware(run, "device")),
            Row("ranks", lambda run: hardware(run, "world_size")),
            Row("torch", lambda run: hardware(run, "torch")),
            Row("commit", lambda run: short_hash(run, "commit")),
            Row("source sha256", lambda run: short_hash(run, "source_sha256")),
        ],
    }


def run_headers_html(runs: Sequence[Run], span: int = 1) -> str:
    """Returns one header cell per run, with the run's colour in the plots."""
    width = f' colspan="{span}"' if span > 1 else ""
    dots = (f'<span class="dot" style="background:{colour(index)}"></span>' for index in range(len(runs)))
    return "".join(f"<th{width}>{dot}{escape(run.label)}</th>" for dot, run in zip(dots, runs, strict=True))


def table_html(head: str, rows: Iterable[str]) -> str:
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def row_html(name: str, values: Iterable[str], best: str | None = None) -> str:
    """Returns a table row; the cells equal to `best` are marked."""
    cells = "".join(f"<td{BEST_MARK if value == best else ''}>{escape(value)}</td>" for value in values)
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def results_html(runs: Sequence[Run]) -> str:
    """Returns the table of results, one column per run; a single run's groups stand side by side instead."""
    best = best_bpb(runs)
    groups: list[list[str]] = []
    for name, rows in result_groups(runs).items():
        marks = {"final score": bpb(best)} if not math.isnan(best) else {}
        title = f'<tr class="group"><th colspan="{len(runs) + 1}">{escape(name)}</th></tr>'
        groups.append([title, *(row_html(row.name, [row.value(run) for run in runs], marks.get(row.name)) for row in rows)])
    if len(runs) == 1:
        return f'<div class="groups">{"".join(table_html("", rows) for rows in groups)}</div>'
    return table_html(f"<tr><th></th>{run_headers_html(runs)}</tr>", [row for rows in groups for row in rows])


def cards_html(run: Run) -> str:
    """Returns the numbers of a single run that its reader looks for first; nothing before it has a result."""
    if not run.result:
        return ""
    total, cap = run.size("bytes_total"), run.size("bytes_cap")
    steps, step_ms = number(run.result, "steps"), number(run.result, "step_ms")
    cards = (
        ("Final score", bpb(run.final_bpb), f"bits per byte, {setting(run, 'FINAL_EVAL')} evaluation"),
        ("Size", count(total), f"bytes of {count(cap)} ({cap_share(run)})"),
        (
            "Training",
            duration(number(run.result, "train_seconds")),
            f"{count(steps)} steps, {hardware(run, 'world_size')} x {hardware(run, 'device')}",
        ),
        ("Throughput", count(number(run.result, "tokens_per_second")), f"tokens per second, {decimals(step_ms, 1)} ms a step"),
    )
    boxes = "".join(
        f'<div class="card"><div class="name">{name}</div><div class="value">{escape(value)}</div><div class="rest">{escape(rest)}</div></div>'
        for name, value, rest in cards
    )
    return f'<div class="cards">{boxes}</div>'


def roles_html(runs: Sequence[Run]) -> str:
    """Returns the exact numbers behind the size plot."""
    sized = [run for run in runs if run.roles]
    if not sized:
        return ""
    by_name = [{role.name: role for role in run.roles} for run in runs]
    missing = Role("", math.nan, math.nan, math.nan)
    rows = []
    for name in role_names(sized):
        roles = [named.get(name, missing) for named in by_name]
        rows.append(row_html(name, [cell for role in roles for cell in (count(role.params), count(role.bytes), decimals(role.bits_per_weight, 2))]))
    units = "<th>parameters</th><th>bytes</th><th>bits per weight</th>" * len(runs)
    head = f"<tr><th></th>{run_headers_html(runs, span=3)}</tr><tr><th>role</th>{units}</tr>"
    return f"<details><summary>Exact sizes</summary>{table_html(head, rows)}</details>"


def settings_html(runs: Sequence[Run]) -> str:
    """Returns what the runs were asked to do: the settings that differ, and all of them folded away."""
    names = sorted({name for run in runs for name in run.settings})
    if not names:
        return "<h2>Settings</h2><p>No settings were recorded.</p>"
    head = f"<tr><th>setting</th>{run_headers_html(runs)}</tr>"
    rows = {name: row_html(name, [setting(run, name) for run in runs]) for name in names}
    differing = [rows[name] for name in names if name != "RUN_ID" and differ(setting(run, name) for run in runs)]
    visible = f"<h2>Settings that differ</h2>{table_html(head, differing)}" if differing else "<h2>Settings</h2>"
    return f"{visible}<details><summary>All {len(names)} settings</summary>{table_html(head, rows.values())}</details>"


def differences_html(runs: Sequence[Run]) -> str:
    """Returns the exact numbers behind the plot of differences."""
    base, found = differences(runs)
    if not found:
        return ""
    rows = [row_html(each.label, [f"{each.mean:+.6f}", decimals(each.error, 6), str(len(each.values))]) for each in found]
    head = "<tr><th>configuration</th><th>difference (bpb)</th><th>standard error</th><th>seeds</th></tr>"
    return f"<details><summary>Exact differences to {escape(base)}</summary>{table_html(head, rows)}</details>"


def notices_html(notices: Iterable[str]) -> str:
    lines = "".join(f"<p>{escape(notice)}</p>" for notice in notices)
    return f'<div class="notices" role="note">{lines}</div>' if lines else ""


def plot_html(plot: Plot, images: dict[str, bytes]) -> str:
    """Returns the section of one plot, with the image inside the page."""
    if plot.file not in images:
        return f"<h2>{plot.title}</h2><p>Nothing was logged for this plot.</p>"
    return figure_html(plot.title, plot.caption, images[plot.file])


def figure_html(title: str, caption: str, image: bytes) -> str:
    """Returns a section with a PNG that is inside the page."""
    data = base64.b64encode(image).decode("ascii")
    return f'<h2>{title}</h2><figure><img alt="{title}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def page_html(runs: Sequence[Run], images: dict[str, bytes], unread: Sequence[str]) -> str:
    """Returns the whole page; `unread` are the reasons why other folders are not in it."""
    title = f"Run report: {runs[0].label}" if len(runs) == 1 else f"Run report: {len(runs)} runs compared"
    several = len(runs) > 1
    notices = [f"Not reported: {one_line(reason)}." for reason in unread]
    notices += comparison_notices(runs)
    notices += [f"{run.label}: {notice}" if several else notice for run in runs for notice in run.notices]
    body = (
        notices_html(notices),
        "" if several else cards_html(runs[0]),
        "<h2>Results</h2>",
        results_html(runs),
        *(plot_html(plot, images) for plot in COMPARISON_PLOTS if plot.file in images),
        *(plot_html(plot, images) for plot in PLOTS),
        differences_html(runs),
        roles_html(runs),
        settings_html(runs),
    )
    return document_html(title, body, f"records/report.py from {listing(str(run.folder / 'run.jsonl') for run in runs)}")


def document_html(title: str, body: Iterable[str], made_by: str, style: str = "") -> str:
    """Returns a page with its headline, time and footer around `body`."""
    generated = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY}"><title>{escape(title)}</title><style>{PAGE_STYLE}{style}</style>'
    )
    lines = "\n".join((f'<h1>{escape(title)}</h1><p class="stamp">Generated {generated}</p>', *body, f"<footer>Made by {escape(made_by)}.</footer>"))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{lines}\n</body>\n</html>\n'


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Command


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Returns the runs that could be read, each folder once, and for every other folder the reason."""
    runs: list[Run] = []
    unread: list[str] = []
    distinct: dict[Path, Path] = {}
    for folder in folders:
        distinct.setdefault(folder.resolve(), folder)
    for folder in distinct.values():
        try:
            runs.append(read_run(folder))
        except (ValueError, OSError) as error:
            unread.append(str(error))
    label_runs(runs)
    return runs, unread


def write_report(runs: Sequence[Run], unread: Sequence[str], output: Path) -> list[Path]:
    """Returns the files written to `output`. Removes a plot that an earlier report left there and this one does not have. Raises OSError."""
    images = draw_all(runs)
    page = page_html(runs, images, unread).encode("utf-8")
    return write_files(output, {"report.html": page, **images}, [plot.file for plot in (*PLOTS, *COMPARISON_PLOTS)])


def write_files(output: Path, files: Mapping[str, bytes], known: Iterable[str]) -> list[Path]:
    """Returns the paths of `files`, written to `output`. Removes those `known` files that an earlier call left and this one lacks. Raises OSError."""
    output.mkdir(parents=True, exist_ok=True)
    for file in known:
        if file not in files:
            (output / file).unlink(missing_ok=True)
    for file, content in files.items():
        write_file(output / file, content)
    return [output / file for file in files]


def write_file(path: Path, content: bytes) -> None:
    """Writes the file as a whole or not at all. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, after writing what was asked for and printing its files."""
    parser = argparse.ArgumentParser(description="Turn run folders, or the records of the public challenge, into one HTML page and PNG plots.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_FOLDER", help="a folder runs/<RUN_ID> that holds run.jsonl")
    parser.add_argument("--import", type=Path, metavar="CHECKOUT", dest="checkout", help="a copy of the challenge's repository: its records and ours")
    parser.add_argument("--table", action="store_true", help="write the table of our records in records/README.md again")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: the folder report inside the first run; runs/leaderboard)")
    options = parser.parse_args(arguments)
    if [bool(options.folders), options.checkout is not None, options.table].count(True) != 1:
        parser.error("give run folders, or --import CHECKOUT, or --table")
    if options.table and options.output:
        parser.error("--output: --table writes records/README.md")
    try:
        if options.folders:
            return report_runs(options.folders, options.output)
        import leaderboard  # it builds on this module

        return leaderboard.write_table() if options.table else leaderboard.import_records(options.checkout, options.output or Path("runs/leaderboard"))
    except OSError as error:
        print(f"report.py: cannot write: {error}", file=sys.stderr)
        return 2


def report_runs(folders: Sequence[Path], output: Path | None) -> int:
    """Returns the exit code, after reporting every run that can be read. Raises OSError."""
    runs, unread = read_runs(folders)
    for reason in unread:
        print(f"report.py: {one_line(reason)}", file=sys.stderr)
    if not runs:
        return 2
    for path in write_report(runs, unread, output or runs[0].folder / "report"):
        print(path)
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(main())
