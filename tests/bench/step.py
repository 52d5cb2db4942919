"""Times training steps: milliseconds, tokens and FLOPs a second, memory, launches, and where the time goes; phase by phase, on a CPU or a GPU.

    python tests/bench/step.py PRESET=demo                                     every phase of a preset, in the shapes it trains in
    python tests/bench/step.py PRESET=frontier --share 8                       one of eight ranks' share of the batch, as on a machine of eight GPUs
    python tests/bench/step.py PRESET=demo --against tests/bench/plain_gpt.py  and another script's step on the same shapes, alternating
    python tests/bench/step.py PRESET=frontier --share 8 --kernels 20          and the 20 kernels that take the longest
    python tests/bench/step.py PRESET=frontier --share 8 --try KERNELS=none --try MLP_POST_ONLY=1 --try FP8=head    other settings, alternating

Rows are random tokens cut into documents of 900 tokens on average, so no data is needed. A script for --against defines opponent(config, device) as
plain_gpt.py does. FLOPs are those of all matrix products and attention of a step, the optimiser's included, counted by PyTorch on an eager one; bytes
are what its operators read and write, an upper bound that fusion lowers. Times are medians; arms take turns of a few steps, and ratios are medians
over the turns with their quartiles, so that a busy machine slows all alike. --json FILE keeps the numbers.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bfloat16
MEAN_DOCUMENT = 900
TURN = 5  # steps of an arm before the next one's


class Rows:
    """In place of a loader: the same random rows every time, made once."""

    def __init__(self, config: train_gpt.Config) -> None:
        self.config, self.bounds, self.state = config, train_gpt.DocumentBounds(config), {"tokens": 0}
        self.made: dict[tuple[int, int], Tensor] = {}

    def next_rows(self, num_rows: int, seq_len: int, world: train_gpt.World) -> Tensor:
        """Returns (num_rows, seq_len + 1) on the CPU."""
        if (num_rows, seq_len) not in self.made:
            self.made[num_rows, seq_len] = self.make(num_rows, seq_len)
        return self.made[num_rows, seq_len]

    def make(self, num_rows: int, seq_len: int) -> Tensor:
        """Returns (num_rows, seq_len + 1) random tokens, cut into documents."""
        generator = torch.Generator().manual_seed(num_rows)
        low = min(self.config.bos_id + 1, self.config.vocab_size - 1)
        rows = torch.randint(low, self.config.vocab_size, (num_rows, seq_len + 1), generator=generator)
        return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 1 / MEAN_DOCUMENT, self.config.bos_id)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        return out


class Arm(NamedTuple):
    """Something that trains."""

    name: str
    step: Callable[[], None]
    flops: float  # of one step
    bytes: float
    tokens: int


def our_step(config: train_gpt.Config, phase: train_gpt.Phase, kernels: train_gpt.Kernels, world: train_gpt.World) -> Callable[[], None]:
    """Returns our training step in a phase, averages included."""
    torch.manual_seed(config.seed)
    model = train_gpt.GPT(config, train_gpt.compute_dtype(config, world.device), kernels).to(world.device)
    model.init_weights()
    optimizer, loader = train_gpt.Optimizer(model, config, world), Rows(config)
    averages, forward = train_gpt.Averages(model, config), train_gpt.training_forward(model, config)
    knobs = train_gpt.Knobs(phase, 0.01, config.muon_momentum, 1.0)
    steps = itertools.count(1)

    def step() -> None:
        train_gpt.training_step(forward, optimizer, loader, knobs)  # type: ignore[arg-type]
        averages.update(next(steps), 0.01)

    return step


def our_arm(name: str, config: train_gpt.Config, phase: train_gpt.Phase, world: train_gpt.World) -> Arm:
    """Returns our training step in a phase, with what was counted in an eager one by plain kernels."""
    kernels, chosen = train_gpt.choose_fast_forms(config, world)
    print(f"{name}: {chosen}", flush=True)
    plain = train_gpt.Kernels(train_gpt.ATTENTION["sdpa"]())
    flops, traffic = counted(our_step(replace(config, compile=False), replace(phase, qat=False), plain, world))
    return Arm(name, our_step(config, phase, kernels, world), flops, traffic, phase.batch_tokens)


def their_arm(path: Path, config: train_gpt.Config, phase: train_gpt.Phase, device: torch.device) -> Arm:
    """Returns the training step of another script on the same rows."""
    spec = importlib.util.spec_from_file_location("opponent", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loops = config.num_loops if len(phase.order) > config.num_layers else 0
    shaped = replace(config, train_seq_len=phase.seq_len, train_batch_tokens=phase.batch_tokens, num_loops=loops)
    rows = Rows(config).next_rows(phase.batch_tokens // phase.seq_len, phase.seq_len, train_gpt.World("cpu")).to(device)
    torch.manual_seed(config.seed)
    eager, step = module.opponent(replace(shaped, compile=False), device), module.opponent(shaped, device)
    return Arm(path.stem, lambda: step(rows), *counted(lambda: eager(rows)), phase.batch_tokens)


def counted(step: Callable[[], None]) -> tuple[float, float]:
    """Returns (FLOPs, bytes) of a step."""
    with FlopCounterMode(display=False) as flops:
        step()
    with Traffic() as traffic:
        step()
    return float(flops.get_total_flops()), float(traffic.bytes)


def timed(arms: Sequence[Arm], device: torch.device, warm_up: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of every timed step of every arm, which take turns."""

    def run(arm: Arm) -> float:
        began = time.perf_counter()
        arm.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for arm in arms:
        for _ in range(warm_up):
            run(arm)
    for _ in range(math.ceil(steps / TURN)):
        for arm in arms:
            run(arm)  # the caches are the other arm's
            seconds[arm.name] += [run(arm) for _ in range(TURN)]
    return seconds


def profiled(arm: Arm, device: torch.device, kernels: int) -> tuple[int, str]:
    """Returns (launches of a step on a GPU, or operators on a CPU; the table of the longest kernels)."""
    activities = [torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        arm.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profile.key_averages()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return sum(event.count for event in events), events.table(sort_by=key, row_limit=kernels, max_name_column_width=60)


def speed_ratio(seconds: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Returns (lower quartile, median, upper quartile) over the turns of how many steps the first does in the time of one of the others'.

    Arms that take turns share whatever slows the machine for longer than a turn; the ratio of their medians over all turns does not.
    """
    turns = range(0, len(seconds), TURN)
    ratios = [statistics.median(others[at : at + TURN]) / statistics.median(seconds[at : at + TURN]) for at in turns]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high


def report(arm: Arm, seconds: Sequence[float], others: Mapping[str, Sequence[float]], device: torch.device, peak: float) -> dict[str, Any]:
    """Prints and returns the numbers of an arm; ratios to the first arm are medians over the turns."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    row: dict[str, Any] = {
        "name": arm.name, "ms": 1000 * median, "ms_quartiles": [1000 * low, 1000 * high], "steps": len(seconds), "tokens_per_second": arm.tokens / median,
        "tflops": arm.flops / median / 1e12, "flops_per_token": arm.flops / arm.tokens, "bytes_per_token": arm.bytes / arm.tokens,
    }  # fmt: skip
    text = f"  {arm.name:<28} {row['ms']:9.1f} ms ({row['ms_quartiles'][0]:.1f} to {row['ms_quartiles'][1]:.1f})  {row['tokens_per_second'] / 1e3:9.1f} ktok/s"
    text += f"  {row['tflops']:8.3f} TFLOP/s" + (f" = {100 * row['tflops'] / peak:.1f}% of peak" if peak else "")
    text += f"  {row['flops_per_token'] / 1e6:.1f} MFLOP and {row['bytes_per_token'] / 1e3:.0f} kB (unfused) a token"
    if device.type == "cuda":
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        text += f"  peak {row['peak_mib']:,.0f} MiB (all arms)"
    first = next(iter(others.values()))
    if first is not seconds:
        low, row["speed_against_first"], high = speed_ratio(seconds, first)
        text += f"  {row['speed_against_first']:.3f} x ({low:.3f} to {high:.3f}) the first's steps"
    print(text, flush=True)
    return row


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="NAME=value, as train_gpt.py takes them")
    parser.add_argument("--share", type=int, default=1, help="ranks that would share the batch: one's part is timed")
    parser.add_argument("--against", type=Path, action="append", default=[], help="another script's step on the same shapes")
    parser.add_argument("--try", dest="others", action="append", default=[], help="settings of another arm of ours, separated by spaces")
    parser.add_argument("--phase", type=int, action="append", help="only this phase, counted from 0")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kernels", type=int, default=0, help="show so many of the longest kernels")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    arms_settings = {"train_gpt": [], **{text: text.split() for text in arguments.others}}
    try:
        configs = {name: train_gpt.parse_config([*arguments.settings, *more], {}) for name, more in arms_settings.items()}
    except train_gpt.ConfigError as problem:
        raise SystemExit(str(problem)) from None
    world = train_gpt.World(configs["train_gpt"].device)
    device_name = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{world.device.type}, {arguments.threads} threads"
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device_name), 0.0)
    print(f"{device_name}, PyTorch {torch.__version__}, {' '.join(arguments.settings)}", flush=True)
    results = []
    for number, phase in enumerate(train_gpt.Schedule(configs["train_gpt"]).phases()):
        if arguments.phase and number not in arguments.phase:
            continue
        rows = max(phase.batch_tokens // phase.seq_len // arguments.share, 1)
        shared = replace(phase, batch_tokens=rows * phase.seq_len)
        order = ",".join(map(str, phase.order))
        print(f"phase {number}: layers {order}  {rows} rows of {phase.seq_len} tokens  qat {int(phase.qat)}", flush=True)
        arms = [our_arm(name, config, shared, world) for name, config in configs.items()]
        arms += [their_arm(path, configs["train_gpt"], shared, world.device) for path in arguments.against]
        seconds = timed(arms, world.device, arguments.warm_up, arguments.steps)
        for arm in arms:
            row = report(arm, seconds[arm.name], seconds, world.device, peak)
            launches, table = profiled(arm, world.device, arguments.kernels)
            row |= {"phase": number, "launches": launches, "device": device_name, "torch": torch.__version__}
            print(f"  {arm.name:<28} {launches:,} {'launches' if world.device.type == 'cuda' else 'operators'} a step", flush=True)
            if arguments.kernels:
                print(table, flush=True)
            results.append(row)
        if arguments.against:
            ours, theirs = arms[0], arms[-1]
            low, middle, high = (ratio * ours.flops / theirs.flops for ratio in speed_ratio(seconds[ours.name], seconds[theirs.name]))
            print(f"  FLOPs a second: {middle:.3f} x ({low:.3f} to {high:.3f}) those of {theirs.name}", flush=True)
    if arguments.json:
        train_gpt.atomic_write(arguments.json, json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    main()
