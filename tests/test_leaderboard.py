"""records/leaderboard.py: every shape of record folder becomes a row or a reason; what is compared with what; the table of records/README.md."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import leaderboard
import pytest
import report
from leaderboard import Record

Content = dict[str, Any]
FULL: Content = {"name": "Full", "author": "A", "date": "2026-04-01T10:00:00Z", "val_bpb": 1.2, "bytes_total": 15_000_000, "wallclock_seconds": 599.5}
LOG = """\
step:13200/20000 val_loss:2.0 val_bpb:9.9999 train_time:574747ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
Total submission size: 67272625 bytes
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
FRONTIER_LOG = """\
4000/20000 val_loss: 2.4200 val_bpb: 9.9999
stopping_early: wallclock_cap train_time: 599592ms step: 4945/20000
diagnostic quantized val_loss:2.34727563 val_bpb:9.9999 eval_time:49995ms
Total submission size quantized+pergroup: 15897259 bytes
quantized_ttt_phased val_loss:2.31944212 val_bpb:1.05989454 eval_time:508785ms
total_eval_time:520.5s
"""


def put(root: Path, name: str, submission: Content | str | bytes | None = None, track: str = "track_10min_16mb", **files: str) -> Path:
    """Returns a record folder with submission.json, and `files` whose names have `__` for the dot."""
    folder = root / "records" / track / name
    folder.mkdir(parents=True)
    if submission is not None:
        content = json.dumps(submission) if isinstance(submission, dict) else submission
        (folder / "submission.json").write_bytes(content.encode() if isinstance(content, str) else content)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Record]:
    """A function that makes a record folder and returns its row: read(submission, README__md="...")."""

    def make(submission: Content | str | bytes | None = None, name: str = "2026-03-19_Name", **files: str) -> Record:
        return leaderboard.read_record(put(tmp_path, name, submission, **files), f"records/track_10min_16mb/{name}", ours=False)

    return make


def unread_reason(tmp_path: Path) -> str:
    """Returns why the only folder is no row."""
    records, unread = leaderboard.read_checkout(tmp_path)
    assert records == [] and len(unread) == 1
    return unread[0].reason


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Where numbers come from


def test_a_complete_submission_is_a_row_as_it_states_it(read: Callable[..., Record]) -> None:
    record = read({**FULL, "val_bpb_std": 0.0004, "seeds": [1, 2, 3], "eval_time_seconds": 70})
    assert record == Record(
        folder="records/track_10min_16mb/2026-03-19_Name", track="10min_16mb", date="2026-04-01", name="Full", author="A", bpb=1.2, bpb_std=0.0004,
        seeds=3, bytes_total=15_000_000, train_seconds=599.5, eval_seconds=70,
    )  # fmt: skip


SEEDS = {
    "42": {"val_bpb": 1.10, "artifact_bytes": 100, "train_time_ms": 500_000, "eval_time_s": 10},
    "7": {"val_bpb": 1.12, "artifact_bytes": 300, "train_time_ms": 600_000, "eval_time_s": 30},
}


@pytest.mark.parametrize("seeds", [{"seed_results": SEEDS}, {"seeds": SEEDS}, {"seed_results": list(SEEDS.values())}])
def test_results_of_seeds_count_before_what_is_stated(read: Callable[..., Record], seeds: Content) -> None:
    record = read({"val_bpb": 1.1101, "bytes_total": 200, **seeds})
    assert (record.bpb, record.seeds, record.bytes_total) == (pytest.approx(1.11), 2, 300)
    assert (record.train_seconds, record.eval_seconds) == (pytest.approx(550), 20)
    assert record.bpb_std == pytest.approx(0.02 / math.sqrt(2))
    assert record.sources == dict.fromkeys(("bpb", "bytes_total", "train_seconds", "eval_seconds", "bpb_std"), "seeds")
    assert record.problems == []


def test_seeds_of_which_some_lack_a_number_do_not_give_its_mean(read: Callable[..., Record]) -> None:
    record = read({"val_bpb": 1.2, "seed_results": {"1": {"val_bpb": 1.1}, "2": {"val_bpb": "?"}}})
    assert record.bpb == 1.2 and "bpb" not in record.sources
    assert record.problems[0] == "val_bpb: ? is no number between 0.1 and 20"


def test_a_mean_that_is_not_that_of_its_seeds_is_said(read: Callable[..., Record]) -> None:
    record = read({"val_bpb": 1.1089, "seed_results": SEEDS})
    assert record.problems == ["val_bpb 1.10890 is not the mean of its seeds, 1.11000"]


def test_scores_of_seeds_may_be_a_list_of_numbers(read: Callable[..., Record]) -> None:
    record = read({"seed_scores": [1.1, 1.2], "eval_time_seconds": [83, 85]})
    assert (record.bpb, record.seeds, record.eval_seconds) == (pytest.approx(1.15), 2, 84)


def test_the_bytes_of_code_and_weights_of_a_seed_count_before_those_of_its_artifact(read: Callable[..., Record]) -> None:
    assert read({"seed_results": {"1": {"val_bpb": 1.1, "artifact_bytes": 900, "bytes_total": 1000}}}).bytes_total == 1000


@pytest.mark.parametrize(
    ("content", "column", "value"),
    [({"mean_val_bpb": 1.3}, "bpb", 1.3), ({"mean_bpb": 1.3}, "bpb", 1.3), ({"val_bpb": " 1.3 "}, "bpb", 1.3), ({"artifact_bytes": 9}, "bytes_total", 9),
     ({"artifact_bytes_max": 9, "artifact_bytes_mean": 8}, "bytes_total", 9), ({"artifact_size_bytes": 9}, "bytes_total", 9),
     ({"train_time_s_mean": 9}, "train_seconds", 9), ({"eval_time_s_mean": 9}, "eval_seconds", 9), ({"n_seeds": 3}, "seeds", 3), ({"seed": 1337}, "seeds", 1),
     ({"std_bpb": 0.001}, "bpb_std", 0.001)],
)  # fmt: skip
def test_every_name_that_a_number_has_had_is_known(read: Callable[..., Record], content: Content, column: str, value: float) -> None:
    record = read({**({} if column == "bpb" else {"val_bpb": 1.2}), **content})
    assert getattr(record, column) == value


def test_logs_fill_in_what_is_not_stated(read: Callable[..., Record]) -> None:
    record = read({"val_bpb": 1.2244}, train__log=LOG)
    assert (record.bpb, record.bytes_total, record.train_seconds, record.eval_seconds) == (1.2244, 15_863_489, 600.038, 1.401)
    assert record.sources == dict.fromkeys(("bytes_total", "train_seconds", "eval_seconds"), "logs")


def test_a_folder_without_submission_is_read_from_its_log(read: Callable[..., Record]) -> None:
    record = read(name="2026-03-19_int6_STE", train__log=LOG)
    assert (record.bpb, record.date, record.name) == (1.2243657, "2026-03-19", "2026-03-19_int6_STE")
    assert record.sources["bpb"] == "logs" and record.problems == ["no submission.json"]


def test_logs_of_seeds_give_the_mean_and_other_logs_beside_them_do_not_count(read: Callable[..., Record]) -> None:
    other = FRONTIER_LOG.replace("1.05989454", "1.06989454").replace("15897259", "15997259")
    record = read(train_seed1__log=FRONTIER_LOG, train_seed_2__txt=other, old__log=LOG)
    assert record.bpb == pytest.approx(1.06489454) and record.bytes_total == 15_997_259
    assert (record.train_seconds, record.eval_seconds) == (pytest.approx(599.592), 520.5)


@pytest.mark.parametrize("log", [LOG, FRONTIER_LOG])
def test_a_log_that_stops_before_the_artifact_gives_neither_score_nor_bytes(tmp_path: Path, read: Callable[..., Record], log: str) -> None:
    lines = [line for line in log.splitlines() if not re.match(r"Total submission size \S|final|quantized|total_eval", line)]
    record = read({"val_bpb": 1.2}, train__log="\n".join(lines))
    assert math.isnan(record.bytes_total) and record.train_seconds > 599
    put(tmp_path / "other", "2026-03-20_Unfinished", train__log="\n".join(lines))
    assert unread_reason(tmp_path / "other").startswith("no submission.json; no val_bpb in")


def test_of_several_logs_without_seeds_none_counts(read: Callable[..., Record]) -> None:
    record = read({"val_bpb": 1.2}, long__log=LOG, short__log=LOG)
    assert math.isnan(record.train_seconds)


def test_the_score_at_the_top_of_the_readme_counts_before_the_logs(read: Callable[..., Record]) -> None:
    record = read({"name": "x"}, README__md="# Title\n\n**val_bpb: 1.14276** (mean)\n", train__log=LOG)
    assert (record.bpb, record.sources["bpb"]) == (1.14276, "README.md")


def test_a_score_far_down_in_the_readme_is_that_of_another(tmp_path: Path) -> None:
    put(tmp_path, "2026-03-19_Name", {"name": "x"}, README__md="# Title\n" + "\n" * 40 + "val_bpb: 1.14276\n")
    assert "no val_bpb" in unread_reason(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize(
    ("submission", "reason"),
    [(None, "no submission.json"), ("", "submission.json: empty"), (" \n", "submission.json: empty"), ('{"val_bpb": 1.2', "submission.json: not valid JSON"),
     ("[" * 100_000, "submission.json: not valid JSON"), ('{"val_bpb": ' + "9" * 5000 + "}", "submission.json: not valid JSON"),
     ("[1.2]", "submission.json: expected an object, got list"), ("null", "submission.json: expected an object, got NoneType"), ("{}", "no val_bpb"),
     ('{"val_bpb": NaN}', "val_bpb: NaN is no number"), ('{"val_bpb": 1e999}', "val_bpb: Infinity is no number"),
     ('{"val_bpb": ' + "9" * 400 + "}", "is no number between 0.1 and 20"), ('{"val_bpb": -1}', "val_bpb: -1 is no number"),
     ('{"val_bpb": true}', "val_bpb: true is no number"), ('{"val_bpb": {"mean": 1}}', 'val_bpb: {"mean": 1} is no number'),
     ('{"val_bpb": []}', "val_bpb: [] is no number"), (b"\xff\xfe{\x00}\x00", "submission.json: not UTF-8; what could not be read is replaced; ")],
)  # fmt: skip
def test_a_folder_without_a_score_is_listed_with_the_reason(tmp_path: Path, submission: str | bytes | None, reason: str) -> None:
    put(tmp_path, "2026-03-19_Name", submission)
    assert reason in unread_reason(tmp_path)


@pytest.mark.parametrize("value", ["text", True, [1], {"a": 1}, 10**400, -1, math.inf, math.nan, None, "", [], ["x"], [{}], "\ud800", 0, 1e300])
def test_wrong_types_anywhere_never_stop_the_import(tmp_path: Path, value: Any) -> None:
    numbers = [key for quantity in leaderboard.QUANTITIES.values() for key in quantity.keys]
    texts = "name author github_id date blurb techniques seeds seed_results n_seeds val_bpb_std".split()
    put(tmp_path, "2026-03-19_Wrong", {**dict.fromkeys([*texts, *numbers], value), "val_bpb": 1.2})
    put(tmp_path, "2026-03-20_Good", FULL)
    records, unread = leaderboard.read_checkout(tmp_path)
    assert [record.bpb for record in records] == [1.2, 1.2] and unread == []
    json.loads(leaderboard.as_json(records, unread))
    assert leaderboard.page_html(records, unread, {}, "x").count("<tr><th scope") >= 2


def test_not_utf8_is_still_read_and_said(read: Callable[..., Record]) -> None:
    record = read(b'\xef\xbb\xbf{"name": "caf\xc3\xa9", "val_bpb": 1.2}')
    assert (record.name, record.problems) == ("café", [])
    record = read(b'{"name": "caf\xe9", "val_bpb": 1.2}', name="2026-03-20_Latin")
    assert (record.name, record.bpb) == ("caf\ufffd", 1.2) and "not UTF-8" in record.problems[0]


def test_a_submission_of_another_name_counts_if_it_is_the_only_one(read: Callable[..., Record]) -> None:
    assert read(submission_ternary__json='{"val_bpb": 1.2}').bpb == 1.2
    record = read(name="2026-03-20_Two", submission_a__json='{"val_bpb": 1.2}', submission_b__json='{"val_bpb": 1.3}', train__log=LOG)
    assert record.sources["bpb"] == "logs" and record.problems == ["no submission.json, but submission_a.json, submission_b.json"]


def test_empty_files_and_numbers_over_the_cap_are_said(read: Callable[..., Record]) -> None:
    record = read({**FULL, "bytes_total": 16_000_001}, train_gpt__py="")
    assert record.problems == ["16,000,001 bytes are over the cap of 16,000,000", "train_gpt.py: empty"] and not record.ranked


def test_links_out_of_the_records_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "submission.json").write_text(json.dumps(FULL))
    (outside / "train.log").write_text(LOG)
    folder = put(tmp_path / "checkout", "2026-03-19_Files")
    for name in ("submission.json", "train.log"):
        (folder / name).symlink_to(outside / name)
    (folder.parent / "2026-03-20_Folder").symlink_to(outside)
    (folder.parent / "2026-03-21_Nowhere").symlink_to(outside / "missing")
    (folder.parent / "2026-03-22_Loop").symlink_to(folder.parent / "2026-03-22_Loop")
    put(tmp_path / "checkout", "2026-03-23_Inside", None)
    (folder.parent / "2026-03-23_Inside" / "first.json").write_text(json.dumps(FULL))
    (folder.parent / "2026-03-23_Inside" / "submission.json").symlink_to("first.json")
    records, unread = leaderboard.read_checkout(tmp_path / "checkout")
    assert [record.name for record in records] == ["Full"]
    assert "submission.json: a link that leads out of the folder; train.log: a link that leads out of the folder" in unread[0].reason
    assert [each.reason for each in unread[1:3]] == ["a link that leads out of the records"] * 2
    assert unread[3].folder.endswith("Loop")


def test_a_file_too_large_or_none_at_all_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Record]) -> None:
    monkeypatch.setattr(leaderboard, "MOST_BYTES", 200)
    record = read({"val_bpb": 1.2}, train__log=LOG)
    assert math.isnan(record.train_seconds) and record.problems == [f"train.log: {len(LOG)} bytes, more than the 200 that a file of a record may have"]
    folder = put(tmp_path, "2026-03-20_Pipe", {"val_bpb": 1.2})
    os.mkfifo(folder / "README.md")
    assert leaderboard.read_record(folder, "pipe", ours=False).problems == ["README.md: not a file"]


def test_a_place_without_records_is_refused_with_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        assert report.main(["--import", str(place), "--output", str(tmp_path / "out")]) == 2
        assert "git clone https://github.com/openai/parameter-golf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dates_come_from_the_submission_or_else_from_the_folder(read: Callable[..., Record]) -> None:
    assert read({**FULL, "date": "yesterday"}).date == "2026-03-19"
    assert read({**FULL, "date": 20260319}, name="Name").date == ""
    assert read({**FULL, "date": "2026-02-30"}, name="2026-02-28_Name").date == "2026-02-28"


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Techniques


@pytest.mark.parametrize(
    ("text", "expected"),
    [("LegalTTT_ParallelMuon", {"test-time training", "parallel Muon"}), ("FP16Embed_WD3600", {"16-bit embedding"}), ("MuonWD04", {"Muon weight decay"}),
     ("GPTQ-lite + EMA", {"GPTQ-lite", "weight averaging (EMA)"}), ("Full GPTQ, schema", {"GPTQ"}), ("no SmearGate + SwiGLU", {"SwiGLU"}),
     ("11L without TTT, XSA-all", {"exclusive self-attention (XSA)"}), ("SP8192 CaseOps", {"vocabulary of 8192", "CaseOps"}), ("orthogonalised updates", set()),
     ("LeakyReLU², Loop45x2", {"leaky ReLU squared", "depth recurrence"}), ("plain baseline", set())],
)  # fmt: skip
def test_techniques_are_what_a_text_claims(text: str, expected: set[str]) -> None:
    assert set(leaderboard.techniques_in(text)) == expected


def test_techniques_are_found_in_every_summary_but_not_in_the_body_of_the_readme(read: Callable[..., Record]) -> None:
    content = {"val_bpb": 1.2, "blurb": "SmearGate", "techniques": ["QAT", "U-Net skips"], "technique_summary": "SwiGLU"}
    record = read(content, name="2026-03-19_LQER", README__md="# With CaseOps\n\nRemoved BigramHash. TTT did not help.\n")
    assert record.techniques == [
        "quantisation-aware training", "low-rank quantisation error (LQER)", "SmearGate", "U-Net skips", "SwiGLU", "CaseOps",
    ]  # fmt: skip


def test_technique_use_by_week(tmp_path: Path) -> None:
    made = [("2026-03-16", "TTT"), ("2026-03-22", "XSA"), ("2026-03-23", "TTT + XSA"), ("2026-03-24", "XSA"), ("", "QAT")]
    records = [Record(str(index), date=day, name=name, bpb=1.2, techniques=leaderboard.techniques_in(name)) for index, (day, name) in enumerate(made)]
    assert {monday: len(week) for monday, week in leaderboard.weeks(records).items()} == {date(2026, 3, 16): 2, date(2026, 3, 23): 2}
    used = leaderboard.uses(records)
    assert {technique: len(users) for technique, users in used.items()} == {"test-time training": 2, "exclusive self-attention (XSA)": 3}
    figure = leaderboard.draw_techniques(records)
    assert figure
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[0.5, 0.5], [0.5, 1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(used)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16 Mar\nn = 2", "23 Mar\nn = 2"]
    assert leaderboard.draw_techniques(records[4:]) is None


# ---------------------------------------------------------------------------------------------------------------------------------------------
# Page, plots, tables


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that adds a record of ours to a stand-in for this repository; `whole_split` is what was found of the text that it scored."""
    readme = tmp_path / "ours" / "records" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text("# Records\n\n<!-- records -->\nold\n<!-- /records -->\n\nend\n", encoding="utf-8")
    monkeypatch.setattr(leaderboard, "README", readme)

    def add(folder_name: str, whole_split: bool | None = None, **content: Any) -> None:
        compliance = {"full_validation_split": {"holds": whole_split, "how": "50,000 documents"}}
        put(tmp_path / "ours", folder_name, {**FULL, "compliance": compliance, **content})

    return add


def imported(tmp_path: Path, code: int = 0) -> str:
    """Returns the page of an import of tmp_path."""
    assert report.main(["--import", str(tmp_path), "--output", str(tmp_path / "out")]) == code
    return (tmp_path / "out" / "leaderboard.html").read_text(encoding="utf-8")


def test_import_writes_page_plots_and_tables_of_everything(tmp_path: Path, own: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "2026-03-19_First_SwiGLU", {**FULL, "name": "First", "date": "2026-03-19"}, train__log=LOG)
    put(tmp_path, "2026-04-01_Second", {**FULL, "name": "Second", "val_bpb": 1.1, "bytes_total": 15_900_000}, train__log=FRONTIER_LOG)
    put(tmp_path, "2026-04-02_Empty", "")
    page = imported(tmp_path, code=1)
    printed = capsys.readouterr()
    files = {"leaderboard.html", "records.csv", "records.json", *(chart.file for chart in leaderboard.CHARTS)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert printed.out.splitlines()[0] == "2 public records and 0 of ours read, 1 not; 0 problems in those read, listed on the page"
    assert set(printed.out.splitlines()[1:]) == {str(tmp_path / "out" / name) for name in files}
    assert printed.err.startswith("report.py: records/track_10min_16mb/2026-04-02_Empty: submission.json: empty; no val_bpb in ")
    assert page.count('src="data:image/png;base64,') == len(leaderboard.CHARTS)
    assert not re.search(r"<script|<link|@import|url\(|src=\"http", page)
    assert "Best of the ten-minute track: 1.1000 bits per byte (Second, 2026-04-01)." in page
    assert "1 folders could not be read" in page and "submission.json: empty; no val_bpb" in page
    content = json.loads((tmp_path / "out" / "records.json").read_text(encoding="utf-8"))
    assert [record["name"] for record in content["records"]] == ["First", "Second"] and content["unread"][0]["folder"].endswith("Empty")
    assert content["records"][0]["bpb_std"] is None and content["records"][0]["sources"] == {"eval_seconds": "logs"}
    with open(tmp_path / "out" / "records.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["bpb"], row["bpb_std"], row["techniques"], row["sources"]) for row in rows] == [
        ("First", "1.2", "", "SwiGLU", "eval_seconds=logs"), ("Second", "1.1", "", "", "eval_seconds=logs"),
    ]  # fmt: skip


def test_everything_from_files_is_escaped(tmp_path: Path, own: Callable[..., None]) -> None:
    evil = '<script>alert("1")</script>'
    put(tmp_path, '2026-03-19_"><b>', {"val_bpb": 1.2, "name": evil, "author": evil, "date": evil, "blurb": evil}, evil__py="")
    put(tmp_path, "2026-03-19_<i>", {"val_bpb": evil})
    page = imported(tmp_path, code=1)
    assert "&lt;script&gt;" in page and not re.search(r'<script|<i>|<b>|"><b', page)
    assert 'href="https://github.com/openai/parameter-golf/tree/main/records/track_10min_16mb/2026-03-19_%22%3E%3Cb%3E"' in page


def test_ours_share_a_plot_only_where_they_scored_the_same_text(tmp_path: Path, own: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[str]] = {}
    put(tmp_path, "2026-03-19_Public", {**FULL, "name": "Public"})
    own("2026-04-03_Same", whole_split=True, name="Same")
    own("2026-04-03_Demo", whole_split=False, name="Demo", val_bpb=0.5)
    own("2026-04-03_Unknown", whole_split=None, name="Unknown", val_bpb=0.4)
    own("2026-04-03_Silent", name="Silent", val_bpb=0.3, compliance={"full_validation_split": True})
    charts = [chart._replace(draw=lambda records, file=chart.file: drawn.update({file: [r.name for r in records]})) for chart in leaderboard.CHARTS[:4]]
    monkeypatch.setattr(leaderboard, "CHARTS", charts)
    page = imported(tmp_path)
    assert drawn == {chart.file: ["Public", "Same"] for chart in charts}
    above, apart = page.split("<h2>Ours, on other text</h2>")
    assert "ours: Same" in above and "ours: Demo" not in above and "Best of the ten-minute track: 1.2000" in above
    assert "ours: Demo" in apart and "ours: Unknown" in apart and "ours: Silent" in apart and "can be compared with each other" in apart


def test_history_draws_the_best_so_far_of_the_ten_minute_track() -> None:
    made = [("2026-03-19", 1.2, "10min_16mb"), ("2026-03-25", 1.3, "10min_16mb"), ("2026-04-01", 1.1, "10min_16mb"), ("2026-03-20", 1.05, "non_record_16mb"),
            ("2026-03-21", 2.0, "non_record_16mb")]  # fmt: skip
    records = [Record(f"r{index}", date=day, bpb=bpb, track=track, bytes_total=1) for index, (day, bpb, track) in enumerate(made)]
    figure = leaderboard.draw_scores(records, leaderboard.day_number, leaderboard.set_date_axis)
    assert figure
    axes = figure.axes[0]
    line = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert list(line.get_ydata()) == [1.2, 1.1, 1.1]
    hollow = [float(line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "white" and len(line.get_ydata())]
    assert hollow == [1.05]
    assert "↑ 1 more above" in [text.get_text() for text in axes.texts]


def test_seconds_are_drawn_with_the_limit_of_the_track() -> None:
    records = [Record(f"r{seconds}", bpb=1.2, track="10min_16mb", train_seconds=seconds) for seconds in (590.0, 14_400.0)]
    figure = leaderboard.draw_scores(records, lambda record: record.train_seconds, lambda axes: leaderboard.set_seconds_axis(axes, "training"))
    assert figure
    assert figure.axes[0].texts[0].get_text() == "limit of the ten-minute track: 600 s"
    assert figure.axes[0].get_xscale() == "log"


def test_a_number_that_is_in_no_json_is_marked_with_its_source() -> None:
    record = Record("f", bpb=1.2, train_seconds=599.9, sources={"bpb": "README.md", "train_seconds": "logs", "eval_seconds": "seeds"})
    cells = re.findall(r"<td>(.*?)</td>", leaderboard.record_html(record))
    assert cells[2] == "1.20000<sup>readme</sup>" and cells[6] == "599.9<sup>log</sup>" and "sup" not in cells[5]


# ---------------------------------------------------------------------------------------------------------------------------------------------
# The table of records/README.md


def test_table_of_our_records_is_written_between_its_markers(tmp_path: Path, own: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    own("2026-04-02_Demo [x]", whole_split=False, name="Demo | [x]", val_bpb=1.8, seeds=[1, 2])
    own("2026-04-03_Best", whole_split=True, name="Best", val_bpb_std=0.0004, eval_time_seconds=501.25)
    assert report.main(["--table"]) == 0
    readme = leaderboard.README.read_text(encoding="utf-8")
    assert readme.startswith("# Records\n\n<!-- records -->\n| record |") and readme.endswith("|\n<!-- /records -->\n\nend\n")
    assert readme.splitlines()[5:7] == [
        "| [Best](track_10min_16mb/2026-04-03_Best) | 2026-04-01 | 10min_16mb | 1.20000 ± 0.00040 | — | 15,000,000 | 599.5 s | 501.2 s | "
        "the challenge's validation split |",
        "| [Demo \\| \\[x\\]](track_10min_16mb/2026-04-02_Demo%20%5Bx%5D) | 2026-04-01 | 10min_16mb | 1.80000 | 2 | 15,000,000 | 599.5 s | — s | "
        "other: comparable only with each other |",
    ]
    assert report.main(["--table"]) == 0
    assert leaderboard.README.read_text(encoding="utf-8") == readme


def test_table_is_left_as_it_is_where_a_record_cannot_be_read_or_a_marker_is_gone(
    tmp_path: Path, own: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    before = leaderboard.README.read_bytes()
    put(tmp_path / "ours", "2026-04-02_Broken", "{")
    assert report.main(["--table"]) == 2
    assert "2026-04-02_Broken: submission.json: not valid JSON" in capsys.readouterr().err and leaderboard.README.read_bytes() == before
    leaderboard.README.write_text("# Records\n<!-- records -->\n")
    assert report.main(["--table"]) == 2
    assert "has lost the lines" in capsys.readouterr().err and leaderboard.README.read_text() == "# Records\n<!-- records -->\n"


def test_the_committed_table_is_current() -> None:
    records, unread = leaderboard.own_records()
    assert unread == []
    readme = leaderboard.README.read_text(encoding="utf-8")
    assert leaderboard.with_table(readme, records) == readme, "run: python records/report.py --table"
