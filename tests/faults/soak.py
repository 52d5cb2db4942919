"""Kills, stops, starves and damages micro runs for as long as it is told to, and says what each kind of fault cost.

    python tests/faults/soak.py                                  200 faults in runs, 10,000 damaged files of each kind
    python tests/faults/soak.py --seconds 480 --seed 7           other moments and other damage, for about eight minutes at most
    python tests/faults/soak.py --write                          the table also into records/faults/README.md

A run goes on after every fault until it ends; its weights, optimiser state, artifact and scores must then be those of a run that met none, bit for
bit. What may be accepted of a damaged file is the rule of each `read_damaged_...` in `inject.py`.

Exit code 0: every fault was survived; 1: not every one, and what is left of those runs and files is kept; 2: wrong arguments; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import forked
import inject
import torch
from conftest import ROOT, Finished, clean_environment
from rich import box
from rich.console import Console
from rich.table import Table
from test_training import assert_same_checkpoint, driver, scores_of

import train_gpt

PAGE = ROOT / "records" / "faults" / "README.md"
STEPS = 24
CHUNK = 250  # damaged files of one kind that one process reads
# Where a run may be when it is hit, in order; "checkpoint" is while one is written, within training.
PLACES = ("start", "training", "checkpoint", "validation", "export", "evaluation")
# How often each is drawn: signals to the one process, signals to one of two ranks, damage to the newest checkpoint, disks full for a while.
SHARES = {"SIGKILL": 50, "SIGTERM": 15, "SIGINT": 15, "SIGKILL to 1 of 2 ranks": 7, "SIGTERM to 1 of 2 ranks": 3, "damage": 5, "full disk": 5}


class Wrong(Exception):
    """A run or a reader did what it must not."""


@dataclass
class Row:
    """What is known of one kind of fault."""

    injected: int = 0
    survived: int = 0
    accepted: int = 0  # of damaged files: those that were, rightly
    lost: list[int] = field(default_factory=list)  # steps that had to be done again
    recovery: list[float] = field(default_factory=list)  # seconds from the start of the next process to the first thing that it did


# ----------------------------------------------------------------------------------------------------------------------
# Faults in runs


def place_of(events: Sequence[dict[str, Any]], folder: Path) -> str:
    """Returns where a process is that has logged these events."""
    kinds = [event["event"] for event in events]
    if "export" in kinds:
        return "evaluation"
    if any(event["event"] == "note" and event["text"].startswith("trained ") for event in events):
        return "export" if "val" in kinds else "validation"
    if "phase" in kinds:
        return "checkpoint" if (folder / "checkpoint.pt.partial").exists() else "training"
    return "start"


class Patient:
    """Runs of one configuration, one after another; each meets faults until it ends."""

    def __init__(self, place: Path, data: Path, ranks: int, chance: random.Random, rows: dict[str, Row]) -> None:
        """Makes the run that the others are compared with."""
        place.mkdir()
        self.place, self.data, self.ranks, self.chance, self.rows = place, data, ranks, chance, rows
        self.script = driver(place, inject.CONSTANT_CODE_BYTES)
        self.number = 0
        self.begin()
        outcome = self.launch(self.script).finish()
        if outcome.codes != [0] * ranks:
            raise Wrong(f"the run without faults ended with {outcome.codes}:\n{outcome.output}")
        self.reference = Finished(self.folder, Path(), "")
        starts = {"start": self.launched}
        events = self.events()
        for count, event in enumerate(events, 1):
            starts.setdefault(place_of(events[:count], self.folder), event["time"])
        ends = [*starts.values(), events[-1]["time"]][1:]
        self.seconds = {"checkpoint": 0.0, **{name: end - start for (name, start), end in zip(starts.items(), ends, strict=True)}}
        self.begin()

    def begin(self) -> None:
        """Goes to the next run."""
        self.folder = self.place / "runs" / str(self.number)
        self.number += 1
        self.met: list[Row] = []  # the faults that it has met, which it survives if it ends as it should
        self.recovering: Row | None = None  # the fault that the next process recovers from

    def launch(self, script: Path) -> forked.Ranks:
        """Starts the run, or goes on with it."""
        log, resume = self.folder / "run.jsonl", int(self.folder.exists())
        self.logged = log.stat().st_size if log.exists() else 0
        arguments = inject.micro_arguments(self.data, self.place / "runs", RUN_ID=self.folder.name, ITERATIONS=STEPS, RESUME=resume)
        self.launched = time.time()
        return forked.start(script, arguments, clean_environment(), self.place, self.ranks)

    def events(self) -> list[dict[str, Any]]:
        """Returns what the latest process has logged so far."""
        try:
            with open(self.folder / "run.jsonl", encoding="utf-8") as file:
                file.seek(self.logged)
                return [json.loads(line) for line in file.read().rpartition("\n")[0].splitlines()]
        except FileNotFoundError:
            return []

    def came_to(self, outcome: forked.Outcome, expected: Sequence[list[int]]) -> bool:
        """Enters what the latest process came to: how soon it recovered, and whether it ended as it should, which it returns.

        Raises Wrong for exit codes that are not `expected`, and for an end that differs from that of the run without faults.
        """
        first = [event["time"] for event in self.events() if event["event"] in ("step", "val", "export", "eval")][:1]
        if self.recovering is not None and first:
            self.recovering.recovery.append(first[0] - self.launched)
            self.recovering = None
        if outcome.codes != [0] * self.ranks:
            if outcome.codes not in expected:
                raise Wrong(f"{self.folder} ended with {outcome.codes} instead of {expected}:\n{outcome.output}")
            return False
        try:
            run = Finished(self.folder, Path(), "")
            assert_same_checkpoint(run.checkpoint(), self.reference.checkpoint())
            assert scores_of(run) == scores_of(self.reference), "other scores"
            assert (self.folder / "artifact.bin").read_bytes() == (self.reference.folder / "artifact.bin").read_bytes(), "another artifact"
            assert not list(self.folder.glob("*.pt.partial")), "half a checkpoint"
        except (AssertionError, OSError, ValueError) as problem:
            raise Wrong(f"{self.folder} did not end as the run without faults: {problem}") from None
        for row in self.met:
            row.survived += 1
        shutil.rmtree(self.folder)
        self.begin()
        return True

    def finish(self) -> None:
        """Lets the run end, if it has begun."""
        if self.met or self.folder.exists():
            self.came_to(self.launch(self.script).finish(), [])

    def enter(self, name: str, steps_done: int) -> None:
        """Enters a fault, after which the run goes on from its newest valid checkpoint. Raises Wrong when that costs more than an interval of them."""
        found = train_gpt.newest_checkpoint(self.folder)
        lost = steps_done - (found[1]["step"] if found else 0)
        self.recovering = self.rows.setdefault(name, Row())
        self.recovering.injected += 1
        self.recovering.lost.append(lost)
        self.met.append(self.recovering)
        if lost > inject.MICRO["CHECKPOINT_EVERY"]:
            raise Wrong(f"{self.folder} lost {lost} steps")

    def steps_done(self) -> int:
        """Returns the step that the latest process came to: it may have saved one that it had no time to log."""
        found = train_gpt.newest_checkpoint(self.folder)
        return max([event["step"] for event in self.events() if event["event"] == "step"] + [found[1]["step"] if found else 0])

    def stop(self, number: signal.Signals) -> None:
        """Sends a signal at a random moment, to a random rank."""
        while True:
            place, victim = self.chance.choice(PLACES), self.chance.randrange(self.ranks)
            if place in ("training", "checkpoint") and self.is_trained():
                self.finish()
            ranks = self.launch(self.script)
            self.wait_until(place, ranks, number)
            time.sleep(self.chance.uniform(0, 1.2 * self.seconds[place]))
            process = ranks.processes[victim]
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
            own = -9 if number == signal.SIGKILL else 128 + number
            # The other rank stops with it, finds itself alone, or is through.
            codes = [[own]] if self.ranks == 1 else [[own, other][:: 1 - 2 * victim] for other in (128 + number, 1, 0)]
            if not self.came_to(ranks.finish(), codes):
                break
        where = place_of(self.events(), self.folder)
        self.enter(f"{number.name} in {where}" if self.ranks == 1 else f"{number.name} to 1 of 2 ranks", self.steps_done())

    def is_trained(self) -> bool:
        """Returns whether the run has gone through its training."""
        found = train_gpt.newest_checkpoint(self.folder)
        return found is not None and found[1]["finished"]

    def wait_until(self, place: str, ranks: forked.Ranks, number: signal.Signals) -> None:
        """Returns when the latest process has come to a place, and to where a signal can hit it as a signal to this script."""

        def is_there() -> bool:
            events = self.events()
            # Before it logs anything, a process may not yet have taken over the signals that ask it to stop, and of two that have not met, only a
            # launcher ends the one that is left.
            may_be_early = number == signal.SIGKILL and self.ranks == 1
            return place_of(events, self.folder) == place and (may_be_early or bool(events))

        inject.wait_for(is_there, ranks)

    def damage_newest(self) -> None:
        """Damages the newest of two checkpoints of a run that was killed."""
        while (whole := self.whole_checkpoints()) != 2:
            self.stop(signal.SIGKILL)
        newest = self.folder / train_gpt.CHECKPOINT_FILES[0]
        step = train_gpt.read_checkpoint(newest)["step"]
        while whole == 2:  # damage may hit what no content depends on
            newest.write_bytes(inject.damaged(newest.read_bytes(), self.chance))
            whole = self.whole_checkpoints()
        self.enter("damage to the newest", step)

    def whole_checkpoints(self) -> int:
        """Returns how many there are."""
        whole = 0
        for name in train_gpt.CHECKPOINT_FILES:
            with contextlib.suppress(OSError, ValueError):
                whole += bool(train_gpt.read_checkpoint(self.folder / name))
        return whole

    def fill_disk(self) -> None:
        """Lets a run go through its training while for some steps no checkpoint can be written."""
        self.finish()
        first = self.chance.randrange(3, STEPS - 2)
        last = self.chance.randrange(first + 2, STEPS)  # the disk takes the checkpoint at the end
        warm_up = 2  # steps, one for each phase
        place = self.place / "full"
        place.mkdir(exist_ok=True)
        ranks = self.launch(driver(place, inject.full_disk(60_000, f"{first + warm_up} <= len(calls) <= {last + warm_up}")))
        row = self.rows.setdefault("disk full for a while", Row())
        row.injected += 1
        row.lost.append(0)
        self.met.append(row)
        self.came_to(ranks.finish(), [])


# ----------------------------------------------------------------------------------------------------------------------
# The campaign


class Soak:
    """All faults, in an order drawn from the seed, and what came of them."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.chance = place, random.Random(seed)
        self.rows: dict[str, Row] = {}
        self.problems: list[str] = []
        self.first = seed * 1_000_000  # number of the first damaged file
        self.data = place / "data"
        inject.make_data(self.data)
        self.patients: dict[int, Patient] = {}
        inject.prepare(place / "damaged", self.patient(1).reference.folder, self.data)

    def patient(self, ranks: int) -> Patient:
        """Returns the one whose runs have so many ranks."""
        if ranks not in self.patients:
            self.patients[ranks] = Patient(self.place / f"ranks{ranks}", self.data, ranks, self.chance, self.rows)
        return self.patients[ranks]

    def hurt_run(self) -> None:
        """Injects one fault into a run."""
        (kind,) = self.chance.choices(list(SHARES), list(SHARES.values()))
        patient = self.patient(2 if "ranks" in kind else 1)
        try:
            if kind == "damage":
                patient.damage_newest()
            elif kind == "full disk":
                patient.fill_disk()
            else:
                patient.stop(signal.Signals[kind.partition(" ")[0]])
        except (Wrong, TimeoutError, ValueError) as problem:  # ValueError: no checkpoint is whole
            self.problems.append(f"{kind}: {problem}")
            patient.begin()

    def hurt_files(self, kind: str, first: int, count: int) -> None:
        """Has damaged files of one kind read, by a process of its own."""
        row, folder = self.rows.setdefault(f"damaged {kind}", Row()), self.place / "damaged"
        arguments = [str(folder), kind, str(self.first + first), str(count)]
        outcome = forked.start(Path(inject.__file__), arguments, clean_environment(), self.place).finish(600)
        row.injected += count
        try:
            found = json.loads(outcome.output.splitlines()[-1])
        except (IndexError, ValueError):
            shutil.copy(folder / "latest", folder / f"wrong-{kind}-{first}")
            self.problems.append(f"damaged {kind}: the reader ended with {outcome.codes[0]}:\n{outcome.output}")
            return
        row.survived += found["refused"] + found["accepted"]
        row.accepted += found["accepted"]
        self.problems += [f"damaged {text}" for text in found["wrong"]]

    def jobs(self, cycles: int, mutations: int) -> list[Callable[[], None]]:
        """Returns all that there is to do."""
        todo: list[Callable[[], None]] = [self.hurt_run] * cycles
        for kind in inject.KINDS:
            todo += [functools.partial(self.hurt_files, kind, first, min(CHUNK, mutations - first)) for first in range(0, mutations, CHUNK)]
        self.chance.shuffle(todo)
        return todo

    def run(self, cycles: int, mutations: int, seconds: float, console: Console) -> None:
        """Does it, or as much of it as `seconds` allow, shows how far it is, and lets every run end."""
        todo, began = self.jobs(cycles, mutations), time.monotonic()
        for done, job in enumerate(todo, 1):
            known = len(self.problems)
            job()
            for problem in self.problems[known:]:
                console.print(f"\r{problem}", markup=False, highlight=False, soft_wrap=True)
            spent = time.monotonic() - began
            left = min(spent / done * (len(todo) - done), seconds - spent)
            line = f"{done} of {len(todo)}, {len(self.problems)} not survived, {train_gpt.clock_text(max(left, 0))} left"
            if console.is_terminal:
                print(f"\r\033[K{line}", end="", flush=True)
            elif done * 10 // len(todo) > (done - 1) * 10 // len(todo):
                print(line, flush=True)
            if left < 0:
                break
        for patient in self.patients.values():
            try:
                patient.finish()
            except (Wrong, TimeoutError, ValueError) as problem:
                self.problems.append(f"the last run: {problem}")
                console.print(self.problems[-1], markup=False, highlight=False, soft_wrap=True)
        print("\r\033[K" * console.is_terminal, end="")

    def table(self, style: box.Box, left: int) -> Table:
        """Returns the table of faults: steps lost at most, and seconds until recovery; cells begin after `left` spaces."""
        shown = Table("fault", "injected", "survived", "accepted", "lost", "median", "longest", box=style, padding=(0, 1, 0, left))
        for number, column in enumerate(shown.columns):
            column.no_wrap, column.justify = True, "right" if number else "left"
        kinds = [f"{name} in {place}" for name in ("SIGKILL", "SIGTERM", "SIGINT") for place in PLACES]
        for name in sorted(self.rows, key=lambda name: (kinds.index(name) if name in kinds else len(kinds), name)):
            row = self.rows[name]
            median, longest = (f"{of(row.recovery):.1f}" if row.recovery else "" for of in (statistics.median, max))
            accepted, lost = f"{row.accepted:,}" if name.startswith("damaged ") else "", str(max(row.lost)) if row.lost else ""
            shown.add_row(name, f"{row.injected:,}", f"{row.survived:,}", accepted, lost, median, longest)
        return shown


def page(soak: Soak, command: str) -> str:
    """Returns the text of records/faults/README.md."""
    text = io.StringIO()
    Console(file=text, width=300).print(soak.table(box.MARKDOWN, 1))
    table = "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip())
    problems = "".join(f"- {problem.splitlines()[0].replace(f'{soak.place}/', '')}\n" for problem in soak.problems)
    return f"""# Faults

What was injected into runs and their files, how often, and what it cost. Written by

    {command}

on {date.today():%Y-%m-%d}, with Python {platform.python_version()} and PyTorch {torch.__version__}, on {os.cpu_count()} CPU cores. Another `--seed` draws
other moments and other damage; `tests/faults/test_faults.py` has these and other faults, each by itself.

{table}

**survived**, for faults in runs: the run went on from its checkpoint, or went on as if nothing had happened, and its weights, optimiser state, artifact and
scores were those of the run that met no fault, bit for bit. A run of {STEPS} steps met several faults, one after another. **lost**: the most steps that had
been done and were done again; there is a checkpoint every {inject.MICRO["CHECKPOINT_EVERY"]} steps, and no fault may cost more than are between two.
**median**, **longest**: recovery in seconds, from the start of the next process, which has PyTorch in memory already, to its first step, score or artifact.
*Damage to the newest* is to the newer of a killed run's two checkpoints.

**survived**, for damaged files: refused in one line that names the file (or the setting), or accepted rightly, within seconds and without taking memory.
An artifact is accepted unchanged only; a checkpoint where the damage hits no content, so that every bit that is read is the same; a shard, by training,
where its format is right and every token is one (the manifest's hashes refuse every change); settings where each line is valid and so are all together.
""" + (f"\nNot survived:\n\n{problems}" if problems else "")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line. Exits with code 2 where it is not valid."""

    def count(text: str) -> int:
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=count, default=200, metavar="N", help="faults in runs (default: 200)")
    parser.add_argument("--mutations", type=count, default=10_000, metavar="N", help="damaged files of each kind (default: 10000)")
    parser.add_argument("--seconds", type=count, default=10**9, metavar="LIMIT", help="no new fault after this many seconds")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of the moments and the damage (default: 0)")
    parser.add_argument("--write", action="store_true", help="write the table into records/faults/README.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign that the arguments describe and returns the exit code."""
    options, console = parse(arguments), Console()
    words = list(sys.argv[1:] if arguments is None else arguments)
    place, code = Path(tempfile.mkdtemp(prefix="soak-")), 0
    soak: Soak | None = None
    try:
        soak = Soak(place, options.seed)
        soak.run(options.cycles, options.mutations, options.seconds, console)
    except KeyboardInterrupt:
        code = 130
    if soak is not None:
        console.print(soak.table(box.SIMPLE_HEAD, 0))  # for 80 columns
        if options.write and code == 0:
            PAGE.parent.mkdir(parents=True, exist_ok=True)
            train_gpt.atomic_write(PAGE, page(soak, " ".join(["python tests/faults/soak.py", *words])).encode())
    if soak is not None and soak.problems:
        print(f"{len(soak.problems)} not survived; what is left of them: {place}")
        return code or 1
    shutil.rmtree(place, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
