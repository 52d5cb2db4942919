"""What is best at equal time and equal bytes? Trains families of configurations for the same time, fills the same byte cap with each, and compares.

    python tests/bench/budget.py --data 1024=DIR                          one seed of every family that has none yet, small, on a CPU
    python tests/bench/budget.py --data 1024=DIR --seeds 3 --only looped,unique     three paired seeds of these
    python tests/bench/budget.py --data 1024=DIR --only "looped;unique" --bytes 60000,120000     the same trained models at other caps
    python tests/bench/budget.py --scale gpu --data 8192=DIR              the same question in the shapes of PRESET=frontier, on one GPU
    python tests/bench/budget.py --table                                  only write the pages and plots again

The first family sets the time: its steps are given, every other family gets as many as take the same time (--equal ms: step times are measured in
turns with the first family's, in one process) or the same FLOPs (--equal flops). The number of steps is then fixed, so that a busy machine changes no
result. BYTES_CAP is the bytes of the script plus the same bytes for every model; `rate` fills them by itself, GPTQ + SDClip starts from half the
public clip factors and is widened until it fits. --data names a folder of shards with its tokenizer.model for each vocabulary; families of
another vocabulary are left out. Finished rows are kept in records/budget_SCALE/results.jsonl and are not measured again; a run that was
interrupted goes on from its checkpoint (--runs).
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
import step as step_bench  # noqa: E402

import train_gpt  # noqa: E402

SEEDS = (1337, 1, 2, 3, 4)
MODES = {"ms": "time", "flops": "FLOPs"}  # what all families spend alike
UNKNOWN_TEXT = "its size was not kept"
# The first one is exported by the run that trains; the others start from its checkpoint.
QUANTISERS = {
    "rate": "QUANT_SCHEME=rate CODER=range",
    "gptq": "QUANT_SCHEME=gptq CODER=brotli CODE_ORDER=sorted MATRIX_BITS=6 EMBED_BITS=7 ATTN_CLIP_SIGMAS=6.5 MLP_CLIP_SIGMAS=5.75 MATRIX_CLIP_SIGMAS=6.4"
    " EMBED_CLIP_SIGMAS=7",
}


class Family(NamedTuple):
    """A configuration to compare."""

    settings: str  # over the base of its scale
    quantisers: tuple[str, ...] = ("rate",)
    vocabulary: int = 0  # 0 = the scale's


class Scale(NamedTuple):
    """A size at which families are compared; the first family is the reference."""

    base: str
    steps: int  # of the reference
    model_bytes: int
    vocabulary: int
    families: Mapping[str, Family]


BOTH = ("rate", "gptq")
LOOPED_SMALL = "NUM_LAYERS=3 NUM_LOOPS=1 LOOP_START=1 LOOP_END=2 ENABLE_LOOPING_AT=0.35"
HALF_LOOPED_SMALL = "NUM_LAYERS=4 NUM_LOOPS=1 LOOP_START=2 LOOP_END=2 ENABLE_LOOPING_AT=0.35"
SMALL = (
    "PRESET=demo DEVICE=cpu NUM_LOOPS=0 LOOP_EMBEDDING=0 PARALLEL_RESIDUALS=none BIGRAM_HASH_BUCKETS=0 VALUE_EMBED_LAYERS= TRAIN_SEQ_LEN=256"
    " TRAIN_SEQ_SCHEDULE= VAL_BATCH_SIZE=16384 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=0 WARMDOWN_FRAC=0.7 CHECKPOINT_EVERY=250 VAL_LOSS_EVERY=0"
    " TRAIN_LOG_EVERY=250 CALIBRATION_TOKENS=65536 FINAL_EVAL=chunked TILT_ORDERS= EMA_EVERY=1"
)
SCALES = {
    # Few enough weights for a CPU to show each some 20 tokens, so that bytes bind.
    "cpu": Scale(
        f"{SMALL} COMPILE=0 MODEL_DIM=64 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=4 ROPE_DIMS=12 TRAIN_BATCH_TOKENS=2048 MICRO_BATCH_TOKENS=2048 EMA_DECAY=0.99",
        3000,
        90_000,
        1024,
        {
            "looped": Family(LOOPED_SMALL, BOTH),
            "unique": Family("NUM_LAYERS=5", BOTH),
            "half looped": Family(HALF_LOOPED_SMALL),
            "unique, QAT": Family("NUM_LAYERS=5 QAT_START_FRAC=0.85"),
            "unique, longer QAT": Family("NUM_LAYERS=5 QAT_START_FRAC=0.7"),
            "half looped, QAT": Family(f"{HALF_LOOPED_SMALL} QAT_START_FRAC=0.85"),
            "unique, deeper": Family("NUM_LAYERS=7"),
            "unique, wide MLP": Family("NUM_LAYERS=5 MLP_MULT=6"),
            "unique, one KV head": Family("NUM_LAYERS=5 NUM_KV_HEADS=1"),
            "unique, value table": Family("NUM_LAYERS=5 VALUE_EMBED_LAYERS=3,4 VALUE_EMBED_DIM=32"),
            "unique, bigram table": Family("NUM_LAYERS=5 BIGRAM_HASH_BUCKETS=2048 BIGRAM_HASH_DIM=32 BIGRAM_HASH_SCALE=0.05"),
            "unique, 4096 tokens": Family("NUM_LAYERS=5", vocabulary=4096),
            "unique, 8192 tokens": Family("NUM_LAYERS=5", vocabulary=8192),
            "unique, 16384 tokens": Family("NUM_LAYERS=5", vocabulary=16384),
        },
    ),
    # Twice as wide, as many tokens for each weight and bytes for each of the reference's: does the order depend on the width?
    "cpu_wide": Scale(
        f"{SMALL} COMPILE=1 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=4 ROPE_DIMS=24 TRAIN_BATCH_TOKENS=4096 MICRO_BATCH_TOKENS=4096 EMA_DECAY=0.995",
        5000,
        300_000,
        1024,
        {"looped": Family(LOOPED_SMALL, BOTH), "unique": Family("NUM_LAYERS=5", BOTH), "half looped": Family(HALF_LOOPED_SMALL)},
    ),
    # One rank's share of the batch of eight GPUs, and about a fifth of the 10 minutes' steps: two minutes a run on an H100.
    "gpu": Scale(
        "PRESET=frontier DEVICE=cuda TRAIN_BATCH_TOKENS=98304 MICRO_BATCH_TOKENS=98304 MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=100"
        " CHECKPOINT_EVERY=200 QAT_START_FRAC=1 LQER_RANK=0 CODE_ORDER=rows BYTE_SHUFFLE=0 FINAL_EVAL=chunked",
        1000,
        15_900_000,
        8192,
        {
            "looped": Family("", BOTH),
            "unique": Family("NUM_LAYERS=17 NUM_LOOPS=0 XSA_LAST_N=17 PARALLEL_START_LAYER=14", BOTH),
            "half looped": Family("NUM_LAYERS=14 NUM_LOOPS=1 LOOP_START=4 LOOP_END=6 XSA_LAST_N=14 PARALLEL_START_LAYER=11"),
            "unique, QAT": Family("NUM_LAYERS=17 NUM_LOOPS=0 XSA_LAST_N=17 PARALLEL_START_LAYER=14 QAT_START_FRAC=0.9"),
            "unique, wide MLP": Family("NUM_LAYERS=14 NUM_LOOPS=0 XSA_LAST_N=14 PARALLEL_START_LAYER=11 MLP_MULT=5.5"),
            "unique, value table": Family("NUM_LAYERS=17 NUM_LOOPS=0 XSA_LAST_N=17 PARALLEL_START_LAYER=14 VALUE_EMBED_LAYERS=14,15,16 VALUE_EMBED_DIM=128"),
            "unique, 4096 tokens": Family("NUM_LAYERS=17 NUM_LOOPS=0 XSA_LAST_N=17 PARALLEL_START_LAYER=14", vocabulary=4096),
        },
    ),
}


class Bench(NamedTuple):
    """What the command line asks for."""

    scale_name: str
    equal: str
    caps: tuple[int, ...]  # bytes for the weights, the scale's own first
    data: Mapping[int, Path]
    runs: Path
    text: str  # what the data is made of: rows of different text are not compared

    @property
    def scale(self) -> Scale:
        """The chosen scale."""
        return SCALES[self.scale_name]

    @property
    def folder(self) -> Path:
        """Where results are kept."""
        return ROOT / "records" / f"budget_{self.scale_name}"

    def settings(self, name: str) -> list[str]:
        """Returns the arguments of a family, without its seed, steps and data."""
        family = self.scale.families[name]
        return f"{self.scale.base} {QUANTISERS['rate']} VOCAB_SIZE={family.vocabulary or self.scale.vocabulary} {family.settings}".split()

    def data_settings(self, name: str) -> list[str]:
        """Returns where a family's text is."""
        folder = self.data[self.scale.families[name].vocabulary or self.scale.vocabulary]
        return [f"DATA_PATH={folder}", f"TOKENIZER_PATH={folder / 'tokenizer.model'}"]

    def digest(self, name: str, quantiser: str) -> str:
        """Returns a digest of everything about a family but its seed, steps and data."""
        config = asdict(train_gpt.parse_config([*self.settings(name), *QUANTISERS[quantiser].split()], {}))
        changed = sorted((key, value) for key, value in config.items() if value != getattr(train_gpt.Config, key))
        return hashlib.sha256(repr(changed).encode()).hexdigest()[:16]

    def read(self, file: str) -> list[dict[str, Any]]:
        """Returns the rows of a file of results."""
        path = self.folder / file
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def append(self, file: str, row: Mapping[str, Any]) -> None:
        """Keeps a row."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def text_of(folders: Sequence[Path]) -> str:
    """Returns in words how much text folders of shards were made of; raises SystemExit where it is not the same in all."""
    texts = {}
    for folder in folders:
        splits = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["splits"]
        train, val = (f"{splits[name]['documents']:,} documents of {splits[name]['bytes']:,} bytes" for name in ("train", "val"))
        texts[folder] = f"{train}, {val} held out"
    if len(set(texts.values())) > 1:
        raise SystemExit("--data: expected the same text in every vocabulary, found: " + "; ".join(f"{path}: {text}" for path, text in texts.items()))
    return next(iter(texts.values()), UNKNOWN_TEXT)


# -- Steps that take the same time.


def shares(config: train_gpt.Config) -> dict[train_gpt.Phase, float]:
    """Returns the share of a run's steps that each phase has."""
    schedule, parts = train_gpt.Schedule(config), 1000
    counts: dict[train_gpt.Phase, float] = {}
    for part in range(parts):
        phase = schedule.phase((part + 0.5) / parts)
        counts[phase] = counts.get(phase, 0.0) + 1 / parts
    return counts


def measure_cost(bench: Bench, name: str) -> dict[str, Any]:
    """Returns milliseconds and FLOPs of a family's mean step, and both as ratios to the reference's, with which it takes turns."""
    reference = next(iter(bench.scale.families))
    world, arms = train_gpt.World("cuda" if bench.scale_name == "gpu" else "cpu"), {}
    for family in dict.fromkeys((reference, name)):
        config = train_gpt.parse_config(bench.settings(family), {})
        for number, (phase, share) in enumerate(shares(config).items()):
            arms[family, number] = share, step_bench.our_arm(f"{family}, phase {number}", config, phase, world)
    seconds = step_bench.timed([arm for _, arm in arms.values()], world.device, warm_up=3, steps=20)

    def mean(family: str, of: Mapping[str, float]) -> float:
        return sum(share * of[arm.name] for (owner, _), (share, arm) in arms.items() if owner == family)

    medians = {key: 1000 * statistics.median(values) for key, values in seconds.items()}
    flops = {arm.name: arm.flops for _, arm in arms.values()}
    return {
        "family": name, "digest": bench.digest(name, "rate"), "ms": mean(name, medians), "ms_ratio": mean(name, medians) / mean(reference, medians),
        "flops": mean(name, flops), "flops_ratio": mean(name, flops) / mean(reference, flops),
    }  # fmt: skip


def cost_of(bench: Bench, name: str) -> dict[str, Any]:
    """Returns the kept cost of a family, measured now if there is none."""
    digest = bench.digest(name, "rate")
    for row in bench.read("costs.jsonl"):
        if (row["family"], row["digest"]) == (name, digest):
            return row
    row = measure_cost(bench, name)
    bench.append("costs.jsonl", row)
    return row


# -- Runs


def run_script(arguments: Sequence[str], log: Path, threads: int) -> None:
    """Runs train_gpt.py, its output in `log`. Raises RuntimeError with the end of the log when it fails."""
    environment = {key: value for key, value in os.environ.items() if key not in train_gpt.SETTINGS} | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as output:
        command = [sys.executable, str(ROOT / "train_gpt.py"), *arguments]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {code}\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def run_trial(bench: Bench, name: str, seed: int, threads: int) -> list[dict[str, Any]]:
    """Returns one row for each quantiser and cap of a family, all from one training run."""
    cost = cost_of(bench, name)
    steps = round(bench.scale.steps / cost[f"{bench.equal}_ratio"])
    code = train_gpt.code_bytes((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    identity = f"{name.replace(', ', '-').replace(' ', '_')}-{seed}-{steps}-{bench.digest(name, 'rate')[:6]}"
    common = [*bench.settings(name), *bench.data_settings(name), f"SEED={seed}", f"ITERATIONS={steps}", f"RUNS_DIR={bench.runs}"]
    bench.runs.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    checkpoint, trained = bench.runs / identity / "checkpoint.pt", math.nan
    for cap, quantiser in itertools.product(bench.caps, bench.scale.families[name].quantisers):
        run_id = identity if not rows else f"{identity}-{quantiser}" + f"-{cap}" * (cap != bench.scale.model_bytes)
        arguments = [*common, *QUANTISERS[quantiser].split(), f"BYTES_CAP={code + cap}", f"RUN_ID={run_id}"]
        if rows:
            arguments += ["STAGES=export,eval", f"CHECKPOINT={checkpoint}"]
        folder = bench.runs / run_id
        if not (folder / "result.json").exists():
            if folder.exists() and (rows or not checkpoint.exists()):  # nothing in it to go on from
                folder.rename(folder.with_name(f"{run_id}-broken-{time.time_ns()}"))
            run_script([*arguments, *["RESUME=1"] * folder.exists()], bench.runs / f"{run_id}.log", threads)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        events = map(json.loads, (folder / "run.jsonl").read_text(encoding="utf-8").splitlines())
        weights = sum(role["params"] for event in events if event["event"] == "export" for role in event["roles"] if role["role"] != "gain")
        trained = trained if rows else result["pre_quant_val_bpb"]
        rows.append({
            "family": name, "quantiser": quantiser, "cap": cap, "seed": seed, "equal": bench.equal, "digest": bench.digest(name, quantiser), "steps": steps,
            "tokens": steps * train_gpt.parse_config(common, {}).train_batch_tokens, "params": result["params"],
            "bits_per_weight": 8 * result["bytes_model"] / weights, "bytes_model": result["bytes_model"], "bpb_trained": trained, "bpb": result["val_bpb"],
            "nats_per_bpb": result["val_loss"] / result["val_bpb"], "torch": result["torch"], "text": bench.text,
        })  # fmt: skip
    return rows


# -- Tables


def spread(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    """Returns mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{deviation}"


def standing(bench: Bench, cap: int) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Returns the kept rows of a text and a cap whose configuration is still their family's: (family, quantiser) -> seed -> row, best mean first."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in bench.read("results.jsonl"):
        name, quantiser = row["family"], row["quantiser"]
        known = name in bench.scale.families and row["digest"] == bench.digest(name, quantiser)
        if known and (row["equal"], row["cap"], row.get("text", UNKNOWN_TEXT)) == (bench.equal, cap, bench.text):
            found.setdefault((name, quantiser), {})[row["seed"]] = row
    return dict(sorted(found.items(), key=lambda item: statistics.fmean(row["bpb"] for row in item[1].values())))


def write_page(bench: Bench) -> None:
    """Writes records/budget_SCALE/README.md and a plot for every text, from the rows at equal time and those at equal FLOPs."""
    scale = bench.scale
    name = next(iter(scale.families))
    lines = [
        f"# Equal time, equal bytes ({bench.scale_name})", "",
        "Written by `python tests/bench/budget.py`; every run is in `results.jsonl`, step times in `costs.jsonl`. Every model was trained as long as",
        f"`{name}` ({scale.steps:,} steps; ratio: of the mean step's time or FLOPs to that family's) and fills {scale.model_bytes:,} bytes.",
        "All of a text read it in the same order. bpb of held-out text, in chunks, comparable within a text only: mean ± standard deviation over n",
        f"seeds; difference: paired by seed, against `{name}` with `rate`. The cost of quantisation is in nats per token.",
    ]  # fmt: skip
    families: list[str] = []
    for number, text in enumerate(dict.fromkeys(row.get("text", UNKNOWN_TEXT) for row in bench.read("results.jsonl"))):
        found = {mode: standing(bench._replace(text=text, equal=mode), scale.model_bytes) for mode in MODES}
        picture = f"budget{number or ''}.png"
        lines += ["", f"## Text: {text}"]
        if found[bench.equal]:
            plot(bench.folder / picture, bench, found[bench.equal])
            lines += ["", f"![bpb trained and quantised]({picture})"]
        for mode in MODES:
            lines += mode_table(bench._replace(text=text, equal=mode), found[mode]) if found[mode] else []
        families += [family for rows in found.values() for family, _ in rows]
    if not families:
        return
    lines += ["", "Settings of the base, then of each family:", "", "```", scale.base.replace(" PRESET", "PRESET"), "```", ""]
    for family in dict.fromkeys(families):
        vocabulary = scale.families[family].vocabulary
        lines.append(f"- {family}: `{scale.families[family].settings}{f' VOCAB_SIZE={vocabulary}' * bool(vocabulary)}`")
    (bench.folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{bench.folder / 'README.md'}: {len(set(families))} families")


def mode_table(bench: Bench, found: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Returns the lines of the tables at equal time, or at equal FLOPs."""
    name, quantiser = next(iter(bench.scale.families)), "rate"
    reference, costs = found.get((name, quantiser), {}), {row["family"]: row for row in bench.read("costs.jsonl")}
    lines = [
        "", f"### Equal {MODES[bench.equal]}", "",
        "| family | quantiser | n | parameters | ratio | steps | tokens/weight | bits/weight | bpb trained | cost, nats | bpb of the artifact | difference |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for (family, scheme), by_seed in found.items():
        rows = list(by_seed.values())
        one = rows[0]
        paired = [row["bpb"] - reference[seed]["bpb"] for seed, row in by_seed.items() if seed in reference]
        taxes = [(row["bpb"] - row["bpb_trained"]) * row["nats_per_bpb"] for row in rows]
        shape = f"{one['params']:,} | {costs[family][f'{bench.equal}_ratio']:.3f} | {one['steps']:,} | {one['tokens'] / one['params']:.1f}"
        scores = f"{spread([row['bits_per_weight'] for row in rows], 2)} | {spread([row['bpb_trained'] for row in rows])} | {spread(taxes)}"
        against = "" if (family, scheme) == (name, quantiser) or not paired else spread(paired, sign="+")
        lines.append(f"| {family} | {scheme} | {len(rows)} | {shape} | {scores} | {spread([row['bpb'] for row in rows])} | {against} |")
    return lines + caps_table(bench)


def caps_table(bench: Bench) -> list[str]:
    """Returns the lines of a table of the same trained models under every cap that was tried, none if there is only the scale's own."""
    by_cap = {cap: standing(bench, cap) for cap in sorted({row["cap"] for row in bench.read("results.jsonl")})}
    caps = [cap for cap in by_cap if by_cap[cap]]
    if len(caps) < 2:
        return []
    lines = ["", "The same trained models under other caps, bpb of the artifact and, in brackets, bits per weight:", ""]
    lines += ["| family | quantiser | " + " | ".join(f"{cap:,} bytes" for cap in caps) + " |", "|---|---|" + "---:|" * len(caps)]
    for key in sorted({key for cap in caps if cap != bench.scale.model_bytes for key in by_cap[cap]}):
        cells = [list(by_cap[cap].get(key, {}).values()) for cap in caps]
        texts = [f"{spread([row['bpb'] for row in rows])} ({statistics.fmean(row['bits_per_weight'] for row in rows):.2f})" if rows else "" for rows in cells]
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(texts)} |")
    return lines


def plot(path: Path, bench: Bench, found: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> None:
    """Draws what each family reaches before and after quantisation, a point a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.42 * len(found) + 1.3))
    upwards = list(reversed(list(found.items())))
    for at, (_, by_seed) in enumerate(upwards):
        rows = list(by_seed.values())
        before, after = ([row[key] for row in rows] for key in ("bpb_trained", "bpb"))
        axes.plot([statistics.fmean(before), statistics.fmean(after)], [at, at], color="0.7", linewidth=3, zorder=1)
        for values, colour, label in ((before, "tab:gray", "trained"), (after, "tab:blue", "artifact")):
            axes.plot(values, [at] * len(values), ".", color=colour, markersize=5, zorder=3, label=label if at == 0 else None)
            axes.plot([statistics.fmean(values)], [at], "o", color=colour, markersize=8, markerfacecolor="none", zorder=2)
        bits = statistics.fmean(row["bits_per_weight"] for row in rows)
        axes.annotate(f"{bits:.2f} b/w", (max(before + after), at), textcoords="offset points", xytext=(10, -3), fontsize=7)
    axes.set_yticks(range(len(upwards)), [f"{family} ({scheme})" for (family, scheme), _ in upwards], fontsize=8)
    axes.set_xlabel(f"bits per byte at equal {MODES[bench.equal]} and {bench.scale.model_bytes:,} bytes, less is better; circle: mean")
    axes.margins(x=0.16)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Measures what the command line asks for, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--equal", choices=tuple(MODES), default="ms", help="what all families spend alike (default %(default)s)")
    parser.add_argument("--data", action="append", default=[], metavar="VOCABULARY=DIR", help="shards and tokenizer.model")
    parser.add_argument("--bytes", default="", metavar="B,B", help="export the trained models under these caps too")
    parser.add_argument("--seeds", type=int, default=1, help="paired seeds of each family (default %(default)s)")
    parser.add_argument("--only", default="", help="names of families, separated by semicolons; the first family is always the reference")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "budget", help="where runs are kept (default runs/budget)")
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args()
    data = {int(vocabulary): Path(folder).resolve() for vocabulary, _, folder in (text.partition("=") for text in options.data)}
    caps = (SCALES[options.scale].model_bytes, *(int(cap) for cap in options.bytes.split(",") if cap))
    bench = Bench(options.scale, options.equal, caps, data, options.runs.resolve(), text_of(list(data.values())))
    families = bench.scale.families
    wanted = [name for name in options.only.split(";") if name] or list(families)
    if unknown := set(wanted) - set(families):
        raise SystemExit(f"--only {options.only}: {', '.join(sorted(unknown))}: expected some of: {'; '.join(families)}")
    usable = [name for name in wanted if (families[name].vocabulary or bench.scale.vocabulary) in data]
    if not options.table:
        for name in [name for name in wanted if name not in usable]:
            print(f"{name}: left out, give its text with --data {families[name].vocabulary or bench.scale.vocabulary}=DIR", flush=True)
        have = {(key, cap): set(by_seed) for cap in caps for key, by_seed in standing(bench, cap).items()}
        trials = [
            (name, seed) for seed in SEEDS[: options.seeds] for name in usable
            if any(seed not in have.get(((name, quantiser), cap), ()) for cap in caps for quantiser in families[name].quantisers)
        ]  # fmt: skip
        for name in dict.fromkeys(name for name, _ in trials):  # before runs take the cores
            cost = cost_of(bench, name)
            print(f"{name:<24} {cost['ms']:8.1f} ms a step, {cost['ms_ratio']:.3f} x; FLOPs {cost['flops_ratio']:.3f} x", flush=True)
        lock, began = Lock(), time.perf_counter()
        with ThreadPoolExecutor(options.workers) as pool:
            for index, rows in enumerate(pool.map(lambda trial: run_trial(bench, trial[0], trial[1], options.threads), trials), 1):
                with lock:
                    for row in rows:
                        if row["seed"] not in have.get(((row["family"], row["quantiser"]), row["cap"]), ()):
                            bench.append("results.jsonl", row)
                left = (time.perf_counter() - began) / index * (len(trials) - index)
                scores = ", ".join(f"{row['quantiser']} {row['cap']:,} {row['bpb']:.4f}" for row in rows)
                trained, seed = rows[0]["bpb_trained"], rows[0]["seed"]
                print(f"{index}/{len(trials)}  {rows[0]['family']:<24} seed {seed:<5} trained {trained:.4f}, {scores}  {left / 60:.0f} min left", flush=True)
    write_page(bench)


if __name__ == "__main__":
    main()
