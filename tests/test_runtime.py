"""Runtime: ranks, clock, signals, files and log."""

from __future__ import annotations

import json
import os
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import clean_environment

import train_gpt
from train_gpt import Clock, Control, ControlLink, Log, StopSignals, World, atomic_write

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> World:
    """The world of a process that no launcher started."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    return World("cpu")


def test_on_one_process_every_collective_is_the_identity(alone: World) -> None:
    tensor = torch.arange(6.0).reshape(3, 2)
    before = tensor.clone()
    assert (alone.rank, alone.size, alone.is_main, alone.device, alone.control) == (0, 1, True, torch.device("cpu"), None)
    assert alone.sum_(tensor) is tensor
    assert alone.start_scatter_sum(tensor).wait() is tensor
    assert alone.start_gather(tensor).wait() is tensor
    assert torch.equal(tensor, before)
    assert alone.gather_objects({"a": 1}) == [{"a": 1}]
    assert alone.from_main("text") == "text"
    alone.close()
    assert not torch.distributed.is_initialized()


def test_device_auto_is_cpu_without_cuda_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert World("auto").device == torch.device("cpu")
    with pytest.raises(ValueError, match=r"DEVICE=cuda: no CUDA device is visible; use DEVICE=cpu"):
        World("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"DEVICE=mps: this is no Apple GPU; use DEVICE=cpu"):
        World("mps")


def test_control_link_returns_the_values_of_the_exchange_before(alone: World) -> None:
    link = ControlLink(alone, Control(7.25, stop=False))
    assert [link.exchange(*sent) for sent in [(8.5, False), (9.125, True), (1e-9, False), (0.0, False)]] == [
        Control(7.25, False), Control(8.5, False), Control(9.125, True), Control(1e-9, False),
    ]  # fmt: skip


def call_every_collective() -> None:
    """What one of two ranks does: calls every collective and writes what it got to RANK.json in the working folder."""
    world = World("cpu")
    rank = world.rank
    got: dict[str, Any] = {"rank": world.rank, "size": world.size, "is_main": world.is_main}

    summed = torch.tensor([1.0, 10.0]) * (rank + 1)
    got["sum_in_place"] = world.sum_(summed) is summed
    got["sum_"] = summed.tolist()

    stacked = torch.arange(8.0).reshape(4, 2) + 100 * rank
    share = world.start_scatter_sum(stacked).wait()
    got["scatter_sum"] = share.tolist()
    got["scatter_keeps_input"] = stacked.tolist() == (torch.arange(8.0).reshape(4, 2) + 100 * rank).tolist()
    got["gather"] = world.start_gather(share).wait().tolist()
    got["gather_strided"] = world.start_gather(torch.tensor([[0, 1], [2, 3]]).T + 10 * rank).wait().tolist()
    got["gather_objects"] = world.gather_objects({"rank": rank, "text": "x" * (1 + 50 * rank)})
    got["from_main"] = world.from_main(["main", 1] if rank == 0 else None)
    mine = [torch.full((2,), float(rank + 5)), torch.full((1,), float(rank + 7))]
    world.copy_from_main(mine)
    got["copy_from_main"] = [tensor.tolist() for tensor in mine]

    link = ControlLink(world, Control(0.5, stop=False))
    sent = [(10.0, False), (11.0, rank == 1), (12.0, False), (13.0, rank == 0), (14.0, False)]
    got["controls"] = [link.exchange(seconds + 1000 * rank, stop) for seconds, stop in sent]
    Path(f"{rank}.json").write_text(json.dumps(got))
    world.close()
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes got from every collective."""
    folder = tmp_path_factory.mktemp("ranks")
    outcome = forked.start(Path(__file__), [], clean_environment(), folder, ranks=2).finish()
    assert outcome.codes == [0, 0], outcome.output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_know_their_place(both_ranks: list[dict[str, Any]]) -> None:
    assert [(got["rank"], got["size"], got["is_main"]) for got in both_ranks] == [(0, 2, True), (1, 2, False)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum_in_place", True),
        ("sum_", [3.0, 30.0]),
        ("scatter_keeps_input", True),
        ("gather", [[100.0, 102.0], [104.0, 106.0], [108.0, 110.0], [112.0, 114.0]]),  # of the shares of scatter_sum
        ("gather_strided", [[0, 2], [1, 3], [10, 12], [11, 13]]),
        ("gather_objects", [{"rank": 0, "text": "x"}, {"rank": 1, "text": "x" * 51}]),
        ("from_main", ["main", 1]),
        ("copy_from_main", [[5.0, 5.0], [7.0]]),
    ],
)
def test_both_ranks_get_the_same(both_ranks: list[dict[str, Any]], name: str, expected: Any) -> None:
    assert [got[name] for got in both_ranks] == [expected, expected]


def test_scatter_sum_gives_each_rank_its_own_half(both_ranks: list[dict[str, Any]]) -> None:
    assert [got["scatter_sum"] for got in both_ranks] == [[[100.0, 102.0], [104.0, 106.0]], [[108.0, 110.0], [112.0, 114.0]]]


def test_ranks_agree_on_the_seconds_of_rank_0_and_on_a_stop_asked_of_any_rank(both_ranks: list[dict[str, Any]]) -> None:
    expected = [[0.5, False], [10.0, False], [11.0, True], [12.0, False], [13.0, True]]
    assert [got["controls"] for got in both_ranks] == [expected, expected]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the script sees, in seconds; a test moves it."""
    moment = [100.0]
    monkeypatch.setattr(train_gpt, "time", types.SimpleNamespace(perf_counter=lambda: moment[0], monotonic=lambda: moment[0]))
    return moment


def test_clock_counts_only_between_start_and_pause(now: list[float]) -> None:
    clock = Clock(2.0)
    seconds = [clock.seconds()]
    for advance, change in [(5.0, clock.start), (1.0, lambda: None), (0.5, clock.pause), (10.0, lambda: None), (3.0, clock.start), (0.25, clock.pause)]:
        now[0] += advance
        change()
        seconds.append(clock.seconds())
    assert seconds == [2.0, 2.0, 3.0, 3.5, 3.5, 3.5, 3.75]


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    """Installed handlers, taken back after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers = StopSignals()
    handlers.install()
    yield handlers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_outside_training_exits_with_128_plus_its_number(signals: StopSignals, number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(number)
    assert stopped.value.code == 128 + number


def test_signal_outside_training_leaves_no_request_behind(signals: StopSignals) -> None:
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert signals.received is None


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_signal_during_training_is_noted_and_one_sent_again_exits(
    signals: StopSignals, first: signal.Signals, second: signal.Signals, now: list[float]
) -> None:
    signals.deferred = True
    assert signals.received is None
    signal.raise_signal(first)
    assert signals.received is first
    now[0] += 2.9  # the launcher's copy of the same request
    signal.raise_signal(second)
    assert signals.received is first
    now[0] += 0.2
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(second)
    assert stopped.value.code == 128 + second


@pytest.mark.parametrize("data", [b"\x00\xff\r\n", b""])
def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_text("a longer text that was there before")
    atomic_write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def disk_full(descriptor: int) -> None:
        assert path.read_text() == "old", "the old file must be whole until the new one is"
        raise OSError("no space left on device")

    monkeypatch.setattr(train_gpt.os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, b"new")
    assert path.read_text() == "old"


def test_atomic_file_whose_writer_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), train_gpt.atomic_file(path) as file:
        file.write(b"ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"


def test_atomic_write_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(train_gpt.os, "fsync", lambda descriptor: (sync(descriptor), calls.append("fsync")))
    monkeypatch.setattr(train_gpt.os, "replace", lambda old, new: (calls.append(f"replace {Path(old).stat().st_size}"), rename(old, new)))
    atomic_write(tmp_path / "file", b"12345")
    assert calls[:2] == ["fsync", "replace 5"]


# One event of every kind and the line it must print.
EVENTS: dict[str, tuple[dict[str, Any], str]] = {
    "config": ({"run_id": "a", "preset": "demo", "changed": {"SEED": "1", "COMPILE": "0"}, "settings": {}}, "run a  preset demo  SEED=1 COMPILE=0"),
    "env": (
        {"commit": "0123456789ab", "torch": "2.13.0", "device_name": "cpu (1 threads)", "world_size": 2, "params": 17059912},
        "commit 0123456789ab  torch 2.13.0  cpu (1 threads) x 2  17,059,912 parameters",
    ),
    "phase": ({"step": 7, "order": (0, 1, 1), "seq_len": 64, "qat": True}, "phase from step 7: layers 0,1,1  64 tokens a row  qat 1"),
    "step": (
        {
            "step": 1200, "steps": 4931, "train_loss": 3.10421, "grad_norm": 0.5, "lr_scale": 0.61, "step_ms": 121.74, "tokens_per_second": 2430000.0,
            "train_seconds": 146.2, "remaining_seconds": 453.8,
        },
        "step 1200/4931  loss 3.1042  lr 0.610  121.7 ms  2.43 Mtok/s  2:26 of 10:00",
    ),
    "val": ({"step": 300, "val_loss": 2.0, "val_bpb": 1.22435, "seconds": 1.25, "train_seconds": 9.0}, "step 300  val_loss 2.0000  val_bpb 1.2244  (1.2 s)"),
    "note": ({"text": "a sentence"}, "a sentence"),
    "export": (
        {
            "roles": [{"role": "matrix", "params": 1500000, "bytes": 1000000, "bits_per_weight": 5.3333}],
            "bytes_model": 1000100, "bytes_code": 50000, "bytes_total": 1050100, "bytes_cap": 16000000,
        },
        "  matrix      1,500,000 weights    1,000,000 bytes    5.333 bits/weight\n"
        "Total submission size: artifact 1,000,100 + code 50,000 = 1,050,100 bytes, within 16,000,000",
    ),
    "eval": (
        {"name": "sliding", "val_loss": 2.0, "val_bpb": 1.2, "seconds": 3.04},
        "sliding evaluation of the artifact: val_loss 2.0000  val_bpb 1.2000  (3.0 s)",
    ),
    "result": (
        {"val_bpb": 1.2244, "bytes_total": 15863489, "bytes_cap": 16000000, "train_seconds": 600.0, "eval_seconds": 1.5},
        "val_bpb 1.2244  bytes 15,863,489 of 16,000,000  train 600.0 s  eval 1.5 s",
    ),
}  # fmt: skip


def test_every_kind_of_event_has_a_sample() -> None:
    assert set(EVENTS) == set(train_gpt.LOG_LINES)


@pytest.mark.parametrize("kind", EVENTS)
def test_event_is_recorded_for_machines_and_printed_for_people(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, line = EVENTS[kind]
    log = Log(tmp_path)
    log.event(kind, **values)
    written, lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8"), (tmp_path / "log.txt").read_text(encoding="utf-8")
    log.close()
    event = json.loads(written)
    assert written.count("\n") == 1
    assert list(event)[:2] == ["event", "time"]
    assert event.pop("event") == kind
    assert event.pop("time") > 1.7e9
    assert event == json.loads(json.dumps(values))
    assert lines == line + "\n"
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("kind", "changed", "line"),
    [
        ("step", {"tokens_per_second": 12345.0}, "step 1200/4931  loss 3.1042  lr 0.610  121.7 ms  12.3 ktok/s  2:26 of 10:00"),
        (
            "export",
            {"bytes_total": 16050100},
            "  matrix      1,500,000 weights    1,000,000 bytes    5.333 bits/weight\n"
            "Total submission size: artifact 1,000,100 + code 50,000 = 16,050,100 bytes, over BYTES_CAP=16,000,000 by 50,100",
        ),
        ("result", {"val_bpb": None, "bytes_total": None, "eval_seconds": None}, "train 600.0 s"),
        ("result", {"train_seconds": None}, "val_bpb 1.2244  bytes 15,863,489 of 16,000,000  eval 1.5 s"),
    ],
)
def test_line_of_an_unusual_event(kind: str, changed: dict[str, Any], line: str) -> None:
    assert train_gpt.LOG_LINES[kind]({**EVENTS[kind][0], **changed}) == line


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0:00"), (59.99, "0:59"), (60.0, "1:00"), (605.5, "10:05"), (3600.0, "60:00")])
def test_clock_text(seconds: float, text: str) -> None:
    assert train_gpt.clock_text(seconds) == text


def test_log_appends_to_an_earlier_run_and_keeps_progress_off_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("größe", "second"):
        log = Log(tmp_path)
        log.note(text)
        log.progress("50%")
        log.close()
    assert [json.loads(line)["text"] for line in (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()] == ["größe", "second"]
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "größe\nsecond\n"
    assert capsys.readouterr().out == "größe\nsecond\n"


def test_other_ranks_log_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = Log(None)
    log.note("text")
    log.event("kind that has no line")
    log.progress("50%")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


if __name__ == "__main__":
    call_every_collective()
