// The sweeps as functions of Python, on addresses: for tensors so small that PyTorch's dispatcher, boxed arguments and
// threads cost more than the sweep. Contiguous float32, one thread. `asga/ops/direct.py` checks what has to be checked.
#include "direct.h"

#include "cpu/fake_quant.h"
#include "cpu/mixed_fake_quant.h"

namespace asga {
namespace {

// Runs all tasks here and now.
struct Serial {
  template <typename Run>
  void operator()(const Work& work, const Run& run) const {
    run(0, work.tasks());
  }
};

// Arguments of a call, taken one after the other.
class Arguments {
 public:
  Arguments(const char* function, PyObject* const* values, Py_ssize_t count, Py_ssize_t expected)
      : values_(values), good_(count == expected) {
    if (!good_) PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments (%zd given)", function, expected, count);
  }

  int64_t integer() { return integer_of(good_ ? *values_++ : nullptr); }
  // An address; 0 is null.
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(integer()));
  }
  ChannelLayout layout() {
    const int64_t outer = integer(), channels = integer();
    return {outer, channels, integer()};
  }
  // A list or tuple of up to kMaxCandidates integers; returns how many.
  int integers(int64_t (&to)[kMaxCandidates]) {
    PyObject* list = good_ ? *values_++ : nullptr;
    const Py_ssize_t count = list == nullptr ? 0 : PySequence_Size(list);
    good_ = good_ && count >= 1 && count <= kMaxCandidates;
    if (!good_ && PyErr_Occurred() == nullptr)
      PyErr_Format(PyExc_ValueError, "%zd candidates; 1 to %d are supported", count, kMaxCandidates);
    for (Py_ssize_t k = 0; good_ && k < count; ++k) {
      PyObject* item = PySequence_GetItem(list, k);
      to[k] = integer_of(item);
      Py_XDECREF(item);
    }
    return static_cast<int>(count);
  }
  bool good() const { return good_; }

 private:
  int64_t integer_of(PyObject* value) {
    if (!good_ || value == nullptr) {
      good_ = false;
      return 0;
    }
    const int64_t result = PyLong_AsLongLong(value);
    good_ = result != -1 || PyErr_Occurred() == nullptr;
    return result;
  }

  PyObject* const* values_;
  bool good_;
};

// The order of the arguments is that of the reads.
FakeQuant<float> read_fake_quant(Arguments& arguments) {
  FakeQuant<float> op;
  op.scale = arguments.pointer<const float>();
  op.zero_point = arguments.pointer<const float>();
  op.quant_min = arguments.integer();
  op.quant_max = arguments.integer();
  op.layout = arguments.layout();
  return op;
}

struct Ranges {
  int64_t quant_mins[kMaxCandidates], quant_maxs[kMaxCandidates];
};

MixedFakeQuant<float> read_mixed_fake_quant(Arguments& arguments, Ranges& ranges) {
  MixedFakeQuant<float> op;
  op.scales = arguments.pointer<const float>();
  op.probs = arguments.pointer<const float>();
  op.zero_points = arguments.pointer<const float>();
  op.candidates = arguments.integers(ranges.quant_mins);
  arguments.integers(ranges.quant_maxs);
  op.quant_mins = ranges.quant_mins;
  op.quant_maxs = ranges.quant_maxs;
  op.layout = arguments.layout();
  return op;
}

PyObject* none() {
  Py_INCREF(Py_None);
  return Py_None;
}

PyObject* py_fake_quant(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("fake_quant", values, count, 9);
  const auto* x = arguments.pointer<const float>();
  auto* y = arguments.pointer<float>();
  const FakeQuant<float> op = read_fake_quant(arguments);
  if (!arguments.good()) return nullptr;
  fake_quant_forward(op, x, y, Serial{});
  return none();
}

PyObject* py_fake_quant_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("fake_quant_backward", values, count, 12);
  const auto* g = arguments.pointer<const float>();
  const auto* x = arguments.pointer<const float>();
  auto* dx = arguments.pointer<float>();
  auto* grad_scale = arguments.pointer<float>();
  auto* grad_zero_point = arguments.pointer<float>();
  const FakeQuant<float> op = read_fake_quant(arguments);
  if (!arguments.good()) return nullptr;
  fake_quant_backward(op, g, x, dx, grad_scale, grad_zero_point, Serial{});
  return none();
}

PyObject* py_mixed_fake_quant(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("mixed_fake_quant", values, count, 10);
  const auto* x = arguments.pointer<const float>();
  auto* y = arguments.pointer<float>();
  Ranges ranges;
  const MixedFakeQuant<float> op = read_mixed_fake_quant(arguments, ranges);
  if (!arguments.good()) return nullptr;
  mixed_fake_quant_forward(op, x, y, Serial{});
  return none();
}

PyObject* py_mixed_fake_quant_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("mixed_fake_quant_backward", values, count, 14);
  const auto* g = arguments.pointer<const float>();
  const auto* x = arguments.pointer<const float>();
  auto* dx = arguments.pointer<float>();
  auto* grad_scales = arguments.pointer<float>();
  auto* grad_probs = arguments.pointer<float>();
  auto* grad_zero_points = arguments.pointer<float>();
  Ranges ranges;
  const MixedFakeQuant<float> op = read_mixed_fake_quant(arguments, ranges);
  if (!arguments.good()) return nullptr;
  mixed_fake_quant_backward(op, g, x, dx, grad_scales, grad_probs, grad_zero_points, Serial{});
  return none();
}

template <typename Function>
constexpr PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

// Addresses: x, y, g, dx, gradients of the parameters, scale(s), probs, zero point(s); 0 for none. Then the range or
// the lists of ranges, and the layout: outer, channels, inner.
PyMethodDef direct_methods[] = {
    {"fake_quant", as_method(py_fake_quant), METH_FASTCALL, nullptr},
    {"fake_quant_backward", as_method(py_fake_quant_backward), METH_FASTCALL, nullptr},
    {"mixed_fake_quant", as_method(py_mixed_fake_quant), METH_FASTCALL, nullptr},
    {"mixed_fake_quant_backward", as_method(py_mixed_fake_quant_backward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace asga
