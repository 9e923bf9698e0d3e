// The kernels for AVX-512 with VNNI.
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")

namespace headrace {
namespace {

#include "lanes.h"
#include "rows.h"

constexpr int kPrefetchBytes = 4096;

HEADRACE_INLINE void multiply_row(__m512i& low, __m512i& high, __m512i first, __m512i second, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof four);
  const __m512i row = _mm512_set1_epi32(four);
  // In assembly, because GCC 12 copies the sums of the intrinsic around and then has too few registers.
  asm("vpdpbusd %2, %1, %0" : "+v"(low) : "v"(first), "v"(row));
  asm("vpdpbusd %2, %1, %0" : "+v"(high) : "v"(second), "v"(row));
}

// Unrolled by the fold expressions: only with constant indices does the compiler keep all sums in registers.
template <int N, int... I>
HEADRACE_INLINE void accumulate_rows(const uint8_t* panel, int depth, const int8_t* x, int64_t stride,
                                     Integers sums[N][2], std::integer_sequence<int, I...>) {
  __m512i low[N], high[N];
  ((low[I] = (__m512i)sums[I][0], high[I] = (__m512i)sums[I][1]), ...);
  for (int k = 0; k < depth; ++k, panel += kPanelChannels * kDepth, x += kDepth) {
    // The processor's own prefetcher stops at each page.
    _mm_prefetch(reinterpret_cast<const char*>(panel + kPrefetchBytes), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(panel + kPrefetchBytes + 64), _MM_HINT_T0);
    const __m512i first = _mm512_loadu_si512(panel), second = _mm512_loadu_si512(panel + 64);
    (multiply_row(low[I], high[I], first, second, x + I * stride), ...);
  }
  ((sums[I][0] = (Integers)low[I], sums[I][1] = (Integers)high[I]), ...);
}

template <int N>
HEADRACE_INLINE void accumulate(const uint8_t* panel, int depth, const int8_t* x, int64_t stride,
                                Integers sums[N][2]) {
  accumulate_rows<N>(panel, depth, x, stride, sums, std::make_integer_sequence<int, N>{});
}

HEADRACE_INLINE void store_past_caches(float* to, Floats v) { _mm512_stream_ps(to, (__m512)v); }

HEADRACE_INLINE void finish_stores() { _mm_sfence(); }

#include "panel.h"

}  // namespace

const Kernels kAvx512Kernels = make_kernels();

}  // namespace headrace
#endif
