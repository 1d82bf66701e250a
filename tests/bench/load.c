/* The load of the benchmarks: a program, so that what is measured is the file system and not Python.
 *
 *   load pread  THREADS SECONDS   random 4 KiB reads over the files named on standard input, all open
 *   load fault  THREADS SECONDS   random page faults in a shared mapping of the first file named
 *   load open   THREADS SECONDS   open, 4 KiB, close over the files named, pass after pass
 *   load list   THREADS SECONDS   the names of the directories named, pass after pass
 *   load wait   THREADS SECONDS   as pread, but it prints one by the seconds that all but 1 % took
 *
 * It prints how many were done in a second. What only the first time costs is done before the clock
 * starts: files are opened, `open` and `list` have made one pass. Every thread has its own files in
 * `open` and `list`, and all of them in `pread`. A read that is short, or anything that fails, ends it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, WINDOW = 1 << 16, PAGES = WINDOW / 4096, LISTING = 1 << 18 };

struct file {
    char *path;
    int fd;
    uint64_t blocks;
};

struct worker {
    pthread_t thread;
    int number;
    uint64_t random;
    uint64_t done;
    double *waits;
    size_t room;
};

static struct file *files;
static size_t file_count;
static int thread_count;
static pthread_barrier_t start;
static atomic_bool stop;

static _Noreturn void fail(const char *what, const char *path)
{
    fprintf(stderr, "%s %s: %s\n", what, path, errno ? strerror(errno) : "not what it should be");
    exit(1);
}

static uint64_t next_random(struct worker *worker)
{
    worker->random ^= worker->random << 13;
    worker->random ^= worker->random >> 7;
    worker->random ^= worker->random << 17;
    return worker->random;
}

/* Spread over 0 to bound - 1 without a division. */
static uint64_t below(uint64_t random, uint64_t bound)
{
    return (uint64_t)(((unsigned __int128)random * bound) >> 64);
}

static int open_file(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail("open", path);
    return fd;
}

static void read_block(int fd, void *buffer, uint64_t block, const char *path)
{
    errno = 0;
    if (pread(fd, buffer, BLOCK, (off_t)(block * BLOCK)) != BLOCK)
        fail("read", path);
}

/* --- the works: each does one unit of work over and over until told to stop --- */

static void do_pread(struct worker *worker)
{
    char buffer[BLOCK];
    pthread_barrier_wait(&start);
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        struct file *file = &files[below(next_random(worker), file_count)];
        read_block(file->fd, buffer, below(next_random(worker), file->blocks), file->path);
        worker->done++;
    }
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void do_wait(struct worker *worker)
{
    char buffer[BLOCK];
    pthread_barrier_wait(&start);
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        struct file *file = &files[below(next_random(worker), file_count)];
        double begin = now();
        read_block(file->fd, buffer, below(next_random(worker), file->blocks), file->path);
        if (worker->done == worker->room) {
            worker->room = worker->room ? 2 * worker->room : 1024;
            worker->waits = realloc(worker->waits, worker->room * sizeof *worker->waits);
            if (!worker->waits)
                fail("remember", "a wait");
        }
        worker->waits[worker->done++] = now() - begin;
    }
}

/* One page in each stretch that the kernel maps at once, in random order: every touch is a fault. */
static void do_fault(struct worker *worker)
{
    struct file *file = &files[0];
    uint64_t count = file->blocks * BLOCK / WINDOW;
    uint32_t *order = malloc(count * sizeof *order);
    if (!order || !count)
        fail("too small", file->path);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t j = below(next_random(worker), i + 1);
        order[i] = order[j];
        order[j] = (uint32_t)i;
    }
    pthread_barrier_wait(&start);
    while (!atomic_load(&stop)) {
        volatile char *view = mmap(NULL, count * WINDOW, PROT_READ, MAP_SHARED, file->fd, 0);
        if (view == MAP_FAILED)
            fail("map", file->path);
        for (uint64_t i = 0; i < count; i++) {
            (void)view[order[i] * (uint64_t)WINDOW + below(next_random(worker), PAGES) * BLOCK];
            worker->done++;
            if (atomic_load_explicit(&stop, memory_order_relaxed))
                break;
        }
        munmap((void *)view, count * WINDOW);
    }
    free(order);
}

/* Over the worker's own files once; false when told to stop on the way. */
static int pass(struct worker *worker, uint64_t (*one)(const struct file *), atomic_bool *until)
{
    for (size_t i = (size_t)worker->number; i < file_count; i += (size_t)thread_count) {
        if (until && atomic_load_explicit(until, memory_order_relaxed))
            return 0;
        worker->done += one(&files[i]);
    }
    return 1;
}

static void passes(struct worker *worker, uint64_t (*one)(const struct file *))
{
    pass(worker, one, NULL);
    worker->done = 0;
    pthread_barrier_wait(&start);
    while (!atomic_load(&stop) && pass(worker, one, &stop))
        ;
}

static uint64_t open_once(const struct file *file)
{
    char buffer[BLOCK];
    int fd = open_file(file->path);
    read_block(fd, buffer, 0, file->path);
    close(fd);
    return 1;
}

static uint64_t list_once(const struct file *file)
{
    struct entry {
        uint64_t inode;
        int64_t offset;
        uint16_t length;
        uint8_t kind;
        char name[];
    };
    char *buffer = malloc(LISTING);
    uint64_t names = 0;
    long filled;
    int fd = open_file(file->path);
    if (!buffer)
        fail("list", file->path);
    while ((filled = syscall(SYS_getdents64, fd, buffer, LISTING)) > 0)
        for (long at = 0; at < filled; at += ((struct entry *)(buffer + at))->length)
            names++;
    if (filled < 0)
        fail("list", file->path);
    close(fd);
    free(buffer);
    return names;
}

static void do_open(struct worker *worker)
{
    passes(worker, open_once);
}

static void do_list(struct worker *worker)
{
    passes(worker, list_once);
}

static const struct work {
    const char *name;
    void (*run)(struct worker *);
    int keeps_open;
} works[] = {
    {"pread", do_pread, 1},
    {"fault", do_fault, 1},
    {"open", do_open, 0},
    {"list", do_list, 0},
    {"wait", do_wait, 1},
};

static const struct work *chosen;

static void *run(void *worker)
{
    chosen->run(worker);
    return NULL;
}

/* --- what is read, and the clock --- */

static void read_names(void)
{
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    while ((length = getline(&line, &room, stdin)) > 0) {
        if (line[length - 1] == '\n')
            line[length - 1] = '\0';
        files = realloc(files, (file_count + 1) * sizeof *files);
        if (!files)
            fail("remember", line);
        files[file_count++] = (struct file){strdup(line), -1, 0};
    }
    free(line);
    if (!file_count)
        fail("nothing named on", "standard input");
}

static void open_all(void)
{
    struct rlimit limit;
    struct stat status;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    for (size_t i = 0; i < file_count; i++) {
        files[i].fd = open_file(files[i].path);
        errno = 0;
        if (fstat(files[i].fd, &status) < 0 || status.st_size < BLOCK)
            fail("size of", files[i].path);
        files[i].blocks = (uint64_t)status.st_size / BLOCK;
    }
}

static int ascending(const void *one, const void *other)
{
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

/* One by the seconds within which all but 1 % of the reads of all workers were done. */
static double slowest(const struct worker *workers, uint64_t done)
{
    double *all = malloc((done + 1) * sizeof *all);
    uint64_t count = 0;
    if (!all || !done)
        fail("measure", "nothing");
    for (int i = 0; i < thread_count; i++)
        for (uint64_t j = 0; j < workers[i].done; j++)
            all[count++] = workers[i].waits[j];
    qsort(all, count, sizeof *all, ascending);
    double wait = all[count - 1 - count / 100];
    free(all);
    return 1 / wait;
}

int main(int count, char **arguments)
{
    for (size_t i = 0; count == 4 && i < sizeof works / sizeof *works; i++)
        if (!strcmp(arguments[1], works[i].name))
            chosen = &works[i];
    thread_count = chosen ? atoi(arguments[2]) : 0;
    double seconds = chosen ? atof(arguments[3]) : 0;
    if (thread_count < 1 || thread_count > 1024 || !(seconds > 0)) {
        fprintf(stderr, "usage: load pread|fault|open|list|wait THREADS SECONDS < NAMES\n");
        return 2;
    }
    read_names();
    if (chosen->keeps_open)
        open_all();
    struct worker *workers = calloc((size_t)thread_count, sizeof *workers);
    pthread_barrier_init(&start, NULL, (unsigned)thread_count + 1);
    for (int i = 0; i < thread_count; i++) {
        workers[i].number = i;
        workers[i].random = 0x9e3779b97f4a7c15u * (uint64_t)(i + 1);
        errno = pthread_create(&workers[i].thread, NULL, run, &workers[i]);
        if (errno)
            fail("start", "a thread");
    }
    pthread_barrier_wait(&start);
    double begin = now();
    struct timespec pause = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&pause, NULL);
    atomic_store(&stop, 1);
    uint64_t done = 0;
    for (int i = 0; i < thread_count; i++) {
        pthread_join(workers[i].thread, NULL);
        done += workers[i].done;
    }
    double seconds_taken = now() - begin;
    double rate = chosen->run == do_wait ? slowest(workers, done) : (double)done / seconds_taken;
    printf("%.1f\n", rate);
    return 0;
}
