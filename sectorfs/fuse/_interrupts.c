/* Requests that nobody waits for any more: a list, and an eventfd that says there are some. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "_kernel.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* held for a few instructions only */
static int told = -1;
static struct interruption *interruptions; /* at most one for each request under way */
static size_t count, room;

bool open_interrupts(void)
{
    told = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return told >= 0;
}

void close_interrupts(void)
{
    if (told >= 0)
        close(told);
    told = -1;
    count = 0;
}

static bool has_room(void)
{
    size_t wider = room * 2 + 16;
    struct interruption *all;

    if (count < room)
        return true;
    all = realloc(interruptions, wider * sizeof *all);
    if (all == NULL)
        return false;
    interruptions = all;
    room = wider;
    return true;
}

struct interruption describe(const struct request_header *request)
{
    const struct read_request *read = (const void *)(request + 1);

    return (struct interruption){
        .unique = request->unique,
        .pid = request->pid,
        .buffered = request->opcode == READ && !(read->flags & O_DIRECT),
    };
}

void tell_interrupt(const struct request_header *request)
{
    pthread_mutex_lock(&mutex);
    if (has_room()) { /* else the reader waits for the answer, as without interrupts */
        interruptions[count++] = describe(request);
        if (count == 1)
            eventfd_write(told, 1);
    }
    pthread_mutex_unlock(&mutex);
}

int interrupts_fd(void)
{
    return told;
}

size_t take_interrupts(struct interruption **taken)
{
    eventfd_t unused;
    size_t result;

    pthread_mutex_lock(&mutex);
    *taken = interruptions;
    result = count;
    if (count > 0)
        eventfd_read(told, &unused);
    interruptions = NULL;
    count = room = 0;
    pthread_mutex_unlock(&mutex);
    return result;
}
