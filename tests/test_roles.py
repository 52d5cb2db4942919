"""Roles and grids: every parameter has one role, and what fake quantisation, rounding and the size forecast promise."""

from __future__ import annotations

import math
from typing import Any

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
    expected = {"embedding.table.weight": Role.EMBED, "skip.scale": Role.GAIN} | ({} if tied else {"head.table.weight": Role.HEAD})
    for block in ("blocks.0", "blocks.1"):
        expected |= {f"{block}.attention.{name}.weight": Role.ATTENTION for name in ("q", "k", "v", "out")}
        expected |= {f"{block}.mlp.{name}.weight": Role.MLP for name in ("up", "down")}
        expected |= {f"{block}.{name}": Role.GAIN for name in ("attention.q_gain", "mix", "attention_scale", "mlp_scale")}
    model = train_gpt.GPT(small_config(num_layers=2, tie_embeddings=tied))
    assert train_gpt.parameter_roles(model) == expected
    assert set(expected) == {name for name, _ in model.named_parameters()}
    by_role = train_gpt.parameters_by_role(model)
    assert sorted(name for group in by_role.values() for name in group) == sorted(expected), "grouping loses or repeats no parameter"


def test_projections_outside_attention_and_mlp_are_matrices_and_tables_that_are_never_the_head_are_tables() -> None:
    model = train_gpt.GPT(small_config(embed_rank=4, bigram_hash_buckets=6, value_embed_layers="1", swiglu=True))
    by_role = {role: set(group) for role, group in train_gpt.parameters_by_role(model).items()}
    assert by_role[Role.EMBED] == {"embedding.table.weight"}
    assert by_role[Role.TABLE] == {"stages.0.table.weight", "value_embedding.table.weight"}
    assert by_role[Role.MATRIX] == {"embedding.widen.weight", "stages.0.project.weight", "value_embedding.project.weight"}
    assert by_role[Role.MLP] == {f"blocks.{layer}.mlp.{name}.weight" for layer in range(4) for name in ("up", "gate", "down")}
    assert set(train_gpt.weight_parts(model)) == set().union(*(names for role, names in by_role.items() if role != Role.GAIN))


@pytest.mark.parametrize("where", ["", "blocks.0.mlp"])
def test_a_parameter_without_a_role_is_an_error(where: str) -> None:
    model = train_gpt.GPT(small_config())
    model.get_submodule(where).register_parameter("stranger", nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="stranger has no role"):
        train_gpt.parameter_roles(model)


def test_the_role_table_gives_each_role_its_own_settings() -> None:
    settings = {
        "matrix_lr": 1.0, "scalar_lr": 2.0, "tied_embed_lr": 3.0, "embed_lr": 4.0, "head_lr": 5.0,
        "muon_weight_decay": 6.0, "embed_weight_decay": 7.0, "scalar_weight_decay": 8.0, "matrix_bits": 4, "mlp_bits": 3, "embed_bits": 5,
        "embed_clip_sigmas": 9.0, "attn_clip_sigmas": 10.0, "mlp_clip_sigmas": 11.0, "matrix_clip_sigmas": 12.0,
    }  # fmt: skip
    expected = {
        Role.EMBED: ("adam", 3.0, 7.0, 5, 9.0),
        Role.TABLE: ("adam", 3.0, 7.0, 5, 9.0),
        Role.HEAD: ("adam", 5.0, 7.0, 4, 12.0),
        Role.ATTENTION: ("muon", 1.0, 6.0, 4, 10.0),
        Role.MLP: ("muon", 1.0, 6.0, 3, 11.0),
        Role.MATRIX: ("muon", 1.0, 6.0, 4, 12.0),
        Role.GAIN: ("adam", 2.0, 8.0, 16, 0.0),
    }
    assert train_gpt.role_rules(small_config(**settings)) == expected
    untied = train_gpt.role_rules(small_config(**settings, tie_embeddings=False))
    assert untied == expected | {Role.EMBED: ("adam", 4.0, 7.0, 5, 9.0)}, "a table that is never the head has the rate of a tied embedding"
    assert train_gpt.role_rules(small_config(**{**settings, "mlp_bits": 0}))[Role.MLP].bits == 4, "0 = MATRIX_BITS"


@pytest.mark.parametrize("tied", [True, False])
def test_a_qat_phase_computes_with_the_weights_that_the_role_table_would_export(tied: bool) -> None:
    config = small_config(matrix_bits=5, mlp_bits=4, embed_bits=3, layer_bits="1:2,3:16", tie_embeddings=tied)
    model, exported = lively_model(config, torch.float32), lively_model(config, torch.float32)
    rules, roles = train_gpt.role_rules(config), train_gpt.parameter_roles(exported)
    with torch.no_grad():
        for name, parameter in exported.named_parameters():
            bits = rules[roles[name]].bits
            if roles[name] != Role.GAIN and name.startswith(("blocks.1.", "blocks.3.")):
                bits = 2 if name.startswith("blocks.1.") else 16
            if bits < 16:
                grid = rowmax_grid(parameter, bits)
                parameter.copy_(grid.dequantise(grid.round(parameter)))
    tokens = torch.randint(2, 24, (2, 16))
    plain, quantised = (Phase(tuple(range(4)), 16, qat=qat) for qat in (False, True))
    assert torch.equal(model(tokens, tokens, quantised), exported(tokens, tokens, plain))
    assert not torch.equal(model(tokens, tokens, quantised), model(tokens, tokens, plain))


SCHEMES: dict[str, dict[str, Any]] = {
    "rowmax": {}, "gptq_lite row": {}, "gptq_lite matrix": {"gptq_lite_scope": "matrix"}, "gptq": {"attn_clip_sigmas": 2.0, "mlp_clip_sigmas": 2.5},
    "adaptive": {"qat_start_frac": 0.5}, "rate": {"qat_start_frac": 0.5, "coder": "range"},
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_qat_phase_eager_or_compiled_computes_with_the_grids_of_its_scheme(scheme: str) -> None:
    """Those of a scheme that needs statistics are the frozen ones, whatever the weights are. Rows are long enough for percentiles to differ."""
    torch._dynamo.reset()
    config = small_config(quant_scheme=scheme.split()[0], matrix_bits=4, embed_bits=5, mlp_mult=8.0, tie_embeddings=False, **SCHEMES[scheme])
    model, exported = lively_model(config), lively_model(config)
    rules, generator, unlike_rowmax = train_gpt.role_rules(config), torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for name, part in train_gpt.weight_parts(exported).items():
            weight, rule = part.weight, rules[part.role]
            if scheme == "adaptive":
                grid = train_gpt.row_grid(torch.rand(len(weight), 1, generator=generator) + 0.1, rule.bits)
            elif scheme == "rate":
                grid = train_gpt.rate_grid(0.3, *(torch.randint(-4, 4, (side,), generator=generator).numpy().astype("i2") for side in weight.shape))
            elif scheme == "gptq":
                grid = train_gpt.sdclip_grid(weight, rule.bits, rule.clip_sigmas)
            else:
                grid = rowmax_grid(weight, rule.bits) if scheme == "rowmax" else train_gpt.lite_grid(weight, rule.bits, scheme.split()[1])
            if config.qat_start_frac < 1:
                twin = train_gpt.weight_parts(model)[name]
                assert not twin.is_frozen()
                grid = grid._replace(row_step=grid.row_step.double(), column_step=grid.column_step.double())
                twin.freeze(grid)
                assert twin.is_frozen()
            points = grid.dequantise(grid.round(weight))
            unlike_rowmax.append(not torch.equal(points, rowmax_grid(weight, rule.bits).fake(weight)))
            weight.copy_(points)
    assert any(unlike_rowmax) == (scheme != "rowmax")
    tokens, plain, quantised = torch.randint(2, 24, (2, 16)), Phase(tuple(range(4)), 16), Phase(tuple(range(4)), 16, qat=True)
    with torch.no_grad():
        expected = exported(tokens, tokens, plain)
        torch.testing.assert_close(model(tokens, tokens, quantised), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(model(tokens, tokens, plain), expected, atol=1e-3)
        layer, points = model.blocks[0].mlp.down, exported.blocks[0].mlp.down.weight
        compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="eager")
        torch.testing.assert_close(compiled(torch.eye(128, dtype=torch.float64), quantised).T, points.data, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("setting", "roles"),
    [
        ("embed_clip_sigmas", {Role.EMBED, Role.TABLE}), ("attn_clip_sigmas", {Role.ATTENTION}), ("mlp_clip_sigmas", {Role.MLP}),
        ("matrix_clip_sigmas", {Role.MATRIX, Role.HEAD}),
    ],
)  # fmt: skip
def test_each_clip_factor_reaches_its_roles_and_no_others(setting: str, roles: set[Role]) -> None:
    features = {"tie_embeddings": False, "embed_rank": 4, "bigram_hash_buckets": 6}
    plain, moved = (train_gpt.weight_parts(lively_model(small_config(quant_scheme="gptq", **features, **changed))) for changed in ({}, {setting: 3.0}))
    assert {part.role for part in plain.values()} == set(Role) - {Role.GAIN}
    for name, part in plain.items():
        expected = train_gpt.sdclip_grid(part.weight, part.bits, 3.0) if part.role in roles else part.grid()
        assert torch.equal(moved[name].grid().step, expected.step), name
        assert torch.equal(part.grid().step, expected.step) != (part.role in roles), name


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
    grid = Grid(torch.tensor([[0.25], [2.0]]), torch.ones(1, 1), 7)
    codes = torch.tensor([[-3.0, 0.0, 2.0], [7.0, -7.0, 1.0]])
    assert torch.equal(grid.round(grid.dequantise(codes)), codes)
    assert torch.equal(grid.round(torch.tensor([[9.0], [-100.0]])), torch.tensor([[7.0], [-7.0]]))


def test_steps_of_rows_and_of_columns_multiply_and_rounding_takes_every_point_at_its_spacing() -> None:
    grid = Grid(torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0, 4.0, 0.25]]), 9, 2)
    assert torch.equal(grid.step, torch.tensor([[0.5, 2.0, 0.125], [2.0, 8.0, 0.5]]))
    weight = torch.tensor([[1.4, 5.9, -0.4], [100.0, -30.0, 0.49]])  # in steps: 2.8, 2.95, -3.2; 50, -3.75, 0.98
    assert torch.equal(grid.round(weight), torch.tensor([[2.0, 2.0, -4.0], [9.0, -4.0, 0.0]]))
    assert torch.equal(grid.fake(weight)[0], torch.tensor([1.0, 4.0, -0.5]))
    odd = torch.tensor([[1.0, 3.0, -5.0], [7.0, -9.0, 9.0]])  # points in between, which only a trellis takes
    assert torch.equal(grid.dequantise(odd), torch.tensor([[0.5, 6.0, -0.625], [14.0, -72.0, 4.5]]))


# Forecast


def entropy_on(grid: Grid, weight: torch.Tensor) -> float:
    """Returns bits per weight of an ideal coder that knows how often each code occurs, steps of rows included."""
    _, counts = torch.unique(grid.round(weight), return_counts=True)
    probabilities = counts / counts.sum()
    return -(probabilities * probabilities.log2()).sum().item() + 16 / weight.shape[1]


@pytest.mark.parametrize("columns", [64, 512, 2048])
@pytest.mark.parametrize("bits", BITS)
def test_forecast_is_close_to_the_entropy_of_gaussian_rows(bits: int, columns: int) -> None:
    """Within 3%; at 2 bits within 10%, because there each row's largest weight, a matter of luck, decides how many are not zero."""
    weight = torch.randn(400_000 // columns, columns, generator=torch.Generator().manual_seed(0))
    forecast = train_gpt.predicted_bits_per_weight("rowmax", bits, columns, clip_sigmas=3.0)
    assert forecast == pytest.approx(entropy_on(rowmax_grid(weight, bits), weight), rel=0.1 if bits == 2 else 0.03)


@pytest.mark.parametrize("scheme", ["gptq", "adaptive"])
@pytest.mark.parametrize(("bits", "sigmas"), [(6, 12.85), (7, 14.0), (5, 6.0), (8, 3.0), (3, 2.5)])
def test_forecast_at_a_given_clip_is_the_entropy_of_gaussian_rows(scheme: str, bits: int, sigmas: float) -> None:
    """Nothing is left to luck here: within 1%."""
    weight = torch.randn(781, 512, generator=torch.Generator().manual_seed(0))
    forecast = train_gpt.predicted_bits_per_weight(scheme, bits, 512, sigmas)
    assert forecast == pytest.approx(entropy_on(train_gpt.sdclip_grid(weight, bits, sigmas), weight), rel=0.01)


@pytest.mark.parametrize("scheme", ["rowmax", "gptq_lite", "gptq", "adaptive"])
def test_float16_is_forecast_at_16_bits(scheme: str) -> None:
    assert train_gpt.predicted_bits_per_weight(scheme, 16, 1, 12.85) == 16.0
