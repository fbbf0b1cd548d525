// The module mbn_kernels._C: what Python asks of its own objects at each call, without touching them one by one. Within the limited API of CPython 3.10.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <cstdint>
#include <cstring>

namespace {

// What was noted of the objects: addresses and counts, one number each, read in order.
struct Notes {
  const char *at, *end;
  bool next(uintptr_t& number) {
    if (end - at < Py_ssize_t(sizeof number)) return false;
    std::memcpy(&number, at, sizeof number);
    at += sizeof number;
    return true;
  }
};

// Whether a dictionary holds as many items as noted, the very objects in this order; a value of 0 stands for any.
bool holds_items(PyObject* dictionary, Notes& notes) {
  uintptr_t count, noted_key, noted_value;
  if (!notes.next(count) || uintptr_t(PyDict_Size(dictionary)) != count) return false;
  Py_ssize_t at = 0;
  for (PyObject *key, *value; PyDict_Next(dictionary, &at, &key, &value);) {
    if (!notes.next(noted_key) || !notes.next(noted_value)) return false;
    if (noted_key != reinterpret_cast<uintptr_t>(key) || (noted_value && noted_value != reinterpret_cast<uintptr_t>(value))) return false;
  }
  return true;
}

PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyBytes_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "unchanged: expected a tuple of objects, a tuple of dictionaries and bytes, got others");
    return nullptr;
  }
  PyObject *objects = arguments[0], *dictionaries = arguments[1];
  const char* bytes = PyBytes_AsString(arguments[2]);
  Notes notes = {bytes, bytes + PyBytes_Size(arguments[2])};
  bool same = true;
  for (Py_ssize_t i = 0, size = PyTuple_Size(objects); same && i < size; ++i) {
    uintptr_t type;
    same = notes.next(type) && type == reinterpret_cast<uintptr_t>(Py_TYPE(PyTuple_GetItem(objects, i)));
  }
  for (Py_ssize_t i = 0, size = PyTuple_Size(dictionaries); same && i < size; ++i) {
    PyObject* dictionary = PyTuple_GetItem(dictionaries, i);
    if (!PyDict_Check(dictionary)) {
      PyErr_SetString(PyExc_TypeError, "unchanged: expected dictionaries, got others");
      return nullptr;
    }
    same = holds_items(dictionary, notes);
  }
  return PyBool_FromLong(same);
}

PyMethodDef methods[] = {
    {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(unchanged)), METH_FASTCALL,
     "unchanged(objects, dictionaries, notes): whether everything is as noted, in native 64-bit words: the address of each object's type, then of each "
     "dictionary how many items it has and the addresses of each one's key and value, in its order; a value of 0 stands for any."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "mbn_kernels._C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
