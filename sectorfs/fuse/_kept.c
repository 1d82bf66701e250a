/* Files whose opens, and reads of cached pages, are answered without Python.
 *
 * Python proves a file once, keeps a descriptor of it, and has it remembered. From then on an open
 * is a look at that descriptor: while size, times and links are the same, so is the content. Each
 * open is counted until its release, and `forget` gives the count back to Python, to which the
 * releases go from then on. Reads that the daemon has to answer are copied here when all of their
 * bytes are cached; whatever would wait for the disk is Python's, which knows deadlines.
 */
#define _GNU_SOURCE
#include "_kernel.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>

#include "_table.h"

enum {
    LARGE_FILE = 0100000, /* O_LARGEFILE; the C library has 0 */
    PLAIN_OPEN = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | LARGE_FILE,
};

/* What makes a descriptor still stand for the content that was proved. */
struct identity {
    uint64_t size, links;
    int64_t modified, modified_ns, changed, changed_ns;
};

/* `node.key` is the inode. */
struct kept {
    struct node node;
    uint64_t handle, opens;
    uint64_t generation; /* another one when the inode is remembered again */
    int64_t used_ns;
    int fd;
    int32_t backing;
    uint32_t open;
    struct identity identity;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* held for a few instructions only */
static struct table files;
static uint64_t generations, opens, reads;

static struct kept *find_kept(uint64_t inode)
{
    return (struct kept *)*find(&files, inode);
}

/* Ask what is known of an open file, and never a server: nobody may hang here. */
static bool identify(int fd, struct identity *identity)
{
    struct statx found;
    unsigned wanted = STATX_SIZE | STATX_NLINK | STATX_MTIME | STATX_CTIME;

    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, wanted, &found) != 0)
        return false;
    *identity = (struct identity){
        .size = found.stx_size,
        .links = found.stx_nlink,
        .modified = found.stx_mtime.tv_sec,
        .modified_ns = found.stx_mtime.tv_nsec,
        .changed = found.stx_ctime.tv_sec,
        .changed_ns = found.stx_ctime.tv_nsec,
    };
    return true;
}

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

bool kept_open(uint64_t inode, uint32_t flags, struct open_reply *reply)
{
    struct kept *kept, seen;
    struct identity identity;
    bool same;

    if (flags & ~(uint32_t)PLAIN_OPEN)
        return false;
    pthread_mutex_lock(&mutex);
    kept = find_kept(inode);
    if (kept != NULL)
        seen = *kept;
    pthread_mutex_unlock(&mutex);
    if (kept == NULL)
        return false;
    /* Without the lock. Python may forget the file meanwhile, and its descriptor may be another's:
     * then nobody counts on what is found. */
    if (!identify(seen.fd, &identity) || memcmp(&identity, &seen.identity, sizeof identity) != 0)
        return false;
    pthread_mutex_lock(&mutex);
    kept = find_kept(inode);
    same = kept != NULL && kept->generation == seen.generation;
    if (same) {
        kept->open++;
        kept->opens++;
        kept->used_ns = now_ns();
        opens++;
    }
    pthread_mutex_unlock(&mutex);
    *reply = (struct open_reply){
        .handle = seen.handle,
        .flags = seen.backing != 0 ? OPEN_PASSTHROUGH : OPEN_KEEP_CACHE,
        .backing = seen.backing,
    };
    return same;
}

bool kept_release(uint64_t inode, uint64_t handle)
{
    struct kept *kept;
    bool ours;

    pthread_mutex_lock(&mutex);
    kept = find_kept(inode);
    ours = kept != NULL && kept->handle == handle && kept->open > 0;
    if (ours)
        kept->open--;
    pthread_mutex_unlock(&mutex);
    return ours;
}

ssize_t kept_read(uint64_t inode, const struct read_request *request, void *buffer)
{
    struct kept *kept, seen;
    struct iovec room = {buffer, 0};
    bool same;

    pthread_mutex_lock(&mutex);
    kept = find_kept(inode);
    if (kept != NULL)
        seen = *kept;
    pthread_mutex_unlock(&mutex);
    if (kept == NULL || seen.handle != request->handle || request->offset > INT64_MAX)
        return -1;
    if (request->offset < seen.identity.size)
        room.iov_len = seen.identity.size - request->offset;
    if (room.iov_len > request->size)
        room.iov_len = request->size;
    if (room.iov_len > READ_MAX)
        return -1;
    /* Never a short reply: the kernel would take it for the end of the file. */
    if (room.iov_len > 0 &&
        preadv2(seen.fd, &room, 1, (off_t)request->offset, RWF_NOWAIT) != (ssize_t)room.iov_len)
        return -1;
    pthread_mutex_lock(&mutex);
    kept = find_kept(inode);
    /* Otherwise the descriptor may have been another's while it was read. */
    same = kept != NULL && kept->generation == seen.generation;
    reads += same;
    pthread_mutex_unlock(&mutex);
    return same ? (ssize_t)room.iov_len : -1;
}

bool kept_remember(uint64_t inode, uint64_t handle, int fd, int32_t backing)
{
    struct kept *kept = malloc(sizeof *kept);
    bool done = false;

    if (kept == NULL)
        return false;
    *kept = (struct kept){.node.key = inode, .handle = handle, .fd = fd, .backing = backing};
    if (identify(fd, &kept->identity)) {
        pthread_mutex_lock(&mutex);
        kept->generation = ++generations;
        kept->used_ns = now_ns();
        done = find_kept(inode) == NULL && insert(&files, &kept->node);
        pthread_mutex_unlock(&mutex);
    }
    if (!done)
        free(kept);
    return done;
}

uint32_t kept_forget(uint64_t inode)
{
    struct kept *kept;
    uint32_t open;

    pthread_mutex_lock(&mutex);
    kept = (struct kept *)take(&files, inode);
    pthread_mutex_unlock(&mutex);
    open = kept != NULL ? kept->open : 0;
    free(kept);
    return open;
}

bool kept_use(uint64_t inode, struct use *use)
{
    struct kept *kept;

    pthread_mutex_lock(&mutex);
    kept = find_kept(inode);
    if (kept != NULL)
        *use = (struct use){kept->open, kept->opens, (double)(now_ns() - kept->used_ns) / 1e9};
    pthread_mutex_unlock(&mutex);
    return kept != NULL;
}

uint64_t kept_opens(void)
{
    uint64_t count;

    pthread_mutex_lock(&mutex);
    count = opens;
    pthread_mutex_unlock(&mutex);
    return count;
}

uint64_t kept_reads(void)
{
    uint64_t count;

    pthread_mutex_lock(&mutex);
    count = reads;
    pthread_mutex_unlock(&mutex);
    return count;
}

void kept_forget_all(void)
{
    pthread_mutex_lock(&mutex);
    clear(&files);
    opens = reads = 0;
    pthread_mutex_unlock(&mutex);
}
