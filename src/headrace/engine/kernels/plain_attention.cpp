// Attention, simply: one request's one head after another. Float32 keys and values only.
#include <cmath>
#include <vector>

#include "attention.h"

namespace headrace {
namespace {

void prepare(const float* from, const float* norm, const float* cos, const float* sin, const AttentionShape& s,
             float* to) {
  const int d = s.head_dim, half = d / 2;
  float factor = 1.0f;
  if (norm != nullptr) {
    float total = 0.0f;
    for (int i = 0; i < d; ++i) total += from[i] * from[i];
    factor = 1.0f / std::sqrt(total / static_cast<float>(d) + s.norm_eps);
  }
  for (int i = 0; i < half; ++i) {
    const float a = from[i] * factor * (norm ? norm[i] : 1.0f);
    const float b = from[i + half] * factor * (norm ? norm[i + half] : 1.0f);
    to[i] = a * cos[i] - b * sin[i];
    to[i + half] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

void attention(Team& team, const AttentionShape& s, const AttentionStep& step, const float* qkv,
               const float* q_norm, const float* k_norm, const float* cos, const float* sin, void* cache,
               float* out) {
  const int d = s.head_dim, half = d / 2, heads = s.num_heads, kv = s.num_kv_heads;
  const int64_t width = static_cast<int64_t>(heads + 2 * kv) * d;
  float* const memory = static_cast<float*>(cache);  // [slots, 2, K, D]
  const auto slot_of = [&](int request, int position) {
    const int32_t* table = step.block_tables + static_cast<int64_t>(request) * step.table_stride;
    return static_cast<int64_t>(table[position / step.block_size]) * step.block_size + position % step.block_size;
  };
  team.parallel_for(step.num_tokens, [&](int t) {
    const float* row = qkv + t * width;
    const int64_t at = static_cast<int64_t>(step.positions[t]) * half;
    float* slot = memory + static_cast<int64_t>(step.slots[t]) * 2 * kv * d;
    for (int h = 0; h < kv; ++h) {
      prepare(row + (heads + h) * d, k_norm, cos + at, sin + at, s, slot + h * d);
      for (int i = 0; i < d; ++i) slot[(kv + h) * d + i] = row[(heads + kv + h) * d + i];
    }
  });
  team.parallel_for(step.num_tokens, [&](int t) {
    int request = 0;
    while (step.query_starts[request + 1] <= t) ++request;
    const int position = step.positions[t];
    const int first = s.window ? std::max(position - s.window + 1, 0) : 0;
    const int64_t at = static_cast<int64_t>(position) * half;
    std::vector<float> q(d), scores(position - first + 1);
    for (int h = 0; h < heads; ++h) {
      const int k_head = h * kv / heads;
      prepare(qkv + t * width + h * d, q_norm, cos + at, sin + at, s, q.data());
      float most = -INFINITY, total = 0.0f;
      for (int j = first; j <= position; ++j) {
        const float* k = memory + (slot_of(request, j) * 2 * kv + k_head) * d;
        float score = 0.0f;
        for (int i = 0; i < d; ++i) score += q[i] * k[i];
        scores[j - first] = score * s.scale;
        most = std::max(most, scores[j - first]);
      }
      float* to = out + (static_cast<int64_t>(t) * heads + h) * d;
      for (int i = 0; i < d; ++i) to[i] = 0.0f;
      for (int j = first; j <= position; ++j) {
        const float weight = std::exp(scores[j - first] - most);
        total += weight;
        const float* v = memory + (slot_of(request, j) * 2 * kv + kv + k_head) * d;
        for (int i = 0; i < d; ++i) to[i] += weight * v[i];
      }
      for (int i = 0; i < d; ++i) to[i] /= total;
    }
  });
}

}  // namespace headrace
