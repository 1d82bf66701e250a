/* Requests and replies of the FUSE protocol, as far as they are looked at here.
 *
 * Not from <linux/fuse.h>: the headers of many systems are older than passthrough. The tests compare
 * all of it with the header where there is one.
 */
#ifndef SECTORFS_WIRE_H
#define SECTORFS_WIRE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>

enum {
    FORGET = 2,
    OPEN = 14,
    READ = 15,
    RELEASE = 18,
    INIT = 26,
    OPENDIR = 27,
    INTERRUPT = 36,
    NOTIFY_REPLY = 41,
    BATCH_FORGET = 42,
};

enum {
    ASYNC_DIRECT = 1 << 15,    /* of INIT: direct reads are sent without waiting for each */
    WRITEBACK_CACHE = 1 << 16, /* of INIT */
    HAS_MORE_FLAGS = 1 << 30,  /* of INIT: `flags2` counts */
    PASSTHROUGH = 1 << 5,      /* of INIT, in `flags2` */
    OPEN_KEEP_CACHE = 1 << 1,
    OPEN_CACHE_DIRECTORY = 1 << 3,
    OPEN_PASSTHROUGH = 1 << 7,
};

struct request_header {
    uint32_t len, opcode;
    uint64_t unique, node;
    uint32_t uid, gid, pid, extensions;
};

struct reply_header {
    uint32_t len;
    int32_t error;
    uint64_t unique;
};

struct init_request {
    uint32_t major, minor, max_readahead, flags, flags2, unused[11];
};

struct init_reply {
    uint32_t major, minor, max_readahead, flags;
    uint16_t max_background, congestion_threshold;
    uint32_t max_write, time_granularity;
    uint16_t max_pages, map_alignment;
    uint32_t flags2, max_stack_depth, unused[6];
};

struct open_request {
    uint32_t flags, open_flags;
};

struct open_reply {
    uint64_t handle;
    uint32_t flags;
    int32_t backing;
};

struct release_request {
    uint64_t handle;
    uint32_t flags, release_flags;
    uint64_t lock_owner;
};

struct read_request {
    uint64_t handle, offset;
    uint32_t size, read_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
};

struct backing_file {
    int32_t fd;
    uint32_t flags;
    uint64_t padding;
};

#define OPEN_BACKING _IOW(229, 1, struct backing_file)
#define CLOSE_BACKING _IOW(229, 2, uint32_t)

static inline bool is_answered(uint32_t opcode)
{
    return opcode != FORGET && opcode != BATCH_FORGET && opcode != NOTIFY_REPLY;
}

#endif
