// The Python module r3d_kernels._C. It holds nothing: importing it loads this library, and loading it
// registers the ops. torch's build may define another Py_LIMITED_API; the one that decides is the oldest
// Python that we support.
#undef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
