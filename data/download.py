"""Downloads a published FineWeb export (token shards, tokenizer, optionally the documents) from the Hugging Face hub.

    python data/download.py --variant sp1024 --train-shards 80     the full training set of the challenge
    python data/download.py --variant sp1024 --train-shards 1      one training shard and the whole validation split, for a trial

Every file is checked (size and SHA-256 as the hub states them; header and token count of a shard) before it appears, in one step, under its
final name. Files already here are checked too and kept if good, so running the same command again mends or completes a folder. Within a run
the library resumes a broken transfer; between runs whole files are kept. All files come from one commit of the repository.

The library reads HF_ENDPOINT (another hub), HF_HUB_CACHE (where its copies lie) and HF_TOKEN.
Exit codes: 0 everything asked for is in place, 1 the hub or a file failed, 2 a wrong argument, 130 interrupted.
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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
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
from shards import check_shard

DATASET_PREFIX = "fineweb10B_"
DOCUMENTS = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
PLAIN_LINE_SECONDS = 30

Kind = Literal["train", "val", "val_bytes", "tokenizer", "documents"]


class UsageError(Exception):
    """The command asks for something that does not exist; exit code 2."""


class DownloadError(Exception):
    """The hub, the network or a file failed; exit code 1."""


class Export(NamedTuple):
    """What the manifest says of one variant. `tokenizer_paths[0]` is the file that TOKENIZER_PATH names."""

    name: str
    train_shards: int
    val_shards: int
    train_tokens: int | None
    val_tokens: int | None
    tokenizer_paths: tuple[str, ...]
    has_val_bytes: bool = False  # a byte shard beside each validation shard, as CaseOps has


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


def plan(export: Export, train_shards: int, with_docs: bool, prefix: str, output: Path) -> list[Item]:
    """Returns the files to have, small and indispensable ones first. Raises UsageError if more training shards are asked for than exist."""
    if train_shards > export.train_shards:
        raise UsageError(f"--train-shards {train_shards}: {export.name} has {export.train_shards}; use --train-shards {export.train_shards}")

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


# ----------------------------------------------------------------------------------------------------------------------
# Progress


class Meter:
    """Shows the progress of a sequence of files: a live bar on a terminal, elsewhere a line per file and one every half minute within it."""

    def __init__(self, console: Console, num_files: int, total_bytes: int) -> None:
        self.console = console
        self.num_files = num_files
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.label = ""
        self.file_bytes = 0
        self.started = self.file_started = self.last_line = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total_bytes)

    def begin(self, index: int, name: str) -> None:
        """Starts file number `index` (from 1)."""
        self.label = f"{index}/{self.num_files} {name}"
        self.file_bytes = 0
        self.file_started = self.last_line = time.monotonic()
        self.bar.update(self.task, description=self.label)

    def advance(self, num_bytes: float | None) -> None:
        """Counts received bytes of the current file; a negative number takes back what a broken transfer lost."""
        self.file_bytes += int(num_bytes or 0)
        self.bar.update(self.task, completed=self.done_bytes + self.file_bytes)
        if not self.console.is_terminal and time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(f"{self.label}  {self.rates()}")

    def finish(self, size: int, outcome: str) -> None:
        """Ends the current file, whose `size` bytes count as done however many had to be received."""
        received = self.rates() if self.file_bytes else f"{size / 1e6:.1f} MB from the library's cache"
        self.done_bytes += size
        self.bar.update(self.task, completed=self.done_bytes)
        self.console.print(f"{self.label}  {received}, {self.remaining()} left  {outcome}")

    def rates(self) -> str:
        """Returns the bytes and the speed of the current file."""
        seconds = max(time.monotonic() - self.file_started, 1e-3)
        return f"{self.file_bytes / 1e6:.1f} MB  {self.file_bytes / 1e6 / seconds:.1f} MB/s"

    def remaining(self) -> str:
        """Returns the time that the rest will take at the mean speed so far, as minutes:seconds."""
        seconds = (time.monotonic() - self.started) * (self.total_bytes - self.done_bytes) / max(self.done_bytes, 1)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def reporting_to(advance: Callable[[float | None], None]) -> type[tqdm]:
    """Returns a progress class for the hub library that draws nothing and passes the bytes written to `advance`."""

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


def survey(wanted: list[Item], stated: dict[str, HubFile], console: Console) -> State:
    """Returns the state of the folder before anything is fetched; changes nothing."""
    state = State()
    here = [item for item in wanted if item.local.exists()]
    if here:
        console.print(f"checking {len(here)} of {len(wanted)} files, which are here already")
    for item in here:
        try:
            state.good[item] = verify(item.local, stated.get(item.remote))
        except ValueError as problem:
            state.damaged[item] = str(problem)
            console.print(f"{item.local} is damaged ({problem}); fetching it again")
    return state


def fetch(hub: Hub, wanted: list[Item], stated: dict[str, HubFile], state: State, console: Console) -> None:
    """Fetches what `state` lacks and records it there. Raises DownloadError when the hub itself fails, as it would for the next file."""
    missing = [item for item in wanted if item not in state.good]
    state.failed.update(
        {item: "the manifest or the command asks for it, but the hub has no such file" for item in missing if item.remote not in stated}
    )
    on_hub = [item for item in missing if item.remote in stated]
    if not on_hub:
        return
    meter = Meter(console, len(on_hub), sum(stated[item.remote].size for item in on_hub))
    bar = reporting_to(meter.advance)
    with meter.bar:
        for index, item in enumerate(on_hub, start=1):
            meter.begin(index, item.local.name)
            size = stated[item.remote].size
            try:
                place(hub.download(item.remote, stated[item.remote], fresh=item in state.damaged, bar=bar), item.local)
                state.good[item] = count_tokens(item.local)
                meter.finish(size, "ok")
            except ValueError as problem:
                state.failed[item] = f"the copy on the hub is damaged: {problem}"
                meter.finish(size, f"refused: {problem}")


def in_place(wanted: list[Item], state: State) -> str:
    """Returns what is good so far, as `in place: 3 of 4 train shards, 1 of 1 val shards`."""
    asked, good = Counter(item.kind for item in wanted), Counter(item.kind for item in state.good)
    return "in place: " + ", ".join(f"{good[kind]} of {asked[kind]} {kind} shards" for kind in ("train", "val"))


def failure(wanted: list[Item], state: State) -> DownloadError:
    """Returns the error that names the first of the files that could not be had, counts the others, and says how to go on."""
    first, reason = next(iter(state.failed.items()))
    others = f" (and {len(state.failed) - 1} more)" if len(state.failed) > 1 else ""
    kept = f"; the damaged {first.local} was left as it is" if first in state.damaged else ""
    remedy = "try another --revision, or the same command again when the hub is mended"
    if all(item.kind == "train" for item in state.failed):
        remedy += f"; --train-shards {[item in state.good for item in wanted if item.kind == 'train'].index(False)} would be complete"
    return DownloadError(f"{first.remote}: {reason}{others}{kept}; {in_place(wanted, state)}; {remedy}")


def summary(export: Export, wanted: list[Item], state: State, num_fetched: int, commit: str) -> str:
    """Returns the closing lines: shards and tokens per split, notes on what looks odd, and the settings to train with."""
    lines = [f"{export.name} at commit {commit[:12]}: {len(wanted)} files, {num_fetched} fetched, {len(wanted) - num_fetched} already good"]
    splits: tuple[tuple[Kind, int, int | None], ...] = (
        ("train", export.train_shards, export.train_tokens),
        ("val", export.val_shards, export.val_tokens),
    )
    for kind, published, promised in splits:
        counts = [tokens for item, tokens in state.good.items() if item.kind == kind]
        lines.append(f"{kind:5}  {len(counts):,} of {published:,} published shards  {sum(counts):,} tokens")
        if promised is not None and len(counts) == published and sum(counts) != promised:
            lines.append(f"note: the manifest promises {promised:,} {kind} tokens; it or the shards are stale")
    model = next(item.local for item in wanted if item.kind == "tokenizer")
    folder = next(item.local.parent for item in wanted if item.local.suffix == ".bin")
    strangers = {path.name for path in folder.glob("*.bin")} - {item.local.name for item in wanted}
    if strangers:
        lines.append(f"note: {folder} also holds {len(strangers)} other .bin files, not checked, which training would read: {min(strangers)} ...")
    lines.append(f"train with: DATA_PATH={shlex.quote(short(folder))} TOKENIZER_PATH={shlex.quote(short(model))} python train_gpt.py")
    return "\n".join(lines)


def short(path: Path) -> str:
    """Returns `path` relative to the working folder where it lies within it, else as it is."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def run(args: argparse.Namespace, console: Console) -> None:
    """Brings the wanted files into place and prints the summary. Raises UsageError, DownloadError, or OSError for a disk that refuses."""
    prefix = args.prefix.strip("/")
    hub, manifest = open_hub(args.repo_id, args.revision, f"{prefix}/manifest.json".lstrip("/"))
    export = read_export(manifest, args.variant)
    wanted = plan(export, args.train_shards, args.with_docs, prefix, args.output)
    stated = hub.look_up([item.remote for item in wanted])
    state = survey(wanted, stated, console)
    num_kept = len(state.good)
    try:
        fetch(hub, wanted, stated, state, console)
    except DownloadError as problem:
        raise DownloadError(f"{problem}; {in_place(wanted, state)}") from problem
    if state.failed:
        raise failure(wanted, state)
    console.print(summary(export, wanted, state, len(wanted) - num_kept, hub.commit))


def count(text: str) -> int:
    """Returns `text` as a number of shards. Raises ArgumentTypeError unless it is a whole number from 0."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the parsed command line; exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="sp1024", help="sp1024, sp4096, sp8192, byte260 ... as the manifest names them (default %(default)s)")
    parser.add_argument("--train-shards", type=count, default=80, help="training shards of 100,000,000 tokens each (default %(default)s)")
    parser.add_argument("--with-docs", action="store_true", help="also the documents, to train tokenizers of your own on (tens of GB)")
    parser.add_argument("--repo-id", default="willdepueoai/parameter-golf", help="dataset repository on the hub (default %(default)s)")
    parser.add_argument("--prefix", default="datasets", help="folder of the export in the repository (default %(default)s)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="local folder (default: the folder of this script)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = parse_arguments(arguments)
    try:
        run(args, Console(markup=False, highlight=False, soft_wrap=True))
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
    sys.exit(main())
