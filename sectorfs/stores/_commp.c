/* The binary tree of piece commitments, native, without the interpreter's lock.
 *
 * A node is SHA-256 over two nodes of 32 bytes with the two top bits of its last byte cleared. The
 * message is always 64 bytes, so the second block of SHA-256 is a constant, and its round words are
 * a table. Nodes of one level do not depend on each other; hence three methods:
 *   avx512    sixteen nodes at once, one in each 32-bit lane
 *   sha       the SHA instructions on two nodes at once, because one alone waits for its own rounds
 *   portable  plain C
 * The processor decides when the module is loaded. A method may write over what it reads when both
 * start at the same place: it writes behind its reading.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define X86 0
#endif

enum { NODE = 32, PAIR = 64, LANES = 16 };

typedef void (*hash_pairs)(const uint8_t *in, uint8_t *out, size_t count);

static const uint32_t INITIAL[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static const uint32_t K[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* Round words (K added) of the second block: a set bit, zeros, the length of 512 bits. */
static uint32_t SECOND[64] __attribute__((aligned(64)));

/* ---- portable ---- */

static inline uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static inline uint32_t next_word(const uint32_t w[64], int i)
{
    uint32_t a = w[i - 15], b = w[i - 2];
    uint32_t s0 = rotate(a, 7) ^ rotate(a, 18) ^ a >> 3;
    uint32_t s1 = rotate(b, 17) ^ rotate(b, 19) ^ b >> 10;

    return w[i - 16] + s0 + w[i - 7] + s1;
}

static void rounds(uint32_t state[8], const uint32_t words[64])
{
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
        uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + words[i];
        uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
        uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));

        h = g, g = f, f = e, e = d + t1;
        d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static void pairs_portable(const uint8_t *in, uint8_t *out, size_t count)
{
    for (; count > 0; count--, in += PAIR, out += NODE) {
        uint32_t state[8], w[64];

        memcpy(state, INITIAL, sizeof state);
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)in[4 * i] << 24 | (uint32_t)in[4 * i + 1] << 16 |
                   (uint32_t)in[4 * i + 2] << 8 | in[4 * i + 3];
        for (int i = 16; i < 64; i++)
            w[i] = next_word(w, i);
        for (int i = 0; i < 64; i++)
            w[i] += K[i];
        rounds(state, w);
        rounds(state, SECOND);
        for (int i = 0; i < NODE; i++)
            out[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
        out[NODE - 1] &= 0x3f;
    }
}

static void fill_second(void)
{
    uint32_t w[64] = {[0] = UINT32_C(1) << 31, [15] = 512};

    for (int i = 16; i < 64; i++)
        w[i] = next_word(w, i);
    for (int i = 0; i < 64; i++)
        SECOND[i] = w[i] + K[i];
}

#if X86

/* ---- SHA instructions ---- */

#define TARGET_SHA __attribute__((target("sha,sse4.1,ssse3")))

typedef struct {
    __m128i abef, cdgh;
} half_states;

TARGET_SHA static inline void four_rounds(half_states *s, __m128i words)
{
    s->cdgh = _mm_sha256rnds2_epu32(s->cdgh, s->abef, words);
    s->abef = _mm_sha256rnds2_epu32(s->abef, s->cdgh, _mm_shuffle_epi32(words, 0x0e));
}

TARGET_SHA static inline __m128i four_words(const __m128i m[4], int g)
{
    __m128i last = m[(g + 3) & 3];
    __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(m[g & 3], m[(g + 1) & 3]),
                                _mm_alignr_epi8(last, m[(g + 2) & 3], 4));

    return _mm_sha256msg2_epu32(sum, last);
}

TARGET_SHA static inline void write_node(half_states s, uint8_t *out)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i feba = _mm_shuffle_epi32(s.abef, 0x1b);
    __m128i dchg = _mm_shuffle_epi32(s.cdgh, 0xb1);
    __m128i dcba = _mm_blend_epi16(feba, dchg, 0xf0);
    __m128i hgfe = _mm_alignr_epi8(dchg, feba, 8);

    _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(dcba, swap));
    _mm_storeu_si128((__m128i *)out + 1, _mm_shuffle_epi8(hgfe, swap));
    out[NODE - 1] &= 0x3f;
}

TARGET_SHA static inline void two_pairs(const uint8_t *const in[2], uint8_t *const out[2])
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    const half_states initial = {
        _mm_set_epi32((int)INITIAL[0], (int)INITIAL[1], (int)INITIAL[4], (int)INITIAL[5]),
        _mm_set_epi32((int)INITIAL[2], (int)INITIAL[3], (int)INITIAL[6], (int)INITIAL[7]),
    };
    half_states s[2] = {initial, initial}, middle[2];
    __m128i m[2][4];

    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++)
            m[n][i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)in[n] + i), swap);
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) {
        __m128i k = _mm_load_si128((const __m128i *)K + g);
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
            four_rounds(&s[n], _mm_add_epi32(m[n][g & 3], k));
            if (g < 12)
                m[n][g & 3] = four_words(m[n], g);
        }
    }
    for (int n = 0; n < 2; n++) {
        s[n].abef = _mm_add_epi32(s[n].abef, initial.abef);
        s[n].cdgh = _mm_add_epi32(s[n].cdgh, initial.cdgh);
        middle[n] = s[n];
    }
#pragma GCC unroll 16
    for (int g = 0; g < 16; g++) {
        __m128i words = _mm_load_si128((const __m128i *)SECOND + g);

        four_rounds(&s[0], words);
        four_rounds(&s[1], words);
    }
    for (int n = 0; n < 2; n++) {
        s[n].abef = _mm_add_epi32(s[n].abef, middle[n].abef);
        s[n].cdgh = _mm_add_epi32(s[n].cdgh, middle[n].cdgh);
        write_node(s[n], out[n]);
    }
}

static void pairs_sha(const uint8_t *in, uint8_t *out, size_t count)
{
    for (; count >= 2; count -= 2, in += 2 * PAIR, out += 2 * NODE)
        two_pairs((const uint8_t *const[]){in, in + PAIR}, (uint8_t *const[]){out, out + NODE});
    if (count > 0) {
        uint8_t unused[NODE];

        two_pairs((const uint8_t *const[]){in, in}, (uint8_t *const[]){out, unused});
    }
}

/* ---- AVX-512 ---- */

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw")))

/* Rows become columns: word j of row i becomes lane i of row j. */
TARGET_AVX512 static inline void transpose(__m512i r[LANES])
{
    __m512i t[LANES], u[LANES];

    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i even1 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
        __m512i even2 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
        __m512i odd1 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
        __m512i odd2 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);

        r[j] = _mm512_shuffle_i32x4(even1, even2, 0x88);
        r[4 + j] = _mm512_shuffle_i32x4(odd1, odd2, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(even1, even2, 0xdd);
        r[12 + j] = _mm512_shuffle_i32x4(odd1, odd2, 0xdd);
    }
}

enum { XOR3 = 0x96, CHOOSE = 0xca, MAJORITY = 0xe8 };

/* One round; the variables turn by one place, so the array is read from `i` on. */
TARGET_AVX512 static inline void wide_round(__m512i s[8], int i, __m512i word)
{
    __m512i a = s[-i & 7], b = s[(1 - i) & 7], c = s[(2 - i) & 7], d = s[(3 - i) & 7];
    __m512i e = s[(4 - i) & 7], f = s[(5 - i) & 7], g = s[(6 - i) & 7], h = s[(7 - i) & 7];
    __m512i s1 = _mm512_ternarylogic_epi32(_mm512_ror_epi32(e, 6), _mm512_ror_epi32(e, 11),
                                           _mm512_ror_epi32(e, 25), XOR3);
    __m512i s0 = _mm512_ternarylogic_epi32(_mm512_ror_epi32(a, 2), _mm512_ror_epi32(a, 13),
                                           _mm512_ror_epi32(a, 22), XOR3);
    __m512i choose = _mm512_ternarylogic_epi32(e, f, g, CHOOSE);
    __m512i majority = _mm512_ternarylogic_epi32(a, b, c, MAJORITY);
    __m512i t1 = _mm512_add_epi32(_mm512_add_epi32(h, word), _mm512_add_epi32(s1, choose));

    s[(3 - i) & 7] = _mm512_add_epi32(d, t1);
    s[(7 - i) & 7] = _mm512_add_epi32(t1, _mm512_add_epi32(s0, majority));
}

TARGET_AVX512 static inline __m512i wide_word(const __m512i w[LANES], int i)
{
    __m512i a = w[(i + 1) & 15], b = w[(i + 14) & 15];
    __m512i s0 = _mm512_ternarylogic_epi32(_mm512_ror_epi32(a, 7), _mm512_ror_epi32(a, 18),
                                           _mm512_srli_epi32(a, 3), XOR3);
    __m512i s1 = _mm512_ternarylogic_epi32(_mm512_ror_epi32(b, 17), _mm512_ror_epi32(b, 19),
                                           _mm512_srli_epi32(b, 10), XOR3);

    return _mm512_add_epi32(_mm512_add_epi32(w[i & 15], s0),
                            _mm512_add_epi32(w[(i + 9) & 15], s1));
}

TARGET_AVX512 static inline __m512i swap_bytes(__m512i x)
{
    return _mm512_shuffle_epi8(
        x, _mm512_set4_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203));
}

TARGET_AVX512 static void sixteen_pairs(const uint8_t *in, uint8_t *out)
{
    __m512i w[LANES], s[8], middle[8];

    for (int i = 0; i < LANES; i++)
        w[i] = _mm512_loadu_si512(in + i * PAIR);
    transpose(w);
    for (int i = 0; i < LANES; i++)
        w[i] = swap_bytes(w[i]);
    for (int i = 0; i < 8; i++)
        s[i] = _mm512_set1_epi32((int)INITIAL[i]);
#pragma GCC unroll 64
    for (int i = 0; i < 64; i++) {
        if (i >= 16)
            w[i & 15] = wide_word(w, i);
        wide_round(s, i, _mm512_add_epi32(w[i & 15], _mm512_set1_epi32((int)K[i])));
    }
    for (int i = 0; i < 8; i++)
        s[i] = middle[i] = _mm512_add_epi32(s[i], _mm512_set1_epi32((int)INITIAL[i]));
#pragma GCC unroll 64
    for (int i = 0; i < 64; i++)
        wide_round(s, i, _mm512_set1_epi32((int)SECOND[i]));
    for (int i = 0; i < 8; i++)
        w[i] = swap_bytes(_mm512_add_epi32(s[i], middle[i]));
    w[7] = _mm512_and_si512(w[7], _mm512_set1_epi32(0x3fffffff));
    for (int i = 8; i < LANES; i++)
        w[i] = _mm512_setzero_si512();
    transpose(w);
    for (int i = 0; i < LANES; i++)
        _mm256_storeu_si256((__m256i *)(out + i * NODE), _mm512_castsi512_si256(w[i]));
}

static hash_pairs few_pairs = pairs_portable;

static void pairs_avx512(const uint8_t *in, uint8_t *out, size_t count)
{
    for (; count >= LANES; count -= LANES, in += LANES * PAIR, out += LANES * NODE)
        sixteen_pairs(in, out);
    few_pairs(in, out, count);
}

static int has_sha(void)
{
    unsigned a, b, c, d;

    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) &&
           __builtin_cpu_supports("sse4.1") && __builtin_cpu_supports("ssse3");
}

#endif

/* ---- the tree ---- */

static struct method {
    const char *name;
    hash_pairs pairs;
} methods[3];

static int method_count;

static void find_methods(void)
{
    method_count = 0;
#if X86
    __builtin_cpu_init();
    if (has_sha())
        few_pairs = pairs_sha;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))
        methods[method_count++] = (struct method){"avx512", pairs_avx512};
    if (has_sha())
        methods[method_count++] = (struct method){"sha", pairs_sha};
#endif
    methods[method_count++] = (struct method){"portable", pairs_portable};
}

static void hash_blocks(hash_pairs pairs, const Py_buffer *data, Py_ssize_t block,
                        uint8_t *scratch, uint8_t *out)
{
    for (Py_ssize_t at = 0; at < data->len; at += block, out += NODE) {
        pairs((const uint8_t *)data->buf + at, scratch, (size_t)block / PAIR);
        for (size_t count = (size_t)block / PAIR / 2; count > 0; count /= 2)
            pairs(scratch, scratch, count);
        memcpy(out, scratch, NODE);
    }
}

static PyObject *roots_of(hash_pairs pairs, const Py_buffer *data, Py_ssize_t block)
{
    PyObject *result;
    uint8_t *scratch;

    if (block < PAIR || (block & (block - 1)) != 0 || data->len % block != 0)
        return PyErr_Format(PyExc_ValueError, "%zd bytes in blocks of %zd", data->len, block);
    scratch = PyMem_Malloc((size_t)block / 2);
    if (scratch == NULL)
        return PyErr_NoMemory();
    result = PyBytes_FromStringAndSize(NULL, data->len / block * NODE);
    if (result != NULL) {
        uint8_t *out = (uint8_t *)PyBytes_AS_STRING(result);

        Py_BEGIN_ALLOW_THREADS
        hash_blocks(pairs, data, block, scratch, out);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(scratch);
    return result;
}

static PyObject *py_roots(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *result = NULL;
    Py_buffer data;
    Py_ssize_t block;
    const char *name;
    int i = 0;

    if (!PyArg_ParseTuple(args, "y*ns:roots", &data, &block, &name))
        return NULL;
    while (i < method_count && strcmp(methods[i].name, name) != 0)
        i++;
    if (i == method_count)
        PyErr_Format(PyExc_ValueError, "no method %s", name);
    else
        result = roots_of(methods[i].pairs, &data, block);
    PyBuffer_Release(&data);
    return result;
}

static int execute(PyObject *module)
{
    PyObject *names;
    int failed;

    fill_second();
    find_methods();
    names = PyTuple_New(method_count);
    if (names == NULL)
        return -1;
    for (int i = 0; i < method_count; i++) {
        PyObject *name = PyUnicode_FromString(methods[i].name);

        if (name == NULL) {
            Py_DECREF(names);
            return -1;
        }
        PyTuple_SET_ITEM(names, i, name);
    }
    failed = PyModule_AddObjectRef(module, "METHODS", names);
    Py_DECREF(names);
    return failed;
}

static PyMethodDef functions[] = {
    {"roots", py_roots, METH_VARARGS,
     "The roots, one after another, of the trees over each block of so many bytes."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_commp",
    .m_doc = "The binary tree of piece commitments, native.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__commp(void)
{
    return PyModuleDef_Init(&definition);
}
