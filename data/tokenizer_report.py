"""Compares tokenizers on the same text: how short they make it, what they lose of it, and what their embedding costs in the artifact.

    python data/tokenizer_report.py --input docs.jsonl.xz fineweb_1024_bpe.model fineweb_8192_bpe.model
    python data/tokenizer_report.py --input docs.jsonl.xz --markdown data/datasets/*/tokenizer.model > tokenizers.md

A tokenizer is a SentencePiece model; one for CaseOps text gets its text through the transform first. BOS is not counted as a token. Use text that no
tokenizer here was trained on: a tokenizer looks better on its own training text.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import caseops
import numpy as np
from rich.console import Console
from rich.table import Table
from tokenize_docs import Corpus, InputError, Parser, batch_documents, load_tokenizer, note, positive

DIM = 512  # the challenge's baseline
BITS_PER_WEIGHT = 3.5  # assumed, to compare sizes; `python train_gpt.py --plan` predicts them for a preset
BYTES_CAP = 16_000_000  # of the artifact, code included


class Report(NamedTuple):
    """What one tokenizer does with the text. Bytes are UTF-8 of the original, before any transform or normalisation."""

    name: str
    vocab_size: int
    is_caseops: bool
    documents: int
    text_bytes: int
    document_tokens: np.ndarray  # int64, of each document, without BOS
    learnt_pieces: int  # all but control, unknown, unused and byte pieces
    absent_pieces: int  # learnt, but never met in the text
    byte_tokens: int
    unknown_tokens: int
    lossy_documents: int  # the decoded text differs from the original
    lost_bytes: int  # of characters that the decoded text holds fewer of than the original

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self.document_tokens.sum())

    def embedding_bytes(self, dim: int, bits: float) -> int:
        """Returns the bytes of a table of `vocab_size` rows of `dim` weights at `bits` bits each."""
        return round(self.vocab_size * dim * bits / 8)


def examine(path: Path, batches: Iterator[list[str]]) -> Report:
    """Returns the report of the tokenizer at `path` on all documents in `batches`. Raises InputError for a file that is no tokenizer, OSError."""
    tokenizer = load_tokenizer(path.read_bytes(), str(path))
    marked = caseops.is_caseops(tokenizer)
    counts = np.zeros(tokenizer.vocab_size(), dtype=np.int64)
    lengths, text_bytes, lossy, lost = list[int](), 0, 0, 0
    for texts in batches:
        contents = [caseops.encode(text) for text in texts] if marked else texts
        for text, content, ids in zip(texts, contents, tokenizer.encode(contents), strict=True):
            counts += np.bincount(ids, minlength=counts.size)
            lengths.append(len(ids))
            text_bytes += len(text.encode("utf-8"))
            decoded = tokenizer.decode([token for token in ids if token != tokenizer.unk_id()])
            if decoded != content:
                lossy += 1
                lost += missing_bytes(content, decoded)
    is_byte = np.array([tokenizer.is_byte(token) for token in range(counts.size)])
    is_special = np.array([tokenizer.is_control(token) or tokenizer.is_unknown(token) or tokenizer.is_unused(token) for token in range(counts.size)])
    learnt = ~(is_byte | is_special)
    return Report(
        name=path.name if path.stem != "tokenizer" else f"{path.parent.name}/{path.name}",
        vocab_size=counts.size,
        is_caseops=marked,
        documents=len(lengths),
        text_bytes=text_bytes,
        document_tokens=np.array(lengths, dtype=np.int64),
        learnt_pieces=int(learnt.sum()),
        absent_pieces=int((learnt & (counts == 0)).sum()),
        byte_tokens=int(counts[is_byte].sum()),
        unknown_tokens=int(counts[tokenizer.unk_id()]),
        lossy_documents=lossy,
        lost_bytes=lost,
    )


def missing_bytes(content: str, decoded: str) -> int:
    """Returns the UTF-8 bytes of the characters that `decoded` holds fewer of than `content`; the markers of CaseOps are no text.

    A lower bound of what is lost: characters that only changed places are not seen.
    """
    missing = Counter(content) - Counter(decoded)
    return sum(len(character.encode("utf-8")) * number for character, number in missing.items() if character not in caseops.MARKERS)


def rows(reports: Sequence[Report], dim: int, bits: float) -> list[tuple[str, list[str]]]:
    """Returns the table: a label, and the cell of each report."""

    def share(part: int, whole: int) -> str:
        return f"{part / max(whole, 1):.3%}"

    def per_document(summary: str) -> list[str]:
        return [f"{np.percentile(report.document_tokens, int(summary)):,.0f}" for report in reports]

    return [
        ("pieces", [f"{report.vocab_size:,}" for report in reports]),
        ("CaseOps", ["yes" if report.is_caseops else "no" for report in reports]),
        ("bytes per token", [f"{report.text_bytes / max(report.tokens, 1):.4f}" for report in reports]),
        ("tokens per byte", [f"{report.tokens / max(report.text_bytes, 1):.4f}" for report in reports]),
        ("tokens", [f"{report.tokens:,}" for report in reports]),
        ("tokens per document, mean", [f"{report.document_tokens.mean():,.0f}" for report in reports]),
        ("tokens per document, median", per_document("50")),
        ("tokens per document, 95%", per_document("95")),
        ("learnt pieces never met", [f"{report.absent_pieces:,} ({report.absent_pieces / max(report.learnt_pieces, 1):.1%})" for report in reports]),
        ("byte-fallback tokens", [share(report.byte_tokens, report.tokens) for report in reports]),
        ("unknown tokens", [share(report.unknown_tokens, report.tokens) for report in reports]),
        ("bytes of text lost", [share(report.lost_bytes, report.text_bytes) for report in reports]),
        ("documents that do not round-trip", [f"{report.lossy_documents:,}" for report in reports]),
        (f"embedding, {dim} x {bits:g} bits", [f"{report.embedding_bytes(dim, bits):,} bytes" for report in reports]),
        (f"  of {BYTES_CAP:,} bytes", [f"{report.embedding_bytes(dim, bits) / BYTES_CAP:.1%}" for report in reports]),
    ]


def as_table(reports: Sequence[Report], dim: int, bits: float) -> Table:
    """Returns the table for a terminal."""
    table = Table()
    table.add_column("", no_wrap=True)
    for report in reports:
        table.add_column(report.name, justify="right", overflow="fold")
    for label, cells in rows(reports, dim, bits):
        table.add_row(label, *cells)
    return table


def as_markdown(reports: Sequence[Report], dim: int, bits: float) -> str:
    """Returns the table for a README."""
    lines = [f"| | {' | '.join(report.name for report in reports)} |", f"|---|{'---:|' * len(reports)}"]
    lines += [f"| {label.strip()} | {' | '.join(cells)} |" for label, cells in rows(reports, dim, bits)]
    return "\n".join(lines)


def positive_number(text: str) -> float:
    """Returns `text` as a number above 0. Raises ArgumentTypeError otherwise."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def run(arguments: Sequence[str] | None) -> None:
    """Does what the command line asks. Raises InputError and OSError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="FILE", type=Path, action="append", required=True, help="documents, as tokenize_docs.py takes them; may be repeated")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--dim", type=positive, default=DIM, help="weights in a row of the embedding (default %(default)s)")
    parser.add_argument("--bits", type=positive_number, default=BITS_PER_WEIGHT, help="bits per weight of the embedding (default %(default)s)")
    parser.add_argument("tokenizers", metavar="MODEL", type=Path, nargs="+", help="SentencePiece models")
    options = parser.parse_args(arguments)
    corpus = Corpus(options.input)
    reports = []
    for path in options.tokenizers:
        if not options.markdown:
            note(f"reading the text with {path}")
        reports.append(examine(path, batch_documents(corpus)))
    if not reports[0].documents:
        raise InputError(f"no documents in {', '.join(map(str, options.input))}")
    if options.markdown:
        print(as_markdown(reports, options.dim, options.bits))
    else:
        print(f"{reports[0].documents:,} documents, {reports[0].text_bytes:,} bytes")
        Console(soft_wrap=True).print(as_table(reports, options.dim, options.bits))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right (one line on standard error)."""
    try:
        run(arguments)
        return 0
    except InputError as error:
        note(f"error: {error}")
    except OSError as error:
        note(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
