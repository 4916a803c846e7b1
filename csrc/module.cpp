// `import asga._C` registers the CPU kernels: loading the library runs its STABLE_TORCH_LIBRARY_IMPL blocks.
#include "direct.h"

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "CPU kernels of asga", -1, asga::direct_methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
