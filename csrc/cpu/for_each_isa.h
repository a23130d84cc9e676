// Compiles the file that FASTDA_LOOPS names once for each instruction set, in a namespace of its own, so that one binary
// runs on any processor and still uses the vectors of this one. FASTDA_RUN(function<T>(...)) calls the version for it.
//
// A loops file holds plain loops on raw pointers and includes nothing: code from headers that is compiled for a newer
// instruction set could be the copy that the linker keeps for everybody. "omp simd reduction" lets the compiler reorder
// that one sum, without -ffast-math, which would break NaN and Inf.
#pragma once

#include <ATen/Version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTDA_X86 1
#else
#define FASTDA_X86 0
#endif

#ifdef __clang__
#define FASTDA_PRAGMA(text) _Pragma(#text)
#define FASTDA_BEGIN_AVX2 FASTDA_PRAGMA(clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function))
#define FASTDA_BEGIN_AVX512 \
  FASTDA_PRAGMA(clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,fma"))), apply_to = function))
#define FASTDA_END FASTDA_PRAGMA(clang attribute pop)
#endif

namespace fastda {

enum class InstructionSet { baseline, avx2, avx512 };

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers both.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (!FASTDA_X86) return InstructionSet::baseline;
    if (capability == "AVX512") return InstructionSet::avx512;
    return capability == "AVX2" ? InstructionSet::avx2 : InstructionSet::baseline;
  }();
  return chosen;
}

namespace {

namespace baseline {
#include FASTDA_LOOPS
}

#if FASTDA_X86
#ifdef __clang__
FASTDA_BEGIN_AVX2
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include FASTDA_LOOPS
}
#ifdef __clang__
FASTDA_END
FASTDA_BEGIN_AVX512
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#include FASTDA_LOOPS
}
#ifdef __clang__
FASTDA_END
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace
}  // namespace fastda

#if FASTDA_X86
#define FASTDA_RUN(...)                                                        \
  do {                                                                         \
    switch (::fastda::instruction_set()) {                                     \
      case ::fastda::InstructionSet::avx512: avx512::__VA_ARGS__; break;       \
      case ::fastda::InstructionSet::avx2: avx2::__VA_ARGS__; break;           \
      default: baseline::__VA_ARGS__;                                          \
    }                                                                          \
  } while (false)
#else
#define FASTDA_RUN(...) baseline::__VA_ARGS__
#endif
