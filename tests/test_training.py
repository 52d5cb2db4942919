"""Training: what a step does and reports, what warm-up leaves behind, every way to stop, and going on from a checkpoint."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import CODE_BYTES, REFERENCE, ROOT, Ended, Finished, clean_environment, lively_model, tiny_arguments

import train_gpt

Start = Callable[..., train_gpt.Config]
RunHere = Callable[..., Ended]

# A script that is train_gpt.py with something added; it can import it because it says where it is.
DRIVER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train_gpt
real_step, real_save, calls = train_gpt.training_step, train_gpt.torch.save, []
{patch}
if __name__ == "__main__":
    sys.exit(train_gpt.main(sys.argv[1:]))
"""
SLOW_STEPS = """
def slow_step(*args):
    time.sleep(0.05)
    return real_step(*args)
train_gpt.training_step = slow_step
"""
KILLED_IN_THE_SECOND_CHECKPOINT = """
def half_a_save(content, file):
    calls.append(content["step"])
    if len(calls) == 1:
        return real_save(content, file)
    file.write(b"half of a checkpoint" * 1000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
train_gpt.torch.save = half_a_save
"""
RANK_1_FAILS_IN_STEP_3 = """
def failing_step(*args):
    calls.append(args)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise RuntimeError("rank 1 has had enough")
    return real_step(*args)
train_gpt.training_step = failing_step
"""


def driver(folder: Path, patch: str) -> Path:
    """Writes DRIVER with `patch` into `folder` and returns its path."""
    path = folder / "driver.py"
    path.write_text(DRIVER.format(root=str(ROOT), patch=patch), encoding="utf-8")
    return path


def new_trainer(config: train_gpt.Config, folder: Path, validate: Callable[..., train_gpt.Score] | None = None) -> train_gpt.Trainer:
    """Returns a trainer as `run_stages` makes it, whose run folder is `folder`."""
    world = train_gpt.World("cpu")
    torch.manual_seed(config.seed)
    model = train_gpt.GPT(config)
    model.init_weights()
    folder.mkdir(exist_ok=True)
    run = train_gpt.Run(config, world, train_gpt.Log(folder), folder, train_gpt.StopSignals(), source="")
    return train_gpt.Trainer(run, model, train_gpt.TrainLoader(config), validate or (lambda forward, phase: train_gpt.Score(1.0, 1.0, 0.0, 1, 1, 1.0)))


def test_validation_runs_the_layers_of_the_latest_step(tiny: Start, tmp_path: Path) -> None:
    """Loops that training has not reached yet would score a network that nobody trained; QAT is for training alone."""
    config = tiny(NUM_LOOPS=1, LOOP_END=1, ENABLE_LOOPING_AT=0.5, QAT_START_FRAC=0.8, VAL_LOSS_EVERY=2, WARMUP_STEPS=0)
    seen: list[train_gpt.Phase] = []

    def validate(forward: Callable[..., Any], phase: train_gpt.Phase) -> train_gpt.Score:
        seen.append(phase)
        return train_gpt.Score(1.0, 1.0, 0.0, 1, 1, 1.0)

    new_trainer(config, tmp_path / "run", validate).train()
    assert [phase.order for phase in seen] == [(0, 1, 2)] * 2 + [(0, 1, 0, 1, 2)] * 2
    assert not any(phase.qat for phase in seen)


def assert_same_checkpoint(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, their frozen grids, optimiser state, data order and step are the same, bit for bit."""
    assert one["step"] == other["step"] and one["finished"] == other["finished"]
    assert one["state"]["loader"] == other["state"]["loader"]
    assert one["state"]["model"].keys() == other["state"]["model"].keys() == one["state"]["optimizer"].keys() == other["state"]["optimizer"].keys()
    for name, weight in one["state"]["model"].items():
        assert torch.equal(weight, other["state"]["model"][name]), name
        for key, value in one["state"]["optimizer"][name].items():
            assert torch.equal(value, other["state"]["optimizer"][name][key]), f"{name} {key}"
    assert one["state"]["grids"].keys() == other["state"]["grids"].keys()
    assert all(torch.equal(grid, other["state"]["grids"][name]) for name, grid in one["state"]["grids"].items())
    averages, others = one["state"]["averages"], other["state"]["averages"]
    assert {name: average["count"] for name, average in averages.items()} == {name: average["count"] for name, average in others.items()}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors_of(averages), tensors_of(others), strict=True))


def scores_of(run: Finished) -> dict[str, tuple[float, float]]:
    """The scores of a run, without the seconds that they took."""
    return {name: (score["val_loss"], score["val_bpb"]) for name, score in run.result()["scores"].items()}


def patch_step(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Makes every training step call `before` with its number, counted from 1 (warm-up counts too)."""
    real, calls = train_gpt.training_step, []

    def step(*args: Any) -> train_gpt.StepStats:
        calls.append(args)
        before(len(calls))
        return real(*args)

    monkeypatch.setattr(train_gpt, "training_step", step)


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def test_training_learns_more_than_how_often_each_token_occurs(reference: Finished, corpus: Path) -> None:
    losses = [event["train_loss"] for event in reference.events("step")]
    assert losses[0] == pytest.approx(math.log(384), abs=0.05), "an untrained model gives every token nearly the same probability"
    tokens = np.concatenate([train_gpt.read_shard(path) for path in sorted(corpus.glob("*_train_*.bin"))])
    share = np.bincount(tokens) / len(tokens)
    unigram_entropy = -sum(p * math.log(p) for p in share if p)
    assert losses[-1] < unigram_entropy - 1, "a model that ignores the context cannot do better than the entropy of single tokens"


@pytest.mark.parametrize("micro_batch_tokens", [32, 96, 256])
def test_the_reported_loss_is_the_average_over_the_batch(tiny: Start, tmp_path: Path, micro_batch_tokens: int) -> None:
    trainer = new_trainer(tiny(MICRO_BATCH_TOKENS=micro_batch_tokens), tmp_path / "run")
    phase = trainer.schedule.phase(0.0)
    rows = train_gpt.TrainLoader(trainer.run.config).next_rows(8, 32, trainer.run.world)
    with torch.no_grad():
        expected = trainer.state.model(rows[:, :-1], rows[:, 1:], phase).double().mean()
    stats = train_gpt.training_step(trainer.forward, trainer.state.optimizer, trainer.state.loader, train_gpt.Knobs(phase, 1.0, 0.9, 1.0))
    assert float(stats.loss) == pytest.approx(float(expected), rel=3e-7), "float32 sums"
    assert trainer.state.loader.state["row"] == 8, "one step takes one batch"


def test_two_ranks_train_the_weights_that_one_rank_trains(reference: Finished, two_ranks: Finished) -> None:
    one, two = reference.checkpoint(), two_ranks.checkpoint()
    assert one["state"]["loader"] == two["state"]["loader"] and one["step"] == two["step"] == REFERENCE["ITERATIONS"]
    for name, weight in one["state"]["model"].items():
        # Both add up the same halves of a batch: measured 0. The tolerance is for a PyTorch whose kernels round by the number of matrices in a stack.
        torch.testing.assert_close(two["state"]["model"][name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    losses = [[event["train_loss"] for event in run.events("step")] for run in (reference, two_ranks)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    results = [run.result() for run in (reference, two_ranks)]
    assert [result["world_size"] for result in results] == [1, 2]
    for key in ("pre_quant_val_bpb", "val_bpb"):
        assert results[1][key] == pytest.approx(results[0][key], abs=1e-6), key


@pytest.mark.parametrize("micro_batch_tokens", [32, 128])
def test_the_gradient_does_not_depend_on_the_size_of_micro_batches(tiny: Start, tmp_path: Path, micro_batch_tokens: int) -> None:
    gradients = []
    for tokens in (256, micro_batch_tokens):
        trainer = new_trainer(tiny(MICRO_BATCH_TOKENS=tokens), tmp_path / f"{tokens}")
        train_gpt.load_weights(trainer.state.model, dict(lively_model(trainer.run.config, torch.float32).named_parameters()))
        train_gpt.training_step(trainer.forward, trainer.state.optimizer, trainer.state.loader, trainer.schedule(train_gpt.Progress(0, 0.0, 8.0)))
        state = trainer.state.optimizer.state_dict()
        gradients.append({name: moments["momentum"] if "momentum" in moments else moments["first"] for name, moments in state.items()})
    for name, gradient in gradients[0].items():
        # float32 sums over 256 tokens in another order: a few times sqrt(256) roundings of 6e-8, relative to terms that partly cancel.
        assert float((gradients[1][name] - gradient).norm()) < 1e-5 * float(gradient.norm()), name


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up


# Every phase of a run with these differs from the others: plain, looped, longer rows, larger batches, QAT.
PHASES = {
    "NUM_LOOPS": 1, "LOOP_START": 1, "LOOP_END": 1, "LOOP_EMBEDDING": 1, "ENABLE_LOOPING_AT": 0.2, "TRAIN_SEQ_LEN": 64, "TRAIN_SEQ_SCHEDULE": "32@0.4,64@1",
    "TRAIN_BATCH_SCHEDULE": "128@0.6,256@1", "QAT_START_FRAC": 0.8,
}  # fmt: skip
AVERAGES = {"EMA_DECAY": 0.9, "LAWA_K": 2, "LAWA_EVERY": 1, "SWA_EVERY": 1, "SWA_START_LR_SCALE": 1}


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns every tensor inside nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in inner for tensor in tensors_of(item)]


def test_warm_up_leaves_no_trace(tiny: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(tiny(**PHASES, **AVERAGES, NORMUON_BETA2=0.9, WARMUP_STEPS=2), tmp_path / "run")
    state, expected = trainer.state, trainer.schedule.phases()
    assert len(expected) == 5
    for step in (1, 2, 3):  # so that there is something in every state to be disturbed
        train_gpt.training_step(trainer.forward, state.optimizer, state.loader, train_gpt.Knobs(expected[-1], 1.0, 0.9, 1.0))
        state.averages.update(step, 1.0)

    def everything() -> list[torch.Tensor]:
        held = [group.state for group in state.optimizer.groups] + [average.state for average in state.averages.chain]
        return [tensor.detach().clone() for tensor in (*state.model.parameters(), *tensors_of(held))]

    before, place, counts = everything(), dict(state.loader.state), [average.count for average in state.averages.chain]
    phases: list[train_gpt.Phase] = []
    real = train_gpt.training_step

    def counted(*args: Any) -> train_gpt.StepStats:
        phases.append(args[3].phase)
        state.averages.update(len(phases), 1.0)  # as the loop does after its steps
        return real(*args)

    monkeypatch.setattr(train_gpt, "training_step", counted)
    train_gpt.warm_up(trainer.run, trainer.forward, state, trainer.schedule)
    assert phases == [phase for phase in expected for _ in range(2)], "every phase runs"
    assert counts == [3, 3, 3] and all(tensor.count_nonzero() for tensor in before), "the comparison below sees states that steps have filled"
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    assert state.loader.state == place and [average.count for average in state.averages.chain] == counts


def test_the_phases_of_a_run_are_those_that_warm_up_ran(tiny: Start, tmp_path: Path) -> None:
    trainer = new_trainer(tiny(**PHASES, ITERATIONS=10), tmp_path / "run")
    trainer.train()
    events = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    ran = [(e["step"], (tuple(e["order"]), e["seq_len"], e["batch_tokens"], e["qat"])) for e in events if e["event"] == "phase"]
    once, looped = (0, 1, 2), (0, 1, 1, 2)
    plan = [(once, 32, 128, False), (looped, 32, 128, False), (looped, 64, 128, False), (looped, 64, 256, False), (looped, 64, 256, True)]
    assert ran == list(zip((0, 2, 4, 6, 8), plan, strict=True))
    assert [train_gpt.Phase(*phase) for phase in plan] == trainer.schedule.phases()
    assert trainer.state.loader.state["tokens"] == 6 * 128 + 4 * 256


def test_training_after_a_warm_up_ends_where_training_without_one_ends(tiny: Start, tmp_path: Path) -> None:
    ended = []
    for steps in (0, 3):
        trainer = new_trainer(tiny(**PHASES, **AVERAGES, WARMUP_STEPS=steps, ITERATIONS=5), tmp_path / f"run{steps}")
        trainer.train()
        ended.append(train_gpt.read_checkpoint(tmp_path / f"run{steps}" / "checkpoint.pt"))
    assert_same_checkpoint(*ended)


# ----------------------------------------------------------------------------------------------------------------------
# The clock


class FakeTime:
    """Stands in for the `time` module: a step of training takes `step_seconds` and only counts its tokens, and nothing else takes any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_seconds: float) -> None:
        self.now = 1000.0

        def step(*args: Any) -> train_gpt.StepStats:
            self.now += step_seconds
            loader, phase = args[2], args[3].phase
            loader.state["tokens"] += phase.batch_tokens
            return train_gpt.StepStats(torch.tensor(1.0), torch.tensor(1.0))

        monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: self.now, time=time.time))
        monkeypatch.setattr(train_gpt, "training_step", step)


@pytest.mark.parametrize("val_loss_every", [0, 3])
@pytest.mark.parametrize("step_seconds", [0.25, 1.0])
def test_training_stops_just_before_the_wall_clock_limit_and_validation_is_not_counted(
    tiny: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float, val_loss_every: int
) -> None:
    clock = FakeTime(monkeypatch, step_seconds)
    validated: list[float] = []

    def validate(forward: Callable[..., Any], phase: train_gpt.Phase) -> train_gpt.Score:
        validated.append(clock.now)
        clock.now += 1000
        return train_gpt.Score(1.0, 1.0, 1000.0, 1, 1, 1.0)

    # The limit is a whole number of steps, and warm-up would use it up.
    config = tiny(MAX_WALLCLOCK_SECONDS=20 * step_seconds, ITERATIONS=1000, VAL_LOSS_EVERY=val_loss_every, WARMUP_STEPS=30)
    trained = new_trainer(config, tmp_path / "run", validate).train()
    assert trained.seconds == trained.steps * step_seconds, "the clock counts training steps and nothing else"
    assert 20 - train_gpt.STEPS_IN_FLIGHT <= trained.steps < 20
    assert len(validated) == 1 + (trained.steps // val_loss_every if val_loss_every else 0)
    saved = train_gpt.read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["finished"] and saved["seconds"] == trained.seconds, "a run that used its time up is finished"


def test_the_schedule_follows_the_wall_clock(tiny: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTime(monkeypatch, 1.0)
    config = tiny(MAX_WALLCLOCK_SECONDS=20, ITERATIONS=1000, WARMDOWN_FRAC=0.5, QAT_START_FRAC=0.6)
    new_trainer(config, tmp_path / "run").train()
    events = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    scales = [event["lr_scale"] for event in events if event["event"] == "step"]
    # The clock that a step sees is one step old: step n (from 1) sees n - 2 seconds.
    assert scales == pytest.approx([min((20 - max(step - 2, 0)) / 10, 1.0) for step in range(1, len(scales) + 1)])
    assert [(event["step"], event["qat"]) for event in events if event["event"] == "phase"] == [(0, False), (13, True)]


@pytest.mark.parametrize("log_every", [1, 3])
def test_logged_step_times_are_those_of_the_steps(tiny: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int) -> None:
    FakeTime(monkeypatch, 0.5)
    new_trainer(tiny(TRAIN_LOG_EVERY=log_every, VAL_LOSS_EVERY=4), tmp_path / "run").train()
    events = [json.loads(line) for line in (tmp_path / "run" / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [step for step in range(1, 9) if step in (1, 8) or step % log_every == 0]
    assert [event["step_ms"] for event in steps] == pytest.approx([500.0] * len(steps))
    assert [event["tokens_per_second"] for event in steps] == pytest.approx([512.0] * len(steps))


# ----------------------------------------------------------------------------------------------------------------------
# Divergence


def plant_nan(monkeypatch: pytest.MonkeyPatch, at_step: int, on_the_way: Callable[[], None] = lambda: None) -> None:
    """Makes the loss of one training step NaN."""
    real, calls = train_gpt.training_step, []

    def step(forward: Callable[..., torch.Tensor], *args: Any) -> train_gpt.StepStats:
        calls.append(args)
        if len(calls) == at_step:
            on_the_way()
            return real(lambda *rows: forward(*rows) * math.nan, *args)
        return real(forward, *args)

    monkeypatch.setattr(train_gpt, "training_step", step)


# At 4, the step that diverges is the one that a checkpoint was to follow; at 8, the last one.
@pytest.mark.parametrize("at_step", [3, 4, 8])
def test_a_nan_loss_stops_the_run_and_keeps_the_last_checkpoint(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    checkpoint, seen = tmp_path / "runs" / "run" / "checkpoint.pt", []
    plant_nan(monkeypatch, at_step, lambda: seen.append(checkpoint.read_bytes()))
    ended = run_here(tmp_path, WARMUP_STEPS=0, CHECKPOINT_EVERY=2, MAX_SKIPPED_STEPS=0)
    assert ended.code == 1
    assert f"error: step {at_step}: loss nan" in ended.errors and "Traceback" not in ended.errors
    assert f"ended by an error: step {at_step}: loss nan" in (checkpoint.parent / "log.txt").read_text(encoding="utf-8")
    assert checkpoint.read_bytes() == seen[0]
    assert train_gpt.read_checkpoint(checkpoint)["step"] == (at_step - 1) // 2 * 2
    assert not (checkpoint.parent / "artifact.bin").exists() and not (checkpoint.parent / "result.json").exists()


@pytest.mark.parametrize("at_step", [1, 3, 8])
def test_a_nan_loss_before_any_checkpoint_saves_weights_to_go_on_from(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    with monkeypatch.context() as patched:
        plant_nan(patched, at_step)
        ended = run_here(tmp_path, WARMUP_STEPS=0, MAX_SKIPPED_STEPS=0)
    assert ended.code == 1 and f"step {at_step}: loss nan" in ended.errors
    saved = train_gpt.read_checkpoint(tmp_path / "runs" / "run" / "checkpoint.pt")
    assert not saved["finished"]
    assert all(weight.isfinite().all() for weight in saved["state"]["model"].values())
    assert all(value.isfinite().all() for moments in saved["state"]["optimizer"].values() for value in moments.values())
    # The place in the data and the step count are of one moment; a step takes 8 rows.
    loader = train_gpt.TrainLoader(train_gpt.parse_config([f"{name}={value}" for name, value in saved_settings(saved).items()], {}))
    for _ in range(saved["step"]):
        loader.next_rows(8, 32, train_gpt.World("cpu"))
    assert saved["state"]["loader"] == loader.state
    resumed = run_here(tmp_path, RESUME=1, WARMUP_STEPS=0, STAGES="train")
    assert resumed.code == 0, resumed.errors
    assert train_gpt.read_checkpoint(tmp_path / "runs" / "run" / "checkpoint.pt")["step"] == 8


def saved_settings(saved: dict[str, Any]) -> dict[str, str]:
    """The settings of a checkpoint as arguments."""
    return {name.upper(): train_gpt.format_value(value) for name, value in saved["settings"].items()}


def test_the_step_with_a_nan_loss_is_not_applied(tiny: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = new_trainer(tiny(), tmp_path / "run")
    before = [parameter.detach().clone() for parameter in trainer.state.model.parameters()]
    plant_nan(monkeypatch, 1)
    knobs = train_gpt.Knobs(trainer.schedule.phase(0.0), 1.0, 0.9, 1.0)
    train_gpt.training_step(trainer.forward, trainer.state.optimizer, trainer.state.loader, knobs)
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.state.model.parameters(), strict=True))


def test_a_learning_rate_that_blows_the_weights_up_ends_in_one_clear_error(run_here: RunHere, tmp_path: Path) -> None:
    ended = run_here(tmp_path, TIED_EMBED_LR=3e38, ITERATIONS=40)
    assert ended.code == 1 and "gradient norm" in ended.errors and "lower learning rate" in ended.errors and "Traceback" not in ended.errors
    assert "last good state" in ended.output


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def wait_for_a_step_after_the_checkpoint(folder: Path, ranks: forked.Ranks) -> None:
    """Returns as soon as the run has a checkpoint and has logged a later step."""
    deadline = time.monotonic() + 60
    log = folder / "run.jsonl"
    while time.monotonic() < deadline and any(process.is_alive() for process in ranks.processes):
        if (folder / "checkpoint.pt").exists():
            steps = [event["step"] for event in map(json.loads, log.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()) if event["event"] == "step"]
            if steps and steps[-1] > 3:
                return
        time.sleep(0.002)
    raise AssertionError(f"the run did not come to step 4:\n{ranks.output.read_text(encoding='utf-8')}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    launch: Callable[..., forked.Ranks], run_here: RunHere, reference: Finished, tmp_path: Path, number: signal.Signals
) -> None:
    folder, scores = tmp_path / "runs" / "run", tmp_path / "scores.npy"
    command = [f"@{folder / 'config.env'}", "RESUME=1"]
    started = launch(tmp_path, script=driver(tmp_path, SLOW_STEPS), **REFERENCE, CHECKPOINT_EVERY=3)
    wait_for_a_step_after_the_checkpoint(folder, started)
    assert started.processes[0].pid is not None
    os.kill(started.processes[0].pid, number)
    outcome = started.finish()
    saved = train_gpt.read_checkpoint(folder / "checkpoint.pt")
    assert not saved["finished"] and saved["step"] < REFERENCE["ITERATIONS"] and not (folder / "result.json").exists()
    if number == signal.SIGKILL:
        assert outcome.codes == [-9] and saved["step"] % 3 == 0
    else:
        assert outcome.codes == [128 + number], outcome.output
        assert f"stopped by {number.name} after step {saved['step']}; continue with: python train_gpt.py {' '.join(command)}\n" in outcome.output
        assert saved["step"] > 3, "a checkpoint of the step that was running"
    resumed = run_here(tmp_path, *command, f"SCORES_FILE={scores}")
    assert resumed.code == 0, resumed.errors
    assert f"resumed from checkpoint.pt after step {saved['step']}," in resumed.output
    assert_same_checkpoint(train_gpt.read_checkpoint(folder / "checkpoint.pt"), reference.checkpoint())
    assert scores_of(Finished(folder, scores, resumed.output)) == scores_of(reference)
    assert scores.read_bytes() == reference.scores.read_bytes()
    assert (folder / "artifact.bin").read_bytes() == (reference.folder / "artifact.bin").read_bytes()


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    launch: Callable[..., forked.Ranks], run_here: RunHere, reference: Finished, tmp_path: Path
) -> None:
    outcome = launch(tmp_path, script=driver(tmp_path, KILLED_IN_THE_SECOND_CHECKPOINT), **REFERENCE, CHECKPOINT_EVERY=3).finish()
    assert outcome.codes == [-9], outcome.output
    checkpoint = tmp_path / "runs" / "run" / "checkpoint.pt"
    assert train_gpt.read_checkpoint(checkpoint)["step"] == 3
    assert run_here(tmp_path, **REFERENCE, RESUME=1, STAGES="train").code == 0
    assert_same_checkpoint(train_gpt.read_checkpoint(checkpoint), reference.checkpoint())


def test_a_signal_to_one_of_two_ranks_stops_both_and_they_go_on_together(launch: Callable[..., forked.Ranks], two_ranks: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    started = launch(tmp_path, ranks=2, script=driver(tmp_path, SLOW_STEPS), **REFERENCE, CHECKPOINT_EVERY=3)
    wait_for_a_step_after_the_checkpoint(folder, started)
    assert started.processes[1].pid is not None
    os.kill(started.processes[1].pid, signal.SIGTERM)
    outcome = started.finish()
    assert outcome.codes == [143, 143], outcome.output
    assert 3 < train_gpt.read_checkpoint(folder / "checkpoint.pt")["step"] < REFERENCE["ITERATIONS"]
    outcome = launch(tmp_path, ranks=2, **REFERENCE, RESUME=1, STAGES="train").finish()
    assert outcome.codes == [0, 0], outcome.output
    assert_same_checkpoint(train_gpt.read_checkpoint(folder / "checkpoint.pt"), two_ranks.checkpoint())


@pytest.mark.parametrize("at_step", [1, 7, 8])
def test_a_signal_during_any_step_stops_the_run_with_a_checkpoint(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    patch_step(monkeypatch, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == at_step else None)
    ended = run_here(tmp_path, WARMUP_STEPS=0)
    assert ended.code == 143 and "stopped by SIGTERM" in ended.output
    assert not (tmp_path / "runs" / "run" / "artifact.bin").exists()
    assert at_step <= train_gpt.read_checkpoint(tmp_path / "runs" / "run" / "checkpoint.pt")["step"] <= at_step + 1


@pytest.mark.parametrize("function", ["warm_up", "calibrate", "evaluate", "quantise", "pack", "score_artifact"])
def test_a_signal_outside_training_exits_at_once(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the run went on after the signal")

    monkeypatch.setattr(train_gpt, function, interrupted)
    ended = run_here(tmp_path, ITERATIONS=1, QUANT_SCHEME="gptq" if function == "calibrate" else "rowmax")
    assert ended.code == 130, ended.errors
    if function != "warm_up":
        assert train_gpt.read_checkpoint(tmp_path / "runs" / "run" / "checkpoint.pt")["finished"], "trained weights are saved before anything else"


def test_a_finished_run_is_resumed_without_training(run_here: RunHere, reference: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    folder = runs / "run"
    subprocess.run(["cp", "-r", reference.folder, folder], check=True)
    monkeypatch.setattr(train_gpt, "training_step", None)  # training would fail
    ended = run_here(tmp_path, **REFERENCE, RESUME=1, SCORES_FILE=tmp_path / "scores.npy")
    assert ended.code == 0, ended.errors
    again = Finished(folder, tmp_path / "scores.npy", ended.output)
    without_times = [{key: value for key, value in run.result().items() if key not in ("scores", "eval_seconds")} for run in (reference, again)]
    assert without_times[0] == without_times[1] and scores_of(again) == scores_of(reference)
    assert (folder / "checkpoint.pt").read_bytes() == (reference.folder / "checkpoint.pt").read_bytes()


@pytest.fixture(scope="module")
def through_all_phases(run_here: RunHere, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run through all of PHASES, with every average."""
    place = tmp_path_factory.mktemp("phases")
    ended = run_here(place, **PHASES, **AVERAGES, ITERATIONS=10, STAGES="train")
    assert ended.code == 0, ended.errors
    return train_gpt.read_checkpoint(place / "runs" / "run" / "checkpoint.pt")


# Rows become longer after step 4; 3 and 4 are the steps before, 7 is in the middle of a phase.
@pytest.mark.parametrize("at_step", [3, 4, 7])
def test_a_run_stopped_in_any_phase_goes_on_bit_for_bit(
    run_here: RunHere, through_all_phases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    settings = {**PHASES, **AVERAGES, "ITERATIONS": 10, "STAGES": "train"}
    with monkeypatch.context() as patched:
        patch_step(patched, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == at_step else None)
        assert run_here(tmp_path, **settings, WARMUP_STEPS=0).code == 143
    checkpoint = tmp_path / "runs" / "run" / "checkpoint.pt"
    assert at_step <= train_gpt.read_checkpoint(checkpoint)["step"] <= at_step + 1
    ended = run_here(tmp_path, **settings, WARMUP_STEPS=0, RESUME=1)
    assert ended.code == 0, ended.errors
    assert_same_checkpoint(train_gpt.read_checkpoint(checkpoint), through_all_phases)


# Schemes whose grids are frozen when QAT starts, after step 5.
FROZEN: dict[str, dict[str, Any]] = {
    "rate": {"QUANT_SCHEME": "rate", "CODER": "range", "BYTES_CAP": CODE_BYTES + 9_000},
    "adaptive": {"QUANT_SCHEME": "adaptive"},
}
FROZEN_RUN = {"ITERATIONS": 8, "QAT_START_FRAC": 0.625, "CALIBRATION_TOKENS": 512, "STAGES": "train"}


@pytest.fixture(scope="module", params=FROZEN)
def with_frozen_grids(request: pytest.FixtureRequest, run_here: RunHere, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A scheme, and the checkpoint of a run with it that began with a warm-up."""
    place = tmp_path_factory.mktemp("frozen")
    ended = run_here(place, **FROZEN_RUN, **FROZEN[request.param], WARMUP_STEPS=1)
    assert ended.code == 0, ended.errors
    return request.param, train_gpt.read_checkpoint(place / "runs" / "run" / "checkpoint.pt")


# The checkpoint of step 4 has no grids yet, that of step 6 has.
@pytest.mark.parametrize(("at_step", "frozen"), [(4, False), (6, True)])
def test_a_run_stopped_before_or_after_its_grids_are_frozen_goes_on_bit_for_bit(
    run_here: RunHere, with_frozen_grids: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int, frozen: bool
) -> None:
    scheme, whole = with_frozen_grids
    steps = [grid for name, grid in whole["state"]["grids"].items() if name.endswith("row_step")]
    assert len(steps) == 19 and all((step != 1).all() for step in steps), "six matrices of three layers, and the embedding"
    settings = {**FROZEN_RUN, **FROZEN[scheme], "WARMUP_STEPS": 0, "CHECKPOINT_EVERY": at_step}
    with monkeypatch.context() as patched:
        plant_nan(patched, at_step + 1, lambda: None)
        assert run_here(tmp_path, **settings, MAX_SKIPPED_STEPS=0).code == 1
    checkpoint = tmp_path / "runs" / "run" / "checkpoint.pt"
    halfway = train_gpt.read_checkpoint(checkpoint)
    assert halfway["step"] == at_step and any((grid != 1).any() for name, grid in halfway["state"]["grids"].items() if name.endswith("row_step")) == frozen
    ended = run_here(tmp_path, **settings, RESUME=1)
    assert ended.code == 0, ended.errors
    assert_same_checkpoint(train_gpt.read_checkpoint(checkpoint), whole)


# ----------------------------------------------------------------------------------------------------------------------
# Presets


def tiny_preset(corpus: Path, preset: str, **settings: Any) -> list[str]:
    """Arguments of the tiny form of a preset on the corpus, in its own shape."""
    base = {"PRESET": preset, "SCALE": "tiny", "DEVICE": "cpu", "DATA_PATH": corpus, "TOKENIZER_PATH": corpus / "tokenizer.model", "VOCAB_SIZE": 384}
    quick = {"TRAIN_BATCH_TOKENS": 256, "MICRO_BATCH_TOKENS": 256, "WARMUP_STEPS": 0, "TRAIN_LOG_EVERY": 1, "ITERATIONS": 10, "RUN_ID": "run"}
    return [f"{name}={value}" for name, value in {**base, **quick, **settings}.items()]


Kept = list[tuple[dict[str, train_gpt.Stored], train_gpt.Packed]]


def keep_packed(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Returns a list that every call of `pack` adds its weights and its outcome to."""
    kept: Kept = []
    real = train_gpt.pack

    def pack(model: train_gpt.GPT, stored: dict[str, train_gpt.Stored], step: float) -> train_gpt.Packed:
        packed = real(model, stored, step)
        kept.append((dict(stored), packed))
        return packed

    monkeypatch.setattr(train_gpt, "pack", pack)
    return kept


# What a scheme may change in bits per byte, and in a weight: the mean square of its error over its own. Measured: 2e-4 and 1e-3 on grids of 6 bits that
# reach the largest weight; 5e-3 and 0.1 on those that are clipped at 12 standard deviations or more; 4e-3 of `rate`, which may move weights that the
# loss of this text does not feel as far as it likes; 6.4e-3 where its steps were frozen at the ninth of ten steps, when few layers had a curvature.
ROUNDING = {
    "rowmax": (1e-3, 2e-3), "gptq_lite": (1e-3, 2e-3), "gptq": (0.01, 0.2), "adaptive": (0.01, 0.2),
    "rate": (5e-3, math.inf), "rate, frozen": (8e-3, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_preset_trains_exports_and_scores_what_it_reads_back(
    preset: str, corpus: Path, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = min(train_gpt.PRESETS[preset].get("qat_start_frac", 1.0), 0.9)  # a run of ten steps has nothing between 0.9 and the end
    changed = {"QAT_START_FRAC": late} if "qat_start_frac" in train_gpt.PRESETS[preset] else {}
    arguments = tiny_preset(corpus, preset, RUNS_DIR=tmp_path, WARMUP_STEPS=1, **changed)
    config, kept = train_gpt.parse_config(arguments, {}), keep_packed(monkeypatch)
    monkeypatch.setattr(train_gpt, "HELD_OUT_TOKENS", 2048)
    ended = run_here(tmp_path, *arguments, bare=True)
    assert ended.code == 0, ended.errors
    run = Finished(tmp_path / "run", Path(), ended.output)
    result, checkpoint, (event,) = run.result(), run.checkpoint(), run.events("export")
    losses = [event["train_loss"] for event in run.events("step")]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.1, "it learns"
    phases = [(tuple(e["order"]), e["seq_len"], e["batch_tokens"], e["qat"]) for e in run.events("phase")]
    assert [train_gpt.Phase(*phase) for phase in phases] == train_gpt.Schedule(config).phases()
    assert all(average["count"] for average in checkpoint["state"]["averages"].values()), "every average of the preset has begun"
    assert result["val_loss"] < math.log(384), "better than an untrained model"
    scheme = config.quant_scheme
    bpb_change, weight_change = ROUNDING["rate, frozen" if scheme == "rate" and changed else scheme]
    assert result["quant_val_bpb"] == pytest.approx(result["pre_quant_val_bpb"], abs=bpb_change)
    if config.tilt_orders:
        assert result["val_bpb"] < result["quant_val_bpb"] - 0.1, "the text of the tests repeats itself"
    else:
        assert result["val_bpb"] == pytest.approx(result["quant_val_bpb"], abs=0.02), "the same model with more context: measured 3e-3"
    data = (run.folder / "artifact.bin").read_bytes()
    assert result["bytes_model"] == len(data) == event["bytes_model"] and event["scheme"] == scheme
    restored = train_gpt.read_artifact(data, train_gpt.Config(), "artifact.bin")
    assert {name: getattr(restored.config, name) for name in train_gpt.MODEL_SETTINGS} == {name: getattr(config, name) for name in train_gpt.MODEL_SETTINGS}
    stored = next(weights for weights, packed in kept if packed.data == data)
    for name, parameter in restored.named_parameters():
        trained = checkpoint["state"]["model"][name]
        assert torch.equal(parameter, stored[name].weight() if name in stored else trained.half().float()), name
        error = (parameter - trained).square().mean() / trained.square().mean()
        assert error <= weight_change, name
        if name in stored and scheme in ("rowmax", "gptq_lite"):
            bits = stored[name].bits
            grid = train_gpt.rowmax_grid(trained, bits) if scheme == "rowmax" else train_gpt.lite_grid(trained, bits, config.gptq_lite_scope)
            torch.testing.assert_close(parameter, grid.fake(trained), rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    widths = {part.bits for part in train_gpt.weight_parts(train_gpt.GPT(config)).values()}
    assert {entry.bits for entry in stored.values()} == widths - {16}


def test_two_ranks_train_a_preset_with_every_feature_as_one_rank_does(corpus: Path, run_here: RunHere, tmp_path: Path) -> None:
    """Through four phases: rows of three lengths, loops; clipped gradients and an average."""
    arguments = tiny_preset(corpus, "frontier", RUNS_DIR=tmp_path, STAGES="train", MICRO_BATCH_TOKENS=128)
    assert run_here(tmp_path, *arguments, "RUN_ID=one", bare=True).code == 0
    outcome = forked.start(ROOT / "train_gpt.py", [*arguments, "RUN_ID=two"], clean_environment(), tmp_path, ranks=2).finish()
    assert outcome.codes == [0, 0], outcome.output
    one, two = (Finished(tmp_path / name, Path(), "") for name in ("one", "two"))
    assert one.checkpoint()["state"]["loader"] == two.checkpoint()["state"]["loader"]
    for part in ("model", "averages"):
        for mine, theirs in zip(tensors_of(one.checkpoint()["state"][part]), tensors_of(two.checkpoint()["state"][part]), strict=True):
            # The norm that clips the gradient is added up in another order: measured 8e-7 after ten steps.
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)
    losses = [[event["train_loss"] for event in run.events("step")] for run in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_two_ranks_train_on_frozen_steps_and_fill_the_cap_as_one_rank_does(corpus: Path, tiny: Start, tmp_path: Path) -> None:
    settings = {**FROZEN_RUN, **FROZEN["rate"], "STAGES": "train,export,eval", "MICRO_BATCH_TOKENS": 128, "RUNS_DIR": tmp_path, "WARMUP_STEPS": 0}
    arguments, runs = tiny_arguments(corpus, tiny().vocab_size, **settings), []
    script = driver(tmp_path, "train_gpt.HELD_OUT_TOKENS = 1024")
    for ranks in (1, 2):
        outcome = forked.start(script, [*arguments, f"RUN_ID={ranks}"], clean_environment(), tmp_path, ranks=ranks).finish()
        assert outcome.codes == [0] * ranks, outcome.output
        runs.append(Finished(tmp_path / str(ranks), Path(), outcome.output))
        (event,) = runs[-1].events("export")
        assert event["scheme"] == "rate" and 0.99 * event["bytes_cap"] < event["bytes_total"] <= event["bytes_cap"]
    one, two = (run.checkpoint()["state"]["grids"] for run in runs)
    for name, grid in one.items():
        # Exponents of steps are rounded: a sum in another order may tip one.
        assert (two[name] / grid).log2().abs().max() <= 0.25 and (two[name] != grid).float().mean() < 0.05, name
    assert runs[1].result()["val_bpb"] == pytest.approx(runs[0].result()["val_bpb"], abs=0.005)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be resumed


def copied(reference: Finished, tmp_path: Path) -> Path:
    """Returns the checkpoint of a copy of the reference run in tmp_path/runs/run."""
    (tmp_path / "runs").mkdir()
    subprocess.run(["cp", "-r", reference.folder, tmp_path / "runs" / "run"], check=True)
    return tmp_path / "runs" / "run" / "checkpoint.pt"


def test_other_settings_are_listed_and_refused(run_here: RunHere, reference: Finished, tmp_path: Path) -> None:
    checkpoint = copied(reference, tmp_path)
    before, settings = checkpoint.read_bytes(), (checkpoint.parent / "config.env").read_bytes()
    ended = run_here(tmp_path, **REFERENCE, RESUME=1, SEED=7, MATRIX_LR=0.5, EVAL_STRIDE=8, TRAIN_LOG_EVERY=3)
    assert ended.code == 1
    assert "SEED: checkpoint 1337, now 7" in ended.errors and "MATRIX_LR: checkpoint 0.04, now 0.5" in ended.errors
    assert ended.errors.count(": checkpoint ") == 2, "EVAL_STRIDE and TRAIN_LOG_EVERY do not reach the weights"
    assert checkpoint.read_bytes() == before
    assert (checkpoint.parent / "config.env").read_bytes() == settings, "which the error tells the user to go on with"


@pytest.mark.parametrize("qat", [True, False])
def test_every_setting_that_reaches_the_weights_must_stay(tiny: Start, qat: bool) -> None:
    """Those of the grids reach them through QAT alone."""
    config = tiny(**REFERENCE, QAT_START_FRAC=0.8 if qat else 1)
    free = (*train_gpt.FREE_ON_RESUME, *(() if qat else train_gpt.GRID_SETTINGS))
    assert {"quant_scheme", "matrix_bits", "layer_bits"} <= set(train_gpt.GRID_SETTINGS) and "qat_start_frac" not in free
    assert not set(train_gpt.FREE_ON_RESUME) & set(train_gpt.GRID_SETTINGS)
    for name, declared in train_gpt.SETTINGS.items():
        saved = {**{name.lower(): getattr(config, name.lower()) for name in train_gpt.SETTINGS}, declared.name: "something else"}
        if declared.name in free:
            train_gpt.check_same_settings(saved, config)
        else:
            with pytest.raises(ValueError, match=f"{name}: checkpoint 'something else'"):
                train_gpt.check_same_settings(saved, config)


def test_without_qat_a_run_may_go_on_with_another_quantiser_and_with_qat_it_may_not(
    run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ITERATIONS": 4, "WARMUP_STEPS": 0, "CALIBRATION_TOKENS": 512}
    other = {"QUANT_SCHEME": "rate", "CODER": "range", "BYTES_CAP": CODE_BYTES + 14_000}
    for qat in (1, 0.5):
        monkeypatch.setattr(train_gpt, "HELD_OUT_TOKENS", 512)
        with monkeypatch.context() as patched:
            patch_step(patched, lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 2 else None)
            assert run_here(tmp_path / str(qat), **settings, QAT_START_FRAC=qat).code == 143
        ended = run_here(tmp_path / str(qat), **settings, **other, QAT_START_FRAC=qat, RESUME=1)
        folder = tmp_path / str(qat) / "runs" / "run"
        if qat == 1:
            assert ended.code == 0, ended.errors
            assert Finished(folder, Path(), "").events("export")[0]["scheme"] == "rate"
            header = json.loads((folder / "artifact.bin").read_bytes()[10:].partition(b',"roles"')[0] + b"}")
            assert (header["scheme"], header["layout"][0]) == ("rate", "range")
        else:
            assert ended.code == 1 and ended.errors.count(": checkpoint ") == 2
            assert "QUANT_SCHEME: checkpoint 'rowmax', now 'rate'" in ended.errors
            assert f"BYTES_CAP: checkpoint 16000000, now {CODE_BYTES + 14_000}" in ended.errors
            assert not (folder / "artifact.bin").exists()


def test_resume_needs_a_run_to_resume(run_here: RunHere, tmp_path: Path) -> None:
    ended = run_here(tmp_path, RUN_ID="missing", RESUME=1)
    assert ended.code == 1 and "RESUME=1: there is no run" in ended.errors and "missing" in ended.errors and "Traceback" not in ended.errors
    assert not (tmp_path / "runs" / "missing").exists()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train_gpt, "warm_up", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        assert run_here(tmp_path, ITERATIONS=2).code == 143
    ended = run_here(tmp_path, ITERATIONS=2, RESUME=1, STAGES="train")
    assert ended.code == 0 and "no checkpoint yet: training starts from step 0" in ended.output


class Stranger:
    """An object whose unpickling would run code."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.flag,)


def test_a_checkpoint_is_read_without_running_code(tmp_path: Path, reference: Finished) -> None:
    torch.load(reference.folder / "checkpoint.pt", weights_only=True)
    torch.save({"version": Stranger(tmp_path / "executed")}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        train_gpt.read_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


OURS = train_gpt.CHECKPOINT_VERSION


@pytest.mark.parametrize("version", [OURS - 1, OURS + 1, 0, "3"])
def test_a_checkpoint_of_another_version_is_refused_even_when_it_is_whole(tmp_path: Path, reference: Finished, version: Any) -> None:
    content = {**reference.checkpoint(), "version": version}
    torch.save({**content, "digest": train_gpt.content_digest(content)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: .*\(version {version}, this script reads version {OURS}\)"):
        train_gpt.read_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize(
    "content",
    [{}, {"version": OURS}, {"version": OURS, "settings": {}, "step": 1, "seconds": 1.0, "finished": True}, [1], None, "text", 7],
    ids=["empty", "version alone", "no state", "list", "none", "text", "number"],
)
def test_a_foreign_checkpoint_is_refused_with_its_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a checkpoint of this script") as caught:
        train_gpt.read_checkpoint(tmp_path / "checkpoint.pt")
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused_with_its_name(tmp_path: Path, reference: Finished) -> None:
    whole, path = (reference.folder / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"
    for length in (0, 1, 3, 30, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checkpoint\.pt: .*damaged") as caught:
            train_gpt.read_checkpoint(path)
        assert "\n" not in str(caught.value), length
    path.write_bytes(b"this is not a checkpoint\n" * 100)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: .*damaged"):
        train_gpt.read_checkpoint(path)


def test_a_checkpoint_with_one_altered_bit_is_refused(tmp_path: Path, reference: Finished) -> None:
    path = tmp_path / "checkpoint.pt"
    with zipfile.ZipFile(reference.folder / "checkpoint.pt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content = archive.read(largest)
    damaged = bytearray((reference.folder / "checkpoint.pt").read_bytes())
    damaged[damaged.index(content) + len(content) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        train_gpt.read_checkpoint(path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""], ids=["half", "empty"])
def test_a_run_with_a_damaged_checkpoint_ends_in_one_line(run_here: RunHere, reference: Finished, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    checkpoint = copied(reference, tmp_path)
    damaged = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged)
    ended = run_here(tmp_path, **REFERENCE, RESUME=1)
    assert ended.code == 1 and ended.errors.startswith(f"error: {checkpoint}") and len(ended.errors.splitlines()) == 1
    assert checkpoint.read_bytes() == damaged, "it is left for its owner to look at"


# ----------------------------------------------------------------------------------------------------------------------
# Ranks that fail


def test_a_rank_that_fails_takes_the_run_down_with_its_message(corpus: Path, tiny: Start, tmp_path: Path) -> None:
    script = driver(tmp_path, RANK_1_FAILS_IN_STEP_3)
    arguments = tiny_arguments(corpus, tiny().vocab_size, RUNS_DIR=tmp_path / "runs", RUN_ID="run", ITERATIONS=10**6, WARMUP_STEPS=0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    began = time.monotonic()
    ended = subprocess.run([*launcher, *arguments], cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and time.monotonic() - began < 60
    assert "rank 1: Traceback" in ended.stderr and "RuntimeError: rank 1 has had enough" in ended.stderr


def test_ranks_that_cannot_share_a_batch_evenly_say_so(tiny: Start) -> None:
    with pytest.raises(ValueError, match="a batch of 256 tokens is 8 rows of 32 tokens, which 3 ranks cannot share evenly"):
        train_gpt.rows_per_forward(tiny(), train_gpt.Phase((0,), 32, 256), 3)


@pytest.mark.parametrize(("micro_batch_tokens", "ranks", "rows"), [(256, 1, 8), (255, 1, 4), (96, 1, 2), (32, 1, 1), (256, 2, 4), (32, 8, 1)])
def test_a_micro_batch_is_the_largest_that_fits_and_divides_the_share_of_a_rank(tiny: Start, micro_batch_tokens: int, ranks: int, rows: int) -> None:
    assert train_gpt.rows_per_forward(tiny(MICRO_BATCH_TOKENS=micro_batch_tokens), train_gpt.Phase((0,), 32, 256), ranks) == rows
