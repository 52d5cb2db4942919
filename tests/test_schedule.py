"""Schedule: progress, learning rate, momentum and phase as pure functions of how far training has come."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import Config, Knobs, Pace, Phase, Progress, Schedule, parse_fracs, parse_steps, validate


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
    assert knobs_at(schedule_of(warmdown_iters=40), step).lr_scale == pytest.approx(lr_scale, abs=1e-12)


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
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_the_floor_is_where_a_decay_stops_and_does_not_change_its_course_before(decay: dict[str, Any], floor: float) -> None:
    schedule = schedule_of(lr_floor_frac=floor, **decay)
    course = {0: 1.0, 60: 1.0, 70: 0.75, 80: 0.5, 90: 0.25, 99: 0.025, 100: 0.0}
    assert [knobs_at(schedule, step).lr_scale for step in course] == pytest.approx([max(value, floor) for value in course.values()], abs=1e-12)


# Rate around each end: (step, multiplier) of 1000 steps.
SEVERAL_DECAYS = {
    "0.5,0.8,1": [
        (399, 1.0), (400, 1.0), (401, 0.99), (450, 0.5), (499, 0.01), (500, 1.0), (501, 1.0), (699, 1.0), (700, 1.0), (701, 0.99), (799, 0.01),
        (800, 1.0), (899, 1.0), (950, 0.5), (999, 0.01), (1000, 0.0),
    ],
    "0.1,0.2,1": [(0, 1.0), (1, 0.99), (50, 0.5), (99, 0.01), (100, 1.0), (101, 0.99), (199, 0.01), (200, 1.0), (201, 1.0), (900, 1.0), (1000, 0.0)],
}  # fmt: skip


@pytest.mark.parametrize("ends", SEVERAL_DECAYS)
@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("by_time", [False, True])
def test_the_rate_falls_towards_each_end_and_is_full_again_after_it(ends: str, floor: float, by_time: bool) -> None:
    """A decay that ends before the run does comes to its last step, not to zero: the step that starts at its end has the full rate."""
    limits = {"iterations": 10**9, "max_wallclock_seconds": 1000.0} if by_time else {"iterations": 1000}
    schedule = schedule_of(warmdown_frac=0.1, warmdown_ends=ends, lr_floor_frac=floor, **limits)
    rates = [knobs_at(schedule, 0, float(at), 1.0).lr_scale if by_time else knobs_at(schedule, at).lr_scale for at, _ in SEVERAL_DECAYS[ends]]
    assert rates == pytest.approx([max(rate, floor) for _, rate in SEVERAL_DECAYS[ends]], abs=1e-8)


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize(("start", "scale"), [(0.75, 0.5), (0.75, 0.0), (0.0, 0.25), (1.0, 0.5)])
def test_weight_decay_tapers_at_its_fraction_of_the_run(start: float, scale: float, by_time: bool) -> None:
    schedule = schedule_of(weight_decay_taper_frac=start, weight_decay_taper_scale=scale, max_wallclock_seconds=64.0 if by_time else 0.0, iterations=64)
    scales = [knobs_at(schedule, 0 if by_time else at, float(at), 1.0).weight_decay_scale for at in range(64)]
    assert scales == [scale if at >= 64 * start else 1.0 for at in range(64)]


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.85), (10, 0.87), (25, 0.9), (50, 0.95), (51, 0.95), (99, 0.95)])
def test_momentum_warms_up_linearly_by_steps(step: int, momentum: float) -> None:
    schedule = schedule_of(muon_momentum_warmup_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=50, max_wallclock_seconds=60.0)
    assert knobs_at(schedule, step, 59.0, 0.1).momentum == pytest.approx(momentum, abs=1e-12)


def test_momentum_without_warm_up_is_constant() -> None:
    assert knobs_at(schedule_of(muon_momentum_warmup_start=0.1, muon_momentum=0.9), 0).momentum == pytest.approx(0.9, abs=1e-12)


PLAIN, QUANTISED = Phase((0, 1, 2), 64, 256), Phase((0, 1, 2), 64, 256, qat=True)


@pytest.mark.parametrize(("start", "expected"), [(0.0, [QUANTISED]), *[(start, [PLAIN, QUANTISED]) for start in (0.01, 0.5, 0.99)], (1.0, [PLAIN])])
@pytest.mark.parametrize("wallclock", [0.0, 60.0])
def test_phases_listed_are_the_phases_reached_in_that_order(start: float, expected: list[Phase], wallclock: float) -> None:
    schedule = schedule_of(num_layers=3, train_seq_len=64, train_batch_tokens=256, qat_start_frac=start, max_wallclock_seconds=wallclock)
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
    schedule = schedule_of(num_layers=3, train_seq_len=64, train_batch_tokens=256, qat_start_frac=start)
    assert schedule.scored_phase == PLAIN
    assert schedule.scored_phase.order == schedule.phases()[-1].order


LOOPS = {
    "three layers three times": ({"num_layers": 3, "num_loops": 2, "loop_start": 0, "loop_end": 2}, (0, 1, 2) * 3),
    "17 of 11": ({"num_layers": 11, "num_loops": 2, "loop_start": 3, "loop_end": 5}, (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)),
    "one layer": ({"num_layers": 4, "num_loops": 1, "loop_start": 1, "loop_end": 1}, (0, 1, 1, 2, 3)),
    "the end": ({"num_layers": 4, "num_loops": 3, "loop_start": 3, "loop_end": 3}, (0, 1, 2, 3, 3, 3, 3)),
    "off": ({"num_layers": 4, "num_loops": 0, "loop_start": 1, "loop_end": 2}, (0, 1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("loops", "looped"), LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("start", [0.0, 0.35])
def test_layers_loop_from_their_fraction_of_the_run_on(loops: dict[str, int], looped: tuple[int, ...], start: float) -> None:
    schedule = schedule_of(enable_looping_at=start, **loops)
    straight = tuple(range(loops["num_layers"]))
    orders = [knobs_at(schedule, step).phase.order for step in range(101)]
    assert orders == [looped if step >= 100 * start else straight for step in range(101)]
    assert schedule.scored_phase.order == looped
    assert [phase.order for phase in schedule.phases()] == list(dict.fromkeys(orders))


@pytest.mark.parametrize("by_time", [False, True])
def test_rows_and_batches_change_exactly_at_their_fractions(by_time: bool) -> None:
    schedule = schedule_of(
        train_seq_len=48, train_seq_schedule="16@0.25,32@0.75,48@1", train_batch_schedule="96@0.5,192@1",
        max_wallclock_seconds=64.0 if by_time else 0.0, iterations=64,
    )  # fmt: skip
    reached = [knobs_at(schedule, 0 if by_time else at, float(at), 1.0).phase for at in range(65)]
    assert [(phase.seq_len, phase.batch_tokens) for phase in reached] == [(16, 96)] * 16 + [(32, 96)] * 16 + [(32, 192)] * 16 + [(48, 192)] * 17
    assert schedule.phases() == list(dict.fromkeys(reached))
    assert (schedule.scored_phase.seq_len, schedule.scored_phase.batch_tokens) == (48, 192)


def test_without_schedules_rows_and_batches_are_those_of_the_settings() -> None:
    (phase,) = schedule_of(train_seq_len=32, train_batch_tokens=96).phases()
    assert (phase.seq_len, phase.batch_tokens) == (32, 96)


def test_rows_may_become_shorter_again_and_such_a_phase_is_listed_once() -> None:
    schedule = schedule_of(train_seq_len=32, train_seq_schedule="32@0.25,16@0.5,32@1", train_batch_tokens=96)
    assert [knobs_at(schedule, step).phase.seq_len for step in (0, 24, 25, 49, 50, 99)] == [32, 32, 16, 16, 32, 32]
    assert [phase.seq_len for phase in schedule.phases()] == [32, 16]


def test_without_loops_their_span_says_nothing() -> None:
    assert schedule_of(num_layers=4, loop_start=2, loop_end=9).phases()[0].order == (0, 1, 2, 3)


def step_lists(values: list[int]) -> st.SearchStrategy[str]:
    """Texts such as 16@0.25,32@1, with up to four values and fractions in hundredths."""
    inner = st.lists(st.integers(1, 99), unique=True, max_size=3).map(sorted)
    picked = st.tuples(inner, st.lists(st.sampled_from(values), min_size=4, max_size=4))
    return picked.map(lambda pair: ",".join(f"{value}@{until / 100}" for value, until in zip(pair[1], [*pair[0], 100], strict=False)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_phases_are_exactly_those_that_progress_reaches(data: st.DataObject) -> None:
    """Every change lies on a hundredth, so that thousandths miss none."""
    layers = data.draw(st.integers(2, 6))
    first = data.draw(st.integers(0, layers - 1))
    seq_schedule = data.draw(st.just("") | step_lists([16, 32, 48]))
    batch_schedule = data.draw(st.just("") | step_lists([96, 192, 288]))
    config = Config(
        iterations=1000, max_wallclock_seconds=0.0, final_eval="chunked", num_layers=layers,
        num_loops=data.draw(st.integers(0, 3)), loop_start=first, loop_end=data.draw(st.integers(first, layers - 1)),
        enable_looping_at=data.draw(st.integers(0, 99)) / 100, qat_start_frac=data.draw(st.integers(0, 100)) / 100,
        train_seq_len=max((value for value, _ in parse_steps(seq_schedule)), default=32), train_seq_schedule=seq_schedule,
        train_batch_schedule=batch_schedule, train_batch_tokens=max((value for value, _ in parse_steps(batch_schedule)), default=384),
    )  # fmt: skip
    assert validate(config) == []
    schedule = Schedule(config)
    reached = [knobs_at(schedule, step).phase for step in range(1000)]
    assert schedule.phases() == list(dict.fromkeys(reached))
    assert (schedule.scored_phase.order, schedule.scored_phase.qat) == (reached[-1].order, False)
    changes = {step for step, (one, other) in enumerate(itertools.pairwise(reached), 1) if one != other}
    assert all(step % 10 == 0 for step in changes)


# Texts of schedules


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("1024@1", [(1024, 1.0)]),
        ("1024@0.1,2048@0.7,3072@1", [(1024, 0.1), (2048, 0.7), (3072, 1.0)]),
        ("3@1e-3,1@0.5,2@1.0", [(3, 0.001), (1, 0.5), (2, 1.0)]),
    ],
)
def test_steps_are_read(text: str, steps: list[tuple[int, float]]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize(
    "text",
    [
        "1024", "1024@", "@1", "x@1", "1024@x", "1.5@1", "1024@0.5", "1@0.5,2@0.9", "0@1", "-1@1", "1@0.5,0@1", "1@0,2@1", "1@-0.5,2@1", "1@0.5,2@0.5,3@1",
        "1@0.5,2@0.4,3@1", "1@1,2@1", "1@nan", "1@nan,2@1", "1@inf", "1@1.1", "1@0.5,2@1.00000001", "1@1,", ",", " ", "1@0.5@1", "1@0.5;2@1",
    ],
)  # fmt: skip
def test_steps_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_steps(text)


@pytest.mark.parametrize(("text", "fracs"), [("1", [1.0]), ("0.6,1", [0.6, 1.0]), ("1e-9,0.5,1.0", [1e-9, 0.5, 1.0])])
def test_fractions_are_read(text: str, fracs: list[float]) -> None:
    assert parse_fracs(text) == fracs


@pytest.mark.parametrize(
    "text", ["", ",", "x", "0", "-0.5", "0,1", "1.1", "1.00000001", "1,1", "0.5,0.5", "1,0.5", "nan", "0.5,nan", "nan,1", "inf", "0.5,", "0.5", "0.1,0.9"]
)
def test_fractions_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_fracs(text)


# Everything at once


MOMENTS = st.tuples(st.integers(0, 120), st.floats(0, 80), st.floats(0, 10))


@settings(max_examples=100, deadline=None)
@given(
    moment=MOMENTS,
    wallclock=st.sampled_from([0.0, 1e-3, 60.0]),
    decay=st.sampled_from(
        [{}, {"warmdown_iters": 1}, {"warmdown_iters": 500}, {"warmdown_frac": 0.3}, {"warmdown_frac": 1.0}, {"warmdown_frac": 0.2, "warmdown_ends": "0.3,1"}]
    ),
    floor=st.sampled_from([0.0, 0.2, 1.0]),
    start=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_knob_stays_in_its_range_and_depends_on_progress_alone(
    moment: tuple[int, float, float], wallclock: float, decay: dict[str, Any], floor: float, start: float
) -> None:
    changed = {"max_wallclock_seconds": wallclock, "lr_floor_frac": floor, "qat_start_frac": start, "muon_momentum_warmup_steps": 50, **decay}
    changed["weight_decay_taper_frac"] = start
    schedule = schedule_of(**changed)
    progress = schedule.progress(*moment)
    knobs = schedule(progress)
    assert 0 <= progress.frac <= 1
    assert 0 <= progress.remaining_steps <= 100
    assert floor <= knobs.lr_scale <= 1 + 1e-12
    assert 0.85 <= knobs.momentum <= 0.95
    assert knobs.weight_decay_scale in (0.5, 1.0)
    assert knobs.phase in schedule.phases()
    schedule(schedule.progress(7, 3.0, 0.5))
    assert schedule(progress) == knobs == schedule_of(**changed)(progress), "what was asked before does not matter"


@pytest.mark.parametrize("decay", [{"warmdown_iters": 40}, {"warmdown_frac": 0.4}])
def test_rate_never_rises_while_step_and_time_go_on(decay: dict[str, Any]) -> None:
    schedule = schedule_of(max_wallclock_seconds=60.0, lr_floor_frac=0.1, **decay)
    rates = [knobs_at(schedule, step, 0.7 * step, 0.7).lr_scale for step in range(101)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1.0, 0.1)


# Seconds a step


def test_the_pace_of_the_first_steps_is_their_mean() -> None:
    pace, seconds = Pace(0, 0.0), 0.0
    for step in range(1, Pace.MEMORY_STEPS + 1):
        seconds += 1 + math.sin(step)
        assert pace.update(step, seconds) == pytest.approx(seconds / step, rel=1e-12)


def test_the_pace_forgets_how_fast_earlier_steps_were() -> None:
    """After a change from 1 s to 3 s it is 3 - 2 (1 - 1/50)^n, whatever came before; the mean of all steps would go on remembering."""
    pace = Pace(0, 0.0)
    for step in range(1, 501):
        pace.update(step, float(step))
    for step in range(1, 151):
        assert pace.update(500 + step, 500.0 + 3 * step) == pytest.approx(3 - 2 * 0.98**step, rel=1e-9)
    assert pace.step_seconds > 2.9


def test_time_that_passes_before_the_first_step_is_no_step() -> None:
    """As in the training loop, where the clock that comes back first was read before any step."""
    pace = Pace(0, 0.0)
    assert [pace.update(-1, 0.0), pace.update(0, 1e-5)] == [0.0, 0.0]
    assert pace.update(1, 4 + 1e-5) == pytest.approx(4.0)
    assert pace.update(3, 10 + 1e-5) == pytest.approx(3.5), "two steps of 3 s after one of 4 s count as one reading"


def test_a_resumed_run_goes_on_with_the_pace_that_it_had() -> None:
    pace = Pace(100, 50.0)
    assert [pace.update(99, 50.0), pace.update(100, 50.0 + 1e-5)] == [0.5, 0.5]
    assert pace.update(101, 53.0 + 1e-5) == pytest.approx(0.5 + 2.5 / 50), "one slow step moves a pace that fifty steps stand behind by a fiftieth"
