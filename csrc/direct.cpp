// The sweeps as functions of Python, on addresses: for tensors so small that PyTorch's dispatcher, boxed arguments and
// threads cost more than the sweep. Contiguous values in float32 or a 16-bit format, parameters in float32, one thread.
// `asga/ops/direct.py` checks what has to be checked.
#include "direct.h"

#include "cpu/fake_quant.h"
#include "cpu/mixed_fake_quant.h"
#include "cpu/storage.h"

namespace asga {
namespace {

// Of the values; `FORMATS` in asga/ops/direct.py.
enum Format : int64_t { kFloat32, kBFloat16, kFloat16 };

// Calls run(scalar_t{}) with the storage type of a format.
template <typename Run>
void with_format(Format format, const Run& run) {
  switch (format) {
    case kBFloat16:
      return run(BFloat16{});
    case kFloat16:
      return run(Half{});
    default:
      return run(float{});
  }
}

template <typename scalar_t>
const scalar_t* values_at(const void* address) {
  return static_cast<const scalar_t*>(address);
}

template <typename scalar_t>
scalar_t* values_at(void* address) {
  return static_cast<scalar_t*>(address);
}

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
  Format format() {
    const int64_t format = integer();
    if (good_ && (format < kFloat32 || format > kFloat16)) {
      good_ = false;
      PyErr_Format(PyExc_ValueError, "format %lld; 0 (float32), 1 (bfloat16) and 2 (float16) are known",
                   static_cast<long long>(format));
    }
    return static_cast<Format>(format);
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
  Arguments arguments("fake_quant", values, count, 10);
  const auto* x = arguments.pointer<const void>();
  auto* y = arguments.pointer<void>();
  const FakeQuant<float> op = read_fake_quant(arguments);
  const Format format = arguments.format();
  if (!arguments.good()) return nullptr;
  with_format(format, [&](auto value) {
    using scalar_t = decltype(value);
    fake_quant_forward(op, values_at<scalar_t>(x), values_at<scalar_t>(y), Serial{});
  });
  return none();
}

PyObject* py_fake_quant_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("fake_quant_backward", values, count, 13);
  const auto* g = arguments.pointer<const void>();
  const auto* x = arguments.pointer<const void>();
  auto* dx = arguments.pointer<void>();
  auto* grad_scale = arguments.pointer<float>();
  auto* grad_zero_point = arguments.pointer<float>();
  const FakeQuant<float> op = read_fake_quant(arguments);
  const Format format = arguments.format();
  if (!arguments.good()) return nullptr;
  with_format(format, [&](auto value) {
    using scalar_t = decltype(value);
    fake_quant_backward(op, values_at<scalar_t>(g), values_at<scalar_t>(x), values_at<scalar_t>(dx), grad_scale,
                        grad_zero_point, Serial{});
  });
  return none();
}

PyObject* py_mixed_fake_quant(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("mixed_fake_quant", values, count, 11);
  const auto* x = arguments.pointer<const void>();
  auto* y = arguments.pointer<void>();
  Ranges ranges;
  const MixedFakeQuant<float> op = read_mixed_fake_quant(arguments, ranges);
  const Format format = arguments.format();
  if (!arguments.good()) return nullptr;
  with_format(format, [&](auto value) {
    using scalar_t = decltype(value);
    mixed_fake_quant_forward(op, values_at<scalar_t>(x), values_at<scalar_t>(y), Serial{});
  });
  return none();
}

PyObject* py_mixed_fake_quant_backward(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments("mixed_fake_quant_backward", values, count, 15);
  const auto* g = arguments.pointer<const void>();
  const auto* x = arguments.pointer<const void>();
  auto* dx = arguments.pointer<void>();
  auto* grad_scales = arguments.pointer<float>();
  auto* grad_probs = arguments.pointer<float>();
  auto* grad_zero_points = arguments.pointer<float>();
  Ranges ranges;
  const MixedFakeQuant<float> op = read_mixed_fake_quant(arguments, ranges);
  const Format format = arguments.format();
  if (!arguments.good()) return nullptr;
  with_format(format, [&](auto value) {
    using scalar_t = decltype(value);
    mixed_fake_quant_backward(op, values_at<scalar_t>(g), values_at<scalar_t>(x), values_at<scalar_t>(dx), grad_scales,
                              grad_probs, grad_zero_points, Serial{});
  });
  return none();
}

template <typename Function>
constexpr PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

// Addresses: x, y, g, dx, gradients of the parameters, scale(s), probs, zero point(s); 0 for none. Then the range or
// the lists of ranges, and the layout: outer, channels, inner, format.
PyMethodDef direct_methods[] = {
    {"fake_quant", as_method(py_fake_quant), METH_FASTCALL, nullptr},
    {"fake_quant_backward", as_method(py_fake_quant_backward), METH_FASTCALL, nullptr},
    {"mixed_fake_quant", as_method(py_mixed_fake_quant), METH_FASTCALL, nullptr},
    {"mixed_fake_quant_backward", as_method(py_mixed_fake_quant_backward), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace asga
