"""Measures data/tokenize_docs.py: its speed and tokens against another script's, and its memory on a stream of documents.

    python tests/bench/tokenisation.py --input docs.jsonl.xz --tokenizer fineweb_1024_bpe.model --against download_hf_docs_and_tokenize.py
    python tests/bench/tokenisation.py --stream 2          two gigabytes of synthetic documents; peak memory of every process

--against takes the path of the challenge's own script (openai/parameter-golf, data/download_hf_docs_and_tokenize.py). It is run as it is, but for its
download, in whose place it gets the same documents; both scripts run as processes of their own, in turn, with as many threads as the other has
workers. Times are of whole processes. The bench is named so because a file tokenize.py here would hide Python's own module from every bench.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))
import tokenize_docs  # noqa: E402

OURS = ROOT / "data" / "tokenize_docs.py"
# Loads the script from its path, puts the documents where its download would, and runs it with the remaining arguments.
RUN_WITHOUT_DOWNLOAD = """
import importlib.util, os, sys
path, documents, *sys.argv[1:] = sys.argv[1:]
spec = importlib.util.spec_from_file_location("other", path)
other = sys.modules["other"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(other)
def copy_from_hf_cache(*, filename, destination, **_):
    if filename == other.DOCS_FILENAME:
        os.link(documents, destination)
    return filename == other.DOCS_FILENAME
other.copy_from_hf_cache = copy_from_hf_cache
other.main()
"""


class Usage(NamedTuple):
    """What a process used, with all that it started."""

    seconds: float
    cpu_seconds: float


def timed(command: list[str], environment: dict[str, str]) -> Usage:
    """Returns what `command` used. Exits when it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{message}")
    return Usage(time.monotonic() - started, used.ru_utime + used.ru_stime)


def spread(values: list[float]) -> str:
    """Returns mean ± standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def compare(inputs: list[Path], model: Path, script: Path, val_docs: int, workers: int, repeats: int) -> None:
    """Prints the speed of both scripts, the ratio of each pair of runs, and whether the shards are equal, byte for byte. Exits with 1 if not."""
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents, config = folder / "docs.jsonl", folder / "config.json"
        size = 0
        with open(documents, "w", encoding="utf-8") as file:
            for text in tokenize_docs.Corpus(inputs):
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode("utf-8"))
        config.write_text(json.dumps({"tokenizers": [{"name": "given", "dataset_suffix": "given", "vocab_size": vocab_size}]}))
        ours, theirs = list[Usage](), list[Usage]()
        for number in range(repeats):
            output = folder / f"ours{number}"
            command = [sys.executable, str(OURS), "--input", str(documents), "--output", str(output), "--tokenizer", str(model)]
            ours.append(timed([*command, "--val-docs", str(val_docs), "--workers", str(workers)], {}))
            other = folder / f"theirs{number}"
            command = [sys.executable, "-c", RUN_WITHOUT_DOWNLOAD, str(script), str(documents), "--output-root", str(other)]
            options = ["--tokenizer-config", str(config), "--reuse-sp-model", f"{vocab_size}={model}", "--num-val-docs", str(val_docs)]
            theirs.append(timed([*command, *options], {"MATCHED_FINEWEB_TOKENIZER_THREADS": str(workers)}))
            made, expected = shards_in(output), shards_in(other / "datasets" / "fineweb10B_given")
            if made != expected:
                raise SystemExit("the tokens differ: " + ", ".join(sorted(name for name in made.keys() | expected if made.get(name) != expected.get(name))))
    print(f"{size / 1e6:.1f} MB of text, {vocab_size} pieces, {workers} workers or threads, {repeats} pairs of runs; the shards are equal, byte for byte")
    for label, runs in (("ours", ours), ("theirs", theirs)):
        speed, per_cpu = (spread([size / 1e6 / getattr(run, unit) for run in runs]) for unit in ("seconds", "cpu_seconds"))
        print(f"{label:6}  {speed} MB/s  {per_cpu} MB per CPU second")
    print(f"ours / theirs, paired: time {spread([a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)])}")


def shards_in(folder: Path) -> dict[str, bytes]:
    """Returns the shards in `folder` by name."""
    return {path.name: path.read_bytes() for path in folder.glob("fineweb_*.bin")}


def synthetic_documents(size: int) -> Iterator[str]:
    """Yields documents of random words, with the word frequencies of natural text, until they have `size` bytes."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)])
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies /= frequencies.sum()
    while size > 0:
        drawn = iter(words[rng.choice(len(words), 1 << 20, p=frequencies)].tolist())
        while size > 0 and (text := " ".join(itertools.islice(drawn, max(1, int(rng.lognormal(6, 1)))))):
            size -= len(text)
            yield text


def memory(pid: int) -> tuple[int, int]:
    """Returns (resident memory now, its peak so far) of a process, in bytes; (0, 0) for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    now, peak = (re.search(rf"{name}:\s+(\d+)", status) for name in ("VmRSS", "VmHWM"))
    return (int(now[1]) * 1024, int(peak[1]) * 1024) if now and peak else (0, 0)


def children(pid: int) -> list[int]:
    """Returns the processes that `pid` started."""
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return []


def stream(gigabytes: float, workers: int) -> None:
    """Prints the memory of parent and workers while so much text goes through, and their peaks."""
    with tempfile.TemporaryDirectory() as name:
        documents, size = Path(name) / "docs.jsonl", 0
        with open(documents, "w", encoding="utf-8") as file:
            for text in synthetic_documents(int(gigabytes * 1e9)):
                file.write(f'{{"text": "{text}"}}\n')
                size += len(text)
        print(f"{size / 1e9:.2f} GB of text, {workers} workers, shards of 10 M tokens")
        options = ["--vocab-size", "1024", "--train-sample-bytes", "2000000", "--shard-tokens", "10000000", "--workers", str(workers)]
        command = [sys.executable, str(OURS), "--input", str(documents), "--output", str(Path(name) / "out"), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        peaks: dict[str, int] = {"parent": 0, "largest worker": 0}
        shown = -10
        for line in process.stderr:  # one every ten seconds
            parent, *others = (memory(pid) for pid in (process.pid, *children(process.pid)))
            peaks["parent"] = max(peaks["parent"], parent[1])
            peaks["largest worker"] = max([peaks["largest worker"], *(peak for _, peak in others)])
            percent = re.search(r"tokenising +(\d+)%", line)
            if percent and int(percent[1]) >= shown + 10:
                shown = int(percent[1])
                rest = f"  largest worker {max(now for now, _ in others) / 1e6:.0f} MB" if others else ""
                print(f"{shown:3}%  parent {parent[0] / 1e6:.0f} MB{rest}", flush=True)
        if process.wait():
            raise SystemExit("the tool failed")
    print("peaks: " + ", ".join(f"{label} {peak / 1e6:.0f} MB" for label, peak in peaks.items() if peak))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--against", metavar="SCRIPT", type=Path, help="the challenge's script; also needs --input and --tokenizer")
    mode.add_argument("--stream", metavar="GB", type=float, help="synthetic text, in gigabytes")
    parser.add_argument("--input", metavar="FILE", type=Path, nargs="+", help="documents, as tokenize_docs.py takes them")
    parser.add_argument("--tokenizer", metavar="MODEL", type=Path)
    parser.add_argument("--val-docs", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.stream is not None:
        stream(options.stream, options.workers)
    elif options.input and options.tokenizer:
        compare(options.input, options.tokenizer.absolute(), options.against.absolute(), options.val_docs, options.workers, options.repeats)
    else:
        parser.error("--against needs --input and --tokenizer")


if __name__ == "__main__":
    main()
