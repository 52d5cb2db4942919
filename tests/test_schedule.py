"""Schedule: progress, learning rate, momentum and phase as pure functions of how far training has come."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import Config, Knobs, Phase, Progress, Schedule


def schedule_of(**changed: Any) -> Schedule:
    """Returns a schedule of 100 steps without wall clock, decay or warm-up, unless `changed` says otherwise."""
    base: dict[str, Any] = {"iterations": 100, "max_wallclock_seconds": 0.0, "warmdown_iters": 0, "muon_momentum_warmup_steps": 0}
    return Schedule(Config(**{**base, **changed}))


def knobs_at(schedule: Schedule, step: int, seconds: float = 0.0, step_seconds: float = 0.0) -> Knobs:
    return schedule(schedule.progress(step, seconds, step_seconds))


@pytest.mark.parametrize(
    ("wallclock", "step", "seconds", "step_seconds", "expected"),
    [
        (0.0, 0, 0.0, 0.0, Progress(0, 0.0, 100.0)),
        (0.0, 25, 1e9, 5.0, Progress(25, 0.25, 75.0)),  # without a limit, time means nothing
        (0.0, 100, 0.0, 1.0, Progress(100, 1.0, 0.0)),
        (60.0, 0, 0.0, 0.0, Progress(0, 0.0, 100.0)),
        (60.0, 0, 30.0, 0.0, Progress(0, 0.5, 100.0)),  # no step has been timed yet
        (60.0, 50, 15.0, 0.25, Progress(50, 0.5, 50.0)),  # steps are ahead: 0.5 of them, 0.25 of the time
        (60.0, 25, 45.0, 1.5, Progress(25, 0.75, 10.0)),  # time is ahead
        (60.0, 50, 30.0, 0.5, Progress(50, 0.5, 50.0)),
        (60.0, 50, 30.0, 0.625, Progress(50, 0.5, 48.0)),
        (60.0, 99, 60.0, 0.5, Progress(99, 1.0, 0.0)),
        (60.0, 50, 61.0, 0.5, Progress(50, 1.0, 0.0)),  # over the limit: clamped on both sides
        (60.0, 101, 0.0, 0.5, Progress(101, 1.0, 0.0)),
    ],
)
def test_progress_is_the_larger_fraction_and_the_fewer_steps(wallclock: float, step: int, seconds: float, step_seconds: float, expected: Progress) -> None:
    assert schedule_of(max_wallclock_seconds=wallclock).progress(step, seconds, step_seconds) == expected


@pytest.mark.parametrize(("step", "lr_scale"), [(0, 1.0), (59, 1.0), (60, 1.0), (61, 0.975), (80, 0.5), (99, 0.025), (100, 0.0)])
def test_warmdown_by_steps_is_remaining_steps_over_its_length(step: int, lr_scale: float) -> None:
    assert knobs_at(schedule_of(warmdown_iters=40), step).lr_scale == lr_scale


@pytest.mark.parametrize(
    ("step", "seconds", "step_seconds", "lr_scale"),
    [
        (0, 0.0, 0.0, 1.0),
        (10, 10.0, 1.0, 1.0),  # 50 steps left by the clock, 990 by count
        (20, 20.0, 1.0, 1.0),
        (30, 30.0, 1.0, 0.75),
        (55, 55.0, 1.0, 0.125),
        (110, 55.0, 0.5, 0.25),  # the same time at twice the speed: 10 steps left
        (60, 60.0, 1.0, 0.0),
        (60, 70.0, 1.0, 0.0),
        (995, 1.0, 0.001, 0.125),  # the count ends first
    ],
)
def test_warmdown_by_steps_ends_with_the_wall_clock(step: int, seconds: float, step_seconds: float, lr_scale: float) -> None:
    schedule = schedule_of(iterations=1000, max_wallclock_seconds=60.0, warmdown_iters=40)
    assert knobs_at(schedule, step, seconds, step_seconds).lr_scale == lr_scale


def test_warmdown_longer_than_the_run_starts_below_the_full_rate() -> None:
    assert [knobs_at(schedule_of(warmdown_iters=200), step).lr_scale for step in (0, 50, 100)] == [0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("step", "seconds", "lr_scale"), [(0, 0.0, 1.0), (50, 0.0, 1.0), (75, 0.0, 0.5), (100, 0.0, 0.0), (10, 45.0, 0.5), (10, 60.0, 0.0), (75, 59.0, 1 / 30)]
)
def test_warmdown_by_fraction_follows_the_larger_fraction(step: int, seconds: float, lr_scale: float) -> None:
    schedule = schedule_of(warmdown_frac=0.5, max_wallclock_seconds=60.0)
    assert knobs_at(schedule, step, seconds, 0.1).lr_scale == pytest.approx(lr_scale, abs=1e-12)


def test_warmdown_over_the_whole_run_is_a_straight_line() -> None:
    assert [knobs_at(schedule_of(warmdown_frac=1.0), step).lr_scale for step in (0, 25, 50, 100)] == [1.0, 0.75, 0.5, 0.0]


def test_without_warmdown_the_rate_is_constant() -> None:
    assert {knobs_at(schedule_of(), step).lr_scale for step in range(101)} == {1.0}


@pytest.mark.parametrize("decay", [{"warmdown_iters": 40}, {"warmdown_frac": 0.4}])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_decay_ends_at_the_floor_and_passes_half_way_to_it(decay: dict[str, Any], floor: float) -> None:
    schedule = schedule_of(lr_floor_frac=floor, **decay)
    assert [knobs_at(schedule, step).lr_scale for step in (0, 60, 80, 100)] == pytest.approx([1.0, 1.0, (1 + floor) / 2, floor], abs=1e-12)


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.85), (10, 0.87), (25, 0.9), (50, 0.95), (51, 0.95), (99, 0.95)])
def test_momentum_warms_up_linearly_by_steps(step: int, momentum: float) -> None:
    schedule = schedule_of(muon_momentum_warmup_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=50, max_wallclock_seconds=60.0)
    assert knobs_at(schedule, step, 59.0, 0.1).momentum == pytest.approx(momentum, abs=1e-12)


def test_momentum_without_warm_up_is_constant() -> None:
    assert knobs_at(schedule_of(muon_momentum_warmup_start=0.1, muon_momentum=0.9), 0).momentum == pytest.approx(0.9, abs=1e-12)


PLAIN, QUANTISED = Phase((0, 1, 2), 64), Phase((0, 1, 2), 64, qat=True)


@pytest.mark.parametrize(("start", "expected"), [(0.0, [QUANTISED]), *[(start, [PLAIN, QUANTISED]) for start in (0.01, 0.5, 0.99)], (1.0, [PLAIN])])
@pytest.mark.parametrize("wallclock", [0.0, 60.0])
def test_phases_listed_are_the_phases_reached_in_that_order(start: float, expected: list[Phase], wallclock: float) -> None:
    schedule = schedule_of(num_layers=3, train_seq_len=64, qat_start_frac=start, max_wallclock_seconds=wallclock)
    reached = list(dict.fromkeys(knobs_at(schedule, step, 0.6 * step, 0.6).phase for step in range(100)))
    assert schedule.phases() == reached == expected


@pytest.mark.parametrize("start", [0.25, 0.5, 0.75])
def test_quantisation_switches_on_at_its_fraction_of_the_run_and_stays_on(start: float) -> None:
    by_steps = schedule_of(qat_start_frac=start)
    assert [knobs_at(by_steps, step).phase.qat for step in range(101)] == [step >= 100 * start for step in range(101)]
    by_time = schedule_of(qat_start_frac=start, max_wallclock_seconds=64.0, iterations=10**6)
    assert [knobs_at(by_time, 1, float(second)).phase.qat for second in range(65)] == [second >= 64 * start for second in range(65)]


def test_start_of_1_never_quantises_even_after_the_end() -> None:
    schedule = schedule_of(qat_start_frac=1.0, max_wallclock_seconds=60.0)
    assert not any(knobs_at(schedule, step, seconds, 1.0).phase.qat for step in (0, 99, 100, 101) for seconds in (0.0, 60.0, 61.0))


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_scored_phase_runs_every_layer_and_never_quantises_again(start: float) -> None:
    schedule = schedule_of(num_layers=3, train_seq_len=64, qat_start_frac=start)
    assert schedule.scored_phase == PLAIN
    assert schedule.scored_phase.order == schedule.phases()[-1].order


MOMENTS = st.tuples(st.integers(0, 120), st.floats(0, 80), st.floats(0, 10))


@settings(max_examples=100, deadline=None)
@given(
    moment=MOMENTS,
    wallclock=st.sampled_from([0.0, 1e-3, 60.0]),
    decay=st.sampled_from([{}, {"warmdown_iters": 1}, {"warmdown_iters": 500}, {"warmdown_frac": 0.3}, {"warmdown_frac": 1.0}]),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
    start=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_knob_stays_in_its_range_and_depends_on_progress_alone(
    moment: tuple[int, float, float], wallclock: float, decay: dict[str, Any], floor: float, start: float
) -> None:
    changed = {"max_wallclock_seconds": wallclock, "lr_floor_frac": floor, "qat_start_frac": start, "muon_momentum_warmup_steps": 50, **decay}
    schedule = schedule_of(**changed)
    progress = schedule.progress(*moment)
    knobs = schedule(progress)
    assert 0 <= progress.frac <= 1
    assert 0 <= progress.remaining_steps <= 100
    assert floor <= knobs.lr_scale <= 1 + 1e-12
    assert 0.85 <= knobs.momentum <= 0.95
    assert knobs.phase in schedule.phases()
    schedule(schedule.progress(7, 3.0, 0.5))
    assert schedule(progress) == knobs == schedule_of(**changed)(progress), "what was asked before does not matter"


@pytest.mark.parametrize("decay", [{"warmdown_iters": 40}, {"warmdown_frac": 0.4}])
def test_rate_never_rises_while_step_and_time_go_on(decay: dict[str, Any]) -> None:
    schedule = schedule_of(max_wallclock_seconds=60.0, lr_floor_frac=0.1, **decay)
    rates = [knobs_at(schedule, step, 0.7 * step, 0.7).lr_scale for step in range(101)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1.0, 0.1)
