"""Fast forms of attention, loss, products and activation, each against its plain form; Triton kernels run in its interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, lively_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt
from train_gpt import ATTENTION, GPT, Config, DocumentBounds, Kernels, Phase, World

BOS = 1
PROJECTIONS = {"q": "attention.q", "k": "attention.k", "v": "attention.v", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
needs_triton = pytest.mark.skipif(train_gpt.triton is None, reason="Triton is not installed")


def random_tokens(rows: int, length: int, share: float = 0.15, seed: int = 0) -> Tensor:
    """Tokens with document starts here and there."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 24, (rows, length), generator=generator)
    return tokens.masked_fill(torch.rand(rows, length, generator=generator) < share, BOS)


# Attention


def segments(offsets: Tensor) -> list[tuple[int, int]]:
    """The documents that offsets tell of, empty ones left out."""
    return [(first, end) for first, end in itertools.pairwise(offsets.tolist()) if first < end]


@given(st.integers(1, 4), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99), st.booleans())
def test_offsets_cut_rows_where_documents_start(rows: int, length: int, share: float, seed: int, doc_mask: bool) -> None:
    tokens, config = random_tokens(rows, length, share, seed), small_config(doc_mask=doc_mask)
    starts = [place for place in range(rows * length) if place % length == 0 or (doc_mask and tokens.flatten()[place] == BOS)]
    expected = list(zip(starts, [*starts[1:], rows * length], strict=True))
    bound = DocumentBounds(config).of(tokens)
    assert rows * bound >= len(starts)
    for most in (0, -(-len(starts) // rows), bound):
        offsets = train_gpt.document_offsets(tokens, config, most)
        assert offsets.dtype == torch.int32 and segments(offsets) == expected
        assert len(offsets) == (rows * most or len(starts)) + 1 and offsets[-1] == rows * length


def test_a_bound_holds_for_many_batches_of_one_shape_and_grows_when_it_must() -> None:
    bounds = DocumentBounds(small_config())
    first = bounds.of(random_tokens(4, 64, 0.1))
    assert {bounds.of(random_tokens(4, 64, 0.1, seed)) for seed in range(20)} == {first}
    assert bounds.of(random_tokens(16, 64, 0.5)) > first == bounds.of(random_tokens(4, 64, 0.1)), "another shape has a bound of its own"
    crowded = random_tokens(4, 64, 0.9)
    assert bounds.of(crowded) > first and 4 * bounds.of(crowded) >= int((crowded == BOS).sum())


def ragged_reference(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of (N, heads, C) document by document, and its normalisers (heads, N)."""
    outputs, normalisers = [], []
    for first, end in segments(offsets):
        sides = [side[first:end].transpose(0, 1)[None] for side in (q, k, v)]
        outputs.append(train_gpt.attention_reference(*sides, None)[0].transpose(0, 1))
        scores = sides[0] @ sides[1].repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(-2, -1) / q.shape[-1] ** 0.5
        normalisers.append(scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf).logsumexp(dim=-1)[0])
    return torch.cat(outputs), torch.cat(normalisers, dim=1)


def ragged_gradients(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `ragged_reference` by its first three arguments, written out: an operator's own backward has no autograd."""
    results = [torch.zeros_like(side) for side in (q, k, v)]
    group, root = q.shape[1] // k.shape[1], q.shape[-1] ** 0.5
    for (first, end), head in itertools.product(segments(offsets), range(q.shape[1])):
        here, keys = slice(first, end), head // group
        scores = q[here, head] @ k[here, keys].T / root
        shares = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf).softmax(dim=-1)
        by_shares = gradient[here, head] @ v[here, keys].T
        by_scores = shares * (by_shares - (shares * by_shares).sum(dim=-1, keepdim=True)) / root
        results[0][here, head] += by_scores @ k[here, keys]
        results[1][here, keys] += by_scores.T @ q[here, head]
        results[2][here, keys] += shares.T @ gradient[here, head]
    return tuple(results)


@pytest.fixture
def flash_on_the_cpu() -> Iterator[None]:
    """PyTorch's FlashAttention operators have no CPU form: they get that of the reference."""
    library = torch.library.Library("aten", "IMPL")

    def forward(*arguments: Any, **options: Any) -> Any:
        q, k, v, offsets, k_offsets, longest, k_longest, _, causal, *_ = arguments
        assert causal and torch.equal(offsets, k_offsets) and (options["window_size_left"], options["window_size_right"]) == (-1, 0)
        assert max(end - first for first, end in segments(offsets)) <= longest == k_longest
        nothing = torch.zeros(2, dtype=torch.uint64)
        return *ragged_reference(q, k, v, offsets), nothing, nothing, torch.empty(0)

    def backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, *_: Any, **options: Any) -> Any:
        return ragged_gradients(q, k, v, gradient, offsets)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.fixture(params=[2, 4, 5])
def flash4(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for flash-attn-4, whose releases return two to five values."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **lengths: int) -> Any:
        assert causal and return_lse and torch.equal(cu_seqlens_q, cu_seqlens_k) and set(lengths) == {"max_seqlen_q", "max_seqlen_k"}
        out, lse = ragged_reference(q, k, v, cu_seqlens_q)
        return (out.detach(), lse.detach().float(), None, None, None)[: request.param]

    def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, gradient: Tensor, lse: Tensor, *, causal: bool, **seqlens: Tensor) -> Any:
        cu_seqlens_q, _ = seqlens["cu_seqlens_q"], seqlens["cu_seqlens_k"]
        assert causal and lse.dtype == torch.float32 and lse.shape == (q.shape[1], len(q)) and out.shape == q.shape
        return (*ragged_gradients(q, k, v, gradient, cu_seqlens_q), None, None)[: max(request.param, 3)]

    module = types.ModuleType("flash_attn.cute.interface")
    module.__dict__.update(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    train_gpt.fa4_backend.cache_clear()
    yield
    train_gpt.fa4_backend.cache_clear()


def assert_same_attention(name: str, *, compile: bool = False, backward: bool = True) -> None:
    """Outputs and gradients of a backend are those of the reference, in float64, with and without document masks."""
    tokens = random_tokens(3, 40)
    for doc_mask, kv_heads in ((True, 2), (False, 4), (True, 1)):
        config = small_config(doc_mask=doc_mask)
        phase = Phase((), 40, row_documents=DocumentBounds(config).of(tokens))
        generator, results = torch.Generator().manual_seed(0), []
        sides = [torch.randn(3, heads, 40, 8, generator=generator, dtype=torch.float64) for heads in (4, kv_heads, kv_heads, 4)]
        for backend in (ATTENTION[name](), ATTENTION["reference"]()):
            inputs = [side.clone().requires_grad_(backward) for side in sides[:3]]

            def attend(q: Tensor, k: Tensor, v: Tensor, plan: Callable[..., Any] = backend.plan, config: Config = config, phase: Phase = phase) -> Tensor:
                return plan(tokens, config, phase)(q, k, v)

            torch._dynamo.reset()
            y = (torch.compile(attend, fullgraph=True, backend="aot_eager") if compile else attend)(*inputs)
            results.append([y, *(torch.autograd.grad(y, inputs, sides[3]) if backward else [])])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("flash_on_the_cpu")
def test_pytorchs_attention_over_documents_laid_end_to_end_equals_the_reference(compile: bool) -> None:
    assert_same_attention("varlen", compile=compile)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("flash4")
def test_flash_attention_4_of_any_release_equals_the_reference(compile: bool) -> None:
    assert_same_attention("fa4", compile=compile)


@pytest.mark.parametrize("rows", [2, 1])
def test_queries_laid_end_to_end_are_contiguous(rows: int) -> None:
    """FlashAttention's result is; the compiler takes it to have the strides of the queries, which of one row are a view's."""
    strides = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        strides.append(q.stride())
        return q

    q, k, v = (torch.randn(rows, heads, 40, 8) for heads in (4, 2, 2))
    out = train_gpt.ragged(kernel).plan(random_tokens(rows, 40), small_config(), Phase((), 40))(q, k, v)
    assert strides == [(32, 8, 1)] and torch.equal(out, q)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_equals_the_reference() -> None:
    """PyTorch has no backward of it on a CPU."""
    assert_same_attention("flex", backward=False)


def test_pytorch_without_the_switch_for_fewer_key_heads_is_not_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given_options: list[dict[str, Any]] = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window_size: tuple[int, int]) -> Tensor:
        given_options.append({"window_size": window_size})
        return q

    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    q = torch.zeros(1, 4, 6, 8)
    ATTENTION["varlen"]().plan(random_tokens(1, 6), small_config(), Phase((), 6))(q, q, q)
    assert given_options == [{"window_size": (-1, 0)}]


class Device(World):
    """A lone rank that says it has a GPU."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.device = torch.device("cuda")


def backends(monkeypatch: pytest.MonkeyPatch, **works: bool | type[Exception]) -> None:
    """Replaces the backends: each one gives right results, wrong ones, or fails to open."""

    def opened(works: bool | type[Exception]) -> train_gpt.Backend:
        if not isinstance(works, bool):
            raise works("no such thing\nand more")
        right = ATTENTION["reference"]()
        return right if works else right._replace(plan=lambda *arguments: lambda q, k, v: right.plan(*arguments)(q, k, -v))

    monkeypatch.setattr(train_gpt, "ATTENTION", {**ATTENTION, **{name: partial(opened, how) for name, how in works.items()}})
    monkeypatch.setattr(train_gpt, "ATTENTION_ORDER", tuple(works))
    real = train_gpt.check_attention
    monkeypatch.setattr(train_gpt, "check_attention", lambda backend, config, device: real(backend, config, torch.device("cpu")))


def test_the_first_backend_that_opens_and_passes_its_test_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    backends(monkeypatch, fa3=ImportError, fa4=False, varlen=True, sdpa=True)
    assert train_gpt.choose_attention(small_config(attention_backend="auto"), Device())[0] == "varlen"


@pytest.mark.parametrize(("name", "reason"), [("fa3", "ImportError: no such thing"), ("fa4", "disagrees with the reference: relative errors 2")])
def test_a_backend_that_is_asked_for_and_fails_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    backends(monkeypatch, fa3=ImportError, fa4=False, varlen=True)
    with pytest.raises(ValueError, match=f"ATTENTION_BACKEND={name} does not work here .*{reason}.*choose another"):
        train_gpt.choose_attention(small_config(attention_backend=name), Device())


def test_a_cpu_takes_sdpa_without_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "check_attention", None)
    assert train_gpt.choose_attention(small_config(attention_backend="auto"), World("cpu"))[0] == "sdpa"


@pytest.mark.parametrize("factors", [(2.0, 1.0), (1.0, 1.05)], ids=["output", "keys"])
def test_the_test_of_a_backend_sees_a_factor(factors: tuple[float, float]) -> None:
    right = ATTENTION["reference"]()

    def plan(*arguments: Any) -> Any:
        return lambda q, k, v: factors[0] * right.plan(*arguments)(q, factors[1] * k, v)

    with pytest.raises(RuntimeError, match="disagrees with the reference"):
        train_gpt.check_attention(right._replace(plan=plan), small_config(), torch.device("cpu"))


@pytest.mark.parametrize("scale", [0.98, 1.05])
def test_the_test_of_a_backend_sees_keys_of_other_positions(scale: float) -> None:
    right = ATTENTION["reference"]()

    def plan(*arguments: Any) -> Any:
        return lambda q, k, v: right.plan(*arguments)(q, torch.cat([k[:, :1] * scale, k[:, 1:].roll(1, dims=2)], dim=1), v)

    with pytest.raises(RuntimeError, match="disagrees with the reference"):
        train_gpt.check_attention(right._replace(plan=plan), small_config(), torch.device("cpu"))


@pytest.mark.usefixtures("flash_on_the_cpu")
def test_a_model_gives_the_same_losses_and_gradients_with_documents_laid_end_to_end() -> None:
    config = small_config(num_loops=1, loop_start=1, loop_end=1)
    model, tokens = lively_model(config), random_tokens(3, config.train_seq_len + 1)
    phase, results = train_gpt.Schedule(config).scored_phase, list[list[Tensor]]()
    for name in ("sdpa", "varlen"):
        model.kernels = Kernels(ATTENTION[name]())
        losses = model(tokens[:, :-1], tokens[:, 1:], phase)
        losses.sum().backward()
        results.append([losses.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        model.zero_grad(set_to_none=True)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


# Projections of one input as one product, scales in weights


@pytest.mark.parametrize("looped", [False, True])
def test_joined_and_folded_products_equal_separate_ones_in_losses_and_gradients(looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(num_loops=2 * looped, loop_start=1, loop_end=1)
    model, tokens = lively_model(config), random_tokens(3, config.train_seq_len + 1)

    def separate(joined: train_gpt.Joined, x: Tensor, phase: Phase, adapters: Any) -> tuple[Tensor, ...]:
        return tuple(member(x, phase, adapters, name) for name, member in joined.members.items())

    def unfolded(part: train_gpt.Linear, x: Tensor, phase: Phase, adapters: Any = None, name: str = "", scale: Tensor | None = None) -> Tensor:
        y = x @ part.stored(phase).T
        y = y if adapters is None or name not in adapters else y + adapters[name](x)
        return y if scale is None else y * scale

    def added(width: int, x: Tensor) -> Tensor:
        return 0.1 * x.mean(dim=-1, keepdim=True) * torch.arange(width) / width

    widths = {name: len(model.get_submodule(f"blocks.0.{path}").weight) for name, path in PROJECTIONS.items()}
    slots = len(train_gpt.Schedule(config).scored_phase.order)
    adapters = [{name: partial(added, width) for name, width in widths.items()}] * slots
    results: list[list[Tensor]] = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(train_gpt.Joined, "forward", separate)
            monkeypatch.setattr(train_gpt.Linear, "forward", unfolded)
        for given_adapters in (None, [*adapters, {}]):
            losses = model(tokens[:, :-1], tokens[:, 1:], train_gpt.Schedule(config).scored_phase, given_adapters)
            losses.sum().backward()
            results.append([losses.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
            model.zero_grad(set_to_none=True)
    assert not torch.equal(results[0][0], results[1][0]), "the adapters matter"
    for fast, plain_result in ((results[0], results[2]), (results[1], results[3])):
        for mine, theirs in zip(fast, plain_result, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_compiled_graph_casts_each_weight_once_however_often_its_layer_runs() -> None:
    """Why there is no copy of the weights in bfloat16 beside the masters."""
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    config, graphs = small_config(num_loops=1, loop_start=1, loop_end=1), list[torch.fx.GraphModule]()
    model = GPT(config, torch.bfloat16)
    model.init_weights()

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    torch._dynamo.reset()
    tokens, phase = random_tokens(2, config.train_seq_len + 1), train_gpt.Schedule(config).scored_phase
    torch.compile(model, fullgraph=True, backend=backend)(tokens[:, :-1], tokens[:, 1:], phase).sum().backward()
    forward, _ = graphs
    casts: dict[str, int] = {}
    for node in forward.graph.nodes:
        if node.op == "call_function" and "_to_copy" in str(node.target) and node.args[0].op == "placeholder":
            casts[node.args[0].name] = casts.get(node.args[0].name, 0) + 1
    assert phase.order.count(1) == 2 and len(casts) > 2 * config.num_layers
    assert set(casts.values()) == {1}


# The loss of the head


def test_plain_cross_entropy_gives_the_losses_of_pytorch_and_their_gradients() -> None:
    logits = (20 * torch.randn(30, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    targets = torch.arange(30)
    losses = torch.nn.functional.cross_entropy(train_gpt.softcap(logits, 30.0, 12.0), targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    found, slopes = train_gpt.cross_entropy(logits.detach(), targets, 30.0, 12.0)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes, gradient, rtol=1e-10, atol=1e-14)


@needs_triton
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (5, 7), (9, 64), (3, 1000), (2, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_kernel_equals_its_plain_form(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = (15 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(columns, (rows,), generator=generator)
    losses, slopes = train_gpt.fused_cross_entropy(logits, targets, 30.0, 20.0)
    expected, expected_slopes = train_gpt.cross_entropy(logits.double(), targets, 30.0, 20.0)
    assert losses.dtype == torch.float32 and slopes.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=2e-5)
    # The interpreter cuts numbers off where a GPU rounds them to bfloat16.
    torch.testing.assert_close(slopes.double(), expected_slopes, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [{}, {"embed_rank": 5}, {"tie_embeddings": False}], ids=["tied", "thin", "untied"])
@pytest.mark.parametrize("negative", [0.0, 11.0])
def test_a_model_with_the_loss_in_its_head_has_the_same_losses_and_gradients(tied: dict[str, Any], negative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, by the plain form of the kernel; each loss counts with a weight of its own."""
    monkeypatch.setattr(train_gpt, "fused_cross_entropy", train_gpt.cross_entropy)
    model = lively_model(small_config(logit_softcap_negative=negative, **tied))
    tokens = random_tokens(3, model.config.train_seq_len + 1)
    weights = torch.rand(tokens[:, 1:].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    phase, results = train_gpt.Schedule(model.config).scored_phase, list[list[Tensor]]()
    for names in ((), ("cross_entropy",)):
        model.kernels = model.kernels._replace(names=names)
        losses = model(tokens[:, :-1], tokens[:, 1:], phase)
        (losses * weights).sum().backward()
        results.append([losses.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        model.zero_grad(set_to_none=True)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@needs_triton
def test_a_compiled_model_takes_the_kernel_into_its_graph() -> None:
    config = small_config(compute_dtype="float32", bos_id=BOS)
    model = lively_model(config, torch.float32).float()
    tokens = random_tokens(2, config.train_seq_len + 1)
    phase, results = train_gpt.Schedule(config).scored_phase, list[list[Tensor]]()
    torch._dynamo.reset()
    for names, forward in (((), model), (("cross_entropy",), torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager"))):
        model.kernels = model.kernels._replace(names=names)
        losses = forward(tokens[:, :-1], tokens[:, 1:], phase)
        losses.sum().backward()
        results.append([losses.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        model.zero_grad(set_to_none=True)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


# Symmetric products


@needs_triton
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 140), st.integers(1, 80), st.booleans())
def test_symmetric_kernel_equals_its_plain_form(count: int, rows: int, columns: int, has_plus: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(count, rows, columns, generator=generator)
    plus = train_gpt.symmetric(torch.randn(count, rows, 3, generator=generator)) if has_plus else None
    found = train_gpt.fused_symmetric(x, plus, 0.7, -1.3)
    expected = train_gpt.symmetric(x.double(), plus if plus is None else plus.double(), 0.7, -1.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    blocks = found[:, :64, 64:], found[:, 64:, :64].transpose(1, 2)
    assert torch.equal(*blocks), "a block and its mirror are the same numbers"


@needs_triton
@pytest.mark.parametrize("shape", [(2, 40, 44), (1, 70, 20), (2, 24, 90)])
def test_orthogonalise_is_the_same_with_the_symmetric_kernel(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = train_gpt.orthogonalise(x, 5, "polar_express")
    torch.testing.assert_close(train_gpt.orthogonalise(x, 5, "polar_express", train_gpt.fused_symmetric), plain, rtol=0, atol=2e-4)


def test_muon_uses_the_symmetric_kernel_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(train_gpt, "fused_symmetric", lambda *arguments: calls.append(arguments[0].dtype) or train_gpt.symmetric(*arguments))
    model, world = lively_model(small_config()), World("cpu")
    for names in ((), ("symmetric",)):
        model.kernels = model.kernels._replace(names=names)
        optimizer = train_gpt.Optimizer(model, model.config, world)
        muon = next(group for group in optimizer.groups if isinstance(group, train_gpt.MuonGroup))
        muon.direction(torch.randn(1, 24, 24).bfloat16())
        assert bool(calls) is bool(names) and set(calls) <= {torch.bfloat16}
        muon.direction(torch.randn(1, 24, 24))
        assert set(calls) <= {torch.bfloat16}, "without tensor cores for its type the kernel would be slow"


# Which kernels are used


@needs_triton
def test_kernels_are_compiled_for_a_hopper_gpu_and_keep_to_its_registers() -> None:
    """In a process of its own, for here they are defined for the interpreter."""
    command = [sys.executable, ROOT / "tests/bench/hopper.py", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TRITON_INTERPRET": "0"}).stdout)
    assert len(rows) == 4 and all(row["spilled_bytes"] <= 64 and row["blocks"] >= 2 for row in rows.values())
    assert [row["tensor_cores"] and row["is_pipelined"] for name, row in rows.items() if name.startswith("symmetric")] == [True, True]


@needs_triton
def test_kernels_that_are_asked_for_run_on_a_cpu_in_the_interpreter_and_auto_leaves_them_out() -> None:
    assert train_gpt.choose_kernels(small_config(kernels="cross_entropy,symmetric"), World("cpu")) == (["cross_entropy", "symmetric"], [])
    assert train_gpt.choose_kernels(small_config(kernels="auto"), World("cpu")) == ([], [])
    assert train_gpt.choose_kernels(small_config(kernels="none"), Device()) == ([], [])


@pytest.mark.parametrize("name", train_gpt.KERNEL_NAMES)
def test_a_kernel_with_a_wrong_result_is_not_used_and_is_an_error_when_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = {"cross_entropy": train_gpt.cross_entropy, "symmetric": train_gpt.symmetric}

    def wrong(*arguments: Any) -> Any:
        found = right[name](*arguments)
        return (found[0], found[1].abs()) if isinstance(found, tuple) else found.tril()

    for each in right:
        monkeypatch.setattr(train_gpt, f"fused_{each}", wrong if each == name else right[each])
    monkeypatch.setattr(train_gpt, "triton", object())
    real = train_gpt.check_kernel
    monkeypatch.setattr(train_gpt, "check_kernel", lambda name, device: real(name, torch.device("cpu")))
    others = [each for each in train_gpt.KERNEL_NAMES if each != name]
    works, problems = train_gpt.choose_kernels(small_config(kernels="auto"), Device())
    assert works == others and len(problems) == 1 and problems[0].startswith(f"{name}: RuntimeError: it disagrees with its plain form")
    with pytest.raises(ValueError, match=f"KERNELS={name} does not work here .*disagrees.*KERNELS=auto or none"):
        train_gpt.choose_kernels(small_config(kernels=name), World("cpu"))


def test_without_triton_kernels_that_are_asked_for_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        train_gpt.choose_kernels(small_config(kernels="symmetric"), World("cpu"))
    assert train_gpt.choose_kernels(small_config(kernels="auto"), World("cpu")) == ([], [])


# The MLP's activation


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5])
@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float32, 2.0**-21), (torch.bfloat16, 2.0**-7)])
def test_activation_from_its_result_alone_has_the_value_and_slope_of_the_plain_one(slope: float, dtype: torch.dtype, ulps: float) -> None:
    x = torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 300.0, -300.0])]).to(dtype)
    x.requires_grad_()
    y = train_gpt.SquaredLeakyReLU.apply(slope, x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    reference = x.detach().double().requires_grad_()
    expected = train_gpt.squared_leaky_relu(slope, reference)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), reference)
    tiny = 2 * float(torch.finfo(dtype).smallest_normal)
    torch.testing.assert_close(y.detach().double(), expected.detach(), rtol=ulps, atol=tiny)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1.01 * ulps, atol=4 * tiny**0.5)
    big = expected.detach() > 1e-6
    bias = float((y.detach().double()[big] / expected.detach()[big] - 1).mean())
    assert abs(bias) < (6e-4 if dtype == torch.bfloat16 else 1e-7), "rounding to a parity favours neither side much"
    assert y.untyped_storage().nbytes() == x.untyped_storage().nbytes() or dtype == torch.bfloat16


def test_activation_keeps_nothing_but_its_result_for_backward() -> None:
    kept: list[Tensor] = []
    x = torch.randn(50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = train_gpt.SquaredLeakyReLU.apply(0.5, x)
    assert len(kept) == 1 and torch.equal(kept[0], y)


def test_a_model_may_train_with_it() -> None:
    models = [lively_model(small_config(mlp_post_only=post_only), torch.float32).float() for post_only in (False, True)]
    tokens, gradients = random_tokens(2, models[0].config.train_seq_len + 1), []
    for model in models:
        model(tokens[:, :-1], tokens[:, 1:], train_gpt.Schedule(model.config).scored_phase).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    assert not torch.equal(*gradients)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-4


# Float8


def rounded_to_float8(x: Tensor) -> Tensor:
    """x with four significant bits (fewer below 2^-6), at the scale that brings its largest value to 448."""
    scale = float(x.abs().max()) / 448
    values = (x / scale).double().numpy()
    exponents = np.maximum(np.frexp(values)[1] - 1, -6)
    spacing = np.ldexp(1.0, exponents - 3)
    return torch.from_numpy(np.rint(values / spacing) * spacing * scale)


def test_float8_product_is_that_of_rounded_sides_and_its_gradients_are_those_of_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16().requires_grad_() for shape in ((4, 16, 32), (48, 32)))
    y = train_gpt.float8_linear(x, weight)
    expected = rounded_to_float8(x.detach().float()) @ rounded_to_float8(weight.detach().float()).T
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.detach().double(), expected, rtol=2**-7, atol=2**-5)
    assert float((y.detach().float() - x.detach().float() @ weight.detach().float().T).abs().max()) > 2**-5, "the rounding shows"
    direction = torch.randn(y.shape, generator=generator).bfloat16()
    found = torch.autograd.grad(y, (x, weight), direction)
    exact = torch.autograd.grad(x @ weight.T, (x, weight), direction)
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize(("fp8", "names"), [("head", {"head"}), ("mlp", {"up", "down"}), ("head,mlp", {"head", "up", "down"})])
def test_fp8_reaches_the_products_that_it_names(fp8: str, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    for tied in (True, False):
        model = GPT(small_config(fp8=fp8, tie_embeddings=tied, vocab_size=32))
        for path, module in model.named_modules():
            if getattr(module, "product", None) is train_gpt.float8_linear:
                used.add(path.split(".")[-1])
    assert used == names


def test_a_model_in_float8_has_nearly_the_losses_of_the_plain_one() -> None:
    """Loss parity on random weights: the mean loss moves by much less than single losses do."""
    plain = lively_model(small_config(model_dim=32, vocab_size=32), torch.float32).float()
    changed = GPT(replace(plain.config, fp8="head,mlp"))
    train_gpt.load_weights(changed, dict(plain.named_parameters()))
    tokens = random_tokens(16, plain.config.train_seq_len + 1)
    losses = [model(tokens[:, :-1], tokens[:, 1:], train_gpt.Schedule(plain.config).scored_phase).detach() for model in (plain, changed)]
    difference = losses[1] - losses[0]
    assert 0 < float(difference.abs().max()) < 1.0 and abs(float(difference.mean())) < 0.02


def test_the_artifact_of_a_run_in_float8_is_scored_without_and_so_keeps_the_rules(run_here: Callable[..., Any], tmp_path: Path) -> None:
    """One scale for a whole batch would let later tokens reach earlier scores, which the audit finds."""
    ended = run_here(tmp_path, FP8="mlp", AUDIT=1, AUDIT_TOKENS=256, ITERATIONS=2, WARMUP_STEPS=0)
    assert ended.code == 0, ended.errors


def test_the_head_is_in_float8_where_the_loss_is_in_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "fused_cross_entropy", train_gpt.cross_entropy)
    losses = {}
    for fp8, names in itertools.product(("", "head"), ((), ("cross_entropy",))):
        model = lively_model(small_config(model_dim=32, vocab_size=32, fp8=fp8), torch.float32).float()
        model.kernels = model.kernels._replace(names=names)
        tokens = random_tokens(2, model.config.train_seq_len + 1)
        losses[fp8, names] = model(tokens[:, :-1], tokens[:, 1:], train_gpt.Schedule(model.config).scored_phase).detach()
    assert not torch.allclose(losses["", ()], losses["head", ()], atol=1e-4)
    for fp8 in ("", "head"):
        torch.testing.assert_close(losses[fp8, ("cross_entropy",)], losses[fp8, ()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("changed", "message"), [
    ({"fp8": "head", "vocab_size": 257}, "multiples of 16"),
    ({"mlp_post_only": 1, "compute_dtype": "float64"}, "COMPUTE_DTYPE=float64"),
    ({"kernels": "softmax"}, "some of cross_entropy,symmetric"),
    ({"fp8": "attention"}, "some of head,mlp"),
    ({"attention_backend": "flash"}, "fa3"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(train_gpt.ConfigError, match=message):
        train_gpt.parse_config(["PRESET=plain", *(f"{name.upper()}={value}" for name, value in changed.items())], {})


def test_the_model_of_the_gpu_tests_is_one_that_can_be_built() -> None:
    """They run where there is a GPU alone, but what they are about must stay valid everywhere."""
    spec = importlib.util.spec_from_file_location("gpu_tests", Path(__file__).parent / "gpu" / "test_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, batch = module.model_on("cpu", "float32"), module.rows()
    assert bool(model(batch[:, :-1], batch[:, 1:], module.phase_of(model, batch)).isfinite().all())
