"""Runs train_gpt.py over a grid of settings, at random, or guided by Optuna; killed at any moment, the same command goes on.

    python records/sweep.py runs/lr PRESET=demo --choose MATRIX_LR 0.02 0.04 0.08 --choose LN_SCALE 0 1        a grid: every combination
    python records/sweep.py runs/decay PRESET=demo --range MUON_WEIGHT_DECAY 0.01 0.3 log --search random --trials 20
    python records/sweep.py runs/all PRESET=demo VAL_LOSS_EVERY=50 --range MATRIX_LR 0.01 0.1 log --choose NUM_LAYERS 4 5 6 --search tpe --trials 50 --prune
    python records/sweep.py runs/lr PRESET=demo --choose MATRIX_LR 0.02 0.04 --seeds 1 2 3 --seconds 120       equal time, three seeds each
    python records/sweep.py runs/lr                                                                            go on; or one more worker
    python records/sweep.py runs/lr --show --markdown                                                          the table so far, and nothing else

FOLDER holds everything: the study, a copy of the script, and one run folder `trial-0003-seed-1337` for each trial and seed (what it printed is in
`output/`). A trial is one combination of settings; its score is the mean over `--seeds`. Settings are checked by train_gpt.py's own rules before
anything runs; settings in the environment count as if they had been given. After each trial `results.csv`, `results.json` and `results.md` hold the
table, best first.

A trial that fails is recorded with its reason, and the sweep goes on. Ctrl-C or SIGTERM stops the running trial, which saves a checkpoint; asked
again, it stops without one. The same command, or FOLDER alone, goes on where that trial stopped. After `kill -9` of everything the running trial
goes back to its last checkpoint (CHECKPOINT_EVERY). The command given twice at once makes two workers, which share the trials. So do several
machines with `--storage` (any database that Optuna knows, or a file NAME.log on a shared disk) and folders of one name.

With more than one GPU a trial runs on all of them (`torchrun`); `--ranks` or CUDA_VISIBLE_DEVICES says otherwise. `--prune` stops a trial
whose validation loss (of its first seed) is above the median of the finished trials' at the same share of ITERATIONS or MAX_WALLCLOCK_SECONDS.

Exit code 0: every trial is done or pruned; 1: some failed; 2: not started; 128 + n: stopped by signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import optuna
import report
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

# Set by the sweep for each run, or written by each run to one and the same file.
RESERVED = {
    "SEED": "give --seeds", "RUN_ID": "each trial has its own", "RUNS_DIR": "it is FOLDER", "RESUME": "the sweep resumes by itself",
    "SCORES_FILE": "every trial would overwrite it", "DOCUMENTS_FILE": "every trial would overwrite it",
}  # fmt: skip
POLL_SECONDS = 0.5
CURVE_POINTS = 20  # at which curves are compared: every 5% of the budget
SAMPLED_COMBINATIONS = 64  # of a random search that are checked before it begins
MOST_FIRST_FAILURES = 3
GRID_TRIALS = "--trials: a grid has as many as it has combinations"
SETTING_WORD = re.compile(r"\w+=|@")
STUDY_ATTRIBUTE = "sweep"
NO_SWEEP = "there is no sweep of this name yet; say what varies with --choose NAME VALUE... or --range NAME LOW HIGH"


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Definition
# What a study is; stored in it, so that every worker and every continuation runs the same.


class Span(NamedTuple):
    """The ends of a range of numbers."""

    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Definition:
    """A sweep: what is fixed, what varies, and how."""

    settings: dict[str, str]
    choices: dict[str, list[str]]
    ranges: dict[str, Span]
    search: str  # grid, random or tpe
    trials: int
    seeds: list[int]
    score: str = ""  # key of result.json, such as val_bpb or scores.chunked.val_loss; less is better
    prune: bool = False
    prune_after: int = 4  # finished trials
    script: str = ""  # SHA-256 of the train_gpt.py that runs

    @functools.cached_property
    def grid(self) -> list[dict[str, str]]:
        """Every combination of the choices, in order."""
        return [dict(zip(self.choices, values, strict=True)) for values in itertools.product(*self.choices.values())]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Returns what Optuna samples from."""
        found: dict[str, BaseDistribution] = {name: CategoricalDistribution(values) for name, values in self.choices.items()}
        for name, (low, high, log) in self.ranges.items():
            whole = train_gpt.SETTINGS[name].type == "int"
            found[name] = IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)
        return found

    def arguments(self, params: Mapping[str, Any]) -> list[str]:
        """Returns the settings of a trial as arguments of train_gpt.py."""
        return [f"{name}={value}" for name, value in {**self.settings, **params}.items()]

    def config(self, params: Mapping[str, Any]) -> train_gpt.Config:
        """Returns the configuration of a trial. Raises ConfigError."""
        return train_gpt.parse_config(self.arguments(params), {})

    def samples(self) -> Iterator[dict[str, Any]]:
        """Returns the combinations to check: all of a grid, some of what a random search may draw."""
        if self.search == "grid":
            yield from self.grid
            return
        rng = np.random.default_rng(0)
        for number in range(SAMPLED_COMBINATIONS):
            # The first two are the ends, where most rules break.
            where = {name: float(number) if number < 2 else rng.random() for name in self.ranges}
            params: dict[str, Any] = {name: values[rng.integers(len(values))] for name, values in self.choices.items()}
            for name, (low, high, _) in self.ranges.items():
                value = low + where[name] * (high - low)
                params[name] = round(value) if train_gpt.SETTINGS[name].type == "int" else value
            yield params

    def to_json(self) -> dict[str, Any]:
        """Returns a form that survives JSON unchanged."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Definition:
        """Returns what `to_json` was made from."""
        return cls(**{**content, "ranges": {name: Span(*span) for name, span in content["ranges"].items()}})


def define(options: argparse.Namespace, environment: Mapping[str, str]) -> Definition:
    """Returns the sweep that the command line describes. Raises ValueError listing every problem."""
    problems: list[str] = []
    budget = {}
    if options.steps:
        budget = {"ITERATIONS": str(options.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    if options.seconds:
        budget = {"ITERATIONS": str(10**9), "MAX_WALLCLOCK_SECONDS": str(options.seconds)}  # so that the clock alone decides
    varied = [name for name, *_ in [*options.choose, *options.range]]
    settings = read_settings(options.settings, environment, {*RESERVED, *budget, *varied}, problems)
    choices = {name: values for name, *values in options.choose}
    ranges = read_ranges(options.range, problems)
    seeds = options.seeds or [train_gpt.Config.seed]
    names = [*settings, *budget, *varied]
    problems += [f"{name}: given twice; a setting is fixed, or varies in one way" for name in sorted({name for name in names if names.count(name) > 1})]
    problems += [f"{name}: not for a sweep: {reason}" for name, reason in RESERVED.items() if name in names]
    unknown = [name for name in varied if name not in train_gpt.SETTINGS]
    problems += [f"{name}: no such setting{train_gpt.did_you_mean(name, list(train_gpt.SETTINGS))}" for name in unknown]
    problems += [problem for name, values in choices.items() for problem in choice_problems(name, values)]
    problems += [problem for name, span in ranges.items() for problem in range_problems(name, span)]
    problems += choice_problems("SEED", [str(seed) for seed in seeds])
    if not varied:
        problems.append("nothing varies: give --choose NAME VALUE... or --range NAME LOW HIGH")
    search = options.search or ("random" if options.range else "grid")
    if search == "grid" and options.range:
        problems.append(f"--search grid tries every combination, but --range {options.range[0][0]} has no end of them; use --choose, or --search random")
    if (options.trials is None) != (search == "grid"):
        problems.append(GRID_TRIALS if search == "grid" else f"--search {search} needs --trials N")
    if problems:
        raise ValueError("\n".join(problems))
    score, prune = options.score or "", options.prune
    definition = Definition({**settings, **budget}, choices, ranges, search, options.trials or 0, seeds, score, prune, options.prune_after)
    definition = replace(definition, trials=options.trials or len(definition.grid))
    check_combinations(definition)
    if not definition.score:
        stages = definition.config(next(definition.samples())).stage_list
        definition = replace(definition, score="val_bpb" if "eval" in stages else "pre_quant_val_bpb")
    return definition


def read_settings(words: Sequence[str], environment: Mapping[str, str], departed: set[str], problems: list[str]) -> dict[str, str]:
    """Returns the settings that all trials share, from the environment and, with precedence, `@config.env` and NAME=value in `words`.

    An earlier run's config.env has every setting: it is what the sweep departs from, in the settings `departed`.
    """
    runs = train_gpt.read_arguments([word for word in words if word.startswith("@")], problems)
    given = train_gpt.read_arguments([word for word in words if not word.startswith("@")], problems)
    ignored = [name.strip() for name in given.get("IGNORE_ENV", environment.get("IGNORE_ENV", "")).split(",")]
    around = train_gpt.read_environment(environment, ignored, problems)
    return {**around, **{name: value for name, value in runs.items() if name not in departed}, **given}


def read_ranges(groups: Sequence[Sequence[str]], problems: list[str]) -> dict[str, Span]:
    """Returns name -> range for groups of NAME LOW HIGH [log]."""
    ranges = {}
    for name, *words in groups:
        ends, log = (words[:2], True) if words[2:] == ["log"] else (words, False)
        try:
            low, high = map(float, ends)
        except ValueError:
            low, high = math.nan, math.nan
        if low < high and (low > 0 or not log):
            ranges[name] = Span(low, high, log)
        else:
            problems.append(f"--range {name} {' '.join(words)}: expected LOW HIGH, or LOW HIGH log with LOW above 0")
    return ranges


def choice_problems(name: str, values: Sequence[str]) -> Iterator[str]:
    """Returns what is wrong with the values of one setting."""
    if len(set(values)) < max(len(values), 1):
        yield f"{name} {' '.join(values)}: expected values, each once"
    for value in values if name in train_gpt.SETTINGS else []:
        try:
            train_gpt.parse_value(name, value)
        except ValueError as error:
            yield f"{name}={value}: {error}"


def range_problems(name: str, span: Span) -> Iterator[str]:
    """Returns what is wrong with a range of one setting."""
    declared = train_gpt.SETTINGS.get(name)
    if declared and declared.type not in ("int", "float"):
        yield f"--range {name}: {name} is no number; use --choose"
    elif declared:
        for end in span[:2]:
            text = str(int(end)) if declared.type == "int" and end == int(end) else str(end)
            yield from choice_problems(name, [text])


def check_combinations(definition: Definition) -> None:
    """Raises ValueError where train_gpt.py refuses combinations of settings."""
    refused = []
    for params in definition.samples():
        config = None
        try:
            config = definition.config(params)
        except train_gpt.ConfigError as error:
            refused.append(f"{' '.join(f'{name}={value}' for name, value in params.items())}: {error}")
        if config and definition.prune and not config.val_loss_every:
            raise ValueError("--prune looks at the validation curve, but VAL_LOSS_EVERY is 0: say how many steps apart validations are")
    if refused:
        more = f"\nand {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ValueError("train_gpt.py refuses combinations of these settings:\n" + "\n".join(refused[:5]) + more)


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Study
# Optuna's storage numbers the trials, each number once for all workers. Who runs a trial holds the lock of its file, and so does the training
# process, which inherits it: a lock that can be had means that nobody runs the trial any more, whatever the storage says.


class ByNumber(optuna.samplers.BaseSampler):
    """Grid and random search in which a trial's number decides its settings, so that workers need not know of each other."""

    def __init__(self, grid: Sequence[Mapping[str, str]]) -> None:
        """Takes the combinations of a grid; none = random."""
        self.grid = grid

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns nothing: settings are drawn one by one."""
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Returns nothing, as above."""
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Returns the value of one setting of this trial."""
        if self.grid:
            return self.grid[trial.number][param_name]
        drawn = optuna.samplers.RandomSampler(seed=zlib.crc32(f"{trial.number} {param_name}".encode()))
        return drawn.sample_independent(study, trial, param_name, param_distribution)


class Lock:
    """A file that one process at a time holds, together with the children that inherit it; the system lets go of it when they end, however they end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1

    def acquire(self, wait: bool = False) -> bool:
        """Returns whether it is now held by this process; with `wait`, waits until it is."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(self.descriptor)
            return False
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{socket.gethostname()} {os.getpid()}".encode(), 0)
        return True

    def release(self) -> None:
        """Lets go of it."""
        os.close(self.descriptor)

    def holder_ended(self) -> bool:
        """Returns whether the process of this machine that acquired it has ended: then a child of it holds it."""
        host, _, pid = self.path.read_text(encoding="utf-8").partition(" ")
        if host != socket.gethostname() or not pid.isdecimal():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock at `path`, after waiting for it."""
    lock = Lock(path)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()


def open_storage(place: str | None, folder: Path) -> BaseStorage:
    """Returns Optuna's storage at `place`: a database URL, or a file that ends in .log; None = SQLite in `folder`. Raises ValueError."""
    try:
        if place is None:
            return RDBStorage(f"sqlite:///{folder.resolve() / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}})
        return JournalStorage(JournalFileBackend(place)) if place.endswith(".log") else RDBStorage(place)
    except (ImportError, SQLAlchemyError, OptunaError) as error:
        raise ValueError(f"{place or folder / 'study.db'}: cannot be opened as Optuna storage ({' '.join(str(error).split())})") from None


def open_study(folder: Path, place: str | None, definition: Definition | None, trials: int | None, script: Path) -> tuple[optuna.Study, Definition]:
    """Returns the study of `folder`, made if `definition` is given and there is none, and what it runs. Raises ValueError where the two disagree.

    `trials` raises the number of trials of a study that is there.
    """
    known = (folder / "study.db").exists() or place is not None
    if not definition and not known:
        raise ValueError(f"{folder}: {NO_SWEEP}")
    for name in ("locks", "output"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with held(claim_lock(folder)):  # making tables is not safe for two at once
        storage = open_storage(place, folder)
        names = optuna.get_all_study_names(storage)
        name = folder.resolve().name
        if not definition and name not in names:
            raise ValueError(f"{place or folder}: {NO_SWEEP}")
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
        attributes = study.user_attrs
        if not definition and STUDY_ATTRIBUTE not in attributes:
            raise ValueError(f"{place or folder}: {NO_SWEEP}")
        digest = freeze_script(folder, script, str(attributes.get(STUDY_ATTRIBUTE, {}).get("script", "")))
        if definition and STUDY_ATTRIBUTE not in attributes:
            study.set_user_attr(STUDY_ATTRIBUTE, replace(definition, script=digest).to_json())
        stored = Definition.from_json(study.user_attrs[STUDY_ATTRIBUTE])
        if definition:
            check_same(stored, replace(definition, script=digest), folder)
        if trials is not None and stored.search == "grid":
            raise ValueError(GRID_TRIALS)
        if trials is not None and trials > stored.trials:
            stored = replace(stored, trials=trials)
            study.set_user_attr(STUDY_ATTRIBUTE, stored.to_json())
    study.sampler = optuna.samplers.TPESampler() if stored.search == "tpe" else ByNumber(stored.grid if stored.search == "grid" else [])
    study.pruner = optuna.pruners.MedianPruner(stored.prune_after, n_min_trials=stored.prune_after) if stored.prune else optuna.pruners.NopPruner()
    return study, stored


def freeze_script(folder: Path, script: Path, wanted: str) -> str:
    """Returns the SHA-256 of `folder`'s copy of the script, made if it is missing, so that editing the script does not reach a sweep under way.

    Raises ValueError where it is not the script with the digest `wanted`, if any.
    """
    frozen = folder / "train_gpt.py"
    source = (frozen if frozen.exists() else script).read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if wanted and digest != wanted:
        raise ValueError(f"{frozen if frozen.exists() else script}: not the script that this sweep runs; check out the commit that the sweep was started with")
    if not frozen.exists():
        write_whole(frozen, source)
    return digest


def check_same(stored: Definition, asked: Definition, folder: Path) -> None:
    """Raises ValueError where a study is asked to go on as another one; only the number of trials may differ."""
    before, now = stored.to_json(), asked.to_json()
    differences = [f"{key} was {before[key]}, is {now[key]}" for key in before if key != "trials" and before[key] != now[key]]
    if differences:
        raise ValueError(f"{folder}: is another sweep ({'; '.join(differences)}); go on with it by FOLDER alone, or choose another folder")


class Claim(NamedTuple):
    """A trial that this worker alone runs."""

    trial: optuna.Trial
    lock: Lock


def claim_lock(folder: Path) -> Path:
    """Returns the lock under which the workers of this machine open the study and take trials."""
    return folder / "locks" / "claim"


def lock_of(folder: Path, number: int) -> Lock:
    """Returns the lock of a trial; its file is there once this machine has begun it."""
    return Lock(folder / "locks" / f"trial-{number:04d}")


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that somebody runs or ran, and that have no outcome."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def claim(study: optuna.Study, definition: Definition, folder: Path) -> tuple[Claim | None, list[int]]:
    """Returns a trial to run, one that was interrupted on this machine before a new one; or the trials that a process without a sweep still runs."""
    orphans = []
    with held(claim_lock(folder)):
        for frozen in running(study):
            lock = lock_of(folder, frozen.number)
            if not lock.path.exists():
                continue  # another machine's
            if lock.acquire():
                if any(still.number == frozen.number for still in running(study)):  # it may have ended since it was listed
                    return Claim(optuna.Trial(study, frozen._trial_id), lock), []
                lock.release()
            elif lock.holder_ended():
                orphans.append(frozen.number)
        if orphans or len(study.get_trials(deepcopy=False)) >= definition.trials:
            return None, orphans
        trial = study.ask()
        lock = lock_of(folder, trial.number)
        lock.acquire()
    if trial.number >= definition.trials:  # another machine was quicker
        study.tell(trial, state=TrialState.FAIL)
        lock.release()
        return None, []
    return Claim(trial, lock), []


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Runs


class Failed(Exception):
    """A run that gave no score; the message is the reason."""


class Pruned(Exception):
    """A run that was stopped for its curve."""


class Stopped(Exception):
    """A run that was stopped because the sweep is to stop."""


class Stopper:
    """SIGINT, SIGTERM and SIGHUP, passed on to the running trial: the first two as SIGTERM (save and stop; stop), a third as SIGKILL."""

    def __init__(self) -> None:
        self.number = 0
        self.times = 0
        self.process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """Takes over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.number = self.number or number
        self.times += 1
        self.pass_on()

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Sends `process` what comes from now on, and what has come while it was being started."""
        self.process = process
        if self.number:
            self.pass_on()

    def pass_on(self) -> None:
        """Stops the running trial, if any."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL) if self.times > 2 else self.process.terminate()


def run_name(trial: int, seed: int) -> str:
    """Returns the RUN_ID of one run of a trial."""
    return f"trial-{trial:04d}-seed-{seed}"


def launcher(ranks: int) -> list[str]:
    """Returns what starts a script on this many processes."""
    distributed = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(distributed if ranks > 1 else [])]


def choose_ranks(asked: int | None, config: train_gpt.Config) -> int:
    """Returns the number of processes of a trial: as asked, else one for each GPU."""
    return asked or (max(torch.cuda.device_count(), 1) if config.device in ("auto", "cuda") else 1)


def curve(run: report.Run, config: train_gpt.Config) -> dict[int, float]:
    """Returns validation losses at equal shares of the budget (in CURVE_POINTS-ths), by straight lines between validations.

    The share is that of ITERATIONS or MAX_WALLCLOCK_SECONDS, whichever is further; a run that steps more slowly is compared at equal time.
    """
    limit = config.max_wallclock_seconds or math.inf
    shares = [max(report.number(val, "step") / config.iterations, report.number(val, "train_seconds") / limit) for val in run.vals]
    losses = [report.number(val, "val_loss") for val in run.vals]
    points = range(math.ceil(shares[0] * CURVE_POINTS), math.floor(shares[-1] * CURVE_POINTS) + 1) if shares else range(0)
    return {point: float(np.interp(point / CURVE_POINTS, shares, losses)) for point in points if 0 < point < CURVE_POINTS}


def last_error(output: Path) -> str:
    """Returns the line of a failed run's output that says why."""
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"(^|: )error: |^\w*(Error|Exception|Diverged)\b|\w+Error: ", line) and "ChildFailedError" not in line]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def result_value(result: Mapping[str, Any], score: str) -> float:
    """Returns the number at the dotted key `score`. Raises Failed where there is none."""
    value: Any = result
    for key in score.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Failed(f"result.json has no number {score}")
    return float(value)


class Runner:
    """Starts runs of train_gpt.py, watches them and reads their results."""

    def __init__(self, definition: Definition, folder: Path, ranks: int | None, stopper: Stopper, screen: Screen) -> None:
        self.definition = definition
        self.folder = folder
        self.ranks = ranks
        self.stopper = stopper
        self.screen = screen

    def run(self, claimed: Claim, seed: int, watch_curve: bool) -> dict[str, Any]:
        """Returns the result of one run of a trial, gone on with if it was interrupted. Raises Failed, Pruned or Stopped."""
        if self.stopper.number:
            raise Stopped
        trial, params = claimed.trial, claimed.trial.params
        name = run_name(trial.number, seed)
        place, output = self.folder / name, self.folder / "output" / f"{name}.txt"
        try:
            config = self.definition.config(params)
        except train_gpt.ConfigError as error:
            raise Failed("; ".join(str(error).splitlines())) from None
        if not (place / "result.json").exists():
            resume = (place / "config.env").exists()
            if place.exists() and not resume:
                os.replace(place, unused(place))  # interrupted before the run had begun
            settings = [*self.definition.arguments(params), f"SEED={seed}", f"RUNS_DIR={self.folder}", f"RUN_ID={name}", f"RESUME={int(resume)}"]
            command = [*launcher(choose_ranks(self.ranks, config)), str(self.folder / "train_gpt.py"), *settings]
            code = self.execute(command, claimed, place, output, config, watch_curve)
            if not (place / "result.json").exists():
                raise Failed(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {last_error(output)}")
        if watch_curve:
            should_prune(trial, curve(report.read_run(place), config))  # too late for this one, but others are compared with all of it
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        if (result.get("bytes_total") or 0) > (result.get("bytes_cap") or math.inf):
            raise Failed(f"over BYTES_CAP: {result['bytes_total']:,} bytes of {result['bytes_cap']:,}")
        return result

    def execute(self, command: Sequence[str], claimed: Claim, place: Path, output: Path, config: train_gpt.Config, watch_curve: bool) -> int:
        """Returns the exit code of `command`. Raises Pruned or Stopped, after it has ended."""
        environment = {name: value for name, value in os.environ.items() if name not in train_gpt.SETTINGS}
        with open(output, "ab") as file:
            # A session of its own: Ctrl-C in the terminal reaches the sweep only, which passes it on once.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                pass_fds=(claimed.lock.descriptor,),
            )  # fmt: skip
        pruned, size = False, -1
        try:
            self.stopper.watch(process)
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                log = place / "run.jsonl"
                now = log.stat().st_size if log.exists() else -1
                if now != size:
                    size, run = now, None
                    with contextlib.suppress(ValueError):  # nothing in it yet
                        run = report.read_run(place)
                    if run and watch_curve and not pruned and should_prune(claimed.trial, curve(run, config)):
                        pruned = True
                        process.terminate()
                    self.screen.progress[claimed.trial.number] = progress_text(run)
                self.screen.refresh()
        finally:
            if process.poll() is None:  # the sweep itself has failed: the run is to save what it has
                process.terminate()
                process.wait()
            self.screen.progress.pop(claimed.trial.number, None)
            self.stopper.process = None
        code = process.returncode
        if pruned:
            raise Pruned
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT) and not self.stopper.number:
            time.sleep(2)  # a machine that shuts down signals every process; ours may be the last to hear of it
        if code and self.stopper.number:
            raise Stopped
        return code


def should_prune(trial: optuna.Trial, points: Mapping[int, float]) -> bool:
    """Returns whether the median of the finished trials is better at one of `points`, after reporting those that are new."""
    known, worse = running_values(trial), False
    for point, loss in points.items():
        if point not in known:
            trial.report(loss, point)
            worse = trial.should_prune() or worse
    return worse


def running_values(trial: optuna.Trial) -> dict[int, float]:
    """Returns what has been reported of a trial, by this worker or an earlier one."""
    return next((frozen.intermediate_values for frozen in running(trial.study) if frozen.number == trial.number), {})


def progress_text(run: report.Run | None) -> str:
    """Returns how far a run is."""
    if run is None or not (run.steps or run.vals):
        return "starting"
    texts = []
    if run.steps:
        texts.append(f"step {report.count(report.number(run.steps[-1], 'step'))}, {report.clock(report.number(run.steps[-1], 'train_seconds'))}")
    if run.vals:
        texts.append(f"val_bpb {report.bpb(report.number(run.vals[-1], 'val_bpb'))}")
    if run.export:
        texts.append("evaluating")
    return ", ".join(texts)


def unused(path: Path) -> Path:
    """Returns a name like `path` that is not taken."""
    return next(name for name in (path.with_name(f"broken-{count}-{path.name}") for count in itertools.count(1)) if not name.exists())


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Table


class Row(NamedTuple):
    """A trial in the table."""

    trial: int
    state: str  # done, pruned, running or failed
    score: float  # mean over seeds; of a pruned trial, the last loss on its curve
    std: float  # over seeds
    n: int
    params: dict[str, Any]
    steps: float
    train_seconds: float
    bytes_total: float
    runs: list[str]
    reason: str


def rows(study: optuna.Study, definition: Definition) -> list[Row]:
    """Returns the trials: the done by score, then pruned, running and failed ones."""
    names = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running", TrialState.FAIL: "failed"}
    found = []
    for frozen in study.get_trials(deepcopy=False, states=tuple(names)):
        if frozen.number >= definition.trials:
            continue
        results = frozen.user_attrs.get("results", {})
        scores = [result["score"] for result in results.values()]
        score = frozen.value if frozen.state in (TrialState.COMPLETE, TrialState.PRUNED) and frozen.value is not None else math.nan
        steps, seconds, size = (
            statistics.fmean(result[key] for result in results.values()) if results else math.nan for key in ("steps", "train_seconds", "bytes_total")
        )
        std = statistics.stdev(scores) if len(scores) > 1 else math.nan
        runs = [run_name(frozen.number, int(seed)) for seed in results]
        reason = str(frozen.user_attrs.get("reason", ""))
        found.append(Row(frozen.number, names[frozen.state], score, std, len(scores), frozen.params, steps, seconds, size, runs, reason))
    order = list(names.values())
    return sorted(found, key=lambda row: (order.index(row.state), row.score if math.isfinite(row.score) else math.inf, row.trial))


def value_text(value: Any) -> str:
    """Returns the value of a setting in few digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(found: Sequence[Row], definition: Definition, style: box.Box, progress: Mapping[int, str], most: int = 10**6) -> Table:
    """Returns the table of the first `most` trials, with what is known of running ones."""
    names = list(definition.distributions())
    shown = Table("trial", "state", definition.score, "std", "n", *names, "steps", "train s", "bytes", "note", box=style)
    shown.columns[-1].no_wrap = True  # the files have all of it
    for row in found[:most]:
        # A pruned trial's score is a loss half way, not a score.
        numbers = (report.decimals(row.score if row.state == "done" else math.nan, 4), report.decimals(row.std, 4))
        sizes = (report.count(row.steps), report.decimals(row.train_seconds, 1), report.count(row.bytes_total))
        note = row.reason or progress.get(row.trial, "")
        shown.add_row(str(row.trial), row.state, *numbers, str(row.n), *(value_text(row.params.get(name, report.ABSENT)) for name in names), *sizes, note)
    return shown


def text_of(shown: Table) -> str:
    """Returns a table as it looks on a wide screen."""
    console = Console(file=io.StringIO(), width=400)
    console.print(shown)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"  # type: ignore[attr-defined]


def write_results(folder: Path, found: Sequence[Row], definition: Definition) -> None:
    """Writes results.csv, results.json and results.md, each whole or not at all."""
    names = list(definition.distributions())
    table_csv = io.StringIO()
    writer = csv.writer(table_csv)
    writer.writerow(["trial", "state", "score", "std", "n", *names, "steps", "train_seconds", "bytes_total", "runs", "reason"])
    for row in found:
        plain = ["" if isinstance(value, float) and math.isnan(value) else value for value in row]
        params = [row.params.get(name, "") for name in names]
        writer.writerow([*plain[:5], *params, *plain[6:9], " ".join(row.runs), row.reason])
    trials = [{key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row._asdict().items()} for row in found]
    write_whole(folder / "results.csv", table_csv.getvalue().encode())
    write_whole(folder / "results.json", json.dumps({"sweep": definition.to_json(), "trials": trials}, indent=1).encode())
    write_whole(folder / "results.md", text_of(table(found, definition, box.MARKDOWN, {})).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all, whoever else writes it at the same time."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


class Screen:
    """What people see: on a terminal a live table, elsewhere a line for each thing that happens."""

    def __init__(self, study: optuna.Study, definition: Definition) -> None:
        self.study = study
        self.definition = definition
        self.console = Console(width=None if sys.stdout.isatty() else 200)
        self.live: Live | None = None
        self.progress: dict[int, str] = {}  # of the trials of this worker

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Shows the live table, if on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False) as self.live:
            self.refresh()
            yield
            self.refresh()

    def refresh(self) -> None:
        """Brings the live table up to date."""
        if self.live:
            found = rows(self.study, self.definition)
            # Running trials stay in sight however many are done.
            found.sort(key=lambda row: row.state != "running")
            self.live.update(table(found, self.definition, box.SIMPLE_HEAD, self.progress, max(self.console.height - 8, 5)), refresh=True)

    def say(self, text: str) -> None:
        """Prints a line, above the live table."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------------------------------------------
# Sweep


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Returns the value of a setting in this trial: the sampler's choice, or what it chose before the trial was interrupted."""
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
        case FloatDistribution():
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    raise AssertionError(distribution)


def run_trial(runner: Runner, claimed: Claim) -> None:
    """Runs a trial with every seed and tells the study its outcome; one that is stopped has none yet."""
    trial, definition, screen = claimed.trial, runner.definition, runner.screen
    chosen = {name: suggest(trial, name, distribution) for name, distribution in definition.distributions().items()}
    screen.say(f"trial {trial.number} of {definition.trials}: {' '.join(f'{name}={value_text(value)}' for name, value in chosen.items())}")
    results: dict[str, dict[str, float]] = {}
    try:
        for position, seed in enumerate(definition.seeds):
            result = runner.run(claimed, seed, definition.prune and position == 0)
            results[str(seed)] = {"score": result_value(result, definition.score)}
            results[str(seed)] |= {key: report.number(result, key) for key in ("steps", "train_seconds", "bytes_total")}
            trial.set_user_attr("results", results)
        score = statistics.fmean(result["score"] for result in results.values())
        trial.study.tell(trial, score)
        screen.say(f"trial {trial.number}: {definition.score} {score:.4f}")
    except Failed as error:
        trial.set_user_attr("reason", str(error))
        trial.study.tell(trial, state=TrialState.FAIL)
        screen.say(f"trial {trial.number} failed: {error}")
    except Pruned:
        point, loss = max(running_values(trial).items())
        trial.set_user_attr("reason", f"pruned at {point / CURVE_POINTS:.0%}, val_loss {loss:.4f}")
        trial.study.tell(trial, state=TrialState.PRUNED)
        screen.say(f"trial {trial.number} pruned at {point / CURVE_POINTS:.0%} of its budget, val_loss {loss:.4f}")
    except Stopped:
        screen.say(f"trial {trial.number} stopped; go on with: python records/sweep.py {runner.folder}")


def work(study: optuna.Study, definition: Definition, folder: Path, runner: Runner, keep_going: bool) -> None:
    """Runs trials until none is left, the sweep is to stop, or the first ones have all failed."""
    waited_for: list[int] = []
    while not runner.stopper.number:
        finished = [row.state for row in rows(study, definition) if row.state != "running"]
        if finished.count("failed") == len(finished) >= MOST_FIRST_FAILURES and not keep_going:
            runner.screen.say(f"the first {len(finished)} trials have all failed: mend the cause and begin in another folder, or add --keep-going")
            return
        claimed, orphans = claim(study, definition, folder)
        if claimed is None and not orphans:
            return
        if claimed is None:
            if orphans != waited_for:
                runner.screen.say(f"trial {', '.join(map(str, orphans))} is still being trained by a process that outlived its sweep: waiting for it")
                waited_for = orphans
            time.sleep(POLL_SECONDS)
            continue
        try:
            run_trial(runner, claimed)
        finally:
            claimed.lock.release()
        write_results(folder, rows(study, definition), definition)
        runner.screen.refresh()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line. Exits with code 2 where it is not valid."""

    def at_least_one(text: str) -> int:
        if not text.isdecimal() or not int(text):
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number above 0")
        return int(text)

    def seconds(text: str) -> float:
        if not 0 < float(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected seconds above 0")
        return float(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s FOLDER [NAME=value ...] [@config.env] [options]"
    parser.epilog = "NAME=value: a setting that all trials share; python train_gpt.py --help lists them. @config.env: the settings of an earlier run."
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the sweep, such as runs/lr")
    parser.add_argument("--choose", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="a setting that varies over these values")
    parser.add_argument("--range", nargs="+", action="append", default=[], metavar=("NAME", "LOW HIGH [log]"), help="a number that varies between two")
    parser.add_argument("--search", choices=("grid", "random", "tpe"), help="tpe = Optuna's (default: grid, with --range random)")
    parser.add_argument("--trials", type=at_least_one, metavar="N", help="of random and tpe; a larger number makes a finished sweep go on")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=f"each trial runs with each of them (default: {train_gpt.Config.seed})")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=at_least_one, metavar="N", help="equal steps: ITERATIONS=N MAX_WALLCLOCK_SECONDS=0")
    budget.add_argument("--seconds", type=seconds, metavar="S", help="equal time: MAX_WALLCLOCK_SECONDS=S, and no end of ITERATIONS")
    parser.add_argument("--score", metavar="KEY", help="of result.json, less is better (default: val_bpb, or pre_quant_val_bpb where STAGES has no eval)")
    parser.add_argument("--prune", action="store_true", help="stop trials whose validation curve is above the median; needs VAL_LOSS_EVERY")
    parser.add_argument("--prune-after", type=at_least_one, default=4, metavar="N", help="but none before N trials are done (default: 4)")
    parser.add_argument("--storage", metavar="URL", help="Optuna storage that machines share, as mysql://…, postgresql://…, or shared/NAME.log")
    parser.add_argument("--ranks", type=at_least_one, metavar="N", help="processes of a trial (default: one for each GPU)")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", metavar="FILE", help="another copy of train_gpt.py to run")
    parser.add_argument("--keep-going", action="store_true", help=f"also when the first {MOST_FIRST_FAILURES} trials have all failed")
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print the last table for a README")
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Wherever they stand: argparse would take those after `--choose NAME VALUE...` for more values.
    settings = [word for word in words if SETTING_WORD.match(word)]
    options = parser.parse_args([word for word in words if word not in settings])
    options.settings = settings
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sweep that the arguments describe and returns the exit code."""
    options = parse(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stopper = Stopper()
    try:
        keys = ("settings", "choose", "range", "search", "seeds", "steps", "seconds", "score", "prune")
        described = any(getattr(options, key) for key in keys)
        definition = define(options, os.environ) if described and not options.show else None
        study, definition = open_study(options.folder, options.storage, definition, options.trials, options.script)
        screen = Screen(study, definition)
        if not options.show:
            stopper.install()
            with screen.open():
                work(study, definition, options.folder, Runner(definition, options.folder, options.ranks, stopper, screen), options.keep_going)
        found = rows(study, definition)
        write_results(options.folder, found, definition)
    except (ValueError, OSError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    except (SQLAlchemyError, OptunaError) as error:
        print(f"sweep.py: the study cannot be reached ({' '.join(str(error).split())}); the same command goes on", file=sys.stderr)
        return 2
    if options.markdown:
        print(text_of(table(found, definition, box.MARKDOWN, {})), end="")
    elif options.show or not screen.console.is_terminal:
        screen.console.print(table(found, definition, box.SIMPLE_HEAD, {}))
    if stopper.number:
        return 128 + stopper.number
    return 1 if any(row.state == "failed" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
