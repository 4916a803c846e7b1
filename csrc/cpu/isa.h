// Which of the versions in vectorized/ this processor runs.
#pragma once

#include <stdlib.h>
#include <string.h>

namespace asga {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The widest that the processor has, or less if the environment variable ASGA_CPU_ISA (baseline, avx2, avx512) says so;
// all of them give the same bits, so the variable serves tests and measurements only.
inline Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const char* wanted = getenv("ASGA_CPU_ISA");
    const bool any = wanted == nullptr;
    if ((any || strcmp(wanted, "avx512") == 0) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Isa::kAvx512;
    if ((any || strcmp(wanted, "baseline") != 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return Isa::kAvx2;
#endif
    return Isa::kBaseline;
  }();
  return chosen;
}

}  // namespace asga

// Declares `Loops<scalar_t> name<scalar_t>()` in the namespace of every instruction set and a function of the same name
// that returns the version to run.
#if defined(__x86_64__)
#define ASGA_PICK_ISA(Loops, name)         \
  namespace asga {                         \
  namespace baseline {                     \
  template <typename scalar_t>             \
  Loops<scalar_t> name();                  \
  }                                        \
  namespace avx2 {                         \
  template <typename scalar_t>             \
  Loops<scalar_t> name();                  \
  }                                        \
  namespace avx512 {                       \
  template <typename scalar_t>             \
  Loops<scalar_t> name();                  \
  }                                        \
  template <typename scalar_t>             \
  Loops<scalar_t> name() {                 \
    switch (isa()) {                       \
      case Isa::kAvx512:                   \
        return avx512::name<scalar_t>();   \
      case Isa::kAvx2:                     \
        return avx2::name<scalar_t>();     \
      default:                             \
        return baseline::name<scalar_t>(); \
    }                                      \
  }                                        \
  }
#else
#define ASGA_PICK_ISA(Loops, name)     \
  namespace asga {                     \
  namespace baseline {                 \
  template <typename scalar_t>         \
  Loops<scalar_t> name();              \
  }                                    \
  template <typename scalar_t>         \
  Loops<scalar_t> name() {             \
    return baseline::name<scalar_t>(); \
  }                                    \
  }
#endif
