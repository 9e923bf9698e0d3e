// Attention of a step's tokens over their KV blocks: q and k norms, rotary embedding, KV write, softmax sums.
//
// A row's result is the same bits whatever else is in the step, however its prompt was cut into steps and however
// many threads there are: its sums run over tiles of 64 keys that begin at the context's first token, and keys are
// always read as the cache has them. Must not know layers, weights or requests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace headrace {

// Which tokens of a step belong together. T tokens, R requests. Shared by all layers.
struct AttentionStep {
  int32_t num_tokens, num_requests, block_size, table_stride;
  const int32_t* query_starts;     // [R + 1]: request r computes tokens [query_starts[r], query_starts[r + 1])
  const int32_t* context_lengths;  // [R], after this step
  const int32_t* block_tables;     // [R, table_stride]
  const int32_t* positions;        // [T]
  const int32_t* slots;            // [T]: block * block_size + offset
};

enum KvKind : int32_t { kv_float32 = 0, kv_bfloat16 = 1, kv_int8 = 2 };

struct AttentionShape {
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t window;  // a token sees this many tokens, itself included; 0: all before it
  float scale, norm_eps;
  int32_t kv_kind;
};

// qkv [T, (H + 2K) * D]; q_norm, k_norm [D] or null; cos, sin [max_position, D / 2]; cache: one layer's KV memory
// in a layout of this function's own, 64-byte aligned; out [T, H * D], rows `out_stride` apart.
void attention(Team& team, const AttentionShape& shape, const AttentionStep& step, const float* qkv,
               const float* q_norm, const float* k_norm, const float* cos, const float* sin, void* cache,
               float* out, int64_t out_stride);

// Bytes of one block in one layer's KV memory; 0 where this code cannot serve the shape: head_dim must be a
// multiple of 16 up to 256, block_size a power of two >= 8, num_heads a multiple of num_kv_heads.
size_t kv_block_bytes(const AttentionShape& shape, int block_size);

}  // namespace headrace
