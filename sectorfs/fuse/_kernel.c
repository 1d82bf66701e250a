/* What pyfuse3 leaves out of the FUSE protocol, native: see kernel.py for what it is good for.
 *
 * The dynamic linker finds `fuse_session_mount` of this module before libfuse's own when the module
 * was loaded with RTLD_GLOBAL before pyfuse3. It calls the real one, keeps the kernel's descriptor
 * for itself, and gives libfuse two functions and an eventfd in its place:
 *
 *   /dev/fuse ── thread `serve` ──┬─ answered here: OPEN and RELEASE of remembered files
 *        ▲                        ├─ INTERRUPT: noted, and told by the eventfd `told`
 *        │                        └─ all others: queue, eventfd `wake` ── `hand_over` ── libfuse
 *        └──────────────── replies, marked on their way ── `send_reply` ──────────────────┘
 *
 * The thread never takes the interpreter's lock, and whoever holds `channel.lock` waits for nothing.
 * So requests are read, and remembered files opened, however busy the loop is.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* ---- the wire ---- */

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
    HAS_MORE_FLAGS = 1 << 30, /* of INIT: `flags2` counts */
    PASSTHROUGH = 1 << 5,     /* of INIT, in `flags2` */
    ASYNC_DIRECT = 1 << 15,
    WRITEBACK_CACHE = 1 << 16,
    OPEN_KEEP_CACHE = 1 << 1,
    OPEN_CACHE_DIRECTORY = 1 << 3,
    OPEN_PASSTHROUGH = 1 << 7,
    PLAIN_OPEN = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | 0100000 /* O_LARGEFILE as the kernel has it */,
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

/* ---- tables by number ---- */

struct node {
    uint64_t key;
    struct node *next;
};

struct table {
    struct node **slots;
    unsigned bits;
    size_t count;
};

static struct node **find(const struct table *table, uint64_t key)
{
    static struct node *none = NULL;
    struct node **place;

    if (table->slots == NULL)
        return &none;
    place = &table->slots[key * UINT64_C(0x9e3779b97f4a7c15) >> (64 - table->bits)];
    while (*place != NULL && (*place)->key != key)
        place = &(*place)->next;
    return place;
}

static bool grow(struct table *table)
{
    struct table wider = {.bits = table->slots == NULL ? 6 : table->bits + 1};

    wider.slots = calloc((size_t)1 << wider.bits, sizeof *wider.slots);
    if (wider.slots == NULL)
        return table->slots != NULL; /* longer chains will do */
    for (size_t i = 0; table->slots != NULL && i < (size_t)1 << table->bits; i++)
        for (struct node *node = table->slots[i], *next; node != NULL; node = next) {
            struct node **place = find(&wider, node->key);

            next = node->next;
            node->next = NULL;
            *place = node;
        }
    free(table->slots);
    table->slots = wider.slots;
    table->bits = wider.bits;
    return true;
}

/* Put in a node whose key is not there yet. */
static bool insert(struct table *table, struct node *node)
{
    struct node **place;

    if (table->slots == NULL || table->count >> table->bits != 0)
        if (!grow(table))
            return false;
    place = find(table, node->key);
    node->next = NULL;
    *place = node;
    table->count++;
    return true;
}

static struct node *take(struct table *table, uint64_t key)
{
    struct node **place = find(table, key), *node = *place;

    if (node != NULL) {
        *place = node->next;
        table->count--;
    }
    return node;
}

static void clear(struct table *table)
{
    for (size_t i = 0; table->slots != NULL && i < (size_t)1 << table->bits; i++)
        for (struct node *node = table->slots[i], *next; node != NULL; node = next) {
            next = node->next;
            free(node);
        }
    free(table->slots);
    *table = (struct table){0};
}

/* ---- the channel ---- */

enum {
    REQUEST_MAX = (1 << 20) + 4096, /* what libfuse reads at a time, and reckons `max_write` from */
    QUEUE_MAX = 4096,               /* requests waiting for the loop; the kernel keeps the others */
};

/* A request on its way to Python or answered there; `node.key` is its `unique`. */
struct request {
    struct node node;
    struct request *after;
    uint32_t len;
    bool handed_over, interrupted;
    uint64_t data[];
};

/* What makes a kept descriptor still stand for the content that was proved. */
struct identity {
    uint64_t size, links;
    int64_t modified, modified_ns, changed, changed_ns;
};

/* A file whose opens are answered here; `node.key` is its inode. */
struct kept {
    struct node node;
    uint64_t handle, generation, opens;
    int64_t used_ns;
    int fd;
    int32_t backing;
    uint32_t open;
    struct identity identity;
};

/* How the reply to an open is marked; `node.key` is its handle. */
struct mark {
    struct node node;
    int32_t backing;
    uint32_t set, unset;
};

struct interruption {
    uint64_t unique;
    uint32_t pid;
    bool buffered;
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t room;
    pthread_t thread;
    char *buffer;
    int device, wake, told, stop;
    bool attached, stopping, introduced;
    unsigned long session; /* counts them */
    int ended; /* errno with which reading ended */
    uint32_t offered, granted; /* `flags2` of INIT and of its reply */
    struct request *first, *last;
    size_t queued;
    uint64_t current, generation, opens;
    struct table pending, kept, marks;
    struct interruption *interruptions;
    size_t interruption_count, interruption_room;
    uint16_t max_background;
} channel = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .room = PTHREAD_COND_INITIALIZER,
    .device = -1,
    .wake = -1,
    .told = -1,
    .stop = -1,
};

static void lock(void)
{
    pthread_mutex_lock(&channel.lock);
}

static void unlock(void)
{
    pthread_mutex_unlock(&channel.lock);
}

static void raise_event(int fd)
{
    eventfd_write(fd, 1); /* cannot block: each is reset before it is raised again */
}

static void reset_event(int fd)
{
    eventfd_t count;

    eventfd_read(fd, &count);
}

static bool answer(uint64_t unique, int error, const void *body, size_t size)
{
    struct reply_header header = {(uint32_t)(sizeof header + size), -error, unique};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)(uintptr_t)body, size}};

    return writev(channel.device, parts, size > 0 ? 2 : 1) >= 0;
}

/* ---- interrupts ---- */

/* Note that a request is to be given up; the lock is held. */
static void tell(const struct request *request)
{
    const struct request_header *header = (const void *)request->data;
    const struct read_request *read = (const void *)(header + 1);
    struct interruption *room = channel.interruptions;
    size_t wider = channel.interruption_room * 2 + 16;

    if (channel.interruption_count == channel.interruption_room) {
        room = realloc(room, wider * sizeof *room);
        if (room == NULL)
            return; /* the reader waits for its answer, as without interrupts */
        channel.interruptions = room;
        channel.interruption_room = wider;
    }
    if (channel.interruption_count == 0)
        raise_event(channel.told);
    room[channel.interruption_count++] = (struct interruption){
        .unique = header->unique,
        .pid = header->pid,
        .buffered = header->opcode == READ && !(read->flags & O_DIRECT),
    };
}

/* An INTERRUPT: one of a request that was answered meanwhile is of no interest to anybody. */
static void interrupt(uint64_t unique)
{
    struct request *request;

    lock();
    request = (struct request *)*find(&channel.pending, unique);
    if (request != NULL && !request->interrupted) {
        request->interrupted = true;
        if (request->handed_over)
            tell(request);
    }
    unlock();
}

/* ---- opens of remembered files ---- */

/* What the kernel knows of an open file. Never asks a server or a FUSE daemon: nobody may hang here. */
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

/* Count an open if the file is still the one that was looked at. */
static bool count_open(const struct kept *seen, int change)
{
    struct kept *kept;
    bool same;

    lock();
    kept = (struct kept *)*find(&channel.kept, seen->node.key);
    same = kept != NULL && kept->generation == seen->generation;
    if (same) {
        kept->open += (uint32_t)change;
        if (change > 0) {
            kept->opens++;
            channel.opens++;
            kept->used_ns = now_ns();
        }
    }
    unlock();
    return same;
}

static bool open_kept(const struct request_header *header, const struct open_request *request)
{
    struct kept kept, *found;
    struct identity identity;
    struct open_reply reply;

    if (request->flags & ~(uint32_t)PLAIN_OPEN)
        return false;
    lock();
    found = (struct kept *)*find(&channel.kept, header->node);
    if (found != NULL)
        kept = *found;
    unlock();
    if (found == NULL)
        return false;
    /* Outside the lock. Python may close the descriptor meanwhile: `generation` tells. */
    if (!identify(kept.fd, &identity) || memcmp(&identity, &kept.identity, sizeof identity) != 0)
        return false;
    if (!count_open(&kept, 1))
        return false;
    reply = (struct open_reply){
        .handle = kept.handle,
        .flags = kept.backing != 0 ? OPEN_PASSTHROUGH : OPEN_KEEP_CACHE,
        .backing = kept.backing,
    };
    if (!answer(header->unique, 0, &reply, sizeof reply))
        count_open(&kept, -1);
    return true;
}

static bool release_kept(const struct request_header *header, const struct release_request *request)
{
    struct kept *kept;
    bool ours;

    lock();
    kept = (struct kept *)*find(&channel.kept, header->node);
    ours = kept != NULL && kept->handle == request->handle && kept->open > 0;
    if (ours)
        kept->open--;
    unlock();
    return ours && (answer(header->unique, 0, NULL, 0), true);
}

/* ---- from the kernel ---- */

static bool is_answered(uint32_t opcode)
{
    return opcode != FORGET && opcode != BATCH_FORGET && opcode != NOTIFY_REPLY;
}

/* Queue a request for the loop. While the queue is full nothing more is read. */
static void hand_on(const struct request_header *header)
{
    struct request *request = malloc(sizeof *request + header->len);

    if (request == NULL) {
        if (is_answered(header->opcode))
            answer(header->unique, ENOMEM, NULL, 0);
        return;
    }
    *request = (struct request){.node.key = header->unique, .len = header->len};
    memcpy(request->data, header, header->len);
    lock();
    while (channel.queued == QUEUE_MAX && !channel.stopping)
        pthread_cond_wait(&channel.room, &channel.lock);
    if (is_answered(header->opcode) && !insert(&channel.pending, &request->node)) {
        unlock();
        answer(header->unique, ENOMEM, NULL, 0);
        free(request);
        return;
    }
    if (channel.first == NULL) {
        channel.first = request;
        raise_event(channel.wake);
    } else {
        channel.last->after = request;
    }
    channel.last = request;
    channel.queued++;
    unlock();
}

static void dispatch(const struct request_header *header)
{
    const void *body = header + 1;

    switch (header->opcode) {
    case INTERRUPT:
        interrupt(*(const uint64_t *)body);
        return;
    case OPEN:
        if (open_kept(header, body))
            return;
        break;
    case RELEASE:
        if (release_kept(header, body))
            return;
        break;
    case INIT:
        if (((const struct init_request *)body)->flags & HAS_MORE_FLAGS)
            channel.offered = ((const struct init_request *)body)->flags2;
        break;
    }
    hand_on(header);
}

/* Read one request; 0, or the errno with which reading ends for good. */
static int read_request(void)
{
    const struct request_header *header = (const void *)channel.buffer;
    struct pollfd waiting[2] = {{channel.device, POLLIN, 0}, {channel.stop, POLLIN, 0}};

    for (;;) {
        ssize_t got = read(channel.device, channel.buffer, REQUEST_MAX);

        if (got >= (ssize_t)sizeof *header && (size_t)got == header->len)
            return 0;
        if (got >= 0)
            return EIO;
        /* ENOENT: the request was given up while it was read. */
        if (errno != EAGAIN && errno != EINTR && errno != ENOENT)
            return errno;
        if (errno == EAGAIN && poll(waiting, 2, -1) > 0 && waiting[1].revents != 0)
            return ENODEV;
    }
}

static void *serve(void *Py_UNUSED(argument))
{
    bool attached;
    int ended;

    lock(); /* until the session is ready */
    attached = channel.attached;
    unlock();
    if (!attached)
        return NULL;
    while ((ended = read_request()) == 0)
        dispatch((const struct request_header *)channel.buffer);
    lock();
    channel.ended = ended;
    raise_event(channel.wake);
    unlock();
    return NULL;
}

/* ---- between libfuse and the kernel, on the loop's thread ---- */

/* libfuse's `read`. Never blocks, and never answers ENOENT or EAGAIN: upon the one libfuse would
 * read again at once, of the other pyfuse3 makes an end of the mount. */
static ssize_t hand_over(int Py_UNUSED(fd), void *buffer, size_t size, void *Py_UNUSED(data))
{
    struct request *request;
    ssize_t result = -1;
    int error = EINTR;

    lock();
    request = channel.first;
    if (request != NULL) {
        const struct request_header *header = (const void *)request->data;
        bool answered = is_answered(header->opcode);

        channel.first = request->after;
        channel.queued--;
        pthread_cond_signal(&channel.room);
        channel.current = answered ? header->unique : 0;
        request->handed_over = true;
        if (request->interrupted)
            tell(request);
        if (request->len <= size) {
            memcpy(buffer, request->data, request->len);
            result = request->len;
        } else {
            error = EIO;
        }
        if (!answered)
            free(request);
    } else if (channel.ended != 0) {
        error = channel.ended;
    }
    if (channel.first == NULL && channel.ended == 0)
        reset_event(channel.wake);
    unlock();
    errno = error;
    return result;
}

static void mark_init(struct init_reply *reply)
{
    reply->max_background = channel.max_background;
    reply->congestion_threshold = (uint16_t)(channel.max_background / 4 * 3);
    /* The kernel tells of no signal while it waits for a direct read that it sent this way. */
    reply->flags &= ~(uint32_t)ASYNC_DIRECT;
    if ((channel.offered & PASSTHROUGH) && !(reply->flags & WRITEBACK_CACHE)) {
        reply->flags |= HAS_MORE_FLAGS;
        reply->flags2 |= PASSTHROUGH;
        reply->max_stack_depth = 1;
    }
    channel.granted = reply->flags2;
    channel.introduced = true;
}

static void mark_open(struct open_reply *reply)
{
    struct mark *mark;

    lock();
    mark = (struct mark *)take(&channel.marks, reply->handle);
    unlock();
    if (mark == NULL)
        return;
    reply->flags = (reply->flags & ~mark->unset) | mark->set;
    reply->backing = mark->backing;
    free(mark);
}

/* libfuse's `writev`: a reply or a notification, whose header is a part of its own. */
static ssize_t send_reply(int Py_UNUSED(fd), struct iovec *parts, int count, void *Py_UNUSED(data))
{
    struct reply_header header = *(const struct reply_header *)parts[0].iov_base;
    struct request *request;
    uint32_t opcode = 0;
    union {
        struct init_reply init;
        struct open_reply open;
    } body = {0};
    struct iovec marked[2] = {{&header, sizeof header}, {&body, 0}};

    if (header.unique != 0) { /* else a notification, from another thread */
        lock();
        request = (struct request *)take(&channel.pending, header.unique);
        unlock();
        if (request != NULL)
            opcode = ((const struct request_header *)request->data)->opcode;
        free(request);
    }
    if (opcode == INIT)
        marked[1].iov_len = sizeof body.init;
    else if (opcode == OPEN || opcode == OPENDIR)
        marked[1].iov_len = sizeof body.open;
    if (marked[1].iov_len == 0 || header.error != 0 || count != 2 ||
        parts[1].iov_len > marked[1].iov_len)
        return writev(channel.device, parts, count);
    memcpy(&body, parts[1].iov_base, parts[1].iov_len);
    if (opcode == INIT)
        mark_init(&body.init);
    else
        mark_open(&body.open);
    header.len = (uint32_t)(sizeof header + marked[1].iov_len);
    return writev(channel.device, marked, 2);
}

/* ---- in front of libfuse ---- */

struct fuse_session;

int fuse_session_mount(struct fuse_session *session, const char *mountpoint);
void fuse_session_unmount(struct fuse_session *session);
void fuse_session_destroy(struct fuse_session *session);

static void *libfuse(const char *name)
{
    static const char *const files[] = {"libfuse3.so.3", "libfuse3.so.4"};

    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        void *library = dlopen(files[i], RTLD_NOW | RTLD_NOLOAD);
        void *function = library != NULL ? dlsym(library, name) : NULL;

        if (library != NULL)
            dlclose(library); /* pyfuse3 holds it */
        if (function != NULL)
            return function;
    }
    return NULL;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* What a session leaves behind; its thread is gone. */
static void forget_all(void)
{
    for (struct request *request = channel.first, *next; request != NULL; request = next) {
        next = request->after;
        if (!is_answered(((const struct request_header *)request->data)->opcode))
            free(request); /* the others are in `pending` */
    }
    channel.first = NULL;
    channel.queued = channel.interruption_count = 0;
    channel.ended = 0;
    channel.offered = channel.granted = 0;
    channel.current = channel.opens = 0;
    channel.attached = channel.stopping = channel.introduced = false;
    clear(&channel.pending);
    clear(&channel.kept);
    clear(&channel.marks);
    close_fd(&channel.device);
    close_fd(&channel.told);
    close_fd(&channel.stop);
    free(channel.buffer);
    channel.buffer = NULL;
}

/* End the thread and close the kernel's descriptor; `wake` is libfuse's to close. */
static void detach(void)
{
    if (!channel.attached)
        return;
    lock();
    channel.stopping = true;
    pthread_cond_signal(&channel.room);
    unlock();
    raise_event(channel.stop);
    pthread_join(channel.thread, NULL);
    lock();
    forget_all();
    unlock();
}

static bool start_thread(void)
{
    sigset_t all, before;
    bool started;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    started = pthread_create(&channel.thread, NULL, serve, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started;
}

/* Give libfuse our ends while the thread, held up by the lock, does not read yet. */
static bool step_between(struct fuse_session *session)
{
    /* libfuse's `struct fuse_custom_io`, with room for what later versions add to it. */
    struct {
        ssize_t (*writev)(int, struct iovec *, int, void *);
        ssize_t (*read)(int, void *, size_t, void *);
        void *others[8];
    } custom = {send_reply, hand_over, {0}};
    int (*session_fd)(struct fuse_session *) = libfuse("fuse_session_fd");
    int (*custom_io)(struct fuse_session *, const void *, int) = libfuse("fuse_session_custom_io");
    bool done;

    if (session_fd == NULL || custom_io == NULL)
        return false;
    channel.device = session_fd(session);
    lock();
    if (!start_thread()) {
        unlock();
        return false;
    }
    channel.attached = done = custom_io(session, &custom, channel.wake) == 0 &&
                              fcntl(channel.device, F_SETFL, O_RDWR | O_NONBLOCK) == 0;
    channel.session++;
    unlock();
    if (!done)
        pthread_join(channel.thread, NULL);
    return done;
}

static void attach(struct fuse_session *session)
{
    if (channel.attached)
        return;
    channel.buffer = malloc(REQUEST_MAX);
    channel.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    channel.told = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    channel.stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (channel.buffer != NULL && channel.wake >= 0 && channel.told >= 0 && channel.stop >= 0 &&
        step_between(session))
        return;
    channel.device = -1; /* still libfuse's */
    close_fd(&channel.wake);
    forget_all();
}

int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
    int (*mount)(struct fuse_session *, const char *) = libfuse("fuse_session_mount");
    int result = mount != NULL ? mount(session, mountpoint) : -1;

    if (result == 0)
        attach(session);
    return result;
}

void fuse_session_unmount(struct fuse_session *session)
{
    void (*unmount)(struct fuse_session *) = libfuse("fuse_session_unmount");

    detach(); /* an unmount waits for the kernel's descriptor to be closed */
    unmount(session);
}

void fuse_session_destroy(struct fuse_session *session)
{
    void (*destroy)(struct fuse_session *) = libfuse("fuse_session_destroy");

    detach();
    destroy(session);
}

/* ---- for kernel.py ---- */

static PyObject *py_limit(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long background = PyLong_AsUnsignedLong(number);

    if (PyErr_Occurred())
        return NULL;
    channel.max_background = background < UINT16_MAX ? (uint16_t)background : UINT16_MAX;
    Py_RETURN_NONE;
}

static PyObject *py_facts(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return Py_BuildValue("kOOO", channel.attached ? channel.session : 0,
                         channel.introduced ? Py_True : Py_False,
                         channel.offered & PASSTHROUGH ? Py_True : Py_False,
                         channel.granted & PASSTHROUGH ? Py_True : Py_False);
}

static PyObject *ioctl_result(unsigned long request, void *argument)
{
    int result = channel.attached ? ioctl(channel.device, request, argument) : (errno = ENODEV, -1);

    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(result);
}

static PyObject *py_open_backing(PyObject *Py_UNUSED(module), PyObject *fd)
{
    struct backing_file file = {.fd = (int)PyLong_AsLong(fd)};

    if (file.fd == -1 && PyErr_Occurred())
        return NULL;
    return ioctl_result(OPEN_BACKING, &file);
}

static PyObject *py_close_backing(PyObject *Py_UNUSED(module), PyObject *number)
{
    uint32_t backing = (uint32_t)PyLong_AsUnsignedLong(number);

    if (PyErr_Occurred())
        return NULL;
    return ioctl_result(CLOSE_BACKING, &backing);
}

static PyObject *py_mark_open(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long handle;
    struct mark *mark;
    int backing, cache_directory;
    bool done;

    if (!PyArg_ParseTuple(args, "Kip:mark_open", &handle, &backing, &cache_directory))
        return NULL;
    mark = malloc(sizeof *mark);
    if (mark == NULL)
        return PyErr_NoMemory();
    *mark = (struct mark){
        .node.key = handle,
        .backing = backing,
        .set = (backing != 0 ? OPEN_PASSTHROUGH : 0) |
               (cache_directory ? OPEN_CACHE_DIRECTORY | OPEN_KEEP_CACHE : 0),
        .unset = backing != 0 ? OPEN_KEEP_CACHE : 0,
    };
    lock();
    free(take(&channel.marks, handle));
    done = insert(&channel.marks, &mark->node);
    unlock();
    if (!done) {
        free(mark);
        return PyErr_NoMemory();
    }
    Py_RETURN_NONE;
}

static PyObject *py_remember(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long inode, handle;
    struct kept *kept;
    int fd, backing;
    bool done = false;

    if (!PyArg_ParseTuple(args, "KKii:remember", &inode, &handle, &fd, &backing))
        return NULL;
    kept = malloc(sizeof *kept);
    if (kept == NULL)
        return PyErr_NoMemory();
    *kept = (struct kept){.node.key = inode, .handle = handle, .fd = fd, .backing = backing};
    if (identify(fd, &kept->identity)) {
        lock();
        kept->generation = ++channel.generation;
        kept->used_ns = now_ns();
        done = channel.attached && *find(&channel.kept, inode) == NULL &&
               insert(&channel.kept, &kept->node);
        unlock();
    }
    if (!done)
        free(kept);
    return PyBool_FromLong(done);
}

static PyObject *py_forget(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long inode = PyLong_AsUnsignedLongLong(number);
    struct kept *kept;
    long open;

    if (PyErr_Occurred())
        return NULL;
    lock();
    kept = (struct kept *)take(&channel.kept, inode);
    unlock();
    open = kept != NULL ? (long)kept->open : 0;
    free(kept);
    return PyLong_FromLong(open);
}

static PyObject *py_use(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long inode = PyLong_AsUnsignedLongLong(number);
    struct kept kept = {0}, *found;

    if (PyErr_Occurred())
        return NULL;
    lock();
    found = (struct kept *)*find(&channel.kept, inode);
    if (found != NULL)
        kept = *found;
    unlock();
    if (found == NULL)
        Py_RETURN_NONE;
    return Py_BuildValue("IKd", kept.open, (unsigned long long)kept.opens,
                         (double)(now_ns() - kept.used_ns) / 1e9);
}

static PyObject *py_opens(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(channel.opens);
}

static PyObject *py_current(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(channel.current);
}

static PyObject *py_interrupts_fd(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(channel.told);
}

static PyObject *py_interrupted(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    PyObject *list = PyList_New(0);
    struct interruption *taken = NULL;
    size_t count;

    if (list == NULL)
        return NULL;
    lock();
    count = channel.interruption_count;
    taken = channel.interruptions;
    channel.interruptions = NULL;
    channel.interruption_count = channel.interruption_room = 0;
    if (count > 0)
        reset_event(channel.told);
    unlock();
    for (size_t i = 0; i < count && list != NULL; i++) {
        PyObject *one = Py_BuildValue("KIO", (unsigned long long)taken[i].unique, taken[i].pid,
                                      taken[i].buffered ? Py_True : Py_False);

        if (one == NULL || PyList_Append(list, one) != 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    free(taken);
    return list;
}

static PyMethodDef functions[] = {
    {"limit", py_limit, METH_O, "Set the background requests the next mount may have."},
    {"facts", py_facts, METH_NOARGS, "attached, introduced, passthrough offered and granted"},
    {"open_backing", py_open_backing, METH_O, "Register a descriptor; its backing id."},
    {"close_backing", py_close_backing, METH_O, "Give a backing id back."},
    {"mark_open", py_mark_open, METH_VARARGS, "handle, backing id, cache directory"},
    {"remember", py_remember, METH_VARARGS, "inode, handle, descriptor, backing id"},
    {"forget", py_forget, METH_O, "Answer no more opens of an inode; how many are open."},
    {"use", py_use, METH_O, "Open now, opened ever, and seconds since the last open."},
    {"opens", py_opens, METH_NOARGS, "Opens answered without Python."},
    {"current", py_current, METH_NOARGS, "The number of the request handed over last, or 0."},
    {"interrupts_fd", py_interrupts_fd, METH_NOARGS, "Readable while requests are interrupted."},
    {"interrupted", py_interrupted, METH_NOARGS, "(number, pid, buffered read) of each since."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_kernel",
    .m_doc = "What pyfuse3 leaves out of the FUSE protocol, native.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernel(void)
{
    return PyModuleDef_Init(&definition);
}
