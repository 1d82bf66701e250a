"""Every metric of the program, declared once, in Prometheus' own units (seconds, bytes)."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

FUSE_REQUESTS = Counter(
    "sectorfs_fuse_requests_total", "Requests of the kernel answered", ["operation", "result"]
)
FUSE_SECONDS = Histogram(
    "sectorfs_fuse_request_seconds",
    "Time to answer a request of the kernel",
    ["operation"],
    buckets=(1e-4, 1e-3, 1e-2, 0.1, 1, 10, 60),
)
FUSE_KEPT_OPENS = Gauge(
    "sectorfs_fuse_kept_opens", "Opens of this mount answered without Python; no request counts"
)
FUSE_KEPT_READS = Gauge(
    "sectorfs_fuse_kept_reads", "Reads of this mount answered without Python; no request counts"
)
OPEN_FILES = Gauge("sectorfs_open_files", "Files of the mount that are open")
HTTP_REQUESTS = Counter(
    "sectorfs_http_requests_total", "HTTP requests answered", ["route", "status"]
)
HTTP_SENT_BYTES = Counter("sectorfs_http_sent_bytes_total", "Bytes of bodies sent to peers")
FETCHES = Counter("sectorfs_fetches_total", "Whole copies fetched", ["result"])
FETCHED_BYTES = Counter("sectorfs_fetched_bytes_total", "Bytes received from peers")
CACHE_BYTES = Gauge("sectorfs_cache_bytes", "Bytes in the cache path, when last looked at")
EVICTIONS = Counter("sectorfs_evictions_total", "What went to make room", ["kind"])
EVICTED_BYTES = Counter("sectorfs_evicted_bytes_total", "Bytes that went to make room")
SOURCE_FAILURES = Counter("sectorfs_source_failures_total", "Sources that failed a fetch")
WRONG_BYTES = Counter(
    "sectorfs_wrong_bytes_total", "Answers of peers with bytes or hashes that proved wrong"
)
PROVED_BYTES = Counter(
    "sectorfs_proved_bytes_total", "Bytes received from peers that were proved by their digest"
)
STORAGE_HEALTHY = Gauge("sectorfs_storage_healthy", "1 while a path answers", ["storage"])
STORAGE_SILENT = Gauge(
    "sectorfs_storage_silent",
    "1 while requests fail at once: the disk answers nothing",
    ["storage"],
)
STORAGE_SILENCES = Counter(
    "sectorfs_storage_silences_total", "Times a disk answered nothing for a deadline", ["storage"]
)
STORAGE_CAPACITY = Gauge("sectorfs_storage_capacity_bytes", "Size of a path", ["storage"])
STORAGE_AVAILABLE = Gauge("sectorfs_storage_available_bytes", "Room in a path", ["storage"])
SCAN_ODD_ENTRIES = Counter(
    "sectorfs_scan_odd_entries_total", "Entries of storage paths that are no sector files"
)
SCRUBBED_BYTES = Counter("sectorfs_scrubbed_bytes_total", "Bytes read to verify files")
SCRUB_ENDED = Gauge(
    "sectorfs_scrub_ended_seconds", "When the last whole scrub ended (Unix time)", ["storage"]
)
SCRUB_FINDINGS = Gauge(
    "sectorfs_scrub_findings", "Files that the last whole scrub found so", ["storage", "state"]
)
REPAIRED_BLOCKS = Counter("sectorfs_repaired_blocks_total", "Damaged blocks replaced by good ones")
DECLARATIONS = Counter("sectorfs_declarations_total", "Sector files declared", ["change"])
CATALOG_FILES = Gauge("sectorfs_catalog_sector_files", "Sector files in the catalog")
CATALOG_SEQ = Gauge("sectorfs_catalog_seq", "Last change of the Index applied")
INDEX_CONNECTED = Gauge("sectorfs_index_connected", "1 while the change feed answers")
HASHED_BYTES = Counter("sectorfs_hashed_bytes_total", "Bytes of this node's files hashed")
HASH_LEFT_BYTES = Gauge(
    "sectorfs_hash_left_bytes", "Bytes of a path that have no manifest yet", ["storage"]
)
HASH_LEFT_FILES = Gauge(
    "sectorfs_hash_left_files", "Sector files of a path without a manifest", ["storage"]
)
HASH_FAILURES = Counter("sectorfs_hash_failures_total", "Sector files that could not be hashed")
