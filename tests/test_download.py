"""data/download.py against a hub on this machine: what arrives, what is refused, what a user reads, and that nothing good is lost; and --verify.

The tool runs as a process of its own, because the hub library reads its environment when it is imported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Event, Thread
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

import download  # noqa: E402
import shards  # noqa: E402
import tokenize_docs  # noqa: E402
from rich.console import Console  # noqa: E402
from shards import read_shard, write_shard  # noqa: E402

REPOSITORY = "someone/export"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = "datasets/datasets/fineweb10B_sp1024"
TRAIN_TOKENS = (3000, 3000, 1000)
VAL_TOKENS = 500
BOS = 1
LARGE_TOKENS = 12_000_000  # Half of this shard is more than the 10 MB that the library writes, and so can resume from, at a time.

Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]


# ----------------------------------------------------------------------------------------------------------------------
# A hub on this machine


class FakeHub:
    """The four requests of a hub that a download makes. `files` is the repository; `faults[path]` may answer a GET instead (returns True).

    `sizes` may state another size than that of the content.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.faults: dict[str, Fault] = {}
        self.bodies: list[str] = []
        self.ranges: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Keeps the test output quiet."""

            def do_HEAD(self) -> None:
                hub.answer_file(self, with_body=False)

            def do_GET(self) -> None:
                if self.path.startswith("/api/"):
                    hub.answer_tree(self)
                else:
                    hub.answer_file(self, with_body=True)

            def do_POST(self) -> None:
                hub.answer_paths_info(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer_file(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        """Answers /datasets/<repository>/resolve/<revision>/<path>, from the byte that a Range header names."""
        start = f"/datasets/{REPOSITORY}/resolve/"
        if not request.path.startswith(start):
            return send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        path = unquote(request.path.removeprefix(start)).split("/", 1)[1]
        if path not in self.files:
            return send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = self.files[path]
        if with_body:
            self.bodies.append(path)
            if path in self.faults and self.faults[path](request, content):
                return None
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not with_body or "Range" not in request.headers:
            return send(request, 200, content, headers, with_body)
        self.ranges.append(request.headers["Range"])
        first = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return send(request, 206, content[first:], headers)

    def answer_paths_info(self, request: BaseHTTPRequestHandler) -> None:
        """Answers which of the posted paths exist."""
        posted = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
        self.answer_infos(request, [path for path in posted["paths"] if path in self.files])

    def answer_tree(self, request: BaseHTTPRequestHandler) -> None:
        """Answers which files lie in the folder /api/datasets/<repository>/tree/<commit>/<folder>."""
        folder = unquote(urlsplit(request.path).path).removeprefix(f"/api/datasets/{REPOSITORY}/tree/{COMMIT}/")
        found = [path for path in self.files if path.rsplit("/", 1)[0] == folder]
        if not found:
            return send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer_infos(request, found)

    def answer_infos(self, request: BaseHTTPRequestHandler, paths: list[str]) -> None:
        """Answers size and SHA-256 of `paths` as a large file has them on the hub."""
        infos = [
            {
                "type": "file",
                "path": path,
                "size": self.sizes.get(path, len(self.files[path])),
                "oid": "0" * 40,
                "lfs": {"oid": hashlib.sha256(self.files[path]).hexdigest(), "size": len(self.files[path]), "pointerSize": 130},
            }
            for path in paths
        ]
        send(request, 200, json.dumps(infos).encode(), {"Content-Type": "application/json"})


def send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], with_body: bool = True) -> None:
    """Writes one whole answer."""
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(content))}.items():
        request.send_header(name, value)
    request.end_headers()
    if with_body:
        request.wfile.write(content)


def break_off(request: BaseHTTPRequestHandler, content: bytes) -> None:
    """Promises the whole content, sends half of it and closes the connection."""
    send(request, 200, content, {}, with_body=False)
    request.wfile.write(content[: len(content) // 2])
    request.wfile.flush()
    request.connection.shutdown(socket.SHUT_RDWR)
    request.close_connection = True


def shard_bytes(folder: Path, num_tokens: int, seed: int) -> bytes:
    """Returns a shard of `num_tokens` random tokens after a BOS."""
    tokens = np.random.default_rng(seed).integers(0, 1024, num_tokens)
    tokens[0] = BOS
    write_shard(folder / "shard.bin", tokens)
    return (folder / "shard.bin").read_bytes()


def one_bit_flipped(content: bytes) -> bytes:
    """Returns `content` with its last bit inverted: the size and the header of a shard stay right."""
    return content[:-1] + bytes([content[-1] ^ 1])


def manifest(**changes: object) -> dict[str, object]:
    """Returns a manifest of one sp1024 export as the repository holds it, with some of its statistics replaced."""
    stats = {"files_train": len(TRAIN_TOKENS), "files_val": 1, "tokens_train": sum(TRAIN_TOKENS), "tokens_val": VAL_TOKENS, **changes}
    tokenizer = {"name": "bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model", "vocab_path": "tokenizers/fineweb_1024_bpe.vocab"}
    return {"datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "bpe_1024", "stats": stats}], "tokenizers": [tokenizer]}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that holds a small good export."""
    hub = FakeHub()
    hub.files = {f"{FOLDER}/fineweb_train_{index:06d}.bin": shard_bytes(tmp_path, num, index) for index, num in enumerate(TRAIN_TOKENS)}
    hub.files |= {
        "datasets/manifest.json": json.dumps(manifest()).encode(),
        f"{FOLDER}/fineweb_val_000000.bin": shard_bytes(tmp_path, VAL_TOKENS, 9),
        "datasets/tokenizers/fineweb_1024_bpe.model": b"model " * 100,
        "datasets/tokenizers/fineweb_1024_bpe.vocab": b"vocab " * 100,
        "datasets/docs_selected.jsonl": b'{"text": "one"}\n',
        "datasets/docs_selected.source_manifest.json": b"{}\n",
    }
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


class Tool:
    """Runs the tool against `endpoint` with a cache and an output folder of its own."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.output = folder / "out"
        self.shards = self.output / "datasets" / "fineweb10B_sp1024"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_") and not name.lower().endswith("_proxy")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Returns the running process; later arguments override the defaults."""
        command = [sys.executable, str(DATA / "download.py"), "--repo-id", REPOSITORY, "--output", str(self.output), *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # A job that a shell has put into the background ignores SIGINT, and so would its children.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, env=self.environment, cwd=self.output.parent, preexec_fn=heed, **pipes)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Returns the finished process."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def forget_cache(self) -> None:
        """Deletes the hub library's own copies."""
        shutil.rmtree(self.environment["HF_HUB_CACHE"])

    def names(self) -> set[str]:
        """Returns every file name in the output folder, hidden and temporary ones included."""
        return {path.name for path in self.output.rglob("*") if path.is_file()}


@pytest.fixture
def tool(tmp_path: Path, hub: FakeHub) -> Tool:
    return Tool(tmp_path, hub.endpoint)


def error_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Returns the only line on stderr, after checking that it is one, that the exit code is `code`, and that nothing invites to train."""
    lines = result.stderr.strip().splitlines()
    own = [line for line in lines if line.startswith("error: ")]
    assert result.returncode == code, result.stdout + result.stderr
    assert len(own) == 1 and lines[-1] == own[0] and "Traceback" not in result.stderr, result.stderr
    assert "train with:" not in result.stdout
    return own[0]


def verify_output(tool: Tool, code: int, *arguments: str) -> str:
    """Returns what --verify prints, after checking its exit code; it may ask no hub."""
    endpoint, tool.environment["HF_ENDPOINT"] = tool.environment["HF_ENDPOINT"], "http://127.0.0.1:9"
    result = tool("--verify", *arguments)
    tool.environment["HF_ENDPOINT"] = endpoint
    assert result.returncode == code, result.stdout + result.stderr
    assert ("error: " in result.stderr) == (code != 0) and "Traceback" not in result.stderr
    return result.stdout + result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What arrives


def test_full_download_then_nothing_left_to_fetch(tool: Tool, hub: FakeHub) -> None:
    first = tool("--train-shards", "3", "--with-docs")
    assert first.returncode == 0, first.stderr
    for remote, content in hub.files.items():
        if not remote.endswith("/manifest.json"):
            assert (tool.output / remote.removeprefix("datasets/")).read_bytes() == content
    assert tool.names() == {Path(remote).name for remote in hub.files}  # manifest.json is the tool's own
    assert "train  3 of 3 published shards  7,000 tokens" in first.stdout
    assert "val    1 of 1 published shards  500 tokens" in first.stdout
    assert "8/8 " in first.stdout and "docs_selected.source_manifest.json  0.0 MB  ok" in first.stdout and "MB/s" in first.stdout
    assert "DATA_PATH=out/datasets/fineweb10B_sp1024 TOKENIZER_PATH=out/tokenizers/fineweb_1024_bpe.model" in first.stdout
    assert "note:" not in first.stdout and first.stderr == ""

    assert sorted(hub.bodies) == sorted(hub.files)
    hub.bodies.clear()
    tool.forget_cache()  # What is in place must suffice: users clear the cache to gain space.
    second = tool("--train-shards", "3", "--with-docs")
    assert second.returncode == 0 and "0 fetched, 8 already good" in second.stdout
    assert hub.bodies == ["datasets/manifest.json"]


def test_fewer_shards_are_counted_and_oddities_noted(tool: Tool) -> None:
    tool.shards.mkdir(parents=True)
    (tool.shards / "fineweb_train_000077.bin").write_bytes(b"someone's own")
    result = tool("--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert "train  1 of 3 published shards  3,000 tokens" in result.stdout
    assert "note: one training shard is for trials: of 3 published ones" in result.stdout
    assert "1 other .bin files" in result.stdout and "fineweb_train_000077.bin" in result.stdout
    assert "docs_selected.jsonl" not in tool.names()


def test_files_are_fetched_side_by_side(tool: Tool, hub: FakeHub) -> None:
    together = Barrier(3)

    def wait_for_the_others(*_: object) -> bool:
        together.wait(timeout=20)  # breaks, and fails the transfer, unless three requests are there at once
        return False

    hub.faults = {f"{FOLDER}/fineweb_train_{index:06d}.bin": wait_for_the_others for index in range(3)}
    result = tool("--train-shards", "3", "--workers", "3")
    assert result.returncode == 0, result.stderr


def test_the_default_is_all_shards_where_there_are_fewer_than_80(tool: Tool) -> None:
    result = tool()
    assert result.returncode == 0, result.stderr
    assert "train  3 of 3 published shards  7,000 tokens" in result.stdout and "note:" not in result.stdout


@pytest.mark.parametrize(("promised", "asked"), [(2, "3"), (5, "5"), (5, "3")])
def test_the_hubs_list_counts_where_the_manifest_is_stale(tool: Tool, hub: FakeHub, promised: int, asked: str) -> None:
    hub.files["datasets/manifest.json"] = json.dumps(manifest(files_train=promised)).encode()
    result = tool("--train-shards", asked)
    assert result.returncode == 0, result.stderr
    assert "train  3 of 3 published shards  7,000 tokens" in result.stdout
    assert f"note: the manifest is stale: it promises {promised} train shards, the hub has 3" in result.stdout
    assert len(read_shard(tool.shards / "fineweb_train_000002.bin")) == 1000


def test_a_byte_export_gets_a_tokenizer_that_training_reads(tool: Tool, hub: FakeHub, tmp_path: Path) -> None:
    content = manifest()
    content["tokenizers"] = [{"name": "bpe_1024", "path": "tokenizers/bytes.json"}]
    config = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    hub.files |= {"datasets/manifest.json": json.dumps(content).encode(), "datasets/tokenizers/bytes.json": json.dumps({"config": config}).encode()}
    result = tool("--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert "TOKENIZER_PATH=out/tokenizers/bytes.model" in result.stdout
    model = sentencepiece.SentencePieceProcessor(model_file=str(tool.output / "tokenizers" / "bytes.model"))
    text = " Größe\n\0\u2581 "
    assert model.encode(text) == [4 + byte for byte in text.encode()] and model.decode(model.encode(text)) == text

    tool.forget_cache()
    (tool.output / "tokenizers" / "bytes.json").unlink()
    hub.files["datasets/tokenizers/bytes.json"] = json.dumps({"config": config | {"byte_offset": 3}}).encode()
    assert "not a tokenizer that training can read" in error_line(tool("--train-shards", "1"), 1)


def test_local_damage_is_repaired_from_a_fresh_copy(tool: Tool, hub: FakeHub) -> None:
    assert tool("--train-shards", "3").returncode == 0
    cut, flipped = tool.shards / "fineweb_train_000000.bin", tool.shards / "fineweb_train_000001.bin"
    good = {path: path.read_bytes() for path in (cut, flipped)}
    # Written in place: where the cache is hard-linked, its copy is damaged too.
    cut.write_bytes(good[cut][:-100])
    flipped.write_bytes(one_bit_flipped(good[flipped]))
    hub.bodies.clear()
    result = tool("--train-shards", "3")
    assert result.returncode == 0, result.stderr
    for path, content in good.items():
        assert f"{path} is damaged" in result.stdout and path.read_bytes() == content
    assert sorted(hub.bodies) == [f"{FOLDER}/{path.name}" for path in good]


def test_damage_in_transit_is_mended_by_a_second_try(tool: Tool, hub: FakeHub) -> None:
    path = f"{FOLDER}/fineweb_train_000000.bin"

    def corrupt_once(request: BaseHTTPRequestHandler, content: bytes) -> bool:
        if hub.bodies.count(path) > 1:
            return False
        send(request, 200, one_bit_flipped(content), {})
        return True

    hub.faults[path] = corrupt_once
    result = tool("--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert (tool.shards / "fineweb_train_000000.bin").read_bytes() == hub.files[path]
    assert hub.bodies.count(path) == 2


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_shards_that_are_bad_on_the_hub_are_refused_and_the_others_stay(tool: Tool, hub: FakeHub) -> None:
    good = hub.files[f"{FOLDER}/fineweb_train_000000.bin"]
    bad = {1: (good[:-100], "truncated or damaged"), 2: (b"", "0 bytes"), 3: (b"\0\0\0\0" + good[4:], "expected 20240520")}
    hub.files |= {f"{FOLDER}/fineweb_train_{index:06d}.bin": content for index, (content, _) in bad.items()}
    hub.files |= {f"{FOLDER}/fineweb_train_000004.bin": good, "datasets/manifest.json": json.dumps(manifest(files_train=5)).encode()}
    result = tool("--train-shards", "5")
    line = error_line(result, 1)
    assert f"{FOLDER}/fineweb_train_000001.bin" in line and "truncated or damaged" in line and "(and 2 more)" in line
    assert "2 of 5 train shards, 1 of 1 val shards" in line and "--train-shards 1 would be complete" in line
    for index, (_, reason) in bad.items():
        assert any(f"fineweb_train_{index:06d}.bin" in shown and reason in shown for shown in result.stdout.splitlines())
    assert {name for name in tool.names() if "train" in name} == {"fineweb_train_000000.bin", "fineweb_train_000004.bin"}
    for name, tokens in (("train_000000", 3000), ("train_000004", 3000), ("val_000000", 500)):
        assert len(read_shard(tool.shards / f"fineweb_{name}.bin")) == tokens


def test_a_good_local_shard_survives_a_hub_that_lost_it(tool: Tool, hub: FakeHub) -> None:
    path = f"{FOLDER}/fineweb_train_000000.bin"
    tool.shards.mkdir(parents=True)
    (tool.shards / "fineweb_train_000000.bin").write_bytes(hub.files.pop(path))
    result = tool("--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert len(read_shard(tool.shards / "fineweb_train_000000.bin")) == 3000


def test_a_shard_missing_between_others_fails_and_says_how_many_were_obtained(tool: Tool, hub: FakeHub) -> None:
    del hub.files[f"{FOLDER}/fineweb_train_000001.bin"]
    line = error_line(tool("--train-shards", "3"), 1)
    assert "fineweb_train_000001.bin: the manifest or the command asks for it, but the hub has no such file" in line
    assert "in place: 2 of 3 train shards, 1 of 1 val shards" in line and "--train-shards 1 would be complete" in line
    assert len(read_shard(tool.shards / "fineweb_train_000002.bin")) == 1000


def test_a_validation_split_that_is_not_the_promised_one_is_an_error(tool: Tool, hub: FakeHub, tmp_path: Path) -> None:
    hub.files["datasets/manifest.json"] = json.dumps(manifest(tokens_val=VAL_TOKENS + 1)).encode()
    line = error_line(tool("--train-shards", "1"), 1)
    assert "the validation split has 500 tokens, the manifest promises 501" in line
    assert len(read_shard(tool.shards / "fineweb_val_000000.bin")) == VAL_TOKENS
    assert "the validation split has 500 tokens, the export promises 501" in verify_output(tool, 1)

    tool.forget_cache()
    hub.files["datasets/manifest.json"] = json.dumps(manifest(files_val=2)).encode()
    assert "fineweb_val_000001.bin: the manifest or the command asks for it" in error_line(tool("--train-shards", "1"), 1)

    tool.forget_cache()
    hub.files |= {f"{FOLDER}/fineweb_val_000001.bin": shard_bytes(tmp_path, 7, 8), "datasets/manifest.json": json.dumps(manifest()).encode()}
    assert "the validation split has 507 tokens, the manifest promises 500" in error_line(tool("--train-shards", "1"), 1)


def test_a_hub_without_training_shards_is_an_error(tool: Tool, hub: FakeHub) -> None:
    for index in range(3):
        del hub.files[f"{FOLDER}/fineweb_train_{index:06d}.bin"]
    assert "the hub lists no training shard of fineweb10B_sp1024" in error_line(tool(), 1)
    assert tool("--train-shards", "0").returncode == 0


def test_too_small_a_disk_is_told_before_anything_is_fetched(tool: Tool, hub: FakeHub) -> None:
    hub.sizes[f"{FOLDER}/fineweb_train_000001.bin"] = 10**15
    line = error_line(tool("--train-shards", "3"), 1)
    assert "not enough disk space: 6 files need 1,000,000.00 GB in " in line and "HF_HUB_CACHE" in line and "are free" in line
    assert hub.bodies == ["datasets/manifest.json"] and not tool.names()


def test_interrupted_transfer_leaves_no_half_file_and_a_rerun_completes(tool: Tool, hub: FakeHub) -> None:
    path = f"{FOLDER}/fineweb_train_000001.bin"

    def break_off_then_fail(request: BaseHTTPRequestHandler, content: bytes) -> bool:
        if hub.bodies.count(path) > 1:
            send(request, 503, b"", {})
        else:
            break_off(request, content)
        return True

    hub.faults[path] = break_off_then_fail
    line = error_line(tool("--train-shards", "3", "--workers", "1"), 1)
    assert path in line and "503" in line and "1 of 3 train shards" in line and "run the same command again" in line
    assert {name for name in tool.names() if "train" in name} == {"fineweb_train_000000.bin"}

    hub.faults.clear()
    hub.bodies.clear()
    assert tool("--train-shards", "3").returncode == 0
    assert sorted(hub.bodies) == [path, f"{FOLDER}/fineweb_train_000002.bin"]
    assert (tool.shards / "fineweb_train_000001.bin").read_bytes() == hub.files[path]


def test_a_hub_that_fails_for_one_file_does_not_lose_the_others(tool: Tool, hub: FakeHub) -> None:
    """What has begun still ends."""
    path, begun, refused = f"{FOLDER}/fineweb_train_000001.bin", Event(), Event()

    def refuse(request: BaseHTTPRequestHandler, _: bytes) -> bool:
        begun.wait(timeout=20)
        send(request, 403, b"", {})
        refused.set()
        return True

    def wait(*_: object) -> bool:
        begun.set()
        return not refused.wait(timeout=20)

    hub.faults = {path: refuse, f"{FOLDER}/fineweb_train_000002.bin": wait}
    line = error_line(tool("--train-shards", "3"), 1)
    assert path in line and "403" in line and "2 of 3 train shards, 1 of 1 val shards" in line
    assert len(read_shard(tool.shards / "fineweb_train_000002.bin")) == 1000


def test_an_interrupt_ends_all_transfers_and_keeps_what_is_in_place(tool: Tool, hub: FakeHub, tmp_path: Path) -> None:
    path, begun = f"{FOLDER}/fineweb_train_000000.bin", Event()
    hub.files[path] = shard_bytes(tmp_path, LARGE_TOKENS, 0)

    def trickle(request: BaseHTTPRequestHandler, content: bytes) -> bool:
        send(request, 200, content, {}, with_body=False)
        request.close_connection = True
        begun.set()
        with contextlib.suppress(OSError):  # the client goes away
            piece = len(content) // 200 + 1  # the interrupt comes long before the end, however busy the machine
            for start in range(0, len(content), piece):
                request.wfile.write(content[start : start + piece])
                time.sleep(0.5)
        return True

    hub.faults[path] = trickle
    process = tool.start("--train-shards", "3", "--workers", "6")
    assert begun.wait(timeout=60)
    while not {"fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"} <= tool.names():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert "error: interrupted; what is in place is good" in error_line(subprocess.CompletedProcess([], process.returncode, out, err), 130)
    assert {name for name in tool.names() if name.endswith((".bin", ".partial"))} == {
        "fineweb_val_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    }


def test_a_broken_transfer_resumes_within_the_run(tool: Tool, hub: FakeHub, tmp_path: Path) -> None:
    path = f"{FOLDER}/fineweb_train_000000.bin"
    hub.files[path] = shard_bytes(tmp_path, LARGE_TOKENS, 0)

    def break_once(request: BaseHTTPRequestHandler, content: bytes) -> bool:
        if "Range" in request.headers:
            return False
        break_off(request, content)
        return True

    hub.faults[path] = break_once
    result = tool("--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert hub.bodies.count(path) == 2 and len(hub.ranges) == 1
    assert (tool.shards / "fineweb_train_000000.bin").read_bytes() == hub.files[path]


def test_offline_is_told_quickly(tool: Tool) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tool.environment["HF_ENDPOINT"] = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        line = error_line(tool(), 1)
    # The library's own retries would take 24 s; the rest of the allowance is for starting Python on a busy machine.
    assert time.monotonic() - started < 15
    assert "refused" in line and "check the network" in line and tool.environment["HF_ENDPOINT"] in line


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--variant", "sp4096"], 2, "its variants are: sp1024"),
        (["--train-shards", "80"], 2, "fineweb10B_sp1024 has 3; use --train-shards 3"),
        (["--repo-id", "someone/else"], 1, "no such repository"),
        (["--prefix", "elsewhere"], 1, "404"),
    ],
)
def test_wishes_that_the_hub_cannot_meet(tool: Tool, arguments: list[str], code: int, expected: str) -> None:
    line = error_line(tool(*arguments), code)
    assert expected in line and arguments[1] in line
    assert not tool.names()


def test_negative_number_of_shards_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        download.main(["--train-shards=-1"])
    assert stopped.value.code == 2
    assert "expected a whole number from 0, got '-1'" in capsys.readouterr().err


def test_manifest_that_points_outside_is_refused_before_anything_is_written(tool: Tool, hub: FakeHub) -> None:
    content = manifest()
    content["tokenizers"] = [{"name": "bpe_1024", "model_path": "tokenizers/../../../escaped.model"}]
    hub.files |= {"datasets/manifest.json": json.dumps(content).encode(), "escaped.model": b"evil"}
    line = error_line(tool("--train-shards", "1"), 1)
    assert "unsafe path 'tokenizers/../../../escaped.model'" in line
    assert not tool.names() and not list(tool.output.parent.glob("**/escaped.model"))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.model", "tokenizers/..", "tokenizers//x", "tokenizers\\..\\x", "datasets/x.bin", "tokenizers"])
def test_paths_outside_tokenizers_are_unsafe(path: str) -> None:
    with pytest.raises(ValueError, match="unsafe path"):
        download.tokenizer_paths({"name": "bpe", "model_path": path})


@pytest.mark.parametrize(("stated", "expected"), [({}, (1, None)), ({"bos_id": None, "vocab_size": None}, (1, None)), ({"bos_id": 2, "vocab_size": 9}, (2, 9))])
def test_a_manifest_may_leave_out_what_is_known_of_the_tokenizer(tmp_path: Path, stated: dict[str, int], expected: tuple[int, int | None]) -> None:
    content = manifest()
    content["tokenizers"] = [{"name": "bpe_1024", "model_path": "tokenizers/x.model", **stated}]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    export = download.read_export(tmp_path / "manifest.json", "sp1024")
    assert (export.bos_id, export.vocab_size) == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"datasets": []}', json.dumps({**manifest(), "tokenizers": []}).encode(), json.dumps(manifest(files_train="80")).encode()],
    ids=["empty", "a list", "no tokenizers", "tokenizer not listed", "count is text"],
)
def test_malformed_manifest_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(download.DownloadError, match="manifest of the repository is malformed"):
        download.read_export(tmp_path / "manifest.json", "sp1024")


# ----------------------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize(("content", "stated"), [(b"", 0), (b"abc", 4)])
def test_verify_refuses_an_empty_file_and_a_wrong_size(tmp_path: Path, content: bytes, stated: int) -> None:
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"^0 bytes$|^3 bytes, the hub states 4$"):
        download.verify(tmp_path / "x.model", download.HubFile(stated, None))


def test_place_falls_back_to_a_copy_and_never_shows_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, final = tmp_path / "copy", tmp_path / "final"
    copy.write_bytes(b"new")
    final.write_bytes(b"old")

    def refuse_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    def run_out_of_space(_: Path, target: Path) -> None:
        target.write_bytes(b"n")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(download.os, "link", refuse_link)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(download.shutil, "copyfile", run_out_of_space)
        with pytest.raises(OSError, match="disk full"):
            download.place(copy, final)
    assert final.read_bytes() == b"old" and {path.name for path in tmp_path.iterdir()} == {"copy", "final"}

    download.place(copy, final)
    assert final.read_bytes() == b"new" and final.stat().st_ino != copy.stat().st_ino


def test_a_terminal_sees_file_count_bytes_and_speed() -> None:
    screen = io.StringIO()
    meter = download.Meter(Console(file=screen, force_terminal=True, width=120, highlight=False), num_files=4, total_bytes=80_000_000)
    with meter.bar:
        transfer = download.Transfer(meter, Event())
        report = transfer.bar()(total=60_000_000)
        report.update(25_000_000)
        report.update(-10_000_000)
        time.sleep(0.05)  # A speed needs two moments.
        report.update(5_000_000)
        report.update_transfer(5_000_000)
        transfer.finish("fineweb_train_000001.bin", 20_000_000, "ok")
        download.Transfer(meter, Event()).finish("cached.bin", 20_000_000, "ok")
        meter.bar.refresh()
    shown = screen.getvalue()
    assert "1/4 fineweb_train_000001.bin  20.0 MB  ok" in shown and "2/4 cached.bin  20.0 MB from the library's cache  ok" in shown
    assert "2/4 files" in shown and "40.0/80.0 MB" in shown and "MB/s" in shown


def test_elsewhere_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    meter = download.Meter(Console(file=screen, width=120), num_files=4, total_bytes=80_000_000)
    meter.advance(1_000_000)
    assert screen.getvalue() == ""
    monkeypatch.setattr(download, "PLAIN_LINE_SECONDS", -1)
    meter.advance(1_000_000)
    assert screen.getvalue().startswith("0/4 files  2.0 MB  ")


def test_disk_space_is_asked_of_both_disks_for_what_each_will_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, output = tmp_path / "cache", tmp_path / "out"
    cache.mkdir(), output.mkdir()
    items = [download.Item("train", name, output / "deep" / name) for name in ("cached", "absent")]
    stated = {"cached": download.HubFile(3000, None), "absent": download.HubFile(1000, None)}
    free = {cache: 0, output: 0}
    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))

    class HalfCached(download.Hub):
        def is_cached(self, path: str) -> bool:
            return path == "cached"

    def check(on_cache: int, on_output: int, damaged: dict[download.Item, str]) -> None:
        free.update({cache: on_cache, output: on_output})
        download.check_space(HalfCached("a/b", COMMIT), items, stated, damaged)

    check(1000, 0, {})  # the same disk, where a final file is a link
    for too_small in ((999, 9999, {}), (3999, 9999, {items[0]: "a damaged one is fetched anew"})):
        with pytest.raises(download.DownloadError, match="HF_HUB_CACHE"):
            check(*too_small)
    monkeypatch.setattr(download, "disk_of", lambda folder: cache in (folder, *folder.parents))
    check(1000, 4000, {})
    with pytest.raises(download.DownloadError, match=r"2 files need 0\.00 GB in .*out/deep \(--output\)"):
        check(1000, 3999, {})


# ----------------------------------------------------------------------------------------------------------------------
# --verify


def test_a_fetched_folder_is_verified_offline_and_a_note_says_what_is_not_here(tool: Tool, hub: FakeHub) -> None:
    assert tool("--train-shards", "1").returncode == 0
    said = verify_output(tool, 0)
    assert "train  1 shards  3,000 tokens" in said and "val    1 shards  500 tokens" in said
    assert "3 files have the SHA-256 that the manifest states" in said and "0 of " in said and "validation documents occur" in said
    assert "note: 1 of the 3 published training shards are here" in said

    assert tool("--train-shards", "3").returncode == 0 and tool("--train-shards", "2").returncode == 0
    said = verify_output(tool, 0, str(tool.shards))
    assert "5 files have the SHA-256" in said and "note:" not in said, "what an earlier run fetched is still known"

    path = tool.shards / "fineweb_train_000002.bin"
    path.write_bytes(one_bit_flipped(path.read_bytes()))
    said = verify_output(tool, 1, str(tool.shards))
    assert f"problem: {path}: its SHA-256 is not " in said and f"error: problems in {tool.shards} (1), listed above" in said
    assert tool("--train-shards", "3").returncode == 0
    verify_output(tool, 0)


def test_verifying_no_dataset_is_a_wrong_argument(tool: Tool, tmp_path: Path) -> None:
    assert "no *_train_*.bin or *_val_*.bin there; name a folder of shards" in verify_output(tool, 2, str(tmp_path))
    assert "no *_train_*.bin or *_val_*.bin there" in verify_output(tool, 2), "the default folder does not exist yet"


def test_lengths_are_compared_with_the_exports_own_manifest_where_a_folder_has_none(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    write_shard(folder / "fineweb_train_000000.bin", np.array([BOS, 5]))
    write_shard(folder / "fineweb_val_000000.bin", np.array([BOS, 6, 7]))
    assert download.published_lengths(folder) is None
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(tokens_val=4)))
    report = shards.check_folder(folder, lambda _: None, download.published_lengths(folder))
    assert len(report.problems) == 1 and "the validation split has 3 tokens, the export promises 4" in report.problems[0]
    assert any("1 of the 3 published training shards" in note for note in report.notes)
    (tmp_path / "manifest.json").write_text("{}")
    assert download.published_lengths(folder) is None


Documents = list[list[int]]


def write_documents(folder: Path, split: str, documents: Documents, shard_tokens: int = 7) -> None:
    """Writes documents of tokens from 2 up, a BOS before each, as shards."""
    tokens = np.array([token for document in documents for token in (BOS, *document)])
    for index, start in enumerate(range(0, tokens.size, shard_tokens)):
        write_shard(folder / f"fineweb_{split}_{index:06d}.bin", tokens[start : start + shard_tokens])


VAL: Documents = [[5, 6, 7, 8], [9], [], [10, 11, 12], [13] * 20]
TRAIN: Documents = [[20, 21, 22], [23] * 9, [], [5, 6, 7], [8, 7, 6, 5], [9, 9]]  # beginnings and other orders of validation documents are not they


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_documents(tmp_path, "val", VAL)
    write_documents(tmp_path, "train", TRAIN)
    return tmp_path


def check(folder: Path, **published: Any) -> shards.FolderReport:
    return shards.check_folder(folder, lambda _: None, published)


def test_a_good_folder_has_no_problems(folder: Path) -> None:
    report = check(folder)
    assert report.problems == [] and report.shared_documents == 0
    assert report.splits == {"val": shards.Split(5, 33, 5), "train": shards.Split(4, 27, 6)}
    assert len(report.notes) == 1 and "no manifest.json" in report.notes[0]


@pytest.mark.parametrize(
    ("leaked", "documents", "tokens"), [([], 0, 0), ([1], 1, 2), ([0, 3], 2, 9), ([2], 0, 0), ([0, 1, 2, 3, 4], 4, 32)]
)
def test_validation_documents_in_the_training_shards_are_counted_wherever_they_are_cut(folder: Path, leaked: list[int], documents: int, tokens: int) -> None:
    write_documents(folder, "train", [*TRAIN[:2], *(VAL[index] for index in leaked), *TRAIN[2:], [3]], shard_tokens=5)
    report = check(folder)
    assert (report.shared_documents, report.shared_tokens) == (documents, tokens)
    assert [problem.split(" occur")[0] for problem in report.problems] == (
        [f"{documents} of 5 validation documents ({tokens / 33:.1%} of the tokens)"] if documents else []
    )


def test_a_last_document_that_leaks_is_found(folder: Path) -> None:
    write_documents(folder, "train", [*TRAIN, VAL[4]])
    assert check(folder).shared_documents == 1


def test_few_shared_documents_are_no_problem(folder: Path) -> None:
    write_documents(folder, "val", [[2, 3], [4] * 1000])
    write_documents(folder, "train", [[2, 3], [5] * 9])
    report = check(folder)
    assert (report.shared_documents, report.problems) == (1, [])


def test_a_folder_with_one_split_has_nothing_to_compare(folder: Path) -> None:
    for path in folder.glob("*_train_*"):
        path.unlink()
    report = check(folder)
    assert report.shared_documents is None and report.problems == []


@given(tokens=st.lists(st.integers(0, 3), max_size=60), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_documents_have_their_hashes_however_the_stream_is_cut(tokens: list[int], cuts: list[int]) -> None:
    stream = np.array(tokens, dtype=np.uint16)
    hasher = shards.DocumentHasher(BOS)
    parts = [hasher.add(part) for part in np.split(stream, sorted(cuts))] + [hasher.finish()]
    starts = [index for index, token in enumerate(tokens) if index == 0 or token == BOS]
    documents = [tuple(tokens[start:end]) for start, end in itertools.pairwise([*starts, len(tokens)])]
    hashes = np.concatenate([part.hashes for part in parts]).tolist()
    assert np.concatenate([part.lengths for part in parts]).tolist() == [len(document) for document in documents]
    assert len(set(zip(hashes, documents, strict=True))) == len(set(hashes)) == len(set(documents))


def flip(path: Path) -> None:
    path.write_bytes(one_bit_flipped(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "fineweb_train_000001.bin").write_bytes(b""), "fineweb_train_000001.bin: 0 bytes is shorter than the 1024-byte header"),
        (lambda folder: os.truncate(folder / "fineweb_train_000001.bin", 1030), "1030 bytes, but its header promises 7 tokens = 1038 bytes"),
        (lambda folder: write_shard(folder / "fineweb_train_000001.bin", np.empty(0)), "fineweb_train_000001.bin: holds no tokens"),
        (lambda folder: (folder / "fineweb_train_000001.bin").unlink(), "train shards 1 are missing, though later ones are there"),
        (lambda folder: (folder / "fineweb_val_000000.bin").unlink(), "val shards 0 are missing"),
        (lambda folder: write_shard(folder / "fineweb_val_000000.bin", np.array([10])), "begins with token 10, but every document begins with BOS 1"),
    ],
)
def test_damage_is_a_problem_without_any_manifest(folder: Path, change: Callable[[Path], object], problem: str) -> None:
    change(folder)
    assert any(problem in found for found in check(folder).problems)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A CaseOps folder as tokenize_docs.py makes it, with a manifest, byte shards, and a validation document that is not in the training split."""
    texts = [f"Document {number} says THE SAME and {number * 7919} " * 20 for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = tmp_path / "out"
    options = ["--vocab-size", "310", "--caseops", "--val-docs", "4", "--shard-tokens", "900", "--workers", "1"]
    assert tokenize_docs.main(["--input", str(tmp_path / "a.jsonl"), "--output", str(output), *options]) == 0
    return output


def test_a_folder_of_tokenize_docs_is_verified(made: Path) -> None:
    report = check(made)
    assert report.problems == [] and report.notes == [] and report.shared_documents == 0
    assert report.hashed_files == len(list(made.iterdir())) - 1
    assert (report.splits["val"].documents, report.splits["train"].documents) == (4, 36)
    assert len(list(made.glob("*_val_bytes_*"))) > 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda made: flip(made / "fineweb_val_000000.bin"), "fineweb_val_000000.bin: its SHA-256 is not "),
        (lambda made: flip(made / "fineweb_val_bytes_000000.bin"), "fineweb_val_bytes_000000.bin: its SHA-256 is not "),
        (lambda made: max(made.glob("*_train_*")).unlink(), "no such file, but the manifest lists it"),
        (lambda made: write_shard(made / "fineweb_val_000009.bin", np.array([BOS])), "fineweb_val_000009.bin: not in the manifest"),
        (lambda made: write_shard(made / "fineweb_train_000000.bin", np.array([BOS, 310])), "token 310 is outside the tokenizer's vocabulary of 310"),
        (lambda made: flip(made / "tokenizer.model"), "it is not the tokenizer that made the shards"),
        (lambda made: (made / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
        (lambda made: (made / "fineweb_val_bytes_000000.bin").unlink(), "fineweb_val_bytes_000000.bin: no such file; without it the bytes"),
        (lambda made: write_shard(made / "fineweb_val_bytes_000000.bin", np.zeros(3)), "3 entries for the 900 tokens of fineweb_val_000000.bin"),
        (lambda made: os.truncate(made / "fineweb_val_bytes_000000.bin", 2000), "the file is truncated or damaged"),
        (lambda made: write_shard(made / "fineweb_val_bytes_000000.bin", np.ones(900)), "a BOS stands for no bytes, but here one has some"),
        (lambda made: write_shard(made / "fineweb_val_bytes_000000.bin", np.zeros(900)), "but the manifest says that the validation text has"),
    ],
)
def test_damage_is_a_problem_by_the_manifest(made: Path, change: Callable[[Path], object], problem: str) -> None:
    change(made)
    assert any(problem in found for found in check(made).problems)


def test_a_stranger_among_the_training_shards_is_a_note(made: Path) -> None:
    write_shard(made / "fineweb_train_extra_000000.bin", np.array([BOS, 300]))
    report = check(made)
    assert report.problems == [] and "fineweb_train_extra_000000.bin: not in the manifest, but training would read it" in report.notes[0]


@pytest.mark.parametrize("content", ["", "[]", '{"splits": {"train": {}}}', '{"splits": {}, "tokenizer": {}}'])
def test_a_foreign_manifest_is_refused(made: Path, content: str) -> None:
    (made / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of the data tools"):
        check(made)


def test_one_full_training_shard_is_noted_where_nothing_says_how_many_there_are() -> None:
    report = shards.FolderReport(splits={"train": shards.Split(1, 100_000_000, 5), "val": shards.Split()})
    shards.compare_with_published(report, {})
    assert len(report.notes) == 1 and "only one training shard is here; the challenge trains on 80" in report.notes[0]
