"""Documents to token shards: trains or takes a SentencePiece tokenizer, encodes every document with it and writes the challenge's shard format.

    python data/tokenize_docs.py --input docs.jsonl.xz --output data/datasets/mine --vocab-size 1024
    python data/tokenize_docs.py --input docs.jsonl.xz --output data/datasets/mine --tokenizer fineweb_1024_bpe.model --val-docs 50000
    python data/tokenize_docs.py --input docs.jsonl.xz --output data/datasets/mine --vocab-size 8192 --caseops --fuse-markers
    python data/tokenize_docs.py --input docs.jsonl.xz --output data/datasets/bytes --vocab-size 260

Input is read as a stream, so memory holds the work in flight, one shard, and the tokenizer's training sample, however large the corpus is.
The output depends on the input and the options alone, never on the number of workers or on interruptions. The folder appears complete or not at
all; what an interrupted run finished of it waits in DIR.partial, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import operator
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Self

import caseops
import numpy as np
import sentencepiece
import zstandard
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from shards import MANIFEST_FILE, TOKEN_BYTES, check_shard, write_json, write_shard

MAX_VOCAB_SIZE = 256**TOKEN_BYTES
MAX_DEFAULT_VAL_DOCS = 50_000  # the challenge's own validation split
BATCH_CHARS = 1 << 18  # large enough that passing a batch to a worker costs nothing beside encoding it
BATCHES_PER_WORKER = 4  # read ahead of the slowest batch, so that no worker waits for it
# SentencePiece silently drops longer sentences, so longer texts are cut; a character is at most 4 bytes of UTF-8.
SENTENCE_CHARS = 4096
SENTENCE_BYTES = 4 * SENTENCE_CHARS
# A sentence holding one of these two (its null and its own mark for unknown text) is dropped from the training too.
DROPPED_BY_TRAINER = dict.fromkeys(map(ord, "\0\u2585"))
PLAIN_REPORT_SECONDS = 10.0
TOKENIZER_FILE = "tokenizer.model"
JOURNAL_FILE = "journal.json"
OUR_FILES = re.compile(
    rf"(fineweb_(train|val|val_bytes)_\d{{6}}\.bin|{re.escape(TOKENIZER_FILE)}|{re.escape(MANIFEST_FILE)}|{re.escape(JOURNAL_FILE)})(\.partial)?"
)
BYTE_VOCAB_SIZES = (256, 260)  # the bytes alone, or with the four control tokens that come before them: both name the same vocabulary


class InputError(ValueError):
    """What the user can put right: the message says what is wrong, where, and what to do."""


class OtherRunError(InputError):
    """The finished shards in DIR.partial are not the beginning of what was asked for."""


# ----------------------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------------------
# Files to a stream of texts. Promises that every text is valid Unicode and exactly what the file holds, line ends included.


class ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst file, all of its frames. Unlike zstandard's own reader it raises EOFError for a truncated file."""

    def __init__(self, file: BinaryIO) -> None:
        self._chunks = self._decompress(file)
        self._ready = b""

    @staticmethod
    def _decompress(file: BinaryIO) -> Iterator[bytes]:
        frame = zstandard.ZstdDecompressor().decompressobj()
        compressed = b""
        while compressed := compressed or file.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE):
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(compressed)
            compressed = frame.unused_data
        if not frame.eof:
            raise EOFError("the file ends inside a frame")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = chunk
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(ZstdFile(file)),
}


class Corpus:
    """The documents of `paths`, in order; each iteration reads the files anew and holds one document at a time.

    `size_bytes` is the size of the files as they lie on disk, and `read_bytes` how much of that the latest iteration has read.
    Raises InputError, from the constructor for a file that does not exist, from the iteration for content that cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: no such file")
        self.paths = paths
        self.size_bytes = sum(path.stat().st_size for path in paths)
        self.read_bytes = 0

    def __iter__(self) -> Iterator[str]:
        finished_bytes = 0
        for path in self.paths:
            with open(path, "rb") as file:
                for text in read_documents(path, file):
                    self.read_bytes = finished_bytes + file.tell()
                    yield text
                finished_bytes += file.tell()
        self.read_bytes = finished_bytes


def read_documents(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yields the documents of the open `file`, of which `path` tells compression and format. Raises InputError naming file and line."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else ""
    try:
        content = OPENERS[compression](file) if compression else file
        if suffixes and suffixes[-1] in (".jsonl", ".json"):
            for number, line in enumerate(content, start=1):
                if not line.isspace():
                    yield parse_line(line, f"{path}:{number}")
        else:
            yield decode_utf8(content.read(), str(path))
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path}: cannot be decompressed as {compression}; it is truncated, damaged or of another format ({error})") from error


def decode_utf8(content: bytes, where: str) -> str:
    """Returns `content` as text. Raises InputError naming `where` and the offending byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not valid UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}: {error.reason})") from error


def parse_line(line: bytes, where: str) -> str:
    """Returns the "text" of one JSON line. Raises InputError naming `where` and what is wrong."""
    try:
        record = json.loads(decode_utf8(line, where))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); a JSONL file holds one JSON object on each line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{where}: expected an object with a string field "text"')
    text: str = record["text"]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: the text holds half a surrogate pair ({text[error.start]!a}), which is not Unicode text") from error
    return text


def count_val_documents(corpus: Corpus, wanted: str | None) -> int | None:
    """Returns how many leading documents are held out; None stands for all of them.

    `wanted` is a number, "all", or None for a tenth of the documents, at least 1 and at most MAX_DEFAULT_VAL_DOCS.
    Raises InputError when no document would be left for validation, or none for training.
    """
    if wanted is not None and wanted != "all" and not re.fullmatch("0*[1-9][0-9]*", wanted):
        raise InputError(f'--val-docs={wanted}: expected a number of documents from 1, or "all"')
    enough = 10 * MAX_DEFAULT_VAL_DOCS if wanted is None else 1 if wanted == "all" else int(wanted) + 1
    found = sum(1 for _ in itertools.islice(corpus, enough))  # to a limit, since a corpus may take hours to read
    if found == 0:
        raise InputError(f"no documents in {', '.join(map(str, corpus.paths))}")
    if wanted == "all":
        return None
    held_out = max(1, found // 10) if wanted is None else int(wanted)
    if found <= held_out:
        raise InputError(f"--val-docs {held_out} leaves no document to train on: the input holds {found}; hold out fewer, or all to score only")
    return held_out


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------
# A trained tokenizer is lossless: no normalisation, every space kept, bytes for what has no piece. Pieces may hold newlines.


class TrainingSample(NamedTuple):
    sentences: list[str]
    documents: int
    bytes: int


def sample_documents(documents: Iterable[str], limit_bytes: int, transform: Callable[[str], str] = str) -> TrainingSample:
    """Returns the leading documents that together reach `limit_bytes` of text, or all of them, cut into sentences that the trainer accepts.

    What is cut is what `transform` makes of a document; `limit_bytes` and the counts are of the document itself.
    """
    sentences: list[str] = []
    count = size = 0
    for text in documents:
        sentences += cut_sentences(transform(text))
        count += 1
        size += len(text.encode("utf-8"))
        if size >= limit_bytes:
            break
    return TrainingSample(sentences, count, size)


def cut_sentences(text: str) -> Iterator[str]:
    """Yields `text` in pieces of at most SENTENCE_CHARS characters, cut after the last newline that fits, else before the last space, else there."""
    text = text.translate(DROPPED_BY_TRAINER)
    start = 0
    while start < len(text):
        end = start + SENTENCE_CHARS
        if end < len(text):
            newline, space = text.rfind("\n", start, end), text.rfind(" ", start + 1, end)
            end = newline + 1 if newline >= start else space if space > start else end
        yield text[start:end]
        start = end


# What the challenge's own script trains with: NFKC, and whitespace in single spaces, so that texts do not come back as they were.
AS_IN_CHALLENGE: dict[str, Any] = {
    "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False, "add_dummy_prefix": False,
    "character_coverage": 0.999,
}  # fmt: skip


def train_tokenizer(sentences: Iterable[str], vocab_size: int, symbols: Sequence[str] = (), *, as_in_challenge: bool = False) -> bytes:
    """Returns a SentencePiece BPE model trained on `sentences`, in which each of `symbols` is a piece that no other piece reaches over.

    It is lossless unless it is to be `as_in_challenge`. Raises InputError when the text does not support `vocab_size`.
    """
    model = io.BytesIO()
    options: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": not symbols,  # the challenge's way with CaseOps: a document begins with a marker more often than with a word
        "character_coverage": 0.9995,  # the rarest characters cost a few bytes each rather than a piece of a small vocabulary
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            **(AS_IN_CHALLENGE if as_in_challenge else options),
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=16,  # recorded in the model, so a number taken from the machine would change its hash
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
            user_defined_symbols=list(symbols),
        )
    except RuntimeError as error:
        raise InputError(explain_training_failure(str(error), vocab_size)) from error
    return model.getvalue()


def explain_training_failure(message: str, vocab_size: int) -> str:
    """Returns SentencePiece's `message` in terms of our options."""
    if too_high := re.search(r"too high.*<= (\d+)", message):
        return f"--vocab-size {vocab_size} is more than the training documents support; use at most {too_high[1]}, or give more text"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"--vocab-size {vocab_size} is too small; the 256 bytes, 4 control tokens and the text's characters need {too_small[1]}"
    if "!sentences_.empty()" in message:
        return "the training documents hold no text to train a tokenizer on; give more text, fewer --val-docs, or a --tokenizer"
    return f"SentencePiece could not train a tokenizer: {message}"


UNKNOWN_PIECE, CONTROL_PIECE, BYTE_PIECE, CHAR_MODEL = 2, 3, 6, 4  # of sentencepiece_model.proto


def byte_tokenizer() -> bytes:
    """Returns a SentencePiece model of the 256 bytes after pad, BOS, EOS and UNK: byte b is token 4 + b, as in the published byte260 export."""
    # Built by hand from the fields of sentencepiece_model.proto, since the trainer makes no vocabulary without a character.
    pieces = [("<pad>", CONTROL_PIECE), ("<s>", CONTROL_PIECE), ("</s>", CONTROL_PIECE), ("<unk>", UNKNOWN_PIECE)]
    pieces += [(f"<0x{byte:02X}>", BYTE_PIECE) for byte in range(256)]
    trainer = (_number(3, CHAR_MODEL), _number(4, len(pieces)), _number(35, 1), _number(40, 3), _number(41, 1), _number(42, 2), _number(43, 0))
    normalizer = (_text(1, b"identity"), _number(3, 0), _number(4, 0), _number(5, 0))  # and no dummy prefix, no dropped spaces, no U+2581 for a space
    entries = [_text(1, _text(1, piece.encode()) + _number(3, kind)) for piece, kind in pieces]
    return b"".join([*entries, _text(2, b"".join(trainer)), _text(3, b"".join(normalizer))])


def _varint(value: int) -> bytes:
    """Returns `value`, below 2**14, as protobuf writes a number."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def _number(field: int, value: int) -> bytes:
    """Returns a numeric protobuf field."""
    return _varint(field << 3) + _varint(value)


def _text(field: int, content: bytes) -> bytes:
    """Returns a protobuf field of bytes."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def load_tokenizer(model: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Returns the tokenizer in `model`. Raises InputError naming `source` when it is unreadable, has no BOS, or its ids exceed uint16."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise InputError(f"{source}: not a SentencePiece model ({error})") from error
    if tokenizer.bos_id() < 0:
        raise InputError(f"{source}: the tokenizer has no BOS token, which must precede every document; train it with bos_id set")
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise InputError(f"{source}: {tokenizer.vocab_size()} tokens do not fit the shards' uint16; use at most {MAX_VOCAB_SIZE}")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------------------
# Batches of documents go to workers and come back in order. Every document is decoded again, so losses are counted, never assumed.


class Totals(NamedTuple):
    """What is counted of a split. `decoded_bytes` is what its tokens spell, UNK spelling nothing: the bytes that a score divides by."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    decoded_bytes: int = 0
    lossy_documents: int = 0
    unknown_tokens: int = 0

    def plus(self, other: Totals) -> Totals:
        return Totals(*map(operator.add, self, other))


class Encoded(NamedTuple):
    tokens: np.ndarray  # uint16, BOS before each document
    totals: Totals
    bytes: np.ndarray | None = None  # uint16, of the original text for each of `tokens`; only of CaseOps text that is scored


_tokenizer = sentencepiece.SentencePieceProcessor()  # of this process; filled once, because loading costs as much as a batch


def load_worker_tokenizer(model: bytes) -> None:
    """Makes `model` the tokenizer of `encode_batch` in this process."""
    _tokenizer.LoadFromSerializedProto(model)


def start_worker(model: bytes) -> None:
    """Prepares a worker process, which leaves an interrupt from the keyboard to its parent and ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    load_worker_tokenizer(model)


def end_with_parent() -> None:
    """Waits for the parent process to end, then ends this one, which would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_batch(texts: list[str], scored: bool) -> Encoded:
    """Returns the tokens of `texts`, each preceded by BOS, what they lost, and, if they are CaseOps text to be `scored`, their bytes."""
    rows, byte_rows, totals = [], [], Totals()
    bos, unk = _tokenizer.bos_id(), _tokenizer.unk_id()
    marked = caseops.is_caseops(_tokenizer)
    measure = caseops.original_bytes if marked else utf8_length
    for text in texts:
        content = caseops.encode(text) if marked else text
        if marked and scored:
            mapping = _tokenizer.encode(content, return_type="offset_mapping")
            ids = mapping["ids"]
            byte_rows.append(as_uint16([0, *caseops.token_bytes(content, mapping["offsets"])]))
        else:
            ids = _tokenizer.encode(content)
        decoded = _tokenizer.decode(ids)
        unknown = ids.count(unk)
        spelt = _tokenizer.decode([token for token in ids if token != unk]) if unknown else decoded
        lossy = decoded != content or (marked and caseops.decode(decoded) != text)
        rows.append(np.array([bos, *ids], dtype=np.uint16))
        totals = totals.plus(Totals(1, 1 + len(ids), utf8_length(text), measure(spelt), int(lossy), unknown))
    return Encoded(np.concatenate(rows), totals, np.concatenate(byte_rows) if byte_rows else None)


def utf8_length(text: str) -> int:
    """Returns the number of bytes of `text` in UTF-8."""
    return len(text.encode("utf-8"))


def as_uint16(counts: list[int]) -> np.ndarray:
    """Returns the bytes of a document's tokens as the side file holds them. Raises InputError for more than it can hold."""
    if max(counts) > 0xFFFF:
        raise InputError(f"one token stands for {max(counts):,} bytes, which the uint16 of a byte shard cannot hold; shorten that run of white space")
    return np.array(counts, dtype=np.uint16)


def batch_documents(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yields `documents` in lists of about BATCH_CHARS characters."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text) + 1  # so that empty documents fill a batch too
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Position(NamedTuple):
    """A place between two documents of the corpus."""

    documents: int  # before it
    sha256: str  # of their texts


START = Position(0, hashlib.sha256().hexdigest())


class Batch(NamedTuple):
    """Documents that are encoded together."""

    split: str
    texts: list[str]
    start: Position
    end: Position


class Fingerprint:
    """The position in the corpus after the texts given so far."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._documents = 0

    def add(self, text: str) -> None:
        self._digest.update(text.encode("utf-8") + b"\xff")  # which no text holds, so that the borders between documents count
        self._documents += 1

    @property
    def position(self) -> Position:
        return Position(self._documents, self._digest.hexdigest())


def split_batches(corpus: Corpus, val_documents: int | None, start: Position = START) -> Iterator[Batch]:
    """Yields batches of `corpus` from `start` on: the first `val_documents` documents are "val", the others "train"; None makes all "val".

    Raises OtherRunError when the documents before `start` are not those that its hash was taken of.
    """
    documents, fingerprint = iter(corpus), Fingerprint()
    for text in itertools.islice(documents, start.documents):
        fingerprint.add(text)
    if fingerprint.position != start:
        raise OtherRunError(f"the finished shards hold {start.documents:,} documents that are not those at the head of the input, which has changed")
    left = None if val_documents is None else max(val_documents - start.documents, 0)
    for split, part in (("val", itertools.islice(documents, left)), ("train", documents)):
        for texts in batch_documents(part):
            begin = fingerprint.position
            for text in texts:
                fingerprint.add(text)
            yield Batch(split, texts, begin, fingerprint.position)


def encode_in_order(work: Iterable[Batch], model: bytes, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """Yields each batch of `work` with its encoding, in its order, encoded by `workers` processes, or in this one if `workers` is 1.

    At most BATCHES_PER_WORKER batches per worker are in flight, which bounds the memory (`multiprocessing`'s imap would read all of `work` ahead).
    Raises InputError when a worker dies.
    """
    if workers == 1:
        load_worker_tokenizer(model)
        for batch in work:
            yield batch, encode_batch(batch.texts, batch.split == "val")
        return
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    # A fork would copy the progress display's thread in whatever state it is; a spawned worker starts clean.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (model,))
    try:
        for batch in work:
            pending.append((batch, pool.submit(encode_batch, batch.texts, batch.split == "val")))
            if len(pending) == BATCHES_PER_WORKER * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise InputError("a worker process died, most often for want of memory; run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------
# Everything is written into DIR.partial, which becomes DIR when it is complete. After every shard the journal there says how far it is: a position
# in the corpus before the first document that is not wholly in finished shards, and what was counted of each split up to it.


class ShardWriter:
    """Cuts one split's tokens, or another value for each of them, into shards of `shard_tokens`, the last one shorter; documents may cross the border.

    `finished` holds the manifest's entries of shards that are there already, after which it goes on.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int, finished: Sequence[dict[str, Any]] = ()) -> None:
        self._folder = folder
        self._split = split
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)
        self._filled = 0
        self.shards = list(finished)

    def add(self, tokens: np.ndarray) -> None:
        """Appends `tokens`, writing every shard that becomes full."""
        while tokens.size:
            taken = tokens[: self._buffer.size - self._filled]
            self._buffer[self._filled : self._filled + taken.size] = taken
            self._filled += taken.size
            tokens = tokens[taken.size :]
            if self._filled == self._buffer.size:
                self.flush()

    def flush(self) -> None:
        """Writes what is held as a shard, if anything is."""
        if self._filled:
            path = self._folder / f"fineweb_{self._split}_{len(self.shards):06d}.bin"
            write_shard(path, self._buffer[: self._filled])
            self.shards.append({"file": path.name, "tokens": self._filled, "sha256": file_sha256(path)})
            self._filled = 0


class Journal:
    """What is finished in `folder`, in its file journal.json, for a run with these `terms`: all that the shards depend on besides the texts."""

    def __init__(self, folder: Path, terms: dict[str, Any]) -> None:
        """Raises OtherRunError when `folder` holds finished shards of other terms, or damaged ones."""
        self._path = folder / JOURNAL_FILE
        self._terms = terms
        self.position, self.splits = START, dict[str, Any]()
        if not self._path.exists():
            return
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self.position, self.splits = Position(*content["position"]), content["splits"]
            different = [f"{name} {content['terms'][name]} there, {value} here" for name, value in terms.items() if content["terms"][name] != value]
            for split in self.splits.values():
                for entry in (*split["shards"], *split.get("byte_shards", [])):
                    if check_shard(folder / entry["file"]) != entry["tokens"] or file_sha256(folder / entry["file"]) != entry["sha256"]:
                        raise ValueError(f"{entry['file']} is not what was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OtherRunError(f"{folder} holds a part of an earlier run, but it is damaged ({error}); delete it") from error
        if different:
            raise OtherRunError(f"{folder} was begun otherwise ({'; '.join(different)}); give that run's input and options again to finish it, or delete it")

    def save(self, position: Position, splits: dict[str, Any]) -> None:
        """Records that the shards in `splits` are finished and hold all documents before `position`."""
        write_json(self._path, {"terms": self._terms, "position": position, "splits": splits})


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of the file at `path`, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sibling(folder: Path, suffix: str) -> Path:
    """Returns the path beside `folder` whose name has `suffix` appended."""
    return folder.with_name(folder.name + suffix)


def check_replaceable(folder: Path, force: bool) -> None:
    """Raises InputError when `folder` exists and either `force` is not set or it holds something that this tool did not write."""
    if not os.path.lexists(folder):
        return
    if not force:
        raise InputError(f"{folder} exists; name another --output, or replace it with --force")
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name another --output")
    foreign = sorted(path.name for path in folder.iterdir() if not OUR_FILES.fullmatch(path.name))
    if foreign:
        raise InputError(f"{folder} holds files that this tool did not write ({foreign[0]}); --force does not delete them: name another --output")


@contextmanager
def complete_folder(folder: Path, force: bool) -> Iterator[Path]:
    """Gives a folder to write into, empty or with the journal of an interrupted run, which takes the place of `folder` when the block ends.

    When the block raises, what was written is removed, unless it holds finished shards: then the exception gets a note that says where they are.
    Raises InputError when `folder` may not be replaced, or another run writes to it.
    """
    check_replaceable(folder, force)
    partial, replaced = sibling(folder, ".partial"), sibling(folder, ".replaced")
    if replaced.exists():
        raise InputError(f"{replaced} exists: another run is replacing {folder}, or one was killed; make sure that none is running and delete it")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        if not (partial / JOURNAL_FILE).exists():
            empty(partial)
        try:
            yield partial
            check_replaceable(folder, force)  # it may have appeared or been filled meanwhile
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
        except BaseException as error:
            if not (partial / JOURNAL_FILE).exists():
                shutil.rmtree(partial, ignore_errors=True)
            elif not isinstance(error, OtherRunError):
                error.add_note(f"the finished shards are kept in {partial}, and the same command goes on after them")
            raise
    (folder / JOURNAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of `folder`, for as long as this process lives. Raises InputError when one is in there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"{folder}: another run is writing there; wait for it, or name another --output") from error
    finally:
        os.close(descriptor)


def empty(folder: Path) -> None:
    """Deletes what a killed run left in `folder`. Raises InputError, deleting nothing, when it holds something that this tool did not write."""
    paths = sorted(folder.iterdir())
    if foreign := [path for path in paths if not OUR_FILES.fullmatch(path.name)]:
        raise InputError(f"{foreign[0]}: this tool needs the folder but did not write that file; move it away, or name another --output")
    for path in paths:
        path.unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Progress
# ----------------------------------------------------------------------------------------------------------------------
# Standard error carries progress and errors; standard output carries the result.


class Meter:
    """Shows how far the reading of `corpus` is, with speed and remaining time: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.text_bytes = 0
        self._started = self._reported = time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("tokenising"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=corpus.size_bytes, speed="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return max(time.monotonic() - self._started, 1e-9)

    def advance(self, text_bytes: int) -> None:
        """Counts `text_bytes` more bytes of text as done."""
        self.text_bytes += text_bytes
        speed = f"{self.text_bytes / 1e6:,.1f} MB  {self.text_bytes / 1e6 / self.seconds:.2f} MB/s"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._corpus.read_bytes, speed=speed)
        elif time.monotonic() - self._reported >= PLAIN_REPORT_SECONDS:
            self._reported = time.monotonic()
            done = self._corpus.read_bytes / max(self._corpus.size_bytes, 1)
            minutes, seconds = divmod(round(self.seconds * (1 - done) / max(done, 1e-9)), 60)
            note(f"tokenising  {done:4.0%}  {speed}  {minutes}:{seconds:02d} left")


def note(message: str) -> None:
    """Writes one line to standard error."""
    print(message, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported: one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def positive(text: str) -> int:
    """Returns `text` as an integer from 1. Raises ArgumentTypeError otherwise."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options. Raises InputError for a wrong command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        metavar="FILE",
        type=Path,
        nargs="+",
        required=True,
        help='documents: .jsonl or .json (one object with "text" per line) or any other name (one plain-text document); also .gz .xz .zst',
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to create")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", metavar="MODEL", type=Path, help="SentencePiece model to use; without it one is trained")
    tokenizer.add_argument("--vocab-size", metavar="N", type=positive, default=1024, help="size of a new tokenizer (default 1024); 256 or 260: the bytes")
    parser.add_argument("--as-in-challenge", action="store_true", help="train it with the challenge's own options, which lose whitespace and rare characters")
    parser.add_argument("--caseops", action="store_true", help="turn capitals into markers first; also write byte shards for the validation split")
    parser.add_argument("--fuse-markers", action="store_true", help="with --caseops: one token for a space and the marker after it")
    parser.add_argument(
        "--val-docs",
        metavar="N",
        help=f'leading documents held out for validation, or "all"; without it a tenth of them, at most {MAX_DEFAULT_VAL_DOCS:,}',
    )
    parser.add_argument("--shard-tokens", metavar="N", type=positive, default=100_000_000, help="tokens per shard (default 100,000,000)")
    parser.add_argument("--workers", metavar="N", type=positive, default=os.cpu_count() or 1, help="processes that encode (default: all cores)")
    parser.add_argument(
        "--train-sample-bytes",
        metavar="N",
        type=positive,
        default=100_000_000,
        help="the tokenizer is trained on the leading training documents up to this much text, held in memory (default 100,000,000)",
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it holds an earlier output of this tool")
    options = parser.parse_args(arguments)
    if options.vocab_size > MAX_VOCAB_SIZE:
        raise InputError(f"--vocab-size {options.vocab_size} does not fit the shards' uint16; use at most {MAX_VOCAB_SIZE}")
    if options.as_in_challenge and (options.caseops or options.tokenizer is not None or options.vocab_size in BYTE_VOCAB_SIZES):
        raise InputError("--as-in-challenge is about the tokenizer to train, and CaseOps needs a lossless one; leave it out")
    if options.vocab_size in BYTE_VOCAB_SIZES and options.caseops:
        raise InputError(f"--vocab-size {options.vocab_size} is a vocabulary of bytes, which have no case markers; leave out --caseops, or take a larger one")
    if options.val_docs == "all" and options.tokenizer is None and options.vocab_size not in BYTE_VOCAB_SIZES:
        raise InputError("--val-docs all leaves no document to train a tokenizer on; give a --tokenizer")
    if options.fuse_markers and not options.caseops:
        raise InputError("--fuse-markers fuses the markers of CaseOps; add --caseops")
    return options


def make_tokenizer(options: argparse.Namespace, corpus: Corpus, val_documents: int | None) -> tuple[bytes, dict[str, Any]]:
    """Returns the tokenizer's model, read or trained on training documents, and its entry in the manifest. Raises InputError and OSError."""
    entry: dict[str, Any] = {"file": TOKENIZER_FILE}
    if options.tokenizer is None and options.vocab_size in BYTE_VOCAB_SIZES:
        model = byte_tokenizer()
        note("the 256 bytes and 4 control tokens: train with VOCAB_SIZE=260")
    elif options.tokenizer is None:
        note(f"training a tokenizer of {options.vocab_size} pieces")
        documents = itertools.islice(corpus, val_documents, None)
        sample = sample_documents(documents, options.train_sample_bytes, caseops.encode if options.caseops else str)
        symbols = (*caseops.MARKERS, *(caseops.FUSED if options.fuse_markers else ())) if options.caseops else ()
        model = train_tokenizer(sample.sentences, options.vocab_size, symbols, as_in_challenge=options.as_in_challenge)
        entry["trained_on"] = {"documents": sample.documents, "bytes": sample.bytes}
    else:
        model = options.tokenizer.read_bytes()
    source = str(options.tokenizer or TOKENIZER_FILE)
    tokenizer = load_tokenizer(model, source)
    if options.caseops and not caseops.is_caseops(tokenizer):
        raise InputError(f"{source}: without the markers of CaseOps (U+E001 to U+E004) as pieces; leave out --caseops, or train a tokenizer with it")
    if not options.caseops and caseops.is_caseops(tokenizer):
        raise InputError(f"{source}: has the markers of CaseOps as pieces, and no good ones for capitals; add --caseops")
    if options.fuse_markers and options.tokenizer is not None:
        model = caseops.fuse(model)
    entry |= {"vocab_size": tokenizer.vocab_size(), "bos_id": tokenizer.bos_id(), "sha256": hashlib.sha256(model).hexdigest()}
    return model, entry | {"caseops": options.caseops}


def write_splits(folder: Path, encoded: Iterable[tuple[Batch, Encoded]], shard_tokens: int, meter: Meter, journal: Journal) -> dict[str, Any]:
    """Writes `encoded`, which follows what `journal` holds, into `folder` as shards.

    Returns the manifest's "splits": totals and shards of each. Raises InputError and OSError.
    """
    splits = dict(journal.splits)
    for split, batches in itertools.groupby(encoded, key=lambda item: item[0].split):
        earlier = splits.get(split, {"shards": []})
        if earlier["shards"] and earlier["shards"][-1]["tokens"] < shard_tokens:
            raise OtherRunError(f"{folder}: its last {split} shard ends with the text, but the input now goes on; delete the folder")
        writer = ShardWriter(folder, split, shard_tokens, earlier["shards"])
        byte_writer = ShardWriter(folder, f"{split}_bytes", shard_tokens, earlier.get("byte_shards", ()))
        totals = Totals(*(earlier.get(name, 0) for name in Totals._fields))
        written = sum(entry["tokens"] for entry in writer.shards) - totals.tokens  # tokens of the next documents that are in a finished shard
        for batch, part in batches:
            before, num_shards = totals, len(writer.shards)
            writer.add(part.tokens[written:])
            if part.bytes is not None:
                byte_writer.add(part.bytes[written:])
            written = max(written - part.tokens.size, 0)
            totals = totals.plus(part.totals)
            if len(writer.shards) > num_shards:
                journal.save(batch.start, splits | {split: split_entry(before, writer, byte_writer)})
            meter.advance(part.totals.bytes)
        writer.flush()
        byte_writer.flush()
        splits[split] = split_entry(totals, writer, byte_writer)
        journal.save(batch.end, splits)
    return splits


def split_entry(totals: Totals, writer: ShardWriter, byte_writer: ShardWriter) -> dict[str, Any]:
    """Returns a split's entry in the manifest or the journal."""
    return totals._asdict() | {"shards": writer.shards} | ({"byte_shards": byte_writer.shards} if byte_writer.shards else {})


def describe(folder: Path, splits: dict[str, Any], text_bytes: int, seconds: float) -> str:
    """Returns the report of a finished run, for people; `text_bytes` were tokenised in `seconds`."""
    lines = [f"{'split':5}  {'documents':>11}  {'tokens':>15}  {'bytes':>15}  {'bytes/token':>11}  shards"]
    for split, entry in splits.items():
        counts = f"{entry['documents']:>11,}  {entry['tokens']:>15,}  {entry['bytes']:>15,}"
        lines.append(f"{split:5}  {counts}  {entry['bytes'] / entry['tokens']:>11.4f}  {len(entry['shards']):>6}")
    total = Totals(*(sum(entry[name] for entry in splits.values()) for name in Totals._fields))
    if total.lossy_documents:
        lost = f"the tokens spell {total.decoded_bytes:,} of {total.bytes:,} bytes, with {total.unknown_tokens:,} unknown tokens"
        lines.append(f"{total.lossy_documents:,} of {total.documents:,} documents do not round-trip: {lost}")
    else:
        lines.append(f"all {total.documents:,} documents round-trip")
    lines.append(f"wrote {folder} in {seconds:.1f} s ({text_bytes / 1e6 / seconds:.2f} MB/s)")
    return "\n".join(lines)


def run(arguments: Sequence[str] | None) -> None:
    """Does what the command line asks and prints the report. Raises InputError and OSError, leaving nothing behind but finished shards."""
    options = parse_arguments(arguments)
    output = Path(os.path.abspath(options.output))  # so that "." and ".." have a name and a parent
    with complete_folder(output, options.force) as folder:
        corpus = Corpus(options.input)
        val_documents = count_val_documents(corpus, options.val_docs)
        model, tokenizer_entry = make_tokenizer(options, corpus, val_documents)
        terms = {"val_docs": val_documents, "shard_tokens": options.shard_tokens, "tokenizer": tokenizer_entry["sha256"]}
        journal = Journal(folder, terms)
        (folder / TOKENIZER_FILE).write_bytes(model)
        if journal.position.documents:
            note(f"going on after {journal.position.documents:,} documents, which are in finished shards")
        with Meter(corpus) as meter:
            encoded = encode_in_order(split_batches(corpus, val_documents, journal.position), model, options.workers)
            splits = write_splits(folder, encoded, options.shard_tokens, meter, journal)
            seconds = meter.seconds
        write_json(folder / MANIFEST_FILE, {"inputs": [path.name for path in options.input], "tokenizer": tokenizer_entry, "splits": splits})
    print(describe(options.output, splits, meter.text_bytes, seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right (one line on standard error), 130 when interrupted."""
    try:
        run(arguments)
        return 0
    except InputError as error:
        code, message, kept = 2, f"error: {error}", notes_of(error)
    except OSError as error:
        code, message, kept = 2, f"error: {error.filename or 'input or output'}: {error.strerror or error}", notes_of(error)
    except KeyboardInterrupt as error:
        code, message, kept = 130, "interrupted", notes_of(error) or ["nothing was written"]
    note("; ".join([message, *kept]))
    return code


def notes_of(error: BaseException) -> list[str]:
    """Returns what `complete_folder` noted on the exception."""
    return list(getattr(error, "__notes__", []))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as an interrupt does: with nothing left behind
    sys.exit(main())
