// Vectors of floats and what attention computes with them, for any instruction set. Included inside the
// anonymous namespace of a file that has defined kLanes and FusedAdd (see cpu.h on why), and HEADRACE_AVX512 where
// it may use that: GCC 12 does not define its own macro after `#pragma GCC target`.

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));

inline F load(const float* at) {
  F x;
  __builtin_memcpy(&x, at, sizeof x);
  return x;
}

inline I load_words(const void* at) {
  I x;
  __builtin_memcpy(&x, at, sizeof x);
  return x;
}

inline void store(float* at, F x) { __builtin_memcpy(at, &x, sizeof x); }

inline F splat(float x) { return x - F{}; }
inline I splat(int32_t x) { return x - I{}; }

#ifdef HEADRACE_AVX512
inline F select(I is_first, F a, F b) {
  return (F)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)is_first), (__m512)b, (__m512)a);
}

// The larger; b where one is not a number.
inline F larger(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }

inline float reduce_max(F x) { return _mm512_reduce_max_ps((__m512)x); }

// The largest lanes of R vectors, four of them together.
template <int R>
inline void reduce_max(const F* x, float* largest) {
  for (int r = 0; r < R; r += 4) {
    __m512 v[4];
    for (int i = 0; i < 4; ++i) v[i] = (__m512)x[r + i < R ? r + i : r];
    __m512 halves[2];
    for (int i = 0; i < 2; ++i)
      halves[i] = _mm512_max_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                                _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
    __m512 quarters = _mm512_max_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                                    _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
    quarters = _mm512_max_ps(quarters, _mm512_permute_ps(quarters, 0x4e));
    quarters = _mm512_max_ps(quarters, _mm512_permute_ps(quarters, 0xb1));
    _mm512_mask_compressstoreu_ps(largest + r, 0x1111, quarters);
  }
}
#else
inline F select(I is_first, F a, F b) { return (F)((is_first & (I)a) | (~is_first & (I)b)); }

inline F larger(F a, F b) { return a > b ? a : b; }

inline float reduce_max(F x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

template <int R>
inline void reduce_max(const F* x, float* largest) {
  for (int r = 0; r < R; ++r) largest[r] = reduce_max(x[r]);
}
#endif

// Pairs, then pairs of pairs: the same tree always.
inline float reduce_add(F x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The lanes' numbers, from `first`.
inline I count_from(int32_t first) {
  I lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = first + i;
  return lanes;
}

// 2^f for f in [-0.5, 0.5]: minimax in relative error, 9.2e-8; 2^0 is exactly 1.
inline F exp2_of_fraction(F f) {
  F y = splat(1.326472731e-3f);
  y = FusedAdd(y, f, splat(9.671512991e-3f));
  y = FusedAdd(y, f, splat(5.550733581e-2f));
  y = FusedAdd(y, f, splat(2.402224243e-1f));
  y = FusedAdd(y, f, splat(6.931470037e-1f));
  return FusedAdd(y, f, splat(1.0f));
}

// 2^x for x <= 0, relative error below 2.5e-7; far below -125 it is 0; not a number stays so.
inline F exp2_of(F x) {
#ifdef HEADRACE_AVX512
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);
  const __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (F)_mm512_scalef_ps((__m512)exp2_of_fraction((F)_mm512_sub_ps(clamped, whole)), whole);
#else
  const F round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F clamped = select(x < splat(-125.0f), splat(-125.0f), x);
  const F shifted = clamped + round;
  const F y = exp2_of_fraction(clamped - (shifted - round));
  const I exponent = ((I)shifted - (I)round) << 23;
  const F scaled = select(x < splat(-125.0f), F{}, (F)((I)y + exponent));
  return select(x == x, scaled, x);
#endif
}
