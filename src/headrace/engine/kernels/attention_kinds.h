// Picks the arithmetic by the cache's kind. Included last inside an anonymous namespace.

void attend_plain(const AttentionTask& task, const AttentionPiece& piece, const AttentionPiece* next,
                  uint8_t* scratch) {
  switch (task.shape.kv_kind) {
    case kv_int8: return attend_piece<Plain<kv_int8>>(task, piece, next, scratch);
    case kv_bfloat16: return attend_piece<Plain<kv_bfloat16>>(task, piece, next, scratch);
    default: return attend_piece<Plain<kv_float32>>(task, piece, next, scratch);
  }
}

size_t plain_scratch_bytes(const AttentionTask& task, int num_rows) {
  return Rows<Plain<kv_float32>>::bytes(task, num_rows);
}

constexpr AttentionCode plain_code = {write_tokens, attend_plain, plain_scratch_bytes, exp2_for_tests};
