"""CaseOps: text without capitals that turns back into the original exactly, and the bytes of the original behind each of its tokens.

Capitals cost a tokenizer a second piece for every word that a sentence may begin with. Here they become markers before small letters:

    The NASA launch: OpenAI, iPhone  ->  (TITLE)the (ALLCAPS)nasa launch: (TITLE)open(CAPNEXT)a(CAPNEXT)i, i(CAPNEXT)phone

A word is a maximal run of the ASCII letters. ALLCAPS stands before a word of two or more capitals and nothing else, TITLE before any other word
that begins with a capital, CAPNEXT before every other capital, and ESC before a character of the text that is itself one of the four markers.
All other characters stay: accented, Greek and Cyrillic capitals, ß, ı, İ, ǅ, ligatures, combining marks, lone surrogates. Their case is no
bijection, and the challenge's CaseOps data (openai/parameter-golf #1729) was made by the same rule, so that its tokenizers and shards fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import sentencepiece

MARKERS = TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
MARKER_BYTES = 3
# What a fused tokenizer has as pieces: a space and the marker after it (PR #2109, whose third pair does not occur: CAPNEXT stands inside words).
FUSED = "\u2581" + TITLE, "\u2581" + ALLCAPS

# The work is done on UTF-8, where replacing single bytes is several times faster than a regular expression that finds the capitals of a str.
_TITLE, _ALLCAPS, _CAPNEXT, _ESC = (marker.encode() for marker in MARKERS)
_MARKER = b"\xee\x80[\x81-\x84]"
_LITERAL = re.compile(_MARKER)
_LETTERS = [(bytes([capital]), bytes([capital]).lower()) for capital in range(ord("A"), ord("Z") + 1)]
_TITLE_INSIDE_WORD = re.compile(b"%b(?<=[a-z]%b)" % (_TITLE, _TITLE))  # the marker leads, which makes the search for it fast
# An escaped marker is found as a whole, lest it be taken for the beginning of a word.
_CAPITAL_WORD_OR_ESCAPED = re.compile(b"%b((?:[a-z]%b)++[a-z])(?![a-z])|%b%b" % (_TITLE, _CAPNEXT, _ESC, _MARKER))
_MARKED = re.compile(b"(?:%b|%b)([a-z])|%b([a-z]+)|%b(%b)" % (_TITLE, _CAPNEXT, _ALLCAPS, _ESC, _MARKER))
_ACTING = re.compile(f"{ESC}[{TITLE}-{ESC}]?|[{TITLE}-{CAPNEXT}]")


def encode(text: str) -> str:
    """Returns `text` with small letters and markers for its ASCII capitals. Any string will do, and no two give the same result."""
    content = _LITERAL.sub(_ESC + rb"\g<0>", text.encode("utf-8", "surrogatepass"))
    for capital, small in _LETTERS:
        content = content.replace(capital, _TITLE + small)
    content = _TITLE_INSIDE_WORD.sub(_CAPNEXT, content)
    return _CAPITAL_WORD_OR_ESCAPED.sub(_under_one_marker, content).decode("utf-8", "surrogatepass")


def _under_one_marker(found: re.Match[bytes]) -> bytes:
    """Returns the word of capitals that was found with one marker for all of them, or an escaped marker as it is."""
    return _ALLCAPS + found[1].replace(_CAPNEXT, b"") if found[1] else found[0]


def decode(encoded: str) -> str:
    """Returns the text of which `encoded` is the encoding. Raises ValueError, saying where, when there is none."""
    content = encoded.encode("utf-8", "surrogatepass")
    text = _MARKED.sub(lambda found: found[found.lastindex or 0].upper(), content).decode("utf-8", "surrogatepass")
    if (again := encode(text)) != encoded:
        position = next(index for index, (one, other) in enumerate(zip_longest(encoded, again)) if one != other)
        raise ValueError(f"not the CaseOps encoding of any text; from character {position} on it is not what its text encodes to: {encoded[position:][:40]!a}")
    return text


def original_bytes(encoded: str) -> int:
    """Returns the UTF-8 bytes of the text behind `encoded`: markers that act count nothing, a lone surrogate counts three."""
    return len(encoded.encode("utf-8", "surrogatepass")) - MARKER_BYTES * len(_ACTING.findall(encoded))


def token_bytes(encoded: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Returns how many UTF-8 bytes of the original text each token stands for; together `original_bytes(encoded)`, if there is any token at all.

    `offsets` holds the (begin, end) of each token in the characters of `encoded`, as SentencePiece gives them. A token counts what lies between
    the end of the token before it and its own end, as large as it is in the original, so that of the tokens that spell the bytes of one character
    the last one counts it. The published side files follow the same rule, but for what a tokenizer drops at the two ends of a document: there
    nobody counts it, here the first and the last token do.
    """
    points = np.frombuffer(encoded.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    sizes[[found.start() for found in _ACTING.finditer(encoded)]] = 0  # of an escaped marker this is the ESC
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    ends[-1:] = len(encoded)
    counts: list[int] = np.diff(np.concatenate(([0], np.cumsum(sizes)))[ends], prepend=0).tolist()
    return counts


def is_caseops(tokenizer: sentencepiece.SentencePieceProcessor) -> bool:
    """Returns whether `tokenizer` is one for encoded text, that is, whether each marker is a piece of it."""
    return all(tokenizer.piece_to_id(marker) != tokenizer.unk_id() for marker in MARKERS)


def fuse(model: bytes) -> bytes:
    """Returns the SentencePiece BPE `model` with FUSED in place of as many pieces: those that it learnt last, on which no others are built."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    missing = [fused for fused in FUSED if tokenizer.piece_to_id(fused) == tokenizer.unk_id()]
    special = (tokenizer.is_control, tokenizer.is_unknown, tokenizer.is_unused, tokenizer.is_byte)
    learnt = [
        token for token in range(tokenizer.vocab_size()) if len(tokenizer.id_to_piece(token)) > 1 and not any(kind(token) for kind in special)
    ]
    learnt.sort(key=tokenizer.get_score)
    replaced = dict(zip(sorted(learnt[: len(missing)]), missing, strict=True))
    fields, token = [], 0
    for field in _fields(model):
        if field[0] == PIECE_TAG:
            field = _user_defined_piece(replaced[token]) if token in replaced else field
            token += 1
        fields.append(field)
    return b"".join(fields)


# The little of sentencepiece_model.proto that `fuse` needs. Its Python module wants a protobuf at least as new as the one it was made with.
PIECE_TAG = 0x0A  # ModelProto: field 1, of known length; one for each piece, in the order of their ids


def _fields(message: bytes) -> Iterator[bytes]:
    """Yields the fields of a serialised ModelProto, tag and length included; each is of known length."""
    start = 0
    while start < len(message):
        length = shift = 0
        for position in range(start + 1, len(message)):  # the length, seven bits a byte, the last byte below 128
            length |= (message[position] & 127) << shift
            shift += 7
            if message[position] < 128:
                break
        end = position + 1 + length
        yield message[start:end]
        start = end


def _user_defined_piece(piece: str) -> bytes:
    """Returns the field of a piece that is matched before all others: its text, a score of 0 and the type USER_DEFINED."""
    text = piece.encode()
    entry = bytes([0x0A, len(text)]) + text + b"\x15\0\0\0\0" + b"\x18\x04"
    return bytes([PIECE_TAG, len(entry)]) + entry
