"""Needs a CUDA device: pytest -m gpu tests/gpu. The CPU path is the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_gpt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ARGUMENTS = [
    "PRESET=demo", "SCALE=tiny", "MODEL_DIM=128", "NUM_HEADS=4", "NUM_KV_HEADS=2", "VOCAB_SIZE=256", "TRAIN_SEQ_LEN=64",
]  # fmt: skip


def rows(seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(2, 256, (4, 65), generator=torch.Generator().manual_seed(seed))
    tokens[:, [0, 7, 40]] = 1
    return tokens


def model_on(device: str, dtype: str) -> train_gpt.GPT:
    config = train_gpt.parse_config([*ARGUMENTS, f"COMPUTE_DTYPE={dtype}"], {})
    torch.manual_seed(0)
    model = train_gpt.GPT(config, getattr(torch, dtype))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(device)


def phase_of(model: train_gpt.GPT, batch: torch.Tensor) -> train_gpt.Phase:
    bound = train_gpt.DocumentBounds(model.config).of(batch[:, :-1])
    return replace(train_gpt.Schedule(model.config).scored_phase, row_documents=bound)


def works_here(name: str, device: torch.device) -> bool:
    """Whether a backend's library is installed."""
    try:
        return train_gpt.ATTENTION[name]() is not None
    except Exception:
        return False


@pytest.mark.parametrize("heads", [(8, 4), (8, 8), (6, 1)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", train_gpt.ATTENTION_ORDER)
def test_backend_passes_its_test(name: str, compiled: bool, heads: tuple[int, int]) -> None:
    device = torch.device("cuda")
    if not works_here(name, device):
        pytest.skip(f"{name} is not installed")
    config = train_gpt.parse_config(["PRESET=frontier", f"NUM_HEADS={heads[0]}", f"NUM_KV_HEADS={heads[1]}", f"MODEL_DIM={64 * heads[0]}"], {})
    train_gpt.check_attention(train_gpt.ATTENTION[name](), replace(config, compile=compiled), device)


@pytest.mark.parametrize("name", train_gpt.KERNEL_NAMES)
def test_kernel_passes_its_test(name: str) -> None:
    train_gpt.check_kernel(name, torch.device("cuda"))


@pytest.mark.parametrize("shape", [(4096, 8192), (300, 1024), (7, 50257)])
def test_cross_entropy_kernel_at_the_sizes_of_training(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = (10 * torch.randn(shape, generator=generator)).bfloat16(), torch.randint(shape[1], shape[:1], generator=generator)
    losses, slopes = train_gpt.fused_cross_entropy(logits.cuda(), targets.cuda(), 30.0, 30.0)
    expected, expected_slopes = train_gpt.cross_entropy(logits.double(), targets, 30.0, 30.0)
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(slopes.double().cpu(), expected_slopes, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["varlen", "flex", "sdpa"])
def test_losses_equal_those_of_the_cpu(dtype: str, tolerance: float, compiled: bool, name: str) -> None:
    if dtype == "float32" and name == "varlen":
        pytest.skip("FlashAttention computes in 16 bits")
    batch = rows()
    reference, model = model_on("cpu", "float32"), model_on("cuda", dtype)
    model.kernels = train_gpt.Kernels(train_gpt.ATTENTION[name](), ("cross_entropy",) if dtype == "bfloat16" else ())
    phase = phase_of(model, batch)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    expected = reference(batch[:, :-1], batch[:, 1:], phase)
    found = forward(batch[:, :-1].cuda(), batch[:, 1:].cuda(), phase).cpu()
    assert (found - expected).abs().max() < tolerance * expected.mean()


@pytest.mark.parametrize("product", ["symmetric", "fused_symmetric"])
def test_orthogonalise_in_bfloat16_stays_near_the_float32_result(product: str) -> None:
    for shape in ((3, 96, 192), (3, 512, 512)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = train_gpt.orthogonalise(matrices, 5, "polar_express")
        found = train_gpt.orthogonalise(matrices.cuda(), 5, "polar_express", getattr(train_gpt, product)).float().cpu()
        assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("buckets", [1, 2])
def test_one_training_step_equals_the_cpus(buckets: int) -> None:
    """Uncompiled; with two buckets compiled in two graphs, whose gradients go to the optimiser during backward."""
    weights = {}
    for device in ("cpu", "cuda"):
        model = model_on(device, "float32")
        config = replace(model.config, gradient_buckets=buckets, compile=buckets > 1 and device == "cuda")
        optimizer, forward = train_gpt.Optimizer(model, config, train_gpt.World(device)), train_gpt.training_forward(model, config)
        batch = rows().to(device)
        knobs = train_gpt.Knobs(train_gpt.Schedule(model.config).scored_phase, 1.0, 0.9, 1.0)
        loss = forward(batch[:, :-1], batch[:, 1:], knobs.phase).mean()
        optimizer.expect()
        loss.backward()
        stats = optimizer.step(loss, knobs)
        assert train_gpt.HostCopy(stats).read()[0] > 0
        weights[device] = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    assert (weights["cuda"] - weights["cpu"]).norm() / weights["cpu"].norm() < 0.01


@pytest.mark.parametrize("fp8", ["head", "mlp", "head,mlp"])
def test_float8_products_keep_the_mean_loss(fp8: str) -> None:
    batch, plain = rows(), model_on("cuda", "bfloat16")
    changed = train_gpt.GPT(replace(plain.config, fp8=fp8), torch.bfloat16).cuda()
    train_gpt.load_weights(changed, dict(plain.named_parameters()))
    phase = phase_of(plain, batch)
    losses = [model(batch[:, :-1].cuda(), batch[:, 1:].cuda(), phase).float() for model in (plain, changed)]
    assert float((losses[0] - losses[1]).abs().max()) > 0
    assert abs(float((losses[0] - losses[1]).mean())) < 0.02


@pytest.mark.parametrize("name", ["varlen", "sdpa"])
def test_adaptation_scores_as_on_the_cpu_with_graphs_from_the_rehearsal_alone(name: str) -> None:
    generator, found = torch.Generator().manual_seed(0), {}
    tokens = torch.randint(2, 256, (1201,), generator=generator)
    tokens[[0, 300, 310, 700]] = 1
    val = train_gpt.ValData(tokens.numpy(), torch.ones(1200, dtype=torch.int64).numpy())
    for device in ("cuda", "cpu"):
        on_gpu = device == "cuda"
        settings = ["FINAL_EVAL=ttt_phased", "TTT_PREFIX_DOCS=1", "TILT_ORDERS=1,2", "TTT_LORA_CHUNK_TOKENS=16", "VAL_BATCH_SIZE=1024"]
        config = train_gpt.parse_config([*ARGUMENTS, *settings, f"COMPILE={int(on_gpu)}"], {})
        model = model_on(device, "bfloat16" if on_gpu else "float32")
        world = train_gpt.World(device)
        model.kernels = train_gpt.Kernels(train_gpt.ATTENTION[name if on_gpu else "sdpa"]())
        run = train_gpt.Run(config, world, train_gpt.Log(None), Path(), train_gpt.StopSignals(), source="")
        forward, phase = train_gpt.compiled(model, config), train_gpt.Schedule(config).scored_phase
        rehearsed = train_gpt.rehearse(run, model, forward, "ttt_phased", phase) if on_gpu else None
        with torch._dynamo.config.patch(error_on_recompile=on_gpu):  # type: ignore[no-untyped-call]
            evaluator = train_gpt.Evaluator(run, model, forward, val, "ttt_phased", phase, rehearsed=rehearsed)
            evaluator.score()
        found[device] = torch.from_numpy(evaluator.scores).double()
    assert (found["cuda"] - found["cpu"]).norm() <= 0.02 * found["cpu"].norm()
