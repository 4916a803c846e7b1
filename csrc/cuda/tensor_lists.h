// Lists of tensors that one kernel sweeps together. The tables of their pointers are kernel arguments: nothing is
// allocated or copied for them, so a captured graph holds them. Chunks depend on the sizes alone, and so do the slots
// of partial sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "launch.h"
#include "reduce.h"
#include "tiles.h"

namespace asga {

// Tensors of one launch. Arguments may take 32,764 bytes from CUDA 12.1 on; a table of seven pointers has 29 KiB.
constexpr int kTableSize = 384;
constexpr int kMostDims = 64;  // of a tensor

// A vector of 16 bytes for each thread of a block is the shortest chunk of float32, in four rounds. Chunks grow up to
// 512 values a thread, which a float32 sum bears, to keep the partial sums few.
constexpr int64_t kShortestChunk = 4096, kLongestChunk = 131072, kChunksAimedAt = 8192;

enum class FloatType : int { kFloat, kDouble, kHalf, kBFloat16 };

// In place of a C++ type: the dtype is read from the list, by every access.
struct AnyFloat {};

// What a block works on.
struct Part {
  int entry;
  int64_t slot, begin, end;
};

// Values [begin, end) of an entry; value i of the sweep is value i in the memory of every operand. Null: not there.
template <int kOperands>
struct FlatTable {
  static constexpr bool kVectors = true;

  char* pointers[kOperands][kTableSize];
  int64_t numel[kTableSize];
  double rho_scales[kTableSize];
  int first_chunk[kTableSize];
  int entries;
  FloatType type, grad_type;  // of the parameters, of the gradients
  int64_t chunk, first_slot;

  __device__ __forceinline__ Part part() const {
    const int block = static_cast<int>(blockIdx.x);
    int entry = 0;
    for (int left = entries; left > 1;) {
      const int half = left / 2;
      if (first_chunk[entry + half] <= block) {
        entry += half;
        left -= half;
      } else {
        left = half;
      }
    }
    const int64_t begin = (block - first_chunk[entry]) * chunk;
    return {entry, first_slot + block, begin, min(begin + chunk, numel[entry])};
  }
  __device__ __forceinline__ char* data(int operand, int entry) const { return pointers[operand][entry]; }
  __device__ __forceinline__ double rho_scale(int entry) const { return rho_scales[entry]; }
};

// One tensor whose operands lie differently in memory: an index for each value and operand, so much slower.
template <int kOperands>
struct StridedTensor {
  static constexpr bool kVectors = false;

  char* pointers[kOperands];
  int64_t numel;
  double scale;
  FloatType type, grad_type;  // of the parameters, of the gradients
  int64_t chunk, first_slot;
  int dims;
  int64_t sizes[kMostDims], strides[kOperands][kMostDims];

  __device__ __forceinline__ Part part() const {
    const int64_t begin = blockIdx.x * chunk;
    return {0, first_slot + blockIdx.x, begin, min(begin + chunk, numel)};
  }
  __device__ __forceinline__ char* data(int operand, int) const { return pointers[operand]; }
  __device__ __forceinline__ double rho_scale(int) const { return scale; }
};

// Where value i of a sweep lies in each operand.
struct FlatPlace {
  int64_t i;
  __device__ __forceinline__ int64_t operator[](int) const { return i; }
};
template <int kOperands>
struct StridedPlace {
  int64_t offsets[kOperands];
  __device__ __forceinline__ int64_t operator[](int operand) const { return offsets[operand]; }

  __device__ __forceinline__ StridedPlace(const StridedTensor<kOperands>& tensor, int64_t i) {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) offsets[k] = 0;
    for (int d = tensor.dims - 1; d >= 0; --d) {
      const int64_t rest = i / tensor.sizes[d], index = i - rest * tensor.sizes[d];
#pragma unroll
      for (int k = 0; k < kOperands; ++k) offsets[k] += index * tensor.strides[k][d];
      i = rest;
    }
  }
};

// A double goes to 16 bits by way of float32, as in torch.
template <typename T, typename A>
__device__ __forceinline__ T rounded_to(A value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// N values from `at` on, in accesses of at most 16 bytes.
template <typename T, typename A, int N>
__device__ __forceinline__ void read_values(const void* data, int64_t at, A (&wide)[N]) {
  constexpr int kPiece = N < kVector<T> ? N : kVector<T>;
  using Exact = std::conditional_t<sizeof(T) == 2, float, T>;
#pragma unroll
  for (int first = 0; first < N; first += kPiece) {
    Exact piece[kPiece];
    widen(load<kPiece>(static_cast<const T*>(data) + at + first), piece);
#pragma unroll
    for (int n = 0; n < kPiece; ++n) wide[first + n] = static_cast<A>(piece[n]);
  }
}

template <typename T, typename A, int N>
__device__ __forceinline__ void write_values(void* data, int64_t at, const A (&wide)[N]) {
  constexpr int kPiece = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int first = 0; first < N; first += kPiece) {
    Vector<T, kPiece> piece;
#pragma unroll
    for (int n = 0; n < kPiece; ++n) piece.values[n] = rounded_to<T>(wide[first + n]);
    store(static_cast<T*>(data) + at + first, piece);
  }
}

template <typename T, int N>
__device__ __forceinline__ void copy_values(void* to, int64_t to_at, const void* from, int64_t from_at) {
  constexpr int kPiece = N < kVector<T> ? N : kVector<T>;
#pragma unroll
  for (int first = 0; first < N; first += kPiece)
    store(static_cast<T*>(to) + to_at + first, load<kPiece>(static_cast<const T*>(from) + from_at + first));
}

// Calls f with a zero of `Known` or, where that is any type, of `type`. All threads take the same branch.
template <typename Known, typename F>
__device__ __forceinline__ void with_type(FloatType type, const F& f) {
  if constexpr (!std::is_same_v<Known, AnyFloat>) {
    f(Known{});
  } else {
    switch (type) {
      case FloatType::kFloat:
        return f(float{});
      case FloatType::kDouble:
        return f(double{});
      case FloatType::kHalf:
        return f(__half{});
      case FloatType::kBFloat16:
        return f(__nv_bfloat16{});
    }
  }
}

// A block's view of its part of a list, in the arithmetic of A. Of each operand the caller knows whether it has the
// type T of the parameters or G of the gradients.
template <typename A, typename T, typename G, int kOperands, template <int> typename List>
class Sweep {
 public:
  __device__ __forceinline__ explicit Sweep(const List<kOperands>& list) : list_(list), part_(list.part()) {}

  __device__ __forceinline__ int64_t slot() const { return part_.slot; }
  __device__ __forceinline__ double rho_scale() const { return list_.rho_scale(part_.entry); }
  __device__ __forceinline__ bool has(int operand) const { return data(operand) != nullptr; }
  __device__ __forceinline__ char* data(int operand) const { return list_.data(operand, part_.entry); }

  // Calls body(place, how many values): vectors where every operand is aligned, single values elsewhere.
  template <typename F>
  __device__ __forceinline__ void for_each(const F& body) const {
    using One = std::integral_constant<int, 1>;
    if constexpr (List<kOperands>::kVectors) {
      constexpr int N = kVector<T>;
      uintptr_t bits = 0;
#pragma unroll
      for (int k = 0; k < kOperands; ++k) bits |= reinterpret_cast<uintptr_t>(data(k));
      const int64_t last = bits % 16 == 0 ? part_.begin + (part_.end - part_.begin) / N * N : part_.begin;
#pragma unroll 1
      for (int64_t i = part_.begin + threadIdx.x * N; i < last; i += kThreads * N)
        body(FlatPlace{i}, std::integral_constant<int, N>{});
#pragma unroll 1
      for (int64_t i = last + threadIdx.x; i < part_.end; i += kThreads) body(FlatPlace{i}, One{});
    } else {
#pragma unroll 1
      for (int64_t i = part_.begin + threadIdx.x; i < part_.end; i += kThreads)
        body(StridedPlace<kOperands>(list_, i), One{});
    }
  }

  template <typename Place, int N>
  __device__ __forceinline__ void read(int operand, const Place& place, A (&wide)[N]) const {
    with_type<T>(list_.type, [&](auto zero) { read_values<decltype(zero)>(data(operand), place[operand], wide); });
  }
  template <typename Place, int N>
  __device__ __forceinline__ void write(int operand, const Place& place, const A (&wide)[N]) const {
    with_type<T>(list_.type, [&](auto zero) { write_values<decltype(zero)>(data(operand), place[operand], wide); });
  }
  // Bit for bit.
  template <int N, typename Place>
  __device__ __forceinline__ void copy(int from, int to, const Place& place) const {
    with_type<T>(list_.type,
                 [&](auto zero) { copy_values<decltype(zero), N>(data(to), place[to], data(from), place[from]); });
  }

  // The same for operands that are gradients.
  template <typename Place, int N>
  __device__ __forceinline__ void read_grad(int operand, const Place& place, A (&wide)[N]) const {
    with_type<G>(list_.grad_type, [&](auto zero) { read_values<decltype(zero)>(data(operand), place[operand], wide); });
  }
  template <typename Place, int N>
  __device__ __forceinline__ void write_grad(int operand, const Place& place, const A (&wide)[N]) const {
    with_type<G>(list_.grad_type,
                 [&](auto zero) { write_values<decltype(zero)>(data(operand), place[operand], wide); });
  }
  template <int N, typename Place>
  __device__ __forceinline__ void copy_grad(int from, int to, const Place& place) const {
    with_type<G>(list_.grad_type,
                 [&](auto zero) { copy_values<decltype(zero), N>(data(to), place[to], data(from), place[from]); });
  }

 private:
  const List<kOperands>& list_;
  const Part part_;
};

inline FloatType float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat;
    case ScalarType::Double:
      return FloatType::kDouble;
    case ScalarType::Half:
      return FloatType::kHalf;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " holds a tensor with dtype code ", static_cast<int>(tensor.scalar_type()),
                      "; float32, bfloat16, float16 and float64 are supported");
  }
}

// The lists of one call on the host: checked, and cut into launches. Tensors without elements take no part.
template <int kOperands>
class TensorLists {
 public:
  // `rho_scales` may be null: then they are not read.
  TensorLists(const std::vector<Tensor>& params, const std::vector<double>* rho_scales = nullptr) : params_(params) {
    STD_TORCH_CHECK(!params.empty(), "params is empty; at least one tensor is needed");
    STD_TORCH_CHECK(rho_scales == nullptr || rho_scales->size() == params.size(), "rho_scales has ",
                    rho_scales == nullptr ? 0 : rho_scales->size(), " entries, but params ", params.size());
    type_ = float_type("params", params[0]);
    entries_.resize(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      STD_TORCH_CHECK(params[i].scalar_type() == params[0].scalar_type(), "params holds several dtypes");
      STD_TORCH_CHECK(params[i].is_cuda(), "params[", i, "] is not on a GPU");
      check_same_device("an entry of params", params[i], params[0]);
      entries_[i].numel = params[i].numel();
      entries_[i].rho_scale = rho_scales == nullptr ? 0.0 : (*rho_scales)[i];
    }
  }
  TensorLists(const TensorLists&) = delete;

  // Sets an operand of the type of the parameters. The list may have no entry at all if `optional`, and entries without
  // elements in place of missing tensors.
  void set(int operand, const char* name, const std::vector<Tensor>& tensors, bool optional = false) {
    set_list(operand, name, tensors, optional, type_, "params");
  }
  void set_grads(int operand, const char* name, const std::vector<Tensor>& tensors, bool optional = false) {
    if (!tensors.empty() && !has_grads_) {
      for (const Tensor& tensor : tensors)
        if (tensor.numel() > 0 && !std::exchange(has_grads_, true)) grad_type_ = float_type(name, tensor);
    }
    set_list(operand, name, tensors, optional, grad_type_, "the other gradients");
  }
  // Sets an operand that is the same memory for the kernels of all strides, 16-byte aligned.
  void set_pointer(int operand, size_t i, void* pointer) {
    entries_[i].pointers[operand] = static_cast<char*>(pointer);
  }
  // Takes an entry out of the sweep.
  void leave_out(size_t i) { entries_[i].numel = 0; }

  // After all of that: cuts the lists. Returns how many chunks, and so slots, there are.
  int64_t cut() {
    int64_t numel = 0, chunks = 0;
    for (const Entry& entry : entries_) numel += entry.numel;
    chunk_ = ceil_div(ceil_div(numel, kChunksAimedAt), kShortestChunk) * kShortestChunk;
    chunk_ = std::clamp(chunk_, kShortestChunk, kLongestChunk);
    for (const Entry& entry : entries_) chunks += ceil_div(entry.numel, chunk_);
    return chunks;
  }

  // Calls launch(list, blocks, zeros of A, T and G) for every launch: a table for all tensors that lie alike in
  // memory, and one for every other tensor.
  template <typename Launch>
  void for_each_launch(const Launch& launch) const {
    dispatch(params_[0].scalar_type(), [&](auto zero) {
      const compute_t<decltype(zero)> wide{};
      int64_t slot = 0;
      size_t next = 0;
      while (next < entries_.size()) {
        FlatTable<kOperands> table;
        table.type = type_;
        table.grad_type = grad_type_;
        table.chunk = chunk_;
        table.first_slot = slot;
        const int64_t blocks = fill(table, next);
        if (blocks == 0) continue;
        slot += blocks;
        if (grad_type_ == type_)
          launch(table, static_cast<unsigned>(blocks), wide, zero, zero);
        else
          launch(table, static_cast<unsigned>(blocks), wide, zero, AnyFloat{});
      }
      for (size_t i = 0; i < entries_.size(); ++i) {
        if (entries_[i].numel == 0 || entries_[i].dims.empty()) continue;
        const StridedTensor<kOperands> tensor = strided(entries_[i], params_[i], slot);
        const int64_t blocks = ceil_div(tensor.numel, chunk_);
        slot += blocks;
        launch(tensor, static_cast<unsigned>(blocks), wide, AnyFloat{}, AnyFloat{});
      }
    });
  }

 private:
  // Value i of the sweep is element i of the shape of the parameter, its dimensions in the order in which they lie in
  // memory: `dims`, kept only if an operand lies otherwise.
  struct Entry {
    int64_t numel = 0;
    double rho_scale = 0.0;
    char* pointers[kOperands] = {};
    std::vector<int64_t> dims, strides[kOperands];
  };

  void set_list(int operand, const char* name, const std::vector<Tensor>& tensors, bool optional, FloatType type,
                const char* others) {
    if (optional && tensors.empty()) return;
    STD_TORCH_CHECK(tensors.size() == params_.size(), name, " has ", tensors.size(), " tensors, but params ",
                    params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      const Tensor& tensor = tensors[i];
      if (optional && tensor.numel() == 0) continue;
      check_same_device(name, tensor, params_[0]);
      const auto sizes = tensor.sizes(), wanted = params_[i].sizes();
      STD_TORCH_CHECK(sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin()), name,
                      "[", i, "] does not have the shape of its parameter");
      STD_TORCH_CHECK(tensor.numel() == 0 || float_type(name, tensor) == type, name, "[", i,
                      "] does not have the dtype of ", others);
      entries_[i].pointers[operand] = static_cast<char*>(tensor.mutable_data_ptr());
      if (tensor.numel() > 0 && !(tensor.is_contiguous() && params_[i].is_contiguous()))
        note_strides(operand, i, tensor);
    }
  }

  void note_strides(int operand, size_t i, const Tensor& tensor) {
    const std::vector<int64_t> dims = memory_order(params_[i]);
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    bool flat = true;
    int64_t expected = 1;
    for (size_t d = dims.size(); d-- > 0; expected *= sizes[dims[d]]) flat &= strides[dims[d]] == expected;
    if (flat) return;
    entries_[i].dims = dims;
    for (const int64_t d : dims) entries_[i].strides[operand].push_back(strides[d]);
  }

  // The dimensions with more than one element, the one with the largest stride first.
  static std::vector<int64_t> memory_order(const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    std::vector<int64_t> dims;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] > 1) dims.push_back(d);
    std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
    return dims;
  }

  // Takes entries from `next` on while there is room; returns their chunks.
  int64_t fill(FlatTable<kOperands>& table, size_t& next) const {
    int64_t blocks = 0;
    table.entries = 0;
    for (; next < entries_.size() && table.entries < kTableSize; ++next) {
      const Entry& entry = entries_[next];
      if (entry.numel == 0 || !entry.dims.empty()) continue;
      const int at = table.entries++;
      for (int k = 0; k < kOperands; ++k) table.pointers[k][at] = entry.pointers[k];
      table.numel[at] = entry.numel;
      table.rho_scales[at] = entry.rho_scale;
      table.first_chunk[at] = static_cast<int>(blocks);
      blocks += ceil_div(entry.numel, chunk_);
    }
    return blocks;
  }

  StridedTensor<kOperands> strided(const Entry& entry, const Tensor& param, int64_t slot) const {
    StridedTensor<kOperands> tensor{};
    std::copy(entry.pointers, entry.pointers + kOperands, tensor.pointers);
    tensor.numel = entry.numel;
    tensor.scale = entry.rho_scale;
    tensor.type = type_;
    tensor.grad_type = grad_type_;
    tensor.chunk = chunk_;
    tensor.first_slot = slot;
    tensor.dims = static_cast<int>(entry.dims.size());
    int64_t dense = 1;
    for (int d = tensor.dims - 1; d >= 0; --d) {
      tensor.sizes[d] = param.size(entry.dims[d]);
      for (int k = 0; k < kOperands; ++k) tensor.strides[k][d] = entry.strides[k].empty() ? dense : entry.strides[k][d];
      dense *= tensor.sizes[d];
    }
    return tensor;
  }

  const std::vector<Tensor>& params_;
  std::vector<Entry> entries_;
  FloatType type_, grad_type_ = FloatType::kFloat;
  bool has_grads_ = false;
  int64_t chunk_ = kShortestChunk;
};

}  // namespace asga
