"""records/sweep.py: what runs, that it runs once, and that nothing is lost when trials or workers die.

Most tests put a stand-in at the place of train_gpt.py: it reads the same arguments, answers the same signals and leaves the same files, in
milliseconds. One test runs the real script.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import optuna
import pytest
import report
import sweep
from conftest import ROOT, clean_environment, tiny_arguments
from rich.console import Console

import train_gpt

STAND_IN = '''
import json, os, signal, sys, time
from pathlib import Path

settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
place = Path(settings["RUNS_DIR"], settings["RUN_ID"])
resume = settings["RESUME"] == "1"
lr, mode, steps = float(settings.get("MATRIX_LR", 0)), settings.get("GRAD_CLIP_NORM", "0"), int(settings.get("ITERATIONS", 3))
every = int(settings.get("VAL_LOSS_EVERY", 0))
stops = []
signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
with open(Path(settings["RUNS_DIR"], "started.txt"), "a") as file:
    file.write(json.dumps({"run": settings["RUN_ID"], "resume": resume, "pid": os.getpid(), "settings": settings, "environment": dict(os.environ)}) + "\\n")
if mode == "1":
    sys.exit("Traceback\\nerror: planted\\n")
if mode == "2":
    os.kill(os.getpid(), signal.SIGKILL)
if resume != (place / "config.env").exists():
    sys.exit("error: RESUME")
place.mkdir(exist_ok=True)
(place / "config.env").write_text("x")
checkpoint = place / "checkpoint.pt"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
with open(place / "run.jsonl", "a") as log:
    for step in range(first + 1, steps + 1):
        time.sleep(float(settings.get("ADAM_EPS", 0)))
        events = [{"event": "step", "step": step, "steps": steps, "train_loss": 1.0, "train_seconds": step / 10}]
        if every and step % every == 0:
            events.append({"event": "val", "step": step, "train_seconds": step / 10, "val_loss": 1 + lr, "val_bpb": lr})
        for event in events:
            log.write(json.dumps(event) + "\\n")
        log.flush()
        if (mode == "7" and step == 2 and not resume) or mode == "5":
            os.kill(os.getppid(), signal.SIGINT)
        if stops and mode != "5":
            checkpoint.write_text(str(step))
            sys.exit(128 + signal.SIGTERM)
score = {"3": None, "6": "x"}.get(mode, lr + int(settings["SEED"]) / 1000)
over = mode == "4"
result = {"seed": int(settings["SEED"]), "val_bpb": score, "steps": steps, "train_seconds": 0.5, "bytes_total": 20 if over else 10, "bytes_cap": 15}
(place / "result.json").write_text(json.dumps(result))
sys.exit(3 if over else 0)
'''
# The settings of a stand-in: how long a step takes, and how it is to end (MODE).
PAUSE, MODE = "ADAM_EPS", "GRAD_CLIP_NORM"
# Runs a sweep in a process that has imported most of what it needs; a script's own folder is not on its path there.
WORKER = f"""
import sys
sys.path.insert(0, {str(ROOT / "records")!r})
import sweep
sys.exit(sweep.main(sys.argv[1:]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN, encoding="utf-8")
    return path


@pytest.fixture
def run_sweep(tmp_path: Path, script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """A function that sweeps in this process, in tmp_path/lr: run_sweep("--choose", "MATRIX_LR", "0.1", "0.2") -> exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    for name in train_gpt.SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, folder: Path = tmp_path / "lr", script: Path = script) -> int:
        try:
            return sweep.main([str(folder), *map(str, arguments), "--script", str(script)])
        except SystemExit as stop:
            return int(stop.code or 0)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path: Path, script: Path) -> Callable[..., forked.Ranks]:
    """A function that starts a worker in a process of its own and does not wait."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")

    def run(*arguments: object, script: Path = script) -> forked.Ranks:
        return forked.start(worker, [str(tmp_path / "lr"), *map(str, arguments), "--script", str(script)], clean_environment(), tmp_path)

    return run


def started(folder: Path) -> list[dict[str, Any]]:
    """Returns what was run in a sweep's folder, in order."""
    path = folder / "started.txt"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def trials(folder: Path) -> list[dict[str, Any]]:
    """Returns the trials of results.json."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["trials"]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Returns when `condition` holds; fails if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Returns whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


LRS = ("--choose", "MATRIX_LR", "0.3", "0.1", "0.2")
TWELVE = ("--choose", "MATRIX_LR", "0.1", "0.2", "0.3", "0.4", "--choose", "SCALAR_LR", "0.1", "0.2", "0.3")


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What runs


def test_a_grid_runs_every_combination_with_every_seed(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert run_sweep("PRESET=demo", "SCALE=tiny", *LRS, "--choose", "LN_SCALE", "0", "1", "--seeds", 7, 8) == 0
    runs = started(tmp_path / "lr")
    assert Counter((run["settings"]["MATRIX_LR"], run["settings"]["LN_SCALE"], run["settings"]["SEED"]) for run in runs) == Counter(
        (lr, swiglu, seed) for lr in ("0.3", "0.1", "0.2") for swiglu in "01" for seed in "78"
    )
    assert all(run["settings"]["PRESET"] == "demo" and run["settings"]["RUNS_DIR"] == str(tmp_path / "lr") for run in runs)
    found = trials(tmp_path / "lr")
    assert [row["params"]["MATRIX_LR"] for row in found] == ["0.1", "0.1", "0.2", "0.2", "0.3", "0.3"]  # best first
    assert found[0]["score"] == pytest.approx(0.1075) and found[0]["std"] == pytest.approx(0.001 / math.sqrt(2)) and found[0]["n"] == 2
    assert found[0]["runs"] == [f"trial-{found[0]['trial']:04d}-seed-{seed}" for seed in (7, 8)]
    assert (found[0]["steps"], found[0]["train_seconds"], found[0]["bytes_total"], found[0]["state"]) == (3, 0.5, 10, "done")


def test_tables_on_disk_and_on_screen(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(*LRS) == 0
    output = capsys.readouterr().out
    assert "trial 0 of 3: MATRIX_LR=0.3" in output and "trial 1: val_bpb 1.4370" in output
    with open(tmp_path / "lr" / "results.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["trial"], row["MATRIX_LR"], row["state"], row["std"]) for row in table] == [
        ("1", "0.1", "done", ""), ("2", "0.2", "done", ""), ("0", "0.3", "done", "")]  # fmt: skip
    assert float(table[0]["score"]) == pytest.approx(0.1 + 1.337) and table[0]["runs"] == "trial-0001-seed-1337"
    markdown = (tmp_path / "lr" / "results.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    assert rows[0][:6] == ["trial", "state", "val_bpb", "std", "n", "MATRIX_LR"] and rows[2][:6] == ["1", "done", "1.4370", "—", "1", "0.1"]
    assert run_sweep("--show", "--markdown") == 0
    assert capsys.readouterr().out == markdown
    assert run_sweep("--show") == 0 and "1.4370" in capsys.readouterr().out
    assert len(started(tmp_path / "lr")) == 3  # showing runs nothing


def test_random_search_draws_by_number(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    space = ("PRESET=plain", "--range", "MATRIX_LR", 0.001, 1, "log", "--range", "NUM_LAYERS", 2, 9, "--choose", "SWIGLU", 0, 1,
             "--range", "SCALAR_LR", 0.001, 1, "log", "--trials", 8)  # fmt: skip
    assert run_sweep(*space) == 0 and run_sweep(*space, folder=tmp_path / "again" / "lr") == 0
    found = sorted(trials(tmp_path / "lr"), key=lambda row: row["trial"])
    drawn = [row["params"] for row in found]
    assert drawn == [row["params"] for row in sorted(trials(tmp_path / "again" / "lr"), key=lambda row: row["trial"])]
    assert len({params["MATRIX_LR"] for params in drawn}) == 8 and len({params["NUM_LAYERS"] for params in drawn}) > 2
    assert {params["SWIGLU"] for params in drawn} == {"0", "1"}
    assert all(0.001 <= params["MATRIX_LR"] <= 1 and params["NUM_LAYERS"] in range(2, 10) for params in drawn)
    assert sum(params["MATRIX_LR"] < 0.0316 for params in drawn) >= 2  # half of the decades; of an even draw, 3%
    assert all(params["MATRIX_LR"] != params["SCALAR_LR"] for params in drawn)  # each setting is drawn for itself
    run = started(tmp_path / "lr")[0]["settings"]
    assert float(run["MATRIX_LR"]) == drawn[0]["MATRIX_LR"] and run["NUM_LAYERS"] == str(drawn[0]["NUM_LAYERS"])


def test_tpe_learns_from_scores(run_sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.samplers, "TPESampler", functools.partial(optuna.samplers.TPESampler, seed=0))
    assert run_sweep("--range", "MATRIX_LR", 0, 1, "--search", "tpe", "--trials", 15) == 0
    drawn = [row["params"]["MATRIX_LR"] for row in sorted(trials(tmp_path / "lr"), key=lambda row: row["trial"])]
    assert sum(drawn[10:]) / 5 < sum(drawn[:10]) / 10 / 2  # after ten random trials it looks where the score, which is MATRIX_LR, was low


def test_equal_steps_and_equal_time(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert run_sweep("--choose", "MATRIX_LR", "0.1", "0.2", "--steps", 2) == 0
    steps = started(tmp_path / "lr")[0]["settings"]
    assert (steps["ITERATIONS"], steps["MAX_WALLCLOCK_SECONDS"]) == ("2", "0")
    timed = sweep.define(sweep.parse([str(tmp_path), "--choose", "MATRIX_LR", "0.1", "--seconds", "90"]), {})
    config = timed.config(timed.grid[0])
    assert config.max_wallclock_seconds == 90 and config.iterations == 10**9


def test_settings_of_the_environment_count_and_are_kept(run_sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALAR_LR", "0.5")
    monkeypatch.setenv("BETA1", "0.8")
    assert run_sweep("BETA1=0.7", *LRS) == 0
    run = started(tmp_path / "lr")[0]
    assert run["settings"]["SCALAR_LR"] == "0.5" and run["settings"]["BETA1"] == "0.7"
    assert "SCALAR_LR" not in run["environment"] and "PATH" in run["environment"]


def test_a_sweep_departs_from_an_earlier_run(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    config = train_gpt.parse_config(["MATRIX_LR=0.5", "BETA1=0.8", "SCALAR_LR=0.7", "SEED=9", "RUN_ID=earlier", "ITERATIONS=7"], {})
    (tmp_path / "config.env").write_text(train_gpt.config_lines(config), encoding="utf-8")
    assert run_sweep(*LRS, f"@{tmp_path / 'config.env'}", "SCALAR_LR=0.6", "--steps", 2) == 0
    runs = [run["settings"] for run in started(tmp_path / "lr")]
    assert [run["MATRIX_LR"] for run in runs] == ["0.3", "0.1", "0.2"]
    expected = {"BETA1": "0.8", "SCALAR_LR": "0.6", "ITERATIONS": "2", "SEED": "1337", "RUN_ID": "trial-0000-seed-1337"}
    assert {name: runs[0][name] for name in expected} == expected


def test_settings_reach_the_script_as_they_are(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    nasty = f"$(touch {tmp_path}/pwned) `touch {tmp_path}/pwned`; touch {tmp_path}/pwned 'x \" *"
    assert run_sweep(f"DATA_PATH={nasty}", *LRS) == 0
    assert started(tmp_path / "lr")[0]["settings"]["DATA_PATH"] == nasty and not (tmp_path / "pwned").exists()


def test_score_follows_the_stages_or_the_command_line(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    make = functools.partial(sweep.define, environment={})
    assert make(sweep.parse(["x", "STAGES=train", *LRS])).score == "pre_quant_val_bpb" and make(sweep.parse(["x", *LRS])).score == "val_bpb"
    assert run_sweep(*LRS, "--score", "train_seconds") == 0
    assert [row["score"] for row in trials(tmp_path / "lr")] == [0.5] * 3
    assert sweep.result_value({"scores": {"chunked": {"val_loss": 2}}}, "scores.chunked.val_loss") == 2
    for result in ({}, {"scores": 1}, {"scores": {"chunked": {"val_loss": math.nan}}}, {"scores": {"chunked": {"val_loss": True}}}):
        with pytest.raises(sweep.Failed, match="no number"):
            sweep.result_value(result, "scores.chunked.val_loss")


def test_several_gpus_are_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.launcher(1) == [sys.executable]
    assert sweep.launcher(8) == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    auto, cpu = train_gpt.Config(), train_gpt.Config(device="cpu")
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 8)
    assert [sweep.choose_ranks(None, auto), sweep.choose_ranks(None, cpu), sweep.choose_ranks(2, auto)] == [8, 1, 2]
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 0)
    assert sweep.choose_ranks(None, auto) == 1


def test_documented_commands_are_valid(run_sweep: Callable[..., int]) -> None:
    commands = [line.split("  ")[0].split()[2:] for line in map(str.strip, (sweep.__doc__ or "").splitlines()) if line.startswith("python records/sweep.py")]
    defined = [sweep.define(options, {}) for options in map(sweep.parse, commands) if options.settings]
    assert len(commands) == 6 and [definition.trials for definition in defined] == [6, 20, 50, 2]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What is refused, before anything runs


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--choose", "MATRIX_LRR", "0.1"], ["MATRIX_LRR: no such setting; did you mean MATRIX_LR?"]),
        (["MATRIX_LRR=1", "BETA1=x", "--choose", "MATRIX_LR", "0.1", "banana"], ["MATRIX_LRR=1: expected", "MATRIX_LR=banana: expected a number"]),
        (["BETA1=x", *LRS], ["BETA1=x: expected a number"]),
        (["--choose", "MATRIX_LR", "0.1", "0.1"], ["each once"]),
        (["--choose", "MATRIX_LR"], ["expected values"]),
        (["MATRIX_LR=0.1", *LRS], ["MATRIX_LR: given twice"]),
        ([*LRS, "--choose", "MATRIX_LR", "0.5"], ["MATRIX_LR: given twice"]),
        (["ITERATIONS=5", *LRS, "--steps", "3"], ["ITERATIONS: given twice"]),
        (["SEED=1", "RUN_ID=x", "SCORES_FILE=x.npy", *LRS], ["SEED: not for a sweep: give --seeds", "RUN_ID: not", "SCORES_FILE: not"]),
        (["--range", "MATRIX_LR", "1", "0.1", "--trials", "2"], ["--range MATRIX_LR 1 0.1: expected LOW HIGH"]),
        (["--range", "MATRIX_LR", "0", "1", "log", "--trials", "2"], ["LOW above 0"]),
        (["--range", "MATRIX_LR", "0", "1", "lag", "--trials", "2"], ["expected LOW HIGH"]),
        (["--range", "MATRIX_LR", "0", "--trials", "2"], ["expected LOW HIGH"]),
        (["--range", "MATRIX_LR", "-1", "1", "--trials", "2"], ["MATRIX_LR=-1.0: expected at least 0"]),
        (["--range", "NUM_LAYERS", "2.5", "4", "--trials", "2"], ["NUM_LAYERS=2.5: expected a whole number"]),
        (["--range", "SWIGLU", "0", "1", "--trials", "2"], ["SWIGLU is no number"]),
        (["--range", "MATRIX_LR", "0", "1", "--search", "grid"], ["--search grid tries every combination"]),
        (["--range", "MATRIX_LR", "0", "1"], ["needs --trials"]),
        ([*LRS, "--trials", "3"], ["--trials: a grid has as many"]),
        (["PRESET=demo"], ["nothing varies"]),
        (["--choose", "NUM_HEADS", "8", "7"], ["refuses combinations", "NUM_HEADS=7: NUM_HEADS=7 must divide MODEL_DIM=512"]),
        (["--range", "NUM_KV_HEADS", "1", "8", "--search", "tpe", "--trials", "3"], ["must divide NUM_HEADS=8"]),
        (["VAL_LOSS_EVERY=0", *LRS, "--prune"], ["VAL_LOSS_EVERY is 0"]),
        (["PRESET=dmo", *LRS], ["PRESET=dmo: expected one of"]),
        ([*LRS, "--seeds", "1", "1"], ["SEED 1 1: expected values, each once"]),
        ([*LRS, "--seeds", "-1"], ["SEED=-1: expected 0 to"]),
        (["--seeds", "1"], ["nothing varies"]),
        (["@nowhere.env", *LRS], ["@nowhere.env: cannot be read"]),
        ([*LRS, "--trials", "0"], ["expected a whole number above 0"]),
        ([*LRS, "--seconds", "-1"], ["expected seconds above 0"]),
        ([*LRS, "--storage", "nonsense"], ["nonsense: cannot be opened as Optuna storage"]),
        ([], ["there is no sweep of this name yet"]),
        (["--show"], ["there is no sweep of this name yet"]),
    ],
)
def test_refused(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], messages: Sequence[str]) -> None:
    assert run_sweep(*arguments) == 2
    errors = capsys.readouterr().err
    for message in messages:
        assert message in errors
    assert started(tmp_path / "lr") == []


def test_misspelt_environment_is_refused(run_sweep: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATRIX_LRR", "1")
    assert run_sweep(*LRS) == 2 and "MATRIX_LRR in the environment" in capsys.readouterr().err
    assert run_sweep("IGNORE_ENV=MATRIX_LRR", *LRS) == 0


def test_a_broken_study_is_named(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "study.db").write_bytes(b"not a database, and longer than a header of one" * 10)
    assert run_sweep(*LRS) == 2
    assert "study.db: cannot be opened" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Going on


def test_a_finished_sweep_runs_nothing_again(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert run_sweep(*LRS) == 0
    assert run_sweep(*LRS) == 0 and run_sweep() == 0
    assert run_sweep("--trials", 4) == 2
    assert len(started(tmp_path / "lr")) == 3


def test_more_trials_are_added(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    space = ("--range", "MATRIX_LR", 0, 1)
    assert run_sweep(*space, "--trials", 2) == 0
    assert run_sweep(*space, "--trials", 4) == 0 and len(trials(tmp_path / "lr")) == 4
    assert run_sweep("--trials", 5) == 0 and len(trials(tmp_path / "lr")) == 5
    assert run_sweep(*space, "--trials", 2) == 0
    assert len(trials(tmp_path / "lr")) == len(started(tmp_path / "lr")) == 5


def test_another_sweep_in_the_same_folder_is_refused(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(*LRS) == 0
    assert run_sweep("--choose", "MATRIX_LR", "0.3", "0.4") == 2
    assert "another sweep (choices was {'MATRIX_LR': ['0.3', '0.1', '0.2']}, is {'MATRIX_LR': ['0.3', '0.4']}" in capsys.readouterr().err
    assert run_sweep(*LRS, "--seeds", 1) == 2 and "seeds was [1337], is [1]" in capsys.readouterr().err


def test_an_edited_script_does_not_reach_a_sweep(run_sweep: Callable[..., int], tmp_path: Path, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = ("--range", "MATRIX_LR", 0, 1)
    assert run_sweep(*space, "--trials", 1) == 0
    script.write_text("raise SystemExit(1)", encoding="utf-8")
    assert run_sweep(*space, "--trials", 2) == 0
    (tmp_path / "lr" / "train_gpt.py").write_text("raise SystemExit(1)", encoding="utf-8")
    assert run_sweep(*space, "--trials", 3) == 2
    assert "not the script that this sweep runs" in capsys.readouterr().err and len(started(tmp_path / "lr")) == 2


def test_stopped_and_gone_on(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal to the sweep: its trial saves and stops; the same command goes on with that trial, from its checkpoint."""
    command = ("MATRIX_LR=0.1", "--choose", MODE, 0, 7, "--seeds", 1, 2, f"{PAUSE}=0.05", "ITERATIONS=9")
    assert run_sweep(*command) == 128 + signal.SIGINT
    assert f"trial 1 stopped; go on with: python records/sweep.py {tmp_path / 'lr'}" in capsys.readouterr().out
    assert [row["state"] for row in trials(tmp_path / "lr")] == ["done", "running"]
    assert 2 <= int((tmp_path / "lr" / "trial-0001-seed-1" / "checkpoint.pt").read_text()) < 9
    assert run_sweep(*command) == 128 + signal.SIGINT  # its second seed does the same
    assert run_sweep() == 0
    assert [(run["run"], run["resume"]) for run in started(tmp_path / "lr")] == [
        ("trial-0000-seed-1", False), ("trial-0000-seed-2", False), ("trial-0001-seed-1", False), ("trial-0001-seed-1", True),
        ("trial-0001-seed-2", False), ("trial-0001-seed-2", True)]  # fmt: skip
    steps = [json.loads(line)["step"] for line in (tmp_path / "lr" / "trial-0001-seed-1" / "run.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))
    assert [(row["state"], row["n"]) for row in trials(tmp_path / "lr")] == [("done", 2)] * 2


def test_a_trial_that_does_not_stop_is_killed_by_the_third_signal(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert run_sweep(*LRS, f"{PAUSE}=0.3", "ITERATIONS=20", f"{MODE}=5") == 128 + signal.SIGINT
    assert len((tmp_path / "lr" / "trial-0000-seed-1337" / "run.jsonl").read_text().splitlines()) == 3
    assert [row["state"] for row in trials(tmp_path / "lr")] == ["running"]


def test_twelve_trials_killed_in_the_middle(start: Callable[..., forked.Ranks], run_sweep: Callable[..., int], tmp_path: Path) -> None:
    """SIGKILL to sweep and trial: the continuation loses at most the running trial."""
    command = (*TWELVE, f"{PAUSE}=0.02")
    worker = start(*command)
    wait_for(lambda: len(started(tmp_path / "lr")) >= 6)
    worker.kill()
    worker.finish()
    trial = started(tmp_path / "lr")[-1]["pid"]
    with contextlib.suppress(ProcessLookupError):  # it may have been done
        os.killpg(trial, signal.SIGKILL)
    wait_for(lambda: not alive(trial))
    before = [run["run"] for run in started(tmp_path / "lr")]
    done = [path.parent.name for path in (tmp_path / "lr").glob("*/result.json")]
    assert len(done) >= 5
    assert run_sweep(*command) == 0
    after = [run["run"] for run in started(tmp_path / "lr")][len(before) :]
    assert not set(after) & set(done)
    assert len(after) + len(done) == 12
    assert Counter(row["state"] for row in trials(tmp_path / "lr")) == {"done": 12}
    assert len({(row["params"]["MATRIX_LR"], row["params"]["SCALAR_LR"]) for row in trials(tmp_path / "lr")}) == 12


def test_a_trial_that_outlives_its_sweep_is_not_run_twice(
    start: Callable[..., forked.Ranks], run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL to the sweep alone: its trial trains on, and the continuation waits for it and takes its result."""
    command = (*LRS, f"{PAUSE}=0.05", "ITERATIONS=30")
    worker = start(*command)
    wait_for(lambda: started(tmp_path / "lr"))
    worker.kill()
    worker.finish()
    orphan = started(tmp_path / "lr")[0]["pid"]
    assert alive(orphan)
    assert run_sweep(*command) == 0
    assert "trial 0 is still being trained by a process that outlived its sweep: waiting for it" in capsys.readouterr().out
    assert [run["run"] for run in started(tmp_path / "lr")] == [f"trial-000{number}-seed-1337" for number in range(3)]
    assert all(row["state"] == "done" for row in trials(tmp_path / "lr"))


def test_two_workers_share_a_study(start: Callable[..., forked.Ranks], tmp_path: Path) -> None:
    command = (*TWELVE, f"{PAUSE}=0.05")
    outcomes = [worker.finish(120) for worker in [start(*command), start(*command)]]
    assert [outcome.codes for outcome in outcomes] == [[0], [0]], outcomes
    runs = started(tmp_path / "lr")
    assert sorted(run["run"] for run in runs) == [f"trial-{number:04d}-seed-1337" for number in range(12)]
    assert len({(run["settings"]["MATRIX_LR"], run["settings"]["SCALAR_LR"]) for run in runs}) == 12
    assert all(outcome.output.count(" of 12:") >= 2 for outcome in outcomes)  # both did some
    assert Counter(row["state"] for row in trials(tmp_path / "lr")) == {"done": 12}


def test_an_interrupted_trial_is_taken_by_one_of_two_workers(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert run_sweep("MATRIX_LR=0.1", "--choose", MODE, 7, 0, f"{PAUSE}=0.05") == 128 + signal.SIGINT
    study, definition = sweep.open_study(tmp_path / "lr", None, None, None, tmp_path / "lr" / "train_gpt.py")
    claims = [sweep.claim(study, definition, tmp_path / "lr")[0] for _ in range(3)]
    assert [claimed and claimed.trial.number for claimed in claims] == [0, 1, None]
    for claimed in claims:
        if claimed:
            claimed.lock.release()
    assert run_sweep() == 0
    assert Counter(run["run"] for run in started(tmp_path / "lr")) == {"trial-0000-seed-1337": 2, "trial-0001-seed-1337": 1}  # before and after


def test_machines_share_a_storage(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    """Two folders of one name, one storage: the second leaves alone what the first is running, and what it has done."""
    storage = ("--storage", tmp_path / "study.log")
    here, there = tmp_path / "here" / "lr", tmp_path / "there" / "lr"
    space = ("--range", "MATRIX_LR", 0, 1)
    assert run_sweep(*space, "--trials", 1, *storage, folder=here) == 0
    study, definition = sweep.open_study(here, str(storage[1]), None, 3, here / "train_gpt.py")
    claimed, _ = sweep.claim(study, definition, here)  # trial 1 runs here
    assert claimed and claimed.trial.number == 1
    assert run_sweep(*storage, folder=there) == 0
    assert [run["run"] for run in started(there)] == ["trial-0002-seed-1337"]
    assert sorted((row["trial"], row["state"]) for row in trials(there)) == [(0, "done"), (1, "running"), (2, "done")]
    claimed.lock.release()
    assert run_sweep(*storage, folder=there) == 0 and len(started(there)) == 1
    assert run_sweep(*storage, folder=here) == 0
    assert [run["run"] for run in started(here)] == ["trial-0000-seed-1337", "trial-0001-seed-1337"]


def test_another_machine_may_be_quicker(run_sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number beyond the last trial, given out because both machines saw one trial left, is not run and not in the table."""
    storage = str(tmp_path / "study.log")
    assert run_sweep("--range", "MATRIX_LR", 0, 1, "--trials", 2, "--storage", storage) == 0
    study, definition = sweep.open_study(tmp_path / "lr", storage, None, None, tmp_path / "lr" / "train_gpt.py")
    monkeypatch.setattr(study, "get_trials", lambda **options: [])
    assert sweep.claim(study, definition, tmp_path / "lr") == (None, [])
    assert run_sweep("--storage", storage) == 0
    assert [row["state"] for row in trials(tmp_path / "lr")] == ["done", "done"] and len(started(tmp_path / "lr")) == 2


def test_a_lock_knows_its_holder(tmp_path: Path) -> None:
    first, second = sweep.Lock(tmp_path / "x.lock"), sweep.Lock(tmp_path / "x.lock")
    assert first.acquire() and not second.acquire() and not second.holder_ended()
    first.path.write_text(f"{sweep.socket.gethostname()} {2**22 + 1}", encoding="utf-8")  # above the largest process number
    assert second.holder_ended()
    first.path.write_text("elsewhere 1", encoding="utf-8")
    assert not second.holder_ended()
    first.release()
    assert second.acquire()
    second.release()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Trials that fail


def test_a_trial_that_fails_is_recorded_and_skipped(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep("MATRIX_LR=0.1", "--choose", MODE, 0, 1, 2, 3, 4, 6, "--seeds", 1, 2) == 1
    assert "error: planted" in (tmp_path / "lr" / "output" / "trial-0001-seed-1.txt").read_text()
    reasons = {row["params"][MODE]: (row["state"], row["reason"]) for row in trials(tmp_path / "lr")}
    assert reasons == {
        "0": ("done", ""),
        "1": ("failed", "exit code 1: error: planted"),
        "2": ("failed", "killed by SIGKILL"),
        "3": ("failed", "result.json has no number val_bpb"),
        "4": ("failed", "over BYTES_CAP: 20 bytes of 15"),
        "6": ("failed", "result.json has no number val_bpb"),
    }
    assert "trial 1 failed: exit code 1: error: planted" in capsys.readouterr().out
    assert trials(tmp_path / "lr")[0]["state"] == "done" and len(started(tmp_path / "lr")) == 2 + 5  # a failed trial skips its other seeds
    assert run_sweep() == 1 and len(started(tmp_path / "lr")) == 7


def test_settings_that_only_fail_together_are_recorded(run_sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random search checks some combinations beforehand, and the one at hand before it runs."""
    monkeypatch.setattr(sweep, "check_combinations", lambda definition: None)
    assert run_sweep("--choose", "NUM_HEADS", "8", "7", "4") == 1
    failed = [row for row in trials(tmp_path / "lr") if row["state"] == "failed"]
    assert len(failed) == 1 and "NUM_HEADS=7 must divide MODEL_DIM=512" in failed[0]["reason"]
    assert len(started(tmp_path / "lr")) == 2


def test_when_everything_fails_it_stops(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(*TWELVE, f"{MODE}=1") == 1
    assert len(started(tmp_path / "lr")) == 3 and "first 3 trials have all failed" in capsys.readouterr().out
    assert run_sweep("--keep-going") == 1 and len(started(tmp_path / "lr")) == 12


def test_a_run_folder_without_a_run_is_put_aside(run_sweep: Callable[..., int], start: Callable[..., forked.Ranks], tmp_path: Path) -> None:
    """Killed between making the folder and writing config.env into it."""
    place = tmp_path / "lr" / "trial-0000-seed-1337"
    place.mkdir(parents=True)
    (place / "train_gpt.py").write_text("x", encoding="utf-8")
    assert run_sweep(*LRS) == 0
    assert [path.name for path in (tmp_path / "lr" / "broken-1-trial-0000-seed-1337").iterdir()] == ["train_gpt.py"]


def test_an_error_of_the_sweep_stops_its_trial(run_sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no training is left behind without a sweep."""

    def broken(run: Any) -> str:
        if run and run.steps:
            raise OSError("no space left on device")
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "progress_text", broken)
        assert run_sweep(*LRS, f"{PAUSE}=0.1", "ITERATIONS=50") == 2
    assert not alive(started(tmp_path / "lr")[0]["pid"])
    assert (tmp_path / "lr" / "trial-0000-seed-1337" / "checkpoint.pt").exists()


def test_a_study_that_goes_away_is_named(
    run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(run: Any) -> str:
        with sqlite3.connect(tmp_path / "lr" / "study.db") as database:
            database.execute("DROP TABLE IF EXISTS trial_user_attributes")
        return ""

    monkeypatch.setattr(sweep, "progress_text", lost)
    assert run_sweep(*LRS) == 2
    assert "the study cannot be reached" in capsys.readouterr().err
    assert (tmp_path / "lr" / "trial-0000-seed-1337" / "result.json").exists()


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Pruning


def vals(*points: tuple[float, float, float]) -> report.Run:
    """Returns a run with validations at (step, seconds, loss)."""
    return report.Run(Path(), vals=[{"event": "val", "step": step, "train_seconds": seconds, "val_loss": loss} for step, seconds, loss in points])


def test_curves_are_compared_at_equal_shares_of_the_budget() -> None:
    steps = train_gpt.Config(iterations=100, max_wallclock_seconds=0)
    points = sweep.curve(vals((10, 1, 4.0), (20, 2, 3.0), (100, 9, 1.0)), steps)
    assert list(points) == list(range(2, 20)) and points[2] == 4.0 and points[3] == pytest.approx(3.5) and points[4] == 3.0 and points[12] == pytest.approx(2.0)
    timed = train_gpt.Config(iterations=10**9, max_wallclock_seconds=20)
    slow, fast = (sweep.curve(vals((step, 5, 4.0), (2 * step, 10, 3.0)), timed) for step in (10, 1000))
    assert slow == fast and list(slow) == [5, 6, 7, 8, 9, 10] and slow[6] == pytest.approx(3.8)
    assert sweep.curve(vals(), steps) == {} and sweep.curve(vals((0, 0, 9.0)), steps) == {}


def test_a_bad_curve_is_pruned(run_sweep: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--choose", "MATRIX_LR", 0.1, 0.9, 0.2, 0.8, 0.15, "VAL_LOSS_EVERY=1", "--steps", 40, f"{PAUSE}=0.02", "--prune", "--prune-after", 2)
    assert run_sweep(*command) == 0
    found = {row["params"]["MATRIX_LR"]: row for row in trials(tmp_path / "lr")}
    # 0.9 is done before two others are; 0.2 is better than the median of 0.1 and 0.9; 0.8 is not, nor is anything later better than it.
    assert [found[lr]["state"] for lr in ("0.1", "0.9", "0.2", "0.8", "0.15")] == ["done", "done", "done", "pruned", "done"]
    assert re.fullmatch(r"pruned at \d+%, val_loss 1.8000", found["0.8"]["reason"]) and found["0.8"]["n"] == 0
    assert (tmp_path / "lr" / "trial-0003-seed-1337" / "checkpoint.pt").exists()
    assert "trial 3 pruned at" in capsys.readouterr().out
    assert [row["state"] for row in trials(tmp_path / "lr")][-1] == "pruned"
    study = optuna.load_study(study_name="lr", storage=f"sqlite:///{tmp_path}/lr/study.db")
    assert all(list(study.trials[number].intermediate_values) == list(range(1, 20)) for number in (0, 1, 2, 4))
    assert run_sweep() == 0 and len(started(tmp_path / "lr")) == 5


def test_only_the_first_seed_is_pruned(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    command = ("--choose", "MATRIX_LR", 0.2, 0.1, "VAL_LOSS_EVERY=1", "--steps", 20, f"{PAUSE}=0.01", "--prune", "--prune-after", 1, "--seeds", 1, 2)
    assert run_sweep(*command) == 0
    assert [row["state"] for row in trials(tmp_path / "lr")] == ["done", "done"] and len(started(tmp_path / "lr")) == 4


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The live table


def test_live_table(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert run_sweep(*LRS, "--choose", MODE, 0, 1) == 1
    study, definition = sweep.open_study(tmp_path / "lr", None, None, None, tmp_path / "lr" / "train_gpt.py")
    definition = sweep.replace(definition, trials=7)
    study.ask()
    screen = sweep.Screen(study, definition)
    screen.console = Console(file=io.StringIO(), force_terminal=True, width=160, height=14)
    screen.progress[6] = "step 5, 0:01"
    with screen.open():
        screen.say("a line above")
    output = screen.console.file.getvalue()  # type: ignore[attr-defined]
    last = output.rpartition("trial")[2]
    assert "a line above" in output
    assert "running" in last and "step 5, 0:01" in last and last.index("running") < last.index("1.4370")  # what runs comes first
    assert "failed" in last and last.count("error: planted") < 3  # no more rows than fit


def test_progress() -> None:
    run = vals((5, 1.0, 2.0))
    assert sweep.progress_text(None) == sweep.progress_text(report.Run(Path())) == "starting"
    run.vals[0]["val_bpb"] = 1.5
    run.steps.append({"event": "step", "step": 1200, "train_seconds": 75.0})
    assert sweep.progress_text(run) == "step 1,200, 1:15, val_bpb 1.5000"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The real script


def test_the_real_script_stopped_and_gone_on(
    run_sweep: Callable[..., int], corpus: Path, tiny: Callable[..., train_gpt.Config], tmp_path: Path
) -> None:
    """A real training is stopped in the middle by a signal to the sweep, and goes on to a score."""
    settings = tiny_arguments(corpus, tiny().vocab_size, ITERATIONS=80, QUANT_SCHEME="rowmax", CODER="zlib", FINAL_EVAL="chunked", VAL_LOSS_EVERY=40)
    command = (*settings, "--choose", "MATRIX_LR", "0.02", "--seeds", 5)
    place = tmp_path / "lr" / "trial-0000-seed-5"

    def stop() -> None:
        wait_for(lambda: (place / "run.jsonl").exists() and '"event": "step"' in (place / "run.jsonl").read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_sweep(*command, script=ROOT / "train_gpt.py") == 128 + signal.SIGTERM
    thread.join()
    assert (place / "checkpoint.pt").exists() and not (place / "result.json").exists()
    assert run_sweep() == 0
    found = {row["trial"]: row for row in trials(tmp_path / "lr")}
    for number, row in found.items():
        result = json.loads((tmp_path / "lr" / f"trial-{number:04d}-seed-5" / "result.json").read_text())
        assert row["score"] == result["val_bpb"] and row["steps"] == 80 and row["bytes_total"] == result["bytes_total"] and result["seed"] == 5
    assert "resumed from checkpoint.pt after step" in (place / "log.txt").read_text()
    assert "MATRIX_LR=0.02" in (place / "config.env").read_text()
    assert optuna.load_study(study_name="lr", storage=f"sqlite:///{tmp_path}/lr/study.db").best_value == min(row["score"] for row in found.values())
