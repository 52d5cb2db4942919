"""Reads record folders, the public challenge's and ours, into one table: its page and plots, records.csv, records.json, records/README.md.

    python records/report.py --import CHECKOUT [--output DIR]
    python records/report.py --table

A record folder is `records/track_*/YYYY-MM-DD_Name/`. People wrote its `submission.json` with many schemas, or not at all; so each number is looked
for in the results of its seeds, then under each name it has been given, then in README.md, then in the logs, and the table says where it was found.
Whatever could not be read is listed with the reason, and never stops the rest.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date, timedelta
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import report
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

README = Path(__file__).resolve().parent / "README.md"
PUBLIC_ADDRESS = "https://github.com/openai/parameter-golf/tree/main/"
RANKED_TRACK = "10min_16mb"
BYTES_CAP = 16_000_000
SECONDS_CAP = 600
MOST_BYTES = 16_000_000  # of a file; logs have some 100 KB
MEAN_TOLERANCE = 0.0005  # bpb by which a stated mean may differ from that of its seeds: rounding, or one seed left out


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Records
# What a folder says of itself. Numbers that nothing states are NaN, texts are "".


class Quantity(NamedTuple):
    """A number of a record: where it may be stated, and between which ends it is possible."""

    seed_keys: tuple[str, ...]  # in the result of each seed; `_ms` is taken as milliseconds
    keys: tuple[str, ...]  # in submission.json
    log_lines: tuple[tuple[str, float], ...]  # patterns, and what their number is multiplied with; the last line that matches the first of them counts
    low: float
    high: float
    of_seeds: Callable[[Sequence[float]], float] = statistics.fmean


QUANTITIES = {
    "bpb": Quantity(
        ("val_bpb",), ("val_bpb", "mean_val_bpb", "mean_bpb"),
        ((r"^(?!step|diagnostic|\d).*\bval_bpb: ?(\d+\.\d+)", 1.0),), 0.1, 20.0,
    ),
    # The cap holds for every seed, so the largest counts.
    "bytes_total": Quantity(
        ("bytes_total", "artifact_bytes"), ("bytes_total", "artifact_bytes_max", "artifact_bytes_mean", "artifact_bytes", "artifact_size_bytes"),
        ((r"^Total submission size [^:\n]+: (\d+) bytes", 1.0), (r"^budget:(\d+)/", 1.0)), 1.0, 1e12, max,
    ),
    "train_seconds": Quantity(
        ("train_time_s", "train_seconds", "train_time_ms"), ("wallclock_seconds", "train_time_s_mean", "train_time_seconds"),
        ((r"\btrain_time: ?(\d+)ms", 0.001),), 0.001, 1e8,
    ),
    "eval_seconds": Quantity(
        ("eval_time_s", "eval_seconds", "ttt_eval_time_s", "eval_time_ms", "ttt_time_ms"), ("eval_time_seconds", "eval_seconds", "eval_time_s_mean"),
        ((r"^total_eval_time: ?([\d.]+)s", 1.0), (r"\beval_time: ?([\d.]+)ms", 0.001)), 0.001, 1e8,
    ),
}  # fmt: skip
STATED_STD = ("val_bpb_std", "std_bpb")
README_BPB = re.compile(r"val[_ ]?bpb\W{1,8}(\d\.\d{2,})", re.IGNORECASE)
README_LINES = 40  # its claim stands at the top; further down are those of others
SEED_IN_NAME = re.compile(r"seed[_-]?\d+", re.IGNORECASE)
SUMMARY_KEYS = ("name", "run_name", "blurb", "technique_summary", "techniques", "architecture", "our_contribution")


@dataclass
class Record:
    """One record folder as one row."""

    folder: str  # from the root of its repository
    track: str = ""
    date: str = ""  # YYYY-MM-DD
    name: str = ""
    author: str = ""
    bpb: float = math.nan
    bpb_std: float = math.nan
    seeds: float = math.nan
    bytes_total: float = math.nan
    train_seconds: float = math.nan
    eval_seconds: float = math.nan
    techniques: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)  # of each number, where it is not simply stated in submission.json
    problems: list[str] = field(default_factory=list)  # what of the folder could not be read, or contradicts itself
    ours: bool = False
    challenge_text: bool = True  # whether it scored the challenge's validation split

    @property
    def over_cap(self) -> bool:
        return self.bytes_total > BYTES_CAP

    @property
    def ranked(self) -> bool:
        """Whether it competes: in the ten-minute track and within the byte cap, as far as its bytes are known."""
        return self.track == RANKED_TRACK and not self.over_cap


class Unread(NamedTuple):
    """A folder that is no row, and why."""

    folder: str
    reason: str


def read_checkout(root: Path) -> tuple[list[Record], list[Unread]]:
    """Returns `read_folders` of a copy of the challenge's repository, or of its folder records. Raises ValueError where it holds no record."""
    records, unread = read_folders(root / "records" if (root / "records").is_dir() else root)
    if not records and not unread:
        raise ValueError(f"{root}: no folder records/track_*/*; expected a copy of the challenge: git clone https://github.com/openai/parameter-golf")
    return records, unread


def own_records() -> tuple[list[Record], list[Unread]]:
    """Returns `read_folders` of this repository."""
    return read_folders(README.parent, ours=True)


def read_folders(place: Path, ours: bool = False) -> tuple[list[Record], list[Unread]]:
    """Returns a row for every record folder in the tracks of `place` that states a score, and for every other one the reason."""
    records, unread = [], []
    # Links that lead nowhere are taken along, so that they are reported.
    for folder in sorted(path for path in place.glob("track_*/*") if path.is_dir() or path.is_symlink()):
        name = "records/" + folder.relative_to(place).as_posix()
        try:
            if not lies_in(folder, place):
                raise ValueError("a link that leads out of the records")
            records.append(read_record(folder, name, ours))
        except (ValueError, OSError) as error:
            unread.append(Unread(name, report.one_line(str(error))))
    return records, unread


def read_record(folder: Path, name: str, ours: bool) -> Record:
    """Returns the row of a record folder, which the table calls `name`. Raises ValueError or OSError where it states no score."""
    record = Record(name, folder.parent.name.removeprefix("track_"), ours=ours)
    content = read_submission(folder, record.problems)
    readme = read_optional(folder / "README.md", record.problems)
    logs = [log for path in final_logs(folder) if (log := read_optional(path, record.problems))]
    fill_numbers(record, content, readme, logs)
    if math.isnan(record.bpb):
        raise ValueError("; ".join([*record.problems, "no val_bpb in submission.json, at the top of README.md or in the logs of seeds (or the only log)"]))
    describe(record, content, folder.name)
    # records/submit.py finds out whether it was the whole split; the public records are taken at their word.
    record.challenge_text = not ours or report.mapping(report.mapping(content, "compliance"), "full_validation_split").get("holds") is True
    titles = re.findall(r"^# .*", readme, re.MULTILINE)[:1]
    record.techniques = techniques_in(folder.name, *titles, *(json.dumps(content.get(key, ""), ensure_ascii=False) for key in SUMMARY_KEYS))
    if record.over_cap and record.track == RANKED_TRACK:
        record.problems.append(f"{report.count(record.bytes_total)} bytes are over the cap of {report.count(BYTES_CAP)}")
    record.problems += [f"{report.one_line(path.name)}: empty" for path in sorted(folder.iterdir()) if path.name != "submission.json" and is_empty(path)]
    return record


def is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def read_submission(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Returns submission.json, or the only file named like it; {} where there is none that can be used, with the reason added to `problems`."""
    paths = [folder / "submission.json"]
    if not paths[0].exists() and not paths[0].is_symlink():
        paths = sorted(folder.glob("submission*.json"))
    if len(paths) != 1:
        problems.append("no submission.json" + (f", but {report.listing(path.name for path in paths)}" if paths else ""))
        return {}
    name, known = report.one_line(paths[0].name), len(problems)
    text = read_optional(paths[0], problems)
    if not text.strip():
        problems += [f"{name}: empty"] if len(problems) == known else []
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}: not valid JSON ({error})")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{name}: expected an object, got {type(content).__name__}")
        return {}
    return content


def read_optional(path: Path, problems: list[str]) -> str:
    """Returns a file of a record as text; "" where there is none or it cannot be read, with the reason added to `problems`."""
    name = report.one_line(path.name)
    try:
        if not lies_in(path, path.parent):
            problems.append(f"{name}: a link that leads out of the folder")
            return ""
        if not path.exists():
            return ""
        if not path.is_file():
            problems.append(f"{name}: not a file")
            return ""
        size = path.stat().st_size
        if size > MOST_BYTES:
            problems.append(f"{name}: {report.count(size)} bytes, more than the {report.count(MOST_BYTES)} that a file of a record may have")
            return ""
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"{name}: cannot be read: {error.strerror}")
        return ""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        problems.append(f"{name}: not UTF-8; what could not be read is replaced")
        return content.decode("utf-8", errors="replace")


def lies_in(path: Path, folder: Path) -> bool:
    """Returns whether `path` is in `folder` after every link is followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def final_logs(folder: Path) -> list[Path]:
    """Returns the logs of the runs that a record stands for: those named after a seed, or the only one; of others nobody can say which counts."""
    logs = sorted(path for path in folder.iterdir() if path.suffix == ".log" or (path.suffix == ".txt" and re.search("log|train", path.name.lower())))
    seeds = [path for path in logs if SEED_IN_NAME.search(path.name)]
    return seeds or (logs if len(logs) == 1 else [])


def fill_numbers(record: Record, content: dict[str, Any], readme: str, logs: Sequence[str]) -> None:
    """Fills in every number that is stated anywhere, and where it was found."""
    results = seed_results(content)
    for name, quantity in QUANTITIES.items():
        value, source = find(quantity, results, content, logs, record.problems)
        if name == "bpb" and source in ("logs", "nowhere"):
            claims = [float(claim) for claim in README_BPB.findall("\n".join(readme.split("\n")[:README_LINES])) if possible(quantity, float(claim))]
            value, source = (claims[0], "README.md") if claims else (value, source)
        setattr(record, name, value)
        if source in ("seeds", "README.md", "logs"):
            record.sources[name] = source
    claim = report.number(content, "val_bpb")
    if abs(record.bpb - claim) > MEAN_TOLERANCE:
        record.problems.append(f"val_bpb {claim:.5f} is not the mean of its seeds, {record.bpb:.5f}")
    scores = [score for score in (as_number(result.get("val_bpb")) for result in results) if possible(QUANTITIES["bpb"], score)]
    seeds = content.get("seeds")
    listed = float(len(seeds)) if isinstance(seeds, list | dict) and seeds else 1.0 if "seed" in content else as_number(content.get("n_seeds"))
    record.seeds = float(len(scores)) if scores else listed
    record.bpb_std = next((value for key in STATED_STD if 0 <= (value := as_number(content.get(key))) < 1), math.nan)
    if math.isnan(record.bpb_std) and len(scores) > 1:
        record.bpb_std, record.sources["bpb_std"] = statistics.stdev(scores), "seeds"


def seed_results(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the result of each seed, [] where they are not given one by one."""
    for key in ("seed_results", "seeds"):
        value = content.get(key)
        results = list(value.values()) if isinstance(value, dict) else value
        if isinstance(results, list) and results and all(isinstance(result, dict) for result in results):
            return results
    scores = content.get("seed_scores")
    return [{"val_bpb": score} for score in scores] if isinstance(scores, list) else []


def find(
    quantity: Quantity, results: Sequence[dict[str, Any]], content: dict[str, Any], logs: Sequence[str], problems: list[str]
) -> tuple[float, str]:
    """Returns a number and its source: seeds, submission.json, logs, or nowhere (NaN)."""
    for key in quantity.seed_keys:
        values = [stated(quantity, result, key, problems) for result in results]
        if values and not any(map(math.isnan, values)):
            return quantity.of_seeds(values), "seeds"
    for key in quantity.keys:
        value = stated(quantity, content, key, problems)
        if not math.isnan(value):
            return value, "submission.json"
    values = [value for log in logs if possible(quantity, value := logged(quantity, log))]
    return (quantity.of_seeds(values), "logs") if values else (math.nan, "nowhere")


def stated(quantity: Quantity, content: dict[str, Any], key: str, problems: list[str]) -> float:
    """Returns a number, a number written as text, or the mean of a list of numbers; NaN for anything else, with the reason added to `problems`."""
    value = content.get(key)
    if value is None:
        return math.nan
    numbers = [as_number(item) for item in value] if isinstance(value, list) and value else [as_number(value)]
    result = statistics.fmean(numbers) * (0.001 if key.endswith("_ms") else 1.0)
    if possible(quantity, result):
        return result
    problems.append(f"{key}: {shown(report.one_line(value), 40)} is no number between {quantity.low:g} and {quantity.high:g}")
    return math.nan


def as_number(value: object) -> float:
    """Returns a finite number, also one that is written as text; otherwise NaN."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return math.nan
    return report.number({"value": value}, "value")


def possible(quantity: Quantity, value: float) -> bool:
    return quantity.low <= value <= quantity.high


def logged(quantity: Quantity, log: str) -> float:
    """Returns the last such number of a log, NaN where there is none."""
    for pattern, factor in quantity.log_lines:
        found = re.findall(pattern, log, re.MULTILINE)
        if found:
            return as_number(found[-1]) * factor
    return math.nan


def describe(record: Record, content: dict[str, Any], folder: str) -> None:
    """Fills in who made the record, when, and what it is called."""
    given, named = str(content.get("date", ""))[:10], folder[:10]
    record.date = next((day for day in (given, named) if is_date(day)), "")
    names = (content.get(key) for key in ("name", "run_name"))
    record.name = next((shown(name) for name in names if isinstance(name, str) and name.strip()), shown(folder))
    authors = (content.get(key) for key in ("author", "github_id"))
    record.author = next((shown(author) for author in authors if isinstance(author, str) and author.strip()), "")


def shown(text: str, most: int = 400) -> str:
    """Returns one line of at most so many characters."""
    line = report.one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"


def is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Techniques
# Found by their words in what a record says of itself: its folder's name, its name, its summaries and the title of README.md. The rest of README.md is
# left out, for it tells as much of what was removed, failed or belongs to others.

TECHNIQUES = {
    "sliding-window evaluation": r"sliding|stride.?64",
    "test-time training": r"ttt|test.time train",
    "LoRA test-time training": r"lora.{0,3}ttt|lora test.time|per.document lora",
    "phased test-time training": r"phas(ed|ing).{0,12}ttt|multi.?phase",
    "6-bit and narrower weights": r"int ?[456]\b|int ?[456](?=[a-z ])|all.?int6",
    "1-bit and ternary weights": r"ternary|binary|\b1.bit|xnor|bitnet",
    "quantisation-aware training": r"qat\b|\bste\b|quanti[sz]ation.aware",
    "GPTQ": r"gptq(?!.?lite)",
    "GPTQ-lite": r"gptq.?lite",
    "SDClip": r"sd.?clip",
    "low-rank quantisation error (LQER)": r"lqer",
    "16-bit embedding": r"fp16.{0,8}emb",
    "stronger byte coder": r"zstd|brotli|lzma|lrzip|per.group",
    "SmearGate": r"smear",
    "BigramHash": r"bigram",
    "exclusive self-attention (XSA)": r"xsa",
    "attention gate": r"gated ?att|att(entio)?n ?(output )?gate|sparse ?(attn )?gate|quant ?gate",
    "variable-length attention": r"var.?len",
    "partial RoPE": r"partial ?rope",
    "layer-norm scale": r"(ln|layer.?norm).?scale",
    "U-Net skips": r"u.?net",
    "depth recurrence": r"recur|loop ?[2-9]|looped",
    "parallel residuals": r"par(allel)? ?resid",
    "value embedding or residual": r"value.(embed|resid)|\bve\d",
    "leaky ReLU squared": r"leaky",
    "SwiGLU": r"swiglu",
    "MLP of 3 or 4 times the width": r"mlp ?(mult)? ?[34](\.0)?x?\b|\b[34](\.0)?x mlp|mlp[34]x",
    "vocabulary of 4096": r"(sp|vocab|bpe) ?4096|4096.?(vocab|bpe)",
    "vocabulary of 8192": r"(sp|vocab|bpe) ?8192|8192.?(vocab|bpe)",
    "CaseOps": r"case ?ops",
    "longer training context": r"seq(uence|len)? ?(len(gth)?)? ?=?(2048|4096)|(2048|4096).{0,10}context|long ?context",
    "orthogonal initialisation": r"ortho(gonal)? ?init",
    "Muon weight decay": r"muon ?(wd|weight decay)|\bwd ?=? ?0?\.\d|\bwd ?0\d",
    "Muon with equalised rows": r"muon ?eq",
    "Polar Express": r"polar",
    "parallel Muon": r"parallel muon",
    "QK gain": r"qk.?gain|qk ?5",
    "weight averaging (EMA)": r"\bema\b",
    "weight averaging (SWA)": r"\bswa",
    "longer warmdown": r"warmdown",
    "fused kernels": r"fused|triton|cutlass|flash.?attention 3|fa3",
    "state-space layers": r"mamba|\bssm\b|\bgdn\b|gated delta",
}  # fmt: skip


# A clause like "without TTT": up to where the next thing is named.
NEGATED = re.compile(r"\b(no|not|without|w/o|non|removed?|removes|drops|dropped|instead of|replaces|replacing) [^,;.+|()\n]*")


def techniques_in(*texts: str) -> list[str]:
    """Returns the techniques that `texts` claim."""
    # Folder names join words by underscores and capitals, and each is to count as a word.
    words = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])|[_/]", " ", "\n".join(texts)).lower()
    claims = NEGATED.sub("", words)
    return [technique for technique, pattern in TECHNIQUES.items() if re.search(pattern, claims)]


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Plots
# Only scores of the challenge's validation split share an axis.

TRACK_COLOURS = {"ours": report.COLOURS[1], "ten-minute track": report.COLOURS[0], "other track": "#5c6670"}


def kind(record: Record) -> str:
    """Returns which of TRACK_COLOURS a record has."""
    return "ours" if record.ours else "ten-minute track" if record.track == RANKED_TRACK else "other track"


def draw_scores(records: Sequence[Record], x_of: Callable[[Record], float], set_axis: Callable[[Axes], None]) -> Figure | None:
    """Returns scores against one of the records' numbers, with the line of the best that competes; None for fewer than two points."""
    known = [record for record in records if not math.isnan(x_of(record))]
    top = max((record.bpb for record in known if record.ranked), default=math.inf)
    points = [
        report.Point(x_of(record), record.bpb, shown(record.name, 32), TRACK_COLOURS[kind(record)], record.ranked) for record in known if record.bpb <= top
    ]
    figure = report.draw_frontier(points, "")
    if not figure:
        return None
    axes = figure.axes[0]
    set_axis(axes)
    # Weak records of other tracks would flatten the part that people compare.
    if len(points) < len(known):
        words = f"↑ {len(known) - len(points)} more above"
        axes.annotate(words, (0.99, 0.985), xycoords="axes fraction", ha="right", va="top", fontsize=8.5, color="#5c6670")
    for name in dict.fromkeys(kind(record) for record in known):
        axes.plot([], [], "o", color=TRACK_COLOURS[name], markerfacecolor="white" if name == "other track" else TRACK_COLOURS[name], label=name)
    report.add_legend(figure)
    report.label_points(figure, reversed(report.frontier(points)))
    return figure


def set_date_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(AutoDateLocator())
    axes.xaxis.set_major_formatter(DateFormatter("%d %b %Y"))


def set_bytes_axis(axes: Axes) -> None:
    axes.set_xlabel("bytes of code and weights")
    report.mark_limit(axes, BYTES_CAP, f"cap {report.count(BYTES_CAP)}")


def set_seconds_axis(axes: Axes, words: str) -> None:
    """Labels an axis of seconds, from one to a hundred thousand."""
    axes.set_xlabel(f"seconds of {words}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    report.mark_limit(axes, SECONDS_CAP, f"limit of the ten-minute track: {SECONDS_CAP} s")


def day_number(record: Record) -> float:
    """Returns the record's date as matplotlib counts days, NaN where it has none."""
    return float(date2num(date.fromisoformat(record.date))) if record.date else math.nan


def weeks(records: Iterable[Record]) -> dict[date, list[Record]]:
    """Returns the dated records of each week that has any, by its Monday."""
    found: dict[date, list[Record]] = {}
    for record in sorted((record for record in records if record.date), key=lambda record: record.date):
        day = date.fromisoformat(record.date)
        found.setdefault(day - timedelta(days=day.weekday()), []).append(record)
    return found


def uses(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Returns every technique that a dated record names, with its records by date, in the order in which techniques first appear."""
    dated = sorted((record for record in records if record.date), key=lambda record: record.date)
    found = {technique: [record for record in dated if technique in record.techniques] for technique in TECHNIQUES}
    return dict(sorted(((technique, users) for technique, users in found.items() if users), key=lambda item: (item[1][0].date, -len(item[1]))))


def draw_techniques(records: Sequence[Record]) -> Figure | None:
    """Returns the share of each week's records that name a technique; None where none names any."""
    by_week, used = weeks(records), uses(records)
    if not used:
        return None
    shares = np.array([[sum(record in users for record in week) / len(week) for week in by_week.values()] for users in used.values()])
    figure = Figure(figsize=(report.PLOT_INCHES[0], 1.1 + 0.25 * len(used)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share:
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "#23282d")
    axes.set_xticks(range(len(by_week)), [f"{monday:%d %b}\nn = {len(week)}" for monday, week in by_week.items()])
    axes.set_yticks(range(len(used)), list(used), fontsize=8.5)
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


class Chart(NamedTuple):
    """A plot of the page and the file it is also written to."""

    file: str
    title: str
    caption: str
    draw: Callable[[Sequence[Record]], Figure | None]


HOLLOW = "hollow records are of another track or over the byte cap and not on it. A label that would cover another is left out."
HISTORY_CAPTION = f"The line is the best score of the ten-minute track so far; {HOLLOW}"
LINE_CAPTION = f"The line is the best score of the ten-minute track that as much allows; {HOLLOW}"
CHARTS = (
    Chart("history.png", "Best score so far", HISTORY_CAPTION, lambda records: draw_scores(records, day_number, set_date_axis)),
    Chart("score_against_bytes.png", "Score against bytes", LINE_CAPTION, lambda records: draw_scores(records, lambda r: r.bytes_total, set_bytes_axis)),
    Chart("score_against_training.png", "Score against training time", LINE_CAPTION,
          lambda records: draw_scores(records, lambda r: r.train_seconds, lambda axes: set_seconds_axis(axes, "training"))),
    Chart("score_against_evaluation.png", "Score against evaluation time", LINE_CAPTION,
          lambda records: draw_scores(records, lambda r: r.eval_seconds, lambda axes: set_seconds_axis(axes, "evaluation"))),
    Chart("techniques.png", "Techniques over time", "Share of each week's records, by the Monday it begins with, that name a technique.", draw_techniques),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Page

LEADERBOARD_STYLE = """
body { max-width: 80rem; }
th, td { padding-left: 0.45rem; padding-right: 0.45rem; }
thead th { overflow-wrap: normal; }
tbody th { min-width: 13rem; white-space: normal; overflow-wrap: anywhere; }
tbody td { min-width: 0; white-space: nowrap; }
.words, tbody td.words { min-width: 18rem; text-align: left; white-space: normal; }
tr.ours { background: var(--wash); font-weight: 600; }
sup { color: var(--soft); font-size: 0.7em; }
"""
NUMBERS: dict[str, Callable[[float], str]] = {
    "bpb": lambda value: report.decimals(value, 5),
    "bpb_std": lambda value: report.decimals(value, 5),
    "seeds": report.count,
    "bytes_total": report.count,
    "train_seconds": lambda value: report.decimals(value, 1),
    "eval_seconds": lambda value: report.decimals(value, 1),
}
MARKED_SOURCES = {"logs": "log", "README.md": "readme"}
RECORD_HEAD = (
    "<tr><th>record</th><th>date</th><th>track</th><th>bits per byte</th><th>± sd</th><th>seeds</th><th>bytes</th>"
    "<th>training (s)</th><th>evaluation (s)</th><th class='words'>techniques</th></tr>"
)
TABLE_NOTE = (
    "Numbers are those of submission.json: of its seeds where it gives them one by one (means; of bytes the largest), otherwise as it states them. "
    "<sup>log</sup>: from the logs; <sup>readme</sup>: from the top of README.md. Some evaluation times of logs are those of the last evaluation only."
)
OTHER_TEXT = (
    "These runs scored other text than the challenge's validation split. Their scores can be compared with each other, if the text is the same, "
    "but with none above, and are in no plot."
)


def record_html(record: Record) -> str:
    """Returns the table row of a record."""
    name = escape(record.name)
    if not record.ours:
        name = f'<a href="{escape(PUBLIC_ADDRESS + quote(os.fsencode(record.folder)))}">{name}</a>'
    numbers = []
    for key, show in NUMBERS.items():
        mark = MARKED_SOURCES.get(record.sources.get(key, ""))
        numbers.append(f"<td>{show(getattr(record, key))}{f'<sup>{mark}</sup>' if mark else ''}</td>")
    row = f'<tr class="ours"><th scope="row">ours: {name}' if record.ours else f'<tr><th scope="row">{name}'
    author = f"<br><sup>{escape(record.author)}</sup>" if record.author else ""
    details = f"<td>{record.date or report.ABSENT}</td><td>{escape(record.track.removesuffix('_16mb'))}</td>"
    return f'{row}{author}</th>{details}{"".join(numbers)}<td class="words">{escape(", ".join(record.techniques))}</td></tr>'


def uses_html(records: Sequence[Record]) -> str:
    """Returns the table of techniques."""
    rows = []
    for technique, users in uses(records).items():
        best = min(users, key=lambda record: record.bpb)
        numbers = f"<td>{len(users)}</td><td>{len(users) / len(records):.0%}</td><td>{best.bpb:.4f}</td><td>{users[0].date}</td>"
        rows.append(f'<tr><th scope="row">{technique}</th>{numbers}<td class="words">{escape(users[0].name)}</td></tr>')
    head = "<tr><th>technique</th><th>records</th><th>share</th><th>best score with it</th><th>first</th><th>by</th></tr>"
    return f"<details><summary>All {len(rows)} techniques that a record names</summary>{report.table_html(head, rows)}</details>" if rows else ""


def problems_html(records: Iterable[Record], unread: Iterable[Unread]) -> str:
    """Returns the list of what could not be read, and of what contradicts itself or the cap."""
    found = [(each.folder, "no", each.reason) for each in unread]
    found += [(record.folder, "yes", problem) for record in records for problem in record.problems]
    rows = [f'<tr><th scope="row">{escape(folder)}</th><td>{row}</td><td class="words">{escape(reason)}</td></tr>' for folder, row, reason in found]
    head = '<tr><th>folder</th><th>has a row</th><th class="words">what</th></tr>'
    return "<h2>What could not be read, or does not fit</h2>" + (report.table_html(head, rows) if rows else "<p>Nothing: every file was read.</p>")


def page_html(records: Sequence[Record], unread: Sequence[Unread], images: Mapping[str, bytes], source: str) -> str:
    """Returns the whole page."""
    ordered = sorted(records, key=lambda record: (not record.ranked, record.bpb))
    compared, apart = ([record for record in ordered if record.challenge_text is wanted] for wanted in (True, False))
    public = [record for record in records if not record.ours]
    notices = [f"{len(unread)} folders could not be read; the list at the end says why."] if unread else []
    best = min((record for record in compared if record.ranked), key=lambda record: record.bpb, default=None)
    summary = f"{len(public)} public records and {len(records) - len(public)} of ours."
    summary += f" Best of the ten-minute track: {report.bpb(best.bpb)} bits per byte ({best.name}, {best.date})." if best else ""
    body = [
        report.notices_html(notices),
        f"<p>{escape(summary)}</p>",
        *(report.figure_html(chart.title, chart.caption, images[chart.file]) for chart in CHARTS if chart.file in images),
        uses_html(public),
        f"<h2>Records</h2><p>{TABLE_NOTE}</p>",
        report.table_html(RECORD_HEAD, map(record_html, compared)),
    ]
    if apart:
        body += [f"<h2>Ours, on other text</h2><p>{OTHER_TEXT}</p>", report.table_html(RECORD_HEAD, map(record_html, apart))]
    body.append(problems_html(ordered, unread))
    return report.document_html("Public records and ours", body, f"records/leaderboard.py from {report.one_line(source)}", LEADERBOARD_STYLE)


def as_json(records: Iterable[Record], unread: Iterable[Unread]) -> str:
    """Returns everything as JSON; null where a number is not known."""
    rows = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(record).items()} for record in records
    ]
    return json.dumps({"records": rows, "unread": [each._asdict() for each in unread]}, indent=1, allow_nan=False) + "\n"


def as_csv(records: Iterable[Record]) -> str:
    """Returns one line for each record; lists are joined by semicolons, numbers that are not known are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(field.name for field in fields(Record))
    for record in records:
        writer.writerow(csv_cell(value) for value in asdict(record).values())
    return buffer.getvalue()


def csv_cell(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(value)
    if isinstance(value, dict):
        return "; ".join(f"{key}={source}" for key, source in value.items())
    return "" if isinstance(value, float) and math.isnan(value) else str(value)


def import_records(checkout: Path, output: Path) -> int:
    """Returns the exit code, after writing the page, its plots, records.csv and records.json. Raises OSError where they cannot be written."""
    try:
        records, unread = read_checkout(checkout)
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    own, own_unread = own_records()
    records, unread = [*records, *own], [*unread, *own_unread]
    compared = [record for record in records if record.challenge_text]
    public = [record for record in records if not record.ours]
    images = report.pngs({chart.file: functools.partial(chart.draw, public if chart.draw is draw_techniques else compared) for chart in CHARTS})
    page = page_html(records, unread, images, str(checkout))
    tables = {"records.csv": as_csv(records).encode(), "records.json": as_json(records, unread).encode()}
    paths = report.write_files(output, {"leaderboard.html": page.encode("utf-8"), **tables, **images}, [chart.file for chart in CHARTS])
    for each in unread:
        print(f"report.py: {each.folder}: {each.reason}", file=sys.stderr)
    problems = sum(len(record.problems) for record in records)
    print(f"{len(public)} public records and {len(own)} of ours read, {len(unread)} not; {problems} problems in those read, listed on the page")
    for path in paths:
        print(path)
    return 1 if unread else 0


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Table of records/README.md

MARKERS = re.compile(r"(<!-- records -->\n).*?(<!-- /records -->)", re.DOTALL)


def table_text(records: Sequence[Record]) -> str:
    """Returns our records as a Markdown table."""
    if not records:
        return "There is none yet.\n"
    lines = ["| record | date | track | bits per byte | seeds | bytes | training | evaluation | text |", "|---|---|---|---:|---:|---:|---:|---:|---|"]
    for record in sorted(records, key=lambda record: (not record.challenge_text, record.track, record.bpb)):
        link = f"[{markdown(record.name)}]({quote(os.fsencode(record.folder.removeprefix('records/')))})"
        spread = "" if math.isnan(record.bpb_std) else f" ± {record.bpb_std:.5f}"
        numbers = [
            f"{record.bpb:.5f}{spread}", report.count(record.seeds), report.count(record.bytes_total),
            *(f"{report.decimals(seconds, 1)} s" for seconds in (record.train_seconds, record.eval_seconds)),
        ]  # fmt: skip
        text = "the challenge's validation split" if record.challenge_text else "other: comparable only with each other"
        lines.append(f"| {' | '.join([link, record.date, record.track, *numbers, text])} |")
    return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def with_table(readme: str, records: Sequence[Record]) -> str:
    """Returns the README with our table between its markers. Raises ValueError where it has none."""
    if not MARKERS.search(readme):
        raise ValueError(f"{README.name} of the records has lost the lines <!-- records --> and <!-- /records -->, between which the table belongs")
    return MARKERS.sub(lambda match: match[1] + table_text(records) + match[2], readme, count=1)


def write_table() -> int:
    """Returns the exit code, after writing our records into records/README.md. Raises OSError."""
    records, unread = own_records()
    for each in unread:
        print(f"report.py: {each.folder}: {each.reason}", file=sys.stderr)
    try:
        text = with_table(README.read_text(encoding="utf-8"), records)
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    if unread:
        print("report.py: the table is as it was; mend or remove these folders first", file=sys.stderr)
        return 2
    report.write_file(README, text.encode("utf-8"))
    print(f"{README}: {len(records)} records")
    return 0
