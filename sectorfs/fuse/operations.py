"""pyfuse3 ⇄ tree and handles: the requests of the kernel, and the life of the mount.

Every handler converts arguments, calls, converts the result, and wears `@replies`; it decides
nothing. An exception other than `FUSEError` that leaves a handler would end the whole mount.

pyfuse3 keeps one session in global variables, so a process has one mount. The order at its end
matters: the connection is aborted first (which frees every process, and every thread of ours, that
waits in it), then the mount is detached, then the tasks and the thread are awaited, and only then
is the session freed, which all of them use.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from types import TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from sectorfs.fuse import kernel
from sectorfs.fuse.inodes import InodeTable, PageReply

# isort: split
# The linker must have seen their extensions before it sees pyfuse3.
import msgspec
import pyfuse3
import trio

from sectorfs.config import MountConfig
from sectorfs.errors import MountFailed, ReadOnly, SectorFSError
from sectorfs.fuse import mounts, xattrs
from sectorfs.fuse.backing import Policy
from sectorfs.fuse.handles import Handles, Invalidate, OnStale
from sectorfs.fuse.inodes import Content
from sectorfs.fuse.interrupts import Interrupts
from sectorfs.fuse.listings import Listings
from sectorfs.fuse.notifications import Change, ForgetName, Notice, Notifications, deliver
from sectorfs.fuse.tree import (
    NAME_MAX,
    NEGATIVE_FOR,
    Attributes,
    CatalogView,
    Tree,
    space,
)
from sectorfs.metrics import FUSE_KEPT_OPENS, FUSE_KEPT_READS, FUSE_REQUESTS, FUSE_SECONDS
from sectorfs.stores.protocol import SectorStore
from sectorfs.types import MemberFacts, SectorFile, StorageID, parse_storage_id

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MAX_TASKS = 4000
"""Requests answered at a time. 130 readers of one hung disk filled pyfuse3's own 99."""
STOP_PATIENCE = 1.0
"""Seconds each of the four steps at the end of the mount may take: a stop has five in all."""

_BLOCK = 4096


def replies(
    handler: Callable[Concatenate[SectorOperations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[SectorOperations, P], Coroutine[Any, Any, R]]:
    """Answer every exception of a handler with an errno, count the request and time it."""
    operation = handler.__name__
    seconds = FUSE_SECONDS.labels(operation)
    fine = FUSE_REQUESTS.labels(operation, "ok")

    @functools.wraps(handler)
    async def reply(self: SectorOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        started = time.perf_counter()
        try:
            result = await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError as exc:
            _count_error(operation, exc.errno)
            raise
        except SectorFSError as exc:
            log.log(_level(exc), "%s: %s", operation, exc)
            _count_error(operation, exc.errno)
            raise pyfuse3.FUSEError(exc.errno) from exc
        except Exception as exc:
            log.exception("%s failed", operation)
            _count_error(operation, errno.EIO)
            raise pyfuse3.FUSEError(errno.EIO) from exc
        finally:
            seconds.observe(time.perf_counter() - started)
        fine.inc()
        return result

    return reply


def _refusal(operation: str) -> Callable[..., Coroutine[Any, Any, NoReturn]]:
    """A handler that refuses to change anything."""

    async def refuse(self: SectorOperations, *request: object) -> NoReturn:
        raise ReadOnly("read-only mount", operation)

    refuse.__name__ = operation
    return replies(refuse)


def _count_error(operation: str, code: int) -> None:
    FUSE_REQUESTS.labels(operation, errno.errorcode.get(code, str(code))).inc()


def _level(exc: SectorFSError) -> int:
    # EIO means that data cannot be had; a name that does not exist is daily business.
    return logging.ERROR if exc.errno == errno.EIO else logging.DEBUG


class SectorOperations(pyfuse3.Operations):
    """The handlers. Everything they answer comes from the parts passed in."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        catalog: CatalogView,
        store: SectorStore,
        config: MountConfig,
        *,
        cutoff: float,
        guess: Callable[[SectorFile], int],
        local_path: xattrs.LocalPath,
        is_pinned: Callable[[SectorFile], bool],
        filesystem: Callable[[StorageID], Hashable | None],
        local_file_system: Callable[[StorageID], str],
        on_stale: OnStale,
    ) -> None:
        super().__init__()
        self._catalog = catalog
        self._store = store
        self._config = config
        self._cutoff = cutoff
        self._local_path = local_path
        self._is_pinned = is_pinned
        self._filesystem = filesystem
        self._local_file_system = local_file_system
        self._policy = Policy(config.passthrough, config.passthrough_storages)
        self.introduced = trio.Event()
        self.interrupts = Interrupts()
        self.inodes = InodeTable()
        self.writes_pages = self.inodes.writes_pages(
            PageReply(pyfuse3.readdir_reply, pyfuse3.ReaddirToken(), pyfuse3.EntryAttributes())
        )
        """Names of type directories go to the kernel a page at a time, not one by one."""
        self.tree = Tree(catalog, self.inodes, types=config.types, guess=guess)
        self.listings = Listings(self.tree, self.inodes, trio.current_time)
        self.notifications = Notifications(self.inodes, shown_types=self.tree.shown_types)
        invalidate: Invalidate = self.notifications.forget_name
        self.handles = Handles(
            store,
            self.tree,
            self.inodes,
            on_stale=on_stale,
            invalidate=invalidate,
            interruptible=self.interrupts.watch,
            kernel=kernel,
            policy=self._policy,
        )

    def changed(self, changes: Sequence[Change]) -> None:
        """Sector files came, went or are others: the kernel forgets what it knows of them."""
        self.notifications.changed(changes)
        for change in changes:
            self.handles.backing.changed(change.file)

    def repaired(self, file: SectorFile, member: str | None, facts: MemberFacts) -> None:
        """A file on a disk of this node has the right bytes again: the kernel has wrong ones."""
        content = Content(facts.size, facts.mtime_ns)
        self.notifications.forget_pages(file, member, content)

    @property
    def passthrough(self) -> str:
        """Why no file is read past the daemon; empty when large local ones are."""
        if not self._policy.wanted:
            return "mount.passthrough is off"
        offer = kernel.offer()
        return "" if offer.passthrough else offer.reason

    def check_passthrough(self) -> None:
        """`MountFailed` when the configuration requires what the kernel does not offer."""
        if self._policy.requires and self.passthrough:
            raise MountFailed(
                f"passthrough is required: {self.passthrough}", "mount", "or set it to auto"
            )

    def init(self) -> None:
        """The kernel has introduced itself; its caches, and notices to them, begin here."""
        self.introduced.set()
        self.notifications.start()

    @replies
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name; one that does not exist may be remembered for a second."""
        found = self.tree.lookup(parent_inode, name)
        if found is None and await self.interrupts.watch(self.handles.learn(parent_inode)):
            found = self.tree.lookup(parent_inode, name)
        if found is None:
            self.notifications.missed(parent_inode, name)
            return _no_such_entry()
        if found.key is not None:
            self.inodes.look_up(found.key)
        return self._entry(found.attributes)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Take look-ups back. Nobody waits for an answer, not even for an error."""
        try:
            self.inodes.forget(inode_list)
        except Exception:
            log.exception("forget failed")

    @replies
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Attributes of an inode the kernel holds."""
        return self._entry(self.tree.attributes(inode))

    @replies
    async def access(
        self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext
    ) -> bool:
        """Nobody may write; the kernel judges the rest by mode and owner."""
        if mode & os.W_OK:
            raise ReadOnly("read-only mount", f"inode {inode}")
        return True

    @replies
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """Take a snapshot of a directory."""
        await self.interrupts.watch(self.handles.learn(inode))
        handle = self.handles.open_directory(inode)
        if self.listings.may_be_kept(inode):
            kernel.mark_open(handle, cache_directory=True)
        return pyfuse3.FileHandleT(handle)

    @replies
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """List names with attributes until the kernel's buffer is full."""
        listing = self.handles.directory(fh, rewind=start_id == 0)
        if start_id == 0:
            self.listings.begun(listing)
        in_pages = self.writes_pages and listing.file_type is not None
        entries = (self.tree.dots if in_pages else self.tree.entries)(listing, start_id)
        for position, entry in entries:
            attributes = self._entry(entry.attributes)
            if not pyfuse3.readdir_reply(token, entry.name.encode(), attributes, position):
                return
            if entry.key is not None:
                self.inodes.look_up(entry.key)
        if in_pages:
            pattern = self._entry(self.tree.pattern(listing.directory))
            to = PageReply(pyfuse3.readdir_reply, token, pattern)
            self.listings.write_page(listing, start_id, to)

    @replies
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """Forget a snapshot."""
        self.handles.release_directory(fh)

    @replies
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open a file for reading, wherever it lies."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_TRUNC | os.O_APPEND):
            raise ReadOnly("read-only mount", f"inode {inode}")
        handle = await self.interrupts.watch(self.handles.open(inode))
        backing_id = self.handles.backing_id(handle)
        if backing_id:
            kernel.mark_open(handle, backing_id=backing_id)
        return pyfuse3.FileInfo(fh=handle, direct_io=False, keep_cache=True)

    @replies
    async def read(  # type: ignore[override]  # pyfuse3 takes any buffer; its stub says bytes
        self, fh: pyfuse3.FileHandleT, off: int, size: int
    ) -> bytes | memoryview:
        """Read; pyfuse3 copies the buffer to the kernel before anybody else runs."""
        return await self.handles.read(fh, off, size)

    @replies
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Say once that there is nothing to flush; the kernel then saves a round trip per close."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @replies
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Close a file."""
        self.handles.release(fh)

    @replies
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Totals of the attached storages."""
        total = space(self._catalog.storages(), self._filesystem)
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = _BLOCK
        result.f_blocks = total.capacity // _BLOCK
        result.f_bfree = result.f_bavail = total.available // _BLOCK
        result.f_namemax = NAME_MAX
        return result

    @replies
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """One of `user.sectorfs.*`."""
        return xattrs.value(name, self.inodes.key(inode), functools.partial(self._describe, inode))

    @replies
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        """None, so that nobody copies them."""
        return []

    def _describe(self, number: int, file: SectorFile) -> xattrs.Subject:
        copies = xattrs.locations(
            self._catalog,
            file,
            local_path=self._local_path,
            now=trio.current_time(),
            cutoff=self._cutoff,
        )
        key = self.inodes.key(number)
        member = key.member if key is not None else None
        size = key.content.size if key is not None and key.content is not None else 0
        present = self._store.present(file, member)
        subject = xattrs.Subject(
            file,
            self._store.state(file),
            copies,
            size=size,
            present=present,
            pinned=self._is_pinned(file),
            checked=self._store.checked(file, member),
        )
        copy = subject.preferred
        if copy is None or copy.path is None:
            streams = present is not None or self._store.is_streamed(file, member)
            return msgspec.structs.replace(subject, read_path="stream" if streams else "daemon")
        storage = parse_storage_id(copy.storage)
        kind = self._local_file_system(storage)
        read_path = self.handles.read_path(number, storage, kind)
        return msgspec.structs.replace(subject, read_path=read_path)

    def _entry(self, attributes: Attributes) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = attributes.number
        entry.st_mode = attributes.mode
        entry.st_nlink = attributes.links
        entry.st_size = attributes.size
        entry.st_blocks = attributes.blocks
        entry.st_uid = self._config.uid
        entry.st_gid = self._config.gid
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.mtime_ns
        entry.attr_timeout = attributes.valid_for
        entry.entry_timeout = attributes.valid_for
        return entry

    # The kernel's `ro` flag stops nearly all of these before they get here; the answer is the same.
    setattr = _refusal("setattr")
    mknod = _refusal("mknod")
    mkdir = _refusal("mkdir")
    unlink = _refusal("unlink")
    rmdir = _refusal("rmdir")
    symlink = _refusal("symlink")
    rename = _refusal("rename")
    link = _refusal("link")
    create = _refusal("create")
    write = _refusal("write")
    setxattr = _refusal("setxattr")
    removexattr = _refusal("removexattr")


def _no_such_entry() -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = NEGATIVE_FOR
    return entry


class Mount:
    """The mount: there from `async with` on, answering while `run` runs, gone after it.

    An exception that leaves the block is a crash and not an administrator's stop: then the mount
    stays, dead, so that nobody mistakes an empty directory for lost sectors. The next start
    replaces it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        operations: SectorOperations,
        *,
        allow_other: bool,
        source: str = mounts.NAME,
        options: Sequence[str] = (),
    ) -> None:
        self.path = mounts.canonical(path)
        self._operations = operations
        self._options = {
            f"fsname={source}",
            f"subtype={mounts.NAME}",
            "ro",
            "nosuid",
            "nodev",
            "default_permissions",
            *(["allow_other"] if allow_other else []),
            *options,
        }
        self._mount: mounts.MountInfo | None = None
        self._scope = trio.CancelScope()
        self._running = False
        self._connected = True
        self.ended = trio.Event()
        """Set once nothing answers the kernel any more."""
        self._notifier = threading.Thread(
            target=deliver,
            args=(operations.notifications, _send),
            name="notifications",
            daemon=True,
        )

    async def __aenter__(self) -> Mount:
        mounts.check_mountpoint(self.path)
        kernel.prepare()
        FUSE_KEPT_OPENS.set_function(kernel.opens)
        FUSE_KEPT_READS.set_function(kernel.reads)
        _init(self._operations, self.path, self._options)
        try:
            self._mount = mounts.find_mount(self.path)
            self._notifier.start()
        except BaseException:
            pyfuse3.close(unmount=True)
            raise
        log.info("mounted at %s", self.path)
        return self

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer the kernel until the mount ends; returns when somebody else unmounts it.

        Counts as started once the kernel has introduced itself.
        """
        self._running = True
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._answer, nursery.cancel_scope)
                    await self._operations.introduced.wait()
                    nursery.start_soon(self._operations.interrupts.run)
                    nursery.start_soon(self._operations.handles.keep_tidy)
                    # Not earlier: the introduction sets the kernel's own bounds.
                    if self._mount is not None:
                        mounts.tune(self._mount, bounds=not kernel.attached())
                    task_status.started()
        finally:
            self.ended.set()

    async def _answer(self, scope: trio.CancelScope) -> None:
        await pyfuse3.main(max_tasks=MAX_TASKS)
        # The next mount of the machine may have the connection's number by now: never abort it.
        self._connected = False
        log.info("%s: the kernel ended the mount", self.path)
        scope.cancel()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with trio.CancelScope(shield=True):
            await self._stop(leave=_is_crash(exc))

    async def _stop(self, *, leave: bool) -> None:
        self._operations.notifications.close()
        if self._mount is not None and self._connected:
            await _try("abort", functools.partial(mounts.abort, self._mount.minor))
        if not leave:
            await _try("unmount", self._detach)
        self._scope.cancel()
        with trio.move_on_after(STOP_PATIENCE):
            if self._running:
                await self.ended.wait()
        await _try("join", functools.partial(self._notifier.join, STOP_PATIENCE))
        self._operations.handles.close_all()
        if (self._running and not self.ended.is_set()) or self._notifier.is_alive():
            log.warning("%s: a request is stuck; its memory is left to the end", self.path)
            return
        pyfuse3.close(unmount=self._mount is None and not leave)
        log.info("%s: %s", self.path, "left to the next start" if leave else "unmounted")

    def _detach(self) -> None:
        if self._mount is not None and mounts.find_mount(self.path) == self._mount:
            mounts.detach(self.path)


def _is_crash(exc: BaseException | None) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return any(_is_crash(inner) for inner in exc.exceptions)
    # One that fails at its start was never used by anybody.
    return isinstance(exc, Exception) and not isinstance(exc, MountFailed)


async def _try(what: str, call: Callable[[], None]) -> None:
    """Run a step of the end in a thread, for as long as patience lasts; failures are logged."""
    with trio.move_on_after(STOP_PATIENCE):
        try:
            await trio.to_thread.run_sync(call, abandon_on_cancel=True)
        except SectorFSError as exc:
            log.warning("%s: %s", what, exc)


def _init(operations: SectorOperations, path: str, options: set[str]) -> None:
    try:
        pyfuse3.init(operations, path, options)
    except RuntimeError as exc:
        if "fuse_session_new" in str(exc):
            raise MountFailed("unknown mount option", path, f"{sorted(options)}") from exc
        pyfuse3.close(unmount=False)
        hint = "run as root, or install fuse3; allow_other needs user_allow_other in /etc/fuse.conf"
        raise MountFailed("the kernel refused the mount", path, hint) from exc


_ENDED = (errno.ENODEV, errno.ENOTCONN, errno.EBADF, errno.ECONNABORTED)


def _send(notice: Notice) -> bool:
    """Hand a notice to the kernel; False when it does not know what the notice is about."""
    try:
        if isinstance(notice, ForgetName):
            pyfuse3.invalidate_entry(notice.parent, notice.name)
        else:
            pyfuse3.invalidate_inode(notice.number)
    except FileNotFoundError:
        return False
    except OSError as exc:
        level = logging.DEBUG if exc.errno in _ENDED else logging.WARNING
        log.log(level, "notification %s: %s", notice, exc)
    except Exception:
        log.exception("notification %s", notice)
    return True
