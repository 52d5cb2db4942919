"""Muon and Adam against plain references, what a step promises (clipping, bad steps, resume), and one rank against two."""

from __future__ import annotations

import gc
import itertools
import math
import os
import socket
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import lively_model, small_config, tiny_arguments
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from train_gpt import AdamGroup, Averages, Config, Knobs, MuonGroup, Optimizer, Phase, RoleRule, Schedule, TrainingState, World, orthogonalise

ALONE = World("cpu")
OK = torch.ones((), dtype=torch.float64)
BETA1 = Config.beta1


def knobs(lr_scale: float = 1.0, momentum: float = 0.9, weight_decay_scale: float = 1.0) -> Knobs:
    return Knobs(Phase((0,), 16), lr_scale, momentum, weight_decay_scale)


# Orthogonalisation


def well_conditioned(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A Gaussian matrix (rows, columns) in float64 whose singular values are replaced by 1 to 20."""
    gaussian = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, values, right = torch.linalg.svd(gaussian, full_matrices=False)
    return left @ torch.diag(torch.linspace(20, 1, len(values), dtype=torch.float64)) @ right


def by_singular_values(matrix: Tensor, steps: int, coefficients: str) -> Tensor:
    """What `orthogonalise` computes, from the singular value decomposition: the same polynomials on the singular values alone."""
    safety, polynomials = train_gpt.POLYNOMIALS[coefficients]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (matrix.norm() * safety + 1e-7)
    for a, b, c in polynomials[:steps]:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


SHAPES = {"wide": (24, 60), "tall": (60, 24), "square": (40, 40)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("coefficients", ["polar_express", "classic"])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_orthogonalise_maps_singular_values_and_keeps_singular_vectors(steps: int, coefficients: str, shape: tuple[int, int]) -> None:
    matrix = well_conditioned(*shape)
    expected = by_singular_values(matrix, steps, coefficients)
    torch.testing.assert_close(orthogonalise(matrix[None], steps, coefficients)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("coefficients", "low", "high"), [("polar_express", 0.8588, 1.1412), ("classic", 0.6818, 1.1344)])
def test_five_steps_come_close_to_the_polar_factor(coefficients: str, low: float, high: float, shape: tuple[int, int]) -> None:
    """The bands are what the polynomials give on the singular values of well-conditioned matrices (0.03 to 0.9 of the norm)."""
    matrix = well_conditioned(*shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix[None], 5, coefficients)[0]
    singular = torch.linalg.svdvals(result)
    assert singular.min() >= low
    assert singular.max() <= high
    polar = left @ right
    assert torch.linalg.matrix_norm(result - polar, ord=2) <= max(1 - low, high - 1) + 1e-4


def test_polar_express_brings_small_singular_values_up() -> None:
    """Minimax on [0.001, 1]: from a thousandth of the norm upwards all values end in one band; the classic polynomials take longer."""
    matrix = torch.diag(torch.tensor([1.0, 0.1, 0.01, 0.0012], dtype=torch.float64))[None]
    assert torch.linalg.svdvals(orthogonalise(matrix, 5, "polar_express")).min() > 0.858
    assert torch.linalg.svdvals(orthogonalise(matrix, 5, "classic")).min() < 0.6


@pytest.mark.parametrize("coefficients", ["polar_express", "classic"])
def test_orthogonalise_of_zero_is_zero_and_does_not_disturb_its_batch(coefficients: str) -> None:
    matrices = torch.stack([well_conditioned(24, 60, seed=1), torch.zeros(24, 60, dtype=torch.float64), 1e3 * well_conditioned(24, 60, seed=2)])
    batch = orthogonalise(matrices, 5, coefficients)
    assert torch.equal(batch[1], torch.zeros_like(batch[1]))
    for matrix, result in zip(matrices, batch, strict=True):
        torch.testing.assert_close(result, orthogonalise(matrix[None], 5, coefficients)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("scale", "tolerance"), [(-1.0, 0.0), (1e6, 1e-8), (1e-3, 1e-5)])
def test_orthogonalise_does_not_depend_on_scale(scale: float, tolerance: float) -> None:
    """But for the 1e-7 that protects zero gradients, which shows a little in the smallest of these, of norm 0.06."""
    matrix = well_conditioned(24, 60)[None]
    expected = math.copysign(1.0, scale) * orthogonalise(matrix, 5, "polar_express")
    torch.testing.assert_close(orthogonalise(scale * matrix, 5, "polar_express"), expected, rtol=0, atol=tolerance)


# Any spectrum, both forms of the iteration


def decaying(exponent: float) -> Callable[[int, int], Tensor]:
    """A function that makes a matrix whose k-th singular value is k^-exponent."""

    def make_matrix(rows: int, columns: int) -> Tensor:
        left, values, right = torch.linalg.svd(gaussian(rows, columns), full_matrices=False)
        return left * torch.arange(1, len(values) + 1, dtype=torch.float64) ** -exponent @ right

    return make_matrix


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns), dtype=torch.float64)


def rank_4(rows: int, columns: int) -> Tensor:
    return gaussian(rows, 4) @ gaussian(4, columns)


# Name -> how it is made, and how far apart the two forms may be in float32, in Frobenius norm. The Gram matrix has an error of 6e-8 of its
# largest value, which is all there is of the directions whose singular values are under 3e-4 of the largest; the factor there is up to 990,
# and enters squared. Without such directions: measured 3.1e-5 at most, with them 3.0e-3. In between, direction k of the first-power spectrum has
# an error of k^2 such roundings, 6e-5 over all 48 in norm; measured 1.0e-4 at most, and five roundings are allowed, as the libraries' sums differ.
SPECTRA: dict[str, tuple[Callable[[int, int], Tensor], float]] = {
    "gaussian": (gaussian, 1e-4), "root": (decaying(0.5), 1e-4), "first_power": (decaying(1), 3e-4),
    "square": (decaying(2), 1e-2), "fourth_power": (decaying(4), 1e-2), "rank_4": (rank_4, 1e-2),
}  # fmt: skip
ASPECTS = {"square": (48, 48), "plain_wide": (48, 64), "plain_tall": (64, 48), "gram_edge": (48, 72), "gram_wide": (48, 160), "gram_tall": (160, 48)}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
every_aspect = pytest.mark.parametrize("shape", ASPECTS.values(), ids=ASPECTS)
PLAIN_FORM, GRAM_FORM = math.inf, 1.0


def upper_bound(steps: int) -> float:
    """The largest value that the polynomials reach from any singular value that the scaled input can have."""
    safety, polynomials = train_gpt.POLYNOMIALS["polar_express"]
    values = torch.linspace(0, 1 / safety, 1_000_001, dtype=torch.float64)
    for a, b, c in polynomials[:steps]:
        values = a * values + b * values**3 + c * values**5
    return float(values.max())


@every_aspect
@every_spectrum
@pytest.mark.parametrize("steps", [4, 5])
def test_no_input_goes_over_the_bound_of_the_polynomials_and_all_keep_their_singular_vectors(steps: int, spectrum: str, shape: tuple[int, int]) -> None:
    """To 1e-10: float64 rounds the Gram matrix to 1e-16, and small singular values are multiplied by up to 990, in the Gram form squared."""
    matrix = SPECTRA[spectrum][0](*shape)
    result = orthogonalise(matrix[None], steps, "polar_express")[0]
    assert torch.linalg.svdvals(result).max() <= upper_bound(steps) + 1e-10
    torch.testing.assert_close(result, by_singular_values(matrix, steps, "polar_express"), rtol=0, atol=1e-10)


def test_the_bounds_are_those_that_the_other_tests_name() -> None:
    assert [round(upper_bound(steps), 4) for steps in (4, 5)] == [1.5755, 1.1411]


@every_aspect
@pytest.mark.parametrize(("steps", "low", "high"), [(5, 0.855, 1.145), (4, 0.42, 1.58)])
def test_a_gaussian_matrix_comes_as_close_to_its_polar_factor_as_the_steps_allow(steps: int, low: float, high: float, shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix[None], steps, "polar_express")[0]
    singular = torch.linalg.svdvals(result)
    assert low <= singular.min() and singular.max() <= high
    assert torch.linalg.matrix_norm(result - left @ right, ord=2) <= max(1 - low, high - 1)


def in_form(monkeypatch: pytest.MonkeyPatch, form: float, matrices: Tensor, steps: int = 5) -> Tensor:
    """What `orthogonalise` returns where it is made to take one form, whatever the shape."""
    monkeypatch.setattr(train_gpt, "GRAM_ASPECT", form)
    return orthogonalise(matrices, steps, "polar_express")


@every_aspect
@every_spectrum
def test_both_forms_of_the_iteration_agree(monkeypatch: pytest.MonkeyPatch, spectrum: str, shape: tuple[int, int]) -> None:
    make_matrix, float32_tolerance = SPECTRA[spectrum]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, float32_tolerance)):
        matrices = make_matrix(*shape)[None].to(dtype)
        plain, gram = (in_form(monkeypatch, form, matrices) for form in (PLAIN_FORM, GRAM_FORM))
        assert gram.dtype == dtype
        assert 0 < (gram - plain).norm() <= tolerance * plain.norm()


@every_spectrum
@pytest.mark.parametrize("shape", [(48, 160), (160, 48)], ids=["wide", "tall"])
def test_bfloat16_input_as_on_a_gpu_stays_bounded(spectrum: str, shape: tuple[int, int]) -> None:
    """1.1411 in exact arithmetic, and what rounding the factor to bfloat16 adds: up to 2^-9 of each entry, and again when it has been applied.

    Measured 1.76 and 1.90 at most (fourth power) on two kinds of processor; the worst that rounding could do is computed for each matrix.
    """
    matrices = SPECTRA[spectrum][0](*shape)[None].bfloat16()
    result = orthogonalise(matrices, 5, "polar_express")
    assert result.dtype == torch.bfloat16
    x = matrices.transpose(1, 2) if shape[0] > shape[1] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
    factor = train_gpt.gram_factor(x.double() @ x.double().mT, train_gpt.POLYNOMIALS["polar_express"][1])
    rounding = 2**-9 * (torch.linalg.matrix_norm(factor.abs(), ord=2) + result.double().norm())
    largest = torch.linalg.svdvals(result.double()).max()
    assert largest <= upper_bound(5) + rounding.item() + 1e-2  # float32 in the Gram form, as above
    assert largest < 2.5


@pytest.mark.parametrize("spectrum", ["square", "fourth_power", "rank_4"])
def test_the_gram_iteration_in_bfloat16_would_explode(spectrum: str) -> None:
    """Why the Gram matrix is kept in float32: the same iteration from the same bfloat16 input, with the Gram matrix in either type."""
    x = SPECTRA[spectrum][0](48, 160)[None].bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
    polynomials = train_gpt.POLYNOMIALS["polar_express"][1]
    largest = [
        torch.linalg.svdvals((train_gpt.gram_factor(kept @ kept.mT, polynomials).to(x.dtype) @ x).double()).max() for kept in (x.float(), x)
    ]  # fmt: skip
    assert largest[0] < 2.5  # measured 1.76 and 1.94 on two kinds of processor
    assert largest[1] > 1e6


def flops(shape: tuple[int, int], steps: int = 5) -> int:
    """Floating-point operations of `orthogonalise`, counted by PyTorch without doing them."""
    with FlopCounterMode(display=False) as counter:
        orthogonalise(torch.empty(1, *shape, device="meta"), steps, "polar_express")
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(2048, 512), (512, 2048)])
@pytest.mark.parametrize("steps", [4, 5])
def test_the_gram_form_needs_a_fifth_fewer_operations_on_long_matrices(monkeypatch: pytest.MonkeyPatch, steps: int, shape: tuple[int, int]) -> None:
    """A plain step costs two products with the matrix and one of its Gram matrix, 2 * 512^2 * (2 * 2048 + 512) operations."""
    ours = flops(shape, steps)
    monkeypatch.setattr(train_gpt, "GRAM_ASPECT", PLAIN_FORM)
    assert flops(shape, steps) == steps * 2 * 512**2 * (2 * 2048 + 512)
    assert ours <= 0.8 * flops(shape, steps)


@pytest.mark.parametrize(("short", "long", "form"), [(64, 64, PLAIN_FORM), (64, 95, PLAIN_FORM), (64, 96, GRAM_FORM), (64, 97, GRAM_FORM)])
@pytest.mark.parametrize("tall", [False, True])
def test_the_form_is_chosen_by_the_ratio_of_the_sides_and_is_never_the_dearer_one(
    monkeypatch: pytest.MonkeyPatch, tall: bool, short: int, long: int, form: float
) -> None:
    shape = (long, short) if tall else (short, long)
    real, calls = train_gpt.gram_factor, []
    monkeypatch.setattr(train_gpt, "gram_factor", lambda *args: calls.append(args) or real(*args))
    ours = flops(shape)
    assert bool(calls) == (form == GRAM_FORM)
    for forced in (PLAIN_FORM, GRAM_FORM):
        monkeypatch.setattr(train_gpt, "GRAM_ASPECT", forced)
        assert ours <= flops(shape)


# Groups against references


def group_of(kind: type, shapes: list[tuple[int, ...]], rule: RoleRule, **settings: Any) -> tuple[Any, list[nn.Parameter]]:
    """A group of random float64 parameters, and those parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    return kind([f"p{index}" for index in range(len(shapes))], parameters, rule, small_config(**settings), ALONE), parameters


def apply_gradients(group: MuonGroup | AdamGroup, gradients: list[Tensor], step_knobs: Knobs) -> None:
    for parameter, gradient in zip(group.parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    (update,) = train_gpt.update_groups([group], [group.reduce()()], OK, OK, [group.numbers(step_knobs)])
    train_gpt.move([group.send(update, OK, step_knobs)()])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam_group_equals_torch_adamw(weight_decay: float) -> None:
    shapes = [(5, 7), (3,), ()]
    group, ours = group_of(AdamGroup, shapes, RoleRule("adam", 0.02, weight_decay, 16), beta1=0.8, beta2=0.97, adam_eps=1e-3)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    adamw = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.97), eps=1e-3, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        lr_scale = 1 - step / 40
        gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        adamw.param_groups[0]["lr"] = 0.02 * lr_scale
        adamw.step()
        apply_gradients(group, gradients, knobs(lr_scale))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-10)


MUON_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"muon_row_normalize": True},
    "normuon": {"normuon_beta2": 0.9},
    "cautious": {"cautious_weight_decay": True},
    "all": {"muon_row_normalize": True, "normuon_beta2": 0.7, "cautious_weight_decay": True},
}


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("options", MUON_OPTIONS.values(), ids=MUON_OPTIONS)
def test_muon_group_equals_a_reference_that_takes_one_matrix_at_a_time(options: dict[str, Any], weight_decay: float, shape: tuple[int, int]) -> None:
    """Nesterov momentum, rows at equal norm, orthogonalised by singular values, NorMuon, times sqrt(max(1, rows / columns)), decoupled weight decay."""
    group, ours = group_of(MuonGroup, [shape] * 3, RoleRule("muon", 0.05, weight_decay, 8), muon_backend_steps=4, **options)
    weights = [parameter.detach().clone() for parameter in ours]
    buffers = [torch.zeros(shape, dtype=torch.float64) for _ in ours]
    squares = [torch.zeros(shape[0], dtype=torch.float64) for _ in ours]
    for step in range(5):
        gradients = [well_conditioned(*shape, seed=10 * step + index) for index in range(3)]
        lr_scale, momentum = 1 - step / 10, 0.8 + step / 50
        for index, gradient in enumerate(gradients):
            buffers[index] = momentum * buffers[index] + gradient
            nesterov = gradient + momentum * buffers[index]
            if "muon_row_normalize" in options:
                nesterov = torch.stack([row / row.norm() for row in nesterov])
            update = by_singular_values(nesterov, 4, "polar_express")
            if "normuon_beta2" in options:
                beta2 = options["normuon_beta2"]
                squares[index] = beta2 * squares[index] + (1 - beta2) * torch.stack([row.square().mean() for row in update])
                evened = torch.stack([row / square.sqrt() for row, square in zip(update, squares[index], strict=True)])
                update = evened * update.norm() / evened.norm()
            update = update * max(1, shape[0] / shape[1]) ** 0.5
            decayed = 0.05 * lr_scale * weight_decay * weights[index]
            if "cautious_weight_decay" in options:
                decayed[weights[index].sign() != update.sign()] = 0
            weights[index] = weights[index] - decayed - 0.05 * lr_scale * update
        apply_gradients(group, gradients, knobs(lr_scale, momentum))
    # NorMuon adds 1e-8 to roots of about 0.2: 5e-8 of it, nearly the same in every row, so that the norm takes it away again.
    tolerance = 1e-8 if "normuon_beta2" in options else 1e-11
    for our, expected in zip(ours, weights, strict=True):
        torch.testing.assert_close(our.data, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)], ids=["wide", "tall"])
def test_with_row_normalisation_the_size_of_a_row_of_the_gradient_does_not_matter(shape: tuple[int, int]) -> None:
    group, _ = group_of(MuonGroup, [shape], RoleRule("muon", 0.05, 0.0, 8), muon_row_normalize=True)
    plain, _ = group_of(MuonGroup, [shape], RoleRule("muon", 0.05, 0.0, 8))
    matrices = well_conditioned(*shape)[None]
    resized = matrices * torch.logspace(-2, 2, shape[0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(group.direction(resized), group.direction(matrices), rtol=0, atol=1e-12)
    assert (plain.direction(resized) - plain.direction(matrices)).norm() > 0.1
    resized[0, 3] = 0
    assert group.direction(resized).isfinite().all() and (group.direction(resized)[0, 3] == 0).all()


def test_normuon_keeps_the_norm_of_each_matrix_and_makes_its_rows_more_equal() -> None:
    settings: dict[str, Any] = {"rule": RoleRule("muon", 1.0, 0.0, 8), "shapes": [(30, 10)] * 2}
    moved = {}
    for beta2 in (0.0, 0.9):
        group, parameters = group_of(MuonGroup, **settings, normuon_beta2=beta2)
        for seed in range(6):
            before = [parameter.detach().clone() for parameter in parameters]
            rows = torch.linspace(0.1, 2, 30, dtype=torch.float64)[:, None]
            apply_gradients(group, [rows * well_conditioned(30, 10, seed=2 * seed + index) for index in range(2)], knobs())
        moved[beta2] = torch.stack([old - new.data for old, new in zip(before, parameters, strict=True)])
    torch.testing.assert_close(moved[0.9].norm(dim=(1, 2)), moved[0.0].norm(dim=(1, 2)), rtol=1e-12, atol=0)
    spread = {beta2: (rows.std(dim=1) / rows.mean(dim=1)).max() for beta2, rows in ((beta2, moved[beta2].norm(dim=2)) for beta2 in moved)}
    assert spread[0.9] < 0.5 * spread[0.0]


def test_normuon_of_a_zero_gradient_moves_nothing() -> None:
    group, parameters = group_of(MuonGroup, [(6, 4)] * 2, RoleRule("muon", 0.1, 0.0, 8), normuon_beta2=0.9, muon_row_normalize=True)
    before = [parameter.detach().clone() for parameter in parameters]
    apply_gradients(group, [torch.zeros(6, 4, dtype=torch.float64)] * 2, knobs())
    torch.testing.assert_close([parameter.data for parameter in parameters], before, rtol=0, atol=0)


class Rank(World):
    """One of several ranks, without the others: enough for what a group does on its own."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__("cpu")
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_the_state_of_muon_is_shared_out_over_any_number_of_ranks(size: int) -> None:
    """Three ranks hold two, two and one of five matrices; of eight ranks three hold none."""
    settings = small_config(normuon_beta2=0.9)
    rule = RoleRule("muon", 0.1, 0.0, 8)
    group, parameters = group_of(MuonGroup, [(6, 4)] * 5, rule, normuon_beta2=0.9)
    apply_gradients(group, [well_conditioned(6, 4, seed=seed) for seed in range(5)], knobs())
    saved = group.state_dict()
    assert all(set(state) == {"momentum", "row_squares"} and (state["row_squares"] > 0).all() for state in saved.values())
    ranks = [MuonGroup(group.names, parameters, rule, settings, Rank(rank, size)) for rank in range(size)]
    for each in ranks:
        each.state["momentum"].fill_(7.0)
        each.state["row_squares"].fill_(7.0)
        each.load_state_dict(saved)
    for key in ("momentum", "row_squares"):
        together = torch.cat([each.state[key] for each in ranks])
        torch.testing.assert_close(list(together[:5]), [state[key] for state in saved.values()], rtol=0, atol=0)
        assert (together[5:] == 0).all(), "what fills up the last share"


@pytest.mark.parametrize(("kind", "role"), [(MuonGroup, "muon"), (AdamGroup, "adam")])
def test_weight_decay_is_decoupled_and_scaled_by_the_learning_rate(kind: type, role: str) -> None:
    """With zero gradients weights shrink by 1 - rate * decay a step, and with others the moments do not hear of it."""
    group, parameters = group_of(kind, [(4, 6)], RoleRule(role, 0.1, 0.5, 8))
    start = parameters[0].detach().clone()
    for _ in range(3):
        apply_gradients(group, [torch.zeros(4, 6, dtype=torch.float64)], knobs(0.5))
    torch.testing.assert_close(parameters[0].data, start * (1 - 0.1 * 0.5 * 0.5) ** 3, rtol=1e-14, atol=0)
    decayed, plain = (group_of(kind, [(4, 6)], RoleRule(role, 0.1, decay, 8)) for decay in (0.5, 0.0))
    for step in range(3):
        for each, _ in (decayed, plain):
            apply_gradients(each, [well_conditioned(4, 6, seed=step)], knobs())
    torch.testing.assert_close(decayed[0].state_dict(), plain[0].state_dict(), rtol=0, atol=0)
    assert not torch.equal(decayed[1][0], plain[1][0])


@pytest.mark.parametrize(("kind", "role"), [(MuonGroup, "muon"), (AdamGroup, "adam")])
def test_cautious_decay_touches_only_weights_that_the_update_makes_smaller(kind: type, role: str) -> None:
    rate, decay = 0.1 * 0.5, 0.3
    runs = {}
    for name, weight_decay, cautious in (("none", 0.0, True), ("cautious", decay, True), ("all", decay, False)):
        group, parameters = group_of(kind, [(8, 20), (8, 20)], RoleRule(role, 0.1, weight_decay, 8), cautious_weight_decay=cautious)
        before = [parameter.detach().clone() for parameter in parameters]
        apply_gradients(group, [well_conditioned(8, 20, seed=seed) for seed in (5, 6)], knobs(0.5))
        runs[name] = [parameter.detach().clone() for parameter in parameters]
    for start, none, cautious_end, decayed in zip(before, *runs.values(), strict=True):
        smaller = (start - none).sign() == start.sign()
        assert 0.2 < smaller.double().mean() < 0.8
        torch.testing.assert_close(none - cautious_end, torch.where(smaller, rate * decay * start, 0.0), rtol=0, atol=1e-15)
        assert torch.equal(none[~smaller], cautious_end[~smaller])
        torch.testing.assert_close(none - decayed, rate * decay * start, rtol=0, atol=1e-15)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize(("kind", "role"), [(MuonGroup, "muon"), (AdamGroup, "adam")])
def test_the_taper_multiplies_weight_decay_and_nothing_else(kind: type, role: str, cautious: bool) -> None:
    def after(weight_decay: float, weight_decay_scale: float) -> Tensor:
        group, parameters = group_of(kind, [(4, 6)], RoleRule(role, 0.1, weight_decay, 8), cautious_weight_decay=cautious)
        for seed in range(2):
            apply_gradients(group, [well_conditioned(4, 6, seed=seed)], knobs(0.5, weight_decay_scale=weight_decay_scale))
        return parameters[0].detach().clone()

    torch.testing.assert_close(after(0.4, 0.25), after(0.1, 1.0), rtol=0, atol=0)
    torch.testing.assert_close(after(0.4, 0.0), after(0.0, 1.0), rtol=0, atol=0)
    assert not torch.equal(after(0.4, 0.25), after(0.4, 1.0))


@pytest.mark.parametrize(
    ("setting", "roles"),
    [
        ("muon_weight_decay", {"attention", "mlp", "matrix"}),
        ("embed_weight_decay", {"embed", "table", "head"}),
        ("scalar_weight_decay", {"gain"}),
    ],
)
def test_each_weight_decay_reaches_its_roles_and_no_others(setting: str, roles: set[str]) -> None:
    """With zero gradients a weight shrinks by 1 - rate * decay a step."""
    rates = {"embed": 0.5, "table": 0.4, "head": 0.3, "attention": 0.2, "mlp": 0.2, "matrix": 0.2, "gain": 0.1}
    config = small_config(
        tie_embeddings=False, bigram_hash_buckets=8, bigram_hash_dim=4, value_embed_layers="1", value_embed_dim=4, **{setting: 0.7},
        embed_lr=rates["embed"], tied_embed_lr=rates["table"], head_lr=rates["head"], matrix_lr=rates["matrix"], scalar_lr=rates["gain"],
    )  # fmt: skip
    model, optimizer = make(config)
    before = weights_of(model)
    leave_gradients(model, scale=0.0)
    optimizer.step(LOSS, knobs(0.5))
    of_model = train_gpt.parameter_roles(model)
    assert {role.value for role in of_model.values()} == set(rates)
    for name, role in of_model.items():
        shrunk = 1 - 0.5 * rates[role.value] * 0.7 if role.value in roles else 1.0
        torch.testing.assert_close(model.get_parameter(name).data, before[name] * shrunk, rtol=1e-14, atol=0)


# The optimiser of a model


def make(config: Config, dtype: torch.dtype = torch.float64) -> tuple[train_gpt.GPT, Optimizer]:
    model = lively_model(config, dtype)
    return model, Optimizer(model, config, ALONE)


def leave_gradients(model: train_gpt.GPT, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Puts random gradients on every parameter, as backward would, and returns their norm."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return torch.stack([parameter.grad.square().sum() for parameter in model.parameters()]).sum().sqrt()


def weights_of(model: train_gpt.GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def applied_gradients(optimizer: Optimizer) -> dict[str, Tensor]:
    """The gradients that the first step applied, read off its moments."""
    return {name: state["momentum"] if "momentum" in state else state["first"] / (1 - BETA1) for name, state in optimizer.state_dict().items()}


LOSS = torch.tensor(3.0, dtype=torch.float64)
# Everything that a step can do to a gradient. One is well below the norm of the gradients in these tests.
EVERYTHING: dict[str, Any] = {
    "muon_row_normalize": True, "normuon_beta2": 0.9, "cautious_weight_decay": True, "grad_clip_norm": 1.0,
    "muon_weight_decay": 0.1, "embed_weight_decay": 0.2, "scalar_weight_decay": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_one_group_of_its_kind(tied: bool) -> None:
    config = small_config(num_layers=3, tie_embeddings=tied)
    model, optimizer = make(config)
    names = [name for group in optimizer.groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    roles, rules = train_gpt.parameter_roles(model), train_gpt.role_rules(config)
    for group in optimizer.groups:
        assert {rules[roles[name]][:3] for name in group.names} == {group.rule[:3]}, "what a group shares is its optimiser, rate and weight decay"
        assert isinstance(group, MuonGroup) == (roles[group.names[0]].value in ("attention", "mlp", "matrix"))
        assert all(parameter is model.get_parameter(name) for name, parameter in zip(group.names, group.parameters, strict=True))
    assert set(optimizer.state_dict()) == set(names)


def test_a_parameter_without_gradient_is_an_error() -> None:
    model, optimizer = make(small_config())
    leave_gradients(model)
    model.blocks[1].mlp.up.weight.grad = None
    with pytest.raises(AssertionError, match="gradient"):
        optimizer.step(LOSS, knobs())


def test_a_step_reports_loss_and_norm_moves_every_weight_and_takes_the_gradients() -> None:
    model, optimizer = make(small_config())
    before, norm = weights_of(model), leave_gradients(model)
    stats = optimizer.step(LOSS, knobs())
    assert stats.loss == 3.0
    assert stats.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before(limit: float) -> None:
    model, optimizer = make(small_config(grad_clip_norm=limit))
    norm = leave_gradients(model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert norm > 2 * limit
    stats = optimizer.step(LOSS, knobs())
    assert stats.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for name, applied in applied_gradients(optimizer).items():
        torch.testing.assert_close(applied, gradients[name] * (limit / norm), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 0.0])
def test_a_gradient_below_the_limit_is_not_touched(scale: float) -> None:
    weights = []
    for limit in (1.0, 0.0):
        model, optimizer = make(small_config(grad_clip_norm=limit))
        assert leave_gradients(model, scale=scale) < 1
        optimizer.step(LOSS, knobs())
        weights.append(weights_of(model))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["blocks.2.mlp.down.weight", "blocks.0.mix", "embedding.table.weight", "the loss"])
def test_a_step_that_is_not_finite_leaves_the_weights_and_the_next_one_works(where: str, bad: float, limit: float) -> None:
    model, optimizer = make(small_config(grad_clip_norm=limit, muon_weight_decay=0.1, embed_weight_decay=0.1, scalar_weight_decay=0.1), torch.float32)
    leave_gradients(model, seed=1)
    optimizer.step(LOSS.float(), knobs())
    before = weights_of(model)
    leave_gradients(model, seed=2)
    if where != "the loss":
        model.get_parameter(where).grad.view(-1)[-1] = bad
    stats = optimizer.step(torch.tensor(bad if where == "the loss" else 3.0), knobs())
    assert not (stats.loss.isfinite() and stats.grad_norm.isfinite()), "and the loop can see it"
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    assert all(value.isfinite().all() for state in optimizer.state_dict().values() for value in state.values())
    leave_gradients(model, seed=3)
    optimizer.step(LOSS.float(), knobs())
    moves = [(parameter - before[name]).abs().max() for name, parameter in model.named_parameters()]
    assert all(0 < move < 1 for move in moves)


def test_learning_rate_scale_zero_leaves_the_weights() -> None:
    model, optimizer = make(small_config(muon_weight_decay=0.1, embed_weight_decay=0.1, scalar_weight_decay=0.1))
    before = weights_of(model)
    leave_gradients(model)
    optimizer.step(LOSS, knobs(lr_scale=0.0))
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_restored_state_continues_bit_for_bit(options: dict[str, Any]) -> None:
    config = small_config(**{"num_layers": 3, "muon_weight_decay": 0.1, **options})
    model, optimizer = make(config)
    for seed in (1, 2):
        leave_gradients(model, seed)
        optimizer.step(LOSS, knobs())
    weights, state = weights_of(model), optimizer.state_dict()

    def two_more(model: train_gpt.GPT, optimizer: Optimizer) -> tuple[dict[str, Tensor], Any]:
        for seed in (3, 4):
            leave_gradients(model, seed)
            optimizer.step(LOSS, knobs())
        return weights_of(model), optimizer.state_dict()

    expected = two_more(model, optimizer)  # also: the saved state must not move along
    for restored_model, restored in ((model, optimizer), make(config)):
        train_gpt.load_weights(restored_model, weights)
        restored.load_state_dict(state)
        torch.testing.assert_close(restored.state_dict(), state, rtol=0, atol=0)
        torch.testing.assert_close(two_more(restored_model, restored), expected, rtol=0, atol=0)


# Steps over batches: micro-batches and ranks


class Start(NamedTuple):
    """What a training step needs."""

    config: Config
    model: train_gpt.GPT
    optimizer: Optimizer
    loader: train_gpt.TrainLoader

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.model, self.optimizer, Averages(self.model, self.config), self.loader)

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Runs steps; returns (loss, gradient norm) of each."""
        step_knobs = Knobs(Schedule(self.config).phase(0.0), 0.7, 0.9, 1.0)
        forward = train_gpt.training_forward(self.model, self.config)
        stats = [train_gpt.training_step(forward, self.optimizer, self.loader, step_knobs) for _ in range(steps)]
        return [(stat.loss.item(), stat.grad_norm.item()) for stat in stats]


def start(config: Config, world: World = ALONE) -> Start:
    model = lively_model(config)
    return Start(config, model, Optimizer(model, config, world), train_gpt.TrainLoader(config))


def test_a_step_applies_the_gradient_of_the_mean_loss_of_the_batch(tiny: Callable[..., Config]) -> None:
    training = start(tiny(MICRO_BATCH_TOKENS=64))
    rows = train_gpt.TrainLoader(training.config).next_rows(8, 32, ALONE)
    assert rows.shape == (8, 33)
    mean = training.model(rows[:, :-1], rows[:, 1:], Phase((0, 1, 2), 32)).mean()
    mean.backward()
    expected = {name: parameter.grad.clone() for name, parameter in training.model.named_parameters()}
    training.model.zero_grad()
    ((loss, norm),) = training.train(1)
    assert loss == pytest.approx(mean.item(), rel=1e-6)
    assert norm == pytest.approx(math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values())), rel=1e-6)
    applied = applied_gradients(training.optimizer)
    assert set(applied) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(applied[name], gradient, rtol=0, atol=1e-13)


def test_micro_batches_do_not_change_the_step(tiny: Callable[..., Config]) -> None:
    results = {}
    for micro_batch_tokens, forwards in ((64, 4), (128, 2), (200, 2), (256, 1)):
        training = start(tiny(MICRO_BATCH_TOKENS=micro_batch_tokens))
        calls: list[int] = []
        training.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        training.train(1)
        assert len(calls) == forwards
        results[micro_batch_tokens] = weights_of(training.model)
    for micro_batch_tokens in (64, 128, 200):
        torch.testing.assert_close(results[micro_batch_tokens], results[256], rtol=0, atol=1e-12)


# Gradients that travel during backward


@pytest.mark.parametrize(
    ("layers", "order", "buckets", "expected"),
    [
        (4, (0, 1, 2, 3), 2, [(0, 2), (2, 4)]),
        (4, (0, 1, 2, 3), 3, [(0, 2), (2, 3), (3, 4)]),
        (4, (0, 1, 2, 1, 2, 3), 2, [(0, 2), (2, 6)]),  # layer 1, of the first bucket, runs again in the second stretch
        (4, (0, 1, 2, 1, 2, 3), 4, [(0, 1), (1, 2), (2, 5), (5, 6)]),
        (5, (0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4), 2, [(0, 3), (3, 11)]),
    ],
)
def test_a_stretch_starts_where_a_layer_of_its_bucket_runs_for_the_first_time(
    layers: int, order: tuple[int, ...], buckets: int, expected: list[tuple[int, int]]
) -> None:
    config = small_config(num_layers=layers, gradient_buckets=buckets)
    assert train_gpt.bucket_slots(config, Phase(order, 16)) == [range(first, end) for first, end in expected]


@pytest.mark.parametrize(("compiled", "micro_batch_tokens"), [(False, 64), (False, 256), (True, 64)])
def test_gradients_of_late_layers_travel_before_those_of_early_layers_are_there(
    compiled: bool, micro_batch_tokens: int, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last backward of a step, compiled graph by graph; a loop crosses all buckets but the first."""
    torch._dynamo.reset()
    training = start(tiny(GRADIENT_BUCKETS=3, MICRO_BATCH_TOKENS=micro_batch_tokens, NUM_LOOPS=1, LOOP_START=1, LOOP_END=2, ENABLE_LOOPING_AT=0))
    events: list[str] = []
    for kind in (MuonGroup, AdamGroup):
        reduce = kind.reduce
        monkeypatch.setattr(kind, "reduce", lambda self, reduce=reduce: (events.append(f"travel {self.names[0]}"), reduce(self))[1])
    for name, parameter in training.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(f"arrive {name}"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    forward = train_gpt.training_forward(training.model, replace(training.config, compile=compiled))
    train_gpt.training_step(forward, training.optimizer, training.loader, Knobs(Schedule(training.config).phase(0.0), 0.7, 0.9, 1.0))
    backwards, last = divmod(events.index("travel blocks.2.attention.q.weight"), len(list(training.model.parameters())))
    assert backwards == 256 // micro_batch_tokens - 1 and last > 0
    for early, late in itertools.pairwise(range(3)):
        travelled = [at for at, event in enumerate(events) if event.startswith(f"travel blocks.{late}.") and "weight" in event]
        arrived = [at for at, event in enumerate(events) if event.startswith(f"arrive blocks.{early}.attention.q.weight")]
        assert len(travelled) == 4 and max(travelled) < arrived[-1], (late, events)
    assert training.optimizer.transfers == [] and not training.optimizer.awaited and training.optimizer.hooks == []
    kept = weakref.ref(training.optimizer)
    del training, forward
    gc.collect()
    assert kept() is None, "hooks must not keep the optimiser's state in memory"


def test_transfers_start_in_one_order_whatever_arrives_first() -> None:
    config = small_config(num_layers=4, gradient_buckets=2)
    model, optimizer = make(config)
    leave_gradients(model)
    optimizer.expect()
    for parameter in optimizer.groups[1].parameters:
        optimizer.arrived(parameter)
    assert optimizer.transfers == []
    *most, last = optimizer.groups[0].parameters
    for parameter in most:
        optimizer.arrived(parameter)
    assert optimizer.transfers == []
    optimizer.arrived(last)
    assert len(optimizer.transfers) == 2
    assert all(parameter.grad is None for group in optimizer.groups[:2] for parameter in group.parameters)
    assert all(parameter.grad is not None for group in optimizer.groups[2:] for parameter in group.parameters)


def test_the_order_of_transfers_is_that_in_which_backward_completes_groups() -> None:
    config = small_config(num_layers=4, gradient_buckets=4)
    _, optimizer = make(config)
    layers = [[int(name.split(".")[1]) if name.startswith("blocks.") else -1 for name in group.names] for group in optimizer.groups]
    matrices = [number for group, number in zip(optimizer.groups, layers, strict=True) if isinstance(group, MuonGroup) and max(number) > 0]
    assert matrices == sorted(matrices, reverse=True) and all(len(set(number)) == 1 for number in matrices)
    assert all(isinstance(group, MuonGroup) for group in optimizer.groups[: len(matrices)])


def test_a_graph_for_each_bucket_computes_what_one_graph_does() -> None:
    """Over loops, lanes, skips, dynamic skips and a value embedding; scored without gradients it is one graph."""
    torch._dynamo.reset()
    buckets = 3
    config = small_config(
        num_layers=4, num_loops=1, loop_start=1, loop_end=2, enable_looping_at=0.5, skip_connections="gated", dynamic_skip_last_n=2, value_embed_layers="2,3",
        parallel_residuals="lanes", parallel_start_layer=3, use_smeargate=True, compile=True, gradient_buckets=buckets,
    )  # fmt: skip
    model, graphs = lively_model(config), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    rows = torch.randint(config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        forward = train_gpt.training_forward(model, config)
    for number, phase in enumerate(Schedule(config).phases(), 1):
        outcomes = []
        for run in (model, forward):
            model.zero_grad()
            losses = run(rows[:, :-1], rows[:, 1:], phase)
            losses.sum().backward()
            outcomes.append((losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=1e-12)
        assert len(graphs) == number * buckets
    with torch.no_grad():
        assert torch.equal(forward(rows[:, :-1], rows[:, 1:], phase), model(rows[:, :-1], rows[:, 1:], phase))
    assert len(graphs) == number * buckets + 1


# Norms of the averaged gradient, as multiples of GRAD_CLIP_NORM.
CLIP_CASES = (0.5, 2.0)


def rank_checks(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    """What one of two ranks does; its outcome goes to `folder`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World("cpu")
    config = train_gpt.parse_config(arguments, {})
    training = start(config, world)
    outcome: dict[str, Any] = {"stats": training.train(3), "trained": training.state.save()}
    torch.compile = partial(torch.compile, backend="aot_eager")
    for name, settings in (("overlapped", {"gradient_buckets": 3}), ("in graphs", {"gradient_buckets": 3, "compile": True})):
        overlapped = start(replace(config, **settings), world)
        overlapped.train(3)
        outcome[name] = overlapped.state.save()

    continued = start(config, world)
    continued.state.load(torch.load(folder / "alone.pt"))
    outcome["loaded"] = continued.state.save()
    continued.train(1)
    outcome["continued"] = continued.state.save()

    leave_gradients(continued.model)
    if rank == 1:
        continued.model.blocks[2].mlp.up.weight.grad[0, 0] = float("nan")
    stats = continued.optimizer.step(LOSS, knobs())
    outcome["bad matrix"] = (stats.grad_norm.isfinite().item(), continued.state.save())
    leave_gradients(continued.model)
    if rank == 1:
        continued.model.embedding.table.weight.grad[0, 0] = float("nan")
    stats = continued.optimizer.step(LOSS, knobs())
    outcome["bad embedding"] = (stats.grad_norm.isfinite().item(), continued.state.save())

    for size in CLIP_CASES:
        apart = start(config, world)
        norm = leave_gradients(apart.model)
        leave_gradients(apart.model, scale=size * config.grad_clip_norm / norm.item())
        for parameter in apart.model.parameters():
            parameter.grad.mul_((-4, 5)[rank])
        stats = apart.optimizer.step(LOSS, knobs())
        outcome[f"clip {size}"] = (stats.grad_norm.item(), applied_gradients(apart.optimizer))
    torch.save(outcome, folder / f"rank{rank}.pt")
    world.close()


class TwoRanks(NamedTuple):
    """The same three steps, alone and on two ranks, and what each did next."""

    config: Config
    alone: dict[str, Any]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def two_ranks(tiny: Callable[..., Config], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    folder = tmp_path_factory.mktemp("two_ranks")
    options = {name.upper(): train_gpt.format_value(value) for name, value in EVERYTHING.items()}
    arguments = tiny_arguments(corpus, tiny().vocab_size, MICRO_BATCH_TOKENS=64, **options)
    training = start(train_gpt.parse_config(arguments, {}))
    sizes = [len(group.parameters) for group in training.optimizer.groups if isinstance(group, MuonGroup)]
    assert any(size % 2 for size in sizes), "some group does not divide into two shares"
    assert any(size % 2 == 0 for size in sizes)
    alone: dict[str, Any] = {"stats": training.train(3), "trained": training.state.save()}
    assert all(norm > 1.5 * training.config.grad_clip_norm for _, norm in alone["stats"]), "every step is clipped"
    torch.save(alone["trained"], folder / "alone.pt")
    training.train(1)
    alone["continued"] = training.state.save()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(rank_checks, (port, folder, arguments), nprocs=2)
    return TwoRanks(training.config, alone, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)])


def test_two_ranks_take_the_steps_of_one(two_ranks: TwoRanks) -> None:
    for rank in two_ranks.ranks:
        torch.testing.assert_close(rank["trained"], two_ranks.alone["trained"], rtol=0, atol=1e-12)


def test_ranks_are_equal_bit_for_bit(two_ranks: TwoRanks) -> None:
    for stage in ("trained", "overlapped", "in graphs", "continued"):
        torch.testing.assert_close(two_ranks.ranks[0][stage], two_ranks.ranks[1][stage], rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["overlapped", "in graphs"])
def test_gradients_that_travel_during_backward_take_the_same_steps(two_ranks: TwoRanks, stage: str) -> None:
    for rank in two_ranks.ranks:
        torch.testing.assert_close(rank[stage], two_ranks.alone["trained"], rtol=0, atol=1e-12)


def test_loss_and_norm_are_those_of_the_whole_batch_on_every_rank(two_ranks: TwoRanks) -> None:
    assert two_ranks.ranks[0]["stats"] == two_ranks.ranks[1]["stats"]
    for (loss, norm), (alone_loss, alone_norm) in zip(two_ranks.ranks[0]["stats"], two_ranks.alone["stats"], strict=True):
        assert loss == pytest.approx(alone_loss, rel=1e-6)
        assert norm == pytest.approx(alone_norm, rel=1e-6)


def test_two_ranks_continue_from_the_state_of_one(two_ranks: TwoRanks) -> None:
    for rank in two_ranks.ranks:
        torch.testing.assert_close(rank["loaded"], two_ranks.alone["trained"], rtol=0, atol=0)
        torch.testing.assert_close(rank["continued"], two_ranks.alone["continued"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", ["bad matrix", "bad embedding"])
def test_a_bad_gradient_on_one_rank_stops_the_step_on_both(two_ranks: TwoRanks, bad: str) -> None:
    for rank in two_ranks.ranks:
        finite, after = rank[bad]
        assert not finite
        torch.testing.assert_close(after["model"], rank["continued"]["model"], rtol=0, atol=0)
        assert all(value.isfinite().all() for state in after["optimizer"].values() for value in state.values())


def test_one_rank_continues_from_the_state_of_two(two_ranks: TwoRanks) -> None:
    saved = two_ranks.ranks[1]["trained"]
    assert any("row_squares" in state for state in saved["optimizer"].values())
    training = start(two_ranks.config)
    training.state.load(saved)
    torch.testing.assert_close(training.state.save(), saved, rtol=0, atol=0)
    training.train(1)
    torch.testing.assert_close(training.state.save(), two_ranks.alone["continued"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", CLIP_CASES)
def test_clipping_looks_at_the_averaged_gradient_not_at_what_each_rank_has(two_ranks: TwoRanks, size: float) -> None:
    """The ranks' gradients are -4 and 5 times the one that they sum to, so each alone is over the limit."""
    limit = two_ranks.config.grad_clip_norm
    model = lively_model(two_ranks.config)
    norm = leave_gradients(model).item()
    for rank in two_ranks.ranks:
        reported, applied = rank[f"clip {size}"]
        assert reported == pytest.approx(size * limit, rel=1e-6)
        for name, gradient in applied.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad * (min(size, 1.0) * limit / norm), rtol=1e-6, atol=1e-12)
