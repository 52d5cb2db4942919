"""Downloads a published FineWeb export (token shards, tokenizer, optionally the documents) from the Hugging Face hub, and checks folders of shards.

    python data/download.py --variant sp1024 --train-shards 80     the full training set of the challenge
    python data/download.py --variant sp1024 --train-shards 1      one training shard and the whole validation split, for a trial
    python data/download.py --verify data/datasets/mine            checks folders that are here, whatever made them; needs no network

Every file is checked (size and SHA-256 as the hub states them; header and token count of a shard) before it appears, in one step, under its
final name. Files already here are checked too and kept if good, so running the same command again mends or completes a folder. Within a run
the library resumes a broken transfer; between runs whole files are kept. All files come from one commit of the repository, and what it holds is
taken from its list of files: the manifest says which tokenizer belongs to the shards and how many tokens there should be. manifest.json beside the
shards records what was fetched.

--verify checks every shard (header, size, tokens, SHA-256 where a manifest.json states it), the lengths of the splits, and that the validation
documents do not occur in the training shards.

The library reads HF_ENDPOINT (another hub), HF_HUB_CACHE (where its copies lie) and HF_TOKEN.
Exit codes: 0 everything asked for is in place or good, 1 the hub, a file or a check failed, 2 a wrong argument, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,  # the base of every transport error, whichever HTTP library this version of the hub library stands on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from shards import MANIFEST_FILE, FolderReport, check_folder, check_shard, read_manifest, split_files, write_json
from tokenize_docs import byte_tokenizer

DATASET_PREFIX = "fineweb10B_"
DEFAULT_TRAIN_SHARDS = 80  # the challenge's training set
DOCUMENTS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
PLAIN_LINE_SECONDS = 30

Kind = Literal["train", "val", "val_bytes", "tokenizer", "documents"]


class UsageError(Exception):
    """The command asks for something that does not exist; exit code 2."""


class DownloadError(Exception):
    """The hub, the network, a file or a check failed; exit code 1."""


class Stopped(Exception):
    """The run is ending, so this transfer ends too."""


class Export(NamedTuple):
    """What the manifest says of one variant. `tokenizer_paths[0]` is the file that TOKENIZER_PATH names."""

    name: str
    train_shards: int
    val_shards: int
    train_tokens: int | None
    val_tokens: int | None
    tokenizer_paths: tuple[str, ...]
    has_val_bytes: bool = False  # a byte shard beside each validation shard, as CaseOps has
    bos_id: int = 1
    vocab_size: int | None = None


class Item(NamedTuple):
    """One wanted file: its path in the repository and its final place on this machine."""

    kind: Kind
    remote: str
    local: Path


class HubFile(NamedTuple):
    """What the hub states about one file; small files kept in git have no SHA-256."""

    size: int
    sha256: str | None


# ----------------------------------------------------------------------------------------------------------------------
# Manifest


def read_export(manifest: Path, variant: str) -> Export:
    """Returns the entry of `variant` in the manifest file. Raises UsageError for an unknown variant, DownloadError for a malformed manifest."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        datasets = {entry["name"]: entry for entry in content["datasets"]}
        tokenizers = {entry["name"]: entry for entry in content["tokenizers"]}
        name = DATASET_PREFIX + variant
        if name not in datasets:
            variants = sorted(known.removeprefix(DATASET_PREFIX) for known in datasets if known.startswith(DATASET_PREFIX))
            raise UsageError(f"--variant {variant}: the manifest has no {name}; its variants are: {', '.join(variants) or 'none'}")
        stats, tokenizer = datasets[name]["stats"], tokenizers[datasets[name]["tokenizer_name"]]
        if not all(isinstance(value, int) and value >= 1 for key, value in stats.items() if key.startswith(("files_", "tokens_"))):
            raise ValueError(f"counts of {name} must be whole numbers from 1, got {stats}")
        return Export(
            name=checked_path(PLAIN_NAME, name),
            train_shards=stats["files_train"],
            val_shards=stats["files_val"],
            train_tokens=stats.get("tokens_train"),
            val_tokens=stats.get("tokens_val"),
            tokenizer_paths=tokenizer_paths(tokenizer),
            has_val_bytes=bool(datasets[name].get("val_bytes_glob")),
            bos_id=1 if tokenizer.get("bos_id") is None else int(tokenizer["bos_id"]),
            vocab_size=None if tokenizer.get("vocab_size") is None else int(tokenizer["vocab_size"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise DownloadError(
            f"the manifest of the repository is malformed ({type(problem).__name__}: {problem}); choose another --revision, --prefix or --repo-id"
        ) from problem


def tokenizer_paths(entry: dict[str, str]) -> tuple[str, ...]:
    """Returns the paths of a tokenizer's files, the model first. Raises ValueError where one would land outside tokenizers/, or there is none."""
    paths = [entry[key] for key in ("model_path", "path", "vocab_path") if entry.get(key)]
    if not paths:
        raise ValueError(f"tokenizer {entry['name']} has neither model_path nor path")
    return tuple(checked_path(f"tokenizers(/{PLAIN_NAME})+", path) for path in paths)


def checked_path(pattern: str, path: str) -> str:
    """Returns `path` if all of it matches `pattern`. Raises ValueError otherwise: a manifest must not choose where on this machine files land."""
    if not re.fullmatch(pattern, path):
        raise ValueError(f"unsafe path {path!r}")
    return path


def what_the_hub_has(export: Export, listed: dict[str, HubFile]) -> Export:
    """Returns `export` with the numbers of shards that the hub really lists, which differ from those of a stale manifest.

    A validation shard that the manifest promises is kept: without it the split is not the challenge's, and fetching it must fail.
    """
    numbers: dict[str, list[int]] = {"train": [], "val": [], "val_bytes": []}
    for path in listed:
        if found := re.fullmatch(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin", path.rsplit("/", 1)[-1]):
            numbers[found[1]].append(int(found[2]))
    return export._replace(
        train_shards=max(numbers["train"], default=-1) + 1,
        val_shards=max(export.val_shards, max(numbers["val"], default=-1) + 1),
        has_val_bytes=export.has_val_bytes or bool(numbers["val_bytes"]),
    )


def shards_to_fetch(asked: int | None, promised: Export, actual: Export) -> int:
    """Returns how many training shards to fetch. Raises UsageError for more than there ever were, DownloadError where the hub has none."""
    if asked is not None and asked > max(promised.train_shards, actual.train_shards):
        raise UsageError(f"--train-shards {asked}: {actual.name} has {actual.train_shards}; use --train-shards {actual.train_shards}")
    if actual.train_shards == 0 and asked != 0:
        raise DownloadError(f"the hub lists no training shard of {actual.name}; choose another --revision or --variant, or --train-shards 0")
    return min(DEFAULT_TRAIN_SHARDS if asked is None else asked, actual.train_shards)


def plan(export: Export, train_shards: int, with_docs: bool, prefix: str, output: Path) -> list[Item]:
    """Returns the files to have, small and indispensable ones first."""

    def item(kind: Kind, path: str) -> Item:
        folder = "datasets/" if kind in ("train", "val", "val_bytes") else ""
        return Item(kind, "/".join(part for part in (prefix, folder + path) if part), output / (folder + path))

    wanted = [item("tokenizer", path) for path in export.tokenizer_paths]
    wanted += [item("val", f"{export.name}/fineweb_val_{index:06d}.bin") for index in range(export.val_shards)]
    if export.has_val_bytes:
        wanted += [item("val_bytes", f"{export.name}/fineweb_val_bytes_{index:06d}.bin") for index in range(export.val_shards)]
    wanted += [item("train", f"{export.name}/fineweb_train_{index:06d}.bin") for index in range(train_shards)]
    return wanted + [item("documents", path) for path in DOCUMENTS if with_docs]


# ----------------------------------------------------------------------------------------------------------------------
# Hub


class Hub(NamedTuple):
    """One commit of a dataset repository. The methods raise DownloadError, in one line, when the hub cannot be reached or fails."""

    repo_id: str
    commit: str

    def look_up(self, paths: list[str]) -> dict[str, HubFile]:
        """Returns what the hub states about each of `paths`; a path that it does not hold is left out."""
        with one_line_errors(f"the list of files of {self.repo_id}"):
            infos = HfApi().get_paths_info(self.repo_id, paths, repo_type="dataset", revision=self.commit)
        return {info.path: HubFile(info.size, info.lfs.sha256 if info.lfs else None) for info in infos if isinstance(info, RepoFile)}

    def list_folder(self, path: str) -> dict[str, HubFile]:
        """Returns what the hub states about each file in a folder of the repository."""
        with one_line_errors(f"the list of files in {path} of {self.repo_id}"):
            infos = list(HfApi().list_repo_tree(self.repo_id, path, repo_type="dataset", revision=self.commit))
        return {info.path: HubFile(info.size, info.lfs.sha256 if info.lfs else None) for info in infos if isinstance(info, RepoFile)}

    def is_cached(self, path: str) -> bool:
        """Returns whether the library's cache holds `path` of this commit."""
        return isinstance(try_to_load_from_cache(self.repo_id, path, revision=self.commit, repo_type="dataset"), str)

    def download(self, path: str, stated: HubFile, fresh: bool = False, bar: type[tqdm] = tqdm) -> Path:
        """Returns a verified copy of `path` in the library's cache. `fresh` forbids one that was there before; `bar` is told of received bytes.

        Raises ValueError saying what is wrong if a second, fresh copy is damaged too.
        """
        for force in (fresh, True):
            try:
                with one_line_errors(path):
                    copy = hf_hub_download(self.repo_id, path, repo_type="dataset", revision=self.commit, force_download=force, tqdm_class=bar)
                verify(Path(copy), stated)
                return Path(copy)
            except ValueError as problem:
                damage = problem
        raise damage


def open_hub(repo_id: str, revision: str, manifest: str) -> tuple[Hub, Path]:
    """Returns the repository at the commit that `revision` names now, so that all files come from one state of it, and a copy of its manifest.

    Raises UsageError for an impossible repository name, else DownloadError.
    """
    subject = f"{manifest} of {repo_id} at {revision}"
    with one_line_errors(subject):
        # A HEAD request without the library's retries: an offline machine is told so at once, not after half a minute.
        metadata = get_hf_file_metadata(hf_hub_url(repo_id, manifest, repo_type="dataset", revision=revision))
    if metadata.commit_hash is None or metadata.size is None:
        raise DownloadError(f"{subject}: the answer names no commit or no size; HF_ENDPOINT must name a Hugging Face hub")
    hub = Hub(repo_id, metadata.commit_hash)
    try:
        return hub, hub.download(manifest, HubFile(metadata.size, None))
    except ValueError as problem:
        raise DownloadError(f"{subject} is damaged ({problem}); choose another --revision, --prefix or --repo-id") from problem


@contextmanager
def one_line_errors(subject: str) -> Iterator[None]:
    """Turns what the hub library raises while it fetches `subject` into one line that says what to do.

    Raises UsageError or DownloadError; ValueError for a file that arrived damaged; OSError where this machine's disk refuses.
    """
    try:
        yield
    except HFValidationError as problem:
        raise UsageError(f"--repo-id: {first_line(problem)}") from problem
    except RepositoryNotFoundError as problem:
        raise DownloadError(f"{subject}: no such repository, or it is private; check --repo-id, or log in with `hf auth login`") from problem
    except RevisionNotFoundError as problem:
        raise DownloadError(f"{subject}: no such revision; check --revision") from problem
    except LocalEntryNotFoundError as problem:
        raise unreachable(subject, problem.__cause__ or problem) from problem
    except EntryNotFoundError as problem:
        raise DownloadError(f"{subject}: the hub answers 404, no such file; check --repo-id, --prefix and --revision") from problem
    except OfflineModeIsEnabled as problem:
        raise DownloadError(f"{subject}: HF_HUB_OFFLINE forbids the network; unset it and run the same command again") from problem
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # This machine's disk is at fault, not the hub.
        if type(problem) is OSError:
            raise ValueError(first_line(problem)) from problem  # The library's own check of the size: the file is damaged, the hub is well.
        raise unreachable(subject, problem) from problem
    except (HTTPError, ValueError, RuntimeError) as problem:
        raise unreachable(subject, problem.__cause__ or problem) from problem


def unreachable(subject: str, problem: BaseException) -> DownloadError:
    """Returns the error for a hub that cannot be reached, fails, or breaks off."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return DownloadError(f"{subject}: {endpoint} failed ({first_line(problem)}); check the network and HF_ENDPOINT, then run the same command again")


def first_line(problem: BaseException) -> str:
    """Returns the first line of an exception's message, or its type's name where it has none."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


# ----------------------------------------------------------------------------------------------------------------------
# Files


def verify(path: Path, stated: HubFile | None) -> int:
    """Returns the number of tokens of a good shard (.bin), 0 for another good file. Raises ValueError saying what is wrong and what was expected."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("0 bytes")
    if stated is not None and size != stated.size:
        raise ValueError(f"{size} bytes, the hub states {stated.size}")
    tokens = count_tokens(path)
    if stated is not None and stated.sha256 is not None and file_sha256(path) != stated.sha256:
        raise ValueError(f"its SHA-256 is not {stated.sha256}, which the hub states")
    return tokens


def count_tokens(path: Path) -> int:
    """Returns the number of tokens of a shard, 0 for another file. Raises ValueError as `check_shard`, without the path, which may lie in a cache."""
    try:
        return check_shard(path) if path.suffix == ".bin" else 0
    except ValueError as problem:
        raise ValueError(str(problem).removeprefix(f"{path}: ")) from problem


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place(copy: Path, final: Path) -> None:
    """Gives `final` the content of `copy` in one step. A hard link where the disk allows, because the cache would otherwise double the space."""
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(copy.resolve(), partial)
        except OSError:
            shutil.copyfile(copy, partial)
        os.replace(partial, final)
    finally:
        partial.unlink(missing_ok=True)


def check_space(hub: Hub, missing: list[Item], stated: dict[str, HubFile], damaged: dict[Item, str]) -> None:
    """Raises DownloadError if a disk is too small for the `missing` files: the one of the library's cache, or that of --output where it is another.

    On the same disk a file in its final place is a second name of the copy in the cache and takes no space.
    """
    received = [item for item in missing if item in damaged or not hub.is_cached(item.remote)]
    cache, output = Path(constants.HF_HUB_CACHE), missing[0].local.parent
    needs = [(cache, "the hub library's cache, HF_HUB_CACHE", received)]
    if disk_of(cache) != disk_of(output):
        needs.append((output, "--output", missing))
    for folder, name, items in needs:
        needed, free = sum(stated[item.remote].size for item in items), shutil.disk_usage(existing(folder)).free
        if needed > free:
            raise DownloadError(
                f"not enough disk space: {len(items)} files need {needed / 1e9:,.2f} GB in {folder} ({name}), where {free / 1e9:,.2f} GB are free; "
                "free space, ask for fewer --train-shards, or name a folder on a larger disk"
            )


def existing(folder: Path) -> Path:
    """Returns `folder`, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def disk_of(folder: Path) -> int:
    """Returns the number of the disk that `folder` lies on, or would lie on."""
    return existing(folder).stat().st_dev


# ----------------------------------------------------------------------------------------------------------------------
# Progress


class Meter:
    """Shows the progress of files that are worked on at the same time: one live bar on a terminal, elsewhere a line every half minute.

    The methods may be called from several threads.
    """

    def __init__(self, console: Console, num_files: int, total_bytes: int) -> None:
        self.console = console
        self.num_files = num_files
        self.total_bytes = total_bytes
        self.num_done = 0
        self.done_bytes = 0
        self.lock = threading.Lock()
        self.started = self.last_line = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(self.label(), total=total_bytes)

    def label(self) -> str:
        """Returns how many files are done, as `3/83 files`."""
        return f"{self.num_done}/{self.num_files} files"

    def advance(self, num_bytes: int) -> None:
        """Counts bytes as done; a negative number takes back what a broken transfer lost."""
        with self.lock:
            self.done_bytes += num_bytes
            self.bar.update(self.task, completed=self.done_bytes)
            if not self.console.is_terminal and time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
                self.last_line = time.monotonic()
                self.console.print(f"{self.label()}  {self.done_bytes / 1e6:,.1f} MB  {self.speed()}")

    def finish(self, name: str, outcome: str) -> None:
        """Counts a file as done and prints its line."""
        with self.lock:
            self.num_done += 1
            self.bar.update(self.task, description=self.label())
            self.console.print(f"{self.num_done}/{self.num_files} {name}  {outcome}  {self.speed()}")

    def speed(self) -> str:
        """Returns the mean speed so far and the time that the rest will take at it, as `12.3 MB/s, 1:23 left`."""
        seconds = max(time.monotonic() - self.started, 1e-3)
        left = int(seconds * (self.total_bytes - self.done_bytes) / max(self.done_bytes, 1))
        return f"{self.done_bytes / 1e6 / seconds:.1f} MB/s, {left // 60}:{left % 60:02d} left"


class Transfer:
    """One file on its way; tells `meter` of its bytes. Once `stop` is set, the next bytes raise Stopped."""

    def __init__(self, meter: Meter, stop: threading.Event) -> None:
        self.meter = meter
        self.stop = stop
        self.received_bytes = 0

    def advance(self, num_bytes: float | None) -> None:
        """Counts received bytes; a negative number takes back what a broken transfer lost."""
        if self.stop.is_set():
            raise Stopped
        self.received_bytes += int(num_bytes or 0)
        self.meter.advance(int(num_bytes or 0))

    def finish(self, name: str, size: int, outcome: str) -> None:
        """Ends the file, whose `size` bytes count as done however many had to be received."""
        source = "" if self.received_bytes else " from the library's cache"
        self.meter.advance(size - self.received_bytes)
        self.meter.finish(name, f"{size / 1e6:.1f} MB{source}  {outcome}")

    def bar(self) -> type[tqdm]:
        """Returns a progress class for the hub library that draws nothing and tells this transfer of the bytes written."""
        advance = self.advance

        class Reporter(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                advance(n)

            def update_transfer(self, n: float | None = 1) -> None:
                """Ignores compressed bytes: without this method the library makes a second bar for them, and they would be counted twice."""

            def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
                """Belongs to `update_transfer`."""

        return Reporter


# ----------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class State:
    """How far the wanted files are."""

    good: dict[Item, int] = field(default_factory=dict)  # in place, with its number of tokens
    damaged: dict[Item, str] = field(default_factory=dict)  # was here before, but bad: why
    failed: dict[Item, str] = field(default_factory=dict)  # could not be had: why


def survey(wanted: list[Item], stated: dict[str, HubFile], workers: int, console: Console) -> State:
    """Returns the state of the folder before anything is fetched; changes nothing."""
    state = State()
    here = [item for item in wanted if item.local.exists()]
    if here:
        console.print(f"checking {len(here)} of {len(wanted)} files, which are here already")
    with ThreadPoolExecutor(workers) as pool:
        checks = [pool.submit(verify, item.local, stated.get(item.remote)) for item in here]
        for item, check in zip(here, checks, strict=True):
            try:
                state.good[item] = check.result()
            except ValueError as problem:
                state.damaged[item] = str(problem)
                console.print(f"{item.local} is damaged ({problem}); fetching it again")
    return state


def fetch(hub: Hub, wanted: list[Item], stated: dict[str, HubFile], state: State, workers: int, console: Console) -> None:
    """Fetches what `state` lacks, `workers` files at a time, and records it there.

    Raises DownloadError when the hub itself fails, as it would for the next file; transfers that have begun then still end.
    """
    missing = [item for item in wanted if item not in state.good]
    state.failed.update(
        {item: "the manifest or the command asks for it, but the hub has no such file" for item in missing if item.remote not in stated}
    )
    on_hub = [item for item in missing if item.remote in stated]
    if not on_hub:
        return
    check_space(hub, on_hub, stated, state.damaged)
    meter = Meter(console, len(on_hub), sum(stated[item.remote].size for item in on_hub))
    stop, hub_failed = threading.Event(), threading.Event()  # the first ends transfers, the second lets none begin

    def bring(item: Item) -> int:
        if hub_failed.is_set():
            raise Stopped
        transfer = Transfer(meter, stop)
        try:
            place(hub.download(item.remote, stated[item.remote], fresh=item in state.damaged, bar=transfer.bar()), item.local)
            tokens = count_tokens(item.local)
        except ValueError as problem:
            transfer.finish(item.local.name, stated[item.remote].size, f"refused: {problem}")
            raise
        except DownloadError:
            hub_failed.set()
            raise
        transfer.finish(item.local.name, stated[item.remote].size, "ok")
        return tokens

    pool = ThreadPoolExecutor(workers)
    with meter.bar:
        transfers = {pool.submit(bring, item): item for item in on_hub}
        try:
            for done in as_completed(transfers):
                record(done, transfers[done], state)
        except BaseException as problem:
            if not isinstance(problem, DownloadError):
                stop.set()
            # A transfer looks at `stop` every 10 MB only: on an interrupt nobody waits for that, `place` is atomic.
            pool.shutdown(wait=not isinstance(problem, KeyboardInterrupt), cancel_futures=True)
            for done, item in transfers.items():
                if done.done() and not done.cancelled() and not isinstance(done.exception(), DownloadError | OSError):
                    record(done, item, state)
            raise
    pool.shutdown()


def record(done: Future[int], item: Item, state: State) -> None:
    """Records what became of a file. Raises what its transfer raised, unless the file itself is to blame or the transfer was stopped."""
    try:
        with suppress(Stopped):
            state.good[item] = done.result()
    except ValueError as problem:
        state.failed[item] = f"the copy on the hub is damaged: {problem}"


def in_place(wanted: list[Item], state: State) -> str:
    """Returns what is good so far, as `in place: 3 of 4 train shards, 1 of 1 val shards`."""
    asked, good = Counter(item.kind for item in wanted), Counter(item.kind for item in state.good)
    return "in place: " + ", ".join(f"{good[kind]} of {asked[kind]} {kind} shards" for kind in ("train", "val"))


def failure(wanted: list[Item], state: State) -> DownloadError:
    """Returns the error that names the first of the files that could not be had, counts the others, and says how to go on."""
    first, reason = next((item, state.failed[item]) for item in wanted if item in state.failed)
    others = f" (and {len(state.failed) - 1} more)" if len(state.failed) > 1 else ""
    kept = f"; the damaged {first.local} was left as it is" if first in state.damaged else ""
    remedy = "try another --revision, or the same command again when the hub is mended"
    if all(item.kind == "train" for item in state.failed):
        remedy += f"; --train-shards {[item in state.good for item in wanted if item.kind == 'train'].index(False)} would be complete"
    return DownloadError(f"{first.remote}: {reason}{others}{kept}; {in_place(wanted, state)}; {remedy}")


def summary(promised: Export, actual: Export, wanted: list[Item], state: State, num_fetched: int, commit: str) -> list[str]:
    """Returns the closing lines: shards and tokens per split, and notes on what looks odd."""
    lines = [f"{actual.name} at commit {commit[:12]}: {len(wanted)} files, {num_fetched} fetched, {len(wanted) - num_fetched} already good"]
    splits: tuple[tuple[Kind, int, int, int | None], ...] = (
        ("train", actual.train_shards, promised.train_shards, promised.train_tokens),
        ("val", actual.val_shards, promised.val_shards, promised.val_tokens),
    )
    for kind, published, promised_shards, promised_tokens in splits:
        counts = [tokens for item, tokens in state.good.items() if item.kind == kind]
        lines.append(f"{kind:5}  {len(counts):,} of {published:,} published shards  {sum(counts):,} tokens")
        if published != promised_shards:
            lines.append(f"note: the manifest is stale: it promises {promised_shards:,} {kind} shards, the hub has {published:,}")
        elif promised_tokens is not None and len(counts) == published and sum(counts) != promised_tokens:
            lines.append(f"note: the manifest promises {promised_tokens:,} {kind} tokens; it or the shards are stale")
        if kind == "train" and len(counts) == 1 < published:
            lines.append(f"note: one training shard is for trials: of {published:,} published ones; longer training would repeat it")
    folder = next(item.local.parent for item in wanted if item.local.suffix == ".bin")
    strangers = {path.name for path in folder.glob("*.bin")} - {item.local.name for item in wanted}
    if strangers:
        lines.append(f"note: {folder} also holds {len(strangers)} other .bin files, not checked, which training would read: {min(strangers)} ...")
    return lines


def check_val_length(promised: Export, state: State) -> None:
    """Raises DownloadError when the validation split has another number of tokens than the manifest promises."""
    tokens = sum(tokens for item, tokens in state.good.items() if item.kind == "val")
    if promised.val_tokens is not None and tokens != promised.val_tokens:
        raise DownloadError(
            f"the validation split has {tokens:,} tokens, the manifest promises {promised.val_tokens:,}: a score on it can be compared with no other; "
            "the files are in place as the hub has them, choose another --revision"
        )


def write_manifest(hub: Hub, promised: Export, actual: Export, wanted: list[Item], stated: dict[str, HubFile], state: State, model: Path) -> None:
    """Writes manifest.json beside the shards, from which --verify later knows them; entries of shards that this run did not ask for stay."""
    folder = next(item.local.parent for item in wanted if item.local.suffix == ".bin")
    try:
        splits = read_manifest(folder).get("splits", {})
    except ValueError:
        splits = {}  # Nothing but hashes is lost, and those of the wanted files are written again.
    fresh: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for item, tokens in state.good.items():
        if item.kind in ("train", "val", "val_bytes"):
            on_hub = stated.get(item.remote)
            digest = (on_hub.sha256 if on_hub else None) or file_sha256(item.local)
            place_in = ("val", "byte_shards") if item.kind == "val_bytes" else (item.kind, "shards")
            fresh.setdefault(place_in, {})[item.local.name] = {"file": item.local.name, "tokens": tokens, "sha256": digest}
    merged: dict[str, dict[str, list[dict[str, Any]]]] = {"train": {"shards": []}, "val": {"shards": []}}
    for split, list_name in (("train", "shards"), ("val", "shards"), ("val", "byte_shards")):
        kept = {entry["file"]: entry for entry in splits.get(split, {}).get(list_name, []) if (folder / entry["file"]).exists()}
        if entries := kept | fresh.get((split, list_name), {}):
            merged[split][list_name] = [entries[name] for name in sorted(entries)]
    tokenizer = {"file": os.path.relpath(model, folder), "bos_id": actual.bos_id, "sha256": file_sha256(model), "caseops": actual.has_val_bytes}
    published = {"train": {"shards": actual.train_shards}, "val": {"shards": actual.val_shards, "tokens": promised.val_tokens}}
    content = {
        "source": {"repo_id": hub.repo_id, "commit": hub.commit, "variant": actual.name.removeprefix(DATASET_PREFIX), "published": published},
        "tokenizer": tokenizer | ({} if actual.vocab_size is None else {"vocab_size": actual.vocab_size}),
        "splits": merged,
    }
    write_json(folder / MANIFEST_FILE, content)


def readable_tokenizer(path: Path) -> Path:
    """Returns the tokenizer to train with: `path`, or for a pure byte vocabulary in JSON a SentencePiece model of the same ids, made beside it.

    Raises DownloadError for another JSON file, which training cannot read.
    """
    if path.suffix != ".json":
        return path
    model = path.with_suffix(".model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        is_known = config["byte_offset"] == 4 and config["byte_count"] == 256 and (config["pad_id"], config["bos_id"]) == (0, 1)
    except (ValueError, KeyError, TypeError):
        is_known = False
    if not is_known:
        raise DownloadError(f"{path}: not a tokenizer that training can read; expected a SentencePiece model, or 256 bytes from id 4 on")
    partial = model.with_name(model.name + ".partial")
    partial.write_bytes(byte_tokenizer())
    os.replace(partial, model)
    return model


def short(path: Path) -> str:
    """Returns `path` relative to the working folder where it lies within it, else as it is."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def run(args: argparse.Namespace, console: Console) -> None:
    """Brings the wanted files into place and prints the summary. Raises UsageError, DownloadError, or OSError for a disk that refuses."""
    prefix = args.prefix.strip("/")
    hub, manifest = open_hub(args.repo_id, args.revision, f"{prefix}/manifest.json".lstrip("/"))
    promised = read_export(manifest, args.variant)
    listed = hub.list_folder(f"{prefix}/datasets/{promised.name}".lstrip("/"))
    actual = what_the_hub_has(promised, listed)
    wanted = plan(actual, shards_to_fetch(args.train_shards, promised, actual), args.with_docs, prefix, args.output)
    stated = listed | hub.look_up([item.remote for item in wanted if item.kind in ("tokenizer", "documents")])
    state = survey(wanted, stated, args.workers, console)
    num_kept = len(state.good)
    try:
        fetch(hub, wanted, stated, state, args.workers, console)
    except DownloadError as problem:
        raise DownloadError(f"{problem}; {in_place(wanted, state)}") from problem
    if state.failed:
        raise failure(wanted, state)
    model = readable_tokenizer(next(item.local for item in wanted if item.kind == "tokenizer"))
    write_manifest(hub, promised, actual, wanted, stated, state, model)
    console.print("\n".join(summary(promised, actual, wanted, state, len(wanted) - num_kept, hub.commit)))
    check_val_length(promised, state)
    folder = next(item.local.parent for item in wanted if item.local.suffix == ".bin")
    console.print(f"train with: DATA_PATH={shlex.quote(short(folder))} TOKENIZER_PATH={shlex.quote(short(model))} python train_gpt.py")


# ----------------------------------------------------------------------------------------------------------------------
# Verification of folders


def published_lengths(folder: Path) -> dict[str, Any] | None:
    """Returns what the export's own manifest, two folders up as the challenge's downloader leaves it, says of the folder; None where there is none."""
    path = folder.absolute().parent.parent / MANIFEST_FILE
    if not path.is_file() or not folder.absolute().name.startswith(DATASET_PREFIX):
        return None
    try:
        export = read_export(path, folder.absolute().name.removeprefix(DATASET_PREFIX))
    except (UsageError, DownloadError):
        return None  # The manifest of something else.
    return {"train": {"shards": export.train_shards}, "val": {"shards": export.val_shards, "tokens": export.val_tokens}}


def verify_folder(folder: Path, console: Console) -> FolderReport:
    """Checks `folder`, prints what was found, and returns it. Raises UsageError for a folder that is no dataset."""
    files = [path for split in ("train", "val", "val_bytes") for path in split_files(folder, split)]
    meter = Meter(console, len(files), sum(path.stat().st_size for path in files))
    try:
        with meter.bar:
            report = check_folder(folder, meter.advance, published_lengths(folder))
    except ValueError as problem:
        raise UsageError(str(problem)) from problem
    console.print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB, {time.monotonic() - meter.started:.1f} s")
    for split, found in report.splits.items():
        console.print(f"{split:5}  {found.shards:,} shards  {found.tokens:,} tokens  {found.documents:,} documents")
    if report.hashed_files:
        console.print(f"{report.hashed_files} files have the SHA-256 that the manifest states")
    if report.shared_documents is not None:
        console.print(f"{report.shared_documents:,} of {report.splits['val'].documents:,} validation documents occur in the training shards")
    for line in report.notes:
        console.print(f"note: {line}")
    for line in report.problems:
        console.print(f"problem: {line}")
    return report


def run_verification(folders: list[Path], console: Console) -> None:
    """Checks every one of `folders`. Raises DownloadError if one is not good, UsageError for one that is no dataset."""
    problems = {folder: len(verify_folder(folder, console).problems) for folder in folders}
    if any(problems.values()):
        bad = ", ".join(f"{folder} ({number})" for folder, number in problems.items() if number)
        raise DownloadError(f"problems in {bad}, listed above; do not train or score on them as they are")
    console.print("all good")


def count(text: str) -> int:
    """Returns `text` as a number of shards or files. Raises ArgumentTypeError unless it is a whole number from 0."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line; exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sp1024", help="sp1024, sp4096, sp8192, byte260 ... as the manifest names them (default %(default)s)")
    parser.add_argument(
        "--train-shards", type=count, help=f"training shards of 100,000,000 tokens each (default {DEFAULT_TRAIN_SHARDS}, or all where there are fewer)"
    )
    parser.add_argument("--with-docs", action="store_true", help="also the documents, to train tokenizers of your own on (tens of GB)")
    parser.add_argument("--repo-id", default="willdepueoai/parameter-golf", help="dataset repository on the hub (default %(default)s)")
    parser.add_argument("--prefix", default="datasets", help="folder of the export in the repository (default %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="local folder (default: the folder of this script)")
    parser.add_argument("--workers", type=count, default=8, help="files fetched or checked at the same time (default %(default)s)")
    parser.add_argument("--verify", metavar="DIR", type=Path, nargs="*", help="only check these folders of shards; without a name, that of --variant")
    args = parser.parse_args(arguments)
    if args.workers == 0:
        parser.error("argument --workers: expected a whole number from 1, got '0'")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = parse_arguments(arguments)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    try:
        if args.verify is None:
            run(args, console)
        else:
            run_verification(args.verify or [args.output / "datasets" / f"{DATASET_PREFIX}{args.variant}"], console)
        return 0
    except UsageError as problem:
        code, message = 2, str(problem)
    except DownloadError as problem:
        code, message = 1, str(problem)
    except OSError as problem:
        code, message = 1, f"{problem}; free space or correct the permissions, then run the same command again"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; what is in place is good, run the same command again to go on"
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    exit_code = main()
    if exit_code == 130:
        sys.stdout.flush()
        os._exit(exit_code)  # a clean exit would wait for transfers that have not seen the interrupt yet
    sys.exit(exit_code)
