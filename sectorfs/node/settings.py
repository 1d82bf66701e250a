"""`storage set`: the settings of a storage path of this node, and what a change of them means."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sectorfs.errors import NotFound, Refused, StorageUnavailable
from sectorfs.index.protocol import SectorIndex, StorageInfo
from sectorfs.stores.local import LocalStore

SETTINGS = (
    "weight",
    "max_storage",
    "can_seal",
    "can_store",
    "groups",
    "allow_to",
    "allow_types",
    "deny_types",
    "allow_miners",
    "deny_miners",
)
_FILTERS = ("allow_types", "deny_types", "allow_miners", "deny_miners")

Value = int | bool | list[str]


class ChangeReport(msgspec.Struct):
    """One setting that became another."""

    before: Value
    after: Value


class SettingsReport(msgspec.Struct, kw_only=True):
    """What `storage set` did."""

    storage: str
    path: str
    changed: dict[str, ChangeReport]
    """Settings by name; those that were so already are not among them."""
    declared: int
    """Files declared again because they became primary."""
    notes: list[str]
    """What follows from it, for people."""


def settings_report(
    path: str, before: StorageInfo, after: StorageInfo, *, declared: int
) -> SettingsReport:
    """What a change came to."""
    changed = {}
    for name in SETTINGS:
        old, new = _value(getattr(before, name)), _value(getattr(after, name))
        if old != new:
            changed[name] = ChangeReport(old, new)
    return SettingsReport(
        storage=after.storage,
        path=path,
        changed=changed,
        declared=declared,
        notes=notes(before, after),
    )


def _value(value: int | bool | Sequence[str]) -> Value:
    return value if isinstance(value, int) else list(value)


def notes(before: StorageInfo, after: StorageInfo) -> list[str]:
    """What an operator should know of a change."""
    found = []
    if after.can_store and not before.can_store:
        found.append("what lies here is declared as primary from now on")
    if before.can_store and not after.can_store:
        found.append(
            "files that come from now on are declared as copies; what is primary stays primary"
        )
    if not (after.can_seal or after.can_store) and (before.can_seal or before.can_store):
        found.append("no new file is placed here any more; what lies here stays readable")
    if after.max_storage and after.max_storage != before.max_storage:
        found.append("nothing is placed here until its use is measured")
    if any(getattr(after, name) != getattr(before, name) for name in _FILTERS):
        found.append("filters rule where new files go; what lies here stays")
    return found


async def not_here(target: str, local: LocalStore, index: SectorIndex) -> Exception:
    """The error for a path or storage that is not one of this node's."""
    waiting = local.waiting().get(target)
    if waiting is not None:
        return StorageUnavailable("is not attached", target, waiting)
    for status in await index.storages():
        if status.info.storage == target:
            urls = ", ".join(status.info.urls) or "no URL"
            return Refused(
                "is not a storage path of this node", target, f"run it on the node at {urls}"
            )
    return NotFound("no such storage path on this node", target, "see `sectorfs storage list`")
