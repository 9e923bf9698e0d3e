// How one layer's KV memory is laid out, and what attention.cpp hands to the code of an instruction set.
//
// A block holds its KV heads one after another, a head its granules of 16 tokens (8 in blocks of 8). A granule:
//   scales  int8 only, 64 bytes: a bfloat16 for each key, then one for each value
//   keys    [head_dim / n][tokens][n]: n = 1 float32, 2 bfloat16 or 4 int8 make a word of 32 bits, so that one
//           vector of words multiplies n dimensions of 16 keys
//   values  [tokens / n][head_dim][n]: one vector multiplies n tokens' values in 16 dimensions
// int8 keys are spread (attention_write.h), and stored plus 128, as the instructions want one side unsigned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace headrace {

constexpr int kTileKeys = 64;     // keys whose scores are softened together
constexpr int kGranuleKeys = 16;  // keys next to each other in memory
constexpr int kTileGranules = kTileKeys / kGranuleKeys;
constexpr int kMaxPieceRows = 96;  // queries times heads of a group that share loaded keys
constexpr float kLog2E = 1.44269504f;

struct KvLayout {
  int32_t granule;   // tokens in a granule
  int32_t per_word;  // numbers in 32 bits
  size_t keys, values, granule_bytes;  // offsets of keys and values in a granule; its size
  size_t head_bytes, block_bytes;
};

inline KvLayout kv_layout(const AttentionShape& shape, int block_size) {
  KvLayout layout{};
  layout.granule = block_size < kGranuleKeys ? block_size : kGranuleKeys;
  layout.per_word = shape.kv_kind == kv_int8 ? 4 : shape.kv_kind == kv_bfloat16 ? 2 : 1;
  const size_t side = size_t(4) * layout.granule * shape.head_dim / layout.per_word;
  layout.keys = shape.kv_kind == kv_int8 ? 64 : 0;
  layout.values = layout.keys + side;
  layout.granule_bytes = layout.values + side;
  layout.head_bytes = layout.granule_bytes * (block_size / layout.granule);
  layout.block_bytes = layout.head_bytes * shape.num_kv_heads;
  return layout;
}

// One layer of one step.
struct AttentionTask {
  AttentionShape shape;
  AttentionStep step;
  KvLayout layout;
  int32_t group;  // heads that share a KV head
  const float *qkv, *q_norm, *k_norm, *cos, *sin;
  uint8_t* cache;
  float* out;
  int64_t out_stride;
};

// Queries [first_query, end_query) of a request's new tokens, for KV heads [first_head, end_head).
struct AttentionPiece {
  int32_t request, first_query, end_query, first_head, end_head;
  float cost;
};

// The code of one instruction set.
struct AttentionCode {
  // Norm, rotate and store the keys and values of tokens [first, end).
  void (*write)(const AttentionTask& task, int first, int end);
  // Compute a piece's rows of out; all writes of the step must be done. `next`: whose keys this thread will probably
  // want after these, or null. scratch: `scratch_bytes`, 64-byte aligned.
  void (*attend)(const AttentionTask& task, const AttentionPiece& piece, const AttentionPiece* next,
                 uint8_t* scratch);
  size_t (*scratch_bytes)(const AttentionTask& task, int num_rows);
  // exp2 of `count` numbers as the softmax computes it (for tests).
  void (*exp2)(const float* x, float* y, int count);
};

const AttentionCode& attention_portable();
const AttentionCode& attention_avx2();
// AVX-512 with VNNI; `has_bfloat16`: with its instructions for bfloat16, too.
const AttentionCode& attention_avx512(bool has_bfloat16);

}  // namespace headrace
