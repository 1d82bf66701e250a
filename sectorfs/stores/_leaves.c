/* The BLAKE3 hashes of leaves of 64 KiB, one after the other, without the interpreter's lock.
 *
 * The library of that name gives the lock up and takes it again for every leaf, every ten
 * microseconds: two threads that hash then wait for each other more than for the processor. Here the
 * lock is taken once for a whole buffer, or for a part of a file that is read here as well.
 *
 * A leaf is a tree over 64 chunks of 1024 bytes, and sixteen chunks are compressed at once, one in
 * each 32-bit lane of AVX-512. The chaining values stay in that order: word j of sixteen nodes is
 * one vector, and the left and right children of the next level are its even and its odd lanes.
 * Processors without AVX-512, and leaves that are short, are left to the library.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#else
#define X86 0
#endif

enum { LEAF = 65536, CHUNK = 1024, BLOCK = 64, HASH = 32, LANES = 16, GROUPS = LEAF / CHUNK / LANES };
enum { PAGE = 4096, PIECE = 2 * LEAF }; /* a piece stays in the cache until it is hashed */

#if X86

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8 };

static const uint32_t IV[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* Which word of the message each place of a round takes: the permutation, applied again and again. */
static const uint8_t SCHEDULE[7][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8},
    {3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1},
    {10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6},
    {12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4},
    {9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7},
    {11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13},
};

#define TARGET __attribute__((target("avx512f")))
#define INLINE static inline __attribute__((always_inline, target("avx512f")))

INLINE void quarter(__m512i v[16], int a, int b, int c, int d, __m512i x, __m512i y)
{
    v[a] = _mm512_add_epi32(_mm512_add_epi32(v[a], x), v[b]);
    v[d] = _mm512_ror_epi32(_mm512_xor_si512(v[d], v[a]), 16);
    v[c] = _mm512_add_epi32(v[c], v[d]);
    v[b] = _mm512_ror_epi32(_mm512_xor_si512(v[b], v[c]), 12);
    v[a] = _mm512_add_epi32(_mm512_add_epi32(v[a], y), v[b]);
    v[d] = _mm512_ror_epi32(_mm512_xor_si512(v[d], v[a]), 8);
    v[c] = _mm512_add_epi32(v[c], v[d]);
    v[b] = _mm512_ror_epi32(_mm512_xor_si512(v[b], v[c]), 7);
}

INLINE void one_round(__m512i v[16], const __m512i m[16], const uint8_t s[16])
{
    quarter(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
    quarter(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
    quarter(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
    quarter(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
    quarter(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
    quarter(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
    quarter(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
    quarter(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
}

/* One block of each lane into its chaining value. */
INLINE void compress(__m512i h[8], const __m512i m[16], __m512i counter, uint32_t flags)
{
    __m512i v[16];

    for (int i = 0; i < 8; i++)
        v[i] = h[i];
    for (int i = 0; i < 4; i++)
        v[8 + i] = _mm512_set1_epi32((int)IV[i]);
    v[12] = counter;
    v[13] = _mm512_setzero_si512();
    v[14] = _mm512_set1_epi32(BLOCK);
    v[15] = _mm512_set1_epi32((int)flags);
    one_round(v, m, SCHEDULE[0]);
    one_round(v, m, SCHEDULE[1]);
    one_round(v, m, SCHEDULE[2]);
    one_round(v, m, SCHEDULE[3]);
    one_round(v, m, SCHEDULE[4]);
    one_round(v, m, SCHEDULE[5]);
    one_round(v, m, SCHEDULE[6]);
    for (int i = 0; i < 8; i++)
        h[i] = _mm512_xor_si512(v[i], v[8 + i]);
}

INLINE void start(__m512i h[8])
{
    for (int i = 0; i < 8; i++)
        h[i] = _mm512_set1_epi32((int)IV[i]);
}

/* Sixteen blocks, one in each chunk, to sixteen vectors, one of each word. */
INLINE void load(__m512i m[16], const uint8_t *in)
{
    __m512i a[16], b[16];

    for (int i = 0; i < 16; i++)
        a[i] = _mm512_loadu_si512(in + i * CHUNK);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even1 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        __m512i odd1 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        __m512i odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);

        m[i] = _mm512_shuffle_i32x4(even1, even2, 0x88);
        m[4 + i] = _mm512_shuffle_i32x4(odd1, odd2, 0x88);
        m[8 + i] = _mm512_shuffle_i32x4(even1, even2, 0xdd);
        m[12 + i] = _mm512_shuffle_i32x4(odd1, odd2, 0xdd);
    }
}

/* Sixteen chunks, of which the first has this number, to their chaining values. */
TARGET static void chunks(__m512i h[8], const uint8_t *in, int first)
{
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i counter = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));

    start(h);
    for (int at = 0; at < CHUNK; at += BLOCK) {
        __m512i m[16];

        load(m, in + at);
        compress(h, m, counter,
                 (at == 0 ? CHUNK_START : 0) | (at == CHUNK - BLOCK ? CHUNK_END : 0));
    }
}

/* The parents of 32 nodes in order, which `left` has and then `right`. */
TARGET static void parents(__m512i h[8], const __m512i left[8], const __m512i right[8],
                           uint32_t flags)
{
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512i m[16];

    for (int j = 0; j < 8; j++) {
        m[j] = _mm512_permutex2var_epi32(left[j], even, right[j]);
        m[8 + j] = _mm512_permutex2var_epi32(left[j], odd, right[j]);
    }
    start(h);
    compress(h, m, _mm512_setzero_si512(), flags);
}

TARGET static void hash_leaf(const uint8_t *in, uint8_t *out)
{
    __m512i nodes[GROUPS][8], upper[2][8], h[8];

    for (int group = 0; group < GROUPS; group++)
        chunks(nodes[group], in + group * LANES * CHUNK, group * LANES);
    parents(upper[0], nodes[0], nodes[1], PARENT);
    parents(upper[1], nodes[2], nodes[3], PARENT);
    parents(h, upper[0], upper[1], PARENT); /* sixteen nodes are left */
    for (int count = LANES; count > 1; count /= 2) {
        __m512i below[8];

        memcpy(below, h, sizeof below);
        parents(h, below, below, PARENT | (count == 2 ? ROOT : 0));
    }
    for (int j = 0; j < 8; j++) {
        uint32_t word = (uint32_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(h[j]));

        memcpy(out + 4 * j, &word, 4);
    }
}

static int available(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}

#else

static void hash_leaf(const uint8_t *in, uint8_t *out)
{
    (void)in;
    (void)out;
}

static int available(void)
{
    return 0;
}

#endif

static PyObject *py_leaf_hashes(PyObject *module, PyObject *argument)
{
    Py_buffer data;
    PyObject *result = NULL;

    (void)module;
    if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    if (!available())
        PyErr_SetString(PyExc_NotImplementedError, "this processor has no AVX-512");
    else if (data.len % LEAF != 0)
        PyErr_SetString(PyExc_ValueError, "not whole leaves");
    else
        result = PyBytes_FromStringAndSize(NULL, data.len / LEAF * HASH);
    if (result != NULL) {
        uint8_t *out = (uint8_t *)PyBytes_AS_STRING(result);

        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t leaf = 0; leaf < data.len / LEAF; leaf++)
            hash_leaf((const uint8_t *)data.buf + leaf * LEAF, out + leaf * HASH);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&data);
    return result;
}

/* Fill a buffer from a file: bytes read, fewer at its end only; -1 with `errno`. */
static ssize_t fill(int fd, uint8_t *buffer, size_t count, off_t offset)
{
    size_t done = 0;

    while (done < count) {
        ssize_t got = pread(fd, buffer + done, count - done, offset + (off_t)done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

/* Hash leaves of a file until its end: how many; -1 with `errno`. */
static Py_ssize_t hash_file(int fd, off_t offset, Py_ssize_t leaves, uint8_t *out)
{
    uint8_t *buffer = aligned_alloc(PAGE, PIECE);
    Py_ssize_t done = 0;

    if (buffer == NULL) {
        errno = ENOMEM;
        return -1;
    }
    while (done < leaves) {
        Py_ssize_t wanted = leaves - done < PIECE / LEAF ? leaves - done : PIECE / LEAF;
        ssize_t got = fill(fd, buffer, (size_t)(wanted * LEAF), offset + (off_t)done * LEAF);

        if (got < 0) {
            done = -1;
            break;
        }
        for (ssize_t leaf = 0; leaf < got / LEAF; leaf++)
            hash_leaf(buffer + leaf * LEAF, out + (done + leaf) * HASH);
        done += got / LEAF;
        if (got < wanted * LEAF)
            break;
    }
    free(buffer);
    return done;
}

static PyObject *py_hash_file(PyObject *module, PyObject *args)
{
    int fd;
    long long offset;
    Py_ssize_t leaves, done;
    PyObject *result;

    (void)module;
    if (!PyArg_ParseTuple(args, "iLn:hash_file", &fd, &offset, &leaves))
        return NULL;
    if (!available())
        return PyErr_Format(PyExc_NotImplementedError, "this processor has no AVX-512");
    if (offset < 0 || leaves < 0 || leaves > PY_SSIZE_T_MAX / LEAF)
        return PyErr_Format(PyExc_ValueError, "no part of a file");
    result = PyBytes_FromStringAndSize(NULL, leaves * HASH);
    if (result == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    done = hash_file(fd, (off_t)offset, leaves, (uint8_t *)PyBytes_AS_STRING(result));
    Py_END_ALLOW_THREADS
    if (done < 0) {
        Py_DECREF(result);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (done < leaves && _PyBytes_Resize(&result, done * HASH) < 0)
        return NULL;
    return result;
}

static int execute(PyObject *module)
{
    return PyModule_AddObjectRef(module, "AVAILABLE", available() ? Py_True : Py_False);
}

static PyMethodDef functions[] = {
    {"leaf_hashes", py_leaf_hashes, METH_O,
     "The BLAKE3 hashes of whole leaves, 32 bytes each, one after the other."},
    {"hash_file", py_hash_file, METH_VARARGS,
     "The same of so many leaves of an open file from an offset on; fewer at its end."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_leaves",
    .m_doc = "The BLAKE3 hashes of leaves of 64 KiB, native.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__leaves(void)
{
    return PyModuleDef_Init(&definition);
}
