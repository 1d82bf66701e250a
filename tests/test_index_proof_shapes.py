"""CIDs, byte strings and sector references, byte for byte as Go writes them."""

from __future__ import annotations

import json

import msgspec
import pytest

from sectorfs.errors import BadInput
from sectorfs.index.proof_shapes import (
    CidShape,
    PorepShape,
    SingleProofShape,
    SnapProofShape,
    from_cid,
    to_cid,
)

UNSEALED = "baga6ea4seaqao7s73y24kcutaosvacpdjgfe5pw76ooefnyqw4ynr3d2y6x2mpq"
SINGLE = (
    '{"Miner":1000,"Sector":{"SealProof":8,"SectorNumber":7,"SealedCID":{"/":"@"},'
    '"Challenge":[1,2],"Update":false},"ProofType":8}'
).replace("@", UNSEALED)
POREP = (
    '{"Sector":{"ID":{"Miner":1000,"Number":7},"ProofType":8},"Sealed":{"/":"@"},'
    '"Unsealed":{"/":"@"},"Ticket":"AAEC/w==","Seed":"+/8="}'
).replace("@", UNSEALED)
SNAP = '{"Sector":{"ID":{"Miner":1000,"Number":7},"ProofType":8}}'


@pytest.mark.parametrize(
    ("text", "shape"), [(SINGLE, SingleProofShape), (POREP, PorepShape), (SNAP, SnapProofShape)]
)
def test_bodies_are_read_and_written_byte_for_byte(text: str, shape: type) -> None:
    assert msgspec.json.encode(msgspec.json.decode(text, type=shape)).decode() == text


def test_byte_strings_are_base64_and_null_when_nil() -> None:
    porep = msgspec.json.decode(POREP, type=PorepShape)
    assert (porep.ticket, porep.seed) == (b"\x00\x01\x02\xff", b"\xfb\xff")
    nil = {**json.loads(POREP), "Ticket": None}
    assert msgspec.json.decode(json.dumps(nil), type=PorepShape).ticket is None
    for bad in ("AAEC_w", "AAEC/w=", "!", 5, [1]):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(json.dumps({**nil, "Ticket": bad}), type=PorepShape)


def test_a_cid_is_an_object_with_a_slash() -> None:
    assert msgspec.json.encode(from_cid(UNSEALED)) == b'{"/":"%s"}' % UNSEALED.encode()
    shape = msgspec.json.decode(b'{"/":"%s"}' % UNSEALED.encode(), type=CidShape)
    assert to_cid(shape) == UNSEALED
    assert to_cid(CidShape("QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG"))
    for bad in (b'"%s"' % UNSEALED.encode(), b"null", b"{}", b'{"/":5}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(bad, type=CidShape)


@pytest.mark.parametrize(
    "text", ["", "b", UNSEALED.upper(), UNSEALED + "\n", "Qm123", "../../etc", "b" + "a" * 300]
)
def test_what_is_no_cid_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a CID"):
        to_cid(CidShape(text))
