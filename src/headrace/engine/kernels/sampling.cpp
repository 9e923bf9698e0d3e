// Chooses tokens from rows of logits, a row per piece of the team's job. The definition is
// `engine/distribution.py`: weights are whole numbers, so every sum here is exact, in whatever order.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "cpu.h"
#include "export.h"
#include "team.h"

namespace headrace {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLeastTemperature = 1e-5;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Tokens within so many times the temperature of the highest logit are gathered together, ring by ring.
constexpr double kSpans[] = {1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, std::numeric_limits<double>::infinity()};
constexpr int kFew = 24;
constexpr int kFewAllowed = 512;

const SamplingPasses& passes() {
#if defined(__x86_64__)
  if (best_isa() == Isa::avx512_vnni) return sampling_passes_avx512;
  if (best_isa() == Isa::avx2) return sampling_passes_avx2;
#endif
  return sampling_passes_portable;
}

float float_of(double edge) { return edge > -3.4e38 ? static_cast<float>(edge) : -kInfinity; }

// Some tokens, in the order of their ids.
struct Tokens {
  void reserve(size_t count) {
    if (logits.size() >= count + kPadding) return;
    logits.resize(count + kPadding);
    ids.resize(count + kPadding);
  }

  std::vector<float> logits;
  std::vector<int32_t> ids;
};

// Memory that a thread keeps from row to row: fresh pages would cost more than the arithmetic.
struct Scratch {
  void reserve(int vocab_size) {
    maxima.resize((vocab_size + kGroup - 1) / kGroup);
    for (Tokens* tokens : {&a, &b}) tokens->reserve(vocab_size);
  }

  std::vector<float> maxima;   // of each group of the row
  std::vector<float> changed;  // the row after its changes, if it has any
  Tokens a, b;
};

bool comes_before(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// A token's place in the order of all tokens, most likely first.
struct Place {
  int32_t id;
  int64_t mass;  // of all tokens up to this one, itself included
};

// How many tokens, and what they weigh.
struct Amount {
  int64_t num = 0, mass = 0;
};

// The tokens of one row in their order. Looks no further than it is asked.
class Order {
 public:
  Order(const SamplingPasses& pass, const float* logits, int count, Scratch& scratch, float highest,
        double temperature)
      : pass_(pass), logits_(logits), count_(count), scratch_(scratch), temperature_(temperature),
        weighing_{highest, static_cast<float>(kLog2E / temperature)} {}

  int64_t mass() const { return pass_.mass(logits_, count_, weighing_, 0); }

  // The first token with which the mass becomes more than `mass`; there is one.
  Place at_mass(int64_t mass) { return find(&Amount::mass, mass); }

  // The token with `num_before` others before it; there is one.
  Place at_count(int64_t num_before) { return find(&Amount::num, num_before); }

  // The sum of the weights that are at least `min_p` of the highest one's.
  int64_t mass_of_likely(double min_p) {
    const auto least = static_cast<int64_t>(std::ceil(min_p * static_cast<double>(int64_t{1} << kUnitBits)));
    // A little lower than where such weights begin, for what is lost by rounding.
    const double edge = weighing_.highest + (std::log2(min_p) - 0.01) / weighing_.scale;
    const int num = gather(float_of(edge), kInfinity);
    return pass_.mass(scratch_.a.logits.data(), num, weighing_, least);
  }

  // Write the `count` most likely tokens' ids, most likely first.
  void top(int count, int32_t* ids) {
    int num = 0;
    for (size_t ring = 0; num < count; ++ring) num = gather(edge(ring), kInfinity);
    sort(scratch_.a, num, count);
    for (int i = 0; i < count; ++i) ids[i] = sorted_[i].second;
  }

 private:
  float edge(size_t ring) const {
    return float_of(weighing_.highest - kSpans[ring] * temperature_);
  }

  // Copy the tokens with least <= logit < before to scratch.a; return how many.
  int gather(float least, float before) {
    Tokens& to = scratch_.a;
    int num = 0;
    for (size_t group = 0; group < scratch_.maxima.size(); ++group) {
      if (scratch_.maxima[group] < least) continue;
      const int begin = static_cast<int>(group) * kGroup;
      num += pass_.pick(logits_ + begin, nullptr, begin, std::min(kGroup, count_ - begin), least, before,
                        to.logits.data() + num, to.ids.data() + num);
    }
    return num;
  }

  Amount weigh(const Tokens& tokens, int num) const {
    return {num, pass_.mass(tokens.logits.data(), num, weighing_, 0)};
  }

  // Return the first place where the sum of `key` over it and all before it is more than `target`.
  Place find(int64_t Amount::*key, int64_t target) {
    int64_t mass = 0;
    float before = kInfinity;
    for (size_t ring = 0; ring < std::size(kSpans); ++ring) {
      const int num = gather(edge(ring), before);
      const Amount amount = weigh(scratch_.a, num);
      if (amount.*key > target) return narrow(num, key, target, mass);
      target -= amount.*key;
      mass += amount.mass;
      before = edge(ring);
    }
    return {-1, mass};  // not reached: all tokens together are more than any target
  }

  // The same among the `num` tokens of scratch.a, before which there is `mass`.
  Place narrow(int num, int64_t Amount::*key, int64_t target, int64_t mass) {
    Tokens *all = &scratch_.a, *upper = &scratch_.b;
    while (num > kFew) {
      float pivot = middle(*all, num);
      int num_upper = pick(*all, num, pivot, kInfinity, *upper);
      if (num_upper == num) {  // the pivot is the lowest of them
        pivot = std::nextafter(pivot, kInfinity);
        num_upper = pick(*all, num, pivot, kInfinity, *upper);
        if (num_upper == 0) return among_equals(*all, num, key, target, mass);
      }
      const Amount amount = weigh(*upper, num_upper);
      if (amount.*key > target) {
        std::swap(all, upper);
        num = num_upper;
      } else {
        target -= amount.*key;
        mass += amount.mass;
        num = pick(*all, num, -kInfinity, pivot, *upper);
        std::swap(all, upper);
      }
    }
    sort(*all, num, num);
    for (int i = 0;; ++i) {
      const Amount amount{1, pass_.mass(&sorted_[i].first, 1, weighing_, 0)};
      mass += amount.mass;
      target -= amount.*key;
      if (target < 0 || i + 1 == num) return {sorted_[i].second, mass};
    }
  }

  // The same where all have the same logit, and so the same weight.
  Place among_equals(const Tokens& tokens, int num, int64_t Amount::*key, int64_t target, int64_t mass) const {
    const Amount one{1, weigh(tokens, num).mass / num};
    const int64_t place = target / (one.*key);
    return {tokens.ids[place], mass + (place + 1) * one.mass};
  }

  int pick(const Tokens& from, int num, float least, float before, Tokens& to) const {
    return pass_.pick(from.logits.data(), from.ids.data(), 0, num, least, before, to.logits.data(),
                      to.ids.data());
  }

  // About the middle one of so many logits.
  static float middle(const Tokens& tokens, int num) {
    float some[9];
    for (int i = 0; i < 9; ++i) some[i] = tokens.logits[static_cast<int64_t>(num - 1) * i / 8];
    std::nth_element(some, some + 4, some + 9);
    return some[4];
  }

  // Put the first `num_sorted` of so many tokens in their order into sorted_.
  void sort(const Tokens& tokens, int num, int num_sorted) {
    sorted_.resize(num);
    for (int i = 0; i < num; ++i) sorted_[i] = {tokens.logits[i], tokens.ids[i]};
    std::partial_sort(sorted_.begin(), sorted_.begin() + num_sorted, sorted_.end(), comes_before);
  }

  const SamplingPasses& pass_;
  const float* logits_;
  const int count_;
  Scratch& scratch_;
  const double temperature_;
  const Weighing weighing_;
  std::vector<std::pair<float, int32_t>> sorted_;
};

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double uniform(uint64_t seed, int64_t index) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  const uint64_t state = mix(seed + kGolden);
  const uint64_t bits = mix(state + (static_cast<uint64_t>(index) + 1u) * kGolden);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

int32_t draw(const SampleSettings& settings, int64_t index, Order& order, int vocab_size) {
  int64_t mass = order.mass();
  if (settings.top_k > 0) mass = order.at_count(std::min(settings.top_k, vocab_size) - 1).mass;
  if (settings.top_p < 1.0) {
    const auto enough = static_cast<int64_t>(std::ceil(settings.top_p * static_cast<double>(mass)));
    mass = order.at_mass(std::min(std::max(enough, int64_t{1}), mass) - 1).mass;
  }
  if (settings.min_p > 0.0) mass = std::min(mass, order.mass_of_likely(settings.min_p));
  const double u = uniform(settings.seed, index);
  const auto target = static_cast<int64_t>(u * static_cast<double>(mass));
  return order.at_mass(std::min(target, mass - 1)).id;
}

int32_t first_of(const float* logits, int vocab_size, const std::vector<float>& maxima, float highest) {
  const auto group = std::find(maxima.begin(), maxima.end(), highest) - maxima.begin();
  const float* begin = logits + group * kGroup;
  return static_cast<int32_t>(std::find(begin, logits + vocab_size, highest) - logits);
}

bool has_changes(const SampleSettings& settings) {
  return settings.num_seen || settings.num_generated || settings.num_biases || settings.num_stops;
}

// Change a row's logits in place, as `penalties.py` does, operation for operation.
void apply_changes(const SampleSettings& settings, float* logits) {
  for (int i = 0; i < settings.num_seen; ++i) {
    float& logit = logits[settings.seen[i]];
    logit = logit > 0 ? logit / settings.repetition : logit * settings.repetition;
  }
  for (int i = 0; i < settings.num_generated; ++i)
    logits[settings.generated[i]] -= settings.frequency * settings.counts[i] + settings.presence;
  for (int i = 0; i < settings.num_biases; ++i) logits[settings.biased[i]] += settings.biases[i];
  for (int i = 0; i < settings.num_stops; ++i) logits[settings.stops[i]] = -kInfinity;
}

// Return the highest logit, and leave each group's in scratch.maxima; NaN if there is one.
float find_highest(const SamplingPasses& pass, const float* logits, int vocab_size, Scratch& scratch) {
  if (pass.maxima(logits, vocab_size, scratch.maxima.data())) return std::numeric_limits<float>::quiet_NaN();
  return *std::max_element(scratch.maxima.begin(), scratch.maxima.end());
}

// Return the row after its changes: itself if there are none, or else a copy in `scratch`.
const float* change(const SamplingPasses& pass, const SampleTask& task, int vocab_size, Scratch& scratch) {
  if (task.allowed == nullptr && !has_changes(*task.settings)) return task.logits;
  if (scratch.changed.size() < static_cast<size_t>(vocab_size)) scratch.changed.resize(vocab_size);
  float* changed = scratch.changed.data();
  if (task.allowed != nullptr) {
    pass.allow(task.logits, task.allowed, vocab_size, changed);
  } else {
    std::copy(task.logits, task.logits + vocab_size, changed);
  }
  apply_changes(*task.settings, changed);
  return changed;
}

// Call f(token id) for the allowed tokens, in order.
template <typename F>
void for_allowed(const uint32_t* allowed, int vocab_size, const F& f) {
  for (int begin = 0; begin < vocab_size; begin += 32) {
    uint32_t word = allowed[begin / 32];
    if (vocab_size - begin < 32) word &= (1u << (vocab_size - begin)) - 1;
    for (; word != 0; word &= word - 1) f(begin + __builtin_ctz(word));
  }
}

bool are_few(const uint32_t* allowed, int vocab_size) {
  int num_allowed = 0;
  for (int i = 0; i < (vocab_size + 31) / 32; ++i) num_allowed += __builtin_popcount(allowed[i]);
  return num_allowed <= kFewAllowed;
}

// The likeliest of few allowed tokens. No other logit is read: whoever asks has seen that the row is finite.
int32_t likeliest_of_few(const float* logits, const uint32_t* allowed, int vocab_size) {
  int32_t token_id = kNoneAllowed;
  float highest = -kInfinity;
  for_allowed(allowed, vocab_size, [&](int32_t id) {
    if (logits[id] > highest) {
      highest = logits[id];
      token_id = id;
    }
  });
  return token_id;
}

// Choose a row's token, or say why there is none. `top_logits` and `top_ids` are those of the most likely tokens.
int32_t sample_row(const SamplingPasses& pass, SampleTask& task, int vocab_size, int32_t* top_ids,
                   float* top_logits) {
  thread_local Scratch scratch;
  scratch.reserve(vocab_size);
  const SampleSettings& settings = *task.settings;
  const bool is_greedy = settings.temperature < kLeastTemperature;
  if (task.is_checked && is_greedy && settings.num_top < 0 && !has_changes(settings) &&
      are_few(task.allowed, vocab_size))
    return likeliest_of_few(task.logits, task.allowed, vocab_size);
  task.highest = find_highest(pass, task.logits, vocab_size, scratch);
  if (!std::isfinite(task.highest)) return kNotFinite;
  const float* logits = change(pass, task, vocab_size, scratch);
  if (logits != task.logits) {
    task.highest = find_highest(pass, logits, vocab_size, scratch);
    if (task.highest == -kInfinity) return kNoneAllowed;
    if (!std::isfinite(task.highest)) return kNotFinite;
  }
  int32_t token_id;
  if (is_greedy) {
    token_id = first_of(logits, vocab_size, scratch.maxima, task.highest);
  } else {
    Order order(pass, logits, vocab_size, scratch, task.highest, settings.temperature);
    token_id = draw(settings, task.index, order, vocab_size);
  }
  if (settings.num_top < 0) return token_id;
  task.logit = logits[token_id];
  Order order(pass, logits, vocab_size, scratch, task.highest, 1.0);
  task.mass = order.mass();
  const int num_top = std::min({settings.num_top, vocab_size, kMaxTop});
  if (num_top > 0) order.top(num_top, top_ids);
  for (int i = 0; i < num_top; ++i) top_logits[i] = logits[top_ids[i]];
  return token_id;
}

}  // namespace
}  // namespace headrace

// Choose a token for each of `count` tasks. top_ids, top_logits: [count, 64]. `team` may be null: this thread
// alone.
HEADRACE_EXPORT void headrace_sample(void* team, headrace::SampleTask* tasks, int count, int vocab_size,
                                     int32_t* top_ids, float* top_logits) {
  const headrace::SamplingPasses& pass = headrace::passes();
  const auto sample = [&](int i) {
    const int64_t top = static_cast<int64_t>(i) * headrace::kMaxTop;
    try {
      tasks[i].token_id = headrace::sample_row(pass, tasks[i], vocab_size, top_ids + top, top_logits + top);
    } catch (const std::bad_alloc&) {
      tasks[i].token_id = headrace::kOutOfMemory;
    }
  };
  if (team != nullptr) {
    static_cast<headrace::Team*>(team)->parallel_for(count, sample);
  } else {
    for (int i = 0; i < count; ++i) sample(i);
  }
}
