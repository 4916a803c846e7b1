#include "sam.h"

#include <math.h>

#include <type_traits>

#include "lanes.h"

namespace asga {
namespace {

static_assert(kSumLanes == kLanes, "a pack is what sums are made of");

template <typename V>
using Whole = std::integral_constant<int, kWidth<V>>;

// Calls f(offset, Whole) for the whole registers of `count` values and f(offset, int) for the rest.
template <typename V, typename F>
ASGA_INLINE void for_each_register(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kWidth<V> <= count; i += kWidth<V>) f(i, Whole<V>{});
  if (i < count) f(i, static_cast<int>(count - i));
}

template <typename scalar_t>
ASGA_INLINE vector_t<scalar_t> read(const scalar_t* from, Whole<vector_t<scalar_t>>) {
  return load(from);
}
template <typename scalar_t>
ASGA_INLINE vector_t<scalar_t> read(const scalar_t* from, int count) {
  return load_some(from, count);
}

template <bool kPastCaches = false, typename scalar_t>
ASGA_INLINE void write(scalar_t* to, vector_t<scalar_t> value, Whole<vector_t<scalar_t>>) {
  store<kPastCaches>(to, value);
}
template <bool kPastCaches = false, typename scalar_t>
ASGA_INLINE void write(scalar_t* to, vector_t<scalar_t> value, int count) {
  store_some(to, value, count);
}

ASGA_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int lane = 0; lane < kWidth<Floats>; ++lane) x[lane] = sqrtf(x[lane]);
  return x;
#endif
}

ASGA_INLINE Doubles square_root(Doubles x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Doubles>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(x)));
#else
  for (int lane = 0; lane < kWidth<Doubles>; ++lane) x[lane] = sqrt(x[lane]);
  return x;
#endif
}

// Sums of `kTerms` products, their lanes in registers; add() takes the terms of register `r` of a pack.
template <typename compute, int kTerms>
struct LaneSums {
  using V = vector_t<compute>;
  V parts[kTerms][kRegisters<V>];

  explicit LaneSums(const compute* lanes) { memcpy(parts, lanes, sizeof parts); }
  void save(compute* lanes) const { memcpy(lanes, parts, sizeof parts); }
};

// Calls term(sums, register of the pack, offset, how many values) for `count` values.
template <typename compute, int kTerms, typename Term>
ASGA_INLINE void add_up(int64_t count, compute* lanes, const Term& term) {
  using V = vector_t<compute>;
  LaneSums<compute, kTerms> sums(lanes);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int r = 0; r < kRegisters<V>; ++r) term(sums.parts, r, i + r * kWidth<V>, Whole<V>{});
  for (int r = 0; i < count; ++r, i += kWidth<V>) {
    const int64_t left = count - i;
    if (left >= kWidth<V>)
      term(sums.parts, r, i, Whole<V>{});
    else
      term(sums.parts, r, i, static_cast<int>(left));
  }
  sums.save(lanes);
}

// Zero in the lanes beyond `some` values.
template <typename V>
ASGA_INLINE V kept(V value, Whole<V>) {
  return value;
}
template <typename V>
ASGA_INLINE V kept(V value, int count) {
  return keep_some(value, count);
}

template <typename compute>
void norm(const compute* theta, const compute* grads, int64_t count, compute* lanes) {
  using V = vector_t<compute>;
  if (theta == nullptr) {
    add_up<compute, 1>(count, lanes, [&](auto& sums, int r, int64_t i, auto some) {
      const V g = kept(read(grads + i, some), some);
      sums[0][r] += g * g;
    });
  } else {
    add_up<compute, 1>(count, lanes, [&](auto& sums, int r, int64_t i, auto some) {
      const V scaled = kept(read(theta + i, some) * read(grads + i, some), some);
      sums[0][r] += scaled * scaled;
    });
  }
}

template <typename compute>
void dots(const compute* theta, const compute* first_grads, const compute* grads, int64_t count, compute* lanes) {
  using V = vector_t<compute>;
  if (first_grads == nullptr) {
    add_up<compute, 1>(count, lanes + 2 * kLanes, [&](auto& sums, int r, int64_t i, auto some) {
      const V g = kept(read(grads + i, some), some);
      sums[0][r] += g * g;
    });
  } else if (theta == nullptr) {
    add_up<compute, 3>(count, lanes, [&](auto& sums, int r, int64_t i, auto some) {
      const V g0 = kept(read(first_grads + i, some), some), g1 = kept(read(grads + i, some), some);
      sums[0][r] += g0 * g0;
      sums[1][r] += g0 * g1;
      sums[2][r] += g1 * g1;
    });
  } else {
    add_up<compute, 4>(count, lanes, [&](auto& sums, int r, int64_t i, auto some) {
      const V g0 = kept(read(first_grads + i, some), some), g1 = kept(read(grads + i, some), some);
      const V t = kept(read(theta + i, some), some);
      sums[0][r] += g0 * g0;
      sums[1][r] += g0 * g1;
      sums[2][r] += g1 * g1;
      sums[3][r] += (t * g0) * (t * g1);
    });
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kRegisterBytes == 0; }

// Calls f(std::bool_constant) with whether to write past the caches.
template <typename F>
ASGA_INLINE void choose_store(bool past_caches, const F& f) {
  if (!past_caches) return f(std::false_type{});
  f(std::true_type{});
  fence_writes();
}

template <typename compute>
void perturb(compute size, bool adaptive, const compute* theta, const compute* grads, compute* moved, compute* backup,
             compute* first_grads, int64_t count, bool past_caches) {
  using V = vector_t<compute>;
  choose_store(past_caches && aligned(moved) && aligned(backup) && aligned(first_grads), [&](auto past) {
    for_each_register<V>(count, [&](int64_t i, auto some) {
      const V t = read(theta + i, some), g = read(grads + i, some);
      const V direction = adaptive ? (t * t) * g : g;
      if (first_grads != nullptr) write<past.value>(first_grads + i, g, some);
      if (backup != nullptr) write<past.value>(backup + i, t, some);
      write<past.value>(moved + i, t + size * direction, some);
    });
  });
}

template <typename compute, typename Some>
ASGA_INLINE vector_t<compute> combined(const Combination<compute>& of, int64_t i, Some some) {
  const auto second = of.c1 * read(of.grads + i, some);
  return of.first_grads == nullptr ? second : of.c0 * read(of.first_grads + i, some) + second;
}

// theta - move, and theta to the bit where the move is zero: -0.0 - (-0.0) would be 0.0.
template <typename V>
ASGA_INLINE V subtract(V theta, V move) {
  return move == V{} ? theta : theta - move;
}

template <typename compute>
void combine(const Combination<compute>& of, compute* result, int64_t count) {
  for_each_register<vector_t<compute>>(count,
                                       [&](int64_t i, auto some) { write(result + i, combined(of, i, some), some); });
}

template <typename compute>
void sgd(const SgdScalars<compute>& scalars, const Combination<compute>& of, const compute* backup, compute* momentum,
         compute* param, int64_t count, bool past_caches) {
  using V = vector_t<compute>;
  const SgdScalars<compute> s = scalars;  // no store can alias it
  const Combination<compute> gradients = of;
  choose_store(past_caches && aligned(param), [&](auto past) {
    for_each_register<V>(count, [&](int64_t i, auto some) {
      const V theta = read(backup + i, some);
      V d = combined(gradients, i, some);
      if (s.weight_decay != 0) d = d + s.weight_decay * theta;
      if (momentum != nullptr) {
        const V buffer = s.momentum * read(momentum + i, some) + d;
        write(momentum + i, buffer, some);
        d = s.nesterov ? d + s.momentum * buffer : buffer;
      }
      write<past.value>(param + i, subtract<V>(theta, s.lr * d), some);
    });
  });
}

template <typename compute>
void adam(const AdamScalars<compute>& scalars, const Combination<compute>& of, const compute* backup, compute* exp_avg,
          compute* exp_avg_sq, compute* param, int64_t count, bool past_caches) {
  using V = vector_t<compute>;
  const AdamScalars<compute> s = scalars;
  const Combination<compute> gradients = of;
  choose_store(past_caches && aligned(param), [&](auto past) {
    for_each_register<V>(count, [&](int64_t i, auto some) {
      V theta = read(backup + i, some), d = combined(gradients, i, some);
      if (s.weight_decay != 0) {
        if (s.decoupled)
          theta = theta * s.shrink;
        else
          d = d + s.weight_decay * theta;
      }
      V first = read(exp_avg + i, some), second = read(exp_avg_sq + i, some);
      first = first + s.one_minus_beta1 * (d - first);
      second = s.beta2 * second + (s.one_minus_beta2 * d) * d;
      write(exp_avg + i, first, some);
      write(exp_avg_sq + i, second, some);
      const V move = (s.size * first) / (square_root(second) / s.root + s.eps);
      write<past.value>(param + i, subtract<V>(theta, move), some);
    });
  });
}

float to_float(float value) { return value; }
double to_float(double value) { return value; }
float to_float(Half value) { return half_to_float(value.bits); }
float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

// From float, rounded to the nearest, in the low lane of a register: the same code as for whole ones.
template <typename scalar_t>
scalar_t from_float(float value) {
  scalar_t result;
  store_some(&result, Floats{} + value, 1);
  return result;
}

template <typename scalar_t, typename compute>
void widen(const void* from, compute* to, int64_t count) {
  const auto* values = static_cast<const scalar_t*>(from);
  if constexpr (std::is_same_v<compute_t<scalar_t>, compute>) {
    for_each_register<vector_t<compute>>(count,
                                         [&](int64_t i, auto some) { write(to + i, read(values + i, some), some); });
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<compute>(to_float(values[i]));
  }
}

template <typename scalar_t, typename compute>
void narrow_to(const compute* from, void* to, int64_t count) {
  auto* values = static_cast<scalar_t*>(to);
  if constexpr (std::is_same_v<compute_t<scalar_t>, compute>) {
    for_each_register<vector_t<compute>>(count,
                                         [&](int64_t i, auto some) { write(values + i, read(from + i, some), some); });
  } else if constexpr (sizeof(scalar_t) >= sizeof(float)) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<scalar_t>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = from_float<scalar_t>(static_cast<float>(from[i]));
  }
}

}  // namespace

namespace ASGA_ISA {

template <typename compute>
SamLoops<compute> sam_loops() {
  return {&norm<compute>,
          &perturb<compute>,
          &dots<compute>,
          &combine<compute>,
          &sgd<compute>,
          &adam<compute>,
          {&widen<float, compute>, &widen<double, compute>, &widen<Half, compute>, &widen<BFloat16, compute>},
          {&narrow_to<float, compute>, &narrow_to<double, compute>, &narrow_to<Half, compute>,
           &narrow_to<BFloat16, compute>}};
}

template SamLoops<float> sam_loops();
template SamLoops<double> sam_loops();

}  // namespace ASGA_ISA
}  // namespace asga
