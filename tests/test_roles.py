"""Roles and grids: every parameter has one role, and what fake quantisation, rounding and the size forecast promise."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import lively_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import train_gpt
from train_gpt import Grid, Phase, Role, rowmax_grid

BITS = range(2, 9)
# The largest weight that the artifact accepts is below float16's largest number.
FLOAT16_MAX = 65504.0


def rows_of_many_sizes(columns: int = 96, seed: int = 0) -> torch.Tensor:
    """Gaussian rows whose scales run from 1e-12 to the largest weight that the artifact accepts; one row is zero."""
    noise = torch.randn(60, columns, generator=torch.Generator().manual_seed(seed))
    unit = noise / noise.abs().amax(dim=1, keepdim=True)
    return torch.cat([unit * torch.logspace(-12, math.log10(FLOAT16_MAX), 60)[:, None], torch.zeros(1, columns)])


# Roles


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_the_role_of_its_kind(tied: bool) -> None:
    expected = {"embedding.table.weight": Role.EMBED, "skip.scale": Role.GAIN} | ({} if tied else {"head.weight": Role.HEAD})
    for block in ("blocks.0", "blocks.1"):
        expected |= {f"{block}.{name}.weight": Role.MATRIX for name in ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.up", "mlp.down")}
        expected |= {f"{block}.{name}": Role.GAIN for name in ("attention.q_gain", "mix", "attention_scale", "mlp_scale")}
    model = train_gpt.GPT(small_config(num_layers=2, tie_embeddings=tied))
    assert train_gpt.parameter_roles(model) == expected
    assert set(expected) == {name for name, _ in model.named_parameters()}
    by_role = train_gpt.parameters_by_role(model)
    assert sorted(name for group in by_role.values() for name in group) == sorted(expected), "grouping loses or repeats no parameter"


@pytest.mark.parametrize("where", ["", "blocks.0.mlp"])
def test_a_parameter_without_a_role_is_an_error(where: str) -> None:
    model = train_gpt.GPT(small_config())
    model.get_submodule(where).register_parameter("stranger", nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="stranger has no role"):
        train_gpt.parameter_roles(model)


def test_the_role_table_gives_each_role_its_own_settings() -> None:
    settings = {
        "matrix_lr": 1.0, "scalar_lr": 2.0, "tied_embed_lr": 3.0, "embed_lr": 4.0, "head_lr": 5.0,
        "muon_weight_decay": 6.0, "embed_weight_decay": 7.0, "scalar_weight_decay": 8.0, "matrix_bits": 4, "embed_bits": 5,
    }  # fmt: skip
    expected = {
        Role.EMBED: ("adam", 3.0, 7.0, 5),
        Role.TABLE: ("adam", 3.0, 7.0, 5),
        Role.HEAD: ("adam", 5.0, 7.0, 4),
        Role.MATRIX: ("muon", 1.0, 6.0, 4),
        Role.GAIN: ("adam", 2.0, 8.0, 16),
    }
    assert train_gpt.role_rules(small_config(**settings)) == expected
    untied = train_gpt.role_rules(small_config(**settings, tie_embeddings=False))
    assert untied == expected | {Role.EMBED: ("adam", 4.0, 7.0, 5)}, "a table that is never the head has the rate of a tied embedding"


@pytest.mark.parametrize("tied", [True, False])
def test_a_qat_phase_computes_with_the_weights_that_the_role_table_would_export(tied: bool) -> None:
    config = small_config(matrix_bits=5, embed_bits=3, tie_embeddings=tied)
    model, exported = lively_model(config, torch.float32), lively_model(config, torch.float32)
    rules, roles = train_gpt.role_rules(config), train_gpt.parameter_roles(exported)
    with torch.no_grad():
        for name, parameter in exported.named_parameters():
            bits = rules[roles[name]].bits
            if bits < 16:
                grid = rowmax_grid(parameter, bits)
                parameter.copy_(grid.dequantise(grid.round(parameter)))
    tokens = torch.randint(2, 24, (2, 16))
    plain, quantised = (Phase(tuple(range(4)), 16, qat=qat) for qat in (False, True))
    assert torch.equal(model(tokens, tokens, quantised), exported(tokens, tokens, plain))
    assert not torch.equal(model(tokens, tokens, quantised), model(tokens, tokens, plain))


# Grid


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_integers_that_the_bits_can_hold_and_steps_are_bfloat16(bits: int) -> None:
    weight = rows_of_many_sizes()
    grid = rowmax_grid(weight, bits)
    codes = grid.round(weight)
    limit = 2 ** (bits - 1) - 1
    assert grid.limit == limit
    assert grid.step.shape == (61, 1)
    assert grid.step.dtype == torch.float32
    assert torch.equal(grid.step, grid.step.bfloat16().float())
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= limit
    assert (codes.abs().amax(dim=1)[:-1] == limit).all(), "the largest weight of a row is the outermost point"


@pytest.mark.parametrize("bits", BITS)
def test_error_is_at_most_half_a_step(bits: int) -> None:
    weight = rows_of_many_sizes()
    grid = rowmax_grid(weight, bits)
    error = (grid.fake(weight).double() - weight.double()).abs().amax(dim=1)
    assert (error <= grid.step[:, 0].double() / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", BITS)
def test_steps_span_each_row_on_its_own(bits: int) -> None:
    weight, limit = rows_of_many_sizes(), 2 ** (bits - 1) - 1
    exact = weight.abs().amax(dim=1) / limit
    tolerance = exact * 2.0**-8  # half a unit in the last place of bfloat16
    assert ((rowmax_grid(weight, bits).step[:, 0] - exact).abs() <= tolerance * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_stay_zero_and_the_largest_rows_stay_finite(bits: int) -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0], [FLOAT16_MAX, -FLOAT16_MAX, 1.0], [1e-30, -1e-30, 0.0]])
    grid = rowmax_grid(weight, bits)
    assert torch.equal(grid.round(weight)[0], torch.zeros(3))
    assert torch.equal(grid.fake(weight)[0], torch.zeros(3))
    assert grid.fake(weight).isfinite().all()
    assert (grid.fake(weight)[2].abs() <= 1e-30).all(), "a row below the smallest step becomes zero, not something larger"


@pytest.mark.parametrize("bits", BITS)
def test_fake_is_dequantise_of_round_bit_for_bit(bits: int) -> None:
    """In float32 weight + (point - weight) is exact, because a point within half a step of its weight is zero or within a factor of two of it."""
    weight = rows_of_many_sizes()
    grid = rowmax_grid(weight, bits)
    assert torch.equal(grid.fake(weight), grid.dequantise(grid.round(weight)))


def test_the_gradient_of_fake_is_one_for_every_weight() -> None:
    weight = rows_of_many_sizes().requires_grad_()
    downstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (rowmax_grid(weight, 4).fake(weight) * downstream).sum().backward()
    assert torch.equal(weight.grad, downstream), "clipped, rounded and outermost weights alike; no gradient through the step"


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), scale=st.floats(-3, 4), seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 40))
def test_weights_on_their_grid_are_a_fixed_point(bits: int, scale: float, seed: int, columns: int) -> None:
    """A row that came from its grid gives the same step, codes and weights again, bit for bit, because its outermost point is occupied."""
    noise = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    weight = noise / noise.abs().amax(dim=1, keepdim=True) * 10**scale
    grid = rowmax_grid(weight, bits)
    points = grid.dequantise(grid.round(weight))
    again = rowmax_grid(points, bits)
    assert torch.equal(again.step, grid.step)
    assert torch.equal(again.round(points), grid.round(weight))
    assert torch.equal(again.fake(points), points)


def test_points_keep_their_place_on_a_given_grid() -> None:
    """Also on a grid that the weights do not determine, whose outermost points they do not reach, or reach beyond."""
    grid = Grid(torch.tensor([[0.25], [2.0]]), 7)
    codes = torch.tensor([[-3.0, 0.0, 2.0], [7.0, -7.0, 1.0]])
    assert torch.equal(grid.round(grid.dequantise(codes)), codes)
    assert torch.equal(grid.round(torch.tensor([[9.0], [-100.0]])), torch.tensor([[7.0], [-7.0]]))


# Forecast


@pytest.mark.parametrize("columns", [64, 512, 2048])
@pytest.mark.parametrize("bits", BITS)
def test_forecast_is_close_to_the_entropy_of_gaussian_rows(bits: int, columns: int) -> None:
    """Within 3%; at 2 bits within 10%, because there each row's largest weight, a matter of luck, decides how many are not zero."""
    weight = torch.randn(400_000 // columns, columns, generator=torch.Generator().manual_seed(0))
    _, counts = torch.unique(rowmax_grid(weight, bits).round(weight), return_counts=True)
    probabilities = counts / counts.sum()
    entropy = -(probabilities * probabilities.log2()).sum().item() + 16 / columns
    assert train_gpt.predicted_bits_per_weight(bits, columns) == pytest.approx(entropy, rel=0.1 if bits == 2 else 0.03)


def test_float16_is_forecast_at_16_bits() -> None:
    assert train_gpt.predicted_bits_per_weight(16, 1) == 16.0
