"""data/download.py against a hub on this machine: what arrives, what is refused, what a user reads, and that nothing good is lost.

The tool runs as a process of its own, because the hub library reads its environment when it is imported.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

import download  # noqa: E402
from rich.console import Console  # noqa: E402
from shards import read_shard, write_shard  # noqa: E402

REPOSITORY = "someone/export"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = "datasets/datasets/fineweb10B_sp1024"
TRAIN_TOKENS = (3000, 3000, 1000)
VAL_TOKENS = 500
LARGE_TOKENS = 12_000_000  # Half of this shard is more than the 10 MB that the library writes, and so can resume from, at a time.

Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]


# ----------------------------------------------------------------------------------------------------------------------
# A hub on this machine


class FakeHub:
    """The three requests of a hub that a download makes. `files` is the repository; `faults[path]` may answer a GET instead (returns True)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
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
        """Answers which of the posted paths exist, with the size and SHA-256 that a large file has on the hub."""
        posted = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())
        known = [(path, self.files[path]) for path in posted["paths"] if path in self.files]
        infos = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": "0" * 40,
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130},
            }
            for path, content in known
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
    """Returns a shard of `num_tokens` random tokens."""
    write_shard(folder / "shard.bin", np.random.default_rng(seed).integers(0, 1024, num_tokens))
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

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Returns the finished process; later arguments override the defaults."""
        command = [sys.executable, str(DATA / "download.py"), "--repo-id", REPOSITORY, "--output", str(self.output), *arguments]
        return subprocess.run(command, env=self.environment, cwd=self.output.parent, capture_output=True, text=True, timeout=60)

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


# ----------------------------------------------------------------------------------------------------------------------
# What arrives


def test_full_download_then_nothing_left_to_fetch(tool: Tool, hub: FakeHub) -> None:
    first = tool("--train-shards", "3", "--with-docs")
    assert first.returncode == 0, first.stderr
    for remote, content in hub.files.items():
        if not remote.endswith("/manifest.json"):
            assert (tool.output / remote.removeprefix("datasets/")).read_bytes() == content
    assert len(tool.names()) == len(hub.files) - 1
    assert "train  3 of 3 published shards  7,000 tokens" in first.stdout
    assert "val    1 of 1 published shards  500 tokens" in first.stdout
    assert "8/8 docs_selected.source_manifest.json" in first.stdout and "MB/s" in first.stdout
    assert "DATA_PATH=out/datasets/fineweb10B_sp1024 TOKENIZER_PATH=out/tokenizers/fineweb_1024_bpe.model" in first.stdout
    assert "note:" not in first.stdout and first.stderr == ""

    assert sorted(hub.bodies) == sorted(hub.files)
    hub.bodies.clear()
    tool.forget_cache()  # What is in place must suffice: users clear the cache to gain space.
    second = tool("--train-shards", "3", "--with-docs")
    assert second.returncode == 0 and "0 fetched, 8 already good" in second.stdout
    assert hub.bodies == ["datasets/manifest.json"]


def test_fewer_shards_are_counted_and_oddities_noted(tool: Tool, hub: FakeHub) -> None:
    hub.files["datasets/manifest.json"] = json.dumps(manifest(tokens_val=VAL_TOKENS + 1)).encode()
    tool.shards.mkdir(parents=True)
    (tool.shards / "fineweb_train_000077.bin").write_bytes(b"someone's own")
    result = tool("--train-shards", "1")
    assert result.returncode == 0, result.stderr
    assert "train  1 of 3 published shards  3,000 tokens" in result.stdout
    assert "the manifest promises 501 val tokens" in result.stdout
    assert "1 other .bin files" in result.stdout and "fineweb_train_000077.bin" in result.stdout
    assert "docs_selected.jsonl" not in tool.names()


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
    assert hub.bodies == [f"{FOLDER}/{path.name}" for path in good]


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


def test_stale_manifest_says_how_many_shards_were_obtained(tool: Tool, hub: FakeHub) -> None:
    hub.files["datasets/manifest.json"] = json.dumps(manifest(files_train=5)).encode()
    line = error_line(tool("--train-shards", "5"), 1)
    assert "fineweb_train_000003.bin: the manifest or the command asks for it, but the hub has no such file (and 1 more)" in line
    assert "in place: 3 of 5 train shards, 1 of 1 val shards" in line and "--train-shards 3 would be complete" in line
    assert len(read_shard(tool.shards / "fineweb_train_000002.bin")) == 1000


def test_interrupted_transfer_leaves_no_half_file_and_a_rerun_completes(tool: Tool, hub: FakeHub) -> None:
    path = f"{FOLDER}/fineweb_train_000001.bin"

    def break_off_then_fail(request: BaseHTTPRequestHandler, content: bytes) -> bool:
        if hub.bodies.count(path) > 1:
            send(request, 503, b"", {})
        else:
            break_off(request, content)
        return True

    hub.faults[path] = break_off_then_fail
    line = error_line(tool("--train-shards", "3"), 1)
    assert path in line and "503" in line and "1 of 3 train shards" in line and "run the same command again" in line
    assert {name for name in tool.names() if "train" in name} == {"fineweb_train_000000.bin"}

    hub.faults.clear()
    hub.bodies.clear()
    assert tool("--train-shards", "3").returncode == 0
    assert sorted(hub.bodies) == [path, f"{FOLDER}/fineweb_train_000002.bin"]
    assert (tool.shards / "fineweb_train_000001.bin").read_bytes() == hub.files[path]


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
    meter = download.Meter(Console(file=screen, force_terminal=True, width=120), num_files=4, total_bytes=80_000_000)
    with meter.bar:
        meter.begin(3, "fineweb_train_000001.bin")
        report = download.reporting_to(meter.advance)(total=60_000_000)
        report.update(25_000_000)
        report.update(-10_000_000)
        time.sleep(0.05)  # A speed needs two moments.
        report.update(5_000_000)
        report.update_transfer(5_000_000)
    shown = screen.getvalue()
    assert "3/4 fineweb_train_000001.bin" in shown and "20.0/80.0 MB" in shown and "MB/s" in shown
