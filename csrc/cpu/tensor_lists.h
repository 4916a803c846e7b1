// Lists of tensors that are swept together, entry by entry: cut into chunks for threads, and read and written in the
// type of the arithmetic whatever their dtypes and strides. The cuts depend on the sizes alone, never on the number of
// threads, so that sums with a slot for every chunk have the same bits on every run.
#pragma once

#include <string.h>

#include "dispatch.h"
#include "vectorized/sam.h"

namespace asga {

// One tensor of one list. `strides` is empty where value i of the sweep is value i in memory.
struct Operand {
  char* data = nullptr;  // null: there is none
  StorageType type = kFloatStorage;
  int64_t bytes = 0;  // of a value
  std::vector<int64_t> strides;

  bool flat() const { return strides.empty(); }
};

// Value i of the sweep is element i of the shape `sizes`; its dimensions are those of the parameter in the order in
// which they lie in memory. Only kept where an operand is not flat.
struct Entry {
  int64_t numel = 0, first_chunk = 0;
  std::vector<int64_t> sizes;
  std::vector<Operand> operands;
};

// 8,192 values: 32 KiB of float32 in each operand, and short enough that float32 sums of 512 values a lane lose nothing
// that matters.
constexpr int64_t kChunk = 8192;

inline StorageType storage_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloatStorage;
    case ScalarType::Double:
      return kDoubleStorage;
    case ScalarType::Half:
      return kHalfStorage;
    case ScalarType::BFloat16:
      return kBFloat16Storage;
    default:
      STD_TORCH_CHECK(false, name, " holds a tensor with dtype code ", static_cast<int>(tensor.scalar_type()),
                      "; float32, bfloat16, float16 and float64 are supported");
  }
}

class TensorLists {
 public:
  explicit TensorLists(const std::vector<Tensor>& params) : params_(params), entries_(params.size()) {
    STD_TORCH_CHECK(!params.empty(), "params is empty; at least one tensor is needed");
    for (size_t i = 0; i < params.size(); ++i) {
      STD_TORCH_CHECK(params[i].scalar_type() == params[0].scalar_type(), "params holds several dtypes");
      entries_[i].numel = params[i].numel();
      entries_[i].first_chunk = chunks_;
      chunks_ += ceil_div(entries_[i].numel, kChunk);
      numel_ += entries_[i].numel;
    }
  }
  TensorLists(const TensorLists&) = delete;

  // Add a list as the next operand and return its number. It may have no entry at all if `optional`, and entries
  // without elements in place of missing tensors.
  int add(const char* name, const std::vector<Tensor>& tensors, bool optional = false) {
    const bool missing = optional && tensors.empty();
    STD_TORCH_CHECK(missing || tensors.size() == params_.size(), name, " has ", tensors.size(), " tensors, but params ",
                    params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      Operand operand;
      if (!missing && !(optional && tensors[i].numel() == 0)) operand = operand_of(name, i, tensors[i]);
      entries_[i].operands.push_back(std::move(operand));
    }
    return operands_++;
  }

  const std::vector<Tensor>& params() const { return params_; }
  const Entry& entry(int64_t i) const { return entries_[i]; }
  int64_t size() const { return entries_.size(); }
  int64_t chunks() const { return chunks_; }
  int64_t numel() const { return numel_; }
  int operands() const { return operands_; }

 private:
  Operand operand_of(const char* name, size_t i, const Tensor& tensor) {
    check_same_device(name, tensor, params_[0]);
    const auto sizes = tensor.sizes(), wanted = params_[i].sizes();
    STD_TORCH_CHECK(sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin()), name, "[",
                    i, "] does not have the shape of its parameter");
    Operand operand;
    operand.type = storage_type(name, tensor);
    operand.bytes = tensor.element_size();
    operand.data = static_cast<char*>(tensor.mutable_data_ptr());
    if (tensor.is_contiguous() && params_[i].is_contiguous()) return operand;

    const std::vector<int64_t> dims = memory_order(params_[i]);
    const auto strides = tensor.strides();
    bool flat = true;
    int64_t expected = 1;
    for (size_t d = dims.size(); d-- > 0; expected *= sizes[dims[d]]) flat &= strides[dims[d]] == expected;
    if (flat) return operand;
    entries_[i].sizes.clear();
    for (const int64_t d : dims) {
      entries_[i].sizes.push_back(sizes[d]);
      operand.strides.push_back(strides[d]);
    }
    return operand;
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

  const std::vector<Tensor>& params_;
  std::vector<Entry> entries_;
  int64_t chunks_ = 0, numel_ = 0;
  int operands_ = 0;
};

// Moves `count` values of `bytes` each, from value `start` of the sweep on, between a tensor with strides and a buffer.
template <typename Move>
void for_each_strided(const std::vector<int64_t>& sizes, const Operand& operand, int64_t start, int64_t count,
                      const Move& move) {
  constexpr int kMostDims = 64;  // as many as a tensor can have
  int64_t index[kMostDims], offset = 0, rest = start;
  const int dims = static_cast<int>(sizes.size());
  for (int d = dims - 1; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += index[d] * operand.strides[d];
  }
  for (int64_t i = 0; i < count; ++i) {
    move(i * operand.bytes, offset * operand.bytes);
    for (int d = dims - 1; d >= 0; --d) {
      offset += operand.strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= index[d] * operand.strides[d];
      index[d] = 0;
    }
  }
}

// The values of a chunk, or of a piece of it, as the loops take them: in place where they can be, else by way of
// buffers.
template <typename compute>
class Block {
 public:
  // Values of a buffer; a multiple of kSumLanes, so that every value keeps its lane.
  static constexpr int64_t kPiece = 512;
  static constexpr int kMostOperands = 6;

  explicit Block(const SamLoops<compute>& loops) : loops_(loops) {}

  void move_to(const Entry& entry, int64_t start, int64_t count) {
    entry_ = &entry;
    start_ = start;
    count_ = count;
  }
  int64_t count() const { return count_; }

  // Null where the operand is missing.
  const compute* read(int k) {
    const Operand& operand = entry_->operands[k];
    if (operand.data == nullptr || in_place(operand)) return direct(operand);
    const void* from = operand.data + start_ * operand.bytes;
    if (!operand.flat()) {
      gather(operand);
      from = bytes_;
    }
    loops_.widen[operand.type](from, buffers_[k], count_);
    return buffers_[k];
  }
  // Where to write; `save` brings it to the tensor.
  compute* write(int k) {
    const Operand& operand = entry_->operands[k];
    return operand.data == nullptr || in_place(operand) ? direct(operand) : buffers_[k];
  }
  // For what is read and written.
  compute* update(int k) {
    read(k);
    return write(k);
  }
  void save(int k) {
    const Operand& operand = entry_->operands[k];
    if (operand.data == nullptr || in_place(operand)) return;
    void* to = operand.flat() ? operand.data + start_ * operand.bytes : bytes_;
    loops_.narrow[operand.type](buffers_[k], to, count_);
    if (!operand.flat()) scatter(operand);
  }
  // Copies the bits of an operand to one of the same dtype; nothing where that is missing.
  void copy(int from, int to) {
    const Operand &source = entry_->operands[from], &target = entry_->operands[to];
    if (target.data == nullptr) return;
    const char* values = source.data + start_ * source.bytes;
    if (!source.flat()) {
      gather(source);
      values = bytes_;
    }
    if (target.flat()) {
      memcpy(target.data + start_ * target.bytes, values, count_ * target.bytes);
    } else {
      if (values != bytes_) memcpy(bytes_, values, count_ * target.bytes);
      scatter(target);
    }
  }
  // Whether the loops take an operand from where it is.
  bool in_place(int k) const { return in_place(entry_->operands[k]); }

  static bool in_place(const Operand& operand) {
    return operand.flat() && operand.type == (sizeof(compute) == sizeof(double) ? kDoubleStorage : kFloatStorage);
  }
  static bool in_place(const Entry& entry) {
    for (const Operand& operand : entry.operands)
      if (operand.data != nullptr && !in_place(operand)) return false;
    return true;
  }

 private:
  compute* direct(const Operand& operand) const {
    return operand.data == nullptr ? nullptr : reinterpret_cast<compute*>(operand.data) + start_;
  }

  void gather(const Operand& operand) {
    for_each_strided(entry_->sizes, operand, start_, count_,
                     [&](int64_t to, int64_t at) { memcpy(bytes_ + to, operand.data + at, operand.bytes); });
  }
  void scatter(const Operand& operand) {
    for_each_strided(entry_->sizes, operand, start_, count_,
                     [&](int64_t from, int64_t at) { memcpy(operand.data + at, bytes_ + from, operand.bytes); });
  }

  const SamLoops<compute>& loops_;
  const Entry* entry_ = nullptr;
  int64_t start_ = 0, count_ = 0;
  alignas(64) compute buffers_[kMostOperands][kPiece];
  alignas(64) char bytes_[kPiece * sizeof(double)];
};

// Calls run(block, entry number, chunk number) for all values, on torch's threads; a chunk may come in several blocks.
template <typename compute, typename Run>
void sweep_lists(const TensorLists& lists, const SamLoops<compute>& loops, const Run& run) {
  const auto work = [&](int64_t begin, int64_t end) {
    Block<compute> block(loops);
    int64_t i = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (i + 1 < lists.size() && lists.entry(i + 1).first_chunk <= chunk) ++i;
      const Entry& entry = lists.entry(i);
      const int64_t first = (chunk - entry.first_chunk) * kChunk;
      const int64_t last = entry.numel - first < kChunk ? entry.numel : first + kChunk;
      const int64_t piece = Block<compute>::in_place(entry) ? kChunk : Block<compute>::kPiece;
      for (int64_t start = first; start < last; start += piece) {
        block.move_to(entry, start, last - start < piece ? last - start : piece);
        run(block, i, chunk);
      }
    }
  };
  // About ten microseconds of work for a thread, the cost of waking it.
  constexpr int64_t kLeast = 32768;
  if (lists.numel() <= kLeast) return work(0, lists.chunks());
  torch::stable::parallel_for(0, lists.chunks(), 1, work);
}

}  // namespace asga
