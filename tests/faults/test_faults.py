"""Faults that a run must survive, or end by in one clear error with nothing lost: the short form of `soak.py`.

Each test injects one fault and compares what comes of it with the run that met none, bit for bit. Signals in training, a kill while a checkpoint
is written and damaged checkpoints that stand alone are tested in `test_training.py`; forged artifacts in `test_artifact.py`.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import inject
import numpy as np
import pytest
import soak
import torch
from conftest import REFERENCE, Ended, Finished
from test_training import assert_same_checkpoint, copied, driver, patch_step, scores_of

import train_gpt

RunHere = Callable[..., Ended]
Launch = Callable[..., forked.Ranks]

# What the script does not do yet; a test that begins to pass says so.

STEPS = REFERENCE["ITERATIONS"]
TRAIN = {**REFERENCE, "WARMUP_STEPS": 0, "STAGES": "train"}  # warm-up leaves no trace: the weights are those of `reference`


def run_folder(place: Path) -> Path:
    """Where runs of the fixtures go."""
    return place / "runs" / "run"


def latest(folder: Path) -> dict[str, Any]:
    """Returns checkpoint.pt of a run folder."""
    return train_gpt.read_checkpoint(folder / "checkpoint.pt")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the events of a kind in a run folder's log."""
    return Finished(folder, Path(), "").events(kind)


def unharmed(folder: Path, reference: Finished) -> None:
    """The run ended as the reference did: the same weights and state, the same artifact, the same scores."""
    assert_same_checkpoint(latest(folder), reference.checkpoint())
    assert (folder / "artifact.bin").read_bytes() == (reference.folder / "artifact.bin").read_bytes()
    assert scores_of(Finished(folder, Path(), "")) == scores_of(reference)


# ----------------------------------------------------------------------------------------------------------------------
# Losses and gradients that are not finite


def spoil_steps(monkeypatch: pytest.MonkeyPatch, bad: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
    """Makes training steps of these numbers see their loss changed."""
    real, calls = train_gpt.training_step, []

    def step(forward: Callable[..., torch.Tensor], *args: Any) -> train_gpt.StepStats:
        calls.append(args)
        change = bad.get(len(calls))
        return real(forward if change is None else lambda *rows: change(forward(*rows)), *args)

    monkeypatch.setattr(train_gpt, "training_step", step)


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """Returns the same loss, whose gradient is infinite."""
    held = loss * 1
    held.register_hook(lambda gradient: gradient * math.inf)
    return held


def leave_out(monkeypatch: pytest.MonkeyPatch, left_out: int) -> None:
    """Makes one training step read its rows and see no gradient, at a rate of 0: what leaving out a step promises."""
    real, calls = train_gpt.training_step, []

    def step(forward: Callable[..., torch.Tensor], optimizer: Any, loader: Any, knobs: train_gpt.Knobs) -> train_gpt.StepStats:
        calls.append(knobs)
        if len(calls) == left_out:
            return real(lambda *rows: forward(*rows) * 0, optimizer, loader, knobs._replace(lr_scale=0.0))
        return real(forward, optimizer, loader, knobs)

    monkeypatch.setattr(train_gpt, "training_step", step)


@pytest.fixture(scope="module")
def without_step_5(run_here: RunHere, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of the reference run, had it left out its fifth step."""
    place = tmp_path_factory.mktemp("without_step_5")
    with pytest.MonkeyPatch.context() as patched:
        leave_out(patched, 5)
        assert run_here(place, **TRAIN).code == 0
    return latest(run_folder(place))


@pytest.mark.parametrize("change", [lambda loss: loss * math.nan, infinite_gradient], ids=["nan loss", "inf gradient"])
def test_a_bad_step_is_left_out_counted_and_noted(
    run_here: RunHere, reference: Finished, without_step_5: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    spoil_steps(monkeypatch, {5: change})
    ended = run_here(tmp_path, **TRAIN)
    assert ended.code == 0, ended.errors
    assert_same_checkpoint(latest(run_folder(tmp_path)), without_step_5)
    assert Finished(run_folder(tmp_path), Path(), "").result()["skipped_steps"] == 1
    assert ended.output.count("that step was not applied") == 1 and "step 5: loss" in ended.output
    with pytest.raises(AssertionError):
        assert_same_checkpoint(without_step_5, reference.checkpoint())


def test_a_good_step_between_bad_ones_begins_the_count_anew(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, dict.fromkeys((2, 3, 5, 6, 12), lambda loss: loss * math.nan))
    ended = run_here(tmp_path, **TRAIN, MAX_SKIPPED_STEPS=2)
    assert ended.code == 0, ended.errors
    assert Finished(run_folder(tmp_path), Path(), "").result()["skipped_steps"] == 5
    assert all(weight.isfinite().all() for weight in latest(run_folder(tmp_path))["state"]["model"].values())


def test_one_bad_step_more_than_allowed_stops_the_run_with_a_state_to_go_on_from(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        spoil_steps(patched, dict.fromkeys((2, 5, 6, 7), lambda loss: loss * math.nan))
        ended = run_here(tmp_path, **TRAIN, MAX_SKIPPED_STEPS=2, CHECKPOINT_EVERY=4)
    assert ended.code == 1 and "Traceback" not in ended.errors
    assert "step 7: loss nan" in ended.errors and "nor were the 2 before it" in ended.errors and "lower learning rate" in ended.errors
    assert "last good state" in ended.output and latest(run_folder(tmp_path))["step"] == 4
    resumed = run_here(tmp_path, **TRAIN, RESUME=1)
    assert resumed.code == 0, resumed.errors
    assert Finished(run_folder(tmp_path), Path(), "").result()["skipped_steps"] == 1, "of the steps that led to the final weights, whoever made them"


RANK_1_HAS_AN_INFINITE_GRADIENT_IN_STEP_5 = """
real_take = train_gpt.take_gradients
def take(names, parameters):
    taken = real_take(names, parameters)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        taken[0].view(-1)[0] = float("inf")
    return taken
train_gpt.take_gradients = take
def counted_step(*args):
    calls.append(args)
    return real_step(*args)
train_gpt.training_step = counted_step
"""


def test_a_bad_gradient_on_one_of_two_ranks_leaves_the_step_out_on_both(
    launch: Launch, without_step_5: dict[str, Any], tmp_path: Path
) -> None:
    outcome = launch(tmp_path, ranks=2, script=driver(tmp_path, RANK_1_HAS_AN_INFINITE_GRADIENT_IN_STEP_5), **TRAIN).finish()
    assert outcome.codes == [0, 0], outcome.output
    assert Finished(run_folder(tmp_path), Path(), "").result()["skipped_steps"] == 1
    assert_same_checkpoint(latest(run_folder(tmp_path)), without_step_5)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def stopped(run_here: RunHere, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a run with a checkpoint every 3 steps that was stopped in its seventh."""
    place = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patched:
        patch_step(patched, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 7 else None)
        assert run_here(place, **TRAIN, CHECKPOINT_EVERY=3).code == 143
    return place


def copy_of(stopped: Path, tmp_path: Path) -> Path:
    """Returns the run folder of a copy of that run."""
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    return run_folder(tmp_path)


def test_the_last_two_checkpoints_are_kept(stopped: Path) -> None:
    steps = [train_gpt.read_checkpoint(run_folder(stopped) / name)["step"] for name in train_gpt.CHECKPOINT_FILES]
    assert 7 <= steps[0] <= 8 and steps[1] == 6
    assert {path.name for path in run_folder(stopped).iterdir()} >= {*train_gpt.CHECKPOINT_FILES}
    assert not list(run_folder(stopped).glob("*.partial")) and len(list(run_folder(stopped).glob("*.pt"))) == 2


def flip_a_bit(data: bytes) -> bytes:
    """Flips a bit of a weight: the middle of a checkpoint is tensors."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGES = {"one bit": flip_a_bit, "half": lambda data: data[: len(data) // 2], "empty": lambda data: b""}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_and_says_so(
    run_here: RunHere, reference: Finished, stopped: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder = copy_of(stopped, tmp_path)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    ended = run_here(tmp_path, **TRAIN, RESUME=1)
    assert ended.code == 0, ended.errors
    assert "resumed from checkpoint_before.pt after step 6" in ended.output and f"not from {newest}: " in ended.output
    assert_same_checkpoint(latest(folder), reference.checkpoint())


def test_a_run_whose_checkpoints_are_both_damaged_ends_in_one_error_and_touches_neither(run_here: RunHere, stopped: Path, tmp_path: Path) -> None:
    folder = copy_of(stopped, tmp_path)
    for name, damage in zip(train_gpt.CHECKPOINT_FILES, (flip_a_bit, DAMAGES["half"]), strict=True):
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    before = {name: (folder / name).read_bytes() for name in train_gpt.CHECKPOINT_FILES}
    ended = run_here(tmp_path, **TRAIN, RESUME=1)
    assert ended.code == 1 and len(ended.errors.splitlines()) == 1
    assert all(str(folder / name) in ended.errors for name in train_gpt.CHECKPOINT_FILES) and "damaged" in ended.errors
    assert {name: (folder / name).read_bytes() for name in train_gpt.CHECKPOINT_FILES} == before


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# The checkpoint becomes the one before, and what has been written becomes the checkpoint: killed in between, there is no newest one.
KILLED_BETWEEN_THE_RENAMES = f"""
real_replace = train_gpt.os.replace
def replace(source, target):
    if str(target).endswith("checkpoint.pt") and os.path.exists(str(target) + ".partial") and not os.path.exists(target):
        {KILL}
    return real_replace(source, target)
train_gpt.os.replace = replace
"""


def test_a_run_killed_between_the_renames_of_a_checkpoint_goes_on_from_the_one_before(
    launch: Launch, run_here: RunHere, reference: Finished, stopped: Path, tmp_path: Path
) -> None:
    folder = copy_of(stopped, tmp_path)
    before = latest(folder)["step"]
    outcome = launch(tmp_path, script=driver(tmp_path, KILLED_BETWEEN_THE_RENAMES), **TRAIN, RESUME=1, CHECKPOINT_EVERY=1).finish()
    assert outcome.codes == [-9], outcome.output
    assert not (folder / "checkpoint.pt").exists() and train_gpt.read_checkpoint(folder / "checkpoint_before.pt")["step"] == before
    ended = run_here(tmp_path, **TRAIN, RESUME=1)
    assert ended.code == 0, ended.errors
    assert f"resumed from checkpoint_before.pt after step {before}" in ended.output
    assert_same_checkpoint(latest(folder), reference.checkpoint())


def test_a_damaged_checkpoint_never_takes_the_place_of_the_last_good_one(
    launch: Launch, run_here: RunHere, reference: Finished, stopped: Path, tmp_path: Path
) -> None:
    """A second fault on top of the first: killed while the first checkpoint after the damage is put in place."""
    folder = copy_of(stopped, tmp_path)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(flip_a_bit(newest.read_bytes()))
    outcome = launch(tmp_path, script=driver(tmp_path, KILLED_BETWEEN_THE_RENAMES), **TRAIN, RESUME=1, CHECKPOINT_EVERY=1).finish()
    assert outcome.codes == [-9], outcome.output
    ended = run_here(tmp_path, **TRAIN, RESUME=1)
    assert ended.code == 0, ended.errors
    assert_same_checkpoint(latest(folder), reference.checkpoint())


def test_a_run_killed_while_its_folder_is_made_can_be_started_again(launch: Launch, run_here: RunHere, tmp_path: Path) -> None:
    outcome = launch(tmp_path, script=driver(tmp_path, inject.at_call("write_config", 1, KILL)), **TRAIN).finish()
    assert outcome.codes == [-9], outcome.output
    again = run_here(tmp_path, **TRAIN)
    if "RESUME=1" in again.errors:
        again = run_here(tmp_path, **TRAIN, RESUME=1)
    assert again.code == 0, again.errors
    assert latest(run_folder(tmp_path))["finished"]


# ----------------------------------------------------------------------------------------------------------------------
# Two processes with one RUN_ID

WAITS_IN_STEP_6 = """
def waiting_step(*args):
    calls.append(args)
    if len(calls) == 6:
        open("waiting", "w").close()
        while not os.path.exists("go on"):
            time.sleep(0.01)
    return real_step(*args)
train_gpt.training_step = waiting_step
"""


def test_a_run_that_is_being_worked_on_is_refused_to_others_and_goes_on_unharmed(
    launch: Launch, run_here: RunHere, reference: Finished, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path)
    first = launch(tmp_path, script=driver(tmp_path, inject.CONSTANT_CODE_BYTES + WAITS_IN_STEP_6), **REFERENCE, WARMUP_STEPS=0, CHECKPOINT_EVERY=5)
    inject.wait_for((tmp_path / "waiting").exists, first)
    before = (folder / "run.jsonl").read_bytes(), (folder / "config.env").read_bytes(), (folder / "checkpoint.pt").read_bytes()
    second = run_here(tmp_path, **REFERENCE, RESUME=1)
    assert second.code == 1 and second.errors == "error: RUN_ID=run: another process is working on it; wait for it or stop it, or choose another RUN_ID\n"
    third = run_here(tmp_path, **REFERENCE)
    assert third.code == 1 and "exists and is never overwritten" in third.errors
    assert before == ((folder / "run.jsonl").read_bytes(), (folder / "config.env").read_bytes(), (folder / "checkpoint.pt").read_bytes())
    (tmp_path / "go on").touch()
    outcome = first.finish()
    assert outcome.codes == [0], outcome.output
    unharmed(folder, reference)


def test_of_two_processes_that_begin_at_the_same_moment_the_second_is_refused(tmp_path: Path) -> None:
    first = train_gpt.Log(tmp_path)
    with pytest.raises(ValueError, match=r"run\.jsonl: another process has just begun to work on this run; choose another RUN_ID"):
        train_gpt.Log(tmp_path)
    first.close()
    train_gpt.Log(tmp_path).close()


# ----------------------------------------------------------------------------------------------------------------------
# Disks: full, full for a while, read-only

@pytest.fixture(scope="module")
def without_room_for_checkpoints(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, forked.Outcome]:
    """The place and the outcome of a run on a disk that takes an artifact and logs, but no checkpoint."""
    place = tmp_path_factory.mktemp("full_disk")
    return place, launch(place, script=driver(place, inject.full_disk(100_000, "True")), **REFERENCE, WARMUP_STEPS=0, CHECKPOINT_EVERY=3).finish()


def test_a_run_whose_checkpoints_cannot_be_written_says_so_and_ends_with_its_artifact(
    without_room_for_checkpoints: tuple[Path, forked.Outcome], reference: Finished
) -> None:
    place, outcome = without_room_for_checkpoints
    assert outcome.codes == [0], outcome.output
    folder = run_folder(place)
    assert (folder / "artifact.bin").read_bytes() == (reference.folder / "artifact.bin").read_bytes()
    assert scores_of(Finished(folder, Path(), "")) == scores_of(reference)
    assert not list(folder.glob("*.pt")) and not list(folder.glob("*.partial"))
    notes = [event["text"] for event in events(folder, "note") if "cannot be written" in event["text"]]
    assert [note.partition(":")[0] for note in notes] == [f"step {step}" for step in (3, 6, 9, STEPS, STEPS)]
    assert all(str(folder / "checkpoint.pt") in note and "goes on without it" in note for note in notes)


def test_a_run_whose_checkpoints_cannot_be_written_does_not_claim_that_they_are(without_room_for_checkpoints: tuple[Path, forked.Outcome]) -> None:
    assert "weights saved in checkpoint.pt" not in without_room_for_checkpoints[1].output


def test_a_disk_that_is_full_for_a_while_costs_nothing_even_where_the_output_goes_to_it(launch: Launch, reference: Finished, tmp_path: Path) -> None:
    script = driver(tmp_path, inject.full_disk(1, "3 <= len(calls) <= 9"))
    outcome = launch(tmp_path, script=script, **REFERENCE, WARMUP_STEPS=0, CHECKPOINT_EVERY=3).finish()
    assert outcome.codes == [0], outcome.output
    unharmed(run_folder(tmp_path), reference)
    steps = [event["step"] for event in events(run_folder(tmp_path), "step")]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS, "lines may be missing from the log, but none is broken or doubled"


def test_a_disk_without_room_for_the_artifact_ends_a_run_in_one_error_that_names_it(launch: Launch, tmp_path: Path) -> None:
    script = driver(tmp_path, inject.full_disk(8000, "True"))  # more than the output of the run, less than its events
    outcome = launch(tmp_path, script=script, **REFERENCE, WARMUP_STEPS=0).finish()
    assert outcome.codes == [1], outcome.output
    assert "Traceback" not in outcome.output and f"step {STEPS}/{STEPS}" in outcome.output
    assert "run.jsonl: File too large; a line is missing there" in outcome.output
    (error,) = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    assert "artifact.bin" in error and "File too large" in error
    assert not (run_folder(tmp_path) / "artifact.bin").exists()


def test_a_checkpoint_that_does_not_reach_the_disk_is_not_taken_for_one(
    run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder, written = os.fsync, run_folder(tmp_path), []
    unfinished = folder / "checkpoint.pt.partial"

    def fsync(descriptor: int) -> None:
        if unfinished.exists() and os.path.samestat(os.fstat(descriptor), unfinished.stat()):
            written.append(descriptor)
            if len(written) in (2, 3):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    seen: list[int] = []
    monkeypatch.setattr(train_gpt.os, "fsync", fsync)
    patch_step(monkeypatch, lambda number: seen.append(latest(folder)["step"] if number > 4 else 0))
    ended = run_here(tmp_path, **REFERENCE, WARMUP_STEPS=0, CHECKPOINT_EVERY=3)
    assert ended.code == 0, ended.errors
    assert seen == [0] * 4 + [3] * (STEPS - 4), "the checkpoints of steps 6 and 9 failed: that of step 3 is left as it is"
    assert ended.output.count("checkpoint.pt cannot be written ([Errno 28] No space left on device") == 2
    unharmed(folder, reference)


# As root, permissions bind only a process that has given its own up.
FOLDER_BECOMES_READ_ONLY_IN_STEP_5 = """
def step(*args):
    calls.append(args)
    if len(calls) == 5:
        os.chmod("runs/run", 0o555)
        if os.geteuid() == 0:
            os.chmod(".", 0o755)
            os.seteuid(65534)
    return real_step(*args)
train_gpt.training_step = step
"""


def test_a_run_whose_folder_becomes_read_only_names_what_it_cannot_write_and_goes_on_from_its_last_checkpoint(
    launch: Launch, run_here: RunHere, reference: Finished, tmp_path: Path
) -> None:
    folder, settings = run_folder(tmp_path), {**REFERENCE, "WARMUP_STEPS": 0, "RUNS_DIR": "runs"}
    script = driver(tmp_path, inject.CONSTANT_CODE_BYTES + FOLDER_BECOMES_READ_ONLY_IN_STEP_5)
    outcome = launch(tmp_path, script=script, **settings, CHECKPOINT_EVERY=3).finish()
    os.chmod(folder, 0o755)
    assert outcome.codes == [1] and "Traceback" not in outcome.output, outcome.output
    assert "step 6: runs/run/checkpoint.pt cannot be written ([Errno 13] Permission denied" in outcome.output
    assert "error: [Errno 13] Permission denied: 'runs/run/artifact.bin.partial'" in outcome.output
    assert latest(folder)["step"] == 3
    ended = run_here(tmp_path, **REFERENCE, WARMUP_STEPS=0, RESUME=1)
    assert ended.code == 0, ended.errors
    unharmed(folder, reference)


# ----------------------------------------------------------------------------------------------------------------------
# Out of memory


def run_out_of_memory(*_: Any) -> None:
    """Does what PyTorch does without memory."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation.")


def limit_memory(monkeypatch: pytest.MonkeyPatch, rows: int, *, in_backward: bool = False) -> None:
    """Makes a pass over more rows than this run out of memory: forward, or in the middle of backward."""
    real = train_gpt.GPT.hidden

    def hidden(self: train_gpt.GPT, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        x = real(self, tokens, *args)
        if len(tokens) > rows and in_backward and x.requires_grad:
            x.register_hook(run_out_of_memory)
        elif len(tokens) > rows and not in_backward:
            run_out_of_memory()
        return x

    monkeypatch.setattr(train_gpt.GPT, "hidden", hidden)


@pytest.mark.parametrize("rows", [16, 1])
def test_an_evaluation_that_runs_out_of_memory_goes_on_with_smaller_batches_and_gives_their_scores(
    run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    settings = {**REFERENCE, "STAGES": "eval", "ARTIFACT": reference.folder / "artifact.bin"}
    small = run_here(tmp_path, **settings, RUN_ID="small", VAL_BATCH_SIZE=32 * rows, SCORES_FILE=tmp_path / "small.npy")
    assert small.code == 0 and "out of memory" not in small.output, small.errors
    limit_memory(monkeypatch, rows)
    ended = run_here(tmp_path, **settings, VAL_BATCH_SIZE=32 * 32, SCORES_FILE=tmp_path / "scores.npy")
    assert ended.code == 0, ended.errors
    assert (tmp_path / "scores.npy").read_bytes() == (tmp_path / "small.npy").read_bytes()
    for name in ("chunked", "sliding"):
        notes = [line for line in ended.output.splitlines() if line.startswith(f"out of memory: {name} evaluation")]
        expected = [batch for batch in (16, 8, 4, 2, 1) if batch >= rows]
        assert [note.partition("goes on with ")[2] for note in notes] == [f"{batch} windows at a time; set VAL_BATCH_SIZE lower" for batch in expected]


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_documents_that_learn_without_memory_for_all_of_them_go_on_in_smaller_batches_with_the_same_scores(
    run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_backward: bool
) -> None:
    settings = {
        **REFERENCE, "STAGES": "eval", "ARTIFACT": reference.folder / "artifact.bin", "VAL_BATCH_SIZE": 32, "FINAL_EVAL": "ttt_lora", "TTT_LORA_BATCH_DOCS": 5,
        "TTT_LORA_CHUNK_TOKENS": 16, "TTT_LORA_RANK": 2, "TTT_LORA_LR": 0.01, "TTT_LORA_TARGETS": "q,down,head",
    }  # fmt: skip
    whole = run_here(tmp_path, **settings, RUN_ID="whole", SCORES_FILE=tmp_path / "whole.npy")
    assert whole.code == 0 and "out of memory" not in whole.output, whole.errors
    limit_memory(monkeypatch, 2, in_backward=in_backward)
    ended = run_here(tmp_path, **settings, SCORES_FILE=tmp_path / "scores.npy")
    assert ended.code == 0, ended.errors
    scores, expected = (np.load(tmp_path / f"{name}.npy") for name in ("scores", "whole"))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    notes = [line.partition("goes on with ")[2] for line in ended.output.splitlines() if line.startswith("out of memory: ttt_lora evaluation")]
    assert notes == [f"{batch} documents at a time; set TTT_LORA_BATCH_DOCS lower" for batch in (3, 2)]


def test_an_evaluation_without_memory_for_one_window_ends_in_one_error_and_keeps_the_artifact(
    run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(reference, tmp_path).parent
    (folder / "artifact.bin").unlink()
    limit_memory(monkeypatch, 0)
    ended = run_here(tmp_path, **REFERENCE, RESUME=1, STAGES="export,eval")
    assert ended.code == 1 and (folder / "artifact.bin").read_bytes() == (reference.folder / "artifact.bin").read_bytes()
    assert "Traceback" not in ended.errors and ended.errors.startswith("error: ") and "out of memory" in ended.errors


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.fixture(scope="module")
def on_two_ranks(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of the reference run on two ranks."""
    place = tmp_path_factory.mktemp("on_two_ranks")
    assert launch(place, ranks=2, script=driver(place, inject.CONSTANT_CODE_BYTES), **TRAIN).finish().codes == [0, 0]
    return latest(run_folder(place))


def at_step_5(rank: int, action: str) -> str:
    """Returns the lines of a driver that make a rank run `action` before its fifth step; no collective takes longer than 2 s."""
    patch = inject.at_call("training_step", 5, f"os.environ['RANK'] == '{rank}' and {action}")
    return f"{patch}\nimport datetime\ntrain_gpt.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=2)\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_two_ranks_is_killed_the_other_ends_at_once_and_they_go_on_together(
    launch: Launch, on_two_ranks: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    started = launch(tmp_path, ranks=2, script=driver(tmp_path, at_step_5(rank, KILL)), **TRAIN, CHECKPOINT_EVERY=3)
    began = time.monotonic()
    outcome = started.finish()
    assert outcome.codes == [-9, 1][:: 1 - 2 * rank], outcome.output
    assert time.monotonic() - began < 20
    assert latest(run_folder(tmp_path))["step"] == 3
    again = launch(tmp_path, ranks=2, script=driver(tmp_path, inject.CONSTANT_CODE_BYTES), **TRAIN, RESUME=1).finish()
    assert again.codes == [0, 0], again.output
    assert_same_checkpoint(latest(run_folder(tmp_path)), on_two_ranks)


def test_when_one_of_two_ranks_hangs_the_other_ends_after_the_timeout(launch: Launch, tmp_path: Path) -> None:
    """A launcher ends the one that hangs as soon as one rank has failed."""
    started = launch(tmp_path, ranks=2, script=driver(tmp_path, at_step_5(1, "time.sleep(120)")), **TRAIN, CHECKPOINT_EVERY=3)
    started.processes[0].join(60)
    assert started.processes[0].exitcode == 1 and started.processes[1].is_alive()
    outcome = started.finish(seconds=0)
    assert "timed out" in outcome.output.lower() or "timeout" in outcome.output.lower(), outcome.output
    assert latest(run_folder(tmp_path))["step"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Shards and clocks in mid-run


def copy_of_corpus(corpus: Path, tmp_path: Path) -> list[Path]:
    """Copies the corpus to tmp_path/data and returns its train shards there."""
    shutil.copytree(corpus, tmp_path / "data")
    return sorted((tmp_path / "data").glob("*_train_*.bin"))


def restore(corpus: Path, paths: list[Path]) -> None:
    """Puts the shards back as they were."""
    for path in paths:
        path.unlink(missing_ok=True)
        shutil.copy(corpus / path.name, path)


def goes_on(run_here: RunHere, tmp_path: Path, reference: Finished) -> None:
    """With its data back, the run ends with the reference's weights."""
    ended = run_here(tmp_path, **TRAIN, DATA_PATH=tmp_path / "data", RESUME=1)
    assert ended.code == 0, ended.errors
    assert_same_checkpoint(latest(run_folder(tmp_path)), reference.checkpoint())


def test_tokens_that_leave_the_vocabulary_in_mid_run_end_it_with_the_name_of_the_shard(
    corpus: Path, run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = copy_of_corpus(corpus, tmp_path)

    def spoil(number: int) -> None:
        for path in paths if number == 5 else []:
            np.memmap(path, dtype="<u2", mode="r+", offset=1024)[:] = 60_000

    with monkeypatch.context() as patched:
        patch_step(patched, spoil)
        ended = run_here(tmp_path, **TRAIN, DATA_PATH=tmp_path / "data", CHECKPOINT_EVERY=3)
    assert ended.code == 1 and "Traceback" not in ended.errors
    assert f"error: {paths[0]}: token 60000 is outside VOCAB_SIZE" in ended.errors
    assert latest(run_folder(tmp_path))["step"] == 3
    restore(corpus, paths)
    goes_on(run_here, tmp_path, reference)


def test_shards_truncated_in_mid_run_end_it_with_their_name(
    corpus: Path, launch: Launch, run_here: RunHere, reference: Finished, tmp_path: Path
) -> None:
    paths = copy_of_corpus(corpus, tmp_path)
    truncate = inject.at_call("training_step", 5, f"[os.truncate(path, 2000) for path in {[str(path) for path in paths]}]")
    outcome = launch(tmp_path, script=driver(tmp_path, truncate), **TRAIN, DATA_PATH=tmp_path / "data", CHECKPOINT_EVERY=3).finish()
    assert outcome.codes == [1], outcome.output
    assert f"error: {paths[0]}: " in outcome.output and "truncated" in outcome.output and "Traceback" not in outcome.output
    assert latest(run_folder(tmp_path))["step"] == 3
    restore(corpus, paths)
    goes_on(run_here, tmp_path, reference)


def test_shards_that_vanish_in_mid_run_are_read_to_the_end_and_a_run_without_them_is_not_resumed(
    corpus: Path, run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = copy_of_corpus(corpus, tmp_path)

    def vanish(number: int) -> None:
        if number == 5:
            paths[1].unlink()
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patch_step(patched, vanish)
        assert run_here(tmp_path, **TRAIN, DATA_PATH=tmp_path / "data").code == 143
    before = (run_folder(tmp_path) / "checkpoint.pt").read_bytes()
    ended = run_here(tmp_path, **TRAIN, DATA_PATH=tmp_path / "data", RESUME=1)
    assert ended.code == 1 and "Traceback" not in ended.errors, "other shards are other batches: the run would not be the one that it says it is"
    assert str(tmp_path / "data") in ended.errors
    assert (run_folder(tmp_path) / "checkpoint.pt").read_bytes() == before
    restore(corpus, paths)
    goes_on(run_here, tmp_path, reference)


def test_a_clock_that_jumps_by_hours_changes_nothing(run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumps = time.time, [0]

    def jumping() -> float:
        jumps[0] += 1
        return real() + 36_000 * (-1) ** jumps[0]

    monkeypatch.setattr(train_gpt.time, "time", jumping)
    ended = run_here(tmp_path, **REFERENCE, WARMUP_STEPS=0, MAX_WALLCLOCK_SECONDS=5000, CHECKPOINT_EVERY=3)
    assert ended.code == 0, ended.errors
    assert jumps[0] > STEPS
    unharmed(run_folder(tmp_path), reference)
    assert 0 < Finished(run_folder(tmp_path), Path(), "").result()["train_seconds"] < 60


# ----------------------------------------------------------------------------------------------------------------------
# Signals in export, coding and evaluation

TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("function", "number", "action", "code"),
    [
        ("quantise", 1, TERMINATE, 143), ("encode_role", 2, KILL, -9), ("os.fsync", 1, KILL, -9), ("os.fsync", 1, TERMINATE, 143),
        ("Evaluator.write", 1, KILL, -9), ("Evaluator.write", 3, TERMINATE, 143), ("os.fsync", 2, KILL, -9),
    ],
)  # fmt: skip
def test_a_run_stopped_in_export_coding_or_evaluation_leaves_nothing_half_written_and_goes_on_from_its_weights(
    launch: Launch, run_here: RunHere, reference: Finished, tmp_path: Path, function: str, number: int, action: str, code: int
) -> None:
    folder, scores, artifact = copied(reference, tmp_path).parent, tmp_path / "scores.npy", (reference.folder / "artifact.bin").read_bytes()
    for name in ("artifact.bin", "result.json"):
        (folder / name).unlink()
    settings = {**REFERENCE, "RESUME": 1, "STAGES": "export,eval", "SCORES_FILE": scores}
    outcome = launch(tmp_path, script=driver(tmp_path, inject.at_call(function, number, action)), **settings).finish()
    assert outcome.codes == [code], outcome.output
    is_scored = (function, number) not in (("quantise", 1), ("encode_role", 2), ("os.fsync", 1))
    assert (folder / "artifact.bin").exists() == is_scored and not scores.exists() and not (folder / "result.json").exists()
    assert not is_scored or (folder / "artifact.bin").read_bytes() == artifact
    if code != -9:
        assert not list(folder.glob("*.partial")) and not list(tmp_path.glob("*.partial"))
    ended = run_here(tmp_path, **settings)
    assert ended.code == 0, ended.errors
    unharmed(folder, reference)
    assert scores.read_bytes() == reference.scores.read_bytes()
    assert not list(folder.glob("*.partial")) and not list(tmp_path.glob("*.partial"))


# ----------------------------------------------------------------------------------------------------------------------
# Many faults, drawn at random: the short form of the soak


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> soak.Soak:
    """A soak whose data and run without faults are made."""
    return soak.Soak(tmp_path_factory.mktemp("soak"), seed=1)


def test_a_run_hit_again_and_again_at_random_moments_ends_as_one_that_is_not(campaign: soak.Soak) -> None:
    patient = campaign.patient(1)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        patient.stop(number)
    patient.damage_newest()
    patient.fill_disk()
    assert {"damage to the newest", "disk full for a while"} < set(campaign.rows) and not patient.folder.exists()
    for name, row in campaign.rows.items():
        assert row.injected == row.survived == len(row.lost) > 0, name
    assert any(row.recovery for row in campaign.rows.values())


@pytest.mark.parametrize("kind", inject.KINDS)
def test_damaged_files_are_refused_or_rightly_accepted_and_nothing_else(campaign: soak.Soak, kind: str) -> None:
    count = 1000 if kind == "artifact" else 150  # most damage there ends before the digest is looked at
    campaign.hurt_files(kind, 0, count)
    row = campaign.rows[f"damaged {kind}"]
    assert campaign.problems == [] and row.injected == row.survived == count
    assert row.accepted < count // 2 and (row.accepted > 0) == (kind != "artifact"), "but for artifacts, both ways out are tried"


def test_the_soak_says_what_each_fault_cost_and_fails_where_one_was_not_survived(
    campaign: soak.Soak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        "disk full for a while": soak.Row(1, 1, lost=[0]), "damaged shard": soak.Row(1000, 999, accepted=321),
        "SIGTERM in export": soak.Row(1, 1, lost=[0]), "SIGKILL in training": soak.Row(3, 3, lost=[0, 2, 1], recovery=[1.0, 4.0, 1.26]),
    }  # fmt: skip
    monkeypatch.setattr(campaign, "rows", rows)
    monkeypatch.setattr(campaign, "problems", [f"damaged shard 7: {campaign.place}/x: a shard that it ought not to"])
    monkeypatch.setattr(soak.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(soak, "Soak", lambda place, seed: campaign)
    monkeypatch.setattr(soak, "PAGE", tmp_path / "faults" / "README.md")
    nothing = ["--cycles", "0", "--mutations", "0"]
    assert soak.main(nothing) == 1 and not soak.PAGE.exists()
    assert "1 not survived; what is left of them: " in capsys.readouterr().out
    assert soak.main([*nothing, "--write"]) == 1
    lines = soak.PAGE.read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["fault", "injected", "survived", "accepted", "lost", "median", "longest"]
    assert table[2:] == [
        ["SIGKILL in training", "3", "3", "", "2", "1.3", "4.0"], ["SIGTERM in export", "1", "1", "", "0", "", ""],
        ["damaged shard", "1,000", "999", "321", "", "", ""], ["disk full for a while", "1", "1", "", "0", "", ""],
    ]  # fmt: skip
    assert "    python tests/faults/soak.py --cycles 0 --mutations 0 --write" in lines
    assert lines[-1] == "- damaged shard 7: x: a shard that it ought not to"
    campaign.problems.clear()
    assert soak.main(nothing) == 0
    with pytest.raises(SystemExit) as stopped:
        soak.main(["--cycles", "-1"])
    assert stopped.value.code == 2
