"""The challenge's shard format, shared by the data tools: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.

`train_gpt.py` has its own reader because it must stand alone; `tests/test_data.py` holds the two against each other. `check_folder` checks a whole
folder of shards, offline: every file, the lengths of the splits, and whether validation documents occur in the training shards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MANIFEST_FILE = "manifest.json"
CHUNK_TOKENS = 1 << 20  # what is read at once: small enough for the processor's cache to help, large enough that Python costs nothing
# Exact repeats are part of the web, so a few validation documents may occur in honest training data; the known leaks shared most of the split.
MAX_SHARED_FRAC = 0.01


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes `tokens` (any integer dtype, values in 0..65535) to `path`; the file appears whole under its final name or not at all.

    Raises ValueError for a token that uint16 cannot hold.
    """
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFF):
        raise ValueError(f"{path}: token ids must fit uint16, got {int(tokens.min())}..{int(tokens.max())}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def check_shard(path: Path) -> int:
    """Returns the number of tokens of the shard at `path`. Raises ValueError naming what is wrong (magic, version, size) and what was expected."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes is shorter than the {HEADER_BYTES}-byte header; the file is truncated or empty")
    header = np.fromfile(path, dtype="<i4", count=256)
    if header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: magic {header[0]} version {header[1]}, expected {MAGIC} version {VERSION}; this is not a token shard")
    expected = HEADER_BYTES + TOKEN_BYTES * int(header[2])
    if header[2] < 0 or size != expected:
        raise ValueError(f"{path}: {size} bytes, but its header promises {header[2]} tokens = {expected} bytes; the file is truncated or damaged")
    return int(header[2])


def read_shard(path: Path) -> np.ndarray:
    """Returns the tokens of the shard at `path` as uint16, memory-mapped. Raises ValueError as `check_shard` does."""
    count = check_shard(path)
    if count == 0:
        return np.empty(0, dtype=np.uint16)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` to `path`; the file appears whole under its final name or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


# ----------------------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------------------
# A document is a BOS and what follows it. Its hash is the sum of mix(token) * MULTIPLIER ** position modulo 2**64: sums can be taken over whole
# chunks at once and over parts of a document that lie in different shards. Two given documents share a hash with a chance of about 2**-64.

MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


class Documents(NamedTuple):
    """One entry for each document."""

    hashes: np.ndarray  # uint64
    lengths: np.ndarray  # int64, tokens, BOS included


@functools.cache
def _hash_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a random number for each token, and the powers of MULTIPLIER and of its inverse for each place in a chunk, all uint64."""
    mix = np.random.default_rng(0).integers(1 << 64, size=1 << 16, dtype=np.uint64)
    powers = []
    for base in (MULTIPLIER, pow(MULTIPLIER, -1, 1 << 64)):
        power = np.full(CHUNK_TOKENS, base, dtype=np.uint64)
        power[0] = 1
        powers.append(np.multiply.accumulate(power))
    return mix, powers[0], powers[1]


class DocumentHasher:
    """Hashes the documents of a stream of tokens that comes in pieces, wherever the pieces are cut."""

    def __init__(self, bos_id: int) -> None:
        self._bos_id = bos_id
        self._hash = self._length = 0  # of the document that has begun and may go on

    def add(self, tokens: np.ndarray) -> Documents:
        """Returns the documents that ended within `tokens`, of which there are at most CHUNK_TOKENS."""
        mix, powers, inverse_powers = _hash_tables()
        values = mix[tokens] * powers[: tokens.size]
        starts = np.flatnonzero(tokens == self._bos_id)
        head = int(starts[0]) if starts.size else tokens.size
        self._hash = (self._hash + int(values[:head].sum()) * pow(MULTIPLIER, self._length, 1 << 64)) % (1 << 64)
        self._length += head
        if not starts.size:
            return Documents(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64))
        ended = self.finish()
        hashes = np.add.reduceat(values, starts) * inverse_powers[starts]
        lengths = np.diff(starts, append=tokens.size)
        self._hash, self._length = int(hashes[-1]), int(lengths[-1])
        return Documents(np.concatenate([ended.hashes, hashes[:-1]]), np.concatenate([ended.lengths, lengths[:-1]]))

    def finish(self) -> Documents:
        """Returns the last document, if there is one, and is ready for another stream."""
        kept = slice(0, int(self._length > 0))
        ended = Documents(np.array([self._hash], dtype=np.uint64)[kept], np.array([self._length], dtype=np.int64)[kept])
        self._hash = self._length = 0
        return ended


# ----------------------------------------------------------------------------------------------------------------------
# A folder
# ----------------------------------------------------------------------------------------------------------------------
# What --verify checks. Both tools leave a manifest.json with the number of tokens and the SHA-256 of every shard; download.py also says what is published.


@dataclass
class Split:
    """What was found of one split."""

    shards: int = 0
    tokens: int = 0
    documents: int = 0


@dataclass
class FolderReport:
    """What `check_folder` found; the folder is good if there are no `problems`."""

    splits: dict[str, Split] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # each says what is wrong and what was expected
    notes: list[str] = field(default_factory=list)
    hashed_files: int = 0  # files whose SHA-256 equals the manifest's
    shared_documents: int | None = None  # validation documents that occur in the training shards; None where there is nothing to compare
    shared_tokens: int = 0


class Scan(NamedTuple):
    """What one pass over a shard gives."""

    tokens: int
    sha256: str
    largest: int
    documents: Documents  # those that ended in it


def split_files(folder: Path, split: str) -> list[Path]:
    """Returns the shards of `split` (train, val or val_bytes) in `folder`, by the names that training looks for, in order."""
    return sorted(path for path in folder.glob(f"*_{split}_*.bin") if split != "val" or "_val_bytes_" not in path.name)


def scan_shard(path: Path, hasher: DocumentHasher, advance: Callable[[int], None]) -> Scan:
    """Returns what is known of the shard at `path` after one pass over it; `advance` is told of the bytes read. Raises ValueError as `check_shard`."""
    tokens = read_shard(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES))
    documents, largest = [hasher.add(tokens[:0])], 0
    for start in range(0, tokens.size, CHUNK_TOKENS):
        chunk = np.asarray(tokens[start : start + CHUNK_TOKENS])
        digest.update(chunk.data)
        largest = max(largest, int(chunk.max()))
        documents.append(hasher.add(chunk))
        advance(chunk.nbytes)
    return Scan(tokens.size, digest.hexdigest(), largest, Documents(*(np.concatenate(part) for part in zip(*documents, strict=True))))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the content of the folder's manifest.json, {} where there is none. Raises ValueError for one that neither tool wrote."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for split in manifest["splits"].values():
            for entry in (*split["shards"], *split.get("byte_shards", [])):
                str(entry["file"]), int(entry["tokens"]), str(entry["sha256"])
        int(manifest["tokenizer"]["bos_id"])
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest of the data tools ({type(error).__name__}: {error}); fetch or make the folder again") from error


def check_folder(folder: Path, advance: Callable[[int], None], published: dict[str, Any] | None = None) -> FolderReport:
    """Returns what is right and wrong with a folder of shards, from what lies on this machine; each shard is read once.

    `published` says what the whole export holds, {"train": {"shards": 80, "tokens": ...}, "val": ...}, where the folder's manifest does not.
    Raises ValueError for a folder that is no dataset at all, or has a manifest that cannot be read.
    """
    if not split_files(folder, "val") and not split_files(folder, "train"):
        raise ValueError(f"{folder}: no *_train_*.bin or *_val_*.bin there; name a folder of shards, such as data/datasets/fineweb10B_sp1024")
    manifest = read_manifest(folder)
    report = FolderReport()
    if not manifest:
        report.notes.append(f"{folder} has no {MANIFEST_FILE}, so there are no hashes to compare with; download.py and tokenize_docs.py write it")
    check_tokenizer(folder, manifest, report)
    parts: list[Documents] = []
    check_split(folder, "val", manifest, report, advance, parts.append)
    val = Documents(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    shared = np.zeros(val.hashes.size, dtype=bool)

    def mark_shared(train: Documents) -> None:
        shared[np.isin(val.hashes, train.hashes)] = True

    check_split(folder, "train", manifest, report, advance, mark_shared)
    check_byte_shards(folder, manifest, report, advance)
    compare_with_published(report, published or manifest.get("source", {}).get("published", {}))
    report_shared_documents(report, val, shared & (val.lengths > 1))  # an empty document, a lone BOS, says nothing
    return report


def check_tokenizer(folder: Path, manifest: dict[str, Any], report: FolderReport) -> None:
    """Compares the tokenizer beside the shards with the manifest."""
    entry = manifest.get("tokenizer", {})
    if "file" in entry and "sha256" in entry:
        path = folder / entry["file"]
        if not path.is_file():
            report.problems.append(f"{path}: no such file; it is the tokenizer that made the shards")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            report.problems.append(f"{path}: its SHA-256 is not {entry['sha256']}, which the manifest states; it is not the tokenizer that made the shards")
        else:
            report.hashed_files += 1


def check_split(
    folder: Path, split: str, manifest: dict[str, Any], report: FolderReport, advance: Callable[[int], None], take: Callable[[Documents], None]
) -> None:
    """Adds to `report` what is found of one split, and gives its documents to `take`, those of a shard at a time."""
    bos_id = manifest.get("tokenizer", {}).get("bos_id", 1)
    vocab_size = manifest.get("tokenizer", {}).get("vocab_size")
    listed = {entry["file"]: entry for entry in manifest.get("splits", {}).get(split, {}).get("shards", [])}
    found = report.splits[split] = Split()
    hasher = DocumentHasher(bos_id)
    paths = split_files(folder, split)
    for path in paths:
        try:
            scan = scan_shard(path, hasher, advance)
        except ValueError as error:
            report.problems.append(str(error))
            continue
        if scan.tokens == 0:
            report.problems.append(f"{path}: holds no tokens, which training refuses; delete it, or fetch or make it again")
        elif not found.tokens and read_shard(path)[0] != bos_id:
            report.problems.append(f"{path}: begins with token {read_shard(path)[0]}, but every document begins with BOS {bos_id}; its beginning is missing")
        if vocab_size is not None and scan.largest >= vocab_size:
            report.problems.append(f"{path}: token {scan.largest} is outside the tokenizer's vocabulary of {vocab_size}; another tokenizer made it")
        compare_with_entry(path, scan, listed, split, report)
        found.shards += 1
        found.tokens += scan.tokens
        found.documents += scan.documents.hashes.size
        take(scan.documents)
    last = hasher.finish()
    found.documents += last.hashes.size
    take(last)
    report.problems += [f"{folder / name}: no such file, but the manifest lists it; fetch or make it again" for name in listed if not (folder / name).exists()]
    report_gaps(paths, split, report)


def compare_with_entry(path: Path, scan: Scan, listed: dict[str, Any], split: str, report: FolderReport) -> None:
    """Compares a shard with its entry in the manifest."""
    if not listed:
        return
    if path.name not in listed:
        # A stranger among the training shards adds text; one in the validation split makes every score another one.
        (report.problems if split == "val" else report.notes).append(f"{path}: not in the manifest, but training would read it; delete it if it is a stranger")
    elif scan.sha256 != listed[path.name]["sha256"]:
        report.problems.append(f"{path}: its SHA-256 is not {listed[path.name]['sha256']}, which the manifest states; fetch or make it again")
    else:
        report.hashed_files += 1


def report_gaps(paths: list[Path], split: str, report: FolderReport) -> None:
    """Reports numbers missing from a split's names fineweb_<split>_000000.bin, 000001 ..."""
    numbers = {int(number[1]) for path in paths if (number := re.search(r"_(\d{6})\.bin$", path.name))}
    if missing := sorted(set(range(max(numbers, default=-1))) - numbers):
        some = ", ".join(map(str, missing[:9]))
        report.problems.append(f"{paths[0].parent}: {split} shards {some} are missing, though later ones are there; fetch or make them again")


def check_byte_shards(folder: Path, manifest: dict[str, Any], report: FolderReport, advance: Callable[[int], None]) -> None:
    """Compares the byte shards of CaseOps data with the validation shards beside them."""
    sides, tokenizer, val = split_files(folder, "val_bytes"), manifest.get("tokenizer", {}), manifest.get("splits", {}).get("val", {})
    if not sides and not tokenizer.get("caseops"):
        return
    listed = {entry["file"]: entry for entry in val.get("byte_shards", [])}
    total = 0
    for path in split_files(folder, "val"):
        side = path.with_name(path.name.replace("_val_", "_val_bytes_"))
        try:
            scan = scan_shard(side, DocumentHasher(tokenizer.get("bos_id", 1)), advance)
            tokens = read_shard(path)
        except FileNotFoundError:
            report.problems.append(f"{side}: no such file; without it the bytes behind the CaseOps tokens of {path.name} are unknown")
            continue
        except ValueError as error:
            report.problems.append(str(error))
            continue
        compare_with_entry(side, scan, listed, "val", report)
        if scan.tokens != tokens.size:
            report.problems.append(f"{side}: {scan.tokens:,} entries for the {tokens.size:,} tokens of {path.name}; they belong to different data")
            continue
        counts = read_shard(side)
        if counts[tokens == tokenizer.get("bos_id", 1)].any():
            report.problems.append(f"{side}: a BOS stands for no bytes, but here one has some; the file belongs to other data")
        total += int(counts.sum(dtype=np.int64))
    if "bytes" in val and len(sides) == len(val.get("byte_shards", [])) and total != val["bytes"]:
        report.problems.append(f"{folder}: the byte shards sum to {total:,}, but the manifest says that the validation text has {val['bytes']:,} bytes")


def compare_with_published(report: FolderReport, published: dict[str, Any]) -> None:
    """Compares lengths with what the whole export holds."""
    train, val = report.splits["train"], report.splits["val"]
    promised = published.get("val", {}).get("tokens")
    if promised is not None and val.tokens != promised:
        report.problems.append(
            f"the validation split has {val.tokens:,} tokens, the export promises {promised:,}: a score on it can be compared with no other; "
            "run download.py for it again, or choose another --revision"
        )
    of_all = published.get("train", {}).get("shards")
    if of_all is not None and train.shards < of_all:
        report.notes.append(f"{train.shards} of the {of_all} published training shards are here; longer training would repeat them")
    elif of_all is None and train.shards == 1 and train.tokens >= 100_000_000:
        report.notes.append("only one training shard is here; the challenge trains on 80, and longer training would repeat it")


def report_shared_documents(report: FolderReport, val: Documents, shared: np.ndarray) -> None:
    """Reports the validation documents that occur, token for token, among the training documents, as `shared` says of each."""
    if not report.splits["val"].documents or not report.splits["train"].documents:
        return
    report.shared_documents, report.shared_tokens = int(shared.sum()), int(val.lengths[shared].sum())
    if report.shared_tokens > MAX_SHARED_FRAC * val.lengths.sum():
        share = f"{report.shared_documents:,} of {val.hashes.size:,} validation documents ({report.shared_tokens / val.lengths.sum():.1%} of the tokens)"
        report.problems.append(
            f"{share} occur in the training shards, so a score on them means nothing; "
            "make both splits in one run of tokenize_docs.py, or fetch both from one export"
        )
