"""What the fault tests and the soak inject: signals at chosen moments, files that are damaged, and the rule of what may be accepted of those.

Run as a script, it reads damaged forms of one kind of file: a process of its own, because damage may crash or hang the reader and not only be refused.

    python tests/faults/inject.py FOLDER KIND FIRST COUNT      prints {"refused": n, "accepted": n, "wrong": [what and why], "slowest": seconds}
"""

from __future__ import annotations

import json
import math
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "data"))

import forked
import numpy as np
import shards
import torch
from conftest import ROOT, SENTENCES, tiny_arguments

import train_gpt

# ----------------------------------------------------------------------------------------------------------------------
# A micro run: its data, settings and script

BYTE_TOKENS = 260
MICRO = {"NUM_LAYERS": 2, "MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "MICRO_BATCH_TOKENS": 128, "WARMUP_STEPS": 1, "CHECKPOINT_EVERY": 2}


def make_data(folder: Path) -> None:
    """Makes a folder of shards with their manifest, as a user would: two train shards, and a token for each byte of text."""
    chance = random.Random(0)
    documents = folder.parent / f"{folder.name}.jsonl"
    lines = [json.dumps({"text": " ".join(chance.choices(SENTENCES, k=chance.randrange(1, 8)))}) for _ in range(120)]
    documents.write_text("\n".join(lines), encoding="utf-8")
    tool = [sys.executable, str(ROOT / "data" / "tokenize_docs.py"), "--input", str(documents), "--output", str(folder)]
    size = ["--vocab-size", str(BYTE_TOKENS), "--val-docs", "20", "--shard-tokens", "6000", "--workers", "1"]
    subprocess.run([*tool, *size], check=True, capture_output=True, timeout=120)


def micro_arguments(data: Path, runs: Path, **settings: Any) -> list[str]:
    """Arguments of a run of a model of a few thousand weights, not compiled, on the data of `make_data`."""
    return tiny_arguments(data, BYTE_TOKENS, **{**MICRO, "RUNS_DIR": runs, **settings})


# Of train_gpt.py as a script that tests can change: `{action}` runs when `{owner}.{name}` is called for the `{number}`-th time.
AT_CALL = """
counted = {owner}.{name}
def hurt(*args, **options):
    calls.append("{name}")
    if calls.count("{name}") == {number}:
        {action}
    return counted(*args, **options)
{owner}.{name} = hurt
"""
# The size of the packed script takes half the time of a tiny run, and no test here looks at it.
CONSTANT_CODE_BYTES = "train_gpt.code_bytes = lambda source: 70_000\n"


def at_call(function: str, number: int, action: str) -> str:
    """Returns the lines of a driver that run the statement `action` in the `number`-th call of a function of train_gpt, such as "os.replace"."""
    owner, _, name = f"train_gpt.{function}".rpartition(".")
    return CONSTANT_CODE_BYTES + AT_CALL.format(owner=owner, name=name, number=number, action=action)


# Files cannot grow beyond a size while `{when}` holds: what a full disk is to a program. Python ignores the signal that comes with it.
FULL_DISK = """
import resource
def limited_step(*args):
    calls.append(args)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size} if {when} else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return real_step(*args)
train_gpt.training_step = limited_step
"""


def full_disk(size: int, when: str) -> str:
    """Returns the lines of a driver whose disk takes files of `size` bytes at most from every step on at which the expression `when` holds; len(calls)
    is the number of the step, warm-up included."""
    return CONSTANT_CODE_BYTES + FULL_DISK.format(size=size, when=when)


def wait_for(condition: Callable[[], bool], ranks: forked.Ranks, seconds: float = 60.0) -> None:
    """Returns as soon as the condition holds or no rank is alive. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and any(process.is_alive() for process in ranks.processes):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {seconds:g} s:\n{ranks.output.read_text(encoding='utf-8')}")
        time.sleep(0.0005)


# ----------------------------------------------------------------------------------------------------------------------
# Damage

# Values that formats and settings are likely to trip over.
EXTREMES = (0, 1, -1, 2, 255, 2**15, 2**16, 2**24, 2**31 - 1, -(2**31))
HOSTILE_TEXTS = (
    "", " ", "0", "-1", "1", "2", "1e9", "1e999", "-1e-999", "nan", "inf", "-inf", "0x10", "1_0", "٣", "1.5", "true", "None", "'", "a,b", "0:1", "\x00",
    "☕" * 50, "9" * 5000,
)  # fmt: skip
HEADER_BYTES = 1100  # where header edits hurt: at the beginning of a file, and as much at its end, where a checkpoint has its table of contents


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Returns `data` with bits flipped, its end cut off, bytes put in, two blocks swapped or a number near an end replaced; never `data` itself."""
    changed = bytearray(data)
    while changed == data:
        kind, place = chance.choice(("flip", "cut", "insert", "swap", "header")), chance.randrange(len(data))
        if kind == "flip":
            for _ in range(chance.choice((1, 1, 1, 2, 9))):
                changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = chance.randbytes(chance.choice((1, 2, 4, 64, 5000)))
        elif kind == "swap":
            size = min(chance.choice((1, 2, 4, 64, 512)), len(data) // 2)
            one, other = chance.randrange(len(data) - size + 1), chance.randrange(len(data) - size + 1)
            changed[one : one + size], changed[other : other + size] = data[other : other + size], data[one : one + size]
        else:
            start = max(chance.choice((place % HEADER_BYTES, len(data) - place % HEADER_BYTES)) // 4 * 4, 0)
            changed[start : start + 4] = struct.pack("<i", chance.choice(EXTREMES))
    return bytes(changed)


def damaged_line(line: str, chance: random.Random) -> str:
    """Returns a line of `config.env` with its value replaced by a hostile one, or damaged as bytes."""
    name, _, value = line.partition("=")
    if chance.random() < 0.4:
        return f"{name}={chance.choice((*HOSTILE_TEXTS, value * 2, value + chance.choice('0123456789.-e,:')))}"
    changed = damaged(line.encode(), chance).decode("utf-8", "surrogateescape")  # as Python reads arguments that are not UTF-8
    # A line may come to name another setting; what its own is then depends on the preset, and the rule would have to repeat the parser.
    return line if changed.partition("=")[0] in train_gpt.SETTINGS.keys() - {name} else changed


# ----------------------------------------------------------------------------------------------------------------------
# What may be accepted of a damaged file. Each of these reads one: it returns whether it was accepted, and raises AssertionError where that
# decision is wrong or is not explained.


def refusal(problem: Exception, path: Path | str) -> None:
    """Checks that a refusal names its file, on one line."""
    assert str(path) in str(problem) and "\n" not in str(problem), f"an unclear refusal: {problem!r}"


def read_damaged_artifact(folder: Path, whole: bytes, changed: bytes) -> bool:
    """Rule: no change at all is accepted."""
    path = folder / "artifact.bin"
    try:
        train_gpt.read_artifact(changed, train_gpt.Config(device="cpu"), str(path))
    except ValueError as problem:
        refusal(problem, path)
        return False
    raise AssertionError("an altered artifact was accepted")


def same_content(one: Any, other: Any) -> bool:
    """Returns whether nested dictionaries of tensors and plain values are equal: keys in order, types, shapes and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_content(value, other[key]) for key, value in one.items())
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    return repr(one) == repr(other)


def read_damaged_checkpoint(folder: Path, whole: bytes, changed: bytes) -> bool:
    """Rule: a change is accepted where it hits what no content depends on (padding, dates), so that what is read is equal in every bit."""
    path, damaged_path = folder / "checkpoint.pt", folder / "damaged.pt"
    damaged_path.write_bytes(changed)
    try:
        found = train_gpt.read_checkpoint(damaged_path)
    except ValueError as problem:
        refusal(problem, damaged_path)
        return False
    assert same_content(found, train_gpt.read_checkpoint(path)), "a checkpoint of other content was accepted"
    return True


def read_damaged_shard(folder: Path, whole: bytes, changed: bytes) -> bool:
    """Rule: training accepts what has the format (magic, version, a count that is the size) and only tokens of the vocabulary; the manifest no change."""
    path = folder / "data" / "fineweb_train_000000.bin"
    path.write_bytes(changed)
    magic, version, count = struct.unpack("<3i", changed[:12].ljust(12, b"\0"))
    is_shard = (magic, version) == (20240520, 1) and count > 0 and len(changed) == 1024 + 2 * count
    fits = is_shard and int(np.frombuffer(changed, dtype="<u2", offset=1024).max()) < BYTE_TOKENS
    try:
        train_gpt.check_tokens(train_gpt.read_shard(path), BYTE_TOKENS, path)
        accepted = True
    except ValueError as problem:
        refusal(problem, path)
        accepted = False
    assert accepted == fits, f"training {'accepts' if accepted else 'refuses'} a shard that it ought not to"
    report = shards.check_folder(path.parent, lambda count: None)
    assert any(str(path) in problem for problem in report.problems), "the hashes of the manifest do not show the change"
    return accepted


def typed(name: str, text: str) -> Any:
    """Returns the value that a setting's text stands for. Raises ValueError where it stands for none, by the setting's type, range, choices and form."""
    declared = train_gpt.SETTINGS[name]
    low, high, choices = (declared.metadata[key] for key in ("low", "high", "choices"))
    if declared.type == "bool":
        return ("0", "1", "false", "true").index(text.lower()) % 2 == 1
    if declared.type == "str":
        if (choices and text not in choices) or any(not character.isprintable() for character in text):
            raise ValueError(text)
        declared.metadata["form"](text)
        if name == "PRESET" and text not in train_gpt.PRESETS:
            raise ValueError(text)
        return text
    number = int(text) if declared.type == "int" else float(text)
    if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(text)
    return number


def meant(lines: list[str]) -> Mapping[str, Any] | None:
    """Returns the settings that the lines stand for, None where one of them stands for none."""
    settings = {}
    for line in lines:
        name, equals, text = line.partition("=")
        try:
            if not equals or name not in train_gpt.SETTINGS:
                return None
            settings[name] = typed(name, text)
        except ValueError:
            return None
    return {name.lower(): value for name, value in settings.items()}


def read_damaged_settings(folder: Path, whole: bytes, changed: bytes) -> bool:
    """Rule: accepted, and as written, where every line is a setting with a value of its type, range, choices and form, and no rule between settings
    is broken. A refusal names a setting, or the line."""
    lines = changed.decode("utf-8", "surrogateescape").split("\n")
    settings = meant(lines)
    try:
        config = train_gpt.parse_config(lines, {})
    except train_gpt.ConfigError as problem:
        named = [line.partition("=")[0] for line in lines if line not in whole.decode().split("\n")]
        assert str(problem) and any(name in str(problem) for name in (*named, *train_gpt.SETTINGS)), f"an unclear refusal: {problem}"
        broken = settings is None or train_gpt.validate(train_gpt.Config(**settings))
        assert broken, f"valid settings were refused: {problem}"
        return False
    assert settings is not None, "a line that stands for no setting was accepted"
    assert config == train_gpt.Config(**{**vars(config), **settings}), "a setting was accepted as another value than was written"
    assert not train_gpt.validate(config), "settings that contradict each other were accepted"
    return True


def damaged_settings(data: bytes, chance: random.Random) -> bytes:
    """Returns `config.env` with one or two of its lines damaged."""
    whole = data.decode().split("\n")
    lines = list(whole)
    while lines == whole:
        for number in chance.sample(range(len(lines)), chance.choice((1, 1, 2))):
            lines[number] = damaged_line(lines[number], chance)
    return "\n".join(lines).encode("utf-8", "surrogateescape")


Damage = Callable[[bytes, random.Random], bytes]
Reader = Callable[[Path, bytes, bytes], bool]
# kind -> the file of a folder that `prepare` made, how it is damaged, and what reads it.
KINDS: dict[str, tuple[str, Damage, Reader]] = {
    "artifact": ("artifact.bin", damaged, read_damaged_artifact),
    "checkpoint": ("checkpoint.pt", damaged, read_damaged_checkpoint),
    "shard": ("shard.bin", damaged, read_damaged_shard),
    "settings": ("settings", damaged_settings, read_damaged_settings),
}
MOST_SECONDS = 20.0  # for one damaged file: more is a hang
MOST_KILOBYTES = 500_000  # that reading one may take


def prepare(folder: Path, run: Path, data: Path) -> None:
    """Puts copies of what is to be damaged into a new folder: of a finished run, and of its data."""
    (folder / "data").mkdir(parents=True)
    for path in data.iterdir():
        (folder / "data" / path.name).write_bytes(path.read_bytes())
    for name in ("artifact.bin", "checkpoint.pt", "config.env"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "shard.bin").write_bytes((data / "fineweb_train_000000.bin").read_bytes())
    (folder / "settings").write_bytes((run / "config.env").read_bytes().rstrip(b"\n"))


def read_many(folder: Path, kind: str, first: int, count: int) -> dict[str, Any]:
    """Reads damaged forms of a file, numbers `first` and following, and returns how many were refused and accepted, and the seconds of the slowest.

    "wrong" tells of those that were decided wrongly, that met another exception than promised, or that took too much memory; they are kept in the folder
    as `wrong-KIND-NUMBER`. One that hangs ends this process by SIGALRM, and lies in the folder as `latest`, as does one that crashes it.
    """
    name, damage, read = KINDS[kind]
    whole, memory = (folder / name).read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"refused": 0, "accepted": 0, "wrong": [], "slowest": 0.0}
    for number in range(first, first + count):
        changed = damage(whole, random.Random(f"{kind} {number}"))
        (folder / "latest").write_bytes(changed)
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        began = time.perf_counter()
        try:
            found["accepted" if read(folder, whole, changed) else "refused"] += 1
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            assert grown < MOST_KILOBYTES, f"took {grown:,} KB"
        except Exception as problem:
            found["wrong"].append(f"{kind} {number}: {type(problem).__name__}: {problem}")
            (folder / f"wrong-{kind}-{number}").write_bytes(changed)
        signal.setitimer(signal.ITIMER_REAL, 0)
        found["slowest"] = max(found["slowest"], time.perf_counter() - began)
    return found


if __name__ == "__main__":
    print(json.dumps(read_many(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
