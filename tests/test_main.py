"""The run as a whole: what it leaves in its folder, that its score is the artifact's, and what a user reads when it cannot start."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REFERENCE, ROOT, Ended, Finished, clean_environment, lively_model

import train_gpt

Start = Callable[..., train_gpt.Config]
RunHere = Callable[..., Ended]

RESULT_KEYS = [
    *("run_id", "preset", "seed", "world_size", "device", "torch", "params", "steps", "skipped_steps", "train_seconds"),
    *("eval_seconds", "step_ms"),
    *("tokens_per_second", "val_loss", "val_bpb", "pre_quant_val_bpb", "quant_val_bpb", "adapted_frac", "scores"),
    *("bytes_model", "bytes_code", "bytes_total", "bytes_cap"),
]


def one_line_error(ended: Ended) -> str:
    """Returns the message of a run that a user's mistake has ended."""
    assert ended.code == 1 and ended.errors.startswith("error: ") and len(ended.errors.splitlines()) == 1, ended.errors
    return ended.errors


def digests(folder: Path) -> dict[str, str]:
    """Returns the digest of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------------------
# A whole run


def test_a_run_leaves_the_files_of_a_run_folder_and_no_other(reference: Finished) -> None:
    expected = {"log.txt", "run.jsonl", "config.env", "train_gpt.py", "checkpoint.pt", "artifact.bin", "result.json"}
    assert {path.name for path in reference.folder.iterdir()} == expected
    assert (reference.folder / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    assert (reference.folder / "log.txt").read_text(encoding="utf-8") == reference.output


def test_the_result_has_the_promised_keys_and_is_the_last_event(reference: Finished) -> None:
    result = reference.result()
    assert list(result) == RESULT_KEYS
    assert list(result["scores"]) == ["chunked", "sliding"]
    assert all(set(score) == {"val_loss", "val_bpb", "seconds", "adapted_frac"} for score in result["scores"].values())
    last = reference.events()[-1]
    assert {key: last[key] for key in RESULT_KEYS} == result and set(last) == {"event", "time", *RESULT_KEYS}


def test_the_result_agrees_with_the_events(reference: Finished, tiny: Start) -> None:
    result, config = reference.result(), tiny(**REFERENCE)
    (environment,), evals, vals = reference.events("env"), reference.events("eval"), reference.events("val")
    assert (result["run_id"], result["preset"], result["seed"], result["world_size"], result["device"]) == ("run", "baseline", config.seed, 1, "cpu")
    assert result["torch"] == environment["torch"] == torch.__version__ and result["params"] == environment["params"]
    assert result["steps"] == REFERENCE["ITERATIONS"] and result["train_seconds"] > 0
    assert result["step_ms"] == pytest.approx(1000 * result["train_seconds"] / result["steps"])
    assert result["tokens_per_second"] == pytest.approx(config.train_batch_tokens * result["steps"] / result["train_seconds"])
    assert [event["name"] for event in evals] == ["chunked", "sliding"]
    assert result["scores"] == {event["name"]: {key: event[key] for key in ("val_loss", "val_bpb", "seconds", "adapted_frac")} for event in evals}
    assert (result["val_loss"], result["val_bpb"]) == (evals[1]["val_loss"], evals[1]["val_bpb"])
    assert result["quant_val_bpb"] == evals[0]["val_bpb"] and result["pre_quant_val_bpb"] == vals[-1]["val_bpb"]
    assert result["adapted_frac"] == evals[1]["adapted_frac"] == 1
    assert result["eval_seconds"] == pytest.approx(sum(event["seconds"] for event in evals))


def test_events_are_in_the_order_of_the_run(reference: Finished) -> None:
    events = [event for event in reference.events() if event["event"] != "note"]
    expected = ["config", "env", "phase", *["step"] * 5, "val", *["step"] * 5, "val", "phase", *["step"] * 2, "val", "export", "eval", "eval", "result"]
    assert [event["event"] for event in events] == expected
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 13))
    assert [event["step"] for event in events if event["event"] == "val"] == [5, 10, 12]
    assert [(event["step"], event["qat"]) for event in events if event["event"] == "phase"] == [(0, False), (10, True)]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    for kind in ("step", "val", "eval", "phase"):
        assert len({tuple(event) for event in events if event["event"] == kind}) == 1, f"{kind} events have one set of keys"


def test_the_config_event_and_file_say_what_ran(reference: Finished, tiny: Start) -> None:
    place = reference.folder.parents[1]
    config = tiny(**REFERENCE, RUNS_DIR=place / "runs", RUN_ID="run", SCORES_FILE=reference.scores)
    (event,) = reference.events("config")
    assert event["settings"] == {name.upper(): value for name, value in asdict(config).items()}
    assert event["changed"]["ITERATIONS"] == "12" and "SEED" not in event["changed"]
    lines = (reference.folder / "config.env").read_text(encoding="utf-8").splitlines()
    assert [line.partition("=")[0] for line in lines] == list(train_gpt.SETTINGS), "every setting, once"
    assert train_gpt.parse_config(lines, {}) == config


def test_the_config_file_reproduces_the_run(run_here: RunHere, reference: Finished, tmp_path: Path) -> None:
    again = (f"@{reference.folder / 'config.env'}", "RUN_ID=again", f"RUNS_DIR={tmp_path}", f"SCORES_FILE={tmp_path / 'scores.npy'}")
    ended = run_here(tmp_path, *again, bare=True)
    assert ended.code == 0, ended.errors
    repeated, original = Finished(tmp_path / "again", tmp_path / "scores.npy", "").result(), reference.result()
    # Times, which take their own time, apart: the numbers are the same, bit for bit.
    timed = {"run_id", "train_seconds", "eval_seconds", "step_ms", "tokens_per_second", "scores"}
    assert {key: repeated[key] for key in RESULT_KEYS if key not in timed} == {key: original[key] for key in RESULT_KEYS if key not in timed}
    assert (tmp_path / "again" / "artifact.bin").read_bytes() == (reference.folder / "artifact.bin").read_bytes()
    assert (tmp_path / "scores.npy").read_bytes() == reference.scores.read_bytes()


def test_another_seed_is_another_run(run_here: RunHere, reference: Finished, tmp_path: Path) -> None:
    ended = run_here(tmp_path, **REFERENCE, SEED=7, STAGES="train")
    assert ended.code == 0, ended.errors
    assert Finished(tmp_path / "runs" / "run", Path(), "").result()["pre_quant_val_bpb"] != reference.result()["pre_quant_val_bpb"]


def test_the_score_is_that_of_the_artifact_whatever_was_trained(run_here: RunHere, tiny: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ITERATIONS": 2, "WARMUP_STEPS": 0}
    config = tiny(**settings)
    stranger = lively_model(config, torch.float32, seed=3)
    real = train_gpt.export
    monkeypatch.setattr(train_gpt, "export", lambda run, model, *others: real(run, stranger, *others))
    ended = run_here(tmp_path, **settings)
    assert ended.code == 0, ended.errors
    result = Finished(tmp_path / "runs" / "run", Path(), "").result()
    world = train_gpt.World("cpu")
    run = train_gpt.Run(config, world, train_gpt.Log(None), tmp_path, train_gpt.StopSignals(), source="")
    model = train_gpt.read_artifact((tmp_path / "runs" / "run" / "artifact.bin").read_bytes(), config, "artifact.bin")
    expected = train_gpt.evaluate(run, model, model, train_gpt.load_val(config), "sliding", train_gpt.Schedule(config).scored_phase)
    assert (result["val_loss"], result["val_bpb"]) == (expected.val_loss, expected.val_bpb)
    assert abs(result["val_bpb"] - result["pre_quant_val_bpb"]) > 0.1, "the trained weights would have another score"


def test_training_alone_leaves_a_checkpoint_and_no_score(run_here: RunHere, tmp_path: Path) -> None:
    ended = run_here(tmp_path, STAGES="train", ITERATIONS=2, WARMUP_STEPS=0)
    assert ended.code == 0, ended.errors
    result = Finished(tmp_path / "runs" / "run", Path(), "").result()
    assert list(result) == RESULT_KEYS and result["steps"] == 2 and result["pre_quant_val_bpb"] > 0
    assert result["val_bpb"] is result["quant_val_bpb"] is result["bytes_model"] is result["bytes_total"] is result["adapted_frac"] is None
    assert result["scores"] == {}
    assert (tmp_path / "runs" / "run" / "checkpoint.pt").exists() and not (tmp_path / "runs" / "run" / "artifact.bin").exists()


def test_a_run_without_a_name_gets_one(run_here: RunHere, tmp_path: Path) -> None:
    ended = run_here(tmp_path, STAGES="train", ITERATIONS=1, WARMUP_STEPS=0, RUN_ID="")
    assert ended.code == 0, ended.errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-baseline") and Finished(folder, Path(), "").result()["run_id"] == folder.name
    assert f"RUN_ID={folder.name}\n" in (folder / "config.env").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Runs that cannot start


def test_an_existing_run_is_refused_and_left_as_it_is(run_here: RunHere, reference: Finished) -> None:
    before = digests(reference.folder)
    message = one_line_error(run_here(reference.folder.parents[1], **REFERENCE))
    assert "RUN_ID=run" in message and "never overwritten" in message and "RESUME=1" in message
    assert digests(reference.folder) == before


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_where_runs_should_go_is_named(run_here: RunHere, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("something else", encoding="utf-8")
    message = one_line_error(run_here(tmp_path, RUNS_DIR=tmp_path / "file" / below))
    assert f"RUNS_DIR={tmp_path / 'file'}" in message and "cannot write there" in message
    assert (tmp_path / "file").read_text(encoding="utf-8") == "something else"


@pytest.mark.parametrize("missing", ["everything", "training", "validation", "tokenizer"])
def test_missing_data_is_answered_with_the_command_that_makes_it(run_here: RunHere, corpus: Path, tmp_path: Path, missing: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if missing != "everything":
        for path in corpus.iterdir():
            if not path.name.startswith({"training": "fineweb_train", "validation": "fineweb_val", "tokenizer": "tokenizer"}[missing]):
                (data / path.name).symlink_to(path)
    message = one_line_error(run_here(tmp_path, DATA_PATH=data, TOKENIZER_PATH=data / "tokenizer.model"))
    assert f"python data/tokenize_docs.py --input YOUR_TEXT.jsonl --output {data} --vocab-size 384" in message
    assert not (tmp_path / "runs").exists()


def test_missing_published_data_is_answered_with_the_download(run_here: RunHere, tmp_path: Path) -> None:
    message = one_line_error(run_here(tmp_path, DATA_PATH=tmp_path / "fineweb10B_sp4096"))
    assert "python data/download.py --variant sp4096" in message and not (tmp_path / "runs").exists()


def test_shards_of_another_tokenizer_are_refused_before_a_run_folder_is_made(run_here: RunHere, tmp_path: Path) -> None:
    assert "set VOCAB_SIZE=384" in one_line_error(run_here(tmp_path, VOCAB_SIZE=100))
    assert not (tmp_path / "runs").exists()


def test_an_error_of_ours_is_reported_in_full(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train_gpt, "warm_up", broken)
    ended = run_here(tmp_path)
    assert ended.code == 1 and "Traceback" in ended.errors and "RuntimeError: a bug" in ended.errors


# ----------------------------------------------------------------------------------------------------------------------
# Importing

IMPORT = """
import collections, json, os, signal, sys, threading
import numpy, sentencepiece, torch, torch.distributed, zstandard

def state():
    return [
        len(os.listdir("/proc/self/task")), threading.active_count(), os.listdir("."), torch.distributed.is_initialized(), torch.cuda.is_initialized(),
        str(signal.getsignal(signal.SIGTERM)), str(signal.getsignal(signal.SIGINT)), torch.initial_seed(), torch.get_num_threads(),
    ]

class Watched(type(os.environ)):
    def __getitem__(self, name):
        read.append(name)
        return super().__getitem__(name)

read, before = [], state()
os.environ.__class__ = Watched
sys.path.insert(0, sys.argv[1])
import train_gpt
ours = set(train_gpt.SETTINGS) | {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MUON_TYPO"}
print(json.dumps({"before": before, "after": state(), "read": [name for name in read if name in ours]}))
"""


def test_importing_the_script_does_nothing(tmp_path: Path) -> None:
    poison = {"ITERATIONS": "banana", "PRESET": "nonsense", "MUON_TYPO": "1", "RANK": "first", "WORLD_SIZE": "many", "LOCAL_RANK": "none"}
    environment = {**clean_environment(), **poison, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT, str(ROOT)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    report = json.loads(ended.stdout)
    assert report["before"] == report["after"]
    assert report["read"] == []


def test_a_machine_without_git_still_runs(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt.shutil, "which", lambda name: None)
    ended = run_here(tmp_path, STAGES="train", ITERATIONS=1, WARMUP_STEPS=0)
    assert ended.code == 0, ended.errors
    [environment] = Finished(tmp_path / "runs" / "run", Path(), "").events("env")
    assert environment["commit"] == "unknown"
