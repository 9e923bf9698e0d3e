// Sixteen floats or integers at once, in the compiler's vector extension: the same source and the same bits on
// every instruction set. Include it after `#pragma GCC target`, inside an anonymous namespace of a .cpp file.
//
// Sums go over sixteen lanes, then lane i meets lane i + 8, + 4, + 2, + 1: one order for every machine.

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

constexpr int kLanes = 16;

#define HEADRACE_INLINE inline __attribute__((always_inline))

HEADRACE_INLINE Floats load(const float* from) {
  Floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

HEADRACE_INLINE void store(float* to, Floats v) { __builtin_memcpy(to, &v, sizeof v); }

HEADRACE_INLINE Floats all(float x) { return x - Floats{}; }

HEADRACE_INLINE Integers all(int32_t x) { return x - Integers{}; }

HEADRACE_INLINE Floats to_floats(Integers v) { return __builtin_convertvector(v, Floats); }

HEADRACE_INLINE Integers bits(Floats v) { return (Integers)v; }

HEADRACE_INLINE float sum(Floats v) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// The nearest integer, ties to even, for |v| < 2^22: adding 1.5 * 2^23 leaves no place for a fraction.
HEADRACE_INLINE Floats round_to_integer(Floats v) {
  const Floats magic = all(12582912.0f);
  return (v + magic) - magic;
}

// e^v to about 2 units in the last place, clamped to finite and not denormal. NaN stays NaN.
HEADRACE_INLINE Floats exponential(Floats v) {
  v = v > all(88.0f) ? all(88.0f) : v;
  v = v < all(-87.0f) ? all(-87.0f) : v;
  const Floats n = round_to_integer(v * all(1.44269504f));
  Floats r = v - n * all(0.693145752f);  // ln 2 in two parts: n * the first one is exact
  r = r - n * all(1.42860677e-6f);
  Floats p = all(1.0f / 720);
  p = p * r + all(1.0f / 120);
  p = p * r + all(1.0f / 24);
  p = p * r + all(1.0f / 6);
  p = p * r + all(0.5f);
  p = p * r + all(1.0f);
  p = p * r + all(1.0f);
  const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
  return p * (Floats)exponent;
}

HEADRACE_INLINE Floats sigmoid(Floats v) { return all(1.0f) / (all(1.0f) + exponential(-v)); }
