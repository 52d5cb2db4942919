"""Makes a record folder, as the challenge wants it, of finished runs, and refuses with reasons where it would not stand.

    python records/submit.py runs/a --track non_record_16mb --name "Rate control" --author "A. Name" --github-id aname
    python records/submit.py runs/s42 runs/s314 runs/s999 --track 10min_16mb --name "Rate control" --author "A. Name" --github-id aname --against 1.0810
    python records/submit.py --check records/track_10min_16mb/2026-05-01_Rate_control       a record folder again, as a reviewer would

Each RUN is a run folder of one seed; all of them have one configuration and one source. The folder `track_<track>/YYYY-MM-DD_Name` holds a README.md to go
on from, submission.json, requirements.txt, the packed script, its source as it ran, the first seed's artifact, and log, events and settings of every seed,
in which home directories are written as `~`.

Everything that can be checked is: sizes, seconds, seeds, what AUDIT=1 found, that the logs, the result and the settings agree, and that the packed script
is the source that ran (equal syntax trees without docstrings). Then the packed script, in the new folder, scores every artifact again, with AUDIT=1. That
takes as long as the evaluation did; `--skip-rescoring` leaves it out and the folder says so. `--check` runs the script of the folder it is given, after it
has been found equal to the source beside it: read that first.

A record of the ten minutes has to meet every rule; a non-record has to be true, and states which rules it does not meet. What is wrong is listed all at
once, and nothing is written. An existing folder is never overwritten. Exit code 0: made, or checked; 1: refused; 2: not understood.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import html
import io
import json
import lzma
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import reduce
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import compare
import report
import torch
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import shards  # noqa: E402

import train_gpt  # noqa: E402

TRACKS = ("10min_16mb", "non_record_16mb")
# The rules of the challenge.
MOST_BYTES = 16_000_000
MOST_SECONDS = 600.0  # of training, and again of evaluation
LEAST_SEEDS = 3
GPUS, GPU_NAME = 8, "H100"
VAL_DOCUMENTS = 50_000  # the first documents of its text are its validation split

# How far two scores of one artifact may lie apart. Float32 on a CPU differs by rounding alone, however many threads and ranks share the work. Bfloat16,
# another kind of device, and learning from rounded scores reach further: up to the last of the four digits in which scores are published.
ROUNDING_BPB, TOLERANCE_BPB = 2e-6, 1e-4
MOST_SOURCE_BYTES = 1 << 23

SOURCE_NAME = "train_gpt_source.py"
RUN_FILES = {"events": "run.jsonl", "log": "log.txt", "config": "config.env", "artifact": "artifact.bin", "source": "train_gpt.py", "result": "result.json"}
WRITTEN_LAST = ("README.md", "submission.json")
# Settings in which the seeds of one configuration may differ: none of them reaches a score. Of the two paths the last part counts.
FREE_SETTINGS = ("SEED", "RUN_ID", "RUNS_DIR", "RESUME", "SCORES_FILE", "DOCUMENTS_FILE", "IGNORE_ENV", "AUDIT", "AUDIT_TOKENS")
PATH_SETTINGS = ("DATA_PATH", "TOKENIZER_PATH", "RUNS_DIR", "SCORES_FILE", "DOCUMENTS_FILE", "CHECKPOINT", "ARTIFACT")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# `result` has to hold these, finite.
NUMBERS = (
    "seed", "world_size", "params", "steps", "train_seconds", "eval_seconds", "step_ms", "val_loss", "val_bpb", "pre_quant_val_bpb", "quant_val_bpb",
    "adapted_frac", "bytes_model", "bytes_code", "bytes_total", "bytes_cap",
)  # fmt: skip
AUDITED = ("audit: C1 holds", "audit: C2 holds", "audit: C3 and C4 hold")
HOMES = rf"(?<![\w./~-])(?:{re.escape(os.path.expanduser('~'))}|/home/[^/\s\"'=]+|/Users/[^/\s\"'=]+|/root)(?![\w.-])"


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Findings


class Obstacle(NamedTuple):
    """Why a folder is refused."""

    what: str
    expected: str
    mend: str


@dataclass
class Findings:
    """What was found of a submission: every obstacle, and what a reader has to know of one without any."""

    track: str
    remedy: str = ""  # for whatever is wrong, where nothing can be run again
    obstacles: list[Obstacle] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def refuse(self, what: str, expected: str, mend: str) -> None:
        """Adds an obstacle."""
        self.obstacles.append(Obstacle(what, expected, self.remedy or mend))

    def demand(self, holds: bool, what: str, expected: str, mend: str) -> None:
        """Adds what a record of the ten minutes has to meet, and another has to state."""
        if not holds and self.track == TRACKS[0]:
            self.refuse(what, expected, mend)
        elif not holds:
            self.notices.append(f"{what}; a record of the ten minutes needs {expected}.")


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Seeds
# A seed is the evidence of one run, read from its run folder or, under other names, from a record folder.


@dataclass(frozen=True)
class Seed:
    """One finished run."""

    name: str  # in messages
    number: int
    paths: Mapping[str, Path]  # as RUN_FILES
    content: Mapping[str, bytes]  # of those that could be read
    run: report.Run
    audit: list[str]  # what its last session's AUDIT=1 found
    sources: set[str]  # digests of what ran

    def value(self, key: str) -> float:
        """Returns a number of the result."""
        return report.number(self.run.result, key)

    def text(self, role: str) -> str:
        """Returns a file's text."""
        return self.content.get(role, b"").decode("utf-8", "replace")

    @property
    def settings(self) -> dict[str, Any]:
        return self.run.settings

    @property
    def final(self) -> str:
        """The evaluation that gives the score."""
        return str(self.settings.get("FINAL_EVAL"))

    @property
    def evaluation(self) -> report.Event:
        """Its event."""
        return self.run.evals.get(self.final, {})

    @property
    def hardware(self) -> str:
        return f"{self.value('world_size'):.0f} x {report.text(self.run.env, 'device_name')}"

    def command(self, *settings: str) -> str:
        """Returns the command that runs its configuration with other settings."""
        return command(int(self.value("world_size")), str(self.paths["config"]), *settings)


def command(ranks: int, config: str, *settings: str) -> str:
    """Returns the command of a run with the settings of the file `config`, as a user types it."""
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
    return shlex.join([*launcher, "train_gpt.py", f"@{config}", *settings])


def read_events(content: str) -> tuple[list[report.Event], int]:
    """Returns all events of the text of a run.jsonl, notes among them, and how many lines of it are damaged."""
    found = [report.parse_event(line) for line in content.split("\n") if line.strip()]
    events = [event for event in found if event is not None]
    return events, len(found) - len(events)


def audit_notes(events: Iterable[report.Event]) -> list[str]:
    """Returns what the audit of the last session found."""
    notes: list[str] = []
    for event in events:
        if event["event"] == "config":
            notes = []
        elif event["event"] == "note" and str(event.get("text")).startswith("audit: "):
            notes.append(report.one_line(event["text"]))
    return notes


def is_audited(notes: Sequence[str]) -> bool:
    """Returns whether these notes say that all rules hold."""
    return all(any(note.startswith(beginning) for note in notes) for beginning in AUDITED)


def read_seed(name: str, paths: Mapping[str, Path], findings: Findings) -> Seed | None:
    """Returns the seed whose files are `paths`; None, and obstacles, where there is no result to judge."""
    content: dict[str, bytes] = {}
    restore = f"restore it from a copy of the run; else train again: python train_gpt.py @{paths['config']} RUN_ID=another"
    for role, path in paths.items():
        try:
            data = path.read_bytes()
            if data:
                content[role] = data
                continue
            reason = "it is empty"
        except OSError as error:
            reason = error.strerror or type(error).__name__
        findings.refuse(f"{path}: cannot be used: {reason}", f"the {role} that a finished run leaves", restore)
    events, damaged = read_events(content.get("events", b"").decode("utf-8", "replace"))
    if not events:
        if "events" in content:
            findings.refuse(f"{paths['events']}: none of its lines is an event", "the events that a run leaves", restore)
        return None
    run = report.Run(paths["events"].parent)
    for event in events:
        run.replay(event)
    resume = f"python train_gpt.py @{paths['config']} RESUME=1 STAGES=train,export,eval"
    if not run.result:
        findings.refuse(f"{name}: {paths['events'].name} has no result: {run.status}", "a run that went through all its stages", resume)
        return None
    missing = [key for key in NUMBERS if math.isnan(report.number(run.result, key))]
    if missing:
        expected = "finite numbers, from a run with STAGES=train,export,eval"
        findings.refuse(f"{name}: the result of {paths['events'].name} does not say {', '.join(missing)}", expected, resume)
        return None
    if damaged:
        findings.notices.append(f"{name}: damaged lines of the events, as an interruption leaves them: {damaged}.")
    sessions = sum(event["event"] == "config" for event in events)
    if sessions > 1:
        findings.notices.append(f"{name}: the run was taken up again ({sessions} sessions); its seconds count all of it.")
    sources = {str(event.get("source_sha256")) for event in events if event["event"] == "env"}
    return Seed(name, int(report.number(run.result, "seed")), paths, content, run, audit_notes(events), sources)


def read_run_folder(folder: Path, findings: Findings) -> Seed | None:
    """Returns the seed of a run folder, None and obstacles where it has none."""
    if not folder.is_dir():
        findings.refuse(f"{folder}: no such folder", "a run folder, such as runs/<RUN_ID>", "ls runs")
        return None
    seed = read_seed(str(folder), {role: folder / name for role, name in RUN_FILES.items()}, findings)
    if seed and "result" in seed.content:
        check_result_file(seed, findings)
    return seed


def record_files(number: int) -> dict[str, str]:
    """Returns the names in a record folder of a seed's files, as RUN_FILES."""
    names = {"events": f"run_seed{number}.jsonl", "log": f"train_seed{number}.log", "config": f"config_seed{number}.env"}
    return {**names, "artifact": f"artifact_seed{number}.bin", "source": SOURCE_NAME}


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Rules
# What is checked without running anything.


def check_result_file(seed: Seed, findings: Findings) -> None:
    """Compares result.json with the `result` event, which is written before it."""
    path = seed.paths["result"]
    mend = f"restore it from a copy of the run; else repeat export and evaluation: {seed.command('RESUME=1')}"
    try:
        content = json.loads(seed.content["result"])
    except (ValueError, RecursionError) as error:
        findings.refuse(f"{path}: not valid JSON ({error})", "what the result event of run.jsonl says", mend)
        return
    event = {key: value for key, value in (seed.run.result or {}).items() if key not in ("event", "time")}
    keys = [key for key in {**event, **content} if event.get(key) != content.get(key)] if isinstance(content, dict) else ["everything"]
    if keys:
        findings.refuse(f"{path}: differs from the result event of run.jsonl in {report.listing(keys)}", "the same result in both", mend)


def check_seed(seed: Seed, findings: Findings) -> None:
    """Checks one run by itself."""
    result, name = seed.run.result or {}, seed.name
    again = f"score it again: {seed.command('RESUME=1')}"
    evaluation = {key: report.number(seed.evaluation, key) for key in ("val_loss", "val_bpb", "adapted_frac", "targets", "bytes")}
    differing = [key for key in ("val_loss", "val_bpb", "adapted_frac") if evaluation[key] != seed.value(key)]
    if differing:
        findings.refuse(f"{name}: the result and the {seed.final} evaluation differ in {', '.join(differing)}", "one score in both", again)
    bits = evaluation["val_loss"] * evaluation["targets"] / math.log(2) / (evaluation["bytes"] or math.nan)
    if not differing and not math.isclose(bits, seed.value("val_bpb"), rel_tol=1e-9):
        what = f"{name}: val_bpb {seed.value('val_bpb')} is not what its nats, targets and bytes come to, {bits}"
        findings.refuse(what, "val_loss * targets / ln 2 / bytes", again)
    seconds = sum(report.number(score, "seconds") for score in report.mapping(result, "scores").values() if isinstance(score, dict))
    if not math.isclose(seconds, seed.value("eval_seconds"), rel_tol=1e-9):
        findings.refuse(f"{name}: eval_seconds {seed.value('eval_seconds')} is not the sum of its evaluations, {seconds}", "their sum", again)
    if seed.value("adapted_frac") != 1:
        mend = f"a smaller TTT setting or a larger EVAL_SECONDS, then: {seed.command('RESUME=1')}"
        what = f"{name}: adapted_frac {seed.value('adapted_frac'):g}: the evaluation ran out of time, and the score depends on the speed of the machine"
        findings.refuse(what, "adapted_frac 1", mend)
    check_settings(seed, findings)
    check_log(seed, findings)
    check_source(seed, findings)
    check_artifact(seed, findings)
    for what, key, setting in (("trained", "train_seconds", "MAX_WALLCLOCK_SECONDS"), ("was evaluated", "eval_seconds", "EVAL_SECONDS or the evaluation")):
        mend = f"lower {setting}, then train again: {seed.command('RUN_ID=another')}"
        findings.demand(seed.value(key) <= MOST_SECONDS, f"{name}: {what} for {seed.value(key):.1f} s", f"at most {MOST_SECONDS:.0f} s", mend)
    is_right = seed.value("world_size") == GPUS and report.text(seed.run.env, "device") == "cuda" and GPU_NAME in seed.hardware
    findings.demand(is_right, f"{name}: ran on {seed.hardware}", f"{GPUS} x {GPU_NAME}", f"run it there: torchrun --standalone --nproc_per_node={GPUS} ...")
    mend = f"repeat export and evaluation with it: {seed.command('RESUME=1', 'AUDIT=1')}"
    findings.demand(is_audited(seed.audit), f"{name}: its log has no complete audit of C1 to C4", "what AUDIT=1 logs when all rules hold", mend)


def check_settings(seed: Seed, findings: Findings) -> None:
    """Compares config.env with the settings that the events say."""
    pairs = (line.partition("=") for line in seed.text("config").splitlines())
    written = {name: value for name, _, value in pairs if name != "RESUME"}
    ran = {name: train_gpt.format_value(value) for name, value in seed.settings.items() if name != "RESUME"}
    differing = [name for name in {**ran, **written} if ran.get(name) != written.get(name)]
    if differing and "config" in seed.content:
        mend = "restore it from a copy of the run"
        findings.refuse(f"{seed.paths['config']}: is not what ran: {report.listing(differing)} differ from the config event", "the settings that ran", mend)
    if seed.settings.get("SEED") != seed.number:
        findings.refuse(f"{seed.name}: the result is of seed {seed.number}, the settings say {seed.settings.get('SEED')}", "one seed", "submit another run")


def check_log(seed: Seed, findings: Findings) -> None:
    """Checks that the log for people tells of this result."""
    log = seed.text("log")
    needed = (f"val_bpb {seed.value('val_bpb'):.4f}", f"{seed.value('bytes_total'):,.0f}")
    if log and not all(text in log for text in needed):
        findings.refuse(f"{seed.paths['log']}: does not tell of {' and '.join(needed)}", "the log of this run", "restore it from a copy of the run")


def check_source(seed: Seed, findings: Findings) -> None:
    """Checks that the source in the folder is the one that ran, in every session."""
    digest = hashlib.sha256(seed.content.get("source", b"")).hexdigest()
    if "source" in seed.content and seed.sources != {digest}:
        ran = " and ".join(sorted(source[:12] for source in seed.sources))
        what = f"{seed.paths['source']}: edited, or not what ran: its SHA-256 begins with {digest[:12]}, that of what ran with {ran}"
        findings.refuse(what, "the source that ran, in every session", f"restore it; else train again: {seed.command('RUN_ID=another')}")


def check_artifact(seed: Seed, findings: Findings) -> None:
    """Checks that the artifact, where there is one, is whole and can be this run's (scoring it says whether it is), and the sizes that the run states."""
    data = seed.content.get("artifact")
    if data is not None:
        path, mend = seed.paths["artifact"], f"restore it from a copy of the run; else export again: {seed.command('RESUME=1')}"
        if len(data) != seed.value("bytes_model"):
            findings.refuse(f"{path}: {len(data):,} bytes, and the run wrote {seed.value('bytes_model'):,.0f}", "the artifact of this run", mend)
        try:
            header, _ = train_gpt.artifact_header(data, str(path))
            others = [name.upper() for name, value in header["settings"].items() if seed.settings.get(name.upper()) != value]
            if not others and hashlib.sha256(data).hexdigest() != report.text(seed.run.export, "artifact_sha256"):
                findings.refuse(f"{path}: not the bytes that the run wrote", "the artifact whose SHA-256 is in run.jsonl", mend)
            if others:
                findings.refuse(f"{path}: of another model: {report.listing(others)} differ from the run's", "the artifact of this run", mend)
        except ValueError as error:
            findings.refuse(str(error), "the artifact of this run, unaltered", mend)
    sizes = [seed.value(f"bytes_{part}") for part in ("model", "code", "total", "cap")]
    if sizes[0] + sizes[1] != sizes[2]:
        findings.refuse(f"{seed.name}: {sizes[0]:,.0f} + {sizes[1]:,.0f} bytes are not {sizes[2]:,.0f}", "model and code make the total", "submit another run")
    if sizes[2] > sizes[3]:
        check_cap(seed, sizes[2], int(sizes[3]), "its BYTES_CAP", findings)


def check_cap(seed: Seed, total: float, cap: int, which: str, findings: Findings) -> None:
    """Refuses a total over a cap."""
    mend = f"QUANT_SCHEME=rate fits by construction; or a smaller model: {seed.command('RUN_ID=another', 'QUANT_SCHEME=rate')}"
    if total > cap:
        findings.refuse(f"{seed.name}: code and artifact are {total:,.0f} bytes, {total - cap:,.0f} over {which}", f"at most {cap:,} bytes", mend)


def check_together(seeds: Sequence[Seed], findings: Findings) -> None:
    """Checks that the runs are seeds of one configuration, and enough of them."""
    first = seeds[0]
    repeated = [str(number) for number, times in Counter(seed.number for seed in seeds).items() if times > 1]
    if repeated:
        mend = f"leave one out, or run another: {first.command('SEED=NUMBER', 'RUN_ID=another')}"
        findings.refuse(f"seed {', '.join(repeated)}: given more than once", "a different seed in every run", mend)
    what = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
    findings.demand(len(seeds) >= LEAST_SEEDS, what, f"at least {LEAST_SEEDS}", f"run more: {first.command('SEED=NUMBER', 'RUN_ID=another')}")
    for other in seeds[1:]:
        differing = [name for name in {**first.settings, **other.settings} if one_configuration(first, name) != one_configuration(other, name)]
        if differing:
            mend = f"run the seed with the settings of the first: {first.command(f'SEED={other.number}', 'RUN_ID=another')}"
            findings.refuse(f"{other.name}: settings differ from those of {first.name}: {report.listing(differing)}", "one configuration", mend)
        if other.content.get("source") != first.content.get("source"):
            mend = f"run both with one train_gpt.py: {first.command(f'SEED={other.number}', 'RUN_ID=another')}"
            findings.refuse(f"{other.name}: another source than {first.name}", "one source", mend)
        amounts = [tuple(report.number(seed.evaluation, key) for key in ("targets", "bytes")) for seed in (first, other)]
        if amounts[0] != amounts[1]:
            what = f"{other.name}: scored {amounts[1][0]:,.0f} targets, {amounts[1][1]:,.0f} bytes; {first.name} {amounts[0][0]:,.0f} and {amounts[0][1]:,.0f}"
            findings.refuse(what, "the same text", f"score it on the same data: {other.command('RESUME=1', 'DATA_PATH=...')}")
        machines = [(seed.hardware, report.text(seed.run.env, "torch")) for seed in (first, other)]
        what = f"{other.name}: ran on {', torch '.join(machines[1])}, {first.name} on {', torch '.join(machines[0])}"
        findings.demand(machines[0] == machines[1], what, "one kind of machine", "run all seeds on one")


def one_configuration(seed: Seed, name: str) -> Any:
    """Returns the part of a setting that has to be equal in all seeds."""
    value = seed.settings.get(name)
    if name in ("DATA_PATH", "TOKENIZER_PATH"):
        return Path(str(value)).name
    return None if name in FREE_SETTINGS else value


# ----------------------------------------------------------------------------------------------------------------------------------------------
# The packed script
# It is unpacked by reading it as a syntax tree; nothing of it runs.


def unpack_script(packed: bytes) -> tuple[str, str]:
    """Returns the source inside a packed script, and the code around it as a syntax tree's text. Raises ValueError for what is none."""
    try:
        tree = ast.parse(packed)
        literals = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        payload = max(literals, key=lambda literal: len(str(literal.value)))
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
        source = unpacker.decompress(str(payload.value).encode("latin-1"), MOST_SOURCE_BYTES)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("its payload does not end where it should")
        payload.value = ""
        return source.decode("utf-8"), ast.dump(tree)
    except (SyntaxError, ValueError, lzma.LZMAError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a script of the packer ({error})") from None


def bare_tree(source: str) -> str:
    """Returns the syntax tree of `source` as text, without docstrings. Raises SyntaxError."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def packing_problem(packed: bytes, source: str) -> str:
    """Returns why `packed` is not the packed form of `source`; "" if it is."""
    try:
        inside, around = unpack_script(packed)
        if around != unpack_script(train_gpt.pack_script(source))[1]:
            return "the code around its payload is not that of the packer in train_gpt.py"
        if bare_tree(inside) != bare_tree(source):
            return "the syntax tree inside is not that of the source that ran"
    except (ValueError, SyntaxError) as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Data


class Data(NamedTuple):
    """The text that was scored, as it is on this machine."""

    folder: Path
    tokenizer: Path
    tokens: int
    documents: int
    is_published: bool  # whole, and the challenge's number of documents
    facts: dict[str, Any]  # what submission.json says of it


def read_data(seed: Seed, folder: Path | None, tokenizer: Path | None, findings: Findings, is_needed: bool) -> Data | None:
    """Returns the data of a run, at `folder` if given; None where it is not here, which is an obstacle if it is needed."""
    place = folder or here(str(seed.settings.get("DATA_PATH")))
    model = tokenizer or here(str(seed.settings.get("TOKENIZER_PATH")))
    model = place / model.name if not model.is_file() else model
    paths = shards.split_files(place, "val")
    for is_here, what, option in ((paths, f"{place}: no validation shards there", "--data FOLDER"), (model.is_file(), f"{model}: no such file", "--tokenizer")):
        if not is_here:
            mend = f"name it with {option}, or fetch the data again: python data/download.py --help"
            if is_needed:
                findings.refuse(what, "the data of the run, for its artifact to be scored again", mend)
            else:
                findings.notices.append(f"{what}: what text was scored has not been looked at.")
            return None
    found = shards.FolderReport()
    try:
        manifest = shards.read_manifest(place)
        shards.check_split(place, "val", manifest, found, lambda count: None, lambda documents: None)
    except ValueError as error:
        manifest, found.problems = {}, [str(error)]
    for problem in found.problems:
        findings.refuse(problem, "the validation split as it was published or made", f"python data/download.py --verify {shlex.quote(str(place))}")
    split = found.splits.get("val", shards.Split())
    published = report.mapping(report.mapping(manifest, "source"), "published")
    is_whole = report.number(report.mapping(published, "val"), "tokens") == split.tokens
    facts = {
        "folder": place.resolve().name, "source": report.mapping(manifest, "source") or None, "train_shards": len(shards.split_files(place, "train")),
        "val_tokens": split.tokens, "val_documents": split.documents, "val_sha256": {path.name: file_digest(path) for path in paths},
        "tokenizer": model.name, "tokenizer_sha256": file_digest(model),
    }  # fmt: skip
    return Data(place, model, split.tokens, split.documents, is_whole and split.documents == VAL_DOCUMENTS, facts)


def here(path: str) -> Path:
    """Returns a path of a run's settings on this machine: from the working folder or, where it is not there, from that of the script."""
    plain = Path(path).expanduser()
    return plain if plain.exists() else ROOT / plain


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_data(seeds: Sequence[Seed], data: Data, findings: Findings) -> None:
    """Checks that every seed scored all of the text, and that it is the challenge's."""
    for seed in seeds:
        targets = report.number(seed.evaluation, "targets")
        if targets != data.tokens - 1:
            what = f"{seed.name}: scored {targets:,.0f} targets, and {data.folder} has {data.tokens - 1:,}"
            findings.refuse(what, "every target of the validation split", "name the data of the run with --data")
    what = f"the text is not known to be the challenge's: {data.folder.resolve().name} has {data.documents:,} validation documents"
    expected = f"its whole validation split of {VAL_DOCUMENTS:,} documents, with the manifest that data/download.py writes"
    findings.demand(data.is_published, what, expected, "python data/download.py --repo-id kevclark/parameter-golf --variant sp8192")


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Scoring again


class Rescored(NamedTuple):
    """What the packed script says of an artifact."""

    scores: dict[str, Any]  # by evaluation, as in result.json
    device: str
    machine: str
    seconds: float
    audit: list[str]


def ranks_here(seed: Seed) -> int:
    """Returns how many processes score an artifact on this machine: those of the run, where it has their GPUs."""
    ranks = int(seed.value("world_size"))
    return ranks if report.text(seed.run.env, "device") == "cuda" and torch.cuda.device_count() >= ranks else 1


def scoring_settings(seed: Seed, artifact: Path, data: Data) -> dict[str, Any]:
    """Returns the settings of scoring that differ from the run's."""
    device = report.text(seed.run.env, "device")
    # All that was adapted then is adapted now, however long that takes here: no EVAL_SECONDS.
    settings = {"STAGES": "eval", "RESUME": 0, "CHECKPOINT": "", "ARTIFACT": artifact.resolve(), "EVAL_SECONDS": 0, "AUDIT": 1, "DEVICE": device}
    settings |= {"DATA_PATH": data.folder.resolve(), "TOKENIZER_PATH": data.tokenizer.resolve(), "SCORES_FILE": "", "DOCUMENTS_FILE": ""}
    if device == "cuda" and not torch.cuda.device_count():
        settings |= {"DEVICE": "cpu", "COMPILE": 0, "ATTENTION_BACKEND": "auto"}
    return settings


def score_again(folder: Path, seed: Seed, artifact: Path, data: Data, console: Console) -> Rescored:
    """Returns the scores that the packed script in `folder`, run there, gives an artifact. Raises ValueError with its last words where it fails."""
    ranks, began = ranks_here(seed), time.monotonic()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in (*train_gpt.SETTINGS, *LAUNCHER_VARIABLES)}
    with tempfile.TemporaryDirectory() as scratch:
        changed = {**scoring_settings(seed, artifact, data), "RUNS_DIR": scratch, "RUN_ID": "again"}
        arguments = [f"@{record_files(seed.number)['config']}", *(f"{name}={value}" for name, value in changed.items())]
        output, events = Path(scratch, "output.txt"), Path(scratch, "again", "run.jsonl")
        with open(output, "wb") as file:
            whole = [sys.executable, *launcher, "train_gpt.py", *arguments]
            process = subprocess.Popen(whole, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            follow(process, events, seed, console)
        finally:
            end(process)
        if process.returncode:
            said = " ".join(output.read_text(encoding="utf-8", errors="replace").split("\n")[-6:])
            raise ValueError(f"the packed script ended with code {process.returncode}: {report.one_line(without_home(said))}")
        found, _ = read_events(events.read_text(encoding="utf-8"))
    result, env = found[-1], next(event for event in found if event["event"] == "env")
    machine = f"{env['world_size']} x {env['device_name']}, torch {env['torch']}"
    return Rescored(report.mapping(result, "scores"), env["device"], machine, time.monotonic() - began, audit_notes(found))


def follow(process: subprocess.Popen[bytes], events: Path, seed: Seed, console: Console) -> None:
    """Waits for the process to end, and shows how long it will yet take."""
    label, is_said = f"scoring the artifact of seed {seed.number} again", False
    scores = report.mapping(seed.run.result, "scores")
    logged = {name: report.number(report.mapping(scores, name), "seconds") for name in ("chunked", seed.final)}
    with console.status(label) as status:
        while process.poll() is None:
            time.sleep(0.1)
            found, _ = read_events(events.read_text(encoding="utf-8")) if events.exists() else ([], 0)
            left = seconds_left(found, logged, time.time())
            if not math.isnan(left):
                status.update(f"{label}: about {report.clock(left)} left")
                if not console.is_terminal and not is_said:
                    console.print(f"{label}: about {report.clock(left)} left")
                    is_said = True


def seconds_left(events: Sequence[report.Event], logged: Mapping[str, float], now: float) -> float:
    """Returns the seconds that evaluations will yet take which took the seconds `logged`; NaN until it is known how fast this machine is."""
    pace, began = math.nan, now
    done: set[str] = set()
    current = math.nan
    for event in events:
        if event["event"] == "eval":
            done.add(str(event.get("name")))
            pace, began, current = report.number(event, "seconds") / logged.get(str(event.get("name")), math.nan), report.number(event, "time"), math.nan
        elif event["event"] == "note" and (found := re.match(r"the (\w+) evaluation will take about ([\d,]+) s", str(event.get("text")))):
            current = float(found[2].replace(",", ""))
            pace = current / logged.get(found[1], math.nan)
        elif event["event"] == "env":
            began = report.number(event, "time")
    rest = [seconds for name, seconds in logged.items() if name not in done]
    if not rest:
        return 0.0
    first = pace * rest[0] if math.isnan(current) else current
    return max(first - (now - began), 0.0) + sum(pace * seconds for seconds in rest[1:])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


def tolerance(seed: Seed, rescored: Rescored) -> float:
    """Returns how far the scores may lie apart, in bits per byte."""
    is_plain = seed.final in ("chunked", "sliding") and rescored.device == report.text(seed.run.env, "device") == "cpu"
    return ROUNDING_BPB if is_plain else TOLERANCE_BPB


def check_rescored(seed: Seed, rescored: Rescored, findings: Findings) -> None:
    """Compares the scores of an artifact with the logged ones."""
    for name in dict.fromkeys(("chunked", seed.final)):
        logged, found = (report.number(report.mapping(scores, name), "val_bpb") for scores in (report.mapping(seed.run.result, "scores"), rescored.scores))
        if not abs(found - logged) <= tolerance(seed, rescored):
            what = f"{seed.name}: the {name} evaluation of its artifact gives {found:.6f} bpb, and the log says {logged:.6f}"
            mend = f"submit the artifact of this run and the data that it was scored on; else score it again: {seed.command('RESUME=1')}"
            findings.refuse(what, f"equal to {tolerance(seed, rescored):.0e} bpb", mend)
    if not is_audited(rescored.audit):
        findings.refuse(f"{seed.name}: scored again with AUDIT=1, not all of C1 to C4 were found to hold", "all of them", "python train_gpt.py --help")


def rescored_text(seed: Seed, rescored: Rescored) -> str:
    """Returns in words how near a score came to the logged one."""
    difference = abs(report.number(report.mapping(rescored.scores, seed.final), "val_bpb") - seed.value("val_bpb"))
    return "equal to the last digit" if difference == 0 else f"{difference:.1e} bpb apart"


# ----------------------------------------------------------------------------------------------------------------------------------------------
# submission.json


def measured(seeds: Sequence[Seed], code: int) -> dict[str, Any]:
    """Returns what submission.json says of the seeds with `code` bytes of packed script: all of it can be made again from their logs."""
    by_seed = {
        str(seed.number): {
            "val_loss": seed.value("val_loss"), "val_bpb": seed.value("val_bpb"), "pre_quant_val_bpb": seed.value("pre_quant_val_bpb"),
            "quant_val_bpb": seed.value("quant_val_bpb"), "artifact_bytes": int(seed.value("bytes_model")),
            "bytes_total": int(seed.value("bytes_model")) + code,
            "steps": int(seed.value("steps")), "step_avg_ms": seed.value("step_ms"), "train_time_s": seed.value("train_seconds"),
            "eval_time_s": seed.value("eval_seconds"), "adapted_frac": seed.value("adapted_frac"),
        }
        for seed in seeds
    }  # fmt: skip
    rows, first = list(by_seed.values()), seeds[0]

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    def spread(key: str) -> float | None:
        return statistics.stdev(row[key] for row in rows) if len(rows) > 1 else None

    model = max(row["artifact_bytes"] for row in rows)
    return {
        "val_loss": mean("val_loss"), "val_bpb": mean("val_bpb"), "val_loss_std": spread("val_loss"), "val_bpb_std": spread("val_bpb"),
        "pre_quant_val_bpb": mean("pre_quant_val_bpb"), "seeds": [seed.number for seed in seeds], "seed_results": by_seed,
        "bytes_total": model + code, "bytes_code": code, "bytes_model": model,
        "hardware": first.hardware, "pytorch_version": report.text(first.run.env, "torch"), "evaluation": first.final,
        "val_targets": int(report.number(first.evaluation, "targets")), "val_bytes": int(report.number(first.evaluation, "bytes")),
        "wallclock_seconds": mean("train_time_s"), "eval_seconds": mean("eval_time_s"), "step_stop": round(mean("steps")),
        "source_sha256": hashlib.sha256(first.content["source"]).hexdigest(), "commit": report.text(first.run.env, "commit"),
    }  # fmt: skip


def compliance(seeds: Sequence[Seed], numbers: Mapping[str, Any], data: Data | None, rescored: Mapping[int, Rescored]) -> dict[str, dict[str, Any]]:
    """Returns each rule of the challenge: whether it holds (None = not checked) and how that was found."""

    def each(key: str, digits: int = 1) -> str:
        return ", ".join(f"{seed.value(key):.{digits}f}" for seed in seeds)

    logged, again = all(is_audited(seed.audit) for seed in seeds), bool(rescored)
    where = " and ".join(["AUDIT=1 in the logs"] * logged + ["AUDIT=1 when the packed script scored the artifact again"] * again)

    def audited(how: str) -> dict[str, Any]:
        return {"holds": True if where else None, "how": f"{where}: {how}" if where else "not audited"}

    def in_time(key: str, how: str) -> dict[str, Any]:
        return {"holds": max(seed.value(key) for seed in seeds) <= MOST_SECONDS, "how": f"seconds in the logs{how}: {each(key)}"}

    held = f"{report.number(seeds[0].settings, 'AUDIT_TOKENS'):,.0f} targets"
    return {
        "train_under_600s": in_time("train_seconds", ""),
        "eval_under_600s": in_time("eval_seconds", ", of all evaluations"),
        "artifact_under_16mb": {
            "holds": numbers["bytes_total"] <= MOST_BYTES,
            "how": f"size of train_gpt.py {numbers['bytes_code']:,} + largest artifact {numbers['bytes_model']:,} = {numbers['bytes_total']:,} bytes",
        },
        "three_seeds": {"holds": len(seeds) >= LEAST_SEEDS, "how": f"{len(seeds)} with one configuration and one source, both compared"},
        "eight_h100": {"holds": seeds[0].value("world_size") == GPUS and GPU_NAME in seeds[0].hardware, "how": f"the logs say {seeds[0].hardware}"},
        "full_validation_split": {
            "holds": data.is_published if data else None,
            "how": f"{data.documents:,} documents, all of {data.tokens - 1:,} targets scored once; hashes below" if data else "the data was not looked at",
        },
        "c1_causal": audited(f"text after a cut replaced, no score before it changed by a bit, {held}"),
        "c2_normalised": audited("the probabilities of all tokens sum to 1 and give the scores"),
        "c3_score_before_update": audited("learning from a target before its score is refused, and would show in C1"),
        "c4_single_pass": audited("a second score of a target is refused"),
        "no_training_data_or_network_in_evaluation": audited("no training shard opened, no connection made"),
        "adapted_throughout": {"holds": True, "how": f"adapted_frac: {each('adapted_frac', 0)}"},
        "packed_script_is_source": {"holds": True, "how": f"unpacked and compared with {SOURCE_NAME}: equal syntax trees without docstrings"},
        "artifact_scores_again": {
            "holds": True if again else None,
            "how": "; ".join(f"seed {seed.number}: {rescored_text(seed, rescored[seed.number])}" for seed in seeds if seed.number in rescored) or "skipped",
        },
    }  # fmt: skip


def comparison(seeds: Sequence[Seed], against: Sequence[str], findings: Findings) -> dict[str, Any] | None:
    """Returns the comparison with earlier scores, as compare.py prints it with --json; None, and an obstacle, where there is none to make."""
    scores = tuple(
        compare.Score(seed.value("val_bpb"), seed.value("val_loss"), seed.number, f"seed {seed.number}", report.number(seed.evaluation, "bytes"), seed.final)
        for seed in seeds
    )
    try:
        both = compare.compare(compare.Sample(scores), compare.read_sample(against, "bpb", None))
    except (ValueError, OSError) as error:
        findings.refuse(f"--against: {error}", "a run or record folder, or scores in bits per byte", "python records/compare.py --help")
        return None
    for obstacle in both.obstacles:
        findings.demand(False, f"--against: {obstacle.rstrip('.')}", "scores of the same text by the same evaluation", "compare with others")
    content = compare.result(both, compare.Options(0.005, 0.01, 0.95, 0.8, []))
    content["b"]["sources"] = [without_home(source) for source in content["b"]["sources"]]
    return content


# ----------------------------------------------------------------------------------------------------------------------------------------------
# README.md


def plain(value: object) -> str:
    """Returns `value` as one line of Markdown that means nothing but its characters."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(report.one_line(value), quote=False))


def markdown(table: Table) -> str:
    """Returns a table in Markdown."""
    console = Console(file=io.StringIO(), width=10_000, markup=False, emoji=False)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.strip() for line in lines if line.strip()) + "\n"


def rows(names: Sequence[str], content: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    table = Table(*names, box=box.MARKDOWN)
    for row in content:
        table.add_row(*row)
    return markdown(table)


def score_table(numbers: Mapping[str, Any]) -> str:
    """Returns the table with a row for each seed, their mean and standard deviation."""
    columns = (
        ("steps", "steps", 0), ("ms a step", "step_avg_ms", 1), ("train s", "train_time_s", 1), ("eval s", "eval_time_s", 1),
        ("trained bpb", "pre_quant_val_bpb", 5), ("quantised bpb", "quant_val_bpb", 5), ("val_bpb", "val_bpb", 5), ("nats per token", "val_loss", 5),
        ("artifact bytes", "artifact_bytes", 0), ("total bytes", "bytes_total", 0),
    )  # fmt: skip
    results = numbers["seed_results"]
    content = [[seed, *(report.decimals(row[key], digits) for _, key, digits in columns)] for seed, row in results.items()]
    if len(results) > 1:
        for name, summary in (("mean", statistics.fmean), ("std", statistics.stdev)):
            content.append([name, *(report.decimals(summary([row[key] for row in results.values()]), digits) for _, key, digits in columns)])
    return rows(["seed", *(name for name, _, _ in columns)], content)


def settings_of(item: str) -> dict[str, Any]:
    """Returns the settings of a run or record folder; none where there is none."""
    paths = sorted(path for name in ("run.jsonl", "run_seed*.jsonl") for path in Path(item).glob(name))
    events = read_events(paths[0].read_text(encoding="utf-8", errors="replace"))[0] if paths else []
    return next((report.mapping(event, "settings") for event in reversed(events) if event["event"] == "config"), {})


def changes_text(seed: Seed, against: Sequence[str]) -> str:
    """Returns the section on what differs from the script's defaults, and from the first run that it is compared with."""
    changed = {name: value for name, value in report.mapping(seed.run.config, "changed").items() if name not in (*FREE_SETTINGS, *PATH_SETTINGS)}
    lines = textwrap.wrap(" ".join(f"{report.one_line(name)}={report.one_line(value)}" for name, value in changed.items()), 140, break_long_words=False)
    parts = ["Against the defaults of the script:\n", *(f"    {line}" for line in lines or ["nothing"]), ""]
    base = next(filter(None, map(settings_of, against)), {})
    if base:
        differing = [name for name in {**base, **seed.settings} if base.get(name) != seed.settings.get(name) and name not in (*FREE_SETTINGS, *PATH_SETTINGS)]
        content = [[plain(name), plain(base.get(name, report.ABSENT)), plain(seed.settings.get(name, report.ABSENT))] for name in differing]
        parts += ["Against what it is compared with:\n", rows(["setting", "there", "here"], content) if content else "no setting\n"]
    return "\n".join(parts)


def readme(submission: Mapping[str, Any], seeds: Sequence[Seed], data: Data | None, rescored: Mapping[int, Rescored], against: Sequence[str]) -> str:
    """Returns the README.md of a record."""
    first = seeds[0]
    spread = f" (mean of {len(seeds)} seeds, standard deviation {submission['val_bpb_std']:.5f})" if len(seeds) > 1 else " (one seed)"
    parts = [f"# {plain(submission['name'])}: val_bpb {submission['val_bpb']:.4f}{spread}\n"]
    parts += [f"{plain(submission['blurb'])}\n"] * bool(submission["blurb"])
    if not data or not data.is_published:
        parts.append("**Not scored on what is known to be the challenge's validation split: these scores are comparable only with others on the same text.**\n")
    if not rescored:
        parts.append("**The artifact was not scored again when this folder was made (`--skip-rescoring`): the scores are those of the logs.**\n")
    parts += ["## Result\n", score_table(submission)]
    parts.append(
        "Trained = the weights before quantisation, quantised = read back from the artifact, both without adaptation in separate windows (`chunked`);\n"
        f"val_bpb and nats are the score of the artifact, by the `{plain(first.final)}` evaluation. Evaluation seconds are those of both evaluations.\n"
    )
    if submission.get("comparison"):
        content = submission["comparison"]
        parts += [f"## Against {plain(', '.join(map(without_home, against)))}\n", "A is this record.\n", markdown(compare.side_table(content, box.MARKDOWN))]
        parts += [markdown(compare.test_table(content, box.MARKDOWN))] * bool(content["tests"])
        parts += [f"{plain(notice)}\n" for notice in (*content["notices"], *content["obstacles"])]
    versions = f"PyTorch {plain(submission['pytorch_version'])}, Python {plain(report.text(first.run.env, 'python'))}"
    parts += ["## Machine\n", f"{plain(submission['hardware'])}, {versions}; commit {plain(submission['commit'])}."]
    parts.append(f"SHA-256 of the source: {submission['source_sha256']}.\n")
    parts += [again_text(seeds, rescored), "## What it changes\n", changes_text(first, against), "## Rules\n"]
    marks = {True: "yes", False: "**no**", None: "not checked"}
    rules = submission["compliance"].items()
    parts.append(rows(["rule", "holds", "how that was found"], ([name, marks[rule["holds"]], plain(rule["how"])] for name, rule in rules)))
    parts += ["## To be known\n", *(f"- {plain(notice)}" for notice in submission["notices"]), ""] if submission["notices"] else []
    parts.append("## Data\n")
    parts.append(data_table(data) if data else "The data was not here when this folder was made.\n")
    parts += ["## Files\n", *(f"- `{name}`: {what}" for name, what in file_notes(seeds).items()), ""]
    parts.append(searched_text(submission, seeds, data))
    return "\n".join(parts)


def again_text(seeds: Sequence[Seed], rescored: Mapping[int, Rescored]) -> str:
    """Returns the section on how to repeat a record."""
    first, names = seeds[0], record_files(seeds[0].number)
    place = " ".join(f"{name}={shlex.quote(reader_path(str(first.settings.get(name))))}" for name in ("DATA_PATH", "TOKENIZER_PATH"))
    train = command(int(first.value("world_size")), names["config"], "RUN_ID=again", "RUNS_DIR=runs")
    score = command(1, names["config"], "RUN_ID=scored", "RUNS_DIR=runs", "STAGES=eval", f"ARTIFACT={names['artifact']}", "EVAL_SECONDS=0", "AUDIT=1")
    parts = ["## Again\n", "In this folder. Install what it needs:\n", "    pip install -r requirements.txt\n", "Train:\n", f"    {train} {place}\n"]
    parts += ["Score the artifact, on any number of processes, and check the rules of the challenge on it:\n", f"    {score} {place}\n"]
    for seed in seeds:
        if seed.number in rescored:
            found = f"{rescored_text(seed, rescored[seed.number])}, on {plain(rescored[seed.number].machine)}"
            parts.append(f"When this folder was made, that gave the logged score of seed {seed.number}: {found}.\n")
    parts.append(
        f"Scores of one artifact may differ by rounding: accepted is up to {ROUNDING_BPB:.0e} bpb on a CPU in float32 without adaptation, "
        f"and up to {TOLERANCE_BPB:.0e} otherwise.\n"
    )
    return "\n".join(parts)


def searched_text(submission: Mapping[str, Any], seeds: Sequence[Seed], data: Data | None) -> str:
    """Returns the numbers in the words in which the challenge's reviewers look for them."""
    lines = [f"train_shards: {data.facts['train_shards']}", f"val_tokens: {data.tokens}"] if data else []
    for seed, row in zip(seeds, submission["seed_results"].values(), strict=True):
        is_early = row["steps"] < report.number(seed.settings, "ITERATIONS")
        stop = f"stopping_early: wallclock_cap {report.number(seed.settings, 'MAX_WALLCLOCK_SECONDS'):g} s" if is_early else "stopping_early: no"
        size = f"Total submission size: {row['bytes_total']} bytes  total_eval_time: {row['eval_time_s']:.1f}s  val_bpb: {row['val_bpb']:.8f}"
        lines.append(f"seed {seed.number}  {stop}  step: {row['steps']}  {size}")
    return "In the words that are searched for:\n\n" + "".join(f"    {line}\n" for line in lines)


def data_table(data: Data) -> str:
    """Returns the table of what is known of the text."""
    content = [[name, plain(value)] for name, value in data.facts.items() if not isinstance(value, dict | None)]
    content += [[f"SHA-256 of {plain(name)}", digest] for name, digest in data.facts["val_sha256"].items()]
    source = report.mapping(data.facts, "source")
    return rows(["", ""], content + [[f"source: {plain(name)}", plain(value)] for name, value in source.items()])


def reader_path(path: str) -> str:
    """Returns a path of the run as a reader in the record folder has to give it: three folders up, where it was relative; else to be filled in."""
    return f"/path/to/{Path(path).name}" if Path(path).is_absolute() else f"../../../{path}"


def file_notes(seeds: Sequence[Seed]) -> dict[str, str]:
    """Returns what each file of a record is."""
    notes = {
        "train_gpt.py": "the submission: the packed script, whose bytes count",
        SOURCE_NAME: "the source that ran, readable; nothing needs it",
        "requirements.txt": "what the script imports",
        record_files(seeds[0].number)["artifact"]: "the weights, whose bytes count",
    }
    for seed in seeds:
        names = record_files(seed.number)
        notes |= {names["log"]: "log", names["events"]: "the same for programs", names["config"]: "every setting"}
    return notes | {"submission.json": "the numbers above for programs, with the SHA-256 of every other file but this one"}


# ----------------------------------------------------------------------------------------------------------------------------------------------
# The folder


def without_home(text: str) -> str:
    """Returns `text` with home directories as ~: they name people."""
    return re.sub(HOMES, "~", text)


def note_paths(seed: Seed, findings: Findings) -> None:
    """Adds a notice of the paths of this machine that stay in the logs."""
    paths = {name: without_home(str(seed.settings.get(name) or "")) for name in PATH_SETTINGS}
    absolute = [f"{name}={path}" for name, path in paths.items() if path.startswith("/")]
    if absolute:
        findings.notices.append(f"seed {seed.number}: paths of the machine stay in the logs: {', '.join(absolute)}.")


def folder_name(day: date, name: str) -> str:
    """Returns YYYY-MM-DD_Name. Raises ValueError for a name that would not make one."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9.+-]+", "_", letters)[:80].strip("._-+")
    if not safe or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(f"--name {report.one_line(name)!r}: no name of a folder")
    return f"{day:%Y-%m-%d}_{safe}"


def requirements(source: str, torch_version: str) -> str:
    """Returns those lines of requirements.txt whose packages the source imports; PyTorch in the version that ran."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    lines = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if re.split(r"\W", line)[0] in imported]
    ran = f"torch=={torch_version.partition('+')[0]}"  # without the build, which differs from machine to machine
    return "".join(f"{ran if line.startswith('torch=') else line}\n" for line in lines)


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside `target`, and takes it away afterwards, where it has not become `target`."""
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # something is in it now
                parent.rmdir()


def pack_seeds(folder: Path, seeds: Sequence[Seed], packed: bytes) -> None:
    """Writes everything into a record folder but the files WRITTEN_LAST."""
    first = seeds[0]
    (folder / "train_gpt.py").write_bytes(packed)
    (folder / SOURCE_NAME).write_bytes(first.content["source"])
    (folder / "requirements.txt").write_text(requirements(first.text("source"), report.text(first.run.env, "torch")), encoding="utf-8")
    (folder / record_files(first.number)["artifact"]).write_bytes(first.content["artifact"])
    for seed in seeds:
        for role in ("log", "events", "config"):
            (folder / record_files(seed.number)[role]).write_text(without_home(seed.text(role)), encoding="utf-8")


class Author(NamedTuple):
    """What only the author knows."""

    name: str
    author: str
    github_id: str
    blurb: str
    day: date


def make(options: argparse.Namespace, findings: Findings, console: Console) -> Path | None:
    """Returns the record folder that it has made of run folders; None where there are obstacles."""
    seeds = [seed for folder in options.runs if (seed := read_run_folder(folder, findings))]
    for seed in seeds:
        check_seed(seed, findings)
        note_paths(seed, findings)
    if seeds:
        check_together(seeds, findings)
    target = Path()
    try:
        target = options.output / f"track_{options.track}" / folder_name(options.date, options.name)
        if os.path.lexists(target):
            findings.refuse(f"{target}: exists, and is never overwritten", "a new folder", "choose another --name or --date, or move it away")
    except ValueError as error:
        findings.refuse(str(error), "some letters or digits, and no / or \\", '--name "Rate control"')
    if options.skip_rescoring:
        what = "the artifacts are not scored again (--skip-rescoring)"
        findings.demand(False, what, "scores that were found again", "leave out --skip-rescoring, where the GPUs are")
        for seed in seeds:
            if not is_audited(seed.audit) and options.track != TRACKS[0]:
                mend = f"leave out --skip-rescoring, which audits; or: {seed.command('RESUME=1', 'AUDIT=1')}"
                findings.refuse(f"{seed.name}: nothing says that C1 to C4 hold", "an audit, in the log or when scoring again", mend)
    data = read_data(seeds[0], options.data, options.tokenizer, findings, not options.skip_rescoring) if seeds else None
    if data:
        check_data(seeds, data, findings)
    content = comparison(seeds, options.against, findings) if seeds and options.against else None
    packed = pack(seeds, findings)
    if findings.obstacles:
        return None
    with unfinished(target) as folder:
        pack_seeds(folder, seeds, packed)
        rescored: dict[int, Rescored] = {}
        if data and not options.skip_rescoring:
            for seed in seeds:
                rescore(folder, seed, seed.paths["artifact"], data, rescored, findings, console)
        if findings.obstacles:
            return None
        by = Author(options.name, options.author, options.github_id, options.blurb, options.date)
        submission = submission_json(by, seeds, len(packed), data, rescored, content, findings, folder)
        (folder / "README.md").write_text(readme(submission, seeds, data, rescored, options.against), encoding="utf-8")
        (folder / "submission.json").write_text(json.dumps(submission, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        folder.rename(target)
    return target


def pack(seeds: Sequence[Seed], findings: Findings) -> bytes:
    """Returns the packed script of the first seed's source, after checking it and its size with each artifact."""
    if not seeds or "source" not in seeds[0].content:
        return b""
    first, source = seeds[0], seeds[0].text("source")
    try:
        packed = train_gpt.pack_script(source)
    except (SyntaxError, ValueError) as error:
        findings.refuse(f"{first.paths['source']}: no Python ({error})", "the source that ran", "restore it from a copy of the run")
        return b""
    problem = packing_problem(packed, source)
    if problem:
        findings.refuse(f"{first.paths['source']}: packing it went wrong: {problem}", "equal syntax trees", "report it: pack_script of train_gpt.py")
    check_sizes(seeds, len(packed), findings)
    return packed


def check_sizes(seeds: Sequence[Seed], code: int, findings: Findings) -> None:
    """Checks the size of the packed script with each artifact."""
    for seed in seeds:
        total, cap = seed.value("bytes_model") + code, int(seed.value("bytes_cap"))
        if code != seed.value("bytes_code"):
            findings.notices.append(f"{seed.name}: its log counts {seed.value('bytes_code'):,.0f} bytes of code, and train_gpt.py, packed here, has {code:,}.")
        if seed.value("bytes_total") <= cap:  # else it has been refused already
            check_cap(seed, total, cap, "its BYTES_CAP", findings)
        if cap > MOST_BYTES:
            check_cap(seed, total, MOST_BYTES, "the challenge's cap", findings)


def rescore(folder: Path, seed: Seed, artifact: Path, data: Data, rescored: dict[int, Rescored], findings: Findings, console: Console) -> None:
    """Scores an artifact again, and adds to `rescored` and to `findings`."""
    try:
        rescored[seed.number] = score_again(folder, seed, artifact, data, console)
        check_rescored(seed, rescored[seed.number], findings)
    except ValueError as error:
        findings.refuse(f"{seed.name}: its artifact could not be scored again: {error}", "the logged score", "pip install -r requirements.txt, then again")


def submission_json(
    by: Author, seeds: Sequence[Seed], code: int, data: Data | None, rescored: Mapping[int, Rescored], content: dict[str, Any] | None, findings: Findings,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Returns submission.json, with the public schema's keys where it has some."""
    numbers = measured(seeds, code)
    tested = content["tests"][0] if content and content["tests"] else None
    return {
        "author": by.author, "github_id": by.github_id, "name": by.name, "blurb": by.blurb, "date": f"{by.day:%Y-%m-%d}T00:00:00Z", "track": findings.track,
        **numbers,
        "compliance": compliance(seeds, numbers, data, rescored),
        "rescored": {str(number): again._asdict() for number, again in rescored.items()},
        "data": data.facts if data else None,
        **({"t_statistic": tested["t"], "p_value": tested["p_better"]} if tested else {}),
        **({"comparison": content} if content else {}),
        "artifact_sha256": {str(seed.number): hashlib.sha256(seed.content["artifact"]).hexdigest() for seed in seeds},
        "sha256": {path.name: file_digest(path) for path in sorted(folder.iterdir())},
        "notices": [without_home(reduce(lambda text, seed: text.replace(seed.name, f"seed {seed.number}"), seeds, notice)) for notice in findings.notices],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------------------------------
# A record folder again


def check_record(options: argparse.Namespace, console: Console) -> tuple[Findings, str]:
    """Returns what is wrong with a record folder, and in words what was found of its score."""
    folder, findings = options.check, Findings(TRACKS[1])
    try:
        submission = json.loads((folder / "submission.json").read_text(encoding="utf-8"))
        findings.track, numbers, digests = submission["track"], [int(number) for number in submission["seeds"]], dict(submission["sha256"])
        if findings.track not in TRACKS or not numbers:
            raise ValueError(f"track {findings.track}, seeds {numbers}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{folder / 'submission.json'}: not a submission of this tool ({type(error).__name__}: {error})"
        findings.refuse(what, "track, seeds and sha256, as this tool writes them", "python records/submit.py RUN... makes one")
        return findings, ""
    findings.remedy = "take the folder again from where it came from; or make it anew from its runs"
    check_files(folder, digests, findings)
    first = numbers[0]
    seeds = []
    for number in dict.fromkeys(numbers):
        names = {role: name for role, name in record_files(number).items() if role != "artifact" or number == first}
        seed = read_seed(f"seed {number}", {role: folder / name for role, name in names.items()}, findings)
        seeds += [seed] if seed else []
    for seed in seeds:
        check_seed(seed, findings)
    if not seeds or not (folder / "train_gpt.py").is_file():
        return findings, ""
    check_together(seeds, findings)
    packed = (folder / "train_gpt.py").read_bytes()
    problem = packing_problem(packed, seeds[0].text("source"))
    if problem:
        findings.refuse(f"{folder / 'train_gpt.py'}: {problem}", f"the packed form of {SOURCE_NAME}", "")
    check_sizes(seeds, len(packed), findings)
    for key, value in measured(seeds, len(packed)).items() if "source" in seeds[0].content else ():
        if submission.get(key) != value:
            findings.refuse(f"{folder / 'submission.json'}: {key} is not what the logs say", json.dumps(value), "")
    findings.remedy = ""
    data = read_data(seeds[0], options.data, options.tokenizer, findings, not options.skip_rescoring)
    if data:
        check_data(seeds, data, findings)
    if findings.obstacles or options.skip_rescoring or not data:
        return findings, "not scored again"
    rescored: dict[int, Rescored] = {}
    rescore(folder, seeds[0], folder / record_files(first)["artifact"], data, rescored, findings, console)
    return findings, ", ".join(f"seed {first} scored again: {rescored_text(seeds[0], again)}, on {again.machine}" for again in rescored.values())


def check_files(folder: Path, digests: Mapping[str, str], findings: Findings) -> None:
    """Compares the files of a folder with their digests: one that Python could import would run with the script."""
    found = {path.name for path in folder.iterdir() if path.name not in WRITTEN_LAST}
    for name in sorted({*found, *digests}):
        path = folder / name
        if name not in digests:
            findings.refuse(f"{path}: not in submission.json", "no file but those", "")
        elif name not in found or not path.is_file() or path.is_symlink():
            findings.refuse(f"{path}: no such file", "every file that submission.json lists", "")
        elif file_digest(path) != digests[name]:
            findings.refuse(f"{path}: altered: its SHA-256 is not that of submission.json", str(digests[name]), "")
    if not (folder / "README.md").is_file():
        findings.refuse(f"{folder / 'README.md'}: no such file", "a README.md", "")


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Main


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line. Exits with code 2 where it is not valid."""

    def day(text: str) -> date:
        try:
            return datetime.strptime(text, "%Y-%m-%d").date()
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: expected YYYY-MM-DD") from None

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, one a seed")
    parser.add_argument("--track", choices=TRACKS, help="10min_16mb: a record, which has to meet every rule; non_record_16mb: anything else that is true")
    parser.add_argument("--name", help="of the record; its folder is named after it")
    parser.add_argument("--author")
    parser.add_argument("--github-id", metavar="ID")
    parser.add_argument("--blurb", default="", metavar="TEXT", help="the idea in a sentence or two")
    parser.add_argument("--date", type=day, default=datetime.now(UTC).date(), metavar="YYYY-MM-DD", help="(default: today)")
    parser.add_argument("--against", nargs="+", default=[], metavar="ITEM", help="what it improves on: run or record folders, submission.json, or scores")
    parser.add_argument("--output", type=Path, default=ROOT / "records", metavar="DIR", help="where track_... is (default: records)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the run's shards on this machine (default: its DATA_PATH)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer (default: its TOKENIZER_PATH, or the same name in --data)")
    parser.add_argument("--skip-rescoring", action="store_true", help="do not score the artifacts again; not for a record of the ten minutes")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="check a record folder, and make none; runs its script")
    options = parser.parse_args(arguments)
    needed = {"RUN": options.runs, "--track": options.track, "--name": options.name, "--author": options.author, "--github-id": options.github_id}
    if options.check and any(needed.values()):
        parser.error("--check goes without RUN, --track, --name, --author and --github-id")
    missing = [name for name, value in needed.items() if not value]
    if missing and not options.check:
        parser.error(f"missing: {', '.join(missing)}")
    return options


def print_obstacles(obstacles: Sequence[Obstacle], what: str) -> None:
    """Prints why something is refused."""
    print(f"submit.py: {what} for {len(obstacles)} reason{'s' * (len(obstacles) != 1)}", file=sys.stderr)
    for number, obstacle in enumerate(obstacles, start=1):
        lines = f"\n{number:2}. {obstacle.what}\n    expected: {obstacle.expected}\n    mend:     {obstacle.mend}"
        print(lines, file=sys.stderr)


def stop(number: int, frame: FrameType | None) -> None:
    """Ends as Ctrl-C does, so that what is unfinished is taken away."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes or checks a record folder and returns the exit code."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        if options.check:
            findings, said = check_record(options, console)
            refused, done = f"{options.check} is refused", f"{options.check}: in order; {said}"
        else:
            findings = Findings(options.track)
            target = make(options, findings, console)
            refused, done = "nothing was written, and no record is made,", f"made {target}; read its README.md, and add what the idea is"
    except KeyboardInterrupt:
        print("submit.py: stopped; nothing was written", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if findings.obstacles:
        print_obstacles(findings.obstacles, refused)
        return 1
    for notice in findings.notices:
        console.print(f"to be known: {notice}", markup=False)
    console.print(done, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
