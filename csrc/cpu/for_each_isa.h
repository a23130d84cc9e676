// Compiles the file that FASTDA_LOOPS names once for each instruction set, in a namespace of its own, so that one
// binary runs on any processor and still uses the vectors of this one. FASTDA_RUN(function<T>(...)) calls the version
// for it.
//
// A loops file holds plain loops on raw pointers and includes nothing but other loops files: code from headers that is
// compiled for a newer instruction set could be the copy that the linker keeps for everybody. "omp simd reduction"
// lets the compiler reorder that one sum, without -ffast-math, which would break NaN and Inf. FASTDA_VECTOR_BYTES is
// the width of a vector.
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

#if defined(__clang__) || __GNUC__ >= 12
#define FASTDA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTDA_SHUFFLE(a, b, ...) ::fastda::shuffle(a, b, __VA_ARGS__)
#endif

namespace fastda {

// What __builtin_shufflevector does, for compilers without it.
template <typename Vector, typename... Lanes>
Vector shuffle(Vector a, Vector b, Lanes... lanes) {
  constexpr int count = sizeof...(Lanes);
  Vector result;
  int to = 0;
  ((result[to++] = lanes < count ? a[lanes % count] : b[lanes % count]), ...);
  return result;
}

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

#if !defined(FASTDA_ONLY) || FASTDA_ONLY == 16
#define FASTDA_VECTOR_BYTES 16
namespace baseline {
#include FASTDA_LOOPS
}
#undef FASTDA_VECTOR_BYTES
#endif

#if FASTDA_X86 && (!defined(FASTDA_ONLY) || FASTDA_ONLY == 32)
#ifdef __clang__
FASTDA_BEGIN_AVX2
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FASTDA_VECTOR_BYTES 32
namespace avx2 {
#include FASTDA_LOOPS
}
#undef FASTDA_VECTOR_BYTES
#ifdef __clang__
FASTDA_END
#else
#pragma GCC pop_options
#endif
#endif

#if FASTDA_X86 && (!defined(FASTDA_ONLY) || FASTDA_ONLY == 64)
#ifdef __clang__
FASTDA_BEGIN_AVX512
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
#define FASTDA_VECTOR_BYTES 64
namespace avx512 {
#include FASTDA_LOOPS
}
#undef FASTDA_VECTOR_BYTES
#ifdef __clang__
FASTDA_END
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace
}  // namespace fastda

#if FASTDA_X86 && !defined(FASTDA_ONLY)
#define FASTDA_RUN(...)                                                        \
  do {                                                                         \
    switch (::fastda::instruction_set()) {                                     \
      case ::fastda::InstructionSet::avx512: avx512::__VA_ARGS__; break;       \
      case ::fastda::InstructionSet::avx2: avx2::__VA_ARGS__; break;           \
      default: baseline::__VA_ARGS__;                                          \
    }                                                                          \
  } while (false)
#elif FASTDA_X86 && FASTDA_ONLY == 64
#define FASTDA_RUN(...) avx512::__VA_ARGS__
#elif FASTDA_X86 && FASTDA_ONLY == 32
#define FASTDA_RUN(...) avx2::__VA_ARGS__
#else
#define FASTDA_RUN(...) baseline::__VA_ARGS__
#endif
