"""Builds shakespeare.jsonl.xz from the `shakespeare` 0.6 package: `python build.py FOLDER`, FOLDER holding `*_gut.txt` and `metadata.txt`.

The same texts give the same JSON lines on every machine, and the same compressed bytes with the same release of liblzma.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import lzma
import re
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).with_name("shakespeare.jsonl.xz")
HELD_OUT = ("Macbeth", "Twelfth Night", "King Richard II", "The Winter's Tale")  # a tragedy, a comedy, a history, a late romance
BOILERPLATE = re.compile(r"gutenberg|\be-?text|\be-?book|copyright|small print|https?:|www\.", re.IGNORECASE)


class Work(NamedTuple):
    title: str
    text: str


def read_works(folder: Path) -> list[Work]:
    """Returns the works of `folder`, unordered. Raises ValueError for a text that is not ASCII with LF line ends, or keeps a publisher's notice."""
    metadata = configparser.ConfigParser(interpolation=None)
    metadata.read(folder / "metadata.txt", encoding="utf-8")
    works = []
    for path in folder.glob("*_gut.txt"):
        text = path.read_bytes().decode("ascii")
        if "\r" in text or BOILERPLATE.search(text):
            raise ValueError(f"{path}: expected LF line ends and no publisher's notice")
        works.append(Work(metadata[path.stem]["title"], text))
    return works


def in_order(works: list[Work]) -> list[Work]:
    """Returns the held-out plays, then the rest shuffled by a hash of the title, so that plays of one series do not follow each other."""
    by_title = {work.title: work for work in works}
    rest = sorted(by_title.keys() - set(HELD_OUT), key=lambda title: hashlib.sha256(title.encode()).digest())
    return [by_title[title] for title in (*HELD_OUT, *rest)]


def main() -> None:
    """Writes the sample next to this file and prints the table of README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the texts")
    folder = parser.parse_args().folder
    if not (folder / "metadata.txt").is_file():
        parser.error(f"{folder} holds no metadata.txt; name the folder of the package's texts")
    works = in_order(read_works(folder))
    lines = "".join(json.dumps(work._asdict()) + "\n" for work in works)
    TARGET.write_bytes(lzma.compress(lines.encode("ascii"), preset=9 | lzma.PRESET_EXTREME))
    for number, work in enumerate(works, start=1):
        print(f"| {number} | {work.title} | {len(work.text):,} | {'validation' if work.title in HELD_OUT else 'training'} |")


if __name__ == "__main__":
    main()
