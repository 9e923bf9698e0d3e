// One row of logits to one token: what Python asks (`engine/fused_sampling.py`), and the passes over logits
// that each instruction set has of its own. `engine/distribution.py` defines every result, bit for bit.
// Must not know requests, grammars or why a token is wanted.
#pragma once

#include <cstdint>

namespace headrace {

constexpr int kUnitBits = 44;  // the likeliest token weighs 2^44
constexpr int kGroup = 256;    // logits that share a maximum
constexpr int kPadding = 16;   // SamplingPasses::pick writes as far as this behind what it picked
constexpr int kMaxTop = 64;

// One request's parameters, and what they change in its logits before a token is chosen from them. The same
// fields in the same order as `sample_settings.SampleSettings`.
struct SampleSettings {
  uint64_t seed;
  double temperature;  // 0: the most likely token
  double top_p, min_p;
  int32_t top_k;    // 0: all
  int32_t num_top;  // most likely tokens that are wanted for their log-probabilities; -1: no log-probabilities
  // In this order: tokens seen divide or multiply by `repetition`, generated ones lose `frequency` times their
  // count and `presence`, biases are added, stops become minus infinity. No id is twice in one list.
  float repetition, frequency, presence;
  int32_t num_seen, num_generated, num_biases, num_stops;
  const int64_t *seen, *generated;
  const float* counts;  // of the generated ones
  const int64_t* biased;
  const float* biases;
  const int64_t* stops;
};

// The same fields in the same order as `fused_sampling.TASK`.
struct SampleTask {
  const float* logits;  // [vocab_size]
  const SampleSettings* settings;
  const uint32_t* allowed;  // a bit per token, the lowest first; forbidden ones become minus infinity; null: all
  int64_t index;            // of the token in its generation
  int64_t is_checked;       // whether the row is known to be finite; it has a mask then
  // Results.
  int64_t mass;  // sum of all weights at temperature 1, where num_top >= 0
  float highest;
  float logit;  // the token's own
  int32_t token_id;
};

// In place of a token.
enum NoToken : int32_t {
  kNotFinite = -1,  // the highest logit is not finite, or one is NaN: as the model gave them, or as changed
  kOutOfMemory = -2,
  kNoneAllowed = -3,  // all logits became minus infinity
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
  // Copy the logits that are allowed; minus infinity stands for the others.
  void (*allow)(const float* logits, const uint32_t* allowed, int count, float* out);
};

extern const SamplingPasses sampling_passes_portable;
#if defined(__x86_64__)
extern const SamplingPasses sampling_passes_avx2, sampling_passes_avx512;
#endif

}  // namespace headrace
