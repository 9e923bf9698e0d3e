// Attention for processors with AVX2 and fused multiplication.
#include "attention_layout.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")

namespace headrace {
namespace {

constexpr int kLanes = 8;
#define FusedAdd(a, b, c) ((F)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))

#include "attention_vector.h"
#include "attention_write.h"
#include "attention_plain.h"
#include "attention_rows.h"
#include "attention_kinds.h"

}  // namespace

const AttentionCode& attention_avx2() { return plain_code; }

}  // namespace headrace

#else
namespace headrace {
const AttentionCode& attention_avx2() { return attention_portable(); }
}  // namespace headrace
#endif
