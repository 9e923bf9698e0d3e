// The kernels for AVX-512 with VNNI.
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")

namespace headrace {
namespace {

#include "lanes.h"
#include "rows.h"
#include "pass.h"

HEADRACE_INLINE void multiply_row(__m512i& low, __m512i& high, __m512i first, __m512i second, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  const __m512i row = _mm512_set1_epi32(four);
  // In assembly, because GCC 12 copies the sums of the intrinsic around and then has too few registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(low) : "v"(first), "v"(row));
  asm("vpdpbusd %2, %1, %0" : "+v"(high) : "v"(second), "v"(row));
}

HEADRACE_INLINE void fetch(const uint8_t* line) {
  // Into the second cache: in the first one it would push out the panel that is being multiplied.
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
}

// Unrolled by the fold expressions: only with constant indices does the compiler keep all sums in registers.
template <int N, int... I>
HEADRACE_INLINE void accumulate_rows(const Pass& pass, Integers (*sums)[2], std::integer_sequence<int, I...>) {
  __m512i low[N], high[N];
  ((low[I] = high[I] = _mm512_set1_epi32(pass.offsets[I])), ...);
  const uint8_t* panel = pass.panel;
  const uint8_t* ahead = pass.ahead.from;
  const int8_t* x = pass.x;
  const int64_t stride = pass.stride;
  const auto multiply = [&]() __attribute__((always_inline)) {
    const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + kLineBytes);
    (multiply_row(low[I], high[I], first, second, x + I * stride), ...);
    panel += 2 * kLineBytes;
    x += kDepth;
  };
  int k = 0;
  for (; k < pass.ahead.num_lines - pass.depth; ++k, ahead += 2 * kLineBytes) {
    fetch(ahead);
    fetch(ahead + kLineBytes);
    multiply();
  }
  for (const int end = std::min(pass.depth, pass.ahead.num_lines); k < end; ++k, ahead += kLineBytes) {
    fetch(ahead);
    multiply();
  }
  for (; k < pass.depth; ++k) multiply();
  ((sums[I][0] = (Integers)low[I], sums[I][1] = (Integers)high[I]), ...);
}

template <int N>
void accumulate(const Pass& pass, Integers (*sums)[2]) {
  accumulate_rows<N>(pass, sums, std::make_integer_sequence<int, N>{});
}

HEADRACE_INLINE void store_past_caches(float* to, Floats v) { _mm512_stream_ps(to, (__m512)v); }

HEADRACE_INLINE void finish_stores() { _mm_sfence(); }

#include "panel.h"

}  // namespace

const Kernels kAvx512Kernels = make_kernels();

}  // namespace headrace
#endif
