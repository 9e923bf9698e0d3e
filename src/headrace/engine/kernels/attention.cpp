// Splits a step's attention over the threads: all writes first, then pieces of queries and heads.
#include "attention.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention_layout.h"
#include "cpu.h"
#include "export.h"

namespace headrace {
namespace {

const AttentionCode& code_for_this_machine() {
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_vnni: return attention_avx512(__builtin_cpu_supports("avx512bf16"));
    case Isa::avx2: return attention_avx2();
#endif
    default: return attention_portable();
  }
}

constexpr int kWritesPerPiece = 16;
constexpr float kPieceCost = 16384.0f;  // rows times keys: some ten microseconds
constexpr int kPiecesPerThread = 4;

// Cut one request's queries and heads into pieces that cost about `target` each.
void cut_request(const AttentionTask& task, int request, float target, std::vector<AttentionPiece>* pieces) {
  const int num_new = task.step.query_starts[request + 1] - task.step.query_starts[request];
  const int num_kv_heads = task.shape.num_kv_heads, context = task.step.context_lengths[request];
  const int queries_at_once = std::max(1, kMaxPieceRows / task.group);
  for (int first = 0; first < num_new; first += queries_at_once) {
    const int end = std::min(num_new, first + queries_at_once);
    int num_keys = context - num_new + end;
    if (task.shape.window) num_keys = std::min(num_keys, task.shape.window + end - first);
    const float cost = float(end - first) * task.group * num_keys;  // of one KV head
    const int heads_at_once = std::clamp(int(target / cost), 1, num_kv_heads);
    for (int head = 0; head < num_kv_heads; head += heads_at_once) {
      const int end_head = std::min(num_kv_heads, head + heads_at_once);
      pieces->push_back({request, first, end, head, end_head, cost * (end_head - head)});
    }
  }
}

// The costliest first: what comes last decides how long one thread waits for another.
void cut(const AttentionTask& task, int num_threads, std::vector<AttentionPiece>* pieces) {
  float cost = 0;
  for (int r = 0; r < task.step.num_requests; ++r) {
    const int num_new = task.step.query_starts[r + 1] - task.step.query_starts[r];
    cost += float(num_new) * task.shape.num_heads * task.step.context_lengths[r];
  }
  const float target = num_threads == 1 ? cost : std::min(cost / (num_threads * kPiecesPerThread), kPieceCost);
  pieces->clear();
  for (int r = 0; r < task.step.num_requests; ++r) cut_request(task, r, target, pieces);
  if (num_threads == 1) return;
  std::stable_sort(pieces->begin(), pieces->end(),
                   [](const AttentionPiece& a, const AttentionPiece& b) { return a.cost > b.cost; });
}

struct FreeAligned {
  void operator()(uint8_t* memory) const { std::free(memory); }
};

// Memory of this thread's pieces; kept, as fresh pages cost more than the work in them.
uint8_t* scratch_of_thread(size_t num_bytes) {
  thread_local std::unique_ptr<uint8_t, FreeAligned> memory;
  thread_local size_t size = 0;
  if (size < num_bytes) {
    size = (num_bytes + 4095) & ~size_t(4095);
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size)));
    if (!memory) std::abort();
  }
  return memory.get();
}

}  // namespace

size_t kv_block_bytes(const AttentionShape& shape, int block_size) {
  const bool is_served = shape.head_dim > 0 && shape.head_dim % 16 == 0 && shape.head_dim <= 256 &&
                         block_size >= 8 && (block_size & (block_size - 1)) == 0 && shape.num_kv_heads > 0 &&
                         shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0 &&
                         shape.kv_kind >= kv_float32 && shape.kv_kind <= kv_int8;
  return is_served ? kv_layout(shape, block_size).block_bytes : 0;
}

void attention(Team& team, const AttentionShape& shape, const AttentionStep& step, const float* qkv,
               const float* q_norm, const float* k_norm, const float* cos, const float* sin, void* cache,
               float* out, int64_t out_stride) {
  const AttentionCode& code = code_for_this_machine();
  const AttentionTask task{shape,  step,   kv_layout(shape, step.block_size), shape.num_heads / shape.num_kv_heads,
                           qkv,    q_norm, k_norm,
                           cos,    sin,    static_cast<uint8_t*>(cache),
                           out,    out_stride};
  const int num_tokens = step.num_tokens;
  team.parallel_for((num_tokens + kWritesPerPiece - 1) / kWritesPerPiece, [&](int piece) {
    code.write(task, piece * kWritesPerPiece, std::min(num_tokens, (piece + 1) * kWritesPerPiece));
  });
  thread_local std::vector<AttentionPiece> pieces;
  cut(task, team.num_threads(), &pieces);
  const AttentionPiece* first = pieces.data();
  const size_t scratch_bytes = code.scratch_bytes(task, std::max(kMaxPieceRows, task.group));
  const int num_pieces = static_cast<int>(pieces.size()), ahead = team.num_threads();
  team.parallel_for(num_pieces, [&](int piece) {
    const AttentionPiece* next = piece + ahead < num_pieces ? first + piece + ahead : nullptr;
    code.attend(task, first[piece], next, scratch_of_thread(scratch_bytes));
  });
}

}  // namespace headrace

HEADRACE_EXPORT size_t headrace_kv_block_bytes(const headrace::AttentionShape* shape, int block_size) {
  return headrace::kv_block_bytes(*shape, block_size);
}

HEADRACE_EXPORT void headrace_attention(void* team, const headrace::AttentionShape* shape,
                                        const headrace::AttentionStep* step, const float* qkv,
                                        const float* q_norm, const float* k_norm, const float* cos,
                                        const float* sin, void* cache, float* out) {
  const int64_t stride = static_cast<int64_t>(shape->num_heads) * shape->head_dim;
  headrace::attention(*static_cast<headrace::Team*>(team), *shape, *step, qkv, q_norm, k_norm, cos, sin, cache, out,
                      stride);
}

HEADRACE_EXPORT void headrace_attention_exp2(const float* x, float* y, int count) {
  headrace::code_for_this_machine().exp2(x, y, count);
}
