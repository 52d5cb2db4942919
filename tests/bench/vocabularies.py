"""Trains one small model for each tokenizer on the same bytes of text and scores them in bits per byte: what does a vocabulary buy, and what does it cost?

    python tests/bench/vocabularies.py --train web.jsonl.xz --val held_out.jsonl.xz --megabytes 2 MODEL... [NAME=value ...]
    python tests/bench/vocabularies.py --table                          only write the page again

MODEL is a SentencePiece model; one with CaseOps markers gets CaseOps text. Every model sees the same documents once and is exported under the same
BYTES_CAP. Settings are laid over PRESET=demo. Finished rows are kept in records/vocabularies_cpu/results.jsonl and are not measured again.
"""

import argparse
import itertools
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

FOLDER = ROOT / "records" / "vocabularies_cpu"
RESULTS = FOLDER / "results.jsonl"
BATCH_TOKENS = 2048


def documents(path: Path, most_bytes: float) -> Iterator[str]:
    """Yields the lines of a .jsonl.xz file until their texts have so many bytes of UTF-8."""
    seen = 0
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            seen += len(json.loads(line)["text"].encode())
            if seen > most_bytes:
                return
            yield line


def measure(model: Path, train: Path, val: Path, megabytes: float, val_megabytes: float, settings: list[str]) -> dict[str, Any]:
    """Returns the row of a tokenizer."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    is_cased = all(processor.piece_to_id(marker) != processor.unk_id() for marker in train_gpt.CASE_MARKERS)
    with tempfile.TemporaryDirectory() as place:
        text, data = Path(place) / "text.jsonl", Path(place) / "data"
        held_out = list(documents(val, 1e6 * val_megabytes))
        text.write_text("".join(itertools.chain(held_out, documents(train, 1e6 * megabytes))), encoding="utf-8")
        command = [sys.executable, str(ROOT / "data" / "tokenize_docs.py"), "--input", str(text), "--output", str(data), "--tokenizer", str(model)]
        subprocess.run([*command, "--val-docs", str(len(held_out)), *["--caseops"] * is_cased], check=True)
        (shard,) = data.glob("*_train_*.bin")
        tokens = len(train_gpt.read_shard(shard))
        arguments = [
            "PRESET=demo", f"DATA_PATH={data}", f"TOKENIZER_PATH={data / 'tokenizer.model'}",
            f"VOCAB_SIZE={processor.vocab_size()}", f"BOS_ID={processor.bos_id()}",
            f"ITERATIONS={tokens // BATCH_TOKENS}", "MAX_WALLCLOCK_SECONDS=0", "TRAIN_SEQ_SCHEDULE=", "FINAL_EVAL=chunked", "VAL_LOSS_EVERY=0",
            "ROPE_DIMS=16", "EMA_EVERY=1",  # as in the rows that are kept
            "CHECKPOINT_EVERY=0", f"RUNS_DIR={place}", "RUN_ID=run", *settings,
        ]  # fmt: skip
        subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *arguments], check=True)
        result = json.loads((Path(place) / "run" / "result.json").read_text(encoding="utf-8"))
        events = map(json.loads, (Path(place) / "run" / "run.jsonl").read_text(encoding="utf-8").splitlines())
        roles = {row["role"]: row for event in events if event["event"] == "export" for row in event["roles"]}
        lengths = train_gpt.load_val(train_gpt.parse_config(arguments[:5], {}))
        return {
            "tokenizer": model.stem, "vocab_size": processor.vocab_size(), "seed": result["seed"], "megabytes": megabytes, "val": val.name, "tokens": tokens,
            "val_bytes_per_token": float(lengths.target_bytes.mean()), "steps": result["steps"], "params": result["params"],
            "embed_bytes": roles["embed"]["bytes"], "table_bytes": roles.get("table", {}).get("bytes", 0), "bytes_model": result["bytes_model"],
            "trained_bpb": result["pre_quant_val_bpb"], "val_bpb": result["val_bpb"], "train_seconds": result["train_seconds"],
        }  # fmt: skip


def write_page() -> None:
    """Writes records/vocabularies_cpu/README.md."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = [
        "# Vocabularies compared on the same text, on a CPU", "",
        "Written by `python tests/bench/vocabularies.py --table`. Every model (PRESET=demo, each document seen once) was trained on the same bytes and",
        "exported under the same BYTES_CAP. bpb of the first half megabyte of the held-out text, comparable with each other only; n = 1 for each seed.", "",
        "| tokenizer | seed | held-out text | MB | tokens | steps | bytes/token | bpb trained | of artifact | embedding, bytes | tables, bytes | artifact |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["megabytes"], row["seed"], row["vocab_size"], row["tokenizer"])):
        sizes = f"{row['embed_bytes']:,} | {row['table_bytes']:,} | {row['bytes_model']:,}"
        texts = f"{row['tokenizer']} | {row['seed']} | {row['val']} | {row['megabytes']:g}"
        lengths = f"{row['tokens']:,} | {row['steps']:,} | {row['val_bytes_per_token']:.3f}"
        lines.append(f"| {texts} | {lengths} | {row['trained_bpb']:.4f} | {row['val_bpb']:.4f} | {sizes} |")
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Measures what the command line asks for, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="SentencePiece models, and NAME=value settings")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--megabytes", type=float, default=2.0, help="of text to train on")
    parser.add_argument("--val-megabytes", type=float, default=0.5)
    parser.add_argument("--table", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    RESULTS.touch()
    models, settings = ([word for word in arguments.words if ("=" in word) is wanted] for wanted in (False, True))
    done = {(row["tokenizer"], row["seed"], row["megabytes"], row["val"]) for row in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}
    seed = next((int(word.partition("=")[2]) for word in settings if word.startswith("SEED=")), train_gpt.Config.seed)
    for model in [] if arguments.table else map(Path, models):
        if (model.stem, seed, arguments.megabytes, arguments.val.name) not in done:
            row = measure(model, arguments.train, arguments.val, arguments.megabytes, arguments.val_megabytes, settings)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    write_page()


if __name__ == "__main__":
    main()
