"""Compares evaluations on trained checkpoints: bits per byte, seconds, and what the settings of test-time training do.

    python tests/bench/evaluation.py runs/A/checkpoint.pt [runs/B/checkpoint.pt ...] [--tokens 32768]      every row of the table below
    python tests/bench/evaluation.py --cost runs/A/checkpoint.pt          what the main evaluations cost in time; wants a machine with nothing else to do
    python tests/bench/evaluation.py --table                              only write the page again

The text is the first targets of the checkpoint's validation split (DATA_PATH), the weights are those of the checkpoint before quantisation. Finished
rows are kept in records/evaluation_cpu/results.jsonl and are not measured again.
"""

import argparse
import json
import statistics
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

RECORDS = ROOT / "records" / "evaluation_cpu"
FOLDER = RECORDS  # of results.jsonl and the page; main() sets it
BASE: dict[str, Any] = {"ttt_lora_rank": 32, "ttt_lora_lr": 1e-3, "ttt_chunk_tokens": 2048, "ttt_lr": 0.02}
# label -> evaluation and what it changes
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunked": ("chunked", {}),
    "sliding, stride 64": ("sliding", {}),
    "sliding, stride 16": ("sliding", {"eval_stride": 16}),
    "sliding, tilt": ("sliding", {"tilt_orders": "1,2,4,8,16"}),
    "sliding, negative softcap 20": ("sliding", {"eval_softcap_negative": 20.0}),
    "sliding, 512 tokens": ("sliding", {"eval_seq_len": 512}),
    "sliding, 512 tokens, ntk": ("sliding", {"eval_seq_len": 512, "rope_scaling": "ntk"}),
    "sliding, 512 tokens, yarn": ("sliding", {"eval_seq_len": 512, "rope_scaling": "yarn"}),
    "ttt_sgd, rate 0.005": ("ttt_sgd", {"ttt_lr": 0.005}),
    "ttt_sgd": ("ttt_sgd", {}),
    "ttt_sgd, rate 0.05": ("ttt_sgd", {"ttt_lr": 0.05}),
    "ttt_lora": ("ttt_lora", {}),
    "ttt_lora, tilt": ("ttt_lora", {"tilt_orders": "1,2,4,8,16"}),
    "ttt_lora, rate 0.0001": ("ttt_lora", {"ttt_lora_lr": 1e-4}),
    "ttt_lora, rate 0.0003": ("ttt_lora", {"ttt_lora_lr": 3e-4}),
    "ttt_lora, rate 0.003": ("ttt_lora", {"ttt_lora_lr": 3e-3}),
    "ttt_lora, rank 8": ("ttt_lora", {"ttt_lora_rank": 8, "ttt_lora_alpha": 36.0}),
    "ttt_lora, rank 80": ("ttt_lora", {"ttt_lora_rank": 80, "ttt_lora_alpha": 360.0}),
    "ttt_lora, chunk 16": ("ttt_lora", {"ttt_lora_chunk_tokens": 16}),
    "ttt_lora, chunk 96": ("ttt_lora", {"ttt_lora_chunk_tokens": 96}),
    "ttt_lora, warm A": ("ttt_lora", {"ttt_lora_warm_a": True, "ttt_lora_batch_docs": 8}),  # several batches, or there is nothing to keep
    "ttt_lora, head only": ("ttt_lora", {"ttt_lora_targets": "head"}),
    "ttt_lora, without head": ("ttt_lora", {"ttt_lora_targets": "q,k,v,out,up,gate,down"}),
    "ttt_phased": ("ttt_phased", {"ttt_prefix_docs": 15, "ttt_phases": 3}),
    "ttt_phased, tilt": ("ttt_phased", {"ttt_prefix_docs": 15, "ttt_phases": 3, "tilt_orders": "1,2,4,8,16"}),
}


def measure(path: Path, tokens: int, done: set[tuple[str, str]], labels: list[str], *, timed: bool = False) -> None:
    """Scores a checkpoint under every one of these rows that is not done."""
    saved = train_gpt.read_checkpoint(path)
    known = {declared.name for declared in fields(train_gpt.Config)}
    settings = {name: value for name, value in saved["settings"].items() if name in known}
    base = replace(train_gpt.Config(**settings), compile=False, qat_start_frac=1.0, eval_stride=64, **BASE)
    whole = train_gpt.load_val(base)
    val = train_gpt.ValData(whole.tokens[: tokens + 1], whole.target_bytes[:tokens])
    model = train_gpt.GPT(base)
    train_gpt.load_weights(model, saved["state"]["model"])
    world, name = train_gpt.World("cpu"), f"seed{settings['seed']}-{saved['step']}"
    for label in labels:
        evaluation, changes = ROWS[label]
        if (name, label) in done:
            continue
        config = replace(base, final_eval=evaluation, **changes)
        problems = train_gpt.validate(config)
        if problems:
            raise SystemExit("\n".join(problems))
        model.config = replace(
            config, logit_softcap=config.eval_softcap or config.logit_softcap, logit_softcap_negative=config.eval_softcap_negative
        )
        run = train_gpt.Run(config, world, train_gpt.Log(None), Path(), train_gpt.StopSignals(), "")
        score = train_gpt.Evaluator(run, model, model, val, evaluation, train_gpt.Schedule(config).scored_phase).score()
        row = {"checkpoint": name, "label": label, "targets": score.targets, "val_loss": score.val_loss, "val_bpb": score.val_bpb, "seconds": score.seconds}
        row |= {"timed": True} if timed else {}
        with open(FOLDER / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}  {label}: loss {score.val_loss:.4f}  bpb {score.val_bpb:.4f}  {score.seconds:.1f} s", flush=True)


def write_page() -> None:
    """Writes the tables from all results."""
    every = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    rows, timed = ([row for row in every if row.get("timed", False) is wanted] for wanted in (False, True))
    by_label: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], {})[row["checkpoint"]] = row
    chunked, sliding = by_label["chunked"], by_label["sliding, stride 64"]

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):+.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    lines = [
        "# Evaluations compared, on a CPU", "",
        f"Written by `python tests/bench/evaluation.py --table`. Checkpoints: {', '.join(sorted(chunked))};",
        f"the first {rows[0]['targets']:,} targets of the validation split. Unless a row says otherwise: windows as long as the rows of training; LoRA of",
        "rank 32 on every projection and the head, rate 0.001, chunks of 48 tokens; SGD at rate 0.02 on chunks of 2,048 tokens, 3 steps each. Mean",
        "± standard deviation of the paired difference from sliding windows. Scores of our text are comparable with each other only.", "",
        "| evaluation | n | bpb | against sliding |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for label in ROWS:
        found = by_label.get(label, {})
        names = sorted(set(found) & set(sliding))
        if names:
            bpb = statistics.mean(found[name]["val_bpb"] for name in names)
            change = spread([found[name]["val_bpb"] - sliding[name]["val_bpb"] for name in names])
            lines.append(f"| {label} | {len(names)} | {bpb:.4f} | {change} |")
    if timed:
        forward = next(row["seconds"] for row in timed if row["label"] == "chunked")
        lines += ["", f"Cost on one core, in one run over {timed[0]['targets']:,} targets; one forward pass over the text is what `chunked` takes:", ""]
        lines += ["| evaluation | s per million targets | forward passes | share of one forward pass |", "|---|---:|---:|---:|"]
        for row in timed:
            pace = row["seconds"] / row["targets"] * 1e6
            lines.append(f"| {row['label']} | {pace:,.0f} | {row['seconds'] / forward:.1f} | {100 * forward / row['seconds']:.0f}% |")
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measures what is asked for, and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--tokens", type=int, default=32768, help="targets that are scored")
    parser.add_argument("--rows", help="only these rows, by their labels, separated by semicolons")
    parser.add_argument("--cost", action="store_true", help="what the main evaluations cost in time")
    parser.add_argument("--folder", type=Path, help="where rows and page go (default: a folder beside the first checkpoint)")
    parser.add_argument("--table", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.checkpoints if not path.is_file()]
    if missing:
        parser.error(f"no such checkpoint: {', '.join(missing)}")
    global FOLDER
    FOLDER = arguments.folder or (arguments.checkpoints[0].parent / "evaluation" if arguments.checkpoints else RECORDS)
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "results.jsonl").touch()
    if arguments.cost:
        measure(arguments.checkpoints[0], 8192, set(), ["chunked", "sliding, stride 64", "ttt_sgd", "ttt_lora", "ttt_phased"], timed=True)
    done = {(row["checkpoint"], row["label"]) for row in map(json.loads, (FOLDER / "results.jsonl").read_text(encoding="utf-8").splitlines())}
    for path in [] if arguments.table or arguments.cost else arguments.checkpoints:
        measure(path, arguments.tokens, done, arguments.rows.split(";") if arguments.rows else list(ROWS))
    write_page()


if __name__ == "__main__":
    main()
