// The functions of the Python module `asga._C`; see direct.cpp.
#pragma once

#include <Python.h>

namespace asga {

extern PyMethodDef direct_methods[];

}  // namespace asga
