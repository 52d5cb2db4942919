"""The network: attention and RoPE by definition, no leak between documents or from the future, one forward equal to a plain reference.

`python tests/test_model.py --regenerate` rewrites the golden numbers at the end of this file.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import lively_model, small_config
from torch import Tensor, nn

import train_gpt
from train_gpt import GPT, Config, Phase, Rows

BOS = 1
PROJECTIONS = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
# Three documents and the end of one that began in an earlier row; the last is a lone BOS.
ROW = torch.tensor([7, 9, 7, BOS, 5, 6, 7, 8, BOS, 9, 10, 9, 10, 9, 11, BOS])
DOCUMENTS = {"cut off": range(3), "middle": range(3, 8), "later": range(8, 15), "lone start": range(15, 16)}


def plain_phase(config: Config, qat: bool = False) -> Phase:
    return Phase(tuple(range(config.num_layers)), config.train_seq_len, qat=qat)


def random_rows(config: Config, count: int = 3, seed: int = 0) -> Tensor:
    """Rows of train_seq_len + 1 tokens with document starts here and there."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, config.vocab_size, (count, config.train_seq_len + 1), generator=generator)
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.2, BOS)


# Attention


def qkv(heads: int, kv_heads: int, length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa_equals_the_reference_in_values_and_gradients(kv_heads: int, masked: bool) -> None:
    tokens = random_rows(small_config(train_seq_len=40, train_batch_tokens=40), 2)[:, :40]
    mask = train_gpt.document_mask(tokens, BOS) if masked else None
    results = []
    for backend in (train_gpt.attention_sdpa, train_gpt.attention_reference):
        inputs = qkv(4, kv_heads)
        y = backend(*inputs, mask)
        y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y))
        results.append([y, *(tensor.grad for tensor in inputs)])
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, rtol=0, atol=1e-13)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_reference_is_softmax_over_visible_positions(masked: bool) -> None:
    q, k, v = (tensor.detach() for tensor in qkv(4, 2, length=6))
    tokens = torch.tensor([[5, BOS, 6, 7, BOS, 8], [BOS, 5, 5, 5, 5, BOS]])
    mask = train_gpt.document_mask(tokens, BOS) if masked else None
    expected = torch.zeros_like(q)
    for row, head, here in itertools.product(range(2), range(4), range(6)):
        weights = {}
        for there in range(here, -1, -1):
            weights[there] = math.exp(float(q[row, head, here] @ k[row, head // 2, there]) / math.sqrt(8))
            if masked and tokens[row, there] == BOS:
                break
        for there, weight in weights.items():
            expected[row, head, here] += weight / sum(weights.values()) * v[row, head // 2, there]
    torch.testing.assert_close(train_gpt.attention_reference(q, k, v, mask), expected, rtol=0, atol=1e-14)


# RoPE


@pytest.mark.parametrize("base", [10000.0, 7.0])
def test_rotary_table_holds_the_angles_of_the_paper(base: float) -> None:
    config = small_config(rope_base=base, rope_dims=6, model_dim=32)
    cos, sin = train_gpt.rotary_table(config, 50, torch.device("cpu"), torch.float64)
    angles = torch.tensor([[position * base ** (-2 * pair / 6) for pair in range(3)] for position in range(50)], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=5e-6)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=5e-6)


def bare_rows(cos: Tensor, sin: Tensor) -> Rows:
    """Rows of one document that hold positions and nothing else."""
    return Rows(cos, sin, partial(train_gpt.attention_reference, mask=None), torch.empty(0), None)


def rotated(x: Tensor, positions: Tensor, dims: int) -> Tensor:
    """The vector x (C,) rotated to each of `positions`: (len(positions), C)."""
    config = small_config(rope_base=100.0, rope_dims=dims, model_dim=4 * len(x))
    cos, sin = train_gpt.rotary_table(config, int(positions.max()) + 1, x.device, x.dtype)
    return train_gpt.rotate(x.expand(1, 1, len(positions), -1), bare_rows(cos[positions], sin[positions]))[0, 0]


@pytest.mark.parametrize("dims", [2, 4, 8])
def test_scores_depend_on_relative_position_only(dims: int) -> None:
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(30)
    scores = rotated(q, positions, dims) @ rotated(k, positions, dims).T
    for distance in range(-29, 30):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1, "and they do depend on it"


@pytest.mark.parametrize("dims", [2, 4])
def test_partial_rope_leaves_the_other_dimensions_and_every_norm_alone(dims: int) -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = rotated(x, torch.arange(30), dims)
    assert torch.equal(y[:, dims:], x[dims:].expand(30, -1))
    assert (y[1:, :dims] != x[:dims]).all()
    torch.testing.assert_close(y.norm(dim=1), x.norm().expand(30), rtol=1e-6, atol=0)


def test_rope_dims_reaches_attention() -> None:
    rows = random_rows(small_config())
    losses = [lively_model(config := small_config(rope_dims=dims))(rows[:, :-1], rows[:, 1:], plain_phase(config)) for dims in (0, 2, 4)]
    assert torch.equal(losses[0], losses[2]), "0 = all four of a head"
    assert not torch.equal(losses[0], losses[1])


# Leaks


def edited_one_by_one(positions: range, token: int | None = None) -> tuple[Tensor, Tensor]:
    """The row once per position, and the same with that position edited (to `token`, or to another ordinary token)."""
    rows = ROW.repeat(len(positions), 1)
    edited = rows.clone()
    for row, position in enumerate(positions):
        edited[row, position] = token or (13 if ROW[position] == 12 else 12)
    return rows, edited


def row_losses(config: Config, rows: Tensor) -> Tensor:
    """Losses in float32 of targets 1 .. T - 1: column i is the loss of the token at i + 1."""
    model = lively_model(config, torch.float32)
    with torch.no_grad():
        return model(rows[:, :-1], rows[:, 1:], plain_phase(config))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("edited_document", ["cut off", "middle", "later"])
def test_editing_a_document_leaves_the_losses_of_the_others_bit_for_bit(edited_document: str, backend: str) -> None:
    """A target belongs to the document of its input, so a BOS target belongs to the document before it."""
    span = DOCUMENTS[edited_document]
    positions = range(span.start + (edited_document != "cut off"), span.stop)  # not the BOS: that would join two documents
    rows, edited = edited_one_by_one(positions)
    config = small_config(attention_backend=backend)
    changed = (row_losses(config, rows) != row_losses(config, edited)).any(dim=0)
    inside = torch.tensor([index in span for index in range(len(ROW) - 1)])
    assert not changed[~inside].any()
    assert changed[inside].all(), "every loss of the edited document depends on some token of it"


def test_without_document_mask_later_documents_do_change() -> None:
    rows, edited = edited_one_by_one(range(4, 8))
    config = small_config(doc_mask=False)
    changed = (row_losses(config, rows) != row_losses(config, edited)).any(dim=0)
    assert changed[8:].all()
    assert not changed[:3].any()


@pytest.mark.parametrize("token", [None, BOS], ids=["another token", "a new document"])
@pytest.mark.parametrize("doc_mask", [True, False])
def test_editing_a_token_leaves_earlier_losses_bit_for_bit(doc_mask: bool, token: int | None) -> None:
    positions = range(1, 15)
    rows, edited = edited_one_by_one(positions, token)
    config = small_config(doc_mask=doc_mask)
    before, after = row_losses(config, rows), row_losses(config, edited)
    for row, position in enumerate(positions):
        if edited[row, position] == rows[row, position]:
            continue
        changed = before[row] != after[row]
        assert not changed[: position - 1].any(), f"token {position} is seen by the target before it"
        assert changed[position - 1], "the edited target itself changes"
        assert changed[position], "and so does the loss of the next"


def test_no_logit_sees_a_later_token() -> None:
    config = small_config(doc_mask=False)
    model = lively_model(config, torch.float32)
    rows, edited = edited_one_by_one(range(1, 16))
    with torch.no_grad():
        before, after = (model.logits(tokens, plain_phase(config)) for tokens in (rows, edited))
    for row, position in enumerate(range(1, 16)):
        assert torch.equal(before[row, :position], after[row, :position])
        assert not torch.equal(before[row, position], after[row, position])


# Probabilities


@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_the_cross_entropy_of_the_logits_and_a_distribution(tied: bool) -> None:
    config = small_config(tie_embeddings=tied)
    model, phase = lively_model(config), plain_phase(config)
    tokens = random_rows(config)[:, :-1]
    log_probabilities = model.logits(tokens, phase).log_softmax(dim=-1)
    total = torch.zeros(tokens.shape, dtype=torch.float64)
    for token in range(config.vocab_size):
        losses = model(tokens, torch.full_like(tokens, token), phase)
        torch.testing.assert_close(losses, -log_probabilities[:, :, token], rtol=1e-13, atol=1e-13)
        total += (-losses).exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-13)


@pytest.mark.parametrize("tied", [True, False])
def test_softcap_bounds_large_logits_and_spares_small_ones(tied: bool) -> None:
    def logits(cap: float, head_scale: float) -> Tensor:
        config = small_config(tie_embeddings=tied, logit_softcap=cap)
        model = lively_model(config)
        with torch.no_grad():
            model.head.table.weight.mul_(head_scale)
            return model.logits(random_rows(config)[:, :-1], plain_phase(config))

    assert 2.9 < logits(3.0, 100.0).abs().max() <= 3.0
    raw = logits(1e9, 1.0)
    torch.testing.assert_close(logits(3.0, 1.0), 3 * (raw / 3).tanh(), rtol=0, atol=1e-6)  # 1e9 * tanh(raw / 1e9) has lost 7 of 16 digits


def test_bfloat16_activations_give_float32_losses_near_those_of_float32() -> None:
    config = small_config()
    rows = random_rows(config)
    model = lively_model(config, torch.float32)
    exact = model(rows[:, :-1], rows[:, 1:], plain_phase(config))
    model.dtype = torch.bfloat16
    rough = model(rows[:, :-1], rows[:, 1:], plain_phase(config))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.02


# The whole forward


def reference_losses(model: GPT, config: Config, order: tuple[int, ...], tokens: list[int], targets: list[int]) -> list[Tensor]:
    """The losses of one row in float64, one position after another, from the definitions in SPEC.md; it uses of the model only its weights."""
    weights = dict(model.named_parameters())
    heads, group, width = config.num_heads, config.num_heads // config.num_kv_heads, config.model_dim // config.num_heads
    cos, sin = train_gpt.rotary_table(config, len(tokens), torch.device("cpu"), torch.float64)
    follows = [here > 0 and tokens[here] != config.bos_id for here in range(len(tokens))]

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean() + torch.finfo(torch.float64).eps).sqrt()

    def turn(x: Tensor, position: int) -> Tensor:
        turned, pairs = x.clone(), cos.shape[1]
        for pair in range(pairs):
            c, s, a, b = cos[position, pair], sin[position, pair], x[pair], x[pair + pairs]
            turned[pair], turned[pair + pairs] = a * c + b * s, b * c - a * s
        return turned

    def before(stream: list[Tensor], here: int) -> Tensor:
        return stream[here - 1] if follows[here] else torch.zeros_like(stream[here])

    def stage(name: str, index: int, stream: list[Tensor]) -> list[Tensor]:
        w = {path.removeprefix(f"stages.{index}."): value for path, value in weights.items() if path.startswith(f"stages.{index}.")}
        after = []
        for here, x in enumerate(stream):
            if name == "norm":
                x = norm(x)
            elif name == "bigram" and follows[here]:
                bucket = (tokens[here - 1] * 92821 + tokens[here]) % config.bigram_hash_buckets
                x = x + (w["scale.scale"] if config.bigram_hash_scale else 1.0) * (w["project.weight"] @ w["table.weight"][bucket])
            elif name == "smear" and config.smeargate_kind == "blend":
                keep = 1 / (1 + (-w["keep"]).exp())
                x = keep * x + (1 - keep) * before(stream, here)
            elif name == "smear":
                gate = 1 / (1 + (-(w["weight"][0] @ x[: config.gate_window])).exp())
                x = x + w["strength"] * gate * before(stream, here)
            after.append(x)
        return after

    def block_weights(layer: int) -> dict[str, Tensor]:
        return {name.removeprefix(f"blocks.{layer}."): value for name, value in weights.items() if name.startswith(f"blocks.{layer}.")}

    def mixed(layer: int, stream: list[Tensor]) -> list[Tensor]:
        mix = block_weights(layer)["mix"]
        return [mix[0] * x + mix[1] * x0 for x, x0 in zip(stream, embedded, strict=True)]

    def attended(layer: int, stream: list[Tensor]) -> list[Tensor]:
        w, depth = block_weights(layer), layer + 1 if config.ln_scale else 1
        normed = [norm(x) / math.sqrt(depth) for x in stream]
        q, k, v = ([(w[f"attention.{name}.weight"] @ x).split(width) for x in normed] for name in "qkv")
        if str(layer) in config.value_embed_layers.split(","):
            strength = w["attention.add_value.scale.scale"] * weights["value_embedding.scale.scale"]
            extra = [strength * (weights["value_embedding.project.weight"] @ weights["value_embedding.table.weight"][token]) for token in tokens]
            v = [tuple(a + b for a, b in zip(own, more.split(width), strict=True)) for own, more in zip(v, extra, strict=True)]
        keys = [[turn(norm(key), there) for key in at] for there, at in enumerate(k)]
        after = []
        for here, x in enumerate(normed):
            start = max((there for there in range(here + 1) if tokens[there] == config.bos_id), default=0) if config.doc_mask else 0
            outputs = []
            for head in range(heads):
                query = turn(norm(q[here][head]), here) * w["attention.q_gain"][head]
                scores = torch.stack([query @ keys[there][head // group] / math.sqrt(width) for there in range(start, here + 1)])
                y = scores.softmax(dim=0) @ torch.stack([v[there][head // group] for there in range(start, here + 1)])
                if layer >= config.num_layers - config.xsa_last_n:
                    own = v[here][head // group]
                    y = y - (y @ own) / (own @ own) * own
                if config.attention_gate_window:
                    reading = w["attention.head_gate.weight"][head] @ x[: config.attention_gate_window]
                    y = y / (1 + (-config.attention_gate_scale * reading).exp())
                outputs.append(y)
            after.append(w["attention_scale"] * (w["attention.out.weight"] @ torch.cat(outputs)))
        return after

    def transformed(layer: int, stream: list[Tensor]) -> list[Tensor]:
        w, depth = block_weights(layer), layer + 1 if config.ln_scale else 1
        after = []
        for x in stream:
            inputs = norm(x) / math.sqrt(depth)
            up = w["mlp.up.weight"] @ inputs
            if config.swiglu:
                gate = w["mlp.gate.weight"] @ inputs
                hidden = gate / (1 + (-gate).exp()) * up
            else:
                hidden = (up.clamp_min(0) + config.leaky_relu_slope * up.clamp_max(0)) ** 2
            after.append(w["mlp_scale"] * (w["mlp.down.weight"] @ hidden))
        return after

    def added(*streams: list[Tensor]) -> list[Tensor]:
        return [sum(parts[1:], parts[0]) for parts in zip(*streams, strict=True)]

    table = weights["embedding.table.weight"]
    if config.embed_rank:
        table = table @ weights["embedding.widen.weight"].T
    embedded = [table[token] for token in tokens]
    on = {"norm": True, "bigram": config.bigram_hash_buckets > 0, "smear": config.use_smeargate}
    for index, name in enumerate(name for name in config.input_stages.split(",") if on[name]):
        embedded = stage(name, index, embedded)
    stream, second, pushed = embedded, None, []
    latest: dict[int, list[Tensor]] = {}
    for slot, layer in enumerate(order):
        parallel = config.parallel_residuals if layer >= config.parallel_start_layer else "none"
        if parallel == "lanes" and second is None:
            second = stream
        if len(order) // 2 <= slot and pushed:
            skip, index = pushed.pop(), slot - len(order) // 2
            if config.skip_connections == "scaled":
                stream = [x + weights["skip.scale"][index] * y for x, y in zip(stream, skip, strict=True)]
            elif config.skip_connections == "gated":
                share = 1 / (1 + (-weights["skip.gate"][index]).exp())
                stream = [share * x + (1 - share) * weights["skip.scale"][index] * y for x, y in zip(stream, skip, strict=True)]
        if layer >= config.num_layers - config.dynamic_skip_last_n:
            sources = [embedded, *(latest[earlier] for earlier in range(layer))]
            shares = [weights[f"dynamic_skips.{layer}.weight"] @ norm(x) / config.model_dim for x in stream]
            drawn = [[share * x for share, x in zip(at, places, strict=True)] for at, places in zip(shares, zip(*sources, strict=True), strict=True)]
            stream = [x + sum(parts[1:], parts[0]) for x, parts in zip(stream, drawn, strict=True)]
        if config.loop_embedding:
            stream = [x + weights["loop_embedding.vectors"][order[:slot].count(layer)] for x in stream]
        x_in = mixed(layer, stream)
        if parallel == "lanes":
            assert second is not None
            keep, write = (weights[f"blocks.{config.parallel_start_layer}.routes.{name}"][layer] for name in ("keep", "write"))
            attention, mlp = attended(layer, x_in), transformed(layer, second)
            stream, second = (
                [keep[i] * x + write[0, i] * a + write[1, i] * m for x, a, m in zip(lane, attention, mlp, strict=True)]
                for i, lane in enumerate((stream, second))
            )
        elif parallel == "gptj":
            stream = added(x_in, attended(layer, x_in), transformed(layer, x_in))
        else:
            middle = added(x_in, attended(layer, x_in))
            stream = added(middle, transformed(layer, middle))
        latest[layer] = stream
        if slot < len(order) // 2:
            pushed.append(stream)
    if second is not None:
        stream = [(x + y) / 2 for x, y in zip(stream, second, strict=True)]
    raw = [(table if config.tie_embeddings else weights["head.table.weight"]) @ norm(x) for x in stream]
    positive, negative = config.logit_softcap, config.logit_softcap_negative or config.logit_softcap
    logits = [torch.where(z > 0, positive * torch.tanh(z / positive), negative * torch.tanh(z / negative)) for z in raw]
    return [z.logsumexp(dim=0) - z[target] for z, target in zip(logits, targets, strict=True)]


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ((0, 1, 2, 3), {}),
        ((0, 1, 2, 3, 4), {"tie_embeddings": False}),
        ((0, 1, 2), {"doc_mask": False}),
        ((0, 1, 0, 1), {"rope_dims": 0}),
        ((0, 1, 1, 2, 0), {"num_kv_heads": 1}),
        ((0,), {"num_kv_heads": 4}),
    ],
)
def test_forward_equals_a_plain_reference(order: tuple[int, ...], changes: dict[str, object]) -> None:
    config = small_config(num_layers=len(order), train_seq_len=8, **changes)
    model = lively_model(config)
    rows = torch.tensor([[5, 6, BOS, 7, 8, 9, BOS, 5, 6], [BOS, 9, 9, 9, 9, 7, 6, 5, BOS]])
    with torch.no_grad():
        losses = model(rows[:, :-1], rows[:, 1:], Phase(order, 8))
        for row, got in zip(rows.tolist(), losses, strict=True):
            torch.testing.assert_close(got, torch.stack(reference_losses(model, config, order, row[:-1], row[1:])), rtol=0, atol=1e-12)


# Initial weights


@pytest.mark.parametrize("matrix_init", ["orthogonal", "uniform"])
def test_initial_weights_cover_everything_and_depend_on_the_seed_alone(matrix_init: str) -> None:
    def start(seed: int) -> GPT:
        model = GPT(small_config(matrix_init=matrix_init, tie_embeddings=False))
        for parameter in model.parameters():
            nn.init.constant_(parameter, float("nan"))
        torch.manual_seed(seed)
        model.init_weights()
        return model

    first, again, other = (start(seed).state_dict() for seed in (1, 1, 2))
    assert all(value.isfinite().all() for value in first.values())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    random = {"embedding.table.weight"} | {f"blocks.{layer}.{PROJECTIONS[name]}.weight" for layer in range(4) for name in ("q", "k", "v", "up")}
    assert {name for name in first if not torch.equal(first[name], other[name])} == random


def test_what_declares_a_role_declares_a_start() -> None:
    """So that no parameter keeps the memory it was allocated in: one without a role is an error (test_roles.py)."""
    for module in GPT(small_config(tie_embeddings=False)).modules():
        if own := dict(module.named_parameters(recurse=False)):
            assert isinstance(module, train_gpt.Part)
            assert set(module.starts) == set(module.roles) == set(own)


def test_orthogonal_start_has_unit_singular_values_and_the_settings_reach_the_rest() -> None:
    config = small_config(vocab_size=4000, qk_gain_init=2.5, tied_embed_init_std=0.02)
    model = GPT(config)
    torch.manual_seed(0)
    model.init_weights()
    for name in ("q", "k", "v", "up"):
        singular = torch.linalg.svdvals(model.get_parameter(f"blocks.3.{PROJECTIONS[name]}.weight"))
        torch.testing.assert_close(singular, torch.ones_like(singular))
    assert (model.blocks[0].attention.q_gain == 2.5).all()
    assert model.embedding.table.weight.std().item() == pytest.approx(0.02, rel=0.02)
    torch.manual_seed(0)
    (untied := GPT(small_config(vocab_size=4000, tie_embeddings=False))).init_weights()
    assert untied.embedding.table.weight.std().item() == pytest.approx(1, rel=0.02)


def test_blocks_start_as_the_identity() -> None:
    """Output projections are zero and mix is (1, 0), so each block returns its input; the skips add copies, which the last norm scales away."""
    config = small_config()
    model = GPT(config, torch.float64)
    model.init_weights()
    x, x0 = torch.randn(2, 1, 5, 16, dtype=torch.float64)
    rows = bare_rows(*train_gpt.rotary_table(config, 5, x.device, x.dtype))
    for block in model.double().blocks:
        assert torch.equal(block((x,), x0, rows, plain_phase(config), None)[0], x)
    tokens = random_rows(config)[:, :-1]
    embedded = train_gpt.rms_norm(model.embedding.table.weight[tokens])
    torch.testing.assert_close(train_gpt.rms_norm(model.hidden(tokens, plain_phase(config), None)), embedded, rtol=1e-6, atol=0)


def test_initial_losses_are_those_of_a_uniform_guess() -> None:
    """Exactly so for an untied head, which starts at zero; nearly so for a tied one, whose logits start small."""
    for tied, tolerance in ((False, 1e-6), (True, 0.02)):
        config = small_config(tie_embeddings=tied)
        torch.manual_seed(0)
        model = GPT(config)
        model.init_weights()
        rows = random_rows(config)
        losses = model(rows[:, :-1], rows[:, 1:], plain_phase(config))
        assert (losses - math.log(config.vocab_size)).abs().mean() < tolerance


# Adapters


class LowRank(nn.Module):
    """x A B, with B zero unless `scale` is given."""

    def __init__(self, weight: Tensor, scale: float = 0.0) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(inputs, 2, dtype=weight.dtype))
        self.b = nn.Parameter(scale * torch.randn(2, outputs, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b


def make_adapters(model: GPT, order: tuple[int, ...], scales: dict[int, float]) -> list[dict[str, LowRank]]:
    """An adapter on every projection of every slot: zero, or of size scales[slot]."""
    torch.manual_seed(1)
    projections = PROJECTIONS | ({"gate": "mlp.gate"} if model.config.swiglu else {})
    return [
        {name: LowRank(model.get_parameter(f"blocks.{layer}.{path}.weight"), scales.get(slot, 0.0)) for name, path in projections.items()}
        for slot, layer in enumerate(order)
    ]


def test_zero_adapters_leave_every_loss_bit_for_bit() -> None:
    config = small_config()
    model, phase, rows = lively_model(config, torch.float32), plain_phase(config), random_rows(config)
    with torch.no_grad():
        adapted = model(rows[:, :-1], rows[:, 1:], phase, make_adapters(model, phase.order, {}))
        assert torch.equal(adapted, model(rows[:, :-1], rows[:, 1:], phase))


def test_the_loss_that_trains_is_the_loss_that_scores() -> None:
    """With gradients the loss comes with its gradient by the logits, without them from the logits of the scorer."""
    config = small_config(logit_softcap=9.0, logit_softcap_negative=5.0)
    model, phase, rows = lively_model(config, torch.float64), plain_phase(config), random_rows(config)
    trained = model(rows[:, :-1], rows[:, 1:], phase)
    with torch.no_grad():
        scored = model(rows[:, :-1], rows[:, 1:], phase)
    torch.testing.assert_close(trained.detach(), scored, rtol=1e-12, atol=1e-12)
    logits = model.logits(rows[:, :-1], phase).flatten(0, 1)
    weights = torch.linspace(0, 1, rows[:, 1:].numel(), dtype=torch.float64)
    plain = (weights * torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none")).sum()
    parameters = list(model.parameters())
    for ours, expected in zip(torch.autograd.grad((weights * trained.flatten()).sum(), parameters), torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_every_adapter_trains_while_the_weights_rest() -> None:
    config = small_config()
    model, phase, rows = lively_model(config, torch.float32), plain_phase(config), random_rows(config)
    model.requires_grad_(False)
    adapters = make_adapters(model, phase.order, {})
    pairs = [adapter for slot in adapters for adapter in slot.values()]
    optimizer = torch.optim.SGD([parameter for adapter in pairs for parameter in adapter.parameters()], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(rows[:, :-1], rows[:, 1:], phase, adapters).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(adapter.b.grad.abs().max() > 0 for adapter in pairs)
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("slot", range(4))
def test_an_adapter_on_one_slot_of_a_repeated_layer_acts_there_alone(slot: int) -> None:
    """Layers 0, 1, 0, 1 with an adapter on one slot equal four layers of which that one has the adapter's product in its weights."""
    config = small_config()
    looped, unrolled = lively_model(config), lively_model(config)
    for layer in (2, 3):
        unrolled.blocks[layer].load_state_dict(looped.blocks[layer - 2].state_dict())
    adapters = make_adapters(looped, (0, 1, 0, 1), {slot: 0.3})
    with torch.no_grad():
        for name, adapter in adapters[slot].items():
            unrolled.get_parameter(f"blocks.{slot}.{PROJECTIONS[name]}.weight").add_((adapter.a @ adapter.b).T)
    rows = random_rows(config)
    adapted = looped(rows[:, :-1], rows[:, 1:], Phase((0, 1, 0, 1), 16), adapters)
    torch.testing.assert_close(adapted, unrolled(rows[:, :-1], rows[:, 1:], plain_phase(config)), rtol=0, atol=1e-12)
    assert not torch.allclose(adapted, looped(rows[:, :-1], rows[:, 1:], Phase((0, 1, 0, 1), 16)), atol=1e-3)


# Compilation


def test_compiled_model_follows_the_phase_and_the_adapters() -> None:
    """Both are arguments of forward, so a change of either changes the compiled output, and changing back changes it back."""
    torch._dynamo.reset()
    config = small_config(num_layers=2)
    model, rows = lively_model(config), random_rows(config)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    plain, quantised, other_layer = Phase((0,), 16), Phase((0,), 16, qat=True), Phase((1,), 16)
    adapters = make_adapters(model, plain.order, {0: 0.3})
    losses = []
    with torch.no_grad():
        for phase, adapter in ((plain, None), (quantised, None), (other_layer, None), (plain, adapters), (plain, None)):
            losses.append(compiled(rows[:, :-1], rows[:, 1:], phase, adapter))
            assert torch.equal(losses[-1], model(rows[:, :-1], rows[:, 1:], phase, adapter))
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(losses[:4], 2))
    assert torch.equal(losses[4], losses[0])


def test_a_table_gets_the_gradient_of_a_plain_lookup() -> None:
    table, index = train_gpt.Table(7, 5, small_config(), train_gpt.Role.TABLE, nn.init.normal_).double(), torch.tensor([[3, 0, 3], [3, 6, 0]])
    plain = nn.init.normal_(table.weight.detach().clone()).requires_grad_()
    table.load_state_dict({"weight": plain})
    direction = torch.randn(2, 3, 5, dtype=torch.float64)
    y, expected = table(index, Phase((0,), 3), torch.float64), plain[index]
    assert torch.equal(y, expected)
    (found,), (wanted,) = torch.autograd.grad(y, [table.weight], direction), torch.autograd.grad(expected, [plain], direction)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(train_gpt.Lookup.apply, (plain, index))


def test_the_compiled_gradient_of_a_table_is_the_same_every_time_on_several_threads() -> None:
    """Rows that are looked up often would be added up in another order each time by atomic operations."""
    table, index = train_gpt.Table(50, 64, small_config(), train_gpt.Role.TABLE, nn.init.normal_), torch.arange(4096).reshape(8, 512) ** 2 % 50
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        nn.init.normal_(table.weight)
        direction = torch.randn(8, 512, 64)
        look_up = torch.compile(lambda: (table(index, Phase((0,), 512), torch.float32) * direction).sum(), fullgraph=True)
        gradients = [torch.autograd.grad(look_up(), [table.weight])[0] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_gradients_of_the_compiled_model_are_those_of_eager_mode() -> None:
    torch._dynamo.reset()
    config = small_config(num_layers=1)
    model, rows, phase = lively_model(config), random_rows(config), plain_phase(config, qat=True)
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")):
        model.zero_grad()
        forward(rows[:, :-1], rows[:, 1:], phase).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.numel()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("autotune", "mode"), [(False, None), (True, "max-autotune-no-cudagraphs")])
def test_compile_autotune_has_the_compiler_time_kernels(autotune: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.update(options))
    train_gpt.compiled(abs, small_config(compile=True, compile_autotune=autotune))
    assert given == {"fullgraph": True, "dynamic": False, "mode": mode}


def test_inductor_puts_weights_on_the_same_grid_as_eager_mode() -> None:
    """One layer, because inductor needs half a minute for the smallest whole model. Its output for the identity is its weight."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = train_gpt.Linear(48, 64, small_config(matrix_bits=4)).requires_grad_(False)
    nn.init.normal_(layer.weight)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    plain, quantised = (compiled(torch.eye(48), Phase((0,), 16, qat=qat)).T for qat in (False, True))
    torch.testing.assert_close(plain, layer.weight.data, rtol=0, atol=0)
    grid = train_gpt.rowmax_grid(layer.weight, 4)
    torch.testing.assert_close(quantised, grid.dequantise(grid.round(layer.weight)), rtol=0, atol=0)


# Golden numbers of a tiny seeded model


def golden_numbers() -> dict[str, float]:
    """The mean loss, and the gradient's norm for every parameter, of a model drawn from a fixed seed in float32."""
    settings = {"mlp_mult": 2.0, "rope_base": 10000.0, "qk_gain_init": 1.5, "matrix_init": "orthogonal", "skip_connections": "scaled", "doc_mask": True}
    config = small_config(num_layers=2, tie_embeddings=False, **settings)
    model, rows = lively_model(config, torch.float32), random_rows(config)
    loss = model(rows[:, :-1], rows[:, 1:], plain_phase(config)).mean()
    loss.backward()
    return {"loss": loss.item()} | {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}


# fmt: off
GOLDEN: dict[str, float] = {
    "loss": 3.4073341,
    "embedding.table.weight": 0.13435203,
    "blocks.0.mix": 0.18406655,
    "blocks.0.attention_scale": 0.07138779,
    "blocks.0.mlp_scale": 0.063721672,
    "blocks.0.attention.q_gain": 0.014261547,
    "blocks.0.attention.q.weight": 0.13099146,
    "blocks.0.attention.k.weight": 0.18757847,
    "blocks.0.attention.v.weight": 0.18225825,
    "blocks.0.attention.out.weight": 0.32695493,
    "blocks.0.mlp.up.weight": 0.37652352,
    "blocks.0.mlp.down.weight": 0.39241937,
    "blocks.1.mix": 0.12138055,
    "blocks.1.attention_scale": 0.01991873,
    "blocks.1.mlp_scale": 0.031571891,
    "blocks.1.attention.q_gain": 0.007058322,
    "blocks.1.attention.q.weight": 0.048663404,
    "blocks.1.attention.k.weight": 0.044586077,
    "blocks.1.attention.v.weight": 0.07630989,
    "blocks.1.attention.out.weight": 0.12852,
    "blocks.1.mlp.up.weight": 0.1704369,
    "blocks.1.mlp.down.weight": 0.1950541,
    "skip.scale": 0.05770408,
    "head.table.weight": 0.68189865,
}
# fmt: on


def test_golden_loss_and_gradient_norms() -> None:
    assert golden_numbers() == pytest.approx(GOLDEN, rel=1e-5)


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python tests/test_model.py --regenerate")
    lines = "".join(f'    "{name}": {value:.8g},\n' for name, value in golden_numbers().items())
    path = Path(__file__)
    text = re.sub(r"(?ms)^GOLDEN: dict\[str, float\] = \{.*?\}$", lambda _: f"GOLDEN: dict[str, float] = {{\n{lines}}}", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
