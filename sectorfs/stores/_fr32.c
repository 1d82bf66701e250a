/* fr32 padding, native: 127 bytes to 128 and back, without the interpreter's lock.
 *
 * The 127 bytes are one little-endian number of 1016 bits in 64-bit words x[0..15]. Limb k of the
 * padded form holds 254 bits of it, in words p[4k..4k+3]; since 4 * 64 - 254 = 2, its words are
 * those of x moved up by 2k bits. All is done in registers, so a plain compiler reaches the speed
 * of memory.
 *
 * The callers in fr32.py have checked the sizes; what is checked again here guards memory only.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are taken as little-endian; without this module the slower Python code is used"
#endif

enum { DATA = 127, PADDED = 128, WORDS = 16, WITHOUT_LOCK = 16384 };

static const uint64_t TOP_BITS = UINT64_C(3) << 62;

static inline void pad_chunk(const uint8_t *in, uint8_t *out)
{
    uint64_t x[WORDS], p[WORDS];

    x[WORDS - 1] = 0;
    memcpy(x, in, DATA);
    memcpy(p, x, 4 * sizeof p[0]);
    for (int k = 1; k < 4; k++)
        for (int w = 4 * k; w < 4 * k + 4; w++)
            p[w] = x[w] << (2 * k) | x[w - 1] >> (64 - 2 * k);
    for (int k = 0; k < 4; k++)
        p[4 * k + 3] &= ~TOP_BITS;
    memcpy(out, p, PADDED);
}

/* Returns the top bits of the limbs together: not 0 when the chunk is no padded data. */
static inline uint64_t unpad_chunk(const uint8_t *in, uint8_t *out)
{
    uint64_t x[WORDS], p[WORDS + 1];

    memcpy(p, in, PADDED);
    p[WORDS] = 0;
    memcpy(x, p, 3 * sizeof x[0]);
    x[3] = p[3] | p[4] << 62;
    for (int k = 1; k < 4; k++) {
        for (int w = 4 * k; w < 4 * k + 3; w++)
            x[w] = p[w] >> (2 * k) | p[w + 1] << (64 - 2 * k);
        x[4 * k + 3] = p[4 * k + 3] >> (2 * k) | p[4 * k + 4] << (62 - 2 * k);
    }
    memcpy(out, x, DATA);
    return (p[3] | p[7] | p[11] | p[15]) & TOP_BITS;
}

static void pad_chunks(const uint8_t *in, uint8_t *out, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        pad_chunk(in + i * DATA, out + i * PADDED);
}

/* Returns the position of the first byte with a top bit set, or -1. */
static Py_ssize_t unpad_chunks(const uint8_t *in, uint8_t *out, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!unpad_chunk(in + i * PADDED, out + i * DATA))
            continue;
        for (Py_ssize_t at = i * PADDED + 31;; at += 32)
            if (in[at] & 0xC0)
                return at;
    }
    return -1;
}

static int check(const Py_buffer *in, const Py_buffer *out, int from, int to)
{
    if (in->len % from != 0 || out->len < in->len / from * to) {
        PyErr_Format(PyExc_ValueError, "%zd bytes in, %zd bytes out", in->len, out->len);
        return 0;
    }
    return 1;
}

static PyObject *py_pad(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in, out;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*w*:pad", &in, &out))
        return NULL;
    if (check(&in, &out, DATA, PADDED)) {
        if (in.len < WITHOUT_LOCK) {
            pad_chunks(in.buf, out.buf, in.len / DATA);
        } else {
            Py_BEGIN_ALLOW_THREADS
            pad_chunks(in.buf, out.buf, in.len / DATA);
            Py_END_ALLOW_THREADS
        }
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *py_unpad(PyObject *Py_UNUSED(module), PyObject *args)
{
    Py_buffer in, out;
    PyObject *result = NULL;
    Py_ssize_t bad;

    if (!PyArg_ParseTuple(args, "y*w*:unpad", &in, &out))
        return NULL;
    if (check(&in, &out, PADDED, DATA)) {
        if (in.len < WITHOUT_LOCK) {
            bad = unpad_chunks(in.buf, out.buf, in.len / PADDED);
        } else {
            Py_BEGIN_ALLOW_THREADS
            bad = unpad_chunks(in.buf, out.buf, in.len / PADDED);
            Py_END_ALLOW_THREADS
        }
        result = PyLong_FromSsize_t(bad);
    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef functions[] = {
    {"pad", py_pad, METH_VARARGS, "Pad whole chunks of the first buffer into the second."},
    {"unpad", py_unpad, METH_VARARGS,
     "Unpad whole chunks of the first buffer into the second; the position of a bad byte, or -1."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_fr32",
    .m_doc = "fr32 padding, native.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__fr32(void)
{
    return PyModuleDef_Init(&definition);
}
