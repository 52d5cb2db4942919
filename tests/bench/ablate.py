"""Measures each technique on and off against a common base, on real text at small scale, on a CPU.

    python tests/bench/ablate.py                         one seed of every variant that has none yet (a screen)
    python tests/bench/ablate.py --seeds 3 --only xsa,ema  three paired seeds of these
    python tests/bench/ablate.py --time                  step time of every variant as a ratio to the base's, measured in one process
    python tests/bench/ablate.py --table                 only write the table again

Every trial is a run of train_gpt.py with a fixed number of steps; its score is that of the trained (and averaged) weights before quantisation, in
bits per byte of the validation split, chunked. Finished trials are kept in records/ablation_cpu/results.jsonl, one line each, and are not run
again; the table is records/ablation_cpu/README.md. Text: the bundled Shakespeare (`make demo` builds its shards).
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
import report  # noqa: E402

import train_gpt  # noqa: E402

FOLDER = ROOT / "records" / "ablation_cpu"
RESULTS = FOLDER / "results.jsonl"
RATIOS = FOLDER / "step_time_ratios.json"
TECHNIQUES = ROOT / "records" / "TECHNIQUES.md"
SEEDS = (1337, 1, 2, 3, 4)

# Over the plain defaults of the script: 4 layers of width 96.
BASE = (
    "PRESET=baseline DATA_PATH=data/datasets/shakespeare_sp1024 TOKENIZER_PATH=data/datasets/shakespeare_sp1024/tokenizer.model DEVICE=cpu COMPILE=0 "
    "DOC_MASK=1 DATA_SHUFFLE=1 MATRIX_INIT=orthogonal MUON_COEFFICIENTS=polar_express NUM_LAYERS=4 MODEL_DIM=96 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=3 "
    "TRAIN_SEQ_LEN=128 TRAIN_BATCH_TOKENS=1024 MICRO_BATCH_TOKENS=1024 VAL_BATCH_SIZE=16384 ITERATIONS=400 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 "
    "WARMDOWN_ITERS=0 WARMDOWN_FRAC=0.6 MATRIX_LR=0.04 SCALAR_LR=0.04 TIED_EMBED_LR=0.03 MUON_MOMENTUM_WARMUP_STEPS=100 VAL_LOSS_EVERY=0 "
    "TRAIN_LOG_EVERY=100"
)
WD = "MUON_WEIGHT_DECAY=0.1 EMBED_WEIGHT_DECAY=0.1"
BIGRAM = "BIGRAM_HASH_BUCKETS=1024 BIGRAM_HASH_DIM=48"
# What PRESET=default stacks, and a loop, at this size; candidates for the default are tried on top.
STACK = (
    "LEAKY_RELU_SLOPE=0.5 ROPE_DIMS=12 XSA_LAST_N=4 LN_SCALE=1 SKIP_CONNECTIONS=gated NUM_LOOPS=1 LOOP_START=1 LOOP_END=1 ENABLE_LOOPING_AT=0.35 "
    "USE_SMEARGATE=1 SMEARGATE_KIND=add ATTENTION_GATE_WINDOW=12 QK_GAIN_INIT=5.25 PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=3 "
    f"GRAD_CLIP_NORM=0.3 LR_FLOOR_FRAC=0.1 EMA_DECAY=0.98 NORMUON_BETA2=0.95 {WD}"
)
# variant -> settings over the base; "a > b" in the name means: compare with variant b instead of the base.
VARIANTS = {
    "leaky_relu 0.5": "LEAKY_RELU_SLOPE=0.5",
    "leaky_relu 0.3": "LEAKY_RELU_SLOPE=0.3",
    "swiglu": "SWIGLU=1",
    "xsa all layers": "XSA_LAST_N=4",
    "xsa last 2": "XSA_LAST_N=2",
    "attention gate sparse": "ATTENTION_GATE_WINDOW=12",
    "attention gate dense": "ATTENTION_GATE_WINDOW=96",
    "ln_scale": "LN_SCALE=1",
    "partial rope 6 of 24": "ROPE_DIMS=6",
    "partial rope 12 of 24": "ROPE_DIMS=12",
    "qk gain 5": "QK_GAIN_INIT=5",
    "no skips": "SKIP_CONNECTIONS=none",
    "gated skips": "SKIP_CONNECTIONS=gated",
    "parallel gptj": "PARALLEL_RESIDUALS=gptj PARALLEL_START_LAYER=2",
    "parallel lanes": "PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=2",
    "loop 1-2 twice": "NUM_LOOPS=1 LOOP_START=1 LOOP_END=2",
    "loop 1-2 twice from 0.35": "NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 ENABLE_LOOPING_AT=0.35",
    "loop 1-2 twice, loop embedding > loop 1-2 twice": "NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 LOOP_EMBEDDING=1",
    "embed rank 48": "EMBED_RANK=48",
    "smear blend, keep 0.95": "USE_SMEARGATE=1",
    "smear blend, keep 0.5": "USE_SMEARGATE=1 SMEARGATE_INIT=0",
    "smear add": "USE_SMEARGATE=1 SMEARGATE_KIND=add",
    "smear add after norm > smear add": "USE_SMEARGATE=1 SMEARGATE_KIND=add INPUT_STAGES=bigram,norm,smear",
    "smear blend after norm > smear blend, keep 0.95": "USE_SMEARGATE=1 INPUT_STAGES=bigram,norm,smear",
    "bigram": BIGRAM,
    "bigram with scale > bigram": f"{BIGRAM} BIGRAM_HASH_SCALE=0.05",
    "bigram and smear blend": f"{BIGRAM} USE_SMEARGATE=1",
    "smear blend before bigram > bigram and smear blend": f"{BIGRAM} USE_SMEARGATE=1 INPUT_STAGES=smear,bigram,norm",
    "value embedding last 2": "VALUE_EMBED_LAYERS=2,3 VALUE_EMBED_DIM=48",
    "softcap 15": "LOGIT_SOFTCAP=15",
    "softcap 30 up, 15 down": "LOGIT_SOFTCAP_NEGATIVE=15",
    "muon row normalise": "MUON_ROW_NORMALIZE=1",
    "normuon": "NORMUON_BETA2=0.95",
    "muon classic": "MUON_COEFFICIENTS=classic",
    "muon 4 steps": "MUON_BACKEND_STEPS=4",
    "weight decay 0.1": WD,
    "cautious weight decay > weight decay 0.1": f"{WD} CAUTIOUS_WEIGHT_DECAY=1",
    "weight decay tapered > weight decay 0.1": f"{WD} WEIGHT_DECAY_TAPER_FRAC=0.7",
    "grad clip 0.3": "GRAD_CLIP_NORM=0.3",
    "lr floor 0.1": "LR_FLOOR_FRAC=0.1",
    "wsd, decay 0.3": "WARMDOWN_FRAC=0.3",
    "wsd-s, two decays 0.3 > wsd, decay 0.3": "WARMDOWN_FRAC=0.3 WARMDOWN_ENDS=0.5,1",
    "ema 0.98": "EMA_DECAY=0.98",
    "lawa 5 every 10": "LAWA_K=5 LAWA_EVERY=10",
    "swa under 0.2": "SWA_EVERY=5 SWA_START_LR_SCALE=0.2",
    "ema, lr floor 0.1 > lr floor 0.1": "LR_FLOOR_FRAC=0.1 EMA_DECAY=0.98",
    "lawa, lr floor 0.1 > lr floor 0.1": "LR_FLOOR_FRAC=0.1 LAWA_K=5 LAWA_EVERY=5",
    "swa, lr floor 0.1 > lr floor 0.1": "LR_FLOOR_FRAC=0.1 SWA_EVERY=5 SWA_START_LR_SCALE=0.2",
    "rows 32, 64, 128": "TRAIN_SEQ_SCHEDULE=32@0.2,64@0.5,128@1",
    "batch 512, 1024, equal tokens": "TRAIN_BATCH_SCHEDULE=512@0.3,1024@1 ITERATIONS=470",
    "no document mask": "DOC_MASK=0",
    "dynamic skips, last 2": "DYNAMIC_SKIP_LAST_N=2",
    "stack": STACK,
    **{
        f"stack, {name} > stack": f"{STACK} {settings}"
        for name, settings in {
            "row normalise for normuon": "NORMUON_BETA2=0 MUON_ROW_NORMALIZE=1",
            "cautious weight decay": "CAUTIOUS_WEIGHT_DECAY=1",
            "slope 0.3": "LEAKY_RELU_SLOPE=0.3",
            "softcap 30 up, 15 down": "LOGIT_SOFTCAP_NEGATIVE=15",
            "rows 32, 64, 128": "TRAIN_SEQ_SCHEDULE=32@0.1,64@0.7,128@1",
            "dynamic skips, last 2": "DYNAMIC_SKIP_LAST_N=2",
            "smear after norm": "INPUT_STAGES=bigram,norm,smear",
            "bigram with scale": f"{BIGRAM} BIGRAM_HASH_SCALE=0.05",
            "value embedding last 2": "VALUE_EMBED_LAYERS=2,3 VALUE_EMBED_DIM=48",
        }.items()
    },
}
# Lost, and their settings are gone from the script: their results stay in the table.
REMOVED = {
    "parallel lanes, attention leaves > parallel lanes": "PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=2 PARALLEL_FINAL_LANE=attention",
    "parallel lanes, mlp leaves > parallel lanes": "PARALLEL_RESIDUALS=lanes PARALLEL_START_LAYER=2 PARALLEL_FINAL_LANE=mlp",
    "overtone init": "EMBED_INIT=overtone",
    "phase transition mix": "MIX_INIT=phase_transition",
    "lr warm-up 20": "LR_WARMUP_STEPS=20",
    "decay 1 - sqrt": "WARMDOWN_SHAPE=sqrt",
    "decay cosine": "WARMDOWN_SHAPE=cosine",
    "key offset > partial rope 12 of 24": "ROPE_DIMS=12 KEY_OFFSET_LAYERS=0,1,2,3",
    "stack, key offset > stack": f"{STACK} KEY_OFFSET_LAYERS=0,1,2,3",
    "stack, key offset in one layer > stack": f"{STACK} KEY_OFFSET_LAYERS=1",
}


def settings_of(name: str) -> list[str]:
    """Returns the arguments of a variant, or of the base, without its seed."""
    return f"{BASE} {VARIANTS.get(name, REMOVED.get(name, ''))}".split()


def reference_of(name: str) -> str:
    """Returns the variant that `name` is compared with."""
    return name.split(" > ")[1] if " > " in name else "base"


# What does not reach the trained weights, and so no score here.
UNTRAINED = {*train_gpt.FREE_ON_RESUME, *train_gpt.GRID_SETTINGS, "preset"}


def digest_of(name: str) -> str:
    """Returns a digest of what a variant's settings train, "" where they are settings no more."""
    if name in REMOVED:
        return ""
    config = asdict(train_gpt.parse_config(settings_of(name), {}))
    changed = sorted((key, value) for key, value in config.items() if value != getattr(train_gpt.Config, key) and key not in UNTRAINED)
    return hashlib.sha256(repr(changed).encode()).hexdigest()[:16]


def finished() -> list[dict[str, Any]]:
    """Returns the kept results whose configuration is still that of their variant."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    results = [json.loads(line) for line in lines]
    digests = {name: digest_of(name) for name in ("base", *VARIANTS, *REMOVED)}
    used = [digest for digest in digests.values() if digest]
    assert len(used) == len(set(used)), "two variants are one configuration"
    return [result for result in results if digests.get(result["variant"], "gone") in (result["config"], "")]


def run_trial(name: str, seed: int, lock: Lock) -> dict[str, Any]:
    """Returns the result of one training run, after keeping it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train_gpt.py"), *settings_of(name), f"SEED={seed}", "STAGES=train", "RUN_ID=trial", f"RUNS_DIR={folder}"]
        environment = {key: value for key, value in os.environ.items() if key not in train_gpt.SETTINGS} | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if process.returncode:
            raise RuntimeError(f"{name}, seed {seed}: exit code {process.returncode}\n{process.stderr}")
        run = json.loads((Path(folder) / "trial" / "result.json").read_text(encoding="utf-8"))
    result = {
        "variant": name, "seed": seed, "bpb": run["pre_quant_val_bpb"], "params": run["params"], "steps": run["steps"], "torch": run["torch"],
        "seconds": round(time.perf_counter() - began, 1), "config": digest_of(name),
    }  # fmt: skip
    with lock, open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    return result


def time_variants(names: list[str]) -> None:
    """Keeps the step time of every variant as a ratio to the base's: both take turns in this process, so that the machine's load hits both."""
    torch.set_num_threads(1)
    world = train_gpt.World("cpu")

    def stepper(name: str) -> Callable[[], float]:
        config = train_gpt.parse_config(settings_of(name), {})
        torch.manual_seed(config.seed)
        model = train_gpt.GPT(config)
        model.init_weights()
        optimizer, averages = train_gpt.Optimizer(model, config, world), train_gpt.Averages(model, config)
        loader, schedule = train_gpt.TrainLoader(config), train_gpt.Schedule(config)
        knobs = schedule(train_gpt.Progress(380, 0.95, 20.0))  # near the end: loops on, rows at full length
        numbers = itertools.count(381)

        def step() -> float:
            began = time.perf_counter()
            train_gpt.training_step(model, optimizer, loader, knobs)
            averages.update(next(numbers), knobs.lr_scale)
            return time.perf_counter() - began

        return step

    ratios = json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.exists() else {}
    for name in names:
        steps = {key: stepper(key) for key in ("base", name)}
        times: dict[str, list[float]] = {key: [] for key in steps}
        for _ in range(12):
            for key, step in steps.items():
                times[key].append(step())
        ratios[name.split(" > ")[0]] = ratio = round(statistics.median(times[name]) / statistics.median(times["base"]), 3)
        print(f"{name:<55} {ratio:.3f} x the base's {1000 * statistics.median(times['base']):.0f} ms", flush=True)
        RATIOS.write_text(json.dumps(ratios, indent=1) + "\n", encoding="utf-8")


class Row(NamedTuple):
    """A variant against its reference."""

    name: str  # without its reference
    reference: str
    differences: list[float]  # bpb, one a seed
    settings: str

    @property
    def mean(self) -> float:
        """Mean difference in bpb."""
        return statistics.fmean(self.differences)

    @property
    def spread(self) -> str:
        """Standard deviation of the difference between seeds, "" with one seed."""
        return f"{statistics.stdev(self.differences):.4f}" if len(self.differences) > 1 else ""


def compared(results: list[dict[str, Any]]) -> list[Row]:
    """Returns every variant that has a seed in common with its reference, those with most seeds first, then from best to worst."""
    scores: dict[str, dict[int, float]] = {}
    for result in results:
        scores.setdefault(result["variant"].split(" > ")[0], {})[result["seed"]] = result["bpb"]
    rows = []
    for variant, settings in {**VARIANTS, **REMOVED}.items():
        name, reference = variant.split(" > ")[0], reference_of(variant)
        seeds = sorted(set(scores.get(name, {})) & set(scores.get(reference, {})))
        if seeds:
            rows.append(Row(name, reference, [scores[name][seed] - scores[reference][seed] for seed in seeds], settings))
    return sorted(rows, key=lambda row: (-len(row.differences), row.mean))


def write_table() -> None:
    """Writes records/ablation_cpu/README.md and its plot, and our numbers in records/TECHNIQUES.md, from the kept results."""
    results = finished()
    rows = compared(results)
    ratios = json.loads(RATIOS.read_text(encoding="utf-8")) if RATIOS.exists() else {}
    base = [result for result in results if result["variant"] == "base"]
    bpbs = [result["bpb"] for result in base]
    spread = f", standard deviation {statistics.stdev(bpbs):.4f}" if len(bpbs) > 1 else ""
    removed = {name.split(" > ")[0] for name in REMOVED}
    lines = [
        "# Each technique on and off, on a CPU",
        "",
        f"Made by `python tests/bench/ablate.py`; every trial is in `results.jsonl`. A tiny model ({base[0]['params']:,} parameters, {base[0]['steps']}",
        "steps of 1,024 tokens of Shakespeare, one CPU core): signs may differ from those at full scale. Score: bits per byte of the trained (and",
        "averaged) weights on the validation split, in chunks, before quantisation. Difference = variant - reference with the same seed (less is better),",
        "mean over n seeds, sd = standard deviation of that difference. A row with n = 1 is a screen and supports no claim; with n = 3, a mean within about",
        "2.5 sd of zero does not either. Step time: ratio to the base's, taken in turns in one process.",
        "",
        f"Base: mean {statistics.fmean(bpbs):.4f}{spread}, n = {len(bpbs)}.",
        "",
        "![differences](differences.png)",
        "",
        "| variant | reference | difference | sd | n | step time | settings |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        gone = " (removed)" if row.name in removed else ""
        numbers = f"{row.mean:+.4f} | {row.spread} | {len(row.differences)} | {ratios.get(row.name, '')}"
        lines.append(f"| {row.name}{gone} | {row.reference} | {numbers} | `{row.settings.replace(STACK, 'STACK')}` |")
    lines += ["", "Settings of the base, and STACK:", "", "```", *textwrap.wrap(BASE, 140), "", *textwrap.wrap(STACK, 140), "```"]
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows)
    fill_techniques(rows)
    print(f"{FOLDER / 'README.md'}: {len(rows)} variants, {len(results)} trials")


def plot(rows: list[Row]) -> None:
    """Draws every difference, the best last."""
    names = {row.name: row.name if row.reference == "base" else f"{row.name}  (to: {row.reference})" for row in rows}
    found = [report.Difference(names[row.name], row.differences) for row in sorted(rows, key=lambda row: -row.mean)]
    for file, image in report.pngs({"differences.png": lambda: report.draw_differences("the reference", found)}).items():
        report.write_file(FOLDER / file, image)


def fill_techniques(rows: list[Row]) -> None:
    """Writes what was measured under each marker of records/TECHNIQUES.md: a comment that names variants, and the line after it."""
    measured = {variant.split(" > ")[0]: f"{variant.split(' > ')[0]} not measured" for variant in {**VARIANTS, **REMOVED}}
    for row in rows:
        spread = f" ± {row.spread}" if row.spread else ""
        against = "" if row.reference == "base" else f", against {row.reference}"
        measured[row.name] = f"{row.name} {row.mean:+.4f}{spread} (n = {len(row.differences)}{against})"

    def line(match: re.Match[str]) -> str:
        return f"<!-- ablation: {match[1]} -->\nOurs: " + "; ".join(measured[name.strip()] for name in match[1].split(";")) + ".\n"

    text = TECHNIQUES.read_text(encoding="utf-8")
    TECHNIQUES.write_text(re.sub(r"<!-- ablation: (.*) -->\n(?:Ours: .*\n)?", line, text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="paired seeds of each variant (default %(default)s)")
    parser.add_argument("--only", default="", help="comma-separated beginnings of names of variants; those that they refer to are added")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, one thread each (default %(default)s)")
    parser.add_argument("--time", action="store_true", help="measure step times instead")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in VARIANTS if any(name.startswith(start.strip()) for start in options.only.split(","))]
    if not wanted:
        parser.error(f"--only {options.only}: no variant begins so")
    if options.time:
        time_variants(wanted)
    elif not options.table:
        references = {next(key for key in ("base", *VARIANTS) if key.split(" > ")[0] == reference_of(name)) for name in wanted}
        names = ["base", *(name for name in VARIANTS if name in wanted or name in references)]
        done = {(result["variant"], result["seed"]) for result in finished()}
        trials = [(name, seed) for seed in SEEDS[: options.seeds] for name in names if (name, seed) not in done]
        lock, began = Lock(), time.perf_counter()
        with ThreadPoolExecutor(options.workers) as pool:
            for index, result in enumerate(pool.map(lambda trial: run_trial(trial[0], trial[1], lock), trials), 1):
                left = (time.perf_counter() - began) / index * (len(trials) - index)
                print(f"{index}/{len(trials)}  {result['variant']:<55} seed {result['seed']:<5} bpb {result['bpb']:.4f}  {left / 60:.0f} min left", flush=True)
    write_table()


if __name__ == "__main__":
    main()
