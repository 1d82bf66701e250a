/* What the parts of `_kernel` offer each other. */
#ifndef SECTORFS_KERNEL_H
#define SECTORFS_KERNEL_H

#include <stddef.h>
#include <sys/types.h>

#include "_wire.h"

/* ---- _kept.c: files whose opens and cached reads are answered without Python ---- */

enum { READ_MAX = 1 << 20 }; /* the most today's kernels ask for */

struct use {
    uint32_t open;   /* not released yet */
    uint64_t opens;  /* ever */
    double idle;     /* seconds since the last */
};

/* Answer an open: true, and `reply` is what to send; false when it is Python's. */
bool kept_open(uint64_t inode, uint32_t flags, struct open_reply *reply);
/* True when this release belongs to an open that was answered here. */
bool kept_release(uint64_t inode, uint64_t handle);

/* Answer a read: how many bytes of `buffer`, which has READ_MAX, are the reply; -1: Python's. */
ssize_t kept_read(uint64_t inode, const struct read_request *request, void *buffer);

bool kept_remember(uint64_t inode, uint64_t handle, int fd, int32_t backing);
uint32_t kept_forget(uint64_t inode);
bool kept_use(uint64_t inode, struct use *use);
uint64_t kept_opens(void);
uint64_t kept_reads(void);
void kept_forget_all(void);

/* ---- _interrupts.c: requests that nobody waits for any more ---- */

/* What tells whether somebody still waits for a request. */
struct interruption {
    uint64_t unique;
    uint32_t pid;
    bool buffered; /* a read for the page cache */
};

struct interruption describe(const struct request_header *request);

bool open_interrupts(void);
void close_interrupts(void);
/* Note that a request is to be given up. */
void tell_interrupt(const struct request_header *request);
/* Readable while `take_interrupts` has some; -1 without a session. */
int interrupts_fd(void);
/* All since the last call; the caller frees them. */
size_t take_interrupts(struct interruption **taken);

/* ---- _channel.c: between libfuse and the kernel ---- */

struct facts {
    unsigned long session; /* its number; 0 without one */
    bool introduced, offered, granted;
};

void channel_limit(uint16_t max_background);
struct facts channel_facts(void);
int channel_ioctl(unsigned long request, void *argument);
bool channel_mark(uint64_t handle, int32_t backing, bool cache_directory);
/* The request that libfuse got last; its number is 0 unless it waits for an answer. */
struct interruption channel_current(void);

#endif
