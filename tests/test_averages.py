"""Averages of weights: EMA, LAWA and SWA against their closed forms, what they do to the model, and that a run saves and resumes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, Finished, lively_model, small_config
from torch import Tensor

import train_gpt
from train_gpt import Averages, Config, Optimizer, TrainingState, TrainLoader, World

ALONE = World("cpu")
STEPS = 23
Weights = list[Tensor]


def averaged(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[train_gpt.GPT, Averages]:
    """A small model and the averages that `settings` ask for."""
    config = small_config(num_layers=2, **settings)
    model = lively_model(config, dtype)
    return model, Averages(model, config)


def weights_of(model: train_gpt.GPT) -> Weights:
    return [parameter.detach().clone() for parameter in model.parameters()]


def wander(model: train_gpt.GPT, seed: int) -> Weights:
    """Moves the weights at random, as a training step would, and returns them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return weights_of(model)


def lr_scale_at(step: int) -> float:
    """Full rate until step 10, then down to a little over 0: at most 0.5 from step 17 on."""
    return min(1.0, (24 - step) / 14)


def walk(model: train_gpt.GPT, averages: Averages, steps: int = STEPS) -> list[Weights]:
    """Trains at random for some steps and returns the weights after each: [0] is after step 1."""
    after = []
    for step in range(1, steps + 1):
        after.append(wander(model, step))
        averages.update(step, lr_scale_at(step))
    return after


def mean_of(weights: list[Weights], shares: list[float] | None = None) -> Weights:
    """The mean of some weights, in proportion to `shares`."""
    shares = shares or [1.0] * len(weights)
    return [
        torch.stack([share * tensor for share, tensor in zip(shares, tensors, strict=True)]).sum(dim=0) / sum(shares) for tensors in zip(*weights, strict=True)
    ]


def applied_weights(model: train_gpt.GPT, averages: Averages) -> Weights:
    with averages.applied():
        return weights_of(model)


def ema(weights: list[Weights], decay: float) -> Weights:
    return mean_of(weights, [decay ** (len(weights) - index) for index in range(1, len(weights) + 1)])


def assert_close(one: Weights, other: Weights, tolerance: float = 1e-13) -> None:
    """Up to the rounding of some twenty additions of numbers of about 1."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# Closed forms


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9965, 0.99999])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_ema_weighs_each_step_by_a_power_of_its_age_and_the_start_not_at_all(decay: float, steps: int) -> None:
    model, averages = averaged(ema_decay=decay)
    after = walk(model, averages, steps)
    # At 0.99999 the shares are ratios of 1 - decay and 1 - decay^n, which keep 1e-11 of themselves.
    assert_close(applied_weights(model, averages), ema(after, decay), 1e-11 if decay > 0.999 else 1e-13)


@pytest.mark.parametrize("every", [2, 5])
def test_ema_of_every_so_many_steps_forgets_as_fast_as_that_of_all(every: int) -> None:
    model, averages = averaged(ema_decay=0.9, ema_every=every)
    after = walk(model, averages)
    assert_close(applied_weights(model, averages), ema(after[every - 1 :: every], 0.9**every))


@pytest.mark.parametrize(
    "settings", [{"ema_decay": 0.9}, {"lawa_k": 3, "lawa_every": 2}, {"swa_every": 2, "swa_start_lr_scale": 1.0}], ids=["ema", "lawa", "swa"]
)
def test_no_average_knows_the_weights_before_the_first_step(settings: dict[str, Any]) -> None:
    model, averages = averaged(**settings)
    after = weights_of(model)
    means = []
    for start in (0.0, 1e6):
        for parameter in model.parameters():
            parameter.data.fill_(start)
        averages = Averages(model, averages.chain[0].config)
        for step in (1, 2):
            torch._foreach_copy_([parameter.data for parameter in model.parameters()], after)
            averages.update(step, 1.0)
        means.append(applied_weights(model, averages))
    assert_close(means[0], means[1], 0.0)


@pytest.mark.parametrize(("count", "every"), [(1, 1), (3, 1), (4, 5), (5, 3), (100, 2)])
def test_lawa_is_the_mean_of_the_latest_weights_at_its_steps(count: int, every: int) -> None:
    model, averages = averaged(lawa_k=count, lawa_every=every)
    after = walk(model, averages)
    assert_close(applied_weights(model, averages), mean_of(after[every - 1 :: every][-count:]))


@pytest.mark.parametrize(("every", "threshold", "steps"), [(1, 0.5, range(17, 24)), (3, 0.5, range(18, 24, 3)), (5, 1.0, range(5, 24, 5)), (1, 1 / 14, (23,))])
def test_swa_is_the_mean_of_the_weights_at_its_steps_once_the_rate_is_low(every: int, threshold: float, steps: range) -> None:
    model, averages = averaged(swa_every=every, swa_start_lr_scale=threshold)
    after = walk(model, averages)
    assert averages.chain[0].count == len(steps)
    assert_close(applied_weights(model, averages), mean_of([after[step - 1] for step in steps]))


def test_lawa_takes_the_mean_of_the_ema() -> None:
    model, averages = averaged(ema_decay=0.8, lawa_k=3, lawa_every=4)
    after = walk(model, averages)
    assert_close(applied_weights(model, averages), mean_of([ema(after[:step], 0.8) for step in (12, 16, 20)]))


def test_swa_takes_the_mean_of_the_average_before_it() -> None:
    model, averages = averaged(ema_decay=0.8, lawa_k=2, lawa_every=4, swa_every=3, swa_start_lr_scale=0.5)
    after = walk(model, averages)
    lawa = {16: mean_of([ema(after[:step], 0.8) for step in (12, 16)]), 20: mean_of([ema(after[:step], 0.8) for step in (16, 20)])}
    assert_close(applied_weights(model, averages), mean_of([lawa[16], lawa[20]]))  # steps 18 and 21


def test_an_average_that_has_not_begun_passes_on_what_it_is_given() -> None:
    """SWA begins at step 17, LAWA would at step 50: SWA then takes the weights themselves, or their EMA."""
    for decay in (0.0, 0.8):
        model, averages = averaged(ema_decay=decay, lawa_k=2, lawa_every=50, swa_every=10, swa_start_lr_scale=0.5)
        after = walk(model, averages)
        assert_close(applied_weights(model, averages), ema(after[:20], decay) if decay else after[19])


# What they do to the model

CHAIN: dict[str, Any] = {"ema_decay": 0.8, "lawa_k": 3, "lawa_every": 2, "swa_every": 2, "swa_start_lr_scale": 0.5}


def test_weights_are_replaced_by_the_last_average_that_has_begun() -> None:
    for steps, last in ((1, "EMA"), (2, "LAWA"), (17, "LAWA"), (18, "SWA")):
        model, averages = averaged(**CHAIN)
        before = walk(model, averages, steps)[-1]
        means = {type(average).__name__: [mean.clone() for mean in average.state["mean"]] for average in averages.chain}
        averages.apply()
        assert_close(weights_of(model), means[last], 0.0)
        assert steps == 1 or not any(torch.equal(one, other) for one, other in zip(weights_of(model), before, strict=True))
        for average in averages.chain:
            assert_close(average.state["mean"], means[type(average).__name__], 0.0)


def test_weights_come_back_bit_for_bit_even_after_an_error() -> None:
    model, averages = averaged(torch.float32, **CHAIN)
    before, state = walk(model, averages)[-1], copy.deepcopy(averages.state_dict())
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), averages.applied():
        assert not any(torch.equal(one, other) for one, other in zip(weights_of(model), before, strict=True))
        raise RuntimeError("on purpose")
    assert_close(weights_of(model), before, 0.0)
    assert places == [parameter.data_ptr() for parameter in model.parameters()], "what is compiled goes on reading the same memory"
    torch.testing.assert_close(averages.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"lawa_k": 3, "lawa_every": 50}, {"swa_every": 1, "swa_start_lr_scale": 0.01}, {"lawa_k": 1, "lawa_every": 50, "swa_every": 50}]
)
def test_where_nothing_has_begun_the_weights_stay_as_they_are(settings: dict[str, Any]) -> None:
    model, averages = averaged(**settings)
    assert len(averages.chain) == len([name for name in settings if name in ("ema_decay", "lawa_k", "swa_every")])
    before = walk(model, averages)[-1]
    assert_close(applied_weights(model, averages), before, 0.0)
    averages.apply()
    assert_close(weights_of(model), before, 0.0)


def test_updating_does_not_touch_the_weights() -> None:
    model, averages = averaged(**CHAIN)
    last = walk(model, averages)[-1]
    assert_close(weights_of(model), last, 0.0)


# Saved and restored


@pytest.mark.parametrize("at_step", [0, 1, 5, 18])
@pytest.mark.parametrize("settings", [CHAIN, {"lawa_k": 4, "lawa_every": 1}, {"swa_every": 1, "swa_start_lr_scale": 1.0}], ids=["chain", "lawa", "swa"])
def test_restored_averages_continue_bit_for_bit(settings: dict[str, Any], at_step: int) -> None:
    model, averages = averaged(torch.float32, **settings)
    walk(model, averages, at_step)
    weights, saved = weights_of(model), copy.deepcopy(averages.state_dict())

    def go_on(model: train_gpt.GPT, averages: Averages) -> tuple[dict[str, Any], Weights]:
        for step in range(at_step + 1, STEPS + 1):
            wander(model, step)
            averages.update(step, lr_scale_at(step))
        return copy.deepcopy(averages.state_dict()), applied_weights(model, averages)

    expected = go_on(model, averages)
    other_model, other = averaged(torch.float32, **settings)
    walk(other_model, other, 7)
    torch._foreach_copy_([parameter.data for parameter in other_model.parameters()], weights)
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    torch.testing.assert_close(other.state_dict(), saved, rtol=0, atol=0)
    torch.testing.assert_close(go_on(other_model, other), expected, rtol=0, atol=0)
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)


def test_a_training_state_holds_a_copy_of_the_averages_and_restores_it(tiny: Callable[..., Config]) -> None:
    config = tiny(**{name.upper(): value for name, value in CHAIN.items()})
    states = []
    for _ in range(2):
        model = lively_model(config, torch.float32)
        states.append(TrainingState(model, Optimizer(model, config, ALONE), Averages(model, config), TrainLoader(config)))
    first, second = states
    walk(first.model, first.averages, 18)
    saved = first.save()
    kept = copy.deepcopy(saved["averages"])
    assert {name: entry["count"] for name, entry in kept.items()} == {"EMA": 18, "LAWA": 9, "SWA": 1}
    names = [name for name, _ in first.model.named_parameters()]
    assert all(list(entry["mean"]) == names for entry in kept.values()), "state lies under the parameters' names"
    expected = applied_weights(first.model, first.averages)
    wander(first.model, 19)
    first.averages.update(19, 0.1)
    torch.testing.assert_close(saved["averages"], kept, rtol=0, atol=0)
    second.load(saved)
    torch.testing.assert_close(second.save(), saved, rtol=0, atol=0)
    assert_close(applied_weights(second.model, second.averages), expected, 0.0)


# In a run


def checkpoint_of(folder: Path) -> dict[str, Any]:
    return train_gpt.read_checkpoint(folder / "runs" / "run" / "checkpoint.pt")


def record_updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, dict[str, Tensor]]]:
    """Returns a list that fills with (step, rate, weights by name) as a run goes on."""
    seen: list[tuple[int, float, dict[str, Tensor]]] = []
    real = Averages.update

    def update(self: Averages, step: int, lr_scale: float) -> None:
        seen.append((step, lr_scale, {name: parameter.detach().clone() for name, parameter in self.parameters.items()}))
        real(self, step, lr_scale)

    monkeypatch.setattr(Averages, "update", update)
    return seen


def test_a_run_validates_saves_and_exports_its_averaged_weights(run_here: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_updates(monkeypatch)
    scored: list[dict[str, Tensor]] = []
    real = train_gpt.Trainer.validate

    def validate(self: train_gpt.Trainer) -> train_gpt.Score:
        score_now = self.score_now

        def score(forward: Any, phase: train_gpt.Phase) -> train_gpt.Score:
            scored.append({name: parameter.detach().clone() for name, parameter in self.state.model.named_parameters()})
            return score_now(forward, phase)

        self.score_now = score
        try:
            return real(self)
        finally:
            self.score_now = score_now

    monkeypatch.setattr(train_gpt.Trainer, "validate", validate)
    ended = run_here(tmp_path, EMA_DECAY=0.8, VAL_LOSS_EVERY=5, STAGES="train,export")
    assert ended.code == 0, ended.errors
    assert [step for step, *_ in seen] == list(range(1, 9))
    saved = checkpoint_of(tmp_path)
    assert saved["finished"]
    final = saved["state"]["model"]
    torch.testing.assert_close(final, saved["state"]["averages"]["EMA"]["mean"], rtol=0, atol=0)
    for steps, weights in ((5, scored[0]), (8, scored[1]), (8, final)):
        expected = ema([[weight.double() for weight in at_step.values()] for *_, at_step in seen[:steps]], 0.8)
        # Eight steps of float32, each of which rounds numbers of at most 2 to 1.2e-7.
        torch.testing.assert_close([weight.double() for weight in weights.values()], expected, rtol=0, atol=1e-6)
    last = seen[-1][2]
    assert max(float((final[name] - last[name]).abs().max()) for name in final) > 1e-3, "far from the weights that training ended with"
    artifact = (tmp_path / "runs" / "run" / "artifact.bin").read_bytes()
    exported = run_here(tmp_path, RUN_ID="export", STAGES="export", CHECKPOINT=tmp_path / "runs" / "run" / "checkpoint.pt")
    assert exported.code == 0, exported.errors
    assert (tmp_path / "runs" / "export" / "artifact.bin").read_bytes() == artifact


def test_swa_in_a_run_begins_when_the_rate_is_low(run_here: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_updates(monkeypatch)
    ended = run_here(tmp_path, WARMDOWN_FRAC=1, SWA_EVERY=1, SWA_START_LR_SCALE=0.5, STAGES="train", WARMUP_STEPS=3)
    assert ended.code == 0, ended.errors
    assert [rate for _, rate, _ in seen] == [1 - step / 8 for step in range(8)]
    saved = checkpoint_of(tmp_path)["state"]
    assert saved["averages"]["SWA"]["count"] == 4
    expected = mean_of([[weight.double() for weight in weights.values()] for *_, weights in seen[4:]])
    torch.testing.assert_close([weight.double() for weight in saved["model"].values()], expected, rtol=0, atol=1e-6)
    rates = [event["lr_scale"] for event in Finished(tmp_path / "runs" / "run", tmp_path, "").events("step")]
    assert rates == [rate for _, rate, _ in seen]


def test_a_run_that_died_goes_on_with_its_averages_as_if_nothing_had_happened(
    run_here: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in step 6, two steps after its last checkpoint, between two entries of LAWA and in the middle of SWA."""
    settings: dict[str, Any] = {"EMA_DECAY": 0.8, "LAWA_K": 2, "LAWA_EVERY": 3, "SWA_EVERY": 1, "SWA_START_LR_SCALE": 0.9}
    settings |= {"WARMDOWN_FRAC": 1, "WARMUP_STEPS": 0, "STAGES": "train"}
    assert run_here(tmp_path / "whole", **settings).code == 0
    real, calls = train_gpt.training_step, []

    def dying_step(*args: Any) -> train_gpt.StepStats:
        calls.append(args)
        if len(calls) == 6:
            raise RuntimeError("on purpose")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train_gpt, "training_step", dying_step)
        assert run_here(tmp_path / "died", **settings, CHECKPOINT_EVERY=4).code == 1
    halfway = checkpoint_of(tmp_path / "died")
    assert halfway["step"] == 4 and not halfway["finished"]
    counts = {name: entry["count"] for name, entry in halfway["state"]["averages"].items()}
    assert counts == {"EMA": 4, "LAWA": 1, "SWA": 3}
    resumed = run_here(tmp_path / "died", **settings, RESUME=1)
    assert resumed.code == 0 and "resumed from checkpoint.pt after step 4," in resumed.output, resumed.errors
    whole, died = (checkpoint_of(tmp_path / name) for name in ("whole", "died"))
    assert whole["step"] == died["step"] == 8
    torch.testing.assert_close(died["state"], whole["state"], rtol=0, atol=0)
