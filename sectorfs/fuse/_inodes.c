/* The inode table, packed; and pages of listings, made from rows of the catalog without an object
 * per name.
 *
 * A kernel that has seen a million names holds a million inodes. As Python objects each costs
 * hundreds of bytes and a listing of them a second of the loop; here it is 64 bytes and its share
 * of an index, and a third of a microsecond. What a number means, and which one a key gets, is as
 * in `inode_objects.py`: the same table in Python, for where this was not built.
 *
 * The table is divided by the upper bits of the number into PARTS that grow one by one: none is
 * ever so big that growing it holds the loop. A part keeps its inodes side by side in small chunks
 * (the last one moves into a gap) and finds them by an open-addressed index of their places.
 *
 * A page: pyfuse3 hands names to the kernel one at a time, each an object with a dozen setters.
 * This module is loaded in front of libfuse (RTLD_GLOBAL, before pyfuse3), so that pyfuse3's call of
 * `fuse_add_direntry_plus` comes here. While `page` runs, that one call writes a whole page of
 * entries, each by libfuse's own function: nothing here knows how an entry is laid out. The entry
 * that was passed is the pattern of all (mode, owner, time-outs). Everything runs on one thread,
 * under the interpreter's lock.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <dlfcn.h>
#include <fuse_lowlevel.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { PARTS = 256, PART_SHIFT = 55, FIRST_HASHED = 17, NAME_ROOM = 64 };
enum { CHUNK = 32, MORE_CHUNKS = 8, FIRST_PLACES = 8 };

#define WHOLE_SPACE ((UINT64_C(1) << 63) - FIRST_HASHED)

/* ---- what an inode stands for ---- */

typedef struct {
    uint64_t number;
    uint64_t lookups;
    int64_t miner, sector;
    int64_t size, mtime_ns; /* zero where not told */
    PyObject *member;       /* the name of a file in a sector directory, interned, or NULL */
    uint32_t opens;
    uint8_t file_type;
    bool told;    /* its content is known: never for directories */
    bool retired; /* its key has, or will get, another number */
} Inode;

_Static_assert(sizeof(Inode) == 64, "an inode is a cache line");

static bool same_member(PyObject *a, PyObject *b)
{
    return a == b || (a != NULL && b != NULL && PyUnicode_Compare(a, b) == 0);
}

static bool same_key(const Inode *a, const Inode *b)
{
    return a->sector == b->sector && a->miner == b->miner && a->file_type == b->file_type &&
           a->told == b->told && a->size == b->size && a->mtime_ns == b->mtime_ns &&
           same_member(a->member, b->member);
}

/* ---- the stable hash, as `stable_hash` in inode_objects.py ---- */

static inline uint64_t mixed(uint64_t state, uint64_t value)
{
    uint64_t x = (state ^ value) + UINT64_C(0x9e3779b97f4a7c15);

    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static uint64_t mixed_name(uint64_t state, PyObject *name)
{
    Py_ssize_t length = PyUnicode_GET_LENGTH(name);
    const uint8_t *bytes = PyUnicode_1BYTE_DATA(name); /* ASCII: checked where a key comes in */

    state = mixed(state, (uint64_t)length);
    for (Py_ssize_t i = 0; i < length; i += 8) {
        uint64_t word = 0;
        for (Py_ssize_t j = i; j < length && j < i + 8; j++)
            word |= (uint64_t)bytes[j] << 8 * (j - i);
        state = mixed(state, word);
    }
    return state;
}

static uint64_t hashed(const Inode *key, uint64_t space)
{
    uint64_t state = mixed(0, key->file_type);

    state = mixed(state, (uint64_t)key->miner);
    state = mixed(state, (uint64_t)key->sector);
    if (key->told)
        state = mixed(mixed(state, (uint64_t)key->size), (uint64_t)key->mtime_ns);
    if (key->member != NULL)
        state = mixed_name(state, key->member);
    return state % space;
}

/* ---- the table ---- */

typedef struct {
    Inode **chunks;
    uint32_t *places; /* index + 1 of an inode; 0 is free */
    uint32_t count, chunk_count;
    uint32_t mask; /* of `places`; at most three quarters of them are taken */
} Part;

static inline Inode *at(const Part *part, uint32_t index)
{
    return &part->chunks[index / CHUNK][index % CHUNK];
}

typedef struct {
    PyObject_HEAD
    uint64_t space;
    uint64_t count;
    /* Numbers whose keys had to take another than their own: nearly always none. */
    uint64_t *displaced;
    size_t displaced_count, displaced_room;
    Part parts[PARTS];
} Table;

static Part *part_of(Table *self, uint64_t number)
{
    return &self->parts[(number >> PART_SHIFT) & (PARTS - 1)];
}

/* The place in the index that points to a number, or the free one where it would stand. */
static uint32_t place_of(const Part *part, uint64_t number)
{
    uint32_t place = (uint32_t)number & part->mask;

    while (part->places[place] != 0 && at(part, part->places[place] - 1)->number != number)
        place = (place + 1) & part->mask;
    return place;
}

static Inode *find(Table *self, uint64_t number)
{
    Part *part = part_of(self, number);

    if (part->count == 0)
        return NULL;
    uint32_t found = part->places[place_of(part, number)];
    return found != 0 ? at(part, found - 1) : NULL;
}

static int resize_index(Part *part, uint32_t size)
{
    uint32_t *places = PyMem_Calloc(size, sizeof *places);

    if (places == NULL)
        return -1;
    PyMem_Free(part->places);
    part->places = places;
    part->mask = size - 1;
    for (uint32_t i = 0; i < part->count; i++)
        part->places[place_of(part, at(part, i)->number)] = i + 1;
    return 0;
}

static int add_chunk(Part *part)
{
    if (part->chunk_count % MORE_CHUNKS == 0) {
        size_t size = (part->chunk_count + MORE_CHUNKS) * sizeof *part->chunks;
        Inode **chunks = PyMem_Realloc(part->chunks, size);
        if (chunks == NULL)
            return -1;
        part->chunks = chunks;
    }
    Inode *chunk = PyMem_Malloc(CHUNK * sizeof *chunk);
    if (chunk == NULL)
        return -1;
    part->chunks[part->chunk_count++] = chunk;
    return 0;
}

static int make_room(Part *part)
{
    if (part->count == part->chunk_count * CHUNK && add_chunk(part) < 0)
        return -1;
    if (part->places == NULL)
        return resize_index(part, FIRST_PLACES);
    if ((uint64_t)(part->count + 1) * 4 > (uint64_t)(part->mask + 1) * 3)
        return resize_index(part, (part->mask + 1) * 2);
    return 0;
}

static Inode *insert(Table *self, const Inode *key, uint64_t number)
{
    Part *part = part_of(self, number);

    if (make_room(part) < 0)
        return NULL;
    uint32_t place = place_of(part, number);
    Inode *inode = at(part, part->count);
    *inode = *key;
    inode->number = number;
    inode->lookups = inode->opens = 0;
    Py_XINCREF(inode->member);
    part->places[place] = ++part->count;
    self->count++;
    return inode;
}

/* Close the gap in a run of the index, so that no search ends too early. */
static void free_place(Part *part, uint32_t gap)
{
    for (uint32_t next = (gap + 1) & part->mask; part->places[next] != 0;
         next = (next + 1) & part->mask) {
        uint32_t home = (uint32_t)at(part, part->places[next] - 1)->number & part->mask;
        if (((next - home) & part->mask) >= ((next - gap) & part->mask)) {
            part->places[gap] = part->places[next];
            gap = next;
        }
    }
    part->places[gap] = 0;
}

static void clear(Part *part)
{
    while (part->chunk_count > 0)
        PyMem_Free(part->chunks[--part->chunk_count]);
    PyMem_Free(part->chunks);
    PyMem_Free(part->places);
    memset(part, 0, sizeof *part);
}

static void shrink(Part *part)
{
    uint32_t size = part->mask + 1;

    if (part->count == 0) {
        clear(part);
        return;
    }
    if (part->count + CHUNK <= (part->chunk_count - 1) * CHUNK) /* one is kept for the next */
        PyMem_Free(part->chunks[--part->chunk_count]);
    if (size > FIRST_PLACES && (uint64_t)part->count * 16 < (uint64_t)size * 3)
        resize_index(part, size / 2); /* without memory for a smaller one the bigger one stays */
}

static void drop_displaced(Table *self, uint64_t number)
{
    for (size_t i = 0; i < self->displaced_count; i++)
        if (self->displaced[i] == number) {
            self->displaced[i] = self->displaced[--self->displaced_count];
            return;
        }
}

static void release(Table *self, Inode *inode)
{
    if (inode->lookups != 0 || inode->opens != 0)
        return;
    uint64_t number = inode->number;
    PyObject *member = inode->member;
    Part *part = part_of(self, number);
    uint32_t place = place_of(part, number), last = part->count - 1;
    uint32_t gone = part->places[place] - 1;

    free_place(part, place);
    if (gone != last) {
        part->places[place_of(part, at(part, last)->number)] = gone + 1;
        *inode = *at(part, last);
    }
    part->count = last;
    self->count--;
    drop_displaced(self, number);
    shrink(part);
    Py_XDECREF(member);
}

/* The number of a key, and its inode if that is held. */
static uint64_t number_of(Table *self, const Inode *key, Inode **held)
{
    for (size_t i = 0; i < self->displaced_count; i++) {
        Inode *inode = find(self, self->displaced[i]);
        if (same_key(inode, key)) { /* none of these is retired */
            *held = inode;
            return inode->number;
        }
    }
    /* There is a free number: nobody holds 2^63 of them, and a smaller space is the caller's. */
    for (uint64_t offset = hashed(key, self->space);; offset = (offset + 1) % self->space) {
        Inode *inode = find(self, FIRST_HASHED + offset);
        if (inode == NULL || (same_key(inode, key) && !inode->retired)) {
            *held = inode;
            return FIRST_HASHED + offset;
        }
    }
}

static int displace(Table *self, uint64_t number)
{
    if (self->displaced_count == self->displaced_room) {
        size_t room = self->displaced_room * 2 + 4;
        uint64_t *displaced = PyMem_Realloc(self->displaced, room * sizeof *displaced);
        if (displaced == NULL)
            return -1;
        self->displaced = displaced;
        self->displaced_room = room;
    }
    self->displaced[self->displaced_count++] = number;
    return 0;
}

/* Hold a key under its number, which nobody holds; NULL without memory: then nothing has changed. */
static Inode *hold(Table *self, const Inode *key, uint64_t number)
{
    bool own = number == FIRST_HASHED + hashed(key, self->space);

    if (!own && displace(self, number) < 0)
        return NULL;
    Inode *inode = insert(self, key, number);
    if (inode == NULL && !own)
        self->displaced_count--;
    return inode;
}

/* ---- keys from and to Python: (file_type, miner, number, member, size, mtime_ns) ---- */

static int read_number(PyObject *value, int64_t *result)
{
    long long number = PyLong_AsLongLong(value);

    *result = number;
    return number == -1 && PyErr_Occurred() ? -1 : 0;
}

static int read_key(PyObject *flat, Inode *key)
{
    int64_t file_type;

    memset(key, 0, sizeof *key);
    if (!PyTuple_Check(flat) || PyTuple_GET_SIZE(flat) != 6) {
        PyErr_SetString(PyExc_TypeError, "a key is a tuple of six");
        return -1;
    }
    if (read_number(PyTuple_GET_ITEM(flat, 0), &file_type) < 0 ||
        read_number(PyTuple_GET_ITEM(flat, 1), &key->miner) < 0 ||
        read_number(PyTuple_GET_ITEM(flat, 2), &key->sector) < 0)
        return -1;
    if (file_type < 0 || file_type > UINT8_MAX) {
        PyErr_SetString(PyExc_ValueError, "no file type");
        return -1;
    }
    key->file_type = (uint8_t)file_type;
    PyObject *member = PyTuple_GET_ITEM(flat, 3), *size = PyTuple_GET_ITEM(flat, 4);
    if (member != Py_None) {
        if (!PyUnicode_Check(member) || !PyUnicode_IS_ASCII(member)) {
            PyErr_SetString(PyExc_ValueError, "the name of a member is ASCII");
            return -1;
        }
        key->member = member;
    }
    if (size == Py_None)
        return 0;
    key->told = true;
    if (read_number(size, &key->size) < 0)
        return -1;
    return read_number(PyTuple_GET_ITEM(flat, 5), &key->mtime_ns);
}

static PyObject *write_key(const Inode *inode)
{
    /* Its own reference: making objects may let another thread run, and that may end the inode. */
    PyObject *member = Py_NewRef(inode->member != NULL ? inode->member : Py_None);

    if (!inode->told)
        return Py_BuildValue("(iLLNOO)", inode->file_type, (long long)inode->miner,
                             (long long)inode->sector, member, Py_None, Py_None);
    return Py_BuildValue("(iLLNLL)", inode->file_type, (long long)inode->miner,
                         (long long)inode->sector, member, (long long)inode->size,
                         (long long)inode->mtime_ns);
}

/* ---- methods ---- */

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"space", NULL};
    unsigned long long space = WHOLE_SPACE;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|K", names, &space))
        return NULL;
    if (space == 0 || space > WHOLE_SPACE) {
        PyErr_SetString(PyExc_ValueError, "no space for numbers");
        return NULL;
    }
    Table *self = (Table *)type->tp_alloc(type, 0); /* zeroed */
    if (self != NULL)
        self->space = space;
    return (PyObject *)self;
}

static void table_dealloc(Table *self)
{
    PyTypeObject *type = Py_TYPE(self);

    for (int i = 0; i < PARTS; i++) {
        Part *part = &self->parts[i];
        for (uint32_t j = 0; j < part->count; j++)
            Py_XDECREF(at(part, j)->member);
        clear(part);
    }
    PyMem_Free(self->displaced);
    type->tp_free(self);
    Py_DECREF(type);
}

static Py_ssize_t table_length(Table *self)
{
    return (Py_ssize_t)self->count;
}

/* The inode of a number given as a Python int; NULL with or without an exception set. */
static Inode *held_by(Table *self, PyObject *value)
{
    unsigned long long number = PyLong_AsUnsignedLongLong(value);

    if (number == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    return find(self, number);
}

static int table_contains(Table *self, PyObject *value)
{
    Inode *inode = held_by(self, value);

    return PyErr_Occurred() ? -1 : inode != NULL;
}

static PyObject *table_number(Table *self, PyObject *flat)
{
    Inode key, *held;

    if (read_key(flat, &key) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(number_of(self, &key, &held));
}

static PyObject *table_look_up(Table *self, PyObject *flat)
{
    Inode key, *inode;

    if (read_key(flat, &key) < 0)
        return NULL;
    if (key.member != NULL) {
        /* The same dozen names in every directory: one object for each. */
        Py_INCREF(key.member);
        PyUnicode_InternInPlace(&key.member);
    }
    uint64_t number = number_of(self, &key, &inode);
    if (inode == NULL)
        inode = hold(self, &key, number);
    Py_XDECREF(key.member);
    if (inode == NULL)
        return PyErr_NoMemory();
    inode->lookups++;
    return PyLong_FromUnsignedLongLong(inode->number);
}

static PyObject *table_forget(Table *self, PyObject *pairs)
{
    PyObject *list = PySequence_Fast(pairs, "pairs of a number and a count");

    if (list == NULL)
        return NULL;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(list); i++) {
        unsigned long long number, count;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(list, i), "KK", &number, &count)) {
            Py_DECREF(list);
            return NULL;
        }
        Inode *inode = find(self, number);
        if (inode != NULL) {
            inode->lookups -= count < inode->lookups ? count : inode->lookups;
            release(self, inode);
        }
    }
    Py_DECREF(list);
    Py_RETURN_NONE;
}

static PyObject *table_key(Table *self, PyObject *value)
{
    Inode *inode = held_by(self, value);

    if (inode != NULL)
        return write_key(inode);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *table_pin(Table *self, PyObject *value)
{
    Inode *inode = held_by(self, value);

    if (inode == NULL) {
        if (PyErr_Occurred())
            return NULL;
        Py_RETURN_NONE;
    }
    if (inode->opens == UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "opened too often");
        return NULL;
    }
    PyObject *key = write_key(inode);
    if (key != NULL)
        inode->opens++;
    return key;
}

static PyObject *table_unpin(Table *self, PyObject *value)
{
    Inode *inode = held_by(self, value);

    if (inode == NULL || inode->opens == 0) {
        if (!PyErr_Occurred())
            PyErr_SetObject(PyExc_KeyError, value);
        return NULL;
    }
    inode->opens--;
    release(self, inode);
    Py_RETURN_NONE;
}

static PyObject *table_retire(Table *self, PyObject *value)
{
    Inode *inode = held_by(self, value);

    if (inode == NULL && PyErr_Occurred())
        return NULL;
    if (inode != NULL) {
        inode->retired = true;
        drop_displaced(self, inode->number);
    }
    Py_RETURN_NONE;
}

static PyObject *table_numbers(Table *self, PyObject *value)
{
    long index = PyLong_AsLong(value);

    if (index == -1 && PyErr_Occurred())
        return NULL;
    if (index < 0 || index >= PARTS) {
        PyErr_SetString(PyExc_IndexError, "no such part");
        return NULL;
    }
    const Part *part = &self->parts[index];
    PyObject *list = PyList_New(0);
    /* Making an object may run other code, and that may change the part: read its count anew. */
    for (uint32_t i = 0; list != NULL && i < part->count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(at(part, i)->number);
        if (number == NULL || PyList_Append(list, number) < 0)
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    return list;
}

/* ---- pages of listings ---- */

typedef size_t (*add_entry)(fuse_req_t req, char *buffer, size_t room, const char *name,
                            const struct fuse_entry_param *entry, off_t next);

static add_entry libfuse_add_entry;

/* The page under way; NULL while names come one at a time. */
static struct Page {
    Table *table;
    PyObject *rows; /* a list of None, or (miner, number, size, mtime_ns, told) */
    int64_t file_type;
    bool is_directory;
    off_t position;     /* of the first row */
    Py_ssize_t taken;   /* rows that are done with */
    Py_ssize_t entries; /* of them, those that were written */
    size_t left;
    bool reached;
    PyObject *type, *error, *trace; /* what a row raised */
} *page;

/* The key of a row, and the size it shows: what nobody told is a guess, and no part of the key. */
static int read_row(const struct Page *from, PyObject *row, Inode *key, int64_t *shown)
{
    memset(key, 0, sizeof *key);
    if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) != 5) {
        PyErr_SetString(PyExc_TypeError, "a row is a tuple of five");
        return -1;
    }
    key->file_type = (uint8_t)from->file_type;
    if (read_number(PyTuple_GET_ITEM(row, 0), &key->miner) < 0 ||
        read_number(PyTuple_GET_ITEM(row, 1), &key->sector) < 0 ||
        read_number(PyTuple_GET_ITEM(row, 2), &key->size) < 0 ||
        read_number(PyTuple_GET_ITEM(row, 3), &key->mtime_ns) < 0)
        return -1;
    key->told = PyTuple_GET_ITEM(row, 4) == Py_True;
    *shown = from->is_directory ? 0 : key->size;
    if (!key->told || from->is_directory)
        key->size = 0;
    if (!key->told)
        key->mtime_ns = 0;
    return 0;
}

static void set_attributes(const Inode *key, int64_t size, struct fuse_entry_param *entry)
{
    int64_t seconds = key->mtime_ns / 1000000000, rest = key->mtime_ns % 1000000000;

    if (rest < 0)
        seconds--, rest += 1000000000;
    entry->attr.st_mtim.tv_sec = seconds;
    entry->attr.st_mtim.tv_nsec = rest;
    entry->attr.st_atim = entry->attr.st_ctim = entry->attr.st_mtim;
    entry->attr.st_size = size;
    entry->attr.st_blocks = size / 512 + (size % 512 != 0);
    if (!key->told)
        entry->attr_timeout = entry->entry_timeout = 0;
}

/* Write one row: 1 when it was, 0 when there is no room, -1 with an exception set. */
static int write_row(fuse_req_t req, char *buffer, const struct fuse_entry_param *pattern,
                     PyObject *row)
{
    struct fuse_entry_param entry = *pattern;
    char name[NAME_ROOM];
    Inode key, *inode;
    int64_t shown;

    if (read_row(page, row, &key, &shown) < 0)
        return -1;
    set_attributes(&key, shown, &entry);
    if (page->is_directory) /* its number does not change with what is in it */
        key.told = false, key.mtime_ns = 0;
    uint64_t number = number_of(page->table, &key, &inode);
    entry.ino = entry.attr.st_ino = number;
    snprintf(name, sizeof name, "s-t0%lld-%lld", (long long)key.miner, (long long)key.sector);
    size_t size = libfuse_add_entry(req, buffer, page->left, name, &entry,
                                    page->position + page->taken + 1);
    if (size > page->left)
        return 0;
    if (inode == NULL && (inode = hold(page->table, &key, number)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    inode->lookups++;
    page->left -= size;
    return 1;
}

/* In front of libfuse's: one entry as it does, or the page under way. */
size_t fuse_add_direntry_plus(fuse_req_t req, char *buffer, size_t room, const char *name,
                              const struct fuse_entry_param *entry, off_t next)
{
    if (page == NULL)
        return libfuse_add_entry(req, buffer, room, name, entry, next);
    page->reached = true;
    page->left = room;
    for (; page->rows != NULL && page->taken < PyList_GET_SIZE(page->rows); page->taken++) {
        PyObject *row = PyList_GET_ITEM(page->rows, page->taken);
        if (row == Py_None)
            continue;
        int written = write_row(req, buffer + (room - page->left), entry, row);
        if (written < 0)
            PyErr_Fetch(&page->type, &page->error, &page->trace); /* pyfuse3 expects none */
        if (written <= 0)
            break;
        page->entries++;
    }
    /* What was written goes out even when a later row failed: its look-ups are counted. */
    return page->entries > 0 ? room - page->left : room + 1;
}

static PyObject *emit(PyObject *reply, PyObject *token, PyObject *pattern, struct Page *now)
{
    PyObject *result;

    page = now;
    result = PyObject_CallFunction(reply, "Oy#Oi", token, "", (Py_ssize_t)0, pattern, 0);
    page = NULL;
    return result;
}

PyDoc_STRVAR(page_doc, "page(rows, file_type, is_directory, position, reply, token, pattern)\n"
                       "\n"
                       "Write rows into the reply to one READDIRPLUS and count their look-ups.\n"
                       "Returns (rows done with, entries written, bytes left).");

static PyObject *table_page(Table *self, PyObject *args)
{
    struct Page now = {.table = self};
    PyObject *reply, *token, *pattern;
    long long file_type, position;
    int is_directory;

    if (!PyArg_ParseTuple(args, "O!LpLOOO", &PyList_Type, &now.rows, &file_type, &is_directory,
                          &position, &reply, &token, &pattern))
        return NULL;
    now.file_type = file_type;
    now.is_directory = is_directory;
    now.position = position;
    PyObject *result = emit(reply, token, pattern, &now);
    if (now.entries == 0 && now.type != NULL)
        PyErr_Restore(now.type, now.error, now.trace);
    else {
        /* The next page begins with the row that failed, and says why. */
        Py_XDECREF(now.type);
        Py_XDECREF(now.error);
        Py_XDECREF(now.trace);
    }
    if (result == NULL || PyErr_Occurred()) {
        Py_XDECREF(result);
        return NULL;
    }
    Py_DECREF(result);
    return Py_BuildValue("(nnn)", now.taken, now.entries, (Py_ssize_t)now.left);
}

PyDoc_STRVAR(in_front_doc, "in_front(reply, token, pattern) -> bool\n"
                           "\n"
                           "True when pyfuse3's `readdir_reply` comes to this module.");

static PyObject *in_front(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct Page probe = {0};
    PyObject *reply, *token, *pattern;

    if (!PyArg_ParseTuple(args, "OOO", &reply, &token, &pattern))
        return NULL;
    PyObject *result = emit(reply, token, pattern, &probe);
    if (result == NULL)
        return NULL;
    Py_DECREF(result);
    return PyBool_FromLong(probe.reached);
}

/* ---- module ---- */

static PyMethodDef table_methods[] = {
    {"number", (PyCFunction)table_number, METH_O, "The number of a key."},
    {"look_up", (PyCFunction)table_look_up, METH_O, "Count a look-up of a key; its number."},
    {"forget", (PyCFunction)table_forget, METH_O, "Take look-ups back: (number, count) pairs."},
    {"key", (PyCFunction)table_key, METH_O, "The key of a held number, or None."},
    {"pin", (PyCFunction)table_pin, METH_O, "Count an open of a held number; its key, or None."},
    {"unpin", (PyCFunction)table_unpin, METH_O, "Take an open back."},
    {"retire", (PyCFunction)table_retire, METH_O, "Give the key of a number another one."},
    {"numbers", (PyCFunction)table_numbers, METH_O, "The numbers held in one of `PARTS` parts."},
    {"page", (PyCFunction)table_page, METH_VARARGS, page_doc},
    {"in_front", in_front, METH_VARARGS | METH_STATIC, in_front_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot table_slots[] = {
    {Py_tp_doc, "Which inodes the kernel holds."},
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, table_methods},
    {Py_sq_length, table_length},
    {Py_sq_contains, table_contains},
    {0, NULL},
};

static PyType_Spec table_spec = {
    .name = "sectorfs.fuse._inodes.Table",
    .basicsize = sizeof(Table),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = table_slots,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sectorfs.fuse._inodes",
    .m_doc = "The inode table, packed, and pages of listings.",
    .m_size = -1,
};

static int find_libfuse(void)
{
    void *libfuse = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_LOCAL); /* kept for good */

    if (libfuse != NULL)
        *(void **)&libfuse_add_entry = dlsym(libfuse, "fuse_add_direntry_plus");
    if (libfuse_add_entry != NULL)
        return 0;
    PyErr_Format(PyExc_ImportError, "libfuse3: %s", dlerror());
    return -1;
}

PyMODINIT_FUNC PyInit__inodes(void)
{
    if (find_libfuse() < 0)
        return NULL;
    PyObject *self = PyModule_Create(&module);
    if (self == NULL)
        return NULL;
    PyObject *table = PyType_FromSpec(&table_spec);
    PyObject *parts = PyLong_FromLong(PARTS);
    if (table == NULL || parts == NULL || PyObject_SetAttrString(table, "PARTS", parts) < 0 ||
        PyModule_AddObjectRef(self, "Table", table) < 0)
        Py_CLEAR(self);
    Py_XDECREF(parts);
    Py_XDECREF(table);
    return self;
}
