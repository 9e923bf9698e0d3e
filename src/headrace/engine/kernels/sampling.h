// One row of logits to one token: what Python asks (`engine/fused_sampling.py`), and the passes over logits
// that each instruction set has of its own. `engine/distribution.py` defines every result, bit for bit.
// Must not know requests, penalties or why a token is wanted.
#pragma once

#include <cstdint>

namespace headrace {

constexpr int kUnitBits = 44;  // the likeliest token weighs 2^44
constexpr int kGroup = 256;    // logits that share a maximum
constexpr int kPadding = 16;   // SamplingPasses::pick writes as far as this behind what it picked
constexpr int kMaxTop = 64;

// The same fields in the same order as `fused_sampling.TASK`.
struct SampleTask {
  const float* logits;  // [vocab_size]
  uint64_t seed;
  int64_t index;
  double temperature;  // 0: the most likely token
  double top_p, min_p;
  int32_t top_k;    // 0: all
  int32_t num_top;  // most likely tokens that are wanted for their log-probabilities; -1: no log-probabilities
  // Results.
  int64_t mass;  // sum of all weights at temperature 1, where num_top >= 0
  float highest;
  int32_t token_id;  // -1: the highest logit is not finite, or one is NaN; -2: out of memory
};

// How logits become weights: `highest` weighs 2^44; `scale` is log2(e) / temperature, rounded.
struct Weighing {
  float highest, scale;
};

struct SamplingPasses {
  // Write each group's highest logit; return whether some logit is NaN.
  bool (*maxima)(const float* logits, int count, float* groups);
  // Return the sum of the weights that are at least `least`.
  int64_t (*mass)(const float* logits, int count, const Weighing& weighing, int64_t least);
  // Copy the logits x with least <= x < before, in their order, and their ids: ids[i], or first_id + i where
  // `ids` is null. Returns how many.
  int (*pick)(const float* logits, const int32_t* ids, int first_id, int count, float least, float before,
              float* picked_logits, int32_t* picked_ids);
};

extern const SamplingPasses sampling_passes_portable;
#if defined(__x86_64__)
extern const SamplingPasses sampling_passes_avx2, sampling_passes_avx512;
#endif

}  // namespace headrace
