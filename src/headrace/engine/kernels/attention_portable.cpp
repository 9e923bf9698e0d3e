// Attention for any processor: vectors of four floats, no fused multiplication.
#include "attention_layout.h"

namespace headrace {
namespace {

constexpr int kLanes = 4;
#define FusedAdd(a, b, c) ((a) * (b) + (c))

#include "attention_vector.h"
#include "attention_write.h"
#include "attention_plain.h"
#include "attention_rows.h"
#include "attention_kinds.h"

}  // namespace

const AttentionCode& attention_portable() { return plain_code; }

}  // namespace headrace
