// Attention for processors with AVX-512: int8 by VNNI, bfloat16 by its own instructions where there are any.
#include "attention_layout.h"

#if defined(__x86_64__)
// GCC 12 warns of its own intrinsics, which leave unused operands undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")

namespace headrace {
namespace {

constexpr int kLanes = 16;
#define HEADRACE_AVX512
#define FusedAdd(a, b, c) ((F)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))

#include "attention_vector.h"
#include "attention_write.h"
#include "attention_plain.h"
#include "attention_rows.h"
#include "attention_avx512_dots.h"
#include "attention_kinds.h"

template <bool kHasBfloat16>
void attend(const AttentionTask& task, const AttentionPiece& piece, const AttentionPiece* next, uint8_t* scratch) {
  if (task.shape.kv_kind == kv_int8) return attend_piece<Int8Dots>(task, piece, next, scratch);
  if (kHasBfloat16 && task.shape.kv_kind == kv_bfloat16)
    return attend_piece<Bfloat16Dots>(task, piece, next, scratch);
  attend_plain(task, piece, next, scratch);
}

size_t scratch_bytes(const AttentionTask& task, int num_rows) {
  const size_t plain = plain_scratch_bytes(task, num_rows);
  const size_t small = Rows<Int8Dots>::bytes(task, num_rows), half = Rows<Bfloat16Dots>::bytes(task, num_rows);
  const size_t larger = small > half ? small : half;
  return plain > larger ? plain : larger;
}

constexpr AttentionCode vnni_code = {write_tokens, attend<false>, scratch_bytes, exp2_for_tests};
constexpr AttentionCode bfloat16_code = {write_tokens, attend<true>, scratch_bytes, exp2_for_tests};

}  // namespace

const AttentionCode& attention_avx512(bool has_bfloat16) { return has_bfloat16 ? bfloat16_code : vnni_code; }

}  // namespace headrace

#else
namespace headrace {
const AttentionCode& attention_avx512(bool) { return attention_portable(); }
}  // namespace headrace
#endif
