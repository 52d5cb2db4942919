"""Compares quantisers and coders on trained checkpoints, at equal bytes: what does each cost?

    python tests/bench/quantisation.py runs/A/checkpoint.pt [runs/B/checkpoint.pt ...]      every scheme x coder, and each role alone
    python tests/bench/quantisation.py --curve runs/A/checkpoint.pt ...                     the tax from 1.5 to 4 bits per weight, gptq against rate
    python tests/bench/quantisation.py --qat runs/A/checkpoint.pt ...                       the same with late QAT, from a checkpoint at 80% of the steps
    python tests/bench/quantisation.py --loops runs/A/checkpoint.pt ...                     of looped layers: how the error grows from pass to pass
    python tests/bench/quantisation.py --table                                              only write the tables and plots again

The bytes to meet are those of `gptq` with the constants of the public records (6 and 7 bits, 11.5 / 13 / 14 standard deviations) and the best byte
coder for it. Every other row is brought to within 0.3% of them by scaling its steps; rowmax and gptq_lite, whose steps are tied to their widths,
stand at their own bytes. KL is from the unquantised model, in nats per token, on the validation split; its text and that of the calibration are
the checkpoint's own (DATA_PATH). Finished rows are kept in records/quantisation_cpu/results.jsonl and are not measured again.
"""

import argparse
import json
import lzma
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from train_gpt import Stored  # noqa: E402

RECORDS = ROOT / "records" / "quantisation_cpu"
FOLDER = RECORDS  # of results.jsonl and the page; main() sets it
PUBLIC = {"quant_scheme": "gptq", "matrix_bits": 6, "embed_bits": 7}
CLIPS = ("attn_clip_sigmas", "mlp_clip_sigmas", "matrix_clip_sigmas", "embed_clip_sigmas")
CURVE_BITS = (1.5, 2.0, 2.5, 3.0, 4.0)
QAT_BITS = (2.0, 3.0, 1.5, 4.0)  # the order of interest: each point trains a model


class Bench(NamedTuple):
    """A checkpoint with its statistics and the text that quantised models are scored on."""

    name: str
    step: int
    config: train_gpt.Config
    model: train_gpt.GPT
    world: train_gpt.World
    curvatures: Mapping[str, train_gpt.Curvature]
    rows: Tensor  # of the validation split
    bytes_per_token: float
    weights: int


def open_bench(path: Path, eval_tokens: int, calibration_tokens: int) -> Bench:
    """Returns the bench of a checkpoint."""
    saved = train_gpt.read_checkpoint(path)
    known = {declared.name for declared in fields(train_gpt.Config)} - {"quant_scheme", "coder", "matrix_bits", "embed_bits", "qat_start_frac"}
    settings = {name: value for name, value in saved["settings"].items() if name in known}
    config = train_gpt.Config(**{**settings, "compile": False, "device": "cpu", "calibration_tokens": calibration_tokens})
    model, world = train_gpt.GPT(config), train_gpt.World("cpu")
    train_gpt.load_weights(model, saved["state"]["model"])
    loader = train_gpt.TrainLoader(config)
    loader.state = dict(saved["state"]["loader"])
    curvatures = train_gpt.calibrate(model, train_gpt.Schedule(config).scored_phase, loader, world)
    val = train_gpt.load_val(config)
    count = min(eval_tokens, len(val.tokens) - 1) // config.train_seq_len
    spans = [val.tokens[k * config.train_seq_len : (k + 1) * config.train_seq_len + 1].astype(np.int64) for k in range(count)]
    weights = sum(part.weight.numel() for part in train_gpt.weight_parts(model).values())
    text_bytes = float(val.target_bytes[: count * config.train_seq_len].sum()) / (count * config.train_seq_len)
    name = f"{path.parent.name}-{saved['step']}"
    return Bench(name, saved["step"], config, model, world, curvatures, torch.from_numpy(np.stack(spans)), text_bytes, weights)


def twin(bench: Bench, **settings: Any) -> train_gpt.GPT:
    """Returns the same weights under other settings."""
    model = train_gpt.GPT(replace(bench.config, **settings))
    train_gpt.load_weights(model, dict(bench.model.named_parameters()))
    return model


def costs(bench: Bench, stored: Mapping[str, Stored], roles: Sequence[str] = ()) -> dict[str, float]:
    """Returns what the weights of these roles (all, if none is named) cost when they are replaced by their stored form."""
    parts = train_gpt.weight_parts(bench.model)
    chosen = {name: entry.weight() for name, entry in stored.items() if not roles or parts[name].role.value in roles}
    other = train_gpt.GPT(bench.config)
    train_gpt.load_weights(other, {**{name: p.detach() for name, p in bench.model.named_parameters()}, **chosen})
    kl, change = train_gpt.divergence(bench.model, other, bench.rows, bench.world)
    proxy = sum(predicted(bench.curvatures[name], weight - parts[name].weight.detach()) for name, weight in chosen.items())
    return {"kl": kl, "loss_change": change, "bpb_change": change / math.log(2) / bench.bytes_per_token, "proxy": proxy}


def predicted(curvature: train_gpt.Curvature, error: Tensor) -> float:
    """Returns tr(G E H E^T) / 2."""
    assert curvature.outputs is not None
    error, g = error.double(), curvature.outputs.double()
    return 0.5 * float(((g[:, None] * error if g.dim() == 1 else g @ error) * (error @ curvature.inputs.double())).sum())


# -- Coders: bytes of everything that is stored.


def inefficiency_bits(curvatures: Sequence[train_gpt.Curvature], grids: Sequence[train_gpt.Grid], shapes: Sequence[torch.Size]) -> float:
    """Returns I = log2(arithmetic / geometric mean of g_i d_j step_ij^2) / 2 over all weights: bits per weight that other steps could save at high rate."""
    logs = []
    for curvature, grid, shape in zip(curvatures, grids, shapes, strict=True):
        if curvature.outputs is not None:
            g = curvature.outputs if curvature.outputs.dim() == 1 else curvature.outputs.diagonal()
            _, d = train_gpt.reverse_cholesky(train_gpt.damped(curvature.inputs, train_gpt.INPUT_DAMPING))
            rows = (g.double() + train_gpt.DIAGONAL_DAMPING * g.double().mean() + 1e-20).log().cpu()[:, None]
            logs.append((rows + d.log().cpu() + 2 * (grid.step.double() * grid.spacing).clamp_min(1e-30).log().cpu().expand(shape)).flatten())
    every = torch.cat(logs)
    return float(every.logsumexp(dim=0) - math.log(len(every)) - every.mean()) / math.log(4)


def packed_bytes(bench: Bench, stored: Mapping[str, Stored], step: float, **layout: Any) -> int:
    """Returns the length of the artifact."""
    return len(train_gpt.pack(twin(bench, **layout), stored, step).data)


def external_bytes(bench: Bench, stored: Mapping[str, Stored], compressor: Callable[[bytes], int]) -> int:
    """Returns the length of the artifact if the codes of each role went, rows sorted by similarity and by columns, through another compressor."""
    without = {name: entry._replace(codes=np.zeros_like(entry.codes)) for name, entry in stored.items()}
    roles = train_gpt.parameter_roles(bench.model)
    groups: dict[train_gpt.Role, bytes] = {}
    for name, entry in stored.items():
        codes = entry.codes.astype(np.int8)
        order = train_gpt.similar_rows(codes)
        groups[roles[name]] = groups.get(roles[name], b"") + codes[order].T.tobytes()
    orders = sum(2 * len(entry.codes) for entry in stored.values())
    empty = packed_bytes(bench, without, 0.0, coder="brotli", code_order="columns")
    return empty + orders + sum(compressor(data) for data in groups.values())


def lrzip_bytes(data: bytes) -> int:
    """Returns the length of `lrzip -z` (ZPAQ) of `data`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes"
        path.write_bytes(data)
        subprocess.run(["lrzip", "-N", "0", "-z", "-L", "9", "-q", "-f", str(path)], check=True, capture_output=True)
        return (Path(folder) / "codes.lrz").stat().st_size


def lzma_bytes(data: bytes) -> int:
    """Returns the length of LZMA of `data`, for one-byte symbols."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))


CODERS: dict[str, dict[str, Any]] = {
    "zlib": {"coder": "zlib"},
    "zstd": {"coder": "zstd"},
    "brotli": {"coder": "brotli"},
    "brotli, columns": {"coder": "brotli", "code_order": "columns", "byte_shuffle": True},
    "brotli, sorted": {"coder": "brotli", "code_order": "sorted", "byte_shuffle": True},
    "range": {"coder": "range"},
}


def adaptive_bits(codes: np.ndarray, spacing: int) -> float:
    """Returns the ideal adaptive code length in bits of a matrix: every symbol by counts of what was seen in its context, no side information.

    The context is the size to expect from the running means of its row and its column, a quarter of an octave wide, and on a trellis the parity.
    """
    import numba

    @numba.njit
    def total(symbols, odd, size):  # type: ignore[no-untyped-def]
        rows, columns = symbols.shape
        half = 40
        counts = np.full((2, 64, 2 * half + 1), 0.02)
        sums = np.full((2, 64), 0.02 * (2 * half + 1))
        row_mean, bits = 0.0, 0.0
        column_total, column_count, whole, seen = np.zeros(columns), np.zeros(columns), 0.0, 0.0
        for i in range(rows):
            row_total, row_count = 0.0, 0.0
            for j in range(columns):
                mean = (whole + 1.0) / (seen + 1.0)
                row_mean = (row_total + 6 * mean) / (row_count + 6)
                column_mean = (column_total[j] + 3 * mean) / (column_count[j] + 3)
                expected = row_mean * column_mean / mean
                context = int(min(63.0, max(0.0, 4 * np.log2(expected + 0.02) + 23)))
                symbol, parity = symbols[i, j], odd[i, j]
                inside = min(max(symbol, -half), half) + half
                bits -= np.log2(counts[parity, context, inside] / sums[parity, context])
                if abs(symbol) >= half:
                    bits += 2 * np.log2(abs(symbol) - half + 1.0) + 1
                counts[parity, context, inside] += 1
                sums[parity, context] += 1
                magnitude = size[i, j]
                row_total, row_count = row_total + magnitude, row_count + 1
                column_total[j], column_count[j] = column_total[j] + magnitude, column_count[j] + 1
                whole, seen = whole + magnitude, seen + 1
        return bits

    symbols = (codes // spacing).astype(np.int64)
    odd = (codes % 2 if spacing == 2 else np.zeros_like(codes)).astype(np.int64)
    return float(total(symbols, odd, np.abs(codes) / spacing))


# -- Schemes at a given number of bytes.


class Outcome(NamedTuple):
    """A scheme at some bytes."""

    stored: dict[str, Stored]
    bytes: int
    step: float  # global step, or scale of the clip factors
    seconds: float  # of the quantiser alone


def meet(budget: int, weights: int, first: float, attempt: Callable[[float], Outcome], passes: int = 6) -> Outcome:
    """Returns the outcome closest below `budget` after some secant steps on the logarithm of the step."""
    tried = [attempt(first)]
    best = tried[0]
    for _ in range(passes):
        if 0.997 * budget <= best.bytes <= budget:
            break
        slope = -weights / 8
        if len(tried) > 1 and tried[-1].step != tried[-2].step:
            slope = min((tried[-1].bytes - tried[-2].bytes) / math.log2(tried[-1].step / tried[-2].step), -weights / 40)
        tried.append(attempt(tried[-1].step * 2 ** ((0.9985 * budget - tried[-1].bytes) / slope)))
        best = min(tried, key=lambda outcome: (outcome.bytes > budget, abs(outcome.bytes - budget)))
    return best


def clipped(bench: Bench, scheme: str, coder: Mapping[str, Any], **settings: Any) -> Callable[[float], Outcome]:
    """Returns an attempt at `gptq`, `adaptive` or another scheme of `quantise`, at a scale of the clip factors."""
    model = twin(bench, **{**PUBLIC, "quant_scheme": scheme, **settings})

    def attempt(scale: float) -> Outcome:
        began = time.perf_counter()
        stored = train_gpt.quantise(model, bench.curvatures, bench.world, scale)
        seconds = time.perf_counter() - began
        return Outcome(stored, packed_bytes(bench, stored, 0.0, **coder), scale, seconds)

    return attempt


def rated(bench: Bench, states: int = 8, *, two_sided: bool = True, rows: bool = True, columns: bool = True) -> Callable[[float], Outcome]:
    """Returns an attempt at `rate` or one of its stages, at a global step."""
    parts = train_gpt.weight_parts(bench.model)
    allocations = {name: train_gpt.allocate(bench.curvatures[name]) for name in parts}

    def level(exponents: np.ndarray) -> np.ndarray:
        return np.full_like(exponents, round(float(exponents.mean())))

    for name, a in allocations.items():
        row_exponents = a.row_exponents if rows else level(a.row_exponents)
        column_exponents = a.column_exponents if columns else level(a.column_exponents)
        allocations[name] = a._replace(row_exponents=row_exponents, column_exponents=column_exponents, outer=a.outer if two_sided else None)

    def attempt(step: float) -> Outcome:
        began = time.perf_counter()

        def work(name: str) -> Stored:
            weight = parts[name].weight.detach()
            allocation = allocations[name].reaching(weight, step)
            grid = allocation.grid(step)
            exponents = (allocation.row_exponents, allocation.column_exponents)
            return Stored(train_gpt.assign_two_sided(weight, grid, allocation, states), grid, 0, states, exponents)

        stored = train_gpt.share_work(bench.world, {name: part.weight.numel() for name, part in parts.items()}, work)
        seconds = time.perf_counter() - began
        return Outcome(stored, packed_bytes(bench, stored, step, coder="range"), step, seconds)

    return attempt


def first_step(bench: Bench, budget: int) -> float:
    """Returns the global step at which `rate` is predicted to fill `budget` bytes."""
    return train_gpt.plan_rate(bench.model, bench.curvatures, budget).step


def measure(bench: Bench) -> None:
    """Measures every row of the table that is not there yet."""
    done = {(row["checkpoint"], row["row"]) for row in read_results()}
    public = clipped(bench, "gptq", CODERS["brotli, sorted"])(1.0)
    rivals = {name: packed_bytes(bench, public.stored, 0.0, **layout) for name, layout in CODERS.items() if name != "range"}
    rivals["lzma, sorted"] = external_bytes(bench, public.stored, lzma_bytes)
    if shutil.which("lrzip"):
        rivals["lrzip, sorted"] = external_bytes(bench, public.stored, lrzip_bytes)
    best = min(rivals, key=lambda name: rivals[name])
    budget = rivals[best]

    def record(row: str, attempt: Callable[[], Outcome], **extra: Any) -> None:
        if (bench.name, row) in done:
            return
        outcome = attempt()
        entry = {"checkpoint": bench.name, "row": row, "bytes": outcome.bytes, "bits_per_weight": 8 * outcome.bytes / bench.weights, "seconds": outcome.seconds}
        entry |= costs(bench, outcome.stored)
        if row.startswith("gptq + range") or "exported" in row:
            entry |= {f"kl_{role}": costs(bench, outcome.stored, [role])["kl"] for role in ("attention", "mlp", "embed")}
        grids, shapes = [entry.grid for entry in outcome.stored.values()], [torch.Size(entry.codes.shape) for entry in outcome.stored.values()]
        entry["inefficiency_bits"] = inefficiency_bits([bench.curvatures[name] for name in outcome.stored], grids, shapes)
        entry |= extra
        append(entry)

    record(f"gptq + {best}", lambda: public._replace(bytes=budget), coders=rivals)
    for name, layout in CODERS.items():
        record(f"gptq + {name}, equal bytes", partial(meet, budget, bench.weights, 1.0, clipped(bench, "gptq", layout)))
    record("adaptive + range", partial(meet, budget, bench.weights, 1.0, clipped(bench, "adaptive", CODERS["range"])))
    record("gptq + LQER + range", partial(meet, budget, bench.weights, 1.0, clipped(bench, "gptq", CODERS["range"], lqer_rank=4)))
    for bits in (5, 6):
        for scheme in ("rowmax", "gptq_lite"):
            settings = {"matrix_bits": bits, "embed_bits": bits}
            record(f"{scheme} int{bits} + range", partial(clipped(bench, scheme, CODERS["range"], **settings), 1.0))
    step = first_step(bench, budget)
    stages = {
        "rate: one step per matrix": rated(bench, 1, two_sided=False, rows=False, columns=False),
        "rate: steps by rows": rated(bench, 1, two_sided=False, columns=False),
        "rate: steps by columns": rated(bench, 1, two_sided=False, rows=False),
        "rate: one-sided": rated(bench, 1, two_sided=False),
        "rate: two-sided": rated(bench, 1),
        "rate: one-sided, trellis": rated(bench, two_sided=False),
        "rate: two-sided, trellis (as exported)": rated(bench),
    }
    for row, stage in stages.items():
        record(row, partial(meet, budget, bench.weights, step, stage))
    ideal_check(bench, budget, step, done)


def ideal_check(bench: Bench, budget: int, step: float, done: set[tuple[str, str]]) -> None:
    """Compares coded sizes with the ideal adaptive code length of the same symbols, for gptq and rate."""
    row = "coded size against ideal adaptive code"
    if (bench.name, row) in done:
        return
    outcomes = {"gptq": clipped(bench, "gptq", CODERS["range"])(1.0), "rate": meet(budget, bench.weights, step, rated(bench))}
    entry: dict[str, Any] = {"checkpoint": bench.name, "row": row}
    for scheme, outcome in outcomes.items():
        entries = outcome.stored.values()
        entry[f"{scheme}_coded"] = sum(len(train_gpt.encode_matrix(e.codes, e.grid.spacing, e.states)) for e in entries)
        entry[f"{scheme}_ideal"] = sum(min(adaptive_bits(e.codes, e.grid.spacing), adaptive_bits(e.codes.T, e.grid.spacing)) for e in entries) / 8
    append(entry)


def at_bits(bench: Bench, scheme: str, bits: float) -> Outcome:
    """Returns gptq or rate at this many bits per weight, everything counted."""
    budget = int(bits * bench.weights / 8)
    if scheme == "gptq":
        return meet(budget, bench.weights, 2.0 ** max(3.5 - bits, 0), clipped(bench, "gptq", CODERS["range"]), passes=10)
    return meet(budget, bench.weights, first_step(bench, budget), rated(bench), passes=10)


def measure_curve(bench: Bench) -> None:
    """Measures gptq and rate at fixed bits per weight."""
    done = {(row["checkpoint"], row["row"]) for row in read_results()}
    for bits in CURVE_BITS:
        for scheme in ("gptq", "rate"):
            row = f"curve {scheme} {bits}"
            if (bench.name, row) in done:
                continue
            outcome = at_bits(bench, scheme, bits)
            append({"checkpoint": bench.name, "row": row, "bytes": outcome.bytes, "bits_per_weight": 8 * outcome.bytes / bench.weights, "step": outcome.step,
                    **costs(bench, outcome.stored)})  # fmt: skip


def finish_run(bench: Bench, path: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """Returns the folder of a run that went on from the checkpoint at `path` under these settings, now or in an earlier call."""
    saved = train_gpt.read_checkpoint(path)
    run_id = f"qat-{bench.name}-{name}"
    config = replace(train_gpt.Config(**{**saved["settings"], "qat_start_frac": 1.0}), run_id=run_id, stages="train,export", resume=False, **settings)
    folder = Path(config.runs_dir) / run_id
    if not (folder / "checkpoint.pt").exists():
        folder.mkdir(parents=True)
        (folder / "train_gpt.py").write_bytes((ROOT / "train_gpt.py").read_bytes())
        train_gpt.write_config(folder, config)
        content = {key: value for key, value in saved.items() if key != "digest"} | {"settings": asdict(config)}
        torch.save({**content, "digest": train_gpt.content_digest(content)}, folder / "checkpoint.pt")
    if not (folder / "artifact.bin").exists():
        subprocess.run([sys.executable, str(folder / "train_gpt.py"), f"@{folder / 'config.env'}", "RESUME=1"], check=True)
    return folder


def measure_qat(bench: Bench, path: Path) -> None:
    """Measures what late QAT saves: gptq and rate at fixed bits per weight, on a run that was stopped at the point where QAT is to start."""
    done = {(row["checkpoint"], row["row"]) for row in read_results()}
    plain = open_bench(finish_run(bench, path, "none", {}) / "checkpoint.pt", bench.rows[:, 1:].numel(), bench.config.calibration_tokens)

    def loss(model: train_gpt.GPT) -> float:
        phase = train_gpt.Schedule(bench.config).scored_phase
        with torch.inference_mode():
            sums = [float(model(rows[:, :-1], rows[:, 1:], phase).sum()) for rows in bench.rows.split(16)]
        return sum(sums) / bench.rows[:, 1:].numel()

    reference = loss(plain.model)
    code_bytes = train_gpt.code_bytes((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    for bits in QAT_BITS:
        budget = int(bits * bench.weights / 8)
        for scheme in ("gptq", "rate"):
            row = f"qat {scheme} {bits}"
            if (bench.name, row) in done:
                continue
            after = at_bits(plain, scheme, bits)
            scaled = {**PUBLIC, **{name: getattr(bench.config, name) * after.step for name in CLIPS}}
            settings = scaled if scheme == "gptq" else {"quant_scheme": "rate"}
            late = {"qat_start_frac": bench.step / bench.config.iterations, "calibration_tokens": bench.config.calibration_tokens}
            folder = finish_run(bench, path, f"{scheme}-{bits}", {**settings, **late, "coder": "range", "bytes_cap": budget + code_bytes})
            artifact = (folder / "artifact.bin").read_bytes()
            config = replace(train_gpt.Config(**train_gpt.read_checkpoint(folder / "checkpoint.pt")["settings"]), compile=False, device="cpu")
            change = loss(train_gpt.read_artifact(artifact, config, str(folder))) - reference
            entry = {"checkpoint": bench.name, "row": row, "bytes": len(artifact), "bits_per_weight": 8 * len(artifact) / bench.weights}
            append({**entry, "loss_change": change, "bytes_without": after.bytes, "loss_change_without": costs(plain, after.stored)["loss_change"]})


def stream_errors(bench: Bench, stored: Mapping[str, Stored]) -> list[float]:
    """Returns how far the stream is off after each pass through the looped layers, relative to its size, when all weights are stored."""
    other = train_gpt.GPT(bench.config)
    weights = {name: p.detach() for name, p in bench.model.named_parameters()}
    train_gpt.load_weights(other, {**weights, **{name: entry.weight() for name, entry in stored.items()}})
    streams: list[list[Tensor]] = []
    for model in (bench.model, other):
        streams.append([])
        hook = model.blocks[bench.config.loop_end].register_forward_hook(lambda module, inputs, lanes, into=streams[-1]: into.append(lanes[0]))
        with torch.inference_mode():
            model.logits(bench.rows[:16, :-1], train_gpt.Schedule(bench.config).scored_phase)
        hook.remove()
    return [float((after - before).norm() / before.norm()) for before, after in zip(*streams, strict=True)]


def measure_loops(bench: Bench) -> None:
    """Measures plain rounding, gptq and rate on a model with looped layers."""
    done = {(row["checkpoint"], row["row"]) for row in read_results()}
    attempts: dict[str, Callable[[], Outcome]] = {}
    for width in (4, 5, 6, 8):
        settings = {"matrix_bits": width, "embed_bits": width}
        attempts[f"rowmax int{width}"] = partial(clipped(bench, "rowmax", CODERS["range"], **settings), 1.0)
    for bits in (2.0, 3.0, 4.0):
        for scheme in ("gptq", "rate"):
            attempts[f"{scheme} {bits}"] = partial(at_bits, bench, scheme, bits)
    for name, attempt in attempts.items():
        if (bench.name, f"loops {name}") not in done:
            outcome = attempt()
            sizes = {"bytes": outcome.bytes, "bits_per_weight": 8 * outcome.bytes / bench.weights}
            append({"checkpoint": bench.name, "row": f"loops {name}", **sizes, **costs(bench, outcome.stored), "passes": stream_errors(bench, outcome.stored)})


def read_results() -> list[dict[str, Any]]:
    """Returns every finished row."""
    return [json.loads(line) for line in (FOLDER / "results.jsonl").read_text(encoding="utf-8").splitlines()] if (FOLDER / "results.jsonl").exists() else []


def append(entry: Mapping[str, Any]) -> None:
    """Keeps a finished row."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    shown = "  ".join(f"{key} {entry[key]:.5g}" for key in ("bytes", "bits_per_weight", "kl", "loss_change") if key in entry)
    print(f"{entry['checkpoint']}  {entry['row']}: {shown}", flush=True)


# -- The page.


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns "mean ± standard deviation" to some significant digits."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}g}" + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def by_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the results of every row, in the order in which rows were first measured."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["row"].replace("lrzip, sorted", "best byte coder"), []).append(row)
    return groups


def write_page() -> None:
    """Writes records/quantisation_cpu/README.md and its plot from the finished rows."""
    groups = by_row(read_results())
    table = {name: rows for name, rows in groups.items() if not name.startswith(("curve", "loops", "qat")) and "kl" in rows[0]}
    checkpoints = sorted({row["checkpoint"] for rows in table.values() for row in rows})
    lines = [
        "# Quantisers and coders at equal bytes, on a CPU", "",
        f"Written by `python tests/bench/quantisation.py --table`. Checkpoints: {', '.join(checkpoints)}.",
        "Mean ± standard deviation over checkpoints; n = how many.",
        "KL and loss are in nats per token against the unquantised model, on the first 32,768 tokens of the validation split; the change of the loss has",
        "noise of some 0.0005, KL next to none.",
        "Proxy is tr(G E H E^T) / 2, what the curvature predicts; I is the inefficiency of the steps in bits per weight (see `inefficiency_bits`).", "",
        "| scheme and coder | n | bytes | bits/weight | KL | loss | bpb | proxy | I | seconds |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, rows in table.items():
        cells = [spread([row[key] for row in rows], digits) for key, digits in (("kl", 3), ("loss_change", 2), ("bpb_change", 2), ("proxy", 2))]
        sizes = f"{statistics.fmean(row['bytes'] for row in rows):,.0f} | {statistics.fmean(row['bits_per_weight'] for row in rows):.3f}"
        ends = f"{statistics.fmean(row['inefficiency_bits'] for row in rows):.2f} | {statistics.fmean(row['seconds'] for row in rows):.1f}"
        lines.append(f"| {name} | {len(rows)} | {sizes} | {' | '.join(cells)} | {ends} |")
    roles = {name: rows for name, rows in table.items() if "kl_mlp" in rows[0]}
    lines += ["", "KL when only one role is quantised, the others as trained:", "", "| | attention | MLP | embedding |", "|---|---:|---:|---:|"]
    for name, rows in roles.items():
        lines.append(f"| {name} | " + " | ".join(spread([row[f"kl_{role}"] for row in rows], 3) for role in ("attention", "mlp", "embed")) + " |")
    coders = [row["coders"] for rows in table.values() for row in rows if "coders" in row]
    if coders:
        lines += ["", "Bytes of the same `gptq` codes:", "", "| coder | bytes |", "|---|---:|"]
        lines += [f"| {name} | {statistics.fmean(entry[name] for entry in coders):,.0f} |" for name in coders[0]]
    for row in groups.get("coded size against ideal adaptive code", []):
        pairs = [(scheme, row[f"{scheme}_coded"], row[f"{scheme}_ideal"]) for scheme in ("gptq", "rate")]
        shares = ", ".join(f"{scheme} {coded:,} against {ideal:,.0f} bytes ({100 * (coded / ideal - 1):+.2f}%)" for scheme, coded, ideal in pairs)
        lines += ["", f"`range`, side information included, against the ideal adaptive code length of the same symbols, {row['checkpoint']}: {shares}."]
    curve: dict[str, list[tuple[float, list[Mapping[str, Any]]]]] = {name.split()[1]: [] for name in groups if name.startswith("curve")}
    for name, rows in groups.items():
        if name.startswith("curve"):
            _, scheme, bits = name.split()
            curve[scheme].append((float(bits), rows))
    if curve:
        lines += ["", "The tax at other rates (KL in nats per token; `range` coder for both):", ""]
        lines += ["| bits/weight | n | gptq | rate | ratio |", "|---:|---:|---:|---:|---:|"]
        plain_curve, our_curve = (sorted(curve[scheme], key=lambda entry: entry[0]) for scheme in ("gptq", "rate"))
        for (rate, plain), (_, ours) in zip(plain_curve, our_curve, strict=False):
            means = [statistics.fmean(row["kl"] for row in rows) for rows in (plain, ours)]
            lines.append(f"| {rate} | {len(ours)} | {spread([r['kl'] for r in plain], 3)} | {spread([r['kl'] for r in ours], 3)} | {means[0] / means[1]:.1f} |")
        lines += ["", "![KL against bits per weight](curve.png)"]
        plot_curve(curve)
    qat = {name.removeprefix("qat "): rows for name, rows in groups.items() if name.startswith("qat")}
    if qat:
        late = ", ".join(sorted({row["checkpoint"] for rows in qat.values() for row in rows}))
        lines += ["", f"What late QAT does ({late}: the last 20% of 800 steps with it or without; `range` coder). Loss in nats per token above that of the"]
        lines += ["model trained without QAT, before quantisation; the scale of the steps is that which fills the bytes when QAT starts.", ""]
        lines += ["| bits/weight | n | gptq | gptq, late QAT | rate | rate, late QAT |", "|---:|---:|---:|---:|---:|---:|"]
        for rate in sorted({float(name.split()[1]) for name in qat}):
            pair = [qat.get(f"{scheme} {rate}", []) for scheme in ("gptq", "rate")]
            cells = [spread([row[key] for row in rows], 3) if rows else "" for rows in pair for key in ("loss_change_without", "loss_change")]
            lines.append(f"| {rate} | {max(map(len, pair))} | {' | '.join(cells)} |")
    loops = {name.removeprefix("loops "): rows for name, rows in groups.items() if name.startswith("loops")}
    if loops:
        looped = ", ".join(sorted({row["checkpoint"] for rows in loops.values() for row in rows}))
        lines += ["", f"A model whose layers run several times ({looped}; `range` coder):"]
        lines += ["how far the stream is off after each pass, relative to its size, and what that costs.", ""]
        lines += ["| scheme | bits/weight | error after pass 1, 2, 3 ... | KL | proxy / KL |", "|---|---:|---:|---:|---:|"]
        for name, (row, *_) in sorted(loops.items(), key=lambda entry: entry[1][0]["bits_per_weight"]):
            errors = ", ".join(f"{error:.4f}" for error in row["passes"])
            scheme = name.split()[0] if "." in name else name
            lines.append(f"| {scheme} | {row['bits_per_weight']:.2f} | {errors} | {row['kl']:.3g} | {row['proxy'] / row['kl']:.2f} |")
    (FOLDER / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"wrote {FOLDER / 'README.md'}")


def plot_curve(curve: Mapping[str, Sequence[tuple[float, Sequence[Mapping[str, Any]]]]]) -> None:
    """Writes the plot of KL against bits per weight, one line a checkpoint and scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for scheme, colour in (("gptq", "tab:red"), ("rate", "tab:blue")):
        points: dict[str, list[tuple[float, float]]] = {}
        for _, rows in sorted(curve.get(scheme, []), key=lambda entry: entry[0]):
            for row in rows:
                points.setdefault(row["checkpoint"], []).append((row["bits_per_weight"], row["kl"]))
        for number, line in enumerate(points.values()):
            axes.plot(*zip(*line, strict=True), "o-", color=colour, alpha=0.7, label=scheme if number == 0 else None)
    axes.set(yscale="log", xlabel="bits per weight, everything counted", ylabel="KL, nats per token", title="What quantisation costs")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(FOLDER / "curve.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--curve", action="store_true", help="the tax from 1.5 to 4 bits per weight")
    parser.add_argument("--qat", action="store_true", help="the same with and without late QAT")
    parser.add_argument("--loops", action="store_true", help="looped layers: how the error grows from pass to pass")
    parser.add_argument("--folder", type=Path, help="where rows and page go (default: a folder beside the first checkpoint)")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--eval-tokens", type=int, default=32768, help="of the validation split")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.checkpoints if not path.is_file()]
    if missing:
        parser.error(f"no such checkpoint: {', '.join(missing)}")
    global FOLDER
    FOLDER = arguments.folder or (arguments.checkpoints[0].parent / "quantisation" if arguments.checkpoints else RECORDS)
    torch.set_num_threads(arguments.threads)
    for path in arguments.checkpoints:
        bench = open_bench(path, arguments.eval_tokens, arguments.calibration_tokens)
        if arguments.qat:
            measure_qat(bench, path)
        else:
            (measure_curve if arguments.curve else measure_loops if arguments.loops else measure)(bench)
    write_page()


if __name__ == "__main__":
    main()
