"""The whole run on a simulated GPU (simulated_gpu.py): nothing mixes devices, the host does not wait inside a step, and an artifact scores as on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import simulated_gpu
import torch
from conftest import ROOT, Ended
from torch import Tensor

import train_gpt

RunHere = Callable[..., Ended]
GPU = {
    "DEVICE": "cuda", "COMPILE": 0, "COMPUTE_DTYPE": "float32", "ATTENTION_BACKEND": "sdpa", "KERNELS": "none", "ITERATIONS": 6, "WARMDOWN_FRAC": 0.3,
    "VAL_BATCH_SIZE": 8192, "TRAIN_SEQ_LEN": 64, "MICRO_BATCH_TOKENS": 16384,
}  # fmt: skip
# Between them every scheme, coder, evaluation, average and optional module.
RUNS: dict[str, dict[str, Any]] = {
    "starter": {"QAT_START_FRAC": 0.5, "GRAD_CLIP_NORM": 1, "VAL_LOSS_EVERY": 3, "CHECKPOINT_EVERY": 2},
    "default": {"PRESET": "default", "NUM_LAYERS": 4, "COMPUTE_DTYPE": "bfloat16", "QAT_START_FRAC": 0.7, "TTT_PREFIX_DOCS": 4, "MAX_WALLCLOCK_SECONDS": 600},
    "gptq": {"PRESET": "frontier", "NUM_LAYERS": 4, "QAT_START_FRAC": 0.7, "LQER_TOP_K": 2, "TTT_PREFIX_DOCS": 4, "AUDIT": 1, "AUDIT_TOKENS": 512},
    "adaptive": {"PRESET": "adaptive_clip", "NUM_LAYERS": 4, "QAT_START_FRAC": 0.7, "QAT_LOOP_NOISE": 0.5, "FINAL_EVAL": "ttt_sgd", "EVAL_SECONDS": 3000},
    "recurrent": {"PRESET": "recurrent", "COMPUTE_DTYPE": "bfloat16", "TTT_LORA_RANK": 2, "FINAL_EVAL": "ttt_lora", "SWA_EVERY": 2, "TILT_ORDERS": "2,4"},
    "gptq_lite": {"PRESET": "gptq_lite", "NUM_LAYERS": 4, "TIE_EMBEDDINGS": 0, "CODER": "zstd", "DOCUMENTS_FILE": "documents.csv"},
    "swiglu": {"PRESET": "xsa_swiglu_lora_ttt", "NUM_LAYERS": 4, "QUANT_SCHEME": "rate", "CODER": "range", "TTT_LORA_RANK": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of what takes many small operations, each of which the simulation makes ten times slower."""
    monkeypatch.setattr(train_gpt, "HELD_OUT_TOKENS", 4096)
    monkeypatch.setattr(train_gpt, "MOST_PASSES", 1)


@pytest.fixture
def gpu() -> Iterator[simulated_gpu.Traffic]:
    """The simulated device."""
    with simulated_gpu.simulate() as traffic:
        yield traffic


# ----------------------------------------------------------------------------------------------------------------------
# The simulation itself


@pytest.mark.parametrize("mixing", [lambda a, b: a + b, lambda a, b: torch.cat([a, b]), lambda a, b: a @ b.T, lambda a, b: torch.where(b > 0, a, a)])
def test_mixing_devices_is_refused(gpu: simulated_gpu.Traffic, mixing: Callable[[Tensor, Tensor], Tensor]) -> None:
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    assert mixing(there, there).device.type == "cuda" and mixing(here, here).device.type == "cpu"
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        mixing(there, here)


def test_gradients_and_parameters_live_on_the_device(gpu: simulated_gpu.Traffic) -> None:
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(torch.ones(4, 3, device="cuda")).square().sum().backward()
    assert isinstance(layer.weight, torch.nn.Parameter) and layer.weight.grad is not None and layer.weight.grad.device.type == "cuda"
    with pytest.raises(AssertionError, match="numpy"):
        layer.weight.detach().numpy()
    with pytest.raises(AssertionError, match="a generator of the CPU"):
        torch.rand(2, device="cuda", generator=torch.Generator())


@pytest.mark.parametrize(
    ("act", "waits"),
    [
        (lambda x: float(x.sum()), True),
        (lambda x: x.tolist(), True),
        (lambda x: x[x > 0], True),
        (lambda x: x.nonzero(), True),
        (lambda x: x.cpu(), True),
        (lambda x: x.to("cpu", non_blocking=True), False),
        (lambda x: torch.empty(3).copy_(x, non_blocking=True), True),
        (lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True), False),
        (lambda x: torch.ones(3).to("cuda"), True),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), True),
        (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), False),
        (lambda x: torch.tensor([1.0], device="cuda"), True),
        (lambda x: torch.as_tensor([1.0], device="cuda"), True),
        (lambda x: x.new_tensor([1.0]) + x, True),
        (lambda x: x.double().to(x) + x, False),
        (lambda x: x.new_full((), 2.0) * x.masked_fill(x > 0, 0.0), False),
        (lambda x: x.double().cumsum(0).argmax(), False),
    ],
)
def test_what_makes_the_host_wait_is_seen(gpu: simulated_gpu.Traffic, act: Callable[[Tensor], Any], waits: bool) -> None:
    x = torch.ones(3, device="cuda")
    gpu.watching = True
    act(x)
    assert bool(gpu.waits) == waits


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_to_its_device_and_its_artifact_scores_as_on_the_cpu(
    name: str, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {**GPU, **RUNS[name]}
    with simulated_gpu.simulate():
        ended = run_here(tmp_path, **settings, SCORES_FILE=tmp_path / "scores.npy")
    assert ended.code == 0, ended.errors
    result = json.loads((tmp_path / "runs/run/result.json").read_text(encoding="utf-8"))
    assert result["device"] == "cuda" and result["steps"] == 6
    artifact = tmp_path / "runs/run/artifact.bin"
    again = run_here(tmp_path, **{**settings, "DEVICE": "cpu", "RUN_ID": "again", "STAGES": "eval", "ARTIFACT": artifact, "AUDIT": 0})
    assert again.code == 0, again.errors
    expected = json.loads((tmp_path / "runs/again/result.json").read_text(encoding="utf-8"))
    assert result["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


def by_mask(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention over documents laid end to end, by a mask of all pairs and so without reading an offset on the host."""
    ids = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(q), device=q.device, dtype=torch.int32), right=True)
    visible = (ids[:, None] == ids) & torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
    sides = (side.transpose(0, 1)[None] for side in (q, k, v))
    return train_gpt.attention_reference(*sides, visible[None, None])[0].transpose(0, 1)


STEPS = {
    "starter": RUNS["starter"], "default": {"PRESET": "default", "NUM_LAYERS": 4, "GRADIENT_BUCKETS": 2}, "recurrent": RUNS["recurrent"],
    "gptq_lite": {"PRESET": "gptq_lite", "NUM_LAYERS": 4}, "noise": {**RUNS["adaptive"], "QAT_START_FRAC": 0.2},
}  # fmt: skip


def watch(gpu: simulated_gpu.Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists what waits inside a training step, an update of the averages, or a copy of a step's numbers to the host; nothing else of a run."""

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*arguments: Any) -> Any:
            gpu.watching = True
            try:
                return run(*arguments)
            finally:
                gpu.watching = False

        return watching

    for owner, function in ((train_gpt, "training_step"), (train_gpt.Averages, "update"), (train_gpt.HostCopy, "__init__")):
        monkeypatch.setattr(owner, function, watched(getattr(owner, function)))


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_the_host_does_not_wait_inside_a_step(
    name: str, is_ragged: bool, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: simulated_gpu.Traffic
) -> None:
    if is_ragged:
        monkeypatch.setattr(train_gpt, "choose_fast_forms", lambda config, world: (train_gpt.Kernels(train_gpt.ragged(by_mask)), "by mask"))

    calls: list[int] = []
    watch(gpu, monkeypatch)
    step = train_gpt.training_step
    monkeypatch.setattr(train_gpt, "training_step", lambda *arguments: (calls.append(1), step(*arguments))[1])
    ended = run_here(tmp_path, **{**GPU, "COMPUTE_DTYPE": "auto", "VAL_BATCH_SIZE": 1024, "MICRO_BATCH_TOKENS": 2048, **STEPS[name], "STAGES": "train"})
    assert ended.code == 0, ended.errors
    assert len(calls) >= 6 and gpu.waits == []


def test_a_wait_inside_a_step_would_be_found(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: simulated_gpu.Traffic) -> None:
    step = train_gpt.Optimizer.step

    def waiting(self: train_gpt.Optimizer, loss: Tensor, knobs: train_gpt.Knobs) -> train_gpt.StepStats:
        float(loss)
        return step(self, loss, knobs)

    monkeypatch.setattr(train_gpt.Optimizer, "step", waiting)
    watch(gpu, monkeypatch)
    run_here(tmp_path, **GPU, STAGES="train")
    assert {kind for kind, _ in gpu.waits} == {"__float__"} and len(gpu.waits) >= 6  # one a step, of the warm-up too


def test_a_resumed_run_goes_on_on_the_device(run_here: RunHere, tmp_path: Path, gpu: simulated_gpu.Traffic) -> None:
    settings = {**GPU, "EMA_DECAY": 0.5, "LAWA_K": 2, "LAWA_EVERY": 2, "STAGES": "train"}
    assert run_here(tmp_path, **settings, RUN_ID="whole").code == 0
    assert run_here(tmp_path, **settings, RUN_ID="parts", CHECKPOINT_EVERY=3).code == 0
    folder = tmp_path / "runs/parts"
    (folder / "checkpoint_before.pt").replace(folder / "checkpoint.pt")  # after step 3
    ended = run_here(tmp_path, **settings, RUN_ID="parts", CHECKPOINT_EVERY=3, RESUME=1)
    assert ended.code == 0 and "resumed from checkpoint.pt after step" in ended.output, ended.errors
    whole, parts = (train_gpt.read_checkpoint(tmp_path / "runs" / name / "checkpoint.pt")["state"]["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_two_ranks_send_by_nccl_what_is_on_the_device_and_by_gloo_what_is_not(launch: Callable[..., forked.Ranks], run_here: RunHere, tmp_path: Path) -> None:
    settings = {**GPU, **RUNS["gptq"], "AUDIT": 0, "GRADIENT_BUCKETS": 2}
    outcome = launch(tmp_path, ranks=2, script=ROOT / "tests" / "simulated_gpu.py", **settings, RUN_ID="two").finish(120)
    assert outcome.codes == [0, 0], outcome.output
    with simulated_gpu.simulate():
        assert run_here(tmp_path, **settings, RUN_ID="one").code == 0
    one, two = (json.loads((tmp_path / "runs" / name / "result.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert two["world_size"] == 2 and two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
