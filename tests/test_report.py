"""records/report.py: what it reads from run folders, what it refuses, and that page and plots hold it."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from records import report

Event = dict[str, Any]
PNG_FILES = {"loss_over_steps.png", "loss_over_time.png", "throughput.png", "bytes_by_role.png"}
FRONTIER_FILES = {"score_against_bytes.png", "score_against_training.png", "score_against_evaluation.png"}


def header(run_id: str, **settings: Any) -> list[Event]:
    known = {"RUN_ID": run_id, "DATA_PATH": "data/sample", "TOKENIZER_PATH": "data/sample/tok.model", "FINAL_EVAL": "sliding", "SEED": 1}
    return [
        {"event": "config", "time": 1.0, "run_id": run_id, "preset": "demo", "settings": {**known, **settings}},
        {"event": "env", "time": 1.0, "commit": "0123456789abcdef", "torch": "2.13.0", "device": "cpu", "world_size": 1},
        {"event": "phase", "time": 1.0, "step": 0, "order": [0, 1], "seq_len": 256, "qat": False},
    ]


def training(first: int, last: int, *, steps: int = 400, every: int = 4, floor: float = 3.2, seed: int = 0) -> list[Event]:
    """Returns step events first..last and a validation every 100 steps, with a curve like that of a small language model."""
    noise = np.random.default_rng(seed)
    events: list[Event] = []
    for step in range(first, last + 1, every):
        loss = floor + 6.0 * math.exp(-step / 25) + 1.2 * math.exp(-step / (0.4 * steps)) + noise.normal(0, 0.05)
        speed = 2_400_000 * (1 + noise.normal(0, 0.01))
        timing = {"step_ms": 110.0, "tokens_per_second": speed, "train_seconds": 0.11 * step, "remaining_seconds": 0.11 * (steps - step)}
        events.append({"event": "step", "step": step, "steps": steps, "train_loss": loss, "lr_scale": 1.0, "grad_norm": 0.5, **timing})
        if step % 100 == 0:
            score = {"val_loss": loss + 0.02, "val_bpb": (loss + 0.02) / 2.6}
            events.append({"event": "val", "step": step, **score, "train_seconds": 0.11 * step, "seconds": 1.0})
    return events


def ending(run_id: str, *, val_bpb: float = 1.2244, bytes_total: int = 15_900_000, scored_bytes: int = 5_000_000) -> list[Event]:
    code = 60_000
    sizes = {"bytes_model": bytes_total - code, "bytes_code": code, "bytes_total": bytes_total, "bytes_cap": 16_000_000}
    roles = [
        {"role": "mlp", "params": 18_000_000, "bytes": bytes_total * 6 // 10, "bits_per_weight": 4.24},
        {"role": "attention", "params": 9_000_000, "bytes": bytes_total * 3 // 10, "bits_per_weight": 4.3},
        {"role": "embedding", "params": 1_000_000, "bytes": bytes_total // 20, "bits_per_weight": 6.36},
    ]
    scores = {
        "chunked": {"val_loss": 3.3, "val_bpb": val_bpb + 0.03, "seconds": 4.0},
        "sliding": {"val_loss": 3.2, "val_bpb": val_bpb, "seconds": 61.0},
    }
    result = {"preset": "demo", "seed": 1, "world_size": 1, "device": "cpu", "torch": "2.13.0", "params": 28_000_000, "steps": 400}
    times = {"train_seconds": 598.4, "eval_seconds": 65.0, "step_ms": 110.1, "tokens_per_second": 2_400_000.0}
    quality = {"val_loss": 3.2, "val_bpb": val_bpb, "pre_quant_val_bpb": val_bpb - 0.0031, "quant_val_bpb": val_bpb + 0.0012}
    return [
        {"event": "export", **sizes, "roles": roles, "seconds": 9.0},
        *({"event": "eval", "name": name, **score, "targets": 1_900_000, "bytes": scored_bytes} for name, score in scores.items()),
        {"event": "result", "run_id": run_id, **result, **times, **quality, "scores": scores, **sizes},
    ]


def scored(run_id: str, val_bpb: float, settings: Event | None = None, result: Event | None = None, bytes_total: int = 15_900_000) -> list[Event]:
    """Returns a run that was only evaluated, whose result holds `result` besides; its seed is the setting SEED."""
    events = [*header(run_id, **(settings or {})), *ending(run_id, val_bpb=val_bpb, bytes_total=bytes_total)]
    events[-1].update({"seed": (settings or {}).get("SEED", 1), **(result or {})})
    return events


def whole_run(run_id: str, *, floor: float = 3.2, seed: int = 0, settings: Event | None = None, **end: Any) -> list[Event]:
    switch = {"event": "phase", "step": 300, "order": [0, 1], "seq_len": 512, "qat": True}
    first, second = training(4, 300, floor=floor, seed=seed), training(304, 400, floor=floor, seed=seed + 1)
    return [*header(run_id, **(settings or {})), *first, switch, *second, *ending(run_id, **end)]


def write(folder: Path, events: list[Event], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "run.jsonl").write_text("".join(json.dumps({"time": 0.0, **event}) + "\n" for event in events) + tail, encoding="utf-8")
    return folder


def page_of(*folders: Path) -> str:
    """Returns the page without its plots, whose drawing takes most of the time of a report."""
    runs, unread = report.read_runs(folders)
    return report.page_html(runs, {}, unread)


def cells(page: str, row: str) -> list[str]:
    """Returns the cells of the first table row named `row`."""
    found = re.search(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', page)
    assert found, f"no row {row}"
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1])


def pixels(path: Path) -> np.ndarray:
    """Returns the bytes of the PNG's filtered scan lines, after checking signature and every checksum."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, data, kinds = 8, b"", []
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kind, body = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", content[position + 8 + length : position + 12 + length])[0]
        kinds.append(kind)
        data += body if kind == b"IDAT" else b""
        position += 12 + length
    assert kinds[0] == b"IHDR" and kinds[-1] == b"IEND"
    return np.frombuffer(zlib.decompress(data), dtype=np.uint8)


def test_a_finished_run_is_reported_with_its_numbers(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "a", whole_run("first")))
    expected = {
        "final score": "1.2244",
        "evaluation: chunked": "1.2544 in 4.00 s",
        "evaluation: sliding": "1.2244 in 1:01",
        "cost of quantisation": "+0.0043",
        "total": "15,900,000",
        "cap": "16,000,000",
        "share of the cap": "99.38%",
        "parameters": "28,000,000",
        "status": "finished",
        "steps": "400",
        "training time": "9:58",
        "tokens per second": "2,400,000",
        "data (DATA_PATH)": "data/sample",
        "commit": "0123456789ab",
    }
    assert {row: cells(page, row) for row in expected} == {row: [value] for row, value in expected.items()}
    assert cells(page, "mlp") == ["18,000,000", "9,540,000", "4.24"]
    assert cells(page, "container") == ["—", "735,000", "—"]
    assert "Run report: first" in page
    assert 'class="notices"' not in page


def test_page_and_plots_stand_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", whole_run("first"))
    assert report.main([str(folder), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", *PNG_FILES}
    for name in PNG_FILES:
        assert len(np.unique(pixels(tmp_path / "out" / name))) > 50, name
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len(PNG_FILES)
    assert not re.search(r"<script|<link|https?:|@import|url\(", page)


def test_default_output_is_inside_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a", whole_run("first"))
    monkeypatch.setattr(report, "draw_all", lambda runs: dict.fromkeys(PNG_FILES, b""))
    assert report.main([str(folder)]) == 0
    assert set(capsys.readouterr().out.split()) == {str(folder / "report" / name) for name in {"report.html", *PNG_FILES}}


def test_torn_last_line_is_left_out_and_mentioned(tmp_path: Path) -> None:
    run = report.read_run(write(tmp_path / "a", header("a") + training(4, 40), tail='{"event": "step", "step": 44, "trai'))
    assert report.number(run.steps[-1], "step") == 40
    assert any("torn" in notice for notice in run.notices)


def test_damaged_lines_in_the_middle_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", header("a") + training(4, 8), tail='{"event": "st{"event": "config"}\n[1]\n{"event": "step", "step": "x"}\n')
    run = report.read_run(folder)
    assert len(run.steps) == 2
    assert "Damaged lines of run.jsonl are left out: 6, 7, 8." in run.notices


def test_unknown_events_and_extra_keys_are_ignored(tmp_path: Path) -> None:
    events = [{**event, "extra": [1]} for event in whole_run("a")]
    known, extended = write(tmp_path / "a", whole_run("a")), write(tmp_path / "b", [{"event": "weather", "sun": True}, *events])
    first, second = report.read_run(known), report.read_run(extended)
    assert first.final_bpb == second.final_bpb
    assert len(first.steps) == len(second.steps)
    assert second.notices == []


def test_resumed_run_shows_the_later_steps(tmp_path: Path) -> None:
    lost, kept = training(4, 240, floor=9.0), training(204, 400, floor=3.0)
    run = report.read_run(write(tmp_path / "a", header("a") + training(4, 200) + lost[50:] + header("a") + kept + ending("a")))
    steps, losses = report.series(run.steps, "step", "train_loss")
    assert steps.tolist() == list(range(4, 401, 4))
    assert losses[50:].tolist() == [event["train_loss"] for event in kept if event["event"] == "step"]
    assert run.resumed_at == [204]
    assert any("resumed" in notice for notice in run.notices)


def test_training_on_after_a_result_withdraws_the_result(tmp_path: Path) -> None:
    run = report.read_run(write(tmp_path / "a", whole_run("a") + header("a") + training(404, 480, steps=800)))
    assert run.result is None and run.export is None and not run.scores
    assert run.status == "unfinished, step 480 of 800"


def test_evaluating_again_keeps_the_training(tmp_path: Path) -> None:
    run = report.read_run(write(tmp_path / "a", whole_run("a") + header("a") + ending("a", val_bpb=1.1)[1:]))
    assert run.final_bpb == 1.1
    assert len(run.steps) == 100
    assert run.resumed_at == []


def test_unfinished_run_shows_its_last_validation(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "a", header("a") + training(4, 200)))
    assert cells(page, "status") == ["unfinished, step 200 of 400"]
    assert cells(page, "final score") == ["—"]
    assert re.fullmatch(r"\d\.\d{4} at step 200", cells(page, "last validation in training")[0])
    assert "The run has no result" in page
    assert set(report.draw_all([report.read_run(tmp_path / "a")])) == PNG_FILES - {"bytes_by_role.png"}


def test_run_with_only_an_evaluation(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "a", [*header("a"), ending("a")[1]]))
    assert cells(page, "status") == ["evaluated only"]
    assert cells(page, "evaluation: chunked") == ["1.2544 in 4.00 s"]
    assert page.count("Nothing was logged for this plot.") == len(PNG_FILES)


def test_a_plot_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("throughput.png", "differences.png"):
        (tmp_path / "out" / name).write_bytes(b"old")
    assert report.main([str(write(tmp_path / "b", header("b"))), "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_diverged_run_says_where(tmp_path: Path) -> None:
    events = header("a") + training(4, 100)
    for event in events:
        if event["event"] == "step" and event["step"] >= 60:
            event["train_loss"] = math.nan
    assert "not a finite number at 11 logged steps, first at 60" in page_of(write(tmp_path / "a", events))


def test_oversized_artifact_is_called_out_and_never_the_best(tmp_path: Path) -> None:
    big = write(tmp_path / "big", whole_run("big", val_bpb=1.0, bytes_total=16_500_000))
    page = page_of(big, *(write(tmp_path / name, whole_run(name, val_bpb=score)) for name, score in (("b", 1.2), ("c", 1.3))))
    assert "500,000 bytes over the cap" in page
    assert cells(page, "share of the cap")[0] == "103.12% (over)"
    assert cells(page, "behind the best") == ["over the cap", "+0.0000", "+0.1000"]
    assert page.count('<td class="best">') == 1 and '<td class="best">1.2000</td>' in page


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    first, second = whole_run(evil, settings={evil: evil, "DATA_PATH": evil}), whole_run(evil)
    for event in first:
        event.update({key: evil for key in ("commit", "device", "preset", "torch") if key in event})
        if event["event"] == "export":
            event["roles"][0]["role"] = evil
        if event["event"] == "eval":
            event["name"] = evil
        if event["event"] == "result":
            event["scores"] = {evil: event["scores"]["chunked"]}
    folders = write(tmp_path / "a & <b>", first), write(tmp_path / "b", second)
    for page in (page_of(folders[0]), page_of(*folders, tmp_path / "<i>none")):
        assert "&lt;script&gt;" in page
        assert not re.search(r"<script|<i>|<b>", page)


def test_any_run_id_can_be_drawn(tmp_path: Path) -> None:
    names: list[Any] = ["_hidden", "$x^2", "$\\frac{", "a" * 300, "two\nlines", "", "日本 €", {"an": "object"}, None]
    events = [[*header("x")[1:], {"event": "config", "run_id": name}, *training(4, 40), *ending("x")[:1]] for name in names]
    runs = [report.read_run(write(tmp_path / str(index), run)) for index, run in enumerate(events)]
    assert set(report.draw_all(runs)) == PNG_FILES
    assert [run.label for run in runs[-2:]] == ['{"an": "object"}', str(len(names) - 1)]


@pytest.mark.parametrize("value", ["text", None, True, [1], {"a": 1}, 10**400, -1, math.inf, math.nan])
def test_wrong_types_never_break_a_report(tmp_path: Path, value: Any) -> None:
    events = [{key: value if key not in ("event", "step") else kept for key, kept in event.items()} for event in whole_run("a")]
    runs, _ = report.read_runs([write(tmp_path / "a", events), write(tmp_path / "b", whole_run("b"))])
    assert cells(report.page_html(runs, {}, []), "status")[1] == "finished"


def test_plots_of_wrong_types_are_drawn(tmp_path: Path) -> None:
    wrong: list[Event] = [{"train_loss": -1, "train_seconds": -1, "order": 1}, {"bytes_total": 0}, {"roles": [1, {"role": 2}]}]
    events = [[{**event, **bad} for event in whole_run("a")] for bad in wrong]
    runs = [report.read_run(write(tmp_path / str(index), run)) for index, run in enumerate(events)]
    assert set(report.draw_all(runs)) == PNG_FILES | FRONTIER_FILES
    assert set(report.draw_all(runs[:1])) == PNG_FILES


def test_runs_are_compared(tmp_path: Path) -> None:
    better = whole_run("better", floor=3.0, val_bpb=1.2, settings={"MATRIX_LR": 0.03})
    folders = write(tmp_path / "a", whole_run("base", settings={"MATRIX_LR": 0.02})), write(tmp_path / "b", better)
    page = page_of(*folders, folders[0])
    assert "2 runs compared" in page
    assert cells(page, "final score") == ["1.2244", "1.2000"]
    assert cells(page, "behind the best") == ["+0.0244", "+0.0000"]
    differing = page[page.index("Settings that differ") : page.index("<details><summary>All")]
    assert cells(differing, "MATRIX_LR") == ["0.02", "0.03"]
    assert "FINAL_EVAL" not in differing and "RUN_ID" not in differing
    assert 'class="notices"' not in page


@pytest.mark.parametrize(
    ("settings", "end", "message"),
    [
        ({"DATA_PATH": "data/other"}, {}, "differ in DATA_PATH"),
        ({"FINAL_EVAL": "chunked"}, {}, "differ in FINAL_EVAL"),
        ({}, {"scored_bytes": 4_000_000}, "different amounts of text (4,000,000, 5,000,000 bytes)"),
    ],
)
def test_scores_that_cannot_be_compared_are_not_ranked(tmp_path: Path, settings: Event, end: Event, message: str) -> None:
    folders = write(tmp_path / "a", whole_run("a")), write(tmp_path / "b", whole_run("b", settings=settings, **end))
    page = page_of(*folders)
    assert message in page
    assert "behind the best" not in page and '<td class="best">' not in page


def test_same_run_id_is_told_apart_by_folder(tmp_path: Path) -> None:
    runs, _ = report.read_runs([write(tmp_path / "a", whole_run("same")), write(tmp_path / "b", whole_run("same"))])
    assert [run.label for run in runs] == [f"same ({tmp_path / 'a'})", f"same ({tmp_path / 'b'})"]


def test_bad_folders_are_named_once_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.jsonl").write_bytes(b"\x00\xff\n{}\n")
    assert report.main([str(tmp_path / name) for name in ("missing", "empty", "foreign")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    for line, words in zip(lines, ("missing: no such folder", "empty: not a run folder", "run.jsonl: not a run"), strict=True):
        assert words in line


def test_good_folders_are_reported_beside_bad_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(tmp_path / "missing", write(tmp_path / "a", whole_run("good")))
    assert "Not reported: " in page and "no such folder" in page
    assert cells(page, "final score") == ["1.2244"]
    monkeypatch.setattr(report, "draw_all", lambda runs: {})
    assert report.main([str(tmp_path / "missing"), str(tmp_path / "a"), "--output", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert report.main([str(write(tmp_path / "a", header("a"))), "--output", str(tmp_path / "file")]) == 2
    assert f"cannot write: [Errno 17] File exists: '{tmp_path / 'file'}'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Several runs: what their settings changed, and what their scores took


def run_of(folder: Path, run_id: str, val_bpb: float, result: Event | None = None, bytes_total: int = 15_900_000, **settings: Any) -> report.Run:
    return report.read_run(write(folder / run_id, scored(run_id, val_bpb, settings, result, bytes_total)))


def test_differences_are_paired_by_seed_and_named_by_the_settings_that_differ(tmp_path: Path) -> None:
    base = [run_of(tmp_path, f"base{seed}", score, SEED=seed, MATRIX_LR=0.02) for seed, score in ((1, 1.20), (2, 1.22), (3, 1.21))]
    # Unpaired, the high rate would look worse: it lacks the seed that is best of all.
    high = [run_of(tmp_path, f"high{seed}", score, SEED=seed, MATRIX_LR=0.04) for seed, score in ((2, 1.218), (3, 1.206))]
    single = [run_of(tmp_path, "single", 1.25, SEED=1, MATRIX_LR=0.02, EMA_DECAY=0.9)]
    other_seed = [run_of(tmp_path, "other", 1.1, SEED=9, MATRIX_LR=0.08)]
    label, found = report.differences([*base, *high, *single, *other_seed])
    assert label == "EMA_DECAY=not recorded, MATRIX_LR=0.02"
    assert [difference.label for difference in found] == ["MATRIX_LR=0.04", "EMA_DECAY=0.9"]
    assert found[0].values == pytest.approx([-0.002, -0.004]) and found[1].values == pytest.approx([0.05])
    assert found[0].mean == pytest.approx(-0.003) and found[0].error == pytest.approx(0.001)
    assert math.isnan(found[1].error)
    page = report.page_html([*base, *high, *single], {}, [])
    assert cells(page, "MATRIX_LR=0.04") == ["-0.003000", "0.001000", "2"]
    assert cells(page, "EMA_DECAY=0.9") == ["+0.050000", "—", "1"]


def test_runs_of_one_seed_and_configuration_count_as_their_mean(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, name, score, MATRIX_LR=rate) for name, score, rate in (("a", 1.2, 1), ("b", 1.3, 1), ("c", 1.2, 2))]
    assert report.differences(runs)[1][0].values == pytest.approx([-0.05])


def test_what_only_says_where_a_run_lies_makes_no_configuration(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, f"r{seed}", 1.2, SEED=seed, RUNS_DIR=f"runs{seed}", TRAIN_LOG_EVERY=seed) for seed in (1, 2)]
    assert len(report.configurations(runs)) == 1
    assert report.differences(runs) == ("", [])


def test_a_preset_names_its_configuration_and_many_settings_are_counted(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, name, 1.2, PRESET=name, A=value, B=value, C=value) for name, value in (("small", 1), ("large", 2))]
    assert report.differences(runs)[1][0].label == "PRESET=large, A=2, B=2 and 1 more"


@pytest.mark.parametrize("settings", [{"DATA_PATH": "other"}, {"FINAL_EVAL": "chunked"}])
def test_scores_that_cannot_be_compared_are_neither_subtracted_nor_plotted(tmp_path: Path, settings: Event) -> None:
    runs = [run_of(tmp_path, "a", 1.2, MATRIX_LR=1), run_of(tmp_path, "b", 1.3, MATRIX_LR=2, **settings)]
    assert report.differences(runs) == ("", [])
    assert not (FRONTIER_FILES | {"differences.png"}) & set(report.draw_all(runs))
    assert "Score against" not in report.page_html(runs, {}, [])


def test_times_of_different_hardware_are_not_plotted(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, "a", 1.2), run_of(tmp_path, "b", 1.3, result={"device": "NVIDIA H100"})]
    assert set(report.draw_all(runs)) & FRONTIER_FILES == {"score_against_bytes.png"}


def test_frontier_is_the_best_score_that_each_size_allows() -> None:
    sizes = [(3, 1.2), (1, 1.5), (2, 1.6), (4, 1.2), (5, 1.1), (1, 1.4)]
    points = [report.Point(x, score, "", "black") for x, score in sizes]
    best = report.frontier([*points, report.Point(0, 1.0, "over the cap", "black", ranked=False)])
    assert [(point.x, point.score) for point in best] == [(1, 1.4), (3, 1.2), (5, 1.1)]


def test_run_frontier_draws_each_run_the_cap_and_the_line(tmp_path: Path) -> None:
    numbers = (("a", 1.3, 14_000_000), ("b", 1.2, 15_000_000), ("over", 1.1, 17_000_000))
    runs = [run_of(tmp_path, name, score, bytes_total=size) for name, score, size in numbers]
    figure = report.draw_against_bytes(runs)
    assert figure
    axes = figure.axes[0]
    points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])): line for line in axes.lines if line.get_marker() == "o"}
    assert set(points) == {(14_000_000, 1.3), (15_000_000, 1.2), (17_000_000, 1.1)}
    assert [line.get_markerfacecolor() == "white" for line in points.values()] == [False, False, True]
    step = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(zip(step.get_xdata(), step.get_ydata(), strict=True)) == [(14_000_000, 1.3), (15_000_000, 1.2), (15_000_000, 1.2)]
    written = [text.get_text() for text in axes.texts]
    assert written == ["cap 16,000,000", "a", "b", "over"]


def test_labels_that_would_cover_another_are_left_out() -> None:
    points = [report.Point(1 + 1e-9 * index, 1.2, f"a label of some length {index}", "black") for index in range(20)]
    figure = report.draw_frontier([*points, report.Point(2, 1.3, "alone", "black")], "x")
    assert figure
    report.label_points(figure, [*points, report.Point(2, 1.3, "alone", "black")])
    written = [text.get_text() for text in figure.axes[0].texts]
    assert "alone" in written and points[0].label in written and len(written) < 8
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])


def test_differences_are_drawn_with_their_standard_error() -> None:
    figure = report.draw_differences("base", [report.Difference("two", [0.01, 0.03]), report.Difference("one", [-0.02])])
    assert figure
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.02, -0.02])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["two", "one"]
    assert [text.get_text() for text in axes.texts] == ["+0.0200 ± 0.0100   n = 2", "-0.0200   n = 1"]
    (error,) = [bars for bars in axes.containers if hasattr(bars, "has_xerr")]
    low, high = error[2][0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx((0.01, 0.03))
    assert report.draw_differences("base", []) is None


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(b"old")

    def full_disk(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:3])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="disk full"):
        report.write_file(path, b"new content")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [[], ["--table", "run"], ["--import", "x", "run"], ["--table", "--output", "x"]])
def test_command_line_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err
