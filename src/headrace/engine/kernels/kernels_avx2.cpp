// The kernels for AVX2. `vpmaddubsw` would saturate; so bytes are widened to 16 bits, whose products are exact.
#include "matrix.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma")

namespace headrace {
namespace {

#include "lanes.h"
#include "rows.h"
#include "pass.h"

// Sixteen channels of up to two rows: eight sums stay in registers, each with two halves of four channels.
template <int N>
HEADRACE_INLINE void accumulate_half(const uint8_t* panel, int depth, const int8_t* x, int64_t stride,
                                     Integers* const sums[N]) {
  __m256i acc[N][4];
  for (int i = 0; i < N; ++i)
    for (int quad = 0; quad < 4; ++quad) acc[i][quad] = _mm256_setzero_si256();
  for (int k = 0; k < depth; ++k, panel += kPanelChannels * kDepth, x += kDepth) {
    __m256i row[N];
    for (int i = 0; i < N; ++i) {
      int32_t four;
      __builtin_memcpy(&four, x + i * stride, sizeof four);
      row[i] = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
    }
    for (int quad = 0; quad < 4; ++quad) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel) + quad);
      const __m256i weights = _mm256_cvtepu8_epi16(bytes);
      for (int i = 0; i < N; ++i)
        acc[i][quad] = _mm256_add_epi32(acc[i][quad], _mm256_madd_epi16(weights, row[i]));
    }
  }
  for (int i = 0; i < N; ++i)
    for (int quad = 0; quad < 4; ++quad) {
      int32_t pairs[8];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), acc[i][quad]);
      for (int channel = 0; channel < 4; ++channel)
        (*sums[i])[quad * 4 + channel] += pairs[2 * channel] + pairs[2 * channel + 1];
    }
}

template <int N>
void accumulate(const Pass& pass, Integers (*sums)[2]) {
  for (int i = 0; i < N; ++i) sums[i][0] = sums[i][1] = all(pass.offsets[i]);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* from = pass.panel + half * 64;
    int i = 0;
    for (; i + 1 < N; i += 2) {
      Integers* const two[2] = {&sums[i][half], &sums[i + 1][half]};
      accumulate_half<2>(from, pass.depth, pass.x + i * pass.stride, pass.stride, two);
    }
    if (i < N) {
      Integers* const one[1] = {&sums[i][half]};
      accumulate_half<1>(from, pass.depth, pass.x + i * pass.stride, pass.stride, one);
    }
  }
}

HEADRACE_INLINE void store_past_caches(float* to, Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  _mm256_stream_ps(to, _mm256_loadu_ps(lanes));
  _mm256_stream_ps(to + 8, _mm256_loadu_ps(lanes + 8));
}

HEADRACE_INLINE void finish_stores() { _mm_sfence(); }

#include "panel.h"

}  // namespace

const Kernels kAvx2Kernels = make_kernels();

}  // namespace headrace
#endif
