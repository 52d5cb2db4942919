"""The README's generated parts equal the code. To write them again: python tests/test_readme.py --write"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402


def settings_block() -> str:
    """Returns what `--help` prints, as a code block."""
    return f"```\n{train_gpt.help_text()}\n```\n"


def map_block() -> str:
    """Returns one table row per section banner of train_gpt.py: title, first line, number of lines, what it owns."""
    lines = (ROOT / "train_gpt.py").read_text(encoding="utf-8").splitlines()
    rule = "# " + "-" * 132
    starts = [i for i, line in enumerate(lines) if line == rule and lines[i + 2] == rule]
    rows = ["| section | line | lines | owns |", "|---|---:|---:|---|", f"| docstring, imports | 1 | {starts[0]} | how to run, shape letters |"]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        about = []
        for line in lines[start + 3 :]:
            if not line.startswith("# "):
                break
            about.append(line[2:])
        owns = re.split(r"(?<=[a-z0-9])[.:;] ", " ".join(about).removeprefix("Owns "))[0].rstrip(".")
        rows.append(f"| {lines[start + 1][2:]} | {start + 1} | {end - start} | {owns} |")
    return "\n".join(rows) + "\n"


BLOCKS = {"map": map_block, "settings": settings_block}


def replaced(readme: str, name: str, block: str) -> str:
    """Returns the README with the text between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    assert pattern.search(readme), f"README.md lost its markers for {name}"
    return pattern.sub(lambda match: match.group(1) + block + match.group(2), readme)


@pytest.mark.parametrize("name", BLOCKS)
def test_generated_part_of_the_readme_is_current(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert replaced(readme, name, BLOCKS[name]()) == readme, "run: python tests/test_readme.py --write"


def test_readme_names_every_command_and_file_that_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:data|records|tests)/[\w/.]+\.(?:py|md))`", readme):
        assert (ROOT / path).exists(), path


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block_name, make in BLOCKS.items():
        text = replaced(text, block_name, make())
    (ROOT / "README.md").write_text(text, encoding="utf-8")
