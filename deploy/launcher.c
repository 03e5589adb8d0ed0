/* What Triton compiles at the first use of a kernel, in small: Python's, libc's and CUDA's headers. The image's build
   compiles it. On a machine: cc -shared -fPIC -I <include of Python> -I <triton>/backends/nvidia/include launcher.c -ldl */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *launcher_version(PyObject *self, PyObject *args) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  CUresult (*version)(int *) = driver ? (CUresult(*)(int *))dlsym(driver, "cuDriverGetVersion") : NULL;
  int found = 0;
  if (version == NULL || version(&found) != CUDA_SUCCESS) Py_RETURN_NONE;
  return PyLong_FromLong(found);
}

static PyMethodDef methods[] = {
    {"version", launcher_version, METH_NOARGS, "Return the version of CUDA that the driver supports, or None."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
