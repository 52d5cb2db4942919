"""The entropy coder, rate control, and QAT: what is stored comes back, fits its budget, and lies on the grid that training simulated."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantisation import ALONE, LENGTH, correlated, follow, random_rows, scaled_gaussian
from torch import Tensor

import train_gpt
from train_gpt import Config, Curvature, Phase, Schedule, Table, weight_parts

# ----------------------------------------------------------------------------------------------------------------------
# The entropy coder


def gaussian_codes(scales: np.ndarray, spacing: int, states: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Returns random codes (their scales in steps) that follow the trellis, and the sum of -log2 of their probabilities."""
    codes, state, bits = np.zeros(scales.shape, np.int16), np.zeros(scales.shape[1], np.int64), 0.0
    table = np.array(train_gpt.NEXT_STATE[states])
    for row, scale in enumerate(scales):
        offset = state % 2 / 2
        symbols = np.floor(rng.normal(size=len(scale)) * scale - offset + 0.5).clip(-16000, 16000)
        low, high = (torch.special.ndtr(torch.from_numpy((symbols + offset + side) / scale)) for side in (-0.5, 0.5))
        bits -= float((high - low).clamp_min(1e-300).log2().sum())
        codes[row] = spacing * symbols + state % 2
        state = table[state, codes[row] // 2 % 2]
    return codes, bits


def code_of(kind: str, rows: int, columns: int, spacing: int, states: int, seed: int) -> np.ndarray:
    """Returns codes of a hard kind that the trellis allows."""
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        return gaussian_codes(np.full((rows, columns), 10.0 ** rng.uniform(-1, 3)), spacing, states, rng)[0]
    largest = train_gpt.RATE_LIMIT // 4 * 4 if spacing == 2 else 127  # the trellis stays in state 0 at multiples of 4
    step = 4 if states > 1 else spacing
    codes = np.zeros((rows, columns), np.int16)
    if kind == "constant rows":
        codes[:] = step * rng.integers(-largest // step, largest // step + 1, rows)[:, None]
    if kind == "outliers":
        where = rng.random((rows, columns)) < 0.1
        codes[where] = rng.choice([-largest, largest], where.sum())
    return codes


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["zero", "constant rows", "outliers", "gaussian"]), layout=st.sampled_from([(1, 1), (2, 1), (2, 8)]),
    rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), vectors=st.booleans(),
)  # fmt: skip
def test_every_matrix_comes_back_as_it_was(kind: str, layout: tuple[int, int], rows: int, columns: int, seed: int, vectors: bool) -> None:
    spacing, states = layout
    codes, rng = code_of(kind, rows, columns, spacing, states, seed), np.random.default_rng(seed)
    exponents = [rng.integers(-250, 251, rows).astype(np.int16), np.full(columns, 77, np.int16)] if vectors else []
    data = train_gpt.encode_matrix(codes, spacing, states, exponents)
    decoded, read_states, sides = train_gpt.decode_matrix(data, (rows, columns), spacing, [len(side) for side in exponents])
    assert decoded.dtype == np.int16 and np.array_equal(decoded, codes) and read_states == states
    assert len(sides) == len(exponents) and all(np.array_equal(*pair) for pair in zip(sides, exponents, strict=True))


def test_the_largest_code_of_rate_can_be_stored() -> None:
    codes = np.array([[train_gpt.RATE_LIMIT, -train_gpt.RATE_LIMIT]], np.int16)
    assert np.array_equal(train_gpt.decode_matrix(train_gpt.encode_matrix(codes, 2, 8), (1, 2), 2)[0], codes)


def test_a_matrix_of_zeros_takes_next_to_nothing() -> None:
    assert 8 * len(train_gpt.encode_matrix(np.zeros((256, 512), np.int16), 2, 8)) < 0.02 * 256 * 512


def adaptive_bits(symbols: np.ndarray) -> float:
    """Returns the length of symbols in the order they come, coded by their counts so far plus 1/2 each (Krichevsky and Trofimov)."""
    counts = torch.from_numpy(np.unique(symbols, return_counts=True)[1]).double()
    size = float(len(counts))
    logs = torch.lgamma(counts + 0.5).sum() - size * math.lgamma(0.5) + math.lgamma(size / 2) - math.lgamma(float(counts.sum()) + size / 2)
    return float(-logs) / math.log(2)


def entropy_bits(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@pytest.mark.parametrize(("shape", "layout"), [((256, 512), (2, 8)), ((512, 256), (1, 1)), ((300, 1200), (2, 1))])
@pytest.mark.parametrize("size", [0.7, 2.0, 12.0])
def test_coded_size_is_that_of_the_true_probabilities(size: float, shape: tuple[int, int], layout: tuple[int, int]) -> None:
    """To 1%, what travels about rows and columns apart; and not above an adaptive code that is given the scale of every weight, but not the shape."""
    spacing, states = layout
    _, scales = scaled_gaussian(*shape)
    scales = size * scales / float(scales.log().mean().exp())
    codes, bits = gaussian_codes(scales.numpy(), spacing, states, np.random.default_rng(0))
    coded = 8 * len(train_gpt.encode_matrix(codes, spacing, states))
    sides = sum(entropy_bits(side) for side in train_gpt.fit_scales(codes, spacing))
    assert bits * 0.999 < coded < 1.01 * bits + sides
    contexts = (4 * scales.log2()).round().numpy() + 1000 * (codes % 2 if spacing == 2 else 0)
    assert coded < 1.01 * sum(adaptive_bits(codes[contexts == context]) for context in np.unique(contexts))


CODED = train_gpt.encode_matrix(
    gaussian_codes(np.full((6, 9), 3.0), 2, 8, np.random.default_rng(0))[0], 2, 8, [np.arange(6, dtype=np.int16), np.arange(9, dtype=np.int16)]
)
HEAD = 15  # states, bound, and three bytes for each of four vectors


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_matrix_is_read_or_refused_and_nothing_else(choice: st.DataObject) -> None:
    data = bytearray(CODED)
    for _ in range(choice.draw(st.integers(1, 3))):
        start = choice.draw(st.integers(0, HEAD) | st.integers(0, len(data)))
        data[start : start + choice.draw(st.integers(0, 4))] = choice.draw(st.binary(max_size=4))
    shape = choice.draw(st.just((6, 9)) | st.tuples(st.integers(1, 30), st.integers(1, 30)))
    try:
        codes, states, exponents = train_gpt.decode_matrix(bytes(data), shape, choice.draw(st.sampled_from([1, 2])), shape)
    except ValueError as error:
        assert "a coded matrix" in str(error)
    else:
        assert codes.shape == shape and states in (1, 8) and [len(side) for side in exponents] == list(shape)


def refused(data: bytes, spacing: int = 2) -> None:
    with pytest.raises(ValueError, match="a coded matrix"):
        train_gpt.decode_matrix(data, (6, 9), spacing, (6, 9))


def test_truncated_and_impossible_matrices_are_refused() -> None:
    """Whole words that are missing read as zeros: the artifact's digest tells that, and not the coder."""
    for length in (*range(HEAD), *(len(CODED) - missing for missing in (1, 2, 3))):
        refused(CODED[:length])
    for states, bound in ((0, 9), (2, 9), (255, 9), (8, 0), (1, 0), (8, 40_000)):
        refused(struct.pack("<BH", states, bound) + CODED[3:])
    refused(CODED, spacing=1)
    refused(CODED[:HEAD] + b"\xff" * 40)  # words that no encoder writes


# ----------------------------------------------------------------------------------------------------------------------
# Rate control


class Notes(train_gpt.Log):
    """Keeps notes."""

    def __init__(self) -> None:
        super().__init__(None)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def sizes(self) -> list[int]:
        """Returns the bytes that each pass reports."""
        return [int(note.split(" bytes, budget")[0].split()[-1].replace(",", "")) for note in self.notes if " bytes, budget" in note]


def run_of(config: Config) -> tuple[train_gpt.Run, Notes]:
    notes = Notes()
    return train_gpt.Run(config, ALONE, notes, Path(), train_gpt.StopSignals(), ""), notes


def made_up(model: train_gpt.GPT, first: int = 0) -> dict[str, Curvature]:
    """Returns curvatures around every weight, correlated on both sides and about as large as those of a trained model."""
    found = {}
    for seed, (name, part) in enumerate(weight_parts(model).items(), first):
        rows, columns = part.weight.shape
        outputs = correlated(rows, seed + 50, 0.5).float() * 1e-3
        found[name] = Curvature(correlated(columns, seed, 0.5).float(), outputs.diagonal() if isinstance(part, Table) else outputs)
    return found


def model_of_100k(scheme: str, **settings: Any) -> tuple[train_gpt.GPT, int]:
    """Returns a model whose rows and columns differ in size as those of trained ones do, and the number of its weights on grids."""
    config = small_config(vocab_size=256, num_layers=3, model_dim=64, quant_scheme=scheme, coder="range", **settings)
    model = lively_model(config, torch.float32)
    with torch.no_grad():
        for seed, part in enumerate(weight_parts(model).values()):
            part.weight.copy_(0.1 * scaled_gaussian(*part.weight.shape, seed=seed)[0])
    weights = sum(part.weight.numel() for part in weight_parts(model).values())
    assert weights > 100_000
    return model, weights


def artifact_of(packed: train_gpt.Packed, model: train_gpt.GPT) -> train_gpt.GPT:
    return train_gpt.read_artifact(packed.data, model.config, "the artifact")


@pytest.fixture(scope="module")
def rated() -> tuple[train_gpt.GPT, int, dict[str, Curvature]]:
    model, weights = model_of_100k("rate")
    return model, weights, made_up(model)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_budget_is_filled_and_never_exceeded(bits: int, rated: tuple[train_gpt.GPT, int, dict[str, Curvature]]) -> None:
    model, weights, curvatures = rated
    budget = weights * bits // 8
    run, notes = run_of(model.config)
    packed = train_gpt.fill_budget(model, curvatures, budget, run)
    assert 0.997 * budget <= len(packed.data) <= budget
    assert len(notes.sizes()) == len(notes.notes) <= 4 and len(packed.data) in notes.sizes()
    restored = artifact_of(packed, model)
    mine, theirs = (torch.cat([part.weight.detach().flatten() for part in weight_parts(each).values()]) for each in (model, restored))
    noise = float((mine - theirs).square().mean() / mine.square().mean())
    assert 0.2 * 4.0**-bits < noise < 4 * 4.0**-bits, "about what so many bits can do"


KEPT = [
    ((9_000, 9_950, 9_400, 10_100, 9_980, 9_990), 9_980),
    ((12_000, 10_500, 11_000) * 2, 10_500),
    ((10_100, 9_000, 8_000) * 2, 9_000),
    ((9_000, *(10_100,) * 5), 9_000),
]


@pytest.mark.parametrize(("sizes", "kept"), KEPT)
def test_of_all_passes_the_largest_that_fits_is_kept_or_else_the_smallest(
    sizes: tuple[int, ...], kept: int, rated: tuple[train_gpt.GPT, int, dict[str, Curvature]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, curvatures = rated
    results = iter(sizes)
    monkeypatch.setattr(train_gpt, "quantise_rate", lambda *_: {})
    monkeypatch.setattr(train_gpt, "pack", lambda *_: train_gpt.Packed(bytes(next(results)), []))
    assert len(train_gpt.fill_budget(model, curvatures, 10_000, run_of(model.config)[0]).data) == kept


def test_a_budget_that_cannot_be_met_gives_the_smallest_artifact_and_says_what_would_fit(rated: tuple[train_gpt.GPT, int, dict[str, Curvature]]) -> None:
    model, weights, curvatures = rated
    budget = 3000
    run, notes = run_of(model.config)
    packed = train_gpt.fill_budget(model, curvatures, budget, run)
    assert len(packed.data) == min(notes.sizes()) > budget
    assert f"{weights:,} weights do not fit {budget:,} bytes" in notes.notes[-1] and f"{int(8 * budget / 1.5):,} would" in notes.notes[-1]
    assert len(packed.data) * 8 < 0.9 * weights, "next to nothing but steps and gains is left"
    assert all(part.weight.count_nonzero() == 0 for part in weight_parts(artifact_of(packed, model)).values())


def test_a_generous_budget_stops_at_the_finest_step_of_use(rated: tuple[train_gpt.GPT, int, dict[str, Curvature]]) -> None:
    model, weights, curvatures = rated
    run, notes = run_of(model.config)
    packed = train_gpt.fill_budget(model, curvatures, 4 * weights, run)
    finest = (24 * train_gpt.FINEST_DIVERGENCE / weights) ** 0.5
    assert train_gpt.artifact_header(packed.data, "")[0]["step"] == pytest.approx(finest, rel=1e-6)
    assert len(packed.data) < weights * 1.2 and len(notes.sizes()) <= 2 and "the finest of use" in notes.notes[-1]


@pytest.mark.parametrize(("scheme", "bits"), [("gptq", 3), ("adaptive", 4)])
def test_clip_factors_are_raised_until_the_budget_is_met(scheme: str, bits: int) -> None:
    model, weights = model_of_100k(scheme)
    budget, curvatures = weights * bits // 8, {name: curvature._replace(outputs=None) for name, curvature in made_up(model).items()}
    run, notes = run_of(model.config)
    packed = train_gpt.fit_clip(model, curvatures, budget, run)
    assert 0.99 * budget <= len(packed.data) <= budget and notes.sizes()[0] > budget
    run, notes = run_of(model.config)
    whole = train_gpt.fit_clip(model, curvatures, 2 * weights, run)
    assert notes.notes == [], "with room enough the clip factors stay"
    stored = train_gpt.pack(model, train_gpt.quantise(model, curvatures, ALONE), 0.0)
    assert whole.data == stored.data


# ----------------------------------------------------------------------------------------------------------------------
# QAT


SCHEMES = ("rowmax", "gptq_lite", "gptq", "adaptive", "rate")


def trained_under_qat(scheme: str, **settings: Any) -> tuple[train_gpt.GPT, Phase, Phase]:
    """Returns a model in the middle of QAT, its grids frozen where the scheme freezes them and its weights moved on, and both phases."""
    config = small_config(**{"num_layers": 2, "quant_scheme": scheme, "coder": "range", "qat_start_frac": 0.5, "matrix_bits": 4, "embed_bits": 5, **settings})
    model = lively_model(config, torch.float32)
    freeze(model)
    with torch.no_grad():
        for part in weight_parts(model).values():
            part.weight.add_(0.05 * torch.randn(part.weight.shape))
    return model, Schedule(config).phase(0.0), Schedule(config).phase(0.9)


def freeze(model: train_gpt.GPT, step: float = float(np.float32(0.02))) -> None:
    """Freezes grids as training does; its global step is a float32."""
    parts, curvatures, grids = weight_parts(model), made_up(model), {}
    if model.config.quant_scheme == "adaptive":
        sigmas = train_gpt.adaptive_sigmas(parts, curvatures)
        grids = {name: train_gpt.sdclip_grid(part.weight, part.bits, sigmas[name]) for name, part in parts.items()}
    if model.config.quant_scheme == "rate":
        grids = {name: train_gpt.allocate(curvatures[name]).reaching(part.weight, step).grid(step) for name, part in parts.items()}
        model.rate_step.fill_(step)
    for name, grid in grids.items():
        parts[name].freeze(grid)
        assert parts[name].grid()[2:] == grid[2:] and torch.equal(parts[name].grid().step, grid.step.expand(parts[name].weight.shape))


def losses_of(forward: Any, phase: Phase) -> Tensor:
    rows = random_rows(2)
    with torch.no_grad():
        return forward(rows[:, :-1], rows[:, 1:], phase)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_compiled_output_changes_when_qat_turns_on_and_when_grids_are_frozen_anew(scheme: str) -> None:
    """A table and an MLP, because to compile a whole model takes long; test_features.py does."""
    torch._dynamo.reset()
    model, plain, qat = trained_under_qat(scheme)
    table, mlp, tokens = model.embedding.table, model.blocks[0].mlp, torch.arange(24)
    scale = torch.ones(model.config.model_dim)
    compiled = torch.compile(lambda phase: mlp(table(tokens, phase, torch.float32), phase, None, scale), fullgraph=True, dynamic=False, backend="eager")
    before, after = compiled(plain), compiled(qat)
    x = table.weight[tokens]
    torch.testing.assert_close(before, (x @ mlp.up.weight.T).relu().square() @ mlp.down.weight.T, rtol=0, atol=1e-5)
    x, up, down = (part.grid().dequantise(part.grid().round(part.weight)) for part in (table, mlp.up, mlp.down))
    torch.testing.assert_close(after, (x @ up.T).relu().square() @ down.T, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    frozen = scheme in train_gpt.FROZEN_SCHEMES
    assert all(part.is_frozen() == frozen for part in weight_parts(model).values())
    if frozen:
        for part in (table, mlp.up, mlp.down):
            part.freeze(part.grid()._replace(row_step=2 * part.row_step))
        assert (compiled(qat) - after).abs().max() > 1e-3 and torch.equal(compiled(plain), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_frozen_grids_stay_while_weights_move(scheme: str) -> None:
    model, _, _ = trained_under_qat(scheme)
    part = model.blocks[0].mlp.up
    before = part.grid().step.clone()
    with torch.no_grad():
        part.weight.mul_(3)
    assert torch.equal(part.grid().step, before) == (scheme in train_gpt.FROZEN_SCHEMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_noise_of_qat_reaches_looped_layers_alone(scheme: str) -> None:
    """Layer 1 of three runs twice. The noise is uniform, so its deviation is its width over the root of 12."""
    model, plain, qat = trained_under_qat(scheme, num_layers=3, num_loops=1, loop_start=1, loop_end=1, qat_loop_noise=0.5)
    once = Phase((0, 1, 2), LENGTH, qat=True)
    for name, part in weight_parts(model).items():
        grid = part.grid()
        points, width = grid.fake(part.weight).detach(), 0.5 * grid.spacing * grid.step.expand(part.weight.shape)
        noise = (part.stored(qat).detach() - points) / width
        if name.startswith("blocks.1."):
            assert noise.abs().max() <= 0.501 and float(noise.std()) == pytest.approx(12**-0.5, rel=0.1) and abs(float(noise.mean())) < 0.06
        else:
            assert noise.count_nonzero() == 0
        assert torch.equal(part.stored(once), points) and torch.equal(part.stored(plain), part.weight)


def test_noise_of_qat_is_off_by_default() -> None:
    model, _, qat = trained_under_qat("rowmax", num_layers=3, num_loops=1, loop_start=1, loop_end=1)
    assert Config.qat_loop_noise == 0 and torch.equal(losses_of(model, qat), losses_of(model, qat))
    noisy, _, qat = trained_under_qat("rowmax", num_layers=3, num_loops=1, loop_start=1, loop_end=1, qat_loop_noise=0.5)
    assert not torch.equal(losses_of(noisy, qat), losses_of(noisy, qat))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_that_is_stored_lies_on_the_grid_that_training_simulated(scheme: str) -> None:
    """Bit for bit: `rate` at the frozen global step, on half steps that follow the trellis."""
    model, _, qat = trained_under_qat(scheme)
    parts, curvatures = weight_parts(model), made_up(model, 9)
    if scheme == "rate":
        planned = train_gpt.plan_rate(model, curvatures, 1000)
        assert planned.step == model.frozen_step == float(np.float32(0.02))
        stored = train_gpt.quantise_rate(model, planned.allocations, planned.step, ALONE)
    else:
        stored = train_gpt.quantise(model, curvatures, ALONE)
    packed = train_gpt.pack(model, stored, model.frozen_step)
    restored = weight_parts(artifact_of(packed, model))
    assert set(stored) == set(parts)
    for name, part in parts.items():
        entry, grid = stored[name], part.grid()
        assert torch.equal(entry.grid.row_step, grid.row_step) and torch.equal(entry.grid.column_step.expand_as(grid.column_step), grid.column_step)
        if scheme in train_gpt.FROZEN_SCHEMES:
            assert torch.equal(grid.row_step, part.row_step) and torch.equal(grid.column_step, part.column_step)
        assert np.abs(entry.codes).max() <= grid.limit and (grid.limit, grid.spacing) == (entry.grid.limit, entry.grid.spacing)
        assert torch.equal(restored[name].weight, torch.from_numpy(entry.codes).float() * grid.step)
        if scheme in ("rowmax", "gptq_lite"):
            torch.testing.assert_close(restored[name].weight, part.stored(qat), rtol=0, atol=1e-6)
        if scheme == "rate":
            assert np.array_equal(entry.codes % 2, follow(entry.codes, train_gpt.NEXT_STATE[8]) % 2)


@pytest.fixture(scope="module")
def frozen() -> tuple[train_gpt.GPT, dict[str, Curvature], dict[str, np.ndarray], int]:
    """A model on frozen steps, curvatures, its nearest codes, and the bytes that those take."""
    model, _ = model_of_100k("rate", qat_start_frac=0.5)
    freeze(model, float(np.float32(0.001)))
    curvatures, (run, notes) = made_up(model, 9), run_of(model.config)
    packed = train_gpt.fill_budget(model, curvatures, 10**6, run)
    restored, nearest = weight_parts(artifact_of(packed, model)), {}
    for name, part in weight_parts(model).items():
        nearest[name] = part.grid().round(part.weight.detach()).numpy()
        assert torch.equal(restored[name].weight, torch.from_numpy(nearest[name]) * part.grid().step), "what training simulated, bit for bit"
    assert len(notes.notes) == 1
    return model, curvatures, nearest, len(packed.data)


def test_a_model_on_frozen_steps_stays_on_them_and_gives_up_what_is_near_the_middle(
    frozen: tuple[train_gpt.GPT, dict[str, Curvature], dict[str, np.ndarray], int],
) -> None:
    model, curvatures, nearest, size = frozen
    budget, (run, notes) = int(0.99 * size), run_of(model.config)
    packed = train_gpt.fill_budget(model, curvatures, budget, run)
    assert 0.997 * budget <= len(packed.data) <= budget and len(notes.notes) <= 5
    moved, stayed = [], []
    for name, part in weight_parts(artifact_of(packed, model)).items():
        source = weight_parts(model)[name]
        step, spacing = source.grid().step, source.grid().spacing
        codes, sign = (part.weight.detach() / step).round().numpy(), np.sign(nearest[name])
        assert torch.equal(torch.from_numpy(codes) * step, part.weight)
        down = codes != nearest[name]
        assert np.array_equal(codes[down], (nearest[name] - spacing * sign)[down]), "by one step, towards zero"
        beyond = (source.weight.detach() / step).abs().numpy() / spacing - np.abs(nearest[name]) / spacing + 0.5  # of the middle, in steps
        moved.append(beyond[down])
        stayed.append(beyond[~down & (sign != 0)])
    assert 0 < np.concatenate(moved).max() < np.concatenate(stayed).min() + 1e-4 < 0.3


def test_where_frozen_steps_do_not_fit_their_ratios_are_kept(frozen: tuple[train_gpt.GPT, dict[str, Curvature], dict[str, np.ndarray], int]) -> None:
    model, curvatures, _, size = frozen
    budget = int(0.6 * size)
    packed = train_gpt.fill_budget(model, curvatures, budget, run_of(model.config)[0])
    ratio = train_gpt.artifact_header(packed.data, "")[0]["step"] / model.frozen_step
    assert 0.997 * budget <= len(packed.data) <= budget and ratio > 1.2
    for name, part in weight_parts(artifact_of(packed, model)).items():
        codes = part.weight.double() / (weight_parts(model)[name].grid().step.double() * ratio)
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.round().abs().max() > 1


@pytest.mark.parametrize("bias", [0.0, 0.1, 0.3])
def test_rounding_towards_zero_moves_the_middle_between_points(bias: float) -> None:
    grid = train_gpt.Grid(torch.tensor([[0.25]]), torch.ones(1, 1), 8, 2)
    weight = torch.linspace(-5, 5, 2001)[None]
    expected = [min(2 * math.floor(abs(w) / 0.5 + 0.5 - bias), 8) * (1 if w > 0 else -1) for w in weight[0].double().tolist()]
    edges = ((weight / 0.5).abs() + 0.5 - bias) % 1
    clear = (edges > 1e-4) & (edges < 1 - 1e-4)
    assert torch.equal(grid.round_towards_zero(weight, bias)[clear], torch.tensor([expected], dtype=torch.float32)[clear])
