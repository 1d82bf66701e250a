/* What pyfuse3 leaves out of the FUSE protocol, native: what Python sees of the other parts. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_kernel.h"

static PyObject *py_limit(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long background = PyLong_AsUnsignedLong(number);

    if (PyErr_Occurred())
        return NULL;
    channel_limit(background < UINT16_MAX ? (uint16_t)background : UINT16_MAX);
    Py_RETURN_NONE;
}

static PyObject *py_facts(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    struct facts facts = channel_facts();

    return Py_BuildValue("kOOO", facts.session, facts.introduced ? Py_True : Py_False,
                         facts.offered ? Py_True : Py_False, facts.granted ? Py_True : Py_False);
}

static PyObject *ioctl_result(unsigned long request, void *argument)
{
    int result = channel_ioctl(request, argument);

    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(result);
}

static PyObject *py_open_backing(PyObject *Py_UNUSED(module), PyObject *args)
{
    struct backing_file file = {0};

    if (!PyArg_ParseTuple(args, "i:open_backing", &file.fd))
        return NULL;
    return ioctl_result(OPEN_BACKING, &file);
}

static PyObject *py_close_backing(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned backing;

    if (!PyArg_ParseTuple(args, "I:close_backing", &backing))
        return NULL;
    return ioctl_result(CLOSE_BACKING, &backing);
}

static PyObject *py_mark_open(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long handle;
    int backing, cache_directory;

    if (!PyArg_ParseTuple(args, "Kip:mark_open", &handle, &backing, &cache_directory))
        return NULL;
    return PyBool_FromLong(channel_mark(handle, backing, cache_directory));
}

static PyObject *py_remember(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long inode, handle;
    int fd, backing;

    if (!PyArg_ParseTuple(args, "KKii:remember", &inode, &handle, &fd, &backing))
        return NULL;
    return PyBool_FromLong(channel_facts().session != 0 &&
                           kept_remember(inode, handle, fd, backing));
}

static PyObject *py_forget(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long inode = PyLong_AsUnsignedLongLong(number);

    if (PyErr_Occurred())
        return NULL;
    return PyLong_FromUnsignedLong(kept_forget(inode));
}

static PyObject *py_use(PyObject *Py_UNUSED(module), PyObject *number)
{
    unsigned long long inode = PyLong_AsUnsignedLongLong(number);
    struct use use;

    if (PyErr_Occurred())
        return NULL;
    if (!kept_use(inode, &use))
        Py_RETURN_NONE;
    return Py_BuildValue("IKd", use.open, (unsigned long long)use.opens, use.idle);
}

static PyObject *py_opens(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(kept_opens());
}

static PyObject *py_reads(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(kept_reads());
}

static PyObject *describe_to_python(struct interruption one)
{
    return Py_BuildValue("KIO", (unsigned long long)one.unique, one.pid,
                         one.buffered ? Py_True : Py_False);
}

static PyObject *py_current(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return describe_to_python(channel_current());
}

static PyObject *py_interrupts_fd(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(interrupts_fd());
}

static PyObject *py_interrupted(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    struct interruption *taken;
    size_t count = take_interrupts(&taken);
    PyObject *list = PyList_New(0);

    for (size_t i = 0; i < count && list != NULL; i++) {
        PyObject *one = describe_to_python(taken[i]);

        if (one == NULL || PyList_Append(list, one) != 0)
            Py_CLEAR(list);
        Py_XDECREF(one);
    }
    free(taken);
    return list;
}

static PyMethodDef functions[] = {
    {"limit", py_limit, METH_O, "Set the background requests the next mount may have."},
    {"facts", py_facts, METH_NOARGS, "Session, introduced, passthrough offered and granted."},
    {"open_backing", py_open_backing, METH_VARARGS, "Register a descriptor; its backing id."},
    {"close_backing", py_close_backing, METH_VARARGS, "Give a backing id back."},
    {"mark_open", py_mark_open, METH_VARARGS, "Handle, backing id, cache directory."},
    {"remember", py_remember, METH_VARARGS, "Inode, handle, descriptor, backing id."},
    {"forget", py_forget, METH_O, "Answer no more opens of an inode; how many are open."},
    {"use", py_use, METH_O, "Open now, opened ever, and seconds since the last open."},
    {"opens", py_opens, METH_NOARGS, "Opens answered without Python."},
    {"reads", py_reads, METH_NOARGS, "Reads answered without Python."},
    {"current", py_current, METH_NOARGS, "The request whose handler begins now: number, pid, buffered read."},
    {"interrupts_fd", py_interrupts_fd, METH_NOARGS, "Readable while requests are interrupted."},
    {"interrupted", py_interrupted, METH_NOARGS, "(Number, pid, buffered read) of each since."},
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
