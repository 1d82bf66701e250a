"""The CIDs of piece commitments: ``baga6ea4seaq…``, one fixed form and nothing else.

A piece commitment (and the CommD of a sector, which is one) is written as a CID of version 1: codec
*fil-commitment-unsealed*, multihash *sha2-256-trunc254-padded* of 32 bytes, in lower-case base32.
"""

from __future__ import annotations

import base64
import binascii

from sectorfs.errors import BadInput

_PREFIX = bytes.fromhex("0181e203922020")
"""Version 1, codec 0xf101 and hash 0x1012 as varints, 32 bytes."""
_COMMITMENT = 32
_LENGTH = 64
"""Characters: the base's letter and 39 bytes of five bits each."""


def check_commitment(commitment: bytes) -> bytes:
    """The commitment, if it is 32 bytes with the two top bits clear; else `BadInput`."""
    if len(commitment) != _COMMITMENT or commitment[-1] & 0xC0:
        raise BadInput("not a piece commitment", commitment[:40].hex(), "32 bytes of 254 bits")
    return commitment


def piece_cid(commitment: bytes) -> str:
    """The CID of a commitment."""
    data = _PREFIX + check_commitment(commitment)
    return "b" + base64.b32encode(data).decode().rstrip("=").lower()


def parse_piece_cid(text: str) -> bytes:
    """The commitment in a CID; `BadInput` for any other text, and any other kind of CID."""
    shown = text[:80]
    if len(text) != _LENGTH or not text.startswith("b") or not text.isascii():
        raise BadInput("not the CID of a piece", shown, "64 characters, baga6ea4seaq…")
    try:
        data = base64.b32decode(text[1:].upper() + "=")
    except binascii.Error as exc:
        raise BadInput(f"not base32: {exc}", shown) from exc
    commitment = data[len(_PREFIX) :]
    if not data.startswith(_PREFIX):
        raise BadInput("the CID of something else than a piece", shown, "baga6ea4seaq…")
    # Also refuses capitals and set bits behind the end: two spellings of one piece are two keys.
    if piece_cid(commitment) != text:
        raise BadInput("not the canonical spelling of a CID", shown, piece_cid(commitment))
    return commitment
