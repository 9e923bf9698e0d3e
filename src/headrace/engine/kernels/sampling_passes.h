// The passes over logits in the compiler's vector extension: the same source and the same bits on every
// instruction set. Include it after `#pragma GCC target` and a definition of HEADRACE_VECTOR_BYTES, inside an
// anonymous namespace of a .cpp file. Code for AVX-512 brings its own `pick`.

typedef float Floats __attribute__((vector_size(HEADRACE_VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(HEADRACE_VECTOR_BYTES)));
typedef float HalfFloats __attribute__((vector_size(HEADRACE_VECTOR_BYTES / 2)));
typedef double Doubles __attribute__((vector_size(HEADRACE_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(HEADRACE_VECTOR_BYTES)));

constexpr int kLanes = HEADRACE_VECTOR_BYTES / 4;
// A whole number v of 0 to 2^51 is the low bits of v + 2^52.
constexpr double kRounder = 4503599627370496.0;
constexpr int64_t kRounderBits = 0x4330000000000000;

// Call f(pointer) for each group of `count` logits; the last one is filled up with minus infinity.
template <typename F>
inline __attribute__((always_inline)) void for_groups(const float* logits, int count, const F& f) {
  int begin = 0;
  for (; begin + kGroup <= count; begin += kGroup) f(logits + begin);
  if (begin == count) return;
  float rest[kGroup];
  for (int i = 0; i < kGroup; ++i) rest[i] = begin + i < count ? logits[begin + i] : -__builtin_inff();
  f(rest);
}

bool maxima(const float* logits, int count, float* groups) {
  Integers nan = {};
  Integers lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  for_groups(logits, count, [&](const float* group) __attribute__((always_inline)) {
    Floats highest;
    __builtin_memcpy(&highest, group, sizeof highest);
    nan |= highest != highest;
    for (int i = kLanes; i < kGroup; i += kLanes) {
      Floats v;
      __builtin_memcpy(&v, group + i, sizeof v);
      nan |= v != v;
      highest = v > highest ? v : highest;
    }
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const Floats other = __builtin_shuffle(highest, lanes ^ distance);
      highest = other > highest ? other : highest;
    }
    *groups++ = highest[0];
  });
  for (int i = 0; i < kLanes; ++i)
    if (nan[i]) return true;
  return false;
}

template <bool kHasLeast>
int64_t sum_weights(const float* logits, int count, const Weighing& weighing, int64_t least_weight) {
  const Floats zero = {};
  const Floats top = zero + weighing.highest, factor = zero + weighing.scale;
  const Floats least = zero - 60.0f, rounder = zero + 12582912.0f;
  const Longs least_bits = Longs{} + (kRounderBits + least_weight);
  Longs low = {}, high = {};
  for_groups(logits, count, [&](const float* group) __attribute__((always_inline)) {
    for (int i = 0; i < kGroup; i += kLanes) {
      Floats log2;
      __builtin_memcpy(&log2, group + i, sizeof log2);
      log2 = (log2 - top) * factor;
      log2 = log2 > least ? log2 : least;
      const Floats whole = log2 + rounder;
      const Floats f = log2 - (whole - rounder);
      Floats p = (zero + 0.00132647238f) * f + 0.00967151299f;
      p = p * f + 0.0555073358f;
      p = p * f + 0.240222424f;
      p = p * f + 0.693147004f;
      p = p * f + 1.0f;
      const Integers bits = (Integers)p + ((Integers)whole << 23) + (kUnitBits << 23);
      HalfFloats halves[2];
      __builtin_memcpy(halves, &bits, sizeof bits);
      const Longs first = (Longs)(__builtin_convertvector(halves[0], Doubles) + kRounder);
      const Longs second = (Longs)(__builtin_convertvector(halves[1], Doubles) + kRounder);
      low += kHasLeast ? (first - kRounderBits) & (first >= least_bits) : first - kRounderBits;
      high += kHasLeast ? (second - kRounderBits) & (second >= least_bits) : second - kRounderBits;
    }
  });
  int64_t sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += low[i] + high[i];
  return sum;
}

int64_t mass(const float* logits, int count, const Weighing& weighing, int64_t least_weight) {
  return least_weight > 0 ? sum_weights<true>(logits, count, weighing, least_weight)
                          : sum_weights<false>(logits, count, weighing, 0);
}

#if !defined(HEADRACE_OWN_PICK)
int pick(const float* logits, const int32_t* ids, int first_id, int count, float least, float before,
         float* picked_logits, int32_t* picked_ids) {
  int num = 0;
  for (int i = 0; i < count; ++i) {  // without a branch: which are picked cannot be foretold
    picked_logits[num] = logits[i];
    picked_ids[num] = ids != nullptr ? ids[i] : first_id + i;
    num += (logits[i] >= least) & (logits[i] < before);
  }
  return num;
}
#endif

void allow(const float* logits, const uint32_t* allowed, int count, float* out) {
  Integers bit;
  for (int i = 0; i < kLanes; ++i) bit[i] = 1 << i;
  const Floats none = Floats{} - __builtin_inff();
  int begin = 0;
  for (; begin + 32 <= count; begin += 32) {
    const uint32_t word = allowed[begin / 32];
    for (int i = 0; i < 32; i += kLanes) {
      Floats v = none;
      if (word != 0) {  // most words of a strict grammar are 0: their logits are not read
        __builtin_memcpy(&v, logits + begin + i, sizeof v);
        v = ((Integers{} + static_cast<int32_t>(word >> i)) & bit) != 0 ? v : none;
      }
      __builtin_memcpy(out + begin + i, &v, sizeof v);
    }
  }
  for (; begin < count; ++begin)
    out[begin] = allowed[begin / 32] >> (begin % 32) & 1 ? logits[begin] : -__builtin_inff();
}
