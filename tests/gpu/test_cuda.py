"""Needs a CUDA device: pytest -m gpu tests/gpu. The CPU path is the reference."""

from __future__ import annotations

import pytest
import torch

import train_gpt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ARGUMENTS = [
    "PRESET=demo", "SCALE=tiny", "NUM_LAYERS=3", "MODEL_DIM=128", "NUM_HEADS=4", "NUM_KV_HEADS=2", "VOCAB_SIZE=256", "TRAIN_SEQ_LEN=64",
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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_equal_those_of_the_cpu(dtype: str, tolerance: float, compiled: bool) -> None:
    batch = rows()
    reference, model = model_on("cpu", "float32"), model_on("cuda", dtype)
    phase = train_gpt.Schedule(reference.config).plain
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    expected = reference(batch[:, :-1], batch[:, 1:], phase)
    found = forward(batch[:, :-1].cuda(), batch[:, 1:].cuda(), phase).cpu()
    assert (found - expected).abs().max() < tolerance * expected.mean()


def test_orthogonalise_in_bfloat16_stays_near_the_float32_result() -> None:
    matrices = torch.randn(3, 96, 192, generator=torch.Generator().manual_seed(0))
    expected = train_gpt.orthogonalise(matrices, 5, "polar_express")
    found = train_gpt.orthogonalise(matrices.cuda(), 5, "polar_express").float().cpu()
    assert (found - expected).norm() / expected.norm() < 0.05


def test_one_training_step_equals_the_cpus() -> None:
    weights = {}
    for device in ("cpu", "cuda"):
        model = model_on(device, "float32")
        world = train_gpt.World(device)
        optimizer = train_gpt.Optimizer(model, model.config, world)
        batch = rows().to(device)
        knobs = train_gpt.Knobs(train_gpt.Schedule(model.config).plain, 1.0, 0.9)
        loss = model(batch[:, :-1], batch[:, 1:], knobs.phase).mean()
        loss.backward()
        stats = optimizer.step(loss, knobs)
        assert bool(train_gpt.HostCopy(stats).read()[0] > 0)
        weights[device] = torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])
    assert (weights["cuda"] - weights["cpu"]).norm() / weights["cpu"].norm() < 0.01
