"""Quantisation: curvature, feedback, grids, the trellis and steps, each against its definition, brute force or a plain loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import lively_model, small_config
from torch import Tensor

import train_gpt
from train_gpt import Allocation, Curvature, Grid, Head, Joined, Linear, Phase, Role, Schedule, Table, World, assign_two_sided, weight_parts

ALONE = World("cpu")
LENGTH = 16


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(size: int, seed: int = 0, strength: float = 2.0) -> Tensor:
    """A positive definite matrix of second moments whose variables share a common part and have sizes of their own."""
    x = (gaussian(3 * size, size, seed=seed) + strength * gaussian(3 * size, 1, seed=seed + 1000)) * (0.5 * gaussian(size, seed=seed + 2000)).exp()
    return x.T @ x / len(x)


def weighted_error(error: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> float:
    """Returns tr(G E H E^T), by its definition; without G, tr(E H E^T)."""
    squares = error @ inputs @ error.T
    return float((squares if outputs is None else outputs @ squares).trace())


# ----------------------------------------------------------------------------------------------------------------------
# Calibration


class Rank(World):
    """One of several ranks that run one after another: each adds its sums to `before`, those of the ranks before it."""

    def __init__(self, rank: int = 0, size: int = 1, before: Sequence[Tensor] = ()) -> None:
        super().__init__("cpu")
        self.rank, self.size, self.before = rank, size, before
        self.after: list[Tensor] = []

    def sum_(self, tensor: Tensor) -> Tensor:
        self.after.append(tensor + self.before[len(self.after)] if self.before else tensor.clone())
        return self.after[-1]


class Loader:
    """Gives its rows, again and again."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.state = rows, {"row": 0}

    def next_rows(self, num_rows: int, seq_len: int, world: World) -> Tensor:
        self.state = {"row": self.state["row"] + num_rows}
        assert (num_rows % len(self.rows), seq_len + 1) == (0, self.rows.shape[1])
        share = num_rows // world.size
        return self.rows.repeat(num_rows // len(self.rows), 1)[world.rank * share : (world.rank + 1) * share]


def measure(model: train_gpt.GPT, rows: Tensor, ranks: int = 1, *, gradients: bool = True) -> dict[str, Curvature]:
    """Returns what the last of `ranks` ranks measures, which holds the sums of all."""
    phase, sums, measured = Schedule(model.config).scored_phase, list[Tensor](), {}
    model.config = replace(model.config, quant_scheme="rate" if gradients else "gptq")
    for rank in range(ranks):
        world = Rank(rank, ranks, sums)
        loader: Any = Loader(rows)
        measured, sums = train_gpt.calibrate(model, phase, loader, world), world.after
    return measured


def random_rows(count: int = 6, seed: int = 0, documents: bool = True) -> Tensor:
    """Rows of LENGTH + 1 random tokens; a document starts at every beginning and, if wanted, in the middle."""
    rows = torch.randint(2, 24, (count, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    rows[:, 0] = 1
    if documents:
        rows[:, LENGTH // 2] = 1
    return rows


MODELS: dict[str, dict[str, Any]] = {
    "tied": {"bigram_hash_buckets": 10, "bigram_hash_dim": 6, "value_embed_layers": "1,3", "value_embed_dim": 5, "use_smeargate": True},
    "thin": {"embed_rank": 7, "num_loops": 1, "loop_start": 1, "loop_end": 2},
    "untied": {"tie_embeddings": False, "swiglu": True, "num_loops": 2, "loop_start": 1, "loop_end": 1, "parallel_residuals": "gptj"},
}


def calibrated_model(rows: int = 6, **settings: Any) -> train_gpt.GPT:
    """A model with float64 activations and float32 weights, which wants `rows` rows."""
    return lively_model(small_config(calibration_tokens=rows * LENGTH, **settings)).float()


def uses_by_definition(model: train_gpt.GPT, rows: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Returns (H, G) of every way each weight is used, in float64, from one forward whose projections are written out here."""
    names = {part: name for name, part in weight_parts(model).items()}
    seen: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}

    def note(name: str, use: str, before: Tensor, after: Tensor) -> Tensor:
        after.retain_grad()
        seen.setdefault((name, use), []).append((before, after))
        return after

    def multiply(part: Linear, x: Tensor, phase: Phase, adapters: object = None, name: str = "", scale: Tensor | None = None) -> Tensor:
        use = f"multiply {sum(name == names[part] for name, _ in seen)}"
        y = note(names[part], use, x, torch.einsum("bti,oi->bto", x, part.weight.double()))
        return y if scale is None else y * scale

    def multiply_joined(joined: Joined, x: Tensor, phase: Phase, adapters: object) -> tuple[Tensor, ...]:
        return tuple(multiply(member, x, phase) for member in joined.members.values())

    def look_up(part: Table, tokens: Tensor, phase: Phase, dtype: torch.dtype) -> Tensor:
        index = part.index(tokens)
        return note(names[part], "look up", index, part.weight.double()[index])

    def score(part: Head, x: Tensor, phase: Phase) -> Tensor:
        thin = x
        if part.widen is not None:
            thin = note(names[part.widen], "narrow", x, torch.einsum("bto,oi->bti", x, part.widen.weight.double()))
        return note(names[part.table], "score", thin, torch.einsum("bti,vi->btv", thin, part.table.weight.double()))

    patches = {Linear: multiply, Joined: multiply_joined, Table: look_up, Head: score}
    with ExitStack() as stack:
        for kind, forward in patches.items():
            stack.enter_context(mock.patch.multiple(kind, forward=forward))
        logits = model.logits(rows[:, :-1], Schedule(model.config).scored_phase)
    shares = logits.detach().softmax(dim=-1)
    draws = torch.rand(len(rows), LENGTH, 1, generator=torch.Generator().manual_seed(model.config.seed))
    labels = torch.searchsorted(shares.cumsum(dim=-1), draws.double())
    (-logits.log_softmax(dim=-1).gather(2, labels)).sum().backward()

    def moments(values: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([value.detach().flatten(0, 1) for value in values])
        return torch.einsum("ni,nj->ij", flat, flat) / labels.numel()

    uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, use), pairs in seen.items():
        before, gradients = [x for x, _ in pairs], [after.grad for _, after in pairs if after.grad is not None]
        if use == "look up":
            counts = torch.stack([(before[0] == token).sum() for token in range(model.get_parameter(name).shape[0])])
            found = moments(gradients), counts.double() / labels.numel()
        elif use == "narrow":
            found = moments(gradients), moments(before)
        elif use == "score":
            found = moments(before), (shares - shares.square()).mean(dim=(0, 1))
        else:
            found = moments(before), moments(gradients)
        uses.setdefault(name, []).append(found)
    model.zero_grad(set_to_none=True)
    return uses


def same(measured: Tensor | None, expected: Tensor | None) -> None:
    """Sums are taken in float32."""
    assert measured is not None and expected is not None
    expected = expected.double()
    torch.testing.assert_close(measured.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
def test_curvature_is_the_sum_of_outer_products_over_tokens_and_uses(kind: str) -> None:
    """A looped layer, and a table that is looked up and scores, has one curvature of the right size."""
    model, rows = calibrated_model(**MODELS[kind]), random_rows()
    expected = uses_by_definition(model, rows)
    measured = measure(model, rows)
    assert set(measured) == set(expected) == set(weight_parts(model))
    for name, uses in expected.items():
        inputs, outputs = measured[name]
        assert inputs.dtype == torch.float32 and outputs is not None
        if len(uses) == 1:
            same(inputs, uses[0][0])
            same(outputs, uses[0][1])
            continue
        sizes = [(h.trace(), g.sum() if g.dim() == 1 else g.trace()) for h, g in uses]
        merged = torch.stack([h * size for (h, _), (_, size) in zip(uses, sizes, strict=True)]).sum(dim=0)
        same(inputs, merged)
        same(outputs, torch.stack([g * size for (_, g), (size, _) in zip(uses, sizes, strict=True)]).sum(dim=0) / merged.trace())
        total = inputs.trace() * (outputs.sum() if outputs.dim() == 1 else outputs.trace())
        torch.testing.assert_close(total.double(), torch.stack([a * b for a, b in sizes]).sum(), rtol=1e-5, atol=0)
    merged_ones = {name for name, uses in expected.items() if len(uses) > 1 and not name.startswith("blocks.")}
    assert merged_ones == {"tied": {"embedding.table.weight"}, "thin": {"embedding.table.weight", "embedding.widen.weight"}, "untied": set()}[kind]
    looped = {name.split(".")[1] for name, uses in expected.items() if len(uses) > 1 and name.startswith("blocks.")}
    assert looped == {"tied": set(), "thin": {"1", "2"}, "untied": {"1"}}[kind]


class LongLoader(Loader):
    """Gives the rows from where it stands."""

    def next_rows(self, num_rows: int, seq_len: int, world: World) -> Tensor:
        first = self.state["row"]
        self.state = {"row": first + num_rows}
        return self.rows[first : first + num_rows]


def test_rows_of_a_table_are_counted_on_more_text_than_the_rest_is_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 23 is not in the rows that are measured; were its row worthless, rounding would destroy it. What follows those rows is held out."""
    monkeypatch.setattr(train_gpt, "LOOKUP_FACTOR", 4)
    model, rows = calibrated_model(**MODELS["tied"]), random_rows(36)
    model.config = replace(model.config, quant_scheme="rate")
    rows[:24, 5], rows[24:30], rows[30:] = 23, rows[24:30].clamp_max(22), 22
    phase, loader, world = Schedule(model.config).scored_phase, LongLoader(rows), Rank()
    loader.state = {"row": 24}
    measured = train_gpt.calibrate(model, phase, loader, world)["value_embedding.table.weight"].outputs  # type: ignore[arg-type]
    counts = torch.bincount(rows[:24, :-1].flatten(), minlength=24) / (24 * LENGTH)
    assert measured is not None and measured[23] > 0 and loader.state == {"row": 30}
    torch.testing.assert_close(measured, counts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_without_gradients_inputs_add_up_over_uses_and_there_is_nothing_else(kind: str) -> None:
    model, rows = calibrated_model(**MODELS[kind]), random_rows()
    uses, plain = uses_by_definition(model, rows), measure(model, rows, gradients=False)
    looked_up = {name for name, part in weight_parts(model).items() if isinstance(part, Table)}
    assert set(plain) == set(uses) - looked_up | ({"embedding.table.weight"} if model.config.tie_embeddings else set())
    for name, curvature in plain.items():
        assert curvature.outputs is None
        # Of an embedding, only what is multiplied: the table as the head, the factor as it widens rows.
        kept = {"embedding.table.weight": uses[name][-1:], "embedding.widen.weight": uses[name][:1]}.get(name, uses[name])
        same(curvature.inputs, torch.stack([h for h, _ in kept]).sum(dim=0))


def test_the_expected_curvature_is_the_fisher_information() -> None:
    """One row again and again: the mean over drawn labels against the sum over all. 2000 draws leave a deviation of 0.4% in the trace, 3% in all."""
    repeats = 2000
    model = calibrated_model(repeats, micro_batch_tokens=4096 * LENGTH, num_layers=2)
    row, part = random_rows(1), model.blocks[0].mlp.up
    outputs: list[Tensor] = []
    with part.register_forward_hook(lambda module, arguments, output: outputs.append(output)):
        logits = model.logits(row[:, :-1], Schedule(model.config).scored_phase)
    logs = logits.log_softmax(dim=-1).flatten()
    (gradients,) = torch.autograd.grad(logs, outputs[0], torch.eye(len(logs), dtype=torch.float64), is_grads_batched=True)
    fisher = torch.einsum("n,nti,ntj->ij", logs.detach().exp(), gradients[:, 0], gradients[:, 0]) / LENGTH
    measured = measure(model, row.expand(repeats, -1))["blocks.0.mlp.up.weight"].outputs
    assert measured is not None
    assert float(measured.trace()) == pytest.approx(float(fisher.trace()), rel=0.02)
    assert (measured - fisher).norm() < 0.08 * fisher.norm()


@pytest.mark.parametrize("doc_mask", [True, False])
def test_editing_one_document_leaves_the_contributions_of_the_others_alone(doc_mask: bool) -> None:
    """What an edit of each row's first document changes does not depend on the second, unless attention crosses the border."""
    model = calibrated_model(tie_embeddings=False, use_smeargate=True, value_embed_layers="1", doc_mask=doc_mask)
    half, first, other = LENGTH // 2, random_rows(seed=0), random_rows(seed=1)
    mixed = [torch.cat([a[:, :half], b[:, half:]], dim=1) for a, b in itertools.product((first, other), repeat=2)]
    both, edited_second, edited_first, edited = (measure(model, rows) for rows in mixed)
    apart = []
    for name in both:
        for side in (0, 1):
            values = [found[name][side].double() for found in (both, edited_first, edited_second, edited)]
            change = values[0] - values[1] - (values[2] - values[3])
            apart.append(float(change.abs().max() / values[0].abs().max()))
    assert max(apart) < 1e-6 if doc_mask else max(apart) > 0.01


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_any_number_of_ranks_measures_what_one_does_with_the_same_labels(ranks: int) -> None:
    model, rows = calibrated_model(**MODELS["thin"]), random_rows()
    alone, together = measure(model, rows), measure(model, rows, ranks)
    assert set(alone) == set(together)
    for name, (inputs, outputs) in together.items():
        same(inputs, alone[name].inputs)
        same(outputs, alone[name].outputs)


def test_tokens_are_rounded_up_to_whole_rows_on_every_rank() -> None:
    model = lively_model(small_config(calibration_tokens=2 * LENGTH + 1))
    assert measure(model, random_rows(3)) and measure(model, random_rows(4), ranks=2)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_calibration_leaves_no_trace_even_when_it_fails(broken: bool, gradients: bool) -> None:
    model, rows = calibrated_model(**MODELS["thin"]), random_rows()
    before, random_state = [parameter.detach().clone() for parameter in model.parameters()], torch.get_rng_state()
    if broken:
        rows[-1, 3] = 24
        with pytest.raises(IndexError):
            measure(model, rows, gradients=gradients)
    else:
        measure(model, rows, gradients=gradients)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state) and torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------------------------------
# Feedback


def test_damping_adds_a_share_of_the_mean_diagonal() -> None:
    matrix = correlated(7).float()
    expected = matrix.double() + torch.eye(7, dtype=torch.float64) * matrix.double().diagonal().sum() / 7 * 0.03
    torch.testing.assert_close(train_gpt.damped(matrix, 0.03), expected, rtol=1e-14, atol=0)
    assert (torch.linalg.eigvalsh(train_gpt.damped(torch.zeros(4, 4), 0.03)) > 0).all(), "weights that nothing ever reached do not stop an export"


@pytest.mark.parametrize("size", [1, 2, 40])
def test_reverse_cholesky_by_its_definition(size: int) -> None:
    matrix = correlated(size)
    factor, d = train_gpt.reverse_cholesky(matrix)
    assert factor.dtype == torch.float64 and torch.equal(factor.tril(), torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(factor @ torch.diag(d) @ factor.T, matrix, rtol=0, atol=1e-13 * float(matrix.max()))
    dets = [torch.linalg.slogdet(matrix[j:, j:])[1] for j in range(size)] + [torch.zeros((), dtype=torch.float64)]
    torch.testing.assert_close(d.log(), torch.stack([a - b for a, b in itertools.pairwise(dets)]), rtol=0, atol=1e-10)


def plain_feedback(weight: Tensor, steps: Tensor, limit: int, factor: Tensor, spacing: int = 1) -> tuple[Tensor, Tensor]:
    """Returns (codes, targets) in float64: v_j = w_j + sum over k < j of (w_k - q_k) M_kj, each rounded."""
    codes, targets = torch.zeros_like(weight), weight.clone()
    for j in range(weight.shape[1]):
        targets[:, j] += ((weight - codes * steps)[:, :j] * factor[:j, j]).sum(dim=1)
        codes[:, j] = (spacing * (targets[:, j] / (spacing * steps[:, j])).round()).clamp(-limit, limit)
    return codes, targets


@pytest.mark.parametrize(("columns", "limit"), [(5, 100), (300, 100), (300, 3)])
def test_feedback_is_that_of_a_plain_loop_and_its_error_is_the_sum_over_targets(columns: int, limit: int) -> None:
    """300 columns are more than two blocks; at limit 3 a good part of the weights are clipped."""
    weight, inputs = gaussian(6, columns), correlated(columns)
    grid = Grid(gaussian(6, 1, seed=1).exp() * 0.3, gaussian(1, columns, seed=2).mul(0.2).exp(), limit)
    factor, d = train_gpt.reverse_cholesky(inputs)
    codes = train_gpt.assign_with_feedback(weight, grid, factor)
    expected, targets = plain_feedback(weight, grid.step, limit, factor)
    assert torch.equal(codes, expected)
    assert codes.abs().max() <= limit and bool((targets.abs() > (limit + 0.5) * grid.step).any()) == (limit == 3)
    points = grid.dequantise(codes)
    assert weighted_error(weight - points, inputs) == pytest.approx(float((d * (targets - points).square()).sum()), rel=1e-10)


@pytest.mark.parametrize("inputs", [torch.eye(9, dtype=torch.float64), torch.diag(gaussian(9).exp())], ids=["identity", "diagonal"])
def test_without_correlation_feedback_is_rounding(inputs: Tensor) -> None:
    weight, grid = gaussian(20, 9), Grid(torch.full((20, 1), 0.3, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), 4)
    factor, _ = train_gpt.reverse_cholesky(inputs)
    assert torch.equal(train_gpt.assign_with_feedback(weight, grid, factor), grid.round(weight))


def test_feedback_lies_between_the_optimum_and_its_bound_and_well_below_rounding() -> None:
    step, problems, window = 0.5, 200, torch.tensor(list(itertools.product(range(-3, 4), repeat=3)), dtype=torch.float64)
    grid = Grid(torch.full((1, 1), step, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), 1000)
    ours, rounded, best = [], [], []
    for seed in range(problems):
        weight, inputs = gaussian(1, 3, seed=seed), correlated(3, seed=seed)
        factor, d = train_gpt.reverse_cholesky(inputs)
        candidates = weight - step * (grid.round(weight) + window)
        best.append(float(torch.einsum("ni,ij,nj->n", candidates, inputs, candidates).min()))
        ours.append(weighted_error(weight - grid.dequantise(train_gpt.assign_with_feedback(weight, grid, factor)), inputs))
        rounded.append(weighted_error(weight - grid.dequantise(grid.round(weight)), inputs))
        assert best[-1] - 1e-12 <= ours[-1] <= float(d.sum()) * step**2 / 4 + 1e-12
    assert sum(best) < sum(ours) < 0.6 * sum(rounded)


def classical_gptq(weight: np.ndarray, step: np.ndarray, limit: int, hessian: np.ndarray) -> np.ndarray:
    """GPTQ as arXiv:2210.17323 has it: errors spread over the columns left by the Cholesky factor of the inverse; falling order of activation."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    left, codes = weight[:, order].copy(), np.empty_like(weight)
    for place, column in enumerate(order):
        codes[:, column] = (left[:, place] / step).round().clip(-limit, limit)
        error = (left[:, place] - codes[:, column] * step) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    return codes


@pytest.mark.parametrize("limit", [100, 2])
def test_gptq_is_classical_gptq(limit: int) -> None:
    weight, inputs = gaussian(8, 150), correlated(150)
    inputs[:, 40], inputs[40] = 0, 0  # an input that is always zero
    grid = Grid(gaussian(8, 1, seed=1).exp() * 0.4, torch.ones(1, 1, dtype=torch.float64), limit)
    damped = inputs.numpy() + 0.01 * np.diag(inputs.numpy()).mean() * np.eye(150)
    codes = train_gpt.assign_gptq(weight, grid, inputs, 0.01)
    assert np.array_equal(codes.numpy(), classical_gptq(weight.numpy(), grid.row_step[:, 0].numpy(), limit, damped))
    assert torch.equal(train_gpt.assign_gptq(weight, grid, None, 0.01), grid.round(weight))


# ----------------------------------------------------------------------------------------------------------------------
# Grids and corrections


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize(("bits", "columns"), [(2, 7), (3, 200), (5, 3000)])
def test_lite_grid_has_the_least_error_of_all_percentiles(bits: int, columns: int, scope: str) -> None:
    weight, limit = gaussian(9, columns) ** 3, 2 ** (bits - 1) - 1
    clips, errors = [], []
    for share in (0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = np.sort(np.abs(weight.numpy()), axis=1)[:, math.ceil(share * columns) - 1]
        step = torch.from_numpy(clip / limit).bfloat16().double()[:, None]
        errors.append(((weight / step).round().clamp(-limit, limit) * step - weight).square().sum(dim=1))
        clips.append(step)
    table = torch.stack(errors)
    best = table.argmin(dim=0) if scope == "row" else table.sum(dim=1).argmin().expand(9)
    grid = train_gpt.lite_grid(weight, bits, scope)
    assert torch.equal(grid.row_step, torch.stack([clips[k][row] for row, k in enumerate(best)])) and grid.limit == limit
    assert columns < 50 or len(set(best.tolist())) > 1 or scope == "matrix", "rows differ in what is best for them"


def test_sdclip_grid_ends_at_so_many_standard_deviations() -> None:
    weight = gaussian(30, 50) * gaussian(30, 1, seed=1) + 0.5
    deviation = (weight - weight.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True).sqrt()
    assert torch.equal(train_gpt.sdclip_grid(weight, 5, 3.5).row_step, (3.5 * deviation / 15).bfloat16().double())


def clip_factors(sensitivities: Sequence[float]) -> dict[str, float]:
    """Returns the adaptive clip factors of matrices whose statistics are made up."""
    model = lively_model(small_config(quant_scheme="adaptive", mlp_clip_sigmas=12, attn_clip_sigmas=13))
    parts = weight_parts(model)
    names = [name for name, part in parts.items() if part.role != Role.EMBED][: len(sensitivities)]
    chosen = dict(zip(names, sensitivities, strict=True))
    curvatures = {}
    for name, sensitivity in chosen.items():
        weight = parts[name].weight.detach()
        curvatures[name] = Curvature(torch.eye(weight.shape[1]) * sensitivity / weight.var(dim=1).mean(), None)
    curvatures["embedding.table.weight"] = Curvature(torch.eye(16), None)
    sigmas = train_gpt.adaptive_sigmas(parts, curvatures)
    untouched = {name for name in parts if sigmas[name] == parts[name].clip_sigmas}
    assert untouched == set(parts) - set(chosen), "the embedding and matrices without statistics keep their constants"
    sizes = {name: parts[name].weight.numel() for name in names}
    gap = sum(size * math.log(sigmas[name] / parts[name].clip_sigmas) for name, size in sizes.items())
    assert gap == pytest.approx(0, abs=1e-6 * sum(sizes.values())), "the mean logarithm over all weights stays that of the constants"
    return {name: sigmas[name] for name in names}


def test_adaptive_clipping_is_a_power_of_sensitivity_around_the_constants() -> None:
    sensitivities = [0.3, 1.0, 2.5, 5.0, 0.7, 1.1]
    for (a, b), (x, y) in zip(itertools.pairwise(clip_factors(sensitivities).values()), itertools.pairwise(sensitivities), strict=True):
        assert math.log(a / b) == pytest.approx(-0.15 * math.log(x / y), abs=1e-5), "sensitive ones are clipped earlier, at finer steps"


def test_adaptive_clipping_stays_between_6_and_24() -> None:
    sigmas = clip_factors([1e-9, 1e-4, 1.0, 1.0, 1e4, 1e9])
    assert min(sigmas.values()) == 6 and max(sigmas.values()) == 24


@pytest.mark.parametrize(("shape", "rank", "group"), [((9, 13), 9, 5), ((13, 9), 9, 64), ((6, 20), 3, 7), ((5, 5), 1, 1)])
def test_corrections_are_the_best_of_their_rank_up_to_their_steps(shape: tuple[int, int], rank: int, group: int) -> None:
    error = gaussian(*shape).float()
    u, s, v = torch.linalg.svd(error.double(), full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * v[:rank]
    factors = train_gpt.lqer_factors(error, rank, small_config(lqer_left_bits=8, lqer_factor_bits=8, lqer_asym_group=group))
    assert factors.left.shape == (shape[0], rank) and factors.right.shape == (rank, shape[1])
    assert factors.left_step.shape == (1, rank) and factors.right_step.shape == (rank, -(-shape[1] // group))
    for codes in (factors.left, factors.right):
        assert torch.equal(codes, codes.round()) and codes.abs().max() == 127
    right_steps = torch.stack([factors.right_step[:, column // group] for column in range(shape[1])], dim=1).double()
    signs = (factors.left * left.float()).sum(dim=0).sign()  # those of the decomposition are arbitrary
    own_left, own_right = factors.left * factors.left_step * signs, factors.right * right_steps * signs[:, None]
    assert ((own_left - left).abs() <= 0.501 * factors.left_step).all() and ((own_right - right).abs() <= 0.501 * right_steps).all()
    assert (factors.product() - left @ right).norm() < 0.02 * error.norm(), "8 bits are plenty, so at full rank this is the error itself"


def test_corrections_are_summed_in_a_fixed_order() -> None:
    error = gaussian(11, 37).float()
    coarse = train_gpt.lqer_factors(error, 5, small_config())
    assert coarse.left.abs().max() == 1 and coarse.right.abs().max() == 7, "the default bits are 2 and 4"
    factors = train_gpt.lqer_factors(error, 9, small_config(lqer_left_bits=8, lqer_factor_bits=8, lqer_asym_group=8))
    total = np.zeros((11, 37), np.float32)
    for k, i, j in itertools.product(range(9), range(11), range(37)):
        left, right = factors.left[i, k] * factors.left_step[0, k], factors.right[k, j] * factors.right_step[k, j // 8]
        total[i, j] += np.float32(left) * np.float32(right)
    assert np.array_equal(factors.product().numpy(), total)


# ----------------------------------------------------------------------------------------------------------------------
# Two-sided assignment


def uncoupled(rows: int, columns: int) -> Allocation:
    """Steps of one size and no feedback."""
    return Allocation(np.zeros(rows, np.int16), np.zeros(columns, np.int16), torch.eye(columns), None, torch.ones(rows))


def problem(rows: int, columns: int, seed: int = 0, strength: float = 2.0) -> tuple[Tensor, Curvature, Allocation]:
    """A weight and curvatures of both sides, correlated."""
    curvature = Curvature(correlated(columns, seed).float(), correlated(rows, seed + 1, strength).float())
    return gaussian(rows, columns, seed=seed).float(), curvature, train_gpt.allocate(curvature)


def points_of(codes: np.ndarray, grid: Grid) -> Tensor:
    return torch.from_numpy(codes).double() * grid.step.double()


def follow(codes: np.ndarray, table: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the trellis' state before every code, each column starting at state 0."""
    states = np.zeros((codes.shape[0] + 1, codes.shape[1]), np.int64)
    for row, above in enumerate(codes):
        states[row + 1] = np.array(table)[states[row], above // 2 % 2]
    return states[:-1]


def survivors(weight: Tensor, grid: Grid, allocation: Allocation, states: int) -> np.ndarray:
    """The search of `assign_two_sided` in float64, its survivors being whole paths: for each state the cheapest path of codes so far.

    With coupled rows, once twice SETTLED_ROWS are open, paths whose older half differs from that of the best path are given up.
    """
    rows, columns = weight.shape
    source, inner, step, g = weight.double().numpy(), allocation.inner.double().numpy(), grid.step.double().numpy(), allocation.row_weight.double().numpy()
    outer = np.zeros((rows, rows)) if allocation.outer is None else allocation.outer.double().numpy()
    table, codes, error = train_gpt.NEXT_STATE[states], np.zeros((rows, columns), np.int16), np.zeros((rows, columns))
    for j in range(columns):
        targets = source[:, j] + error[:, :j] @ inner[:j, j]
        paths: dict[int, tuple[float, list[int], np.ndarray]] = {0: (0.0, [], np.zeros(rows))}
        settled = 0
        for i in range(rows):
            longer: dict[int, tuple[float, list[int], np.ndarray]] = {}
            for state, (cost, path, misses) in paths.items():
                wanted = (targets[i] + outer[i, :i] @ misses[:i]) / step[i, j]
                for branch in (0, 1):
                    residue = (2 * branch + state % 2) % 4
                    near = [code for code in range(math.floor(wanted) - 7, math.ceil(wanted) + 8) if code % 4 == residue and abs(code) <= grid.limit]
                    allowed = near or [code for code in range(-grid.limit, grid.limit + 1) if code % 4 == residue]
                    code = min(allowed, key=lambda code, wanted=wanted: abs(wanted - code))
                    total, reached = cost + g[i] * ((wanted - code) * step[i, j]) ** 2, table[state][branch]
                    if reached not in longer or total < longer[reached][0]:
                        own = misses.copy()
                        own[i] = targets[i] - code * step[i, j]
                        longer[reached] = (total, [*path, code], own)
            paths = longer
            if allocation.outer is not None and i + 1 - settled == 2 * train_gpt.SETTLED_ROWS:
                settled += train_gpt.SETTLED_ROWS
                best = min(paths.values())[1][:settled]
                paths = {state: survivor for state, survivor in paths.items() if survivor[1][:settled] == best}
        codes[:, j] = min(paths.values(), key=lambda survivor: survivor[0])[1]
        error[:, j] = source[:, j] - codes[:, j] * step[:, j]
    return codes


@pytest.mark.parametrize("limit", [train_gpt.RATE_LIMIT, 6])
def test_one_state_and_independent_rows_are_feedback_along_columns(limit: int) -> None:
    weight, _, allocation = problem(40, 150)
    grid = allocation.grid(1.0)._replace(limit=limit)
    expected, _ = plain_feedback(weight.double(), grid.step.double(), limit, allocation.inner.double(), spacing=2)
    assert bool((expected.abs() == limit).any()) == (limit == 6)
    codes = assign_two_sided(weight, grid, allocation._replace(outer=None), 1)
    assert codes.dtype == np.int16 and np.array_equal(codes, expected.numpy())
    assert np.array_equal(codes, train_gpt.assign_with_feedback(weight.double(), grid, allocation.inner).numpy())


@pytest.mark.parametrize(("rows", "columns", "states", "limit"), [(30, 70, 1, 32766), (100, 3, 1, 32766), (30, 4, 8, 32766), (150, 3, 8, 32766), (80, 3, 8, 7)])
def test_coupled_rows_are_searched_as_by_a_plain_loop(rows: int, columns: int, states: int, limit: int) -> None:
    """Fewer and more rows than the trellis settles at once, fewer and more columns than a block; at limit 7 many targets are out of reach."""
    weight, _, allocation = problem(rows, columns)
    grid = allocation.grid(0.7)._replace(limit=limit)
    assert np.array_equal(assign_two_sided(weight, grid, allocation, states), survivors(weight, grid, allocation, states))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [train_gpt.RATE_LIMIT, 5])
def test_the_trellis_finds_the_best_of_all_paths_of_independent_rows(limit: int, seed: int) -> None:
    """All 256 paths through 8 rows; column by column, because what a column leaves over moves the next."""
    rows, columns = 8, 3
    weight, _, allocation = problem(rows, columns, seed)
    grid, allocation = allocation.grid(1.5)._replace(limit=limit), allocation._replace(outer=None)
    codes = assign_two_sided(weight, grid, allocation, 8)
    step, inner = grid.step.double(), allocation.inner.double()
    error = weight.double() - points_of(codes, grid)
    every = torch.arange(-limit, limit + 1) if limit < 100 else torch.arange(-200, 201)
    for j in range(columns):
        targets = (weight[:, j].double() + error[:, :j] @ inner[:j, j]) / step[:, j]
        costs = allocation.row_weight.double()[:, None] * (step[:, j : j + 1] * (targets[:, None] - every)).square()
        classes = torch.stack([costs[:, every % 4 == residue].min(dim=1).values for residue in range(4)], dim=1)
        totals = []
        for branches in itertools.product((0, 1), repeat=rows):
            state, total = 0, 0.0
            for i, branch in enumerate(branches):
                total += float(classes[i, 2 * branch + state % 2])
                state = train_gpt.NEXT_STATE[8][state][branch]
            totals.append(total)
        chosen = sum(float(costs[i, (every == int(codes[i, j])).nonzero().item()]) for i in range(rows))
        assert chosen == pytest.approx(min(totals), rel=1e-5) and min(totals) < sorted(totals)[1]


@pytest.mark.parametrize("coupled", [True, False])
def test_codes_follow_the_trellis_within_the_limit_and_every_time_the_same(coupled: bool) -> None:
    weight, _, allocation = problem(90, 130)
    allocation = allocation if coupled else allocation._replace(outer=None)
    for limit in (train_gpt.RATE_LIMIT, 9):
        grid = allocation.grid(0.5)._replace(limit=limit)
        codes = assign_two_sided(weight, grid, allocation, 8)
        assert np.array_equal(codes % 2, follow(codes, train_gpt.NEXT_STATE[8]) % 2)
        assert 0.3 < (codes % 2).mean() < 0.7 and np.abs(codes).max() <= limit
        assert codes.tobytes() == assign_two_sided(weight, grid, allocation, 8).tobytes()


def test_the_trellis_is_a_decibel_better_than_rounding_at_the_same_density() -> None:
    """Known of 8 states: 1.10 dB at high rate (Marcellin and Fischer 1990: 1.09 on uniform sources). 50,000 squares leave a deviation of 0.02 dB."""
    rows, columns, step = 1600, 32, 0.04
    weight, grid = gaussian(rows, columns).float(), train_gpt.rate_grid(step, np.zeros(rows, np.int16), np.zeros(columns, np.int16))
    errors = {states: (weight - points_of(assign_two_sided(weight, grid, uncoupled(rows, columns), states), grid)).square().mean() for states in (1, 8)}
    assert 10 * math.log10(step**2 / 12 / errors[1]) == pytest.approx(0, abs=0.06)
    assert 10 * math.log10(step**2 / 12 / errors[8]) == pytest.approx(1.09, abs=0.06)


@pytest.mark.parametrize("states", [1, 8])
def test_feedback_along_rows_lowers_the_error_where_gradients_are_correlated(states: int) -> None:
    """On 100 rows, more than the trellis keeps open."""
    ratios = []
    for seed in range(6):
        weight, curvature, allocation = problem(100, 20, seed)
        grid = allocation.grid(0.5)
        both, one = (assign_two_sided(weight, grid, each, states) for each in (allocation, allocation._replace(outer=None)))
        h, g = curvature.inputs.double(), curvature.outputs.double()  # type: ignore[union-attr]
        errors = [weighted_error(weight.double() - points_of(codes, grid), h, g) for codes in (both, one)]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / 6 < 0.5


def test_the_trellis_is_ungerboecks_systematic_feedback_encoder() -> None:
    """Parity checks h0 = 13 (octal) = D^3 + D + 1 on the lower bit of the residue and h1 = 04 = D^2 on the upper one, in all words of 12 letters."""
    checks = (0o13, 0o04)

    def encoded(upper: Sequence[int]) -> list[int]:
        lower: list[int] = []
        for t in range(len(upper)):  # the lower bit at t from what came before, so that every check is even
            taps = [(lower, checks[0]), (upper, checks[1])]
            lower.append(sum(bits[t - delay] for bits, check in taps for delay in (1, 2, 3) if check >> delay & 1 and t >= delay) % 2)
        return [2 * high + low for high, low in zip(upper, lower, strict=True)]

    for upper in itertools.product((0, 1), repeat=12):
        state, word = 0, []
        for bit in upper:
            word.append(2 * bit + state % 2)
            state = train_gpt.NEXT_STATE[8][state][bit]
        assert word == encoded(upper)


# ----------------------------------------------------------------------------------------------------------------------
# Steps of `rate`


def test_quarter_powers_are_exact() -> None:
    exponents = np.arange(-300, 301)
    powers = train_gpt.quarter_powers(exponents)
    assert powers.dtype == np.float64 and np.array_equal(powers[exponents % 4 == 0], 2.0 ** np.arange(-75, 76))
    assert np.array_equal(powers, [(1.0, 2**0.25, 2**0.5, 2**0.75)[k % 4] * 2.0 ** (k // 4) for k in range(-300, 301)])
    assert np.array_equal(train_gpt.quarter_powers(exponents.astype(np.int16)), powers)


@pytest.mark.parametrize("kind", ["coupled", "diagonal", "tall"])
def test_steps_balance_what_every_weight_adds_to_the_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, curvature, _ = problem(12, 20)
    assert curvature.outputs is not None
    if kind == "diagonal":
        curvature = curvature._replace(outputs=curvature.outputs.diagonal())
    if kind == "tall":
        monkeypatch.setattr(train_gpt, "MOST_COUPLED_ROWS", 11)
    allocation, h = train_gpt.allocate(curvature), train_gpt.damped(curvature.inputs, 0.03)
    d = [math.exp(torch.linalg.slogdet(h[j:, j:])[1] - (torch.linalg.slogdet(h[j + 1 :, j + 1 :])[1] if j < 19 else 0.0)) for j in range(20)]
    factor = allocation.inner.double()
    torch.testing.assert_close(factor @ torch.diag(torch.tensor(d, dtype=torch.float64)) @ factor.T, h, rtol=0, atol=1e-5 * float(h.max()))
    g = allocation.row_weight.double()
    if kind == "coupled":
        assert allocation.outer is not None
        factor, outputs = allocation.outer.double(), train_gpt.damped(curvature.outputs, 0.03)
        assert torch.equal(factor.triu(), torch.eye(12, dtype=torch.float64))
        torch.testing.assert_close(factor.T @ torch.diag(g) @ factor, outputs, rtol=0, atol=1e-5 * float(outputs.max()))
    else:
        own = curvature.outputs.double() if kind == "diagonal" else curvature.outputs.double().diagonal()
        assert allocation.outer is None
        torch.testing.assert_close(g, own + 0.01 * own.mean(), rtol=1e-6, atol=0)
    for exponents, weights in ((allocation.row_exponents, g.numpy()), (allocation.column_exponents, np.array(d))):
        assert exponents.dtype == np.int16 and np.abs(exponents / 4 + np.log2(weights) / 2).max() <= 0.126
    grid = allocation.grid(0.3)
    expected = 0.3 * np.outer(2.0 ** (allocation.row_exponents / 4), 2.0 ** (allocation.column_exponents / 4))
    np.testing.assert_allclose((grid.step * grid.spacing).numpy(), expected, rtol=1e-6)


def test_weights_without_any_curvature_get_finite_steps() -> None:
    allocation = train_gpt.allocate(Curvature(torch.zeros(5, 5), torch.zeros(4, 4)))
    assert allocation.grid(1.0).step.isfinite().all() and (allocation.grid(1.0).step > 0).all()


def test_rows_out_of_reach_get_wider_steps_and_no_others() -> None:
    weight, _, allocation = problem(12, 20)
    weight[3, 5], weight[7, 0] = 6e4, -5000.0
    step = 1e-2
    wider = allocation.reaching(weight, step)
    reach, moved = 0.8 * train_gpt.RATE_LIMIT * wider.grid(step).step, wider.row_exponents - allocation.row_exponents
    assert (weight.abs() <= reach).all() and moved[3] > moved[7] > 0 and np.count_nonzero(moved) == 2
    assert ((weight.abs() * 2**0.25 > reach).any(dim=1).numpy() | (moved == 0)).all(), "no wider than needed"
    codes = assign_two_sided(weight, wider.grid(step), wider, 8)
    error = (weight - points_of(codes, wider.grid(step))).abs()
    assert np.abs(codes).max() <= train_gpt.RATE_LIMIT and error[3, 5] < 60 and error[7, 0] < 5


def scaled_gaussian(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns Gaussian weights and the standard deviation of each: that of its row times that of its column."""
    scales = (0.5 * gaussian(rows, 1, seed=seed + 10)).exp() * (0.5 * gaussian(1, columns, seed=seed + 20)).exp()
    return (gaussian(rows, columns, seed=seed) * scales).float(), scales


def test_scale_counts_are_those_of_rows_times_columns() -> None:
    rng = np.random.default_rng(0)
    sides = [train_gpt.quarter_powers(rng.integers(-20, 20, size)) for size in (30, 50)]
    weight = torch.from_numpy(np.outer(*sides) * rng.choice([-1.0, 1.0], (30, 50)))
    allocation = uncoupled(30, 50)._replace(row_exponents=rng.integers(-9, 9, 30).astype(np.int16), column_exponents=rng.integers(-9, 9, 50).astype(np.int16))
    steps = allocation.grid(1.0)
    classes = (4 * (weight.abs() / (2 * steps.step)).log2()).round().long().flatten().tolist()
    counts = train_gpt.scale_counts(weight, allocation)
    assert counts.tolist() == [classes.count(k) for k in range(-200, 201)]
    assert counts.sum() == 1500


def test_forecasts_fall_with_the_step_and_the_step_for_a_size_is_found() -> None:
    weight, _ = scaled_gaussian(64, 96)
    counts = train_gpt.scale_counts(weight, uncoupled(64, 96))
    bits = [train_gpt.forecast_bits(counts, 2.0**k) for k in np.arange(-12, 6, 0.5)]
    assert all(a > b for a, b in itertools.pairwise(bits))
    for wanted in (0.3, 1.0, 2.0, 4.0, 9.0):
        step = train_gpt.find_step(counts, wanted * 64 * 96)
        assert train_gpt.forecast_bits(counts, step) == pytest.approx(wanted * 64 * 96, rel=1e-9)


@pytest.mark.parametrize("states", [1, 8])
def test_forecasts_are_close_to_coded_sizes(states: int) -> None:
    """To 3%: the forecast has no bits for the scales of rows and columns, 1 to 2% here, and the finer half steps are the trellis' own."""
    weight, _ = scaled_gaussian(256, 512)
    allocation = uncoupled(256, 512)
    counts = train_gpt.scale_counts(weight, allocation)
    for bits in (2, 3, 5):
        step = train_gpt.find_step(counts, bits * weight.numel())
        codes = assign_two_sided(weight, allocation.grid(step), allocation, states)
        assert 8 * len(train_gpt.encode_matrix(codes, 2, states)) == pytest.approx(bits * weight.numel(), rel=0.03)
