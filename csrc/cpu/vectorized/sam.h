// The loops of the fused ASGA step over one block of values: compiled once per instruction set, picked and fed by
// ../sam.cpp. Pointers are to values in the type of the arithmetic; `asga/ops/sam_reference.py` is the definition.
#pragma once

#include "../storage.h"

namespace asga {

// Sums have this many lanes: value i of a tensor goes to lane i % kSumLanes, whatever the instruction set.
constexpr int kSumLanes = 16;

// How many sums `SamLoops::dots` makes: <g0, g0>, <g0, g1>, <g1, g1>, <theta g0, theta g1>.
constexpr int kDots = 4;

// d = c0 g0 + c1 g1.
template <typename compute>
struct Combination {
  compute c0, c1;
  const compute *first_grads, *grads;  // g0 is null where it counts as zeros
};

template <typename compute>
struct SgdScalars {
  compute lr, momentum, weight_decay;
  bool nesterov;
};

// `shrink` = 1 - lr weight_decay where the decay is decoupled; `size` = lr / (1 - beta1^t) and `root` =
// sqrt(1 - beta2^t) of the tensor at hand.
template <typename compute>
struct AdamScalars {
  compute size, root, beta2, one_minus_beta1, one_minus_beta2, eps, weight_decay, shrink;
  bool decoupled;
};

// Storage types by the number that the conversions below have in their tables.
enum StorageType { kFloatStorage, kDoubleStorage, kHalfStorage, kBFloat16Storage, kStorageTypes };

// `past_caches` asks for writes past the caches; it is not done where a result is not aligned.
template <typename compute>
struct SamLoops {
  // Add the squares of g, or of theta g, to [kSumLanes] lanes. `theta` is null for the first.
  void (*norm)(const compute* theta, const compute* grads, int64_t count, compute* lanes);

  // backup <- theta, first_grads <- g (either may be null), moved <- theta + size T^2 g.
  void (*perturb)(compute size, bool adaptive, const compute* theta, const compute* grads, compute* moved,
                  compute* backup, compute* first_grads, int64_t count, bool past_caches);

  // Add the products to [kDots, kSumLanes] lanes; the last one only where `theta` is not null.
  void (*dots)(const compute* theta, const compute* first_grads, const compute* grads, int64_t count, compute* lanes);

  void (*combine)(const Combination<compute>&, compute* combined, int64_t count);

  // `momentum` is null without one.
  void (*sgd)(const SgdScalars<compute>&, const Combination<compute>&, const compute* backup, compute* momentum,
              compute* param, int64_t count, bool past_caches);

  void (*adam)(const AdamScalars<compute>&, const Combination<compute>&, const compute* backup, compute* exp_avg,
               compute* exp_avg_sq, compute* param, int64_t count, bool past_caches);

  // From each storage type to the type of the arithmetic, and back.
  void (*widen[kStorageTypes])(const void* from, compute* to, int64_t count);
  void (*narrow[kStorageTypes])(const compute* from, void* to, int64_t count);
};

}  // namespace asga
