"""records/submit.py: what a record folder holds, that it scores again, and what is refused, with every reason at once.

Most tests give a damaged copy of a real run to a stand-in for the scoring, which answers with the logged scores; those that need the packed script to run
say so in their names.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import lzma
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
import report
import shards
import submit
from conftest import ROOT, Ended, Finished, clean_environment
from rich.console import Console

import train_gpt

Event = dict[str, Any]
Change = Callable[[Event], None]

SEEDS = (1337, 7, 8)
BY = ("--name", "A name", "--author", "An Author", "--github-id", "author", "--date", "2026-05-01")
RECORD, OTHER = "10min_16mb", "non_record_16mb"
TARGET = "2026-05-01_A_name"

# Each takes a second for the whole script, and answers the same every time.
PACK, TREE, UNPACK = functools.cache(train_gpt.pack_script), functools.cache(submit.bare_tree), functools.cache(submit.unpack_script)
REQUIREMENTS = functools.cache(submit.requirements)


@pytest.fixture(autouse=True)
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs and parses the script once for all tests, and looks at no environment of a user."""
    monkeypatch.setattr(train_gpt, "pack_script", PACK)
    monkeypatch.setattr(submit, "bare_tree", TREE)
    monkeypatch.setattr(submit, "unpack_script", UNPACK)
    monkeypatch.setattr(submit, "requirements", REQUIREMENTS)
    for name in (*train_gpt.SETTINGS, *submit.LAUNCHER_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def originals(run_here: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run folders of three seeds, each of two steps, audited."""
    place = tmp_path_factory.mktemp("originals")
    for seed in SEEDS:
        ended = run_here(place, RUN_ID=f"seed{seed}", SEED=seed, ITERATIONS=2, WARMUP_STEPS=0, AUDIT=1)
        assert ended.code == 0, ended.errors
    return [place / "runs" / f"seed{seed}" for seed in SEEDS]


@pytest.fixture
def runs(originals: list[Path], tmp_path: Path) -> list[Path]:
    """Copies of them that a test may damage."""
    return [Path(shutil.copytree(folder, tmp_path / "runs" / folder.name)) for folder in originals]


@pytest.fixture(scope="module")
def published(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of the runs, with the manifest that download.py writes."""
    folder = tmp_path_factory.mktemp("published") / corpus.name
    shutil.copytree(corpus, folder)
    shard = folder / "fineweb_val_000000.bin"
    tokens = shards.check_shard(shard)
    entry = {"file": shard.name, "tokens": tokens, "sha256": submit.file_digest(shard)}
    manifest = {
        "source": {"repo_id": "someone/something", "commit": "c", "variant": "sp384", "published": {"train": {"shards": 2}, "val": {"tokens": tokens}}},
        "tokenizer": {"bos_id": 1},
        "splits": {"val": {"shards": [entry]}, "train": {"shards": []}},
    }
    (folder / shards.MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def edit(folder: Path, *changes: Change) -> None:
    """Changes the events of a run, and its result.json as the result event."""
    path = folder / "run.jsonl"
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for event in events:
        for change in changes:
            change(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    result = {key: value for key, value in events[-1].items() if key not in ("event", "time")}
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def with_values(kind: str, **values: Any) -> Change:
    """Returns a change of some values of the events of a kind."""
    return lambda event: event.update(values) if event["event"] == kind else None


def with_setting(folder: Path, name: str, value: Any) -> None:
    """Changes one setting of a run wherever it stands."""
    edit(folder, lambda event: event["settings"].update({name: value}) if event["event"] == "config" else None)
    path = folder / "config.env"
    lines = [f"{name}={train_gpt.format_value(value)}" if line.startswith(f"{name}=") else line for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def as_if_on_h100(folder: Path) -> None:
    """Makes a run one of eight H100s."""
    place: Event = {"world_size": 8, "device": "cuda"}
    edit(folder, with_values("env", **place, device_name="NVIDIA H100 80GB HBM3"), with_values("result", **place))


@pytest.fixture
def record_runs(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three runs that meet every rule of a record with the text `published`."""
    for folder in runs:
        as_if_on_h100(folder)
    monkeypatch.setattr(submit, "VAL_DOCUMENTS", 40)
    return runs


AUDIT_NOTES = [f"{beginning}: found" for beginning in submit.AUDITED]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a stand-in at the place of scoring: it adds `bpb` to the logged scores, and has found what `audit` says."""
    given: dict[str, Any] = {"bpb": 0.0, "audit": AUDIT_NOTES, "scored": []}

    def score(folder: Path, seed: submit.Seed, artifact: Path, data: submit.Data, console: Console) -> submit.Rescored:
        given["scored"].append(seed.number)
        assert (folder / "train_gpt.py").is_file() and artifact.is_file()
        scores = {name: {**event, "val_bpb": event["val_bpb"] + given["bpb"]} for name, event in report.mapping(seed.run.result, "scores").items()}
        return submit.Rescored(scores, report.text(seed.run.env, "device"), "1 x stand-in", 1.0, given["audit"])

    monkeypatch.setattr(submit, "score_again", score)
    return given


class Outcome:
    """How submit.py ended."""

    def __init__(self, code: int, output: str, errors: str, place: Path) -> None:
        self.code, self.output, self.place = code, " ".join(output.split()), place
        self.obstacles = re.findall(r"^ *\d+\. (.*\n    expected: .*\n    mend:     .*)$", errors, re.MULTILINE)
        self.errors = errors

    @property
    def folder(self) -> Path:
        """The record folder."""
        assert self.code == 0, self.errors
        (folder,) = (path for track in self.place.iterdir() for path in track.iterdir())
        return folder

    @property
    def submission(self) -> dict[str, Any]:
        return json.loads((self.folder / "submission.json").read_text(encoding="utf-8"))

    @property
    def readme(self) -> str:
        return (self.folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A function that submits runs: make(runs, "--track", ...)."""

    def call(folders: list[Path], *words: str | Path, track: str = OTHER, by: tuple[str, ...] = BY) -> Outcome:
        capsys.readouterr()
        place = tmp_path / "records"
        code = submit.main([*map(str, folders), "--track", track, *by, "--output", str(place), *map(str, words)])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, place)

    return call


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """A function that checks a record folder."""

    def call(folder: Path, *words: str | Path) -> Outcome:
        capsys.readouterr()
        code = submit.main(["--check", str(folder), *map(str, words)])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err, tmp_path / "records")

    return call


def refused(outcome: Outcome, *reasons: str) -> None:
    """Asserts that a submission was refused for exactly these reasons, in this order, and that nothing was written."""
    assert outcome.code == 1, outcome.output
    assert len(outcome.obstacles) == len(reasons), outcome.errors
    for obstacle, reason in zip(outcome.obstacles, reasons, strict=True):
        assert re.search(reason, obstacle), obstacle
    assert not outcome.place.exists()


# ----------------------------------------------------------------------------------------------------------------------
# The packed script, really run


def test_a_made_folder_scores_its_artifact_to_the_last_digit_by_its_own_readme_and_passes_its_check(
    runs: list[Path], corpus: Path, make: Callable[..., Outcome], check: Callable[..., Outcome], tmp_path: Path
) -> None:
    made = make(runs[:1])
    folder, bpb = made.folder, result_of(runs[0])["val_bpb"]
    assert made.submission["rescored"]["1337"]["scores"]["sliding"]["val_bpb"] == bpb == made.submission["val_bpb"]
    assert "equal to the last digit" in made.readme
    assert submit.is_audited(made.submission["rescored"]["1337"]["audit"])
    (line,) = (line.strip() for line in made.readme.splitlines() if "STAGES=eval" in line)
    words = [word for word in shlex.split(line) if not word.startswith(("DATA_PATH=", "TOKENIZER_PATH="))]
    assert words[0] == "python"
    before = {path.name: submit.file_digest(path) for path in folder.iterdir()}
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    command = [sys.executable, *words[1:], f"DATA_PATH={corpus}", f"TOKENIZER_PATH={corpus / 'tokenizer.model'}", f"RUNS_DIR={tmp_path / 'again'}"]
    subprocess.run(command, cwd=moved, env=clean_environment(), check=True, capture_output=True, timeout=120)
    assert result_of(tmp_path / "again" / "scored")["val_bpb"] == bpb
    assert {path.name: submit.file_digest(path) for path in moved.iterdir()} == before
    assert check(moved, "--skip-rescoring").code == 0


def test_scoring_finds_out_the_artifact_of_another_run_that_everything_else_agrees_with(runs: list[Path], make: Callable[..., Outcome]) -> None:
    other = (runs[1] / "artifact.bin").read_bytes()
    (runs[0] / "artifact.bin").write_bytes(other)
    total = len(other) + result_of(runs[0])["bytes_code"]
    refused(make(runs[:1]), "bytes, and the run wrote", "not the bytes that the run wrote")
    sizes = {"bytes_model": len(other), "bytes_total": total}
    edit(runs[0], with_values("export", **sizes, artifact_sha256=hashlib.sha256(other).hexdigest()), with_values("result", **sizes))
    with open(runs[0] / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"{total:,}\n")
    refused(make(runs[:1]), r"the chunked evaluation of its artifact gives [\d.]+ bpb, and the log says", "the sliding evaluation of its artifact gives")


def test_a_run_of_two_ranks_by_a_packed_script_scores_again_under_torchrun(
    two_ranks: Finished, make: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "ranks_here", lambda seed: 2)
    made = make([two_ranks.folder])
    again = made.submission["rescored"]["1337"]
    assert again["machine"].startswith("2 x ")
    assert again["scores"]["sliding"]["val_bpb"] == pytest.approx(two_ranks.result()["val_bpb"], abs=submit.ROUNDING_BPB)
    assert made.submission["bytes_code"] == two_ranks.result()["bytes_code"] == (made.folder / "train_gpt.py").stat().st_size


def test_a_packed_script_that_fails_is_refused_with_its_last_words(runs: list[Path], make: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    real = submit.scoring_settings
    monkeypatch.setattr(submit, "scoring_settings", lambda *given: {**real(*given), "AUDIT_TOKENS": 1})
    refused(make(runs[:1]), "could not be scored again: the packed script ended with code 2: .*AUDIT_TOKENS=1")


def test_no_process_and_no_file_is_left_when_scoring_is_stopped(runs: list[Path], make: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def stopped(process: subprocess.Popen[bytes], *others: Any) -> None:
        started.append(process)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(submit, "follow", stopped)
    before = signal.getsignal(signal.SIGTERM)
    outcome = make(runs[:1])
    assert outcome.code == 130 and "stopped" in outcome.errors and not outcome.place.exists()
    (process,) = started
    assert process.poll() is not None
    assert signal.getsignal(signal.SIGTERM) == before


# ----------------------------------------------------------------------------------------------------------------------
# What a folder holds


def test_a_folder_of_three_seeds_holds_what_the_challenge_wants(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    made = make(runs)
    own = [name for seed in SEEDS for name in (f"train_seed{seed}.log", f"run_seed{seed}.jsonl", f"config_seed{seed}.env")]
    expected = {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "train_gpt_source.py", "artifact_seed1337.bin", *own}
    assert {path.name for path in made.folder.iterdir()} == expected
    assert made.folder == made.place / "track_non_record_16mb" / TARGET
    assert made.folder.stat().st_mode & 0o777 == 0o755
    assert answers["scored"] == list(SEEDS)
    source = (runs[0] / "train_gpt.py").read_text(encoding="utf-8")
    assert (made.folder / "train_gpt_source.py").read_text(encoding="utf-8") == source
    assert (made.folder / "train_gpt.py").read_bytes() == PACK(source)
    assert (made.folder / "artifact_seed1337.bin").read_bytes() == (runs[0] / "artifact.bin").read_bytes()
    for seed, run in zip(SEEDS, runs, strict=True):
        assert (made.folder / f"train_seed{seed}.log").read_bytes() == (run / "log.txt").read_bytes()
        assert (made.folder / f"run_seed{seed}.jsonl").read_bytes() == (run / "run.jsonl").read_bytes()
    assert made.submission["sha256"] == {name: submit.file_digest(made.folder / name) for name in expected - {"README.md", "submission.json"}}


def test_the_submission_says_what_the_logs_say(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    submission, results = make(runs, "--blurb", "An idea.").submission, [result_of(folder) for folder in runs]
    by = {"author": "An Author", "github_id": "author", "name": "A name", "blurb": "An idea.", "date": "2026-05-01T00:00:00Z", "track": OTHER}
    assert {key: submission[key] for key in by} == by
    scores, code = [result["val_bpb"] for result in results], results[0]["bytes_code"]
    assert submission["val_bpb"] == statistics.fmean(scores) and submission["val_bpb_std"] == statistics.stdev(scores) > 0
    assert submission["val_loss"] == statistics.fmean(result["val_loss"] for result in results)
    assert submission["pre_quant_val_bpb"] == statistics.fmean(result["pre_quant_val_bpb"] for result in results)
    assert submission["seeds"] == list(SEEDS) and submission["step_stop"] == 2
    assert submission["bytes_code"] == code and submission["bytes_model"] == max(result["bytes_model"] for result in results)
    assert submission["bytes_total"] == max(result["bytes_total"] for result in results)
    assert submission["wallclock_seconds"] == statistics.fmean(result["train_seconds"] for result in results)
    assert (submission["hardware"], submission["pytorch_version"]) == ("1 x cpu (1 threads)", results[0]["torch"])
    for folder, result in zip(runs, results, strict=True):
        row = submission["seed_results"][str(result["seed"])]
        assert (row["val_bpb"], row["val_loss"], row["steps"]) == (result["val_bpb"], result["val_loss"], 2)
        assert (row["artifact_bytes"], row["bytes_total"], row["eval_time_s"]) == (result["bytes_model"], result["bytes_total"], result["eval_seconds"])
        assert submission["artifact_sha256"][str(result["seed"])] == submit.file_digest(folder / "artifact.bin")


def test_compare_reads_a_record_as_it_reads_its_runs(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    folder = make(runs).folder
    of_record, of_runs = (compare.read_sample(items, "bpb", None) for items in ([str(folder)], list(map(str, runs))))
    pick = [(score.seed, score.bpb, score.nats) for score in of_record.scores]
    assert pick == [(score.seed, score.bpb, score.nats) for score in of_runs.scores] and len(pick) == 3


def test_the_readme_has_the_table_the_claim_and_the_settings(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    made, results = make(runs), [result_of(folder) for folder in runs]
    lines = made.readme.splitlines()
    mean, spread = statistics.fmean(r["val_bpb"] for r in results), statistics.stdev(r["val_bpb"] for r in results)
    assert lines[0] == f"# A name: val_bpb {mean:.4f} (mean of 3 seeds, standard deviation {spread:.5f})"
    table = {cells[0]: cells[1:] for line in lines if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 11}
    names = table["seed"]
    for result in results:
        row = dict(zip(names, table[str(result["seed"])], strict=True))
        assert row["val_bpb"] == f"{result['val_bpb']:.5f}" and row["trained bpb"] == f"{result['pre_quant_val_bpb']:.5f}"
        assert row["quantised bpb"] == f"{result['quant_val_bpb']:.5f}" and row["total bytes"] == f"{result['bytes_total']:,}" and row["steps"] == "2"
    assert dict(zip(names, table["mean"], strict=True))["val_bpb"] == f"{mean:.5f}"
    assert dict(zip(names, table["std"], strict=True))["val_bpb"] == f"{spread:.5f}"
    changes = " ".join(made.readme.partition("Against the defaults of the script:")[2].partition("## Rules")[0].split())
    assert "ITERATIONS=2" in changes and "NUM_LAYERS=3" in changes and "RUN_ID" not in changes and "DATA_PATH" not in changes
    assert "comparable only with others on the same text" in made.readme
    for words in ("Total submission size: ", "val_tokens: ", "stopping_early"):
        assert words in made.readme


def test_requirements_are_what_the_source_imports_with_the_pytorch_that_ran(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    lines = (make(runs[:1]).folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split(r"\W", line)[0] for line in lines}
    assert names == {"torch", "numpy", "sentencepiece", "zstandard", "brotli", "constriction", "numba", "triton"}
    assert "torch==2.11.0" in submit.requirements("import torch", "2.11.0+cu128").splitlines()
    assert submit.requirements("import os", "2.11.0") == ""


def test_home_directories_do_not_get_into_a_folder(runs: list[Path], corpus: Path, make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    for name in ("log.txt", "run.jsonl", "config.env"):
        path = runs[0] / name
        path.write_text(path.read_text(encoding="utf-8").replace(str(corpus), f"/home/alice/{corpus.name}"), encoding="utf-8")
    made = make(runs[:1], "--data", corpus)
    assert len(re.findall("alice", (runs[0] / "run.jsonl").read_text(encoding="utf-8"))) > 2
    for path in made.folder.iterdir():
        assert b"alice" not in path.read_bytes(), path.name
    assert f"DATA_PATH=~/{corpus.name}\n" in (made.folder / "config_seed1337.env").read_text(encoding="utf-8")
    assert "paths of the machine stay in the logs: RUNS_DIR=/" in made.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DATA_PATH=/home/alice/x y=/Users/bob/z", "DATA_PATH=~/x y=~/z"), ('"/root/x"', '"~/x"'), ("/root", "~"), ("/home/al", "~"),
        ("/data/root/x /rooted/x ./home/x/y", "/data/root/x /rooted/x ./home/x/y"), ("/data/home/alice/x", "/data/home/alice/x"),
    ],
)  # fmt: skip
def test_home_directories_become_a_tilde_and_nothing_else_does(text: str, expected: str) -> None:
    assert submit.without_home(text) == expected


def test_what_the_author_writes_means_nothing_in_markdown(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    evil = "<script>x</script> | [a](b) `c` *d*\n# e"
    made = make(runs[:1], "--blurb", evil)
    assert r"&lt;script&gt;x&lt;/script&gt; \| \[a\](b) \`c\` \*d\* \# e" in made.readme.splitlines()
    assert "<script" not in made.readme and made.submission["blurb"] == evil
    edit(runs[0], with_values("env", device_name="[bold]<b>"))
    readme = (make(runs[:1], by=("--name", "B", *BY[2:])).place / f"track_{OTHER}" / "2026-05-01_B" / "README.md").read_text(encoding="utf-8")
    assert readme.count(r"1 x \[bold\]&lt;b&gt;") == readme.count("bold") >= 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A name", "A_name"), ("  Größe & Maß!  ", "Groe_Ma"), ("v1.2+rate-x", "v1.2+rate-x"), ("...dots...", "dots"), ("a" * 200, "a" * 80),
        ("日本 2", "2"), ("$(rm -rf x);`y`", "rm_-rf_x_y"),
    ],
)  # fmt: skip
def test_a_name_gives_a_plain_folder_name(name: str, expected: str) -> None:
    assert submit.folder_name(date(2026, 5, 1), name) == f"2026-05-01_{expected}"


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "..", "日本", "a\nb", "a\0b", "...", " "])
def test_a_name_that_is_no_folder_name_is_refused(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], name: str) -> None:
    refused(make(runs[:1], by=("--name", name, *BY[2:])), "no name of a folder")


def test_an_existing_folder_is_never_overwritten(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    folder = make(runs[:1]).folder
    before = {path.name: submit.file_digest(path) for path in folder.iterdir()}
    again = make(runs[1:2])
    assert again.code == 1 and len(again.obstacles) == 1 and "exists, and is never overwritten" in again.obstacles[0]
    assert {path.name: submit.file_digest(path) for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_record_beside_others_leaves_them_and_a_refused_one_leaves_no_track(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    made = make(runs[:1])
    other = make(runs[:1], by=("--name", "B", *BY[2:]))
    assert other.code == 0
    assert sorted(path.name for path in made.place.glob("*/*")) == ["2026-05-01_A_name", "2026-05-01_B"]
    answers["audit"] = []
    assert make(runs[:1], by=("--name", "C", *BY[2:])).code == 1
    assert len(list(made.place.glob("*/*"))) == 2


# ----------------------------------------------------------------------------------------------------------------------
# A record of the ten minutes


def test_a_record_that_meets_every_rule_is_made_and_says_how_each_was_checked(
    record_runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any]
) -> None:
    made = make(record_runs, "--data", published, track=RECORD)
    assert made.folder == made.place / "track_10min_16mb" / TARGET
    rules = made.submission["compliance"]
    assert all(rule["holds"] is True and rule["how"] for rule in rules.values()), rules
    assert {"train_under_600s", "eval_under_600s", "artifact_under_16mb", "three_seeds", "c1_causal", "c2_normalised", "c4_single_pass"} <= set(rules)
    assert made.submission["hardware"] == "8 x NVIDIA H100 80GB HBM3"
    assert made.submission["data"]["val_sha256"] == {"fineweb_val_000000.bin": submit.file_digest(published / "fineweb_val_000000.bin")}
    assert made.submission["data"]["tokenizer_sha256"] == submit.file_digest(published / "tokenizer.model")
    assert "comparable only" not in made.readme and "**no**" not in made.readme
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py @config_seed1337.env" in made.readme


def unaudited(folder: Path) -> None:
    edit(folder, lambda event: event.update(text="something else") if str(event.get("text")).startswith("audit: C2") else None)


def slow(folder: Path) -> None:
    edit(folder, with_values("result", train_seconds=600.01))


def slow_evaluation(folder: Path) -> None:
    scores = result_of(folder)["scores"]
    scores["sliding"]["seconds"] = 590.0
    scores["chunked"]["seconds"] = 10.5
    edit(folder, with_values("result", scores=scores, eval_seconds=600.5))


LACKS: dict[str, tuple[Change, str]] = {
    "too long training": (slow, "trained for 600.0 s"),
    "too long evaluation": (slow_evaluation, "was evaluated for 600.5 s"),
    "other GPUs": (lambda folder: edit(folder, with_values("env", device_name="NVIDIA A100")), "ran on 8 x NVIDIA A100"),
    "other number": (lambda folder: edit(folder, with_values("env", world_size=4), with_values("result", world_size=4)), "ran on 4 x NVIDIA H100"),
    "no audit": (unaudited, "no complete audit"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_a_record_needs_is_demanded_of_it_and_stated_by_others(
    record_runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any], lack: str
) -> None:
    damage, message = LACKS[lack]
    for folder in record_runs:
        damage(folder)
    refused(make(record_runs, "--data", published, track=RECORD), *[message] * 3)
    stated = make(record_runs, "--data", published)
    assert stated.output.count(message) == 3
    assert len(re.findall(rf"^- seed \d+: .*{message}.*ten minutes needs", stated.readme, re.MULTILINE)) == 3


def test_a_record_needs_three_seeds_and_others_state_theirs(
    record_runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any]
) -> None:
    refused(make(record_runs[:2], "--data", published, track=RECORD), "2 seeds\n    expected: at least 3")
    stated = make(record_runs[:2], "--data", published)
    assert stated.submission["compliance"]["three_seeds"]["holds"] is False and "- 2 seeds; a record" in stated.readme


def test_a_record_needs_the_whole_text_of_the_challenge(
    record_runs: list[Path], published: Path, corpus: Path, make: Callable[..., Outcome], answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(make(record_runs, "--data", corpus, track=RECORD), "the text is not known to be the challenge's")
    monkeypatch.setattr(submit, "VAL_DOCUMENTS", 41)
    refused(make(record_runs, "--data", published, track=RECORD), "has 40 validation documents")


def test_a_record_has_to_be_scored_again(record_runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    refused(make(record_runs, "--data", published, "--skip-rescoring", track=RECORD), "not scored again")
    stated = make(record_runs, "--data", published, "--skip-rescoring")
    assert answers["scored"] == [] and stated.submission["compliance"]["artifact_scores_again"]["holds"] is None
    assert "**The artifact was not scored again" in stated.readme


def test_rules_that_nothing_has_checked_are_refused(record_runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    unaudited(record_runs[0])
    refused(make(record_runs[:1], "--skip-rescoring"), "nothing says that C1 to C4 hold")
    assert make(record_runs[:1]).submission["compliance"]["c2_normalised"]["holds"] is True


def test_the_remedy_for_a_missing_audit_works(run_here: Callable[..., Ended], make: Callable[..., Outcome], answers: dict[str, Any], tmp_path: Path) -> None:
    ended = run_here(tmp_path, ITERATIONS=2, WARMUP_STEPS=0, RUN_ID="plain")
    assert ended.code == 0, ended.errors
    folder = tmp_path / "runs" / "plain"
    outcome = make([folder], "--skip-rescoring")
    (mend,) = re.findall(r"mend: .*or: (python train_gpt\.py .*)", outcome.obstacles[0])
    words, score = shlex.split(mend)[2:], result_of(folder)["val_bpb"]
    ended = run_here(tmp_path, *words, bare=True)
    assert ended.code == 0, ended.errors
    assert make([folder], "--skip-rescoring").submission["val_bpb"] == score


# ----------------------------------------------------------------------------------------------------------------------
# Runs that are refused


def flipped(folder: Path) -> None:
    data = bytearray((folder / "artifact.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "artifact.bin").write_bytes(data)


def rewritten(name: str, old: str, new: str) -> Change:
    """Returns a damage: one text of a file becomes another."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_text(encoding="utf-8")
        assert old in content
        (folder / name).write_text(content.replace(old, new), encoding="utf-8")

    return damage


def without_result(folder: Path) -> None:
    lines = (folder / "run.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "run.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")


def partly_adapted(folder: Path) -> None:
    edit(folder, with_values("result", adapted_frac=0.5), lambda e: e.update(adapted_frac=0.5) if e["event"] == "eval" and e["name"] == "sliding" else None)


def over_its_cap(folder: Path) -> None:
    edit(folder, with_values("result", bytes_cap=result_of(folder)["bytes_total"] - 1))


def better(folder: Path) -> None:
    """A better score in every event and file, but not in the nats."""
    bpb = result_of(folder)["val_bpb"]
    edit(folder, with_values("result", val_bpb=bpb - 0.1), lambda e: e.update(val_bpb=bpb - 0.1) if e["event"] == "eval" and e["name"] == "sliding" else None)
    rewritten("log.txt", f"val_bpb {bpb:.4f}", f"val_bpb {bpb - 0.1:.4f}")(folder)


def nan_in_the_result(folder: Path) -> None:
    rewritten("result.json", f'"val_bpb": {result_of(folder)["val_bpb"]},\n "pre', '"val_bpb": NaN,\n "pre')(folder)


def other_model(folder: Path) -> None:
    with_setting(folder, "ROPE_BASE", 20000.0)


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "over its cap": (over_its_cap, ("1 over its BYTES_CAP",)),
    "missing log": (lambda folder: (folder / "log.txt").unlink(), (r"log\.txt: cannot be used: No such file",)),
    "empty log": (lambda folder: (folder / "log.txt").write_bytes(b""), (r"log\.txt: cannot be used: it is empty",)),
    "log of another run": (lambda folder: (folder / "log.txt").write_text("val_bpb 1.0\n"), (r"log\.txt: does not tell of val_bpb",)),
    "log of another size": (
        lambda folder: rewritten("log.txt", f"{result_of(folder)['bytes_total']:,}", "1")(folder), (r"log\.txt: does not tell of val_bpb",),
    ),
    "one bit of the artifact": (flipped, (r"artifact\.bin: altered or truncated",)),
    "truncated artifact": (
        lambda folder: (folder / "artifact.bin").write_bytes((folder / "artifact.bin").read_bytes()[:-1]),
        (r"artifact\.bin: [\d,]+ bytes, and the run wrote", "altered or truncated"),
    ),
    "missing artifact": (lambda folder: (folder / "artifact.bin").unlink(), (r"artifact\.bin: cannot be used",)),
    "artifact of another model": (other_model, ("of another model: ROPE_BASE differ",)),
    "edited source": (rewritten("train_gpt.py", "C2, normalisation", "C2, nothing"), (r"train_gpt\.py: edited, or not what ran",)),
    "broken source": (rewritten("train_gpt.py", "def main(", "def main(("), ("edited, or not what ran", "no Python")),
    "other source in one session": (
        lambda folder: edit(folder, with_values("env", source_sha256="0" * 64)), (r"train_gpt\.py: edited, or not what ran: .* with 000000000000",),
    ),
    "edited settings": (rewritten("config.env", "NUM_LAYERS=3", "NUM_LAYERS=4"), (r"config\.env: is not what ran: NUM_LAYERS",)),
    "missing settings": (lambda folder: (folder / "config.env").unlink(), (r"config\.env: cannot be used",)),
    "seed of the settings": (lambda folder: with_setting(folder, "SEED", 5), ("the result is of seed 1337, the settings say 5",)),
    "missing result": (lambda folder: (folder / "result.json").unlink(), (r"result\.json: cannot be used",)),
    "malformed result": (lambda folder: (folder / "result.json").write_text("{"), (r"result\.json: not valid JSON",)),
    "list as result": (lambda folder: (folder / "result.json").write_text("[]"), (r"result\.json: differs .* in everything",)),
    "NaN in the result": (nan_in_the_result, (r"result\.json: differs .* in val_bpb",)),
    "NaN everywhere": (lambda folder: edit(folder, with_values("result", val_bpb=math.nan)), (r"the result of run\.jsonl does not say val_bpb",)),
    "no stage of training": (lambda folder: edit(folder, with_values("result", train_seconds=None)), ("does not say train_seconds",)),
    "no result event": (without_result, (r"run\.jsonl has no result: unfinished",)),
    "no events": (lambda folder: (folder / "run.jsonl").unlink(), (r"run\.jsonl: cannot be used",)),
    "foreign events": (lambda folder: (folder / "run.jsonl").write_text("[1]\n"), ("none of its lines is an event",)),
    "adaptation cut short": (partly_adapted, ("adapted_frac 0.5",)),
    "better bits from the same nats": (better, ("is not what its nats, targets and bytes come to",)),
    "better result than evaluation": (
        lambda folder: edit(folder, with_values("result", val_loss=1.0)), ("the result and the sliding evaluation differ in val_loss",),
    ),
    "less evaluation": (lambda folder: edit(folder, with_values("result", eval_seconds=0.001)), ("eval_seconds 0.001 is not the sum",)),
    "less code": (lambda folder: edit(folder, with_values("result", bytes_code=1)), (r"[\d,]+ \+ 1 bytes are not",)),
    "no folder": (shutil.rmtree, ("no such folder",)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_refused_for_its_damage_and_left_as_it_is(
    runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], damage: str
) -> None:
    change, reasons = DAMAGES[damage]
    change(runs[0])
    before = {path: path.read_bytes() for path in runs[0].parent.rglob("*") if path.is_file()}
    refused(make(runs[:1]), *reasons)
    assert answers["scored"] == [], "nothing is scored that is refused anyway"
    assert {path: path.read_bytes() for path in runs[0].parent.rglob("*") if path.is_file()} == before


def test_the_runs_that_are_damaged_here_are_accepted_undamaged(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    made = make(runs[:1])
    assert made.code == 0 and not made.obstacles


def test_code_and_artifact_over_the_challenges_cap_are_refused_whatever_the_runs_own(
    runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = result_of(runs[0])["bytes_total"]
    monkeypatch.setattr(submit, "MOST_BYTES", total)
    assert make(runs[:1]).code == 0
    monkeypatch.setattr(submit, "MOST_BYTES", total - 2)
    outcome = make(runs[:1], by=("--name", "B", *BY[2:]))
    assert outcome.code == 1 and len(outcome.obstacles) == 1 and "2 over the challenge's cap" in outcome.obstacles[0]


def test_what_packs_larger_than_it_was_counted_is_refused_over_the_cap(
    runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = result_of(runs[0])
    edit(runs[0], with_values("result", bytes_code=result["bytes_code"] - 5, bytes_total=result["bytes_total"] - 5, bytes_cap=result["bytes_total"] - 1))
    rewritten("log.txt", f"{result['bytes_total']:,}", f"{result['bytes_total'] - 5:,}")(runs[0])
    refused(make(runs[:1]), "1 over its BYTES_CAP")


def damaged_settings(folder: Path) -> None:
    with_setting(folder, "MATRIX_LR", 0.5)


SEED_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "settings": (damaged_settings, "settings differ from those of .*: MATRIX_LR"),
    "data": (lambda folder: with_setting(folder, "DATA_PATH", "data/other"), "settings differ from those of .*: DATA_PATH"),
    "text": (
        lambda folder: edit(folder, lambda e: e.update(targets=2 * e["targets"], bytes=2 * e["bytes"]) if e["event"] == "eval" else None),
        "scored [0-9,]+ targets",
    ),
    "seed": (lambda folder: (with_setting(folder, "SEED", 1337), edit(folder, with_values("result", seed=1337)))[0], "seed 1337: given more than once"),
}


@pytest.mark.parametrize("damage", SEED_DAMAGES)
def test_runs_that_are_not_seeds_of_one_configuration_are_refused(
    runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], damage: str
) -> None:
    change, reason = SEED_DAMAGES[damage]
    change(runs[1])
    refused(make(runs[:2], "--skip-rescoring"), *[reason] * (1 if damage != "text" else 2))


def test_runs_of_different_sources_are_refused(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    rewritten("train_gpt.py", "C2, normalisation", "C2, other")(runs[1])
    digest = submit.file_digest(runs[1] / "train_gpt.py")
    edit(runs[1], with_values("env", source_sha256=digest))
    refused(make(runs[:2]), "another source than")


def test_settings_that_reach_no_score_may_differ_between_seeds(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    for name, value in (("RUNS_DIR", "elsewhere"), ("SCORES_FILE", "x.npy"), ("AUDIT", False), ("DATA_PATH", f"mnt/{submit_data_name(runs[0])}")):
        with_setting(runs[1], name, value)
    assert make(runs[:2]).code == 0


def submit_data_name(folder: Path) -> str:
    """Returns the last part of a run's DATA_PATH."""
    lines = (folder / "config.env").read_text(encoding="utf-8").splitlines()
    return Path(next(line for line in lines if line.startswith("DATA_PATH=")).partition("=")[2]).name


def test_seeds_of_different_machines_are_stated_and_not_a_record(
    record_runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any]
) -> None:
    edit(record_runs[1], with_values("env", torch="2.12.0"))
    refused(make(record_runs, "--data", published, track=RECORD), "torch 2.12.0")
    assert "seed 7: ran on 8 x NVIDIA H100 80GB HBM3, torch 2.12.0" in make(record_runs, "--data", published).readme


def test_all_obstacles_are_listed_at_once_with_what_was_expected_and_what_mends_it(
    runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]
) -> None:
    (runs[0] / "log.txt").unlink()
    flipped(runs[1])
    partly_adapted(runs[2])
    outcome = make([*runs, runs[0].parent / "none"], "--against", "nothing.json", by=("--name", "..", *BY[2:]))
    refused(outcome, r"log\.txt", "no such folder", "altered or truncated", "adapted_frac 0.5", "no name of a folder", "--against: nothing.json")
    assert outcome.errors.startswith("submit.py: nothing was written, and no record is made, for 6 reasons\n")
    for obstacle in outcome.obstacles:
        what, expected, mend = obstacle.split("\n")
        assert what and expected.partition("expected: ")[2] and mend.partition("mend:     ")[2]


def test_a_run_that_was_taken_up_again_says_so(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    lines = (runs[0] / "run.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (runs[0] / "run.jsonl").write_text("".join([*lines[:3], '{"event": "st\n', *lines]), encoding="utf-8")
    notices = make(runs[:1]).submission["notices"]
    assert any("taken up again (2 sessions)" in notice for notice in notices) and any("an interruption leaves them: 1" in notice for notice in notices)


def test_an_audit_of_an_earlier_session_does_not_count(
    record_runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any]
) -> None:
    path = record_runs[2] / "run.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, *(line for line in lines if '"audit: ' not in line)]), encoding="utf-8")
    refused(make(record_runs, "--data", published, track=RECORD), "seed8: its log has no complete audit")


# ----------------------------------------------------------------------------------------------------------------------
# Scoring again, and the data


@pytest.mark.parametrize(("device", "allowed"), [("cpu", submit.ROUNDING_BPB), ("cuda", submit.TOLERANCE_BPB)])
def test_a_score_may_differ_by_rounding_and_no_more(
    runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], device: str, allowed: float
) -> None:
    edit(runs[0], with_values("env", device=device))
    answers["bpb"] = 1.01 * allowed
    refused(make(runs[:1]), "the chunked evaluation of its artifact gives", "the sliding evaluation of its artifact gives")
    answers["bpb"] = -0.99 * allowed
    made = make(runs[:1])
    assert f"{0.99 * allowed:.1e} bpb apart" in made.readme


def test_a_score_that_is_not_a_number_is_refused(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    answers["bpb"] = math.nan
    refused(make(runs[:1]), "gives nan bpb", "gives nan bpb")


def test_rules_that_do_not_hold_when_scored_again_are_refused(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    answers["audit"] = AUDIT_NOTES[:2]
    refused(make(runs[:1]), "not all of C1 to C4")


def test_data_that_is_not_here_is_an_obstacle_only_to_scoring(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], tmp_path: Path) -> None:
    refused(make(runs[:1], "--data", tmp_path / "none"), "no validation shards there")
    stated = make(runs[:1], "--data", tmp_path / "none", "--skip-rescoring")
    assert stated.submission["data"] is None and "what text was scored has not been looked at" in stated.readme


def test_other_data_than_the_run_scored_is_refused(
    runs: list[Path], published: Path, make: Callable[..., Outcome], answers: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "data"))
    shard = folder / "fineweb_val_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    refused(make(runs[:1], "--data", folder), "its SHA-256 is not")
    tokens = shards.check_shard(shard)
    (folder / shards.MANIFEST_FILE).unlink()
    shards.write_shard(shard, np.array(shards.read_shard(published / shard.name))[: tokens - 10])
    refused(make(runs[:1], "--data", folder), rf"scored {tokens - 1:,} targets, and {folder} has {tokens - 11:,}")


def test_a_score_of_a_part_of_the_text_is_refused(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    edit(runs[0], lambda event: event.update(targets=event["targets"] / 2, bytes=event["bytes"] / 2) if event["event"] == "eval" else None)
    refused(make(runs[:1]), r"scored [\d,]+ targets, and .* has [\d,]+\n    expected: every target of the validation split")


def seed_of(folder: Path) -> submit.Seed:
    """Returns what submit.py reads in a run folder."""
    findings = submit.Findings(OTHER)
    seed = submit.read_run_folder(folder, findings)
    assert seed and not findings.obstacles
    return seed


def test_as_many_processes_score_as_the_run_had_where_there_are_its_gpus(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = seed_of(runs[0])
    as_if_on_h100(runs[0])
    on_gpu = seed_of(runs[0])
    for gpus, expected in ((0, 1), (4, 1), (8, 8)):
        monkeypatch.setattr(submit.torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert submit.ranks_here(on_gpu) == expected and submit.ranks_here(on_cpu) == 1


def test_scoring_without_the_runs_gpu_goes_on_a_cpu(runs: list[Path], published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_on_h100(runs[0])
    seed = seed_of(runs[0])
    data = submit.read_data(seed, published, None, submit.Findings(OTHER), is_needed=True)
    assert data
    settings = submit.scoring_settings(seed, runs[0] / "artifact.bin", data)
    assert (settings["DEVICE"], settings["COMPILE"], settings["EVAL_SECONDS"], settings["AUDIT"]) == ("cpu", 0, 0, 1)
    monkeypatch.setattr(submit.torch.cuda, "device_count", lambda: 8)
    settings = submit.scoring_settings(seed, runs[0] / "artifact.bin", data)
    assert settings["DEVICE"] == "cuda" and "COMPILE" not in settings


def test_the_time_left_follows_from_the_pace_of_this_machine() -> None:
    logged = {"chunked": 10.0, "sliding": 100.0}
    env, note = {"event": "env", "time": 1000.0}, {"event": "note", "time": 1006.0, "text": "the chunked evaluation will take about 20 s"}
    assert math.isnan(submit.seconds_left([], logged, 1000.0)) and math.isnan(submit.seconds_left([env], logged, 1005.0))
    assert submit.seconds_left([env, note], logged, 1006.0) == pytest.approx(14 + 200)
    scored = {"event": "eval", "name": "chunked", "time": 1030.0, "seconds": 30.0}
    assert submit.seconds_left([env, note, scored], logged, 1031.0) == pytest.approx(299)
    later = {"event": "note", "time": 1040.0, "text": "the sliding evaluation will take about 1,000 s"}
    assert submit.seconds_left([env, note, scored, later], logged, 1040.0) == pytest.approx(990)
    assert submit.seconds_left([env, note, scored, later], logged, 9999.0) == 0
    assert submit.seconds_left([env, scored, {**scored, "name": "sliding"}], logged, 1040.0) == 0


# ----------------------------------------------------------------------------------------------------------------------
# The packed script, unpacked without running it

SOURCE = '''"""Doc."""
import sys


def f(x):
    """Doc."""
    return x + 1  # a comment


class A:
    """Doc."""

    async def g(self):
        "doc"
'''


def test_a_packed_script_unpacks_to_an_equal_tree_without_running() -> None:
    planted = SOURCE + "raise SystemExit('it ran')\n"
    inside, _ = submit.unpack_script(train_gpt.pack_script(planted))
    assert "it ran" in inside and "comment" not in inside
    assert submit.bare_tree(inside) == submit.bare_tree(planted) != submit.bare_tree(SOURCE)
    assert submit.packing_problem(train_gpt.pack_script(SOURCE), SOURCE) == ""


def test_the_whole_script_packs_to_an_equal_tree() -> None:
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert submit.packing_problem(PACK(source), source) == ""


@pytest.mark.parametrize(("old", "new"), [("x + 1", "x + 2"), ("return x", "return -x"), ("import sys", "import os"), ("def g", "def h")])
def test_another_program_inside_is_noticed(old: str, new: str) -> None:
    assert "the syntax tree inside is not" in submit.packing_problem(train_gpt.pack_script(SOURCE.replace(old, new)), SOURCE)


def test_docstrings_and_comments_make_no_other_program() -> None:
    same = '"""Other."""\n' + SOURCE.partition("\n")[2].replace('    """Doc."""', '    """Other.\n    """', 1).replace("# a comment", "")
    assert submit.packing_problem(train_gpt.pack_script(same), SOURCE) == ""
    assert submit.bare_tree('def f():\n    "a"\n    "b"\n') == submit.bare_tree("def f():\n    pass\n")


@pytest.mark.parametrize("planted", [b"print('x')\n", b"import evil\n"])
def test_code_around_the_payload_is_noticed(planted: bytes) -> None:
    packed = train_gpt.pack_script(SOURCE)
    assert "the code around its payload" in submit.packing_problem(packed + planted, SOURCE)
    head, newline, rest = packed.partition(b"\n")
    assert "the code around its payload" in submit.packing_problem(head + newline + planted + rest, SOURCE)
    swapped = packed.replace(b"p=os.path.join(d,'train_gpt.py')", b"p=os.path.join(d,'train_gpt.px')")
    assert swapped != packed and "the code around its payload" in submit.packing_problem(swapped, SOURCE)


def packed_payload(payload: bytes) -> bytes:
    """Returns a script with this payload."""
    return b"# coding: latin-1\ns=" + ascii(payload.decode("latin-1")).encode() + b"\n"


def test_a_payload_that_would_unpack_to_more_than_a_script_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    bomb = lzma.compress(bytes(submit.MOST_SOURCE_BYTES + 1), lzma.FORMAT_RAW, filters=filters)
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match="does not end where it should"):
        submit.unpack_script(packed_payload(bomb))
    whole = lzma.compress(b"x = 1", lzma.FORMAT_RAW, filters=filters)
    assert submit.unpack_script(packed_payload(whole))[0] == "x = 1"
    with pytest.raises(ValueError, match="does not end where it should"):
        submit.unpack_script(packed_payload(whole + b"more"))


@pytest.mark.parametrize("packed", [b"", b"x = 1\n", b"def (", b"\xff\xfe", b"s = 'abc'\n", b"\0", b"s='\xe6\x97\xa5'\n", b"(" * 100_000])
def test_what_is_no_packed_script_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="not a script of the packer"):
        submit.unpack_script(packed)


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def test_a_comparison_is_that_of_compare_py(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    scores = [result_of(folder)["val_bpb"] for folder in runs]
    against = ",".join(f"{seed}:{score + 0.01 + 0.001 * place:.6f}" for place, (seed, score) in enumerate(zip(SEEDS, scores, strict=True)))
    made = make(runs, "--against", against)
    sides = (compare.read_sample(items, "bpb", None) for items in (list(map(str, runs)), [against]))
    expected = compare.result(compare.compare(*sides), compare.Options(0.005, 0.01, 0.95, 0.8, []))
    assert made.submission["comparison"]["tests"] == json.loads(json.dumps(expected["tests"])) and len(expected["tests"]) == 2
    assert (made.submission["t_statistic"], made.submission["p_value"]) == (expected["tests"][0]["t"], expected["tests"][0]["p_better"])
    assert "p, by more than 0.005 nats (t)" in made.readme


def test_settings_that_differ_from_those_of_an_earlier_run_are_listed(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    with_setting(runs[1], "MATRIX_LR", 0.5)
    base = make(runs[1:2], by=("--name", "Base", *BY[2:])).folder
    outcome = make(runs[:1], "--against", base)
    assert outcome.code == 0, outcome.errors
    (row,) = (line for line in (base.parent / TARGET / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith(r"| MATRIX\_LR"))
    rate = train_gpt.PRESETS["baseline"].get("matrix_lr", train_gpt.Config.matrix_lr)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["0.5", str(rate)]


# ----------------------------------------------------------------------------------------------------------------------
# A record folder again


@pytest.fixture
def record(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], tmp_path: Path) -> Path:
    """A made folder of two seeds, by itself."""
    folder = tmp_path / "record"
    make(runs[:2]).folder.rename(folder)
    shutil.rmtree(tmp_path / "records")
    answers["scored"].clear()
    return folder


def signed(record: Path) -> None:
    """Makes submission.json's digests those of the files: who alters a file can do that."""
    submission = json.loads((record / "submission.json").read_text(encoding="utf-8"))
    names = {path.name for path in record.iterdir()} - {"README.md", "submission.json"}
    submission["sha256"] = {name: submit.file_digest(record / name) for name in names}
    (record / "submission.json").write_text(json.dumps(submission), encoding="utf-8")


def test_a_made_folder_is_in_order_and_its_one_artifact_is_scored(record: Path, check: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    checked = check(record)
    assert checked.code == 0 and "in order; seed 1337 scored again" in checked.output, checked.errors
    assert answers["scored"] == [1337]
    (record / "README.md").write_text("The author's own words.", encoding="utf-8")
    assert check(record, "--skip-rescoring").code == 0 and answers["scored"] == [1337]


@pytest.mark.parametrize("name", ["train_gpt.py", "train_seed7.log", "run_seed7.jsonl", "config_seed1337.env", "artifact_seed1337.bin", "requirements.txt"])
def test_an_altered_or_missing_file_of_a_record_is_refused(record: Path, check: Callable[..., Outcome], name: str) -> None:
    content = (record / name).read_bytes()
    (record / name).write_bytes(content + b"\n")
    altered = check(record)
    assert altered.code == 1 and f"{name}: altered" in altered.obstacles[0]
    (record / name).unlink()
    missing = check(record)
    assert missing.code == 1 and f"{name}: no such file" in missing.obstacles[0]


def test_a_file_that_the_script_could_import_is_refused(record: Path, check: Callable[..., Outcome]) -> None:
    (record / "lzma.py").write_text("raise SystemExit", encoding="utf-8")
    refused(check(record), r"lzma\.py: not in submission\.json")


def test_a_link_in_the_place_of_a_file_is_refused(record: Path, check: Callable[..., Outcome], tmp_path: Path) -> None:
    (record / "requirements.txt").rename(tmp_path / "outside")
    (record / "requirements.txt").symlink_to(tmp_path / "outside")
    refused(check(record), r"requirements\.txt: no such file")


def test_another_program_in_a_record_is_refused_before_it_runs(record: Path, check: Callable[..., Outcome], answers: dict[str, Any]) -> None:
    source = (record / "train_gpt_source.py").read_text(encoding="utf-8")
    (record / "train_gpt.py").write_bytes(train_gpt.pack_script(source.replace("return math.exp(", "return 0.9 * math.exp(", 1) + "\nprint('planted')\n"))
    signed(record)
    outcome = check(record)
    assert "the syntax tree inside is not that of the source that ran" in outcome.obstacles[0]
    assert outcome.code == 1 and answers["scored"] == []


def test_a_source_in_a_record_that_is_not_what_ran_is_refused(record: Path, check: Callable[..., Outcome]) -> None:
    source = (record / "train_gpt_source.py").read_text(encoding="utf-8") + "\nprint('planted')\n"
    (record / "train_gpt_source.py").write_text(source, encoding="utf-8")
    (record / "train_gpt.py").write_bytes(train_gpt.pack_script(source))
    signed(record)
    outcome = check(record)
    assert outcome.code == 1 and "edited, or not what ran" in outcome.obstacles[0]


@pytest.mark.parametrize("key", ["val_bpb", "val_bpb_std", "seed_results", "bytes_total", "hardware", "wallclock_seconds", "source_sha256"])
def test_a_number_of_a_record_that_its_logs_do_not_say_is_refused(record: Path, check: Callable[..., Outcome], key: str) -> None:
    submission = json.loads((record / "submission.json").read_text(encoding="utf-8"))
    submission[key] = submission[key] | {"7": {}} if isinstance(submission[key], dict) else submission[key] + type(submission[key])(1)
    (record / "submission.json").write_text(json.dumps(submission), encoding="utf-8")
    refused(check(record), f"{key} is not what the logs say")


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "{", '{"track": "other", "seeds": [1], "sha256": {}}', '{"track": "10min_16mb", "seeds": [], "sha256": {}}', "[" * 100_000]
)
def test_a_foreign_submission_json_is_refused(record: Path, check: Callable[..., Outcome], content: str) -> None:
    (record / "submission.json").write_text(content, encoding="utf-8")
    refused(check(record), r"submission\.json: not a submission of this tool")


def test_a_folder_that_is_none_is_refused(check: Callable[..., Outcome], tmp_path: Path) -> None:
    refused(check(tmp_path / "none"), r"submission\.json: not a submission of this tool")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: RUN, --track, --name, --author, --github-id"),
        (["runs/a", "--track", "other"], "--track"),
        (["runs/a", "--track", RECORD, "--name", "x", "--author", "y"], "missing: --github-id"),
        (["--check", "x", "runs/a"], "--check goes without"),
        (["runs/a", *BY[:-1], "1 May", "--track", OTHER], "expected YYYY-MM-DD"),
    ],
)
def test_a_command_line_that_is_not_understood_ends_with_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        submit.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_line(runs: list[Path], make: Callable[..., Outcome], answers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "records").write_text("a file", encoding="utf-8")
    outcome = make(runs[:1])
    assert outcome.code == 1 and len(outcome.errors.splitlines()) == 1 and "records" in outcome.errors
    assert hashlib.sha256((tmp_path / "records").read_bytes()).hexdigest() == hashlib.sha256(b"a file").hexdigest()


def test_help_shows_commands_that_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        submit.main(["--help"])
    assert stop.value.code == 0
    lines = [line.split("       ")[0] for line in (submit.__doc__ or "").splitlines() if line.startswith("    python records/submit.py")]
    assert len(lines) == 3 and all(submit.parse(shlex.split(line)[2:]) for line in lines)
    assert ast.get_docstring(ast.parse((ROOT / "records" / "submit.py").read_text(encoding="utf-8"))).splitlines()[0] in capsys.readouterr().out  # type: ignore[union-attr]
