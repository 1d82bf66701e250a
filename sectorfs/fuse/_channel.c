/* Between libfuse and the kernel: reads requests, answers some, hands the others on, marks replies.
 *
 * The dynamic linker finds `fuse_session_mount` of this module before libfuse's own when the module
 * was loaded with RTLD_GLOBAL before pyfuse3. It calls the real one, keeps the kernel's descriptor
 * for itself, and gives libfuse two functions and an eventfd in its place:
 *
 *   /dev/fuse ── thread `serve` ──┬─ OPEN, READ, RELEASE of remembered files: answered
 *        ▲                        ├─ INTERRUPT: noted, and told by an eventfd of its own
 *        │                        └─ all others: queue, eventfd `wake` ── `hand_over` ── libfuse
 *        └──────────────── replies, marked on their way ── `send_reply` ──────────────────┘
 *
 * The thread never takes the interpreter's lock, and whoever holds `mutex` waits for nothing: opens
 * of remembered files and interrupts do not wait for the loop, however busy it is. (Answering opens
 * on the loop's thread, in `hand_over`, was tried: 83 000 files/s instead of 108 000, and as slow as
 * whatever else the loop had to do. Handing a request on costs those that Python answers 5 %.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_kernel.h"
#include "_table.h"

enum {
    WRITE_MAX = 1 << 20,            /* the largest write libfuse 3.14 asks for; later ones may more */
    REQUEST_MAX = WRITE_MAX + 4096, /* what it reads at a time */
    QUEUE_MAX = 4096,               /* requests waiting for the loop; the kernel keeps the others */
};

/* A request on its way to Python, or being answered there. `node.key` is its `unique`. */
struct request {
    struct node node;
    struct request *after;
    bool handed_over, interrupted;
    struct request_header header;
    char body[];
};

/* How the reply to an open is marked. `node.key` is its handle. */
struct mark {
    struct node node;
    int32_t backing;
    uint32_t set, unset;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t room = PTHREAD_COND_INITIALIZER;
static pthread_t thread;

/* Constant while a session lasts. */
static char *buffer; /* of the thread, for a request; and behind it READ_MAX for a reply */
static int device = -1, wake = -1, stop = -1;
static uint16_t max_background;

/* Under the mutex. */
static bool attached, stopping;
static unsigned long sessions;
static int ended; /* errno with which reading ended */
static struct request *first, *last;
static size_t queued;
static struct interruption current;
static struct table pending; /* requests that Python has to answer */
static struct table marks;
static struct facts facts;

static void lock(void)
{
    pthread_mutex_lock(&mutex);
}

static void unlock(void)
{
    pthread_mutex_unlock(&mutex);
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

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- from the kernel, on the thread ---- */

static bool answer(uint64_t unique, int error, void *body, size_t size)
{
    struct reply_header header = {(uint32_t)(sizeof header + size), -error, unique};
    struct iovec parts[2] = {{&header, sizeof header}, {body, size}};

    return writev(device, parts, size > 0 ? 2 : 1) >= 0;
}

/* The kernel sends an INTERRUPT after its request, but perhaps when that is answered already. */
static void interrupt(uint64_t unique)
{
    struct request *request;

    lock();
    request = (struct request *)*find(&pending, unique);
    if (request != NULL && !request->interrupted) {
        request->interrupted = true;
        if (request->handed_over)
            tell_interrupt(&request->header);
    }
    unlock();
}

static bool open_here(const struct request_header *header, const struct open_request *request)
{
    struct open_reply reply;

    if (!kept_open(header->node, request->flags, &reply))
        return false;
    if (!answer(header->unique, 0, &reply, sizeof reply))
        kept_release(header->node, reply.handle);
    return true;
}

static bool release_here(const struct request_header *header, const struct release_request *request)
{
    if (!kept_release(header->node, request->handle))
        return false;
    answer(header->unique, 0, NULL, 0);
    return true;
}

static bool read_here(const struct request_header *header, const struct read_request *request)
{
    char *bytes = buffer + REQUEST_MAX;
    ssize_t length = kept_read(header->node, request, bytes);

    if (length < 0)
        return false;
    answer(header->unique, 0, bytes, (size_t)length);
    return true;
}

/* Queue a request for the loop. While the queue is full nothing more is read. */
static void hand_on(const struct request_header *header)
{
    struct request *request = malloc(sizeof *request + header->len - sizeof *header);
    bool done = request != NULL;

    if (done) {
        *request = (struct request){.node.key = header->unique, .header = *header};
        memcpy(request->body, header + 1, header->len - sizeof *header);
        lock();
        while (queued == QUEUE_MAX && !stopping)
            pthread_cond_wait(&room, &mutex);
        done = !is_answered(header->opcode) || insert(&pending, &request->node);
        if (done) {
            if (first == NULL)
                raise_event(wake);
            *(first == NULL ? &first : &last->after) = request;
            last = request;
            queued++;
        }
        unlock();
    }
    if (!done) {
        free(request);
        if (is_answered(header->opcode))
            answer(header->unique, ENOMEM, NULL, 0);
    }
}

static void dispatch(const struct request_header *header)
{
    const void *body = header + 1;

    switch (header->opcode) {
    case INTERRUPT:
        interrupt(*(const uint64_t *)body);
        return;
    case OPEN:
        if (open_here(header, body))
            return;
        break;
    case READ:
        if (read_here(header, body))
            return;
        break;
    case RELEASE:
        if (release_here(header, body))
            return;
        break;
    }
    hand_on(header);
}

/* Read one request; 0, or the errno with which reading ends for good. */
static int read_request(void)
{
    const struct request_header *header = (const void *)buffer;
    struct pollfd waiting[2] = {{device, POLLIN, 0}, {stop, POLLIN, 0}};

    for (;;) {
        ssize_t got = read(device, buffer, REQUEST_MAX);

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

static void *serve(void *unused)
{
    bool go;
    int error;

    lock(); /* until the session is ready */
    go = attached;
    unlock();
    if (!go)
        return unused;
    while ((error = read_request()) == 0)
        dispatch((const struct request_header *)buffer);
    lock();
    ended = error;
    raise_event(wake);
    unlock();
    return unused;
}

/* ---- for libfuse, on the loop's thread ---- */

/* libfuse's `read`. Never blocks, and never answers ENOENT or EAGAIN: upon the one libfuse would
 * read again at once, of the other pyfuse3 makes an end of the mount. */
static ssize_t hand_over(int unused_fd, void *to, size_t size, void *unused)
{
    struct request *request;
    ssize_t result = -1;
    int error = EINTR;

    (void)unused_fd, (void)unused;
    lock();
    request = first;
    if (request != NULL) {
        bool waits = is_answered(request->header.opcode);

        first = request->after;
        queued--;
        pthread_cond_signal(&room);
        current = waits ? describe(&request->header) : (struct interruption){0};
        request->handed_over = true;
        if (request->interrupted)
            tell_interrupt(&request->header);
        if (request->header.len <= size) {
            memcpy(to, &request->header, sizeof request->header);
            memcpy((char *)to + sizeof request->header, request->body,
                   request->header.len - sizeof request->header);
            result = request->header.len;
        } else {
            error = EIO;
        }
        if (!waits)
            free(request);
    } else if (ended != 0) {
        error = ended;
    }
    if (first == NULL && ended == 0)
        reset_event(wake);
    unlock();
    errno = error;
    return result;
}

/* `flags2` of an INIT; under the mutex. */
static void look_at_init(const struct request *request)
{
    const struct init_request *init = (const void *)request->body;

    facts.offered = (init->flags & HAS_MORE_FLAGS) && (init->flags2 & PASSTHROUGH);
}

static void mark_init(struct init_reply *reply)
{
    reply->max_background = max_background;
    reply->congestion_threshold = (uint16_t)(max_background / 4 * 3);
    if (reply->max_write > WRITE_MAX)
        reply->max_write = WRITE_MAX;
    /* The kernel tells of no signal while it waits for a direct read that it sent this way. */
    reply->flags &= ~(uint32_t)ASYNC_DIRECT;
    lock();
    facts.granted = facts.offered && !(reply->flags & WRITEBACK_CACHE);
    if (facts.granted) {
        reply->flags |= HAS_MORE_FLAGS;
        reply->flags2 |= PASSTHROUGH;
        reply->max_stack_depth = 1;
    }
    facts.introduced = true;
    unlock();
}

static void mark_open(struct open_reply *reply)
{
    struct mark *mark;

    lock();
    mark = (struct mark *)take(&marks, reply->handle);
    unlock();
    if (mark == NULL)
        return;
    reply->flags = (reply->flags & ~mark->unset) | mark->set;
    reply->backing = mark->backing;
    free(mark);
}

/* The request that is answered now is no longer to be interrupted; its kind, or 0. */
static uint32_t settle(uint64_t unique)
{
    struct request *request;
    uint32_t opcode = 0;

    if (unique == 0)
        return 0; /* a notification, from another thread */
    lock();
    request = (struct request *)take(&pending, unique);
    if (request != NULL) {
        opcode = request->header.opcode;
        if (opcode == INIT)
            look_at_init(request);
    }
    unlock();
    free(request);
    return opcode;
}

/* libfuse's `writev`: a reply or a notification, whose header is a part of its own. */
static ssize_t send_reply(int unused_fd, struct iovec *parts, int count, void *unused)
{
    struct reply_header header = *(const struct reply_header *)parts[0].iov_base;
    uint32_t opcode = settle(header.unique);
    union {
        struct init_reply init;
        struct open_reply open;
    } body = {0};
    struct iovec marked[2] = {{&header, sizeof header}, {&body, 0}};

    (void)unused_fd, (void)unused;
    if (opcode == INIT)
        marked[1].iov_len = sizeof body.init;
    else if (opcode == OPEN || opcode == OPENDIR)
        marked[1].iov_len = sizeof body.open;
    if (marked[1].iov_len == 0 || header.error != 0 || count != 2 ||
        parts[1].iov_len > marked[1].iov_len)
        return writev(device, parts, count);
    memcpy(&body, parts[1].iov_base, parts[1].iov_len);
    if (opcode == INIT)
        mark_init(&body.init);
    else
        mark_open(&body.open);
    header.len = (uint32_t)(sizeof header + marked[1].iov_len);
    return writev(device, marked, 2);
}

/* ---- the life of a session ---- */

/* What a session leaves behind; its thread is gone. */
static void clean_up(void)
{
    for (struct request *request = first, *next; request != NULL; request = next) {
        next = request->after;
        if (!is_answered(request->header.opcode))
            free(request); /* the others are in `pending` */
    }
    first = NULL;
    queued = 0;
    ended = 0;
    current = (struct interruption){0};
    attached = stopping = false;
    facts = (struct facts){0};
    clear(&pending);
    clear(&marks);
    kept_forget_all();
    close_fd(&device);
    close_interrupts();
    close_fd(&stop);
    free(buffer);
    buffer = NULL;
}

/* End the thread and close the kernel's descriptor; `wake` is libfuse's to close. */
static void detach(void)
{
    if (!attached)
        return;
    lock();
    stopping = true;
    pthread_cond_signal(&room);
    unlock();
    raise_event(stop);
    pthread_join(thread, NULL);
    lock();
    clean_up();
    unlock();
}

static void *libfuse(const char *name)
{
    static const char *const files[] = {"libfuse3.so.3", "libfuse3.so.4"};
    void *function = NULL;

    for (size_t i = 0; function == NULL && i < sizeof files / sizeof *files; i++) {
        void *library = dlopen(files[i], RTLD_NOW | RTLD_NOLOAD);

        if (library != NULL) {
            function = dlsym(library, name);
            dlclose(library); /* pyfuse3 holds it */
        }
    }
    return function;
}

static bool start_thread(void)
{
    sigset_t all, before;
    bool started;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    started = pthread_create(&thread, NULL, serve, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started)
        pthread_setname_np(thread, "fuse-requests");
    return started;
}

struct fuse_session;

/* Give libfuse our ends while the thread, held up by the mutex, does not read yet. */
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

    if (session_fd == NULL || custom_io == NULL)
        return false;
    device = session_fd(session);
    lock();
    if (start_thread()) {
        attached = custom_io(session, &custom, wake) == 0 &&
                   fcntl(device, F_SETFL, O_RDWR | O_NONBLOCK) == 0;
        facts.session = ++sessions;
        unlock();
        if (!attached)
            pthread_join(thread, NULL);
    } else {
        unlock();
    }
    return attached;
}

/* What fails leaves the session to libfuse alone. */
static void attach(struct fuse_session *session)
{
    if (attached)
        return;
    buffer = malloc(REQUEST_MAX + READ_MAX);
    wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (buffer != NULL && wake >= 0 && stop >= 0 && open_interrupts() &&
        step_between(session))
        return;
    device = -1; /* still libfuse's */
    close_fd(&wake);
    clean_up();
}

#define IN_FRONT_OF_LIBFUSE __attribute__((visibility("default")))

IN_FRONT_OF_LIBFUSE int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
    int (*mount)(struct fuse_session *, const char *) = libfuse("fuse_session_mount");
    int result = mount != NULL ? mount(session, mountpoint) : -1;

    if (result == 0)
        attach(session);
    return result;
}

IN_FRONT_OF_LIBFUSE void fuse_session_unmount(struct fuse_session *session)
{
    void (*unmount)(struct fuse_session *) = libfuse("fuse_session_unmount");

    detach(); /* an unmount waits for the kernel's descriptor to be closed */
    unmount(session);
}

IN_FRONT_OF_LIBFUSE void fuse_session_destroy(struct fuse_session *session)
{
    void (*destroy)(struct fuse_session *) = libfuse("fuse_session_destroy");

    detach();
    destroy(session);
}

/* ---- for Python ---- */

void channel_limit(uint16_t background)
{
    max_background = background;
}

struct facts channel_facts(void)
{
    struct facts result;

    lock();
    result = facts;
    unlock();
    return result;
}

int channel_ioctl(unsigned long request, void *argument)
{
    if (!attached) {
        errno = ENODEV;
        return -1;
    }
    return ioctl(device, request, argument);
}

bool channel_mark(uint64_t handle, int32_t backing, bool cache_directory)
{
    struct mark *mark = malloc(sizeof *mark);
    bool done;

    if (mark == NULL)
        return false;
    *mark = (struct mark){
        .node.key = handle,
        .backing = backing,
        .set = (backing != 0 ? OPEN_PASSTHROUGH : 0) |
               (cache_directory ? OPEN_CACHE_DIRECTORY | OPEN_KEEP_CACHE : 0),
        .unset = backing != 0 ? OPEN_KEEP_CACHE : 0,
    };
    lock();
    free(take(&marks, handle));
    done = attached && insert(&marks, &mark->node);
    unlock();
    if (!done)
        free(mark);
    return done;
}

struct interruption channel_current(void)
{
    return current; /* written on this thread */
}
