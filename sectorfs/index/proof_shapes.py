"""JSON shapes of what provers ask of storage: the forms of CIDs, byte strings and sectors in them.

Go writes a CID as ``{"/": "bafy…"}`` and a byte string as base64 with padding, either of them null
when it is nil; a sector's reference has its proof type beside it.
"""

from __future__ import annotations

import re

import msgspec

from sectorfs.errors import BadInput
from sectorfs.index.shapes import SectorShape

_CID = re.compile(r"b[a-z2-7]{20,200}|Qm[1-9A-HJ-NP-Za-km-z]{44}", re.ASCII)


class _Shape(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    pass


class CidShape(msgspec.Struct, frozen=True):
    """``{"/": "baga6ea4seaq…"}``."""

    text: str = msgspec.field(name="/")


class SectorRefShape(_Shape, frozen=True):
    """A sector and the seal proof that tells its size."""

    sector: SectorShape = msgspec.field(name="ID")
    proof_type: int


class ChallengedShape(_Shape, frozen=True):
    """A sector with the places a proof looks at."""

    seal_proof: int
    sector_number: int
    sealed: CidShape = msgspec.field(name="SealedCID")
    challenge: list[int] | None = None
    update: bool = False


class SingleProofShape(_Shape, frozen=True):
    """The body of ``/remote/vanilla/single``."""

    miner: int
    sector: ChallengedShape
    proof_type: int


class PorepShape(_Shape, frozen=True):
    """The body of ``/remote/vanilla/porep``."""

    sector: SectorRefShape
    sealed: CidShape
    unsealed: CidShape
    ticket: bytes | None = None
    seed: bytes | None = None


class SnapProofShape(_Shape, frozen=True):
    """The body of ``/remote/vanilla/snap``."""

    sector: SectorRefShape


def to_cid(shape: CidShape) -> str:
    """The text of a CID, in the base that lotus writes; `BadInput` for what is none."""
    if _CID.fullmatch(shape.text) is None:
        raise BadInput("not a CID", shape.text[:80], "for example baga6ea4seaq…")
    return shape.text


def from_cid(text: str) -> CidShape:
    """The shape of a CID."""
    return CidShape(text)
