// The sampler's passes for AVX-512.
#include "sampling.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,popcnt")
#define HEADRACE_VECTOR_BYTES 64
#define HEADRACE_OWN_PICK

namespace headrace {
namespace {
#include "sampling_passes.h"

int pick(const float* logits, const int32_t* ids, int first_id, int count, float least, float before,
         float* picked_logits, int32_t* picked_ids) {
  const __m512 low = _mm512_set1_ps(least), high = _mm512_set1_ps(before);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int num = 0;
  for (int i = 0; i < count; i += kLanes) {
    const __mmask16 here = count - i < kLanes ? (1u << (count - i)) - 1 : 0xffff;
    const __m512 x = _mm512_maskz_loadu_ps(here, logits + i);
    const __mmask16 fits = _mm512_mask_cmp_ps_mask(_mm512_mask_cmp_ps_mask(here, x, low, _CMP_GE_OQ), x, high,
                                                   _CMP_LT_OQ);
    if (fits == 0) continue;
    const __m512i id = ids != nullptr ? _mm512_maskz_loadu_epi32(here, ids + i)
                                      : _mm512_add_epi32(lanes, _mm512_set1_epi32(first_id + i));
    _mm512_storeu_ps(picked_logits + num, _mm512_maskz_compress_ps(fits, x));
    _mm512_storeu_si512(picked_ids + num, _mm512_maskz_compress_epi32(fits, id));
    num += __builtin_popcount(fits);
  }
  return num;
}
}  // namespace

const SamplingPasses sampling_passes_avx512 = {maxima, mass, pick, allow};

}  // namespace headrace
#endif
