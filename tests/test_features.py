"""The network's optional features: each against its definition, no leak through any of them, and every switch reaches the output and a gradient."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lively_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import BOS, DOCUMENTS, ROW, edited_one_by_one, make_adapters, plain_phase, random_rows, reference_losses
from torch import Tensor, nn

import train_gpt
from train_gpt import GPT, Config, Phase, Rows, Schedule

INPUT_ORDERS = ("bigram,smear,norm", "smear,bigram,norm", "bigram,norm,smear", "smear,norm,bigram", "norm,bigram,smear", "norm,smear,bigram")
BIGRAM: dict[str, Any] = {"bigram_hash_buckets": 11, "bigram_hash_dim": 4}
SMEAR: dict[str, dict[str, Any]] = {
    "blend": {"use_smeargate": True},
    "add": {"use_smeargate": True, "smeargate_kind": "add", "gate_window": 3},
}
VALUES: dict[str, Any] = {"value_embed_layers": "1,3", "value_embed_dim": 4}
GATED_HEADS: dict[str, Any] = {"attention_gate_window": 5, "attention_gate_scale": 1.5}
LOOPED: dict[str, Any] = {"num_loops": 2, "loop_start": 1, "loop_end": 2}
# Configurations that between them switch on everything, in two very different models.
BEYOND: dict[str, Any] = {"train_seq_len": 8, "rope_dims": 4, "qat_start_frac": 0.0}  # the rows of these tests are longer
EVERYTHING: dict[str, dict[str, Any]] = {
    "lanes": {
        **BEYOND, **BIGRAM, **SMEAR["add"], **VALUES, **GATED_HEADS, **LOOPED, "num_loops": 1, "num_layers": 5, "loop_embedding": True,
        "bigram_hash_scale": 0.5, "input_stages": "smear,bigram,norm", "embed_rank": 6, "rope_scaling": "ntk", "leaky_relu_slope": 0.3,
        "xsa_last_n": 3, "ln_scale": True, "skip_connections": "gated", "parallel_residuals": "lanes", "parallel_start_layer": 3,
        "logit_softcap_negative": 3.0, "dynamic_skip_last_n": 2,
    },
    "gptj": {
        **BEYOND, **BIGRAM, **SMEAR["blend"], **VALUES, "value_embed_layers": "0", "num_loops": 1, "loop_end": 1, "loop_embedding": True,
        "input_stages": "bigram,norm,smear", "num_layers": 3, "swiglu": True, "rope_scaling": "yarn", "xsa_last_n": 2, "ln_scale": True,
        "parallel_residuals": "gptj", "parallel_start_layer": 1, "tie_embeddings": False, "attention_gate_window": 16,
    },
}  # fmt: skip


def fresh_model(config: Config, seed: int = 0) -> GPT:
    """A model as training starts it, in float64."""
    torch.manual_seed(seed)
    model = GPT(config, torch.float64)
    model.init_weights()
    return model.double()


def named_model(config: Config, noise: float = 0.2) -> GPT:
    """A model whose every parameter is its start plus noise, drawn from its name alone: two models share what they have in common."""
    model = GPT(config, torch.float64)
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, start in module.starts.items() if isinstance(module, train_gpt.Part) else ():
                parameter = module.get_parameter(name)
                torch.manual_seed(zlib.crc32(re.sub(r"^stages\.\d+", "stages", f"{prefix}.{name}").encode()))
                start(parameter)
                parameter.add_(noise * torch.randn(parameter.shape))
    return model.double()


def first_phase(config: Config) -> Phase:
    """The phase at half of the run."""
    return Schedule(config).phase(0.5)


def losses_of(model: GPT, rows: Tensor, phase: Phase | None = None) -> Tensor:
    return model(rows[:, :-1], rows[:, 1:], phase or first_phase(model.config))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The whole forward against the reference


@pytest.mark.parametrize(
    "changes",
    [
        {"xsa_last_n": 1}, {"xsa_last_n": 3, "num_kv_heads": 1}, {"xsa_last_n": 4, "num_kv_heads": 4, **VALUES},
        GATED_HEADS, {"attention_gate_window": 16, "xsa_last_n": 2},
        SMEAR["blend"], SMEAR["add"], BIGRAM, {**BIGRAM, "bigram_hash_scale": 0.05},
        *({**BIGRAM, **SMEAR[kind], "input_stages": order} for kind, order in zip(["add", "blend"] * 3, INPUT_ORDERS, strict=True)),
        VALUES, {"embed_rank": 5}, {"embed_rank": 5, "tie_embeddings": False},
        {"leaky_relu_slope": 0.5}, {"swiglu": True}, {"ln_scale": True}, {"ln_scale": True, **GATED_HEADS, "swiglu": True},
        {"skip_connections": "none"}, {"skip_connections": "gated"}, {"dynamic_skip_last_n": 1}, {"dynamic_skip_last_n": 3, **LOOPED},
        {"logit_softcap_negative": 2.0},
        LOOPED, {**LOOPED, "loop_embedding": True, "skip_connections": "gated"}, {"num_loops": 3, "loop_end": 3, "loop_embedding": True},
        {"parallel_residuals": "gptj"}, {"parallel_residuals": "gptj", "parallel_start_layer": 2, **LOOPED},
        {"parallel_residuals": "lanes"}, {"parallel_residuals": "lanes", "parallel_start_layer": 1},
        {"parallel_residuals": "lanes", "parallel_start_layer": 2, "skip_connections": "gated"},
        {"parallel_residuals": "lanes", "parallel_start_layer": 3, **LOOPED, "loop_embedding": True},
        *EVERYTHING.values(),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items())[:80],
)  # fmt: skip
def test_forward_equals_the_reference(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    model, phase = lively_model(config), Schedule(config).scored_phase
    row = torch.tensor([[5, 6, BOS, 7, 8, 9, 7, 8, 9, 10]])
    with torch.no_grad():
        expected = reference_losses(model, config, phase.order, row[0, :-1].tolist(), row[0, 1:].tolist())
        torch.testing.assert_close(losses_of(model, row, phase)[0], torch.stack(expected), rtol=0, atol=1e-12)


# Attention


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_exclusive_attention_is_orthogonal_to_the_own_value(kv_heads: int) -> None:
    y, v = normal(2, 5, 4, 8), normal(2, 5, kv_heads, 8, seed=1)
    excluded = train_gpt.ExcludeSelf()(y, v)
    for head in range(4):
        own = v[:, :, head * kv_heads // 4]
        unit = own / own.norm(dim=-1, keepdim=True)
        along = (y[:, :, head] * unit).sum(dim=-1, keepdim=True)
        torch.testing.assert_close(excluded[:, :, head], y[:, :, head] - along * unit, rtol=0, atol=1e-14)
        assert (excluded[:, :, head] * unit).sum(dim=-1).abs().max() < 1e-14
        assert along.abs().min() > 1e-4, "there was something to exclude"


def test_exclusive_attention_survives_a_zero_value() -> None:
    y, v = normal(1, 3, 2, 4).requires_grad_(), torch.zeros(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    excluded = train_gpt.ExcludeSelf()(y, v)
    assert torch.equal(excluded, y)
    excluded.sum().backward()
    assert y.grad.isfinite().all()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 11])
def test_xsa_last_n_changes_the_last_layers_and_no_other(count: int) -> None:
    """Each block alone: one of the last `count` differs from its twin without, the others do not."""
    plain, config = small_config(), small_config(xsa_last_n=count)
    rows = random_rows(plain)
    for layer in range(4):
        without, with_xsa = (losses_of(lively_model(each), rows, Phase((layer,), 16)) for each in (plain, config))
        assert torch.equal(without, with_xsa) == (layer < 4 - count)


@pytest.mark.parametrize("window", [4, 16], ids=["sparse", "dense"])
def test_head_gates_follow_their_formula_and_start_at_one_half(window: int) -> None:
    gate = train_gpt.HeadGate(small_config(attention_gate_window=window, attention_gate_scale=1.5)).double()
    y, x, weight = normal(2, 3, 4, 5), normal(2, 3, 16, seed=1), normal(4, window, seed=2)
    with torch.no_grad():
        gate.starts["weight"](gate.weight)
        assert torch.equal(gate(y, x), y / 2)
        gate.weight.copy_(weight)
        for row, head, here in ((0, 0, 0), (0, 3, 1), (1, 1, 2), (1, 2, 0)):
            reading = sum(float(weight[head, i] * x[row, here, i]) for i in range(window))
            torch.testing.assert_close(gate(y, x)[row, here, head], y[row, here, head] / (1 + math.exp(-1.5 * reading)), rtol=0, atol=1e-14)


# Input stages


def stage_inputs(config: Config, tokens: Tensor) -> Rows:
    return GPT(config, torch.float64).rows(tokens, plain_phase(config))


def randomised(stage: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(stage.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + number))
    return stage.double()


def test_smear_blend_keeps_a_share_of_the_token_and_takes_the_rest_from_the_one_before() -> None:
    config = small_config(use_smeargate=True, smeargate_init=2.0)
    stage, tokens, x = train_gpt.SmearBlend(config).double(), torch.tensor([[5, 6, BOS, 7]]), normal(1, 4, 16)
    stage.starts["keep"](stage.keep)
    assert (stage.keep == 2).all()
    randomised(stage)
    keep = 1 / (1 + (-stage.keep.detach()).exp())
    expected = torch.stack([keep * x[0, 0], keep * x[0, 1] + (1 - keep) * x[0, 0], keep * x[0, 2], keep * x[0, 3] + (1 - keep) * x[0, 2]])
    torch.testing.assert_close(stage(x, tokens, stage_inputs(config, tokens), plain_phase(config))[0], expected, rtol=0, atol=1e-14)


def test_smear_add_adds_the_one_before_through_a_gate() -> None:
    config = small_config(**SMEAR["add"])
    stage, tokens, x = randomised(train_gpt.SmearAdd(config)), torch.tensor([[5, 6, BOS, 7]]), normal(1, 4, 16)
    with torch.no_grad():
        gates = [float(stage.strength) / (1 + math.exp(-float(stage.weight[0] @ x[0, here, :3]))) for here in range(4)]
    expected = torch.stack([x[0, 0], x[0, 1] + gates[1] * x[0, 0], x[0, 2], x[0, 3] + gates[3] * x[0, 2]])
    torch.testing.assert_close(stage(x, tokens, stage_inputs(config, tokens), plain_phase(config))[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_bigram_hash_adds_the_row_of_the_pair(scale: float) -> None:
    """Tokens up to 65535 are hashed without overflow."""
    config = small_config(**BIGRAM, bigram_hash_scale=scale, vocab_size=65536)
    stage, tokens, x = randomised(train_gpt.BigramHash(config)), torch.tensor([[65535, 65534, BOS, 7]]), normal(1, 4, 16)
    with torch.no_grad():
        factor = float(stage.scale.scale) if scale else 1.0
        pairs = [factor * stage.project.weight @ stage.table.weight[bucket] for bucket in ((65535 * 92821 + 65534) % 11, (BOS * 92821 + 7) % 11)]
    expected = torch.stack([x[0, 0], x[0, 1] + pairs[0], x[0, 2], x[0, 3] + pairs[1]])
    torch.testing.assert_close(stage(x, tokens, stage_inputs(config, tokens), plain_phase(config))[0], expected, rtol=0, atol=1e-13)


def embedded(model: GPT, tokens: Tensor) -> Tensor:
    """What the first block reads: embedding and input stages."""
    phase = plain_phase(model.config)
    rows, x = model.rows(tokens, phase), model.embedding(tokens, phase, model.dtype)
    for stage in model.stages:
        x = stage(x, tokens, rows, phase)
    return x


@settings(max_examples=40, deadline=None)
@given(
    before=st.lists(st.integers(0, 23), min_size=1, max_size=7), document=st.lists(st.integers(2, 23), max_size=8),
    order=st.sampled_from(INPUT_ORDERS), kind=st.sampled_from(sorted(SMEAR)),
)  # fmt: skip
def test_a_document_in_the_middle_of_a_row_is_embedded_as_at_the_beginning(before: list[int], document: list[int], order: str, kind: str) -> None:
    """Bit for bit, whatever stands before it."""
    model = lively_model(small_config(**BIGRAM, **SMEAR[kind], input_stages=order), torch.float32)
    own = [BOS, *document]
    with torch.no_grad():
        inside, alone = (embedded(model, torch.tensor([(tokens + [5] * 16)[:16]]))[0] for tokens in (before + own, own))
    assert torch.equal(inside[len(before) : len(before) + len(own)], alone[: len(own)])


# Leaks, with features on


def losses_in_float32(config: Config, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return losses_of(lively_model(config, torch.float32), rows)


def leak_config(order: str, kind: str, base: str) -> Config:
    smear = {"smeargate_kind": kind, "gate_window": 3}
    return small_config(**{**EVERYTHING[base], **smear, "input_stages": order})


@pytest.mark.parametrize("base", sorted(EVERYTHING))
@pytest.mark.parametrize("kind", sorted(SMEAR))
@pytest.mark.parametrize("order", INPUT_ORDERS)
def test_with_everything_on_editing_a_document_leaves_the_others_alone(order: str, kind: str, base: str) -> None:
    span = DOCUMENTS["middle"]
    rows, edited = edited_one_by_one(range(span.start + 1, span.stop))
    config = leak_config(order, kind, base)
    changed = (losses_in_float32(config, rows) != losses_in_float32(config, edited)).any(dim=0)
    inside = torch.tensor([index in span for index in range(len(ROW) - 1)])
    assert not changed[~inside].any()
    assert changed[inside].all()


@pytest.mark.parametrize("doc_mask", [True, False])
@pytest.mark.parametrize("base", sorted(EVERYTHING))
@pytest.mark.parametrize("token", [None, BOS], ids=["another token", "a new document"])
def test_with_everything_on_editing_a_token_leaves_earlier_losses_alone(token: int | None, base: str, doc_mask: bool) -> None:
    positions = [position for position in range(1, 15) if ROW[position] != BOS]
    rows, edited = (each[[position - 1 for position in positions]] for each in edited_one_by_one(range(1, 15), token))
    config = small_config(**EVERYTHING[base], doc_mask=doc_mask)
    changed = losses_in_float32(config, rows) != losses_in_float32(config, edited)
    for row, position in enumerate(positions):
        assert not changed[row, : position - 1].any(), f"token {position} is seen by the target before it"
        assert changed[row, position - 1], "the edited target itself changes"
        assert changed[row, position], "and so does the loss of the next"


# Depth recurrence


def test_loops_equal_an_unrolled_model_with_shared_weights() -> None:
    """Three blocks run three times, against nine blocks with copies: the same losses, and each gradient is the sum over the copies."""
    looped = lively_model(small_config(num_layers=3, num_loops=2, loop_end=2, **GATED_HEADS))
    unrolled = lively_model(small_config(num_layers=9, **GATED_HEADS))
    phase = first_phase(looped.config)
    assert phase.order == (0, 1, 2) * 3
    with torch.no_grad():
        for layer, block in enumerate(unrolled.blocks):
            block.load_state_dict(looped.blocks[layer % 3].state_dict())
        unrolled.embedding.load_state_dict(looped.embedding.state_dict())
        unrolled.skip.load_state_dict(looped.skip.state_dict())
    rows = random_rows(looped.config)
    results = [losses_of(model, rows) for model in (looped, unrolled)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    for result in results:
        result.sum().backward()
    totals: dict[str, Tensor] = {}
    for name, parameter in unrolled.named_parameters():
        shared = re.sub(r"^blocks\.(\d)", lambda found: f"blocks.{int(found[1]) % 3}", name)
        totals[shared] = totals.get(shared, torch.zeros(())) + parameter.grad
    for name, parameter in looped.named_parameters():
        torch.testing.assert_close(parameter.grad, totals[name], rtol=1e-11, atol=1e-12)


class Recorder:
    """In place of blocks, skips and loop embedding: notes what the stack hands over. The output of executed slot s is the number s."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.passes: list[int] = []
        self.pops: list[tuple[int, int, int]] = []  # slot, index of the skip's weight, slot that pushed

    def skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        self.pops.append((len(self.layers), index, int(skip)))
        return x

    def loop_embedding(self, x: Tensor, passes: int) -> Tensor:
        self.passes.append(passes)
        return x


class RecordedBlock(nn.Module):
    """In place of a block: tells the recorder that it ran."""

    def __init__(self, recorder: Recorder, layer: int) -> None:
        super().__init__()
        self.recorder, self.layer = recorder, layer

    def enter(self, lanes: train_gpt.Lanes) -> train_gpt.Lanes:
        return lanes

    def forward(self, lanes: train_gpt.Lanes, *context: object) -> train_gpt.Lanes:
        self.recorder.layers.append(self.layer)
        return (torch.tensor(len(self.recorder.layers) - 1),)


class Called(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: object) -> object:
        return self.function(*arguments)


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [
        ({"num_layers": 11, "num_loops": 2, "loop_start": 3, "loop_end": 5}, [0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10]),  # PR #1855
        ({"num_layers": 11}, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]),
        ({"num_layers": 3, "num_loops": 2, "loop_end": 2}, [0, 1, 2, 0], [1, 2, 0, 1, 2]),
        ({"num_layers": 4}, [0, 1], [2, 3]),
    ],
)
def test_the_first_half_of_the_executed_layers_pushes_and_the_second_pops_the_latest(changes: dict[str, int], encoder: list[int], decoder: list[int]) -> None:
    model, recorder = GPT(small_config(**changes)), Recorder()
    assert model.skip.scale.shape[0] == len(encoder)
    model.blocks = nn.ModuleList(RecordedBlock(recorder, layer) for layer in range(changes["num_layers"]))
    model.skip, model.loop_embedding = Called(recorder.skip), Called(recorder.loop_embedding)
    phase = first_phase(model.config)
    assert phase.order == (*encoder, *decoder)
    model.hidden(torch.tensor([[1]]), phase, None)
    assert recorder.layers == encoder + decoder
    half = len(encoder)
    assert recorder.pops == [(half + index, index, half - 1 - index) for index in range(half)], "the last layer of an odd number pops nothing"
    seen: Counter[int] = Counter()
    for layer, passes in zip(encoder + decoder, recorder.passes, strict=True):
        assert passes == seen[layer]
        seen[layer] += 1


def test_before_the_loops_start_the_skips_are_those_of_the_plain_order() -> None:
    """The first weights of the looped model's skips serve; the others rest, with a gradient of zero."""
    config = small_config(**LOOPED, enable_looping_at=0.6)
    model, plain = lively_model(config), lively_model(small_config())
    phase = first_phase(config)
    assert phase.order == (0, 1, 2, 3)
    state = {name: value[:2] if name == "skip.scale" else value for name, value in model.state_dict().items()}
    plain.load_state_dict(state)
    rows = random_rows(config)
    losses = losses_of(model, rows)
    torch.testing.assert_close(losses, losses_of(plain, rows), rtol=0, atol=0)
    losses.sum().backward()
    assert (model.skip.scale.grad[:2] != 0).all()
    assert (model.skip.scale.grad[2:] == 0).all()


# Two lanes


def test_lanes_part_before_the_skip_which_reaches_the_first_alone() -> None:
    config = small_config(parallel_residuals="lanes", parallel_start_layer=2)
    model, received = lively_model(config), []
    for layer in range(4):
        block = model.blocks[layer]
        block.register_forward_pre_hook(lambda module, arguments: received.append(arguments[0]))
    rows, outputs = random_rows(config), []
    model.blocks[1].register_forward_hook(lambda module, arguments, output: outputs.append(output))
    losses_of(model, rows)
    assert [len(lanes) for lanes in received] == [1, 1, 2, 2]
    parted = outputs[0][0]
    assert torch.equal(received[2][1], parted)
    torch.testing.assert_close(received[2][0], parted + model.skip.scale[0] * parted, rtol=0, atol=1e-14)


def test_routes_start_with_both_outputs_in_both_lanes() -> None:
    routes = train_gpt.Routes(small_config(parallel_residuals="lanes")).double()
    lanes, attended, transformed = (normal(2, 3, seed=0), normal(2, 3, seed=1)), normal(2, 3, seed=2), normal(2, 3, seed=3)
    with torch.no_grad():
        for name, start in routes.starts.items():
            start(routes.get_parameter(name))
        written = routes(lanes, attended, transformed, 2)
    for before, after in zip(lanes, written, strict=True):
        torch.testing.assert_close(after, 1.1 * before + attended + transformed, rtol=0, atol=1e-6)


# Embedding and MLP


@pytest.mark.parametrize("tied", [True, False])
def test_a_factored_embedding_equals_the_full_table_of_its_product(tied: bool) -> None:
    thin, full = (lively_model(small_config(embed_rank=rank, tie_embeddings=tied)) for rank in (5, 0))
    weights = {name: parameter.detach() for name, parameter in thin.named_parameters()}
    weights["embedding.table.weight"] = weights["embedding.table.weight"] @ weights.pop("embedding.widen.weight").T
    train_gpt.load_weights(full, weights)
    rows = random_rows(thin.config)
    torch.testing.assert_close(losses_of(thin, rows), losses_of(full, rows), rtol=0, atol=1e-12)
    assert thin.embedding.table.weight.shape == (24, 5)


@pytest.mark.parametrize(("multiple", "width", "gated_width"), [(3.0, 48, 32), (2.0, 32, 21), (0.5, 8, 5)])
def test_swiglu_has_two_thirds_of_the_width_so_that_weights_are_as_many(multiple: float, width: int, gated_width: int) -> None:
    plain, gated = (train_gpt.Block(small_config(mlp_mult=multiple, swiglu=swiglu), 0).mlp for swiglu in (False, True))
    assert plain.up.weight.shape == (width, 16)
    assert gated.up.weight.shape == gated.gate.weight.shape == (gated_width, 16)
    assert gated.down.weight.shape == (16, gated_width)
    sizes = [sum(parameter.numel() for parameter in mlp.parameters()) for mlp in (gated, plain)]
    assert sizes[1] - 3 * 16 < sizes[0] <= sizes[1]


# RoPE beyond the training length


@pytest.mark.parametrize("length", [5, 64])
@pytest.mark.parametrize("scaling", ["ntk", "yarn"])
def test_scaled_rope_is_plain_up_to_the_training_length(scaling: str, length: int) -> None:
    settings = {"train_seq_len": 64, "rope_dims": 8, "model_dim": 32, "rope_base": 50.0}
    scaled, plain = (train_gpt.rotary_frequencies(small_config(**settings, rope_scaling=name), length) for name in (scaling, "none"))
    assert torch.equal(scaled, plain)
    assert not torch.equal(train_gpt.rotary_frequencies(small_config(**settings, rope_scaling=scaling), 65), plain)


def test_ntk_slows_the_slowest_frequency_by_the_stretch_and_the_fastest_not_at_all() -> None:
    config = small_config(train_seq_len=64, rope_dims=8, model_dim=32, rope_base=50.0, rope_scaling="ntk")
    got = train_gpt.rotary_frequencies(config, 192)
    base = 50.0 * 3 ** (8 / 6)
    torch.testing.assert_close(got, torch.tensor([base ** (-pair / 4) for pair in range(4)]), rtol=1e-5, atol=0)
    torch.testing.assert_close(got[[0, 3]], torch.tensor([1.0, 50.0 ** (-3 / 4) / 3]), rtol=1e-5, atol=0)


def test_yarn_slows_what_turned_once_and_keeps_what_turned_often() -> None:
    """Ramp between 1 and 32 turns in a training row, as alpha and beta of the paper."""
    config = small_config(train_seq_len=512, rope_dims=8, model_dim=32, rope_base=10000.0, rope_scaling="yarn", train_batch_tokens=512, micro_batch_tokens=512)
    got, expected = train_gpt.rotary_frequencies(config, 1024), []
    for pair in range(4):
        frequency = 10000.0 ** (-pair / 4)
        ramp = min(max((512 * frequency / (2 * math.pi) - 1) / 31, 0.0), 1.0)
        expected.append((1 - ramp) * frequency / 2 + ramp * frequency)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=0)
    assert got[0] == 1.0, "81 turns: kept"
    assert got[3] == pytest.approx(10000.0 ** (-3 / 4) / 2, rel=1e-5), "less than one turn: slowed by the whole stretch"
    assert 0.05 < expected[1] < 0.1, "8 turns: in between"


# Widths of numbers, adapters


@pytest.mark.parametrize("base", sorted(EVERYTHING))
def test_with_everything_on_a_qat_phase_computes_with_what_the_role_table_would_export(base: str) -> None:
    config = small_config(**EVERYTHING[base], matrix_bits=5, embed_bits=3)
    model, exported, rows = named_model(config), named_model(config), random_rows(config)
    rules, roles = train_gpt.role_rules(config), train_gpt.parameter_roles(exported)
    with torch.no_grad():
        for name, parameter in exported.named_parameters():
            if (bits := rules[roles[name]].bits) < 16:
                grid = train_gpt.rowmax_grid(parameter, bits)
                parameter.copy_(grid.dequantise(grid.round(parameter)))
    plain, quantised = Schedule(config).scored_phase, first_phase(config)
    assert quantised == replace(plain, qat=True)
    torch.testing.assert_close(losses_of(model, rows, quantised), losses_of(exported, rows, plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", sorted(EVERYTHING))
def test_with_everything_on_activations_stay_in_bfloat16_and_losses_near_those_of_float32(base: str) -> None:
    config = small_config(**EVERYTHING[base])
    model, rows, phase = lively_model(config, torch.float32), random_rows(config), Schedule(config).scored_phase
    exact, seen = losses_of(model, rows, phase), set()
    model.dtype = torch.bfloat16
    for module in (*model.blocks, *model.stages):
        module.register_forward_hook(lambda module, arguments, output: seen.update(x.dtype for x in (output if isinstance(output, tuple) else [output])))
    rough = losses_of(model, rows, phase)
    assert seen == {torch.bfloat16}
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.02


@pytest.mark.parametrize("base", sorted(EVERYTHING))
def test_with_everything_on_zero_adapters_change_nothing_and_each_can_train(base: str) -> None:
    config = small_config(**EVERYTHING[base])
    model, phase, rows = lively_model(config, torch.float32).requires_grad_(False), first_phase(config), random_rows(config)
    adapters = make_adapters(model, phase.order, {})
    adapted = model(rows[:, :-1], rows[:, 1:], phase, adapters)
    with torch.no_grad():
        assert torch.equal(adapted, losses_of(model, rows, phase))
    adapted.sum().backward()
    assert all(set(slot) == {"q", "k", "v", "out", "up", "down"} | ({"gate"} if config.swiglu else set()) for slot in adapters)
    assert all(adapter.b.grad.abs().max() > 0 for slot in adapters for adapter in slot.values())


# Initial weights


STARTING_VALUES: dict[str, dict[str, float]] = {
    "lanes": {
        "stages.0.strength": 0, "stages.0.weight": 0, "stages.1.project.weight": 0, "stages.1.scale.scale": 0.5, "value_embedding.scale.scale": 0.1,
        "blocks.1.attention.add_value.scale.scale": 1, "blocks.3.attention.add_value.scale.scale": 1, "skip.scale": 1, "skip.gate": 0,
        "blocks.3.routes.keep": 1.1, "blocks.3.routes.write": 1, "loop_embedding.vectors": 0,
        "dynamic_skips.3.weight": 0, "dynamic_skips.4.weight": 0,
    },
    "gptj": {
        "stages.0.project.weight": 0, "stages.2.keep": 3, "value_embedding.scale.scale": 0.1, "blocks.0.attention.add_value.scale.scale": 1,
        "skip.scale": 1, "loop_embedding.vectors": 0, "head.table.weight": 0,
    },
}  # fmt: skip
IN_EVERY_BLOCK = {
    "mix": None, "attention_scale": 1, "mlp_scale": 1, "attention.q_gain": 1.5, "attention.head_gate.weight": 0,
    "attention.out.weight": 0, "mlp.down.weight": 0,
}  # fmt: skip


@pytest.mark.parametrize("base", sorted(EVERYTHING))
def test_with_everything_on_initial_weights_are_these_constants_and_otherwise_random(base: str) -> None:
    config = small_config(**EVERYTHING[base], qk_gain_init=1.5)
    expected = STARTING_VALUES[base] | {f"blocks.{layer}.{name}": value for layer in range(config.num_layers) for name, value in IN_EVERY_BLOCK.items()}
    models = []
    for seed in (0, 0, 1):
        models.append(GPT(config))
        for parameter in models[-1].parameters():
            nn.init.constant_(parameter, float("nan"))
        torch.manual_seed(seed)
        models[-1].init_weights()
    for (name, first), again, other in zip(models[0].named_parameters(), *(model.parameters() for model in models[1:]), strict=True):
        assert torch.equal(first, again), name
        assert torch.equal(first, other) == (name in expected), name
        if (value := expected.pop(name, None)) is not None:
            assert torch.equal(first, torch.full_like(first, value)), name
    assert expected == {}


def test_tables_start_small_and_an_untied_embedding_does_not() -> None:
    config = small_config(**VALUES, bigram_hash_buckets=2000, bigram_hash_dim=4, vocab_size=2000, tie_embeddings=False)
    model = fresh_model(config)
    deviations = {"stages.0.table.weight": 0.01, "value_embedding.table.weight": 0.01, "embedding.table.weight": 1.0}
    for name, deviation in deviations.items():
        assert model.get_parameter(name).std().item() == pytest.approx(deviation, rel=0.05), "8000 or more draws: 6 standard errors"


# Features that start as nothing


@pytest.mark.parametrize(
    "changes",
    [SMEAR["add"], BIGRAM, {**BIGRAM, "bigram_hash_scale": 0.05}, {**BIGRAM, **SMEAR["add"], "input_stages": "norm,smear,bigram"}],
    ids=["smear", "bigram", "scaled bigram", "both, after the norm"],
)
def test_what_starts_at_zero_leaves_every_initial_loss_bit_for_bit(changes: dict[str, Any]) -> None:
    plain, config = small_config(), small_config(**changes)
    without, added = named_model(plain), named_model(config)
    for module in added.stages:
        for part in (part for part in module.modules() if isinstance(part, train_gpt.Part)):
            for name, start in part.starts.items():
                start(part.get_parameter(name).data)
    rows = random_rows(plain)
    assert torch.equal(losses_of(added, rows), losses_of(without, rows))
    assert not torch.equal(losses_of(named_model(config), rows), losses_of(without, rows)), "it is there"


def test_the_loop_embedding_starts_as_nothing() -> None:
    without, added = (named_model(small_config(**LOOPED, loop_embedding=on)) for on in (False, True))
    rows = random_rows(without.config)
    assert not torch.equal(losses_of(added, rows), losses_of(without, rows))
    added.loop_embedding.starts["vectors"](added.loop_embedding.vectors.data)
    assert added.loop_embedding.vectors.shape == (3, 16)
    assert torch.equal(losses_of(added, rows), losses_of(without, rows))


# Switches


# Fields of the config's model section that are sizes. Every other one is a switch.
SIZES = {"vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "bigram_hash_dim", "value_embed_dim"}
# Switches of the initial weights, which the config has among the settings of training.
STARTS = {"qk_gain_init", "smeargate_init", "matrix_init", "tied_embed_init_std"}
# Switches of what a model with these weights computes: when its loops run, and how far its rows reach.
PHASES = {"enable_looping_at", "rope_scaling"}
# Switches of the grids that QAT computes with; test_roles.py tries the others of these.
GRIDS = {"quant_scheme", "matrix_bits", "mlp_bits", "embed_bits", "layer_bits", "qat_loop_noise"}
# In which of EVERYTHING a switch is tried, and the value it has instead.
SWITCHES: list[tuple[str, str, Any]] = [
    ("lanes", "bos_id", 2), ("lanes", "leaky_relu_slope", 0.0), ("gptj", "swiglu", False), ("gptj", "tie_embeddings", True), ("lanes", "embed_rank", 0),
    ("lanes", "input_stages", "bigram,smear,norm"), ("gptj", "input_stages", "norm,bigram,smear"), ("gptj", "use_smeargate", False),
    ("lanes", "use_smeargate", False), ("gptj", "smeargate_kind", "add"), ("gptj", "smeargate_init", 0.0), ("gptj", "bigram_hash_buckets", 0),
    ("lanes", "bigram_hash_scale", 0.0), ("lanes", "value_embed_layers", "1"), ("gptj", "value_embed_layers", ""), ("gptj", "rope_base", 100.0),
    ("lanes", "rope_dims", 2), ("lanes", "rope_scaling", "none"), ("gptj", "rope_scaling", "none"), ("lanes", "rope_scaling", "yarn"),
    ("lanes", "xsa_last_n", 2), ("gptj", "xsa_last_n", 0), ("lanes", "attention_gate_window", 0), ("lanes", "attention_gate_scale", 0.5),
    ("gptj", "attention_gate_window", 3), ("lanes", "gate_window", 2), ("gptj", "ln_scale", False), ("lanes", "skip_connections", "none"),
    ("lanes", "skip_connections", "scaled"), ("gptj", "skip_connections", "none"), ("lanes", "dynamic_skip_last_n", 1), ("gptj", "parallel_residuals", "none"),
    ("lanes", "parallel_residuals", "gptj"), ("lanes", "parallel_start_layer", 4), ("gptj", "parallel_start_layer", 2),
    ("lanes", "num_loops", 2), ("lanes", "loop_start", 2),
    ("lanes", "loop_end", 1), ("gptj", "enable_looping_at", 0.9), ("lanes", "loop_embedding", False), ("gptj", "logit_softcap", 3.0),
    ("lanes", "logit_softcap_negative", 0.0), ("lanes", "doc_mask", False), ("lanes", "matrix_bits", 4), ("gptj", "matrix_bits", 4),
    ("lanes", "embed_bits", 4), ("gptj", "embed_bits", 16), ("lanes", "mlp_bits", 4), ("gptj", "layer_bits", "1-2:3"), ("lanes", "layer_bits", "4:16"),
    ("lanes", "quant_scheme", "gptq"), ("lanes", "qat_loop_noise", 0.5),
    ("gptj", "qk_gain_init", 3.0), ("gptj", "matrix_init", "uniform"), ("lanes", "tied_embed_init_std", 0.5),
]  # fmt: skip


def test_the_list_of_switches_is_complete() -> None:
    names = [each.name for each in fields(Config)]
    section = set(names[names.index("vocab_size") : names.index("doc_mask") + 1])
    assert {switch for _, switch, _ in SWITCHES} == (section - SIZES) | STARTS | PHASES | GRIDS
    elsewhere = {"gptq_lite_scope", *(name for name in names if name.endswith("_clip_sigmas"))}
    statistics = {"calibration_tokens", "bytes_cap"}  # they move frozen grids alone
    assert set(train_gpt.GRID_SETTINGS) == GRIDS | elsewhere | statistics
    assert set(train_gpt.MODEL_SETTINGS) == section | {"train_seq_len"}


def long_rows() -> Tensor:
    return random_rows(small_config(), 2)


def loss_and_gradients(model: GPT, forward: Any, order: tuple[int, ...] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    rows, phase = long_rows(), first_phase(model.config)
    losses = forward(rows[:, :-1], rows[:, 1:], replace(phase, order=order or phase.order))
    losses.sum().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def everything() -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Losses and gradients of EVERYTHING."""
    models = {name: named_model(small_config(**changes)) for name, changes in EVERYTHING.items()}
    return {name: loss_and_gradients(model, model) for name, model in models.items()}


@pytest.mark.parametrize(("base", "order", "backend"), [("lanes", (0, 1, 2, 3), "aot_eager"), ("gptj", (0, 2), "eager")])
def test_with_everything_on_the_compiled_model_is_that_of_eager_mode(base: str, order: tuple[int, ...], backend: str) -> None:
    """The next test traces what is executed into one graph, but runs that graph as it is; here it goes through the compiler's own passes.

    One layer of each kind and what its dynamic skip reads, no QAT (test_model.py compiles that) and one with its backward pass, because compiling takes long.
    """
    torch._dynamo.reset()
    eager, model = (named_model(small_config(**{**EVERYTHING[base], "qat_start_frac": 1.0})) for _ in range(2))
    compiled = loss_and_gradients(model, torch.compile(model, fullgraph=True, dynamic=False, backend=backend), order)
    torch.testing.assert_close(compiled, loss_and_gradients(eager, eager, order), rtol=1e-11, atol=1e-12)


# These are traced by the compiler as well: they make forward read the phase or keep something from layer to layer.
TRACED = {"num_loops", "enable_looping_at", "dynamic_skip_last_n", "quant_scheme", "qat_loop_noise"}


@pytest.mark.parametrize(("base", "switch", "value"), SWITCHES)
def test_each_switch_changes_losses_and_gradients(base: str, switch: str, value: object, everything: dict[str, tuple[Tensor, dict[str, Tensor]]]) -> None:
    config = replace(small_config(**EVERYTHING[base]), **{switch: value})
    assert train_gpt.validate(config) == []
    losses, gradients = everything[base]
    torch._dynamo.reset()
    model = named_model(config)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend="eager") if base == "lanes" and switch in TRACED else model
    changed, changed_gradients = loss_and_gradients(model, forward)
    assert (changed - losses).abs().max() > 1e-5
    shared = [name for name, gradient in gradients.items() if name in changed_gradients and gradient.shape == changed_gradients[name].shape]
    assert any((gradients[name] - changed_gradients[name]).abs().max() > 1e-5 for name in shared)


# Presets


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_parameter_of_a_preset_has_one_role_and_a_gradient_in_every_phase(preset: str) -> None:
    config = train_gpt.parse_config([f"PRESET={preset}", "SCALE=tiny"], {})
    model = lively_model(config, torch.float32)
    roles = train_gpt.parameter_roles(model)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(roles) == sorted(names)
    by_role = train_gpt.parameters_by_role(model)
    assert sorted(name for group in by_role.values() for name in group) == sorted(names)
    rows = torch.randint(2, config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))
    for part in train_gpt.weight_parts(model).values():
        if config.qat_start_frac < 1 and config.quant_scheme in train_gpt.FROZEN_SCHEMES:
            part.freeze(train_gpt.rate_grid(0.01, *(np.zeros(side, np.int16) for side in part.weight.shape)))
    for phase in Schedule(config).phases():
        model.zero_grad(set_to_none=True)
        losses_of(model, rows, phase).sum().backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
        assert without == [], phase
