"""Shards of CaseOps text with one token for a space and the marker after it: 8% fewer tokens for the same text, made from the shards themselves.

    python data/fuse_markers.py data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
    python data/fuse_markers.py data/datasets/mine --output data/datasets/mine_fused --tokenizer caseops.model

The folder is one of download.py or tokenize_docs.py; its manifest.json names its tokenizer, or --tokenizer does. The result, FOLDER_fused unless --output
says otherwise, has the same splits, documents and bytes. Its tokenizer.model is the folder's, with the fused pieces in place of two that it learnt last:
where those stood, the pieces that they were made of stand again. Files are checked against the manifest first. The folder appears complete or not at all.
Source of the idea: PR #2109.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import caseops
import numpy as np
import sentencepiece
from rich.console import Console
from rich.progress import track
from shards import MANIFEST_FILE, read_manifest, read_shard, split_files, write_json, write_shard
from tokenize_docs import JOURNAL_FILE, OUR_FILES, TOKENIZER_FILE, InputError, Parser, complete_folder, file_sha256, load_tokenizer, note, positive

SPACE = "\u2581"
MOST_WORKERS = 8  # each holds a shard of 100 M tokens several times


class Fusion(NamedTuple):
    """How the tokens of a tokenizer become those of the fused one."""

    space: int
    fused: tuple[tuple[int, int], ...]  # (marker, what a space and that marker become)
    split: tuple[tuple[int, int, int], ...]  # (a piece that had to go, the two that it was made of), the last learnt first
    split_bytes: tuple[tuple[int, int], ...]  # of text, in those two
    bos: int
    vocab_size: int


def halves_of(piece: str, tokenizer: sentencepiece.SentencePieceProcessor) -> tuple[str, str]:
    """Returns the two pieces that a BPE tokenizer made `piece` of: what it would cut it into had it not learnt it, nor any after it."""
    limit, parts = tokenizer.get_score(tokenizer.piece_to_id(piece)), list(piece)
    while len(parts) > 2:
        merged = [left + right for left, right in itertools.pairwise(parts)]
        scores = [tokenizer.get_score(token) if (token := tokenizer.piece_to_id(each)) != tokenizer.unk_id() else limit for each in merged]
        best = max(range(len(scores)), key=scores.__getitem__)
        if scores[best] <= limit:
            raise InputError(f"no BPE tokenizer: its piece {piece!r} is not made of two others")
        parts[best : best + 2] = [merged[best]]
    return parts[0], parts[1]


def plan_fusion(model: bytes, source: str) -> tuple[bytes, Fusion]:
    """Returns the fused tokenizer and how tokens become its own.

    Raises InputError for a tokenizer without markers or a single space, with fused ones already, or of another kind than BPE.
    """
    tokenizer = load_tokenizer(model, source)
    if not caseops.is_caseops(tokenizer):
        raise InputError(f"{source}: without the markers of CaseOps (U+E001 to U+E004) as pieces; only CaseOps shards have what is to be fused")
    if tokenizer.piece_to_id(SPACE) == tokenizer.unk_id():
        raise InputError(f"{source}: without a piece for a single space, which is what is to be fused with the marker after it")
    fused_model = caseops.fuse(model)
    fused = load_tokenizer(fused_model, source)
    gone = [token for token in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(token) != fused.id_to_piece(token)]
    if len(gone) != len(caseops.FUSED):
        raise InputError(f"{source}: spaces and markers are fused already")
    gone.sort(key=tokenizer.get_score)
    halves = [halves_of(tokenizer.id_to_piece(token), tokenizer) for token in gone]
    return fused_model, Fusion(
        tokenizer.piece_to_id(SPACE),
        tuple((tokenizer.piece_to_id(pair[len(SPACE) :]), fused.piece_to_id(pair)) for pair in caseops.FUSED),
        tuple((token, tokenizer.piece_to_id(left), tokenizer.piece_to_id(right)) for token, (left, right) in zip(gone, halves, strict=True)),
        tuple((text_bytes(left), text_bytes(right)) for left, right in halves),
        tokenizer.bos_id(),
        tokenizer.vocab_size(),
    )


def text_bytes(piece: str) -> int:
    """Returns the bytes of the text that a piece without markers spells."""
    return len(piece.replace(SPACE, " ").encode())


def fuse_tokens(tokens: np.ndarray, counts: np.ndarray | None, fusion: Fusion) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns `tokens` as the fused tokenizer has them and, where the bytes that each stands for are given as `counts`, theirs, with the same sum.

    Bytes that a normalising tokenizer dropped stand where `caseops.token_bytes` counts them: at the end of a document with its last token.
    """
    tokens, counts = tokens.copy(), None if counts is None else counts.copy()
    for (gone, left, right), (left_bytes, right_bytes) in zip(fusion.split, fusion.split_bytes, strict=True):
        at = np.flatnonzero(tokens == gone)
        if counts is not None:
            is_last = np.append(tokens[1:] == fusion.bos, True)[at]
            both = counts[at].astype(np.int64)
            own = np.where(is_last, both - left_bytes, right_bytes).clip(0, both)
            counts[at] = both - own
            counts = np.insert(counts, at + 1, own)
        tokens[at] = left
        tokens = np.insert(tokens, at + 1, right)
    for marker, fused in fusion.fused:
        at = np.flatnonzero((tokens[:-1] == fusion.space) & (tokens[1:] == marker))
        tokens[at] = fused
        tokens = np.delete(tokens, at + 1)
        if counts is not None:
            counts[at] += counts[at + 1]
            counts = np.delete(counts, at + 1)
    return tokens, counts


def fuse_shard(path: Path, folder: Path, fusion: Fusion, stated: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Writes the fused shard at `path`, and the bytes beside one of validation, into `folder`; returns their entries in the manifest.

    Raises ValueError where a file is damaged, has another SHA-256 than `stated`, or holds tokens of another tokenizer, and OSError where it is missing.
    """
    side = path.with_name(path.name.replace("_val_", "_val_bytes_"))
    tokens, counts = read_shard(path), read_shard(side) if side != path else None
    for file in {path, side}:
        if file.name in stated and file_sha256(file) != stated[file.name]:
            raise ValueError(f"{file}: its SHA-256 is not {stated[file.name]}, which the manifest states; fetch or make it again")
    if tokens.size and int(tokens.max()) >= fusion.vocab_size:
        raise ValueError(f"{path}: token {int(tokens.max())} is outside the tokenizer's vocabulary of {fusion.vocab_size}; another tokenizer made it")
    if counts is not None and len(counts) != len(tokens):
        raise ValueError(f"{side}: {len(counts):,} entries for the {len(tokens):,} tokens of {path.name}; they belong to different data")
    entries = {}
    for kind, name, values in zip(("shards", "byte_shards"), (path.name, side.name), fuse_tokens(tokens, counts, fusion), strict=True):
        if values is not None:
            write_shard(folder / name, values)
            entries[kind] = {"file": name, "tokens": len(values), "sha256": file_sha256(folder / name)}
    return entries


def find_tokenizer(folder: Path, given: Path | None, manifest: dict[str, Any]) -> Path:
    """Returns the file of the tokenizer that made the shards. Raises InputError where nobody says which, or the manifest says another."""
    entry = manifest.get("tokenizer", {})
    path = given or (folder / str(entry["file"]) if "file" in entry else None)
    if path is None:
        raise InputError(f"{folder} has no {MANIFEST_FILE} that names its tokenizer; say which made these shards with --tokenizer MODEL")
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer; say where it is with --tokenizer MODEL")
    if entry.get("sha256", digest := hashlib.sha256(path.read_bytes()).hexdigest()) != digest:
        raise InputError(f"{path} is not the tokenizer that made these shards, by {folder / MANIFEST_FILE}; name that one with --tokenizer")
    return path


def run(arguments: Sequence[str] | None) -> None:
    """Does what the command line asks and prints the report. Raises InputError, ValueError and OSError, leaving nothing behind."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="shards of CaseOps text")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder to create (default FOLDER_fused)")
    parser.add_argument("--tokenizer", metavar="MODEL", type=Path, help="SentencePiece model that made the shards (default: the one their manifest names)")
    parser.add_argument("--workers", metavar="N", type=positive, default=min(os.cpu_count() or 1, MOST_WORKERS), help="shards at a time (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace DIR if it holds an earlier output of the data tools")
    options = parser.parse_args(arguments)
    source = Path(os.path.abspath(options.folder))
    output = Path(os.path.abspath(options.output)) if options.output else source.with_name(f"{source.name}_fused")
    paths = {split: split_files(source, split) for split in ("val", "train")}
    if not paths["val"] and not paths["train"]:
        raise InputError(f"{options.folder}: no *_train_*.bin or *_val_*.bin there; name a folder of shards")
    if os.path.realpath(output) == os.path.realpath(source):
        raise InputError(f"{output} is the folder itself, whose shards are still needed; name another --output")
    if foreign := [path for files in paths.values() for path in files if not OUR_FILES.fullmatch(path.name)]:
        raise InputError(f"{foreign[0]}: expected the names of the data tools, as fineweb_train_000000.bin")
    manifest, began = read_manifest(source), time.monotonic()
    listed = [entry for split in manifest.get("splits", {}).values() for entry in (*split["shards"], *split.get("byte_shards", []))]
    if missing := [source / entry["file"] for entry in listed if not (source / entry["file"]).is_file()]:
        raise InputError(f"{missing[0]}: no such file, but the manifest lists it; fetch or make it again")
    stated = {entry["file"]: entry["sha256"] for entry in listed}
    model_path = find_tokenizer(source, options.tokenizer, manifest)
    model, fusion = plan_fusion(model_path.read_bytes(), str(model_path))
    before = after = 0
    splits = {split: dict(entry) | {"shards": []} for split, entry in manifest.get("splits", {}).items() if split in paths}
    for entry in splits.values():
        entry.pop("byte_shards", None)
    with complete_folder(output, options.force) as folder, ThreadPoolExecutor(options.workers) as pool:
        if (folder / JOURNAL_FILE).exists():
            raise InputError(f"{folder} holds what an interrupted run of tokenize_docs.py has finished; finish it, delete the folder, or name another --output")
        (folder / TOKENIZER_FILE).write_bytes(model)
        work = [(split, path) for split, files in paths.items() for path in files]
        done = pool.map(lambda item: fuse_shard(item[1], folder, fusion, stated), work)
        for (split, path), entries in zip(work, track(done, "fusing", len(work), console=Console(stderr=True)), strict=True):
            for kind, entry in entries.items():
                splits.setdefault(split, {"shards": []}).setdefault(kind, []).append(entry)
            before, after = before + len(read_shard(path)), after + entries["shards"]["tokens"]
        for entry in splits.values():
            if "tokens" in entry:
                entry["tokens"] = sum(shard["tokens"] for shard in entry["shards"])
        tokenizer = {"file": TOKENIZER_FILE, "vocab_size": fusion.vocab_size, "bos_id": fusion.bos}
        content = {"tokenizer": tokenizer | {"sha256": hashlib.sha256(model).hexdigest(), "caseops": True}, "splits": splits}
        published = manifest.get("source", {}).get("published", {})
        counts = {split: {"shards": entry["shards"]} for split, entry in published.items() if "shards" in entry}  # their tokens are others now
        origin = {**manifest.get("source", {}), "fused_from": source.name} | ({"published": counts} if published else {})
        write_json(folder / MANIFEST_FILE, {"source": origin, **content})
    seconds = time.monotonic() - began
    place = os.path.relpath(output) if output.is_relative_to(Path.cwd()) else output
    print(f"{before:,} tokens became {after:,} ({after / max(before, 1):.2%} of them) in {seconds:.1f} s")
    print(f"train with DATA_PATH={place} TOKENIZER_PATH={place}/{TOKENIZER_FILE}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right (one line on standard error), 130 when interrupted."""
    try:
        run(arguments)
        return 0
    except ValueError as error:
        code, message = 2, f"error: {error}"
    except OSError as error:
        code, message = 2, f"error: {error.filename or 'input or output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; nothing was written"
    note(message)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as an interrupt does: with nothing left behind
    sys.exit(main())
