// Dot products of AVX-512 for bfloat16 and int8. Included inside an anonymous namespace after attention_rows.h;
// what an Arithmetic has: attention_plain.h.

// Sums live in registers only where every loop over them is gone.
#define UNROLLED _Pragma("GCC unroll 8")

// 2^x for x <= 0 to 9e-5 of it, 2^0 exactly: weights of 8 bits need no more. 0 for minus infinity.
inline F exp2_roughly(F x) {
  const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F y = FusedAdd(splat(7.70671975e-2f), (F)f, splat(2.276448218e-1f));
  y = FusedAdd(y, (F)f, splat(6.951168246e-1f));
  y = FusedAdd(y, (F)f, splat(1.0f));
  return (F)_mm512_scalef_ps((__m512)y, (__m512)x);  // of x it takes the whole number below
}

// Adds values in columns that fit into registers: `Dots::add_columns<R, C>` takes 16 C of them.
template <typename Dots>
struct ByColumns {
  template <int R>
  static void add_values(const uint8_t* weights, int head_dim, int num_keys, const KvLayout& layout,
                         const Tile& tile, const float* factors, float* out) {
    int column = 0;
    for (; column + 64 <= head_dim; column += 64)
      Dots::template add_columns<R, 4>(weights, head_dim, num_keys, layout, tile, factors, out, column);
    for (; column < head_dim; column += 16)
      Dots::template add_columns<R, 1>(weights, head_dim, num_keys, layout, tile, factors, out, column);
  }
};

// Queries and weights are rounded to bfloat16; sums stay float32. Pairs are added in the order of dimensions (of
// keys), each row and key (dimension) on its own.
struct Bfloat16Dots : ByColumns<Bfloat16Dots> {
  static constexpr int kMaxRows = 6;
  static constexpr bool kScalesTiles = false;
  struct Scales {
    Scales() = default;
    explicit Scales(const Tile&) {}
  };
  static size_t query_bytes(int head_dim) { return size_t(2) * head_dim; }
  static size_t weight_bytes() { return 2 * kTileKeys; }

  static void prepare(const float* q, int head_dim, uint8_t* query) {
    for (int d = 0; d < head_dim; d += 16)
      _mm256_storeu_si256((__m256i*)(query + 2 * d), (__m256i)_mm512_cvtneps_pbh((__m512)load(q + d)));
  }

  template <int R>
  static void score(const uint8_t* queries, int head_dim, const KvLayout& layout, const Tile& tile,
                    const Scales&, float* scores) {
    __m512 sum[R][kTileGranules];
    UNROLLED
    for (int r = 0; r < R; ++r)
      UNROLLED
      for (int g = 0; g < kTileGranules; ++g) sum[r][g] = _mm512_setzero_ps();
    const uint8_t* q = queries;
    for (size_t at = layout.keys; at < layout.values; at += 64, q += 4) {
      __m512bh k[kTileGranules];
      UNROLLED
      for (int g = 0; g < kTileGranules; ++g) {
        k[g] = (__m512bh)_mm512_load_si512(tile.granules[g] + at);
        __builtin_prefetch(tile.next[g] + at, 0, 2);
      }
      UNROLLED
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(q + r * 2 * head_dim));
        UNROLLED
        for (int g = 0; g < kTileGranules; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], k[g], pair);
      }
    }
    UNROLLED
    for (int r = 0; r < R; ++r)
      UNROLLED
      for (int g = 0; g < kTileGranules; ++g) _mm512_store_ps(scores + r * kTileKeys + g * 16, sum[r][g]);
  }

  static F exp2(F x) { return exp2_roughly(x); }

  template <bool kIsAll>
  static F weigh(const F* p, const Scales&, const Visible&, uint8_t* weights) {
    F sum{};
    UNROLLED
    for (int g = 0; g < kTileGranules; ++g) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)p[g]);
      _mm256_store_si256((__m256i*)(weights + 32 * g), rounded);
      sum += (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);  // what is added is what is divided by
    }
    return sum;
  }

  template <int R, int C>
  static void add_columns(const uint8_t* weights, int head_dim, int num_keys, const KvLayout& layout,
                          const Tile& tile, const float* factors, float* out, int column) {
    __m512 sum[R][C];
    UNROLLED
    for (int r = 0; r < R; ++r)
      UNROLLED
      for (int c = 0; c < C; ++c)
        sum[r][c] = _mm512_mul_ps(_mm512_loadu_ps(out + r * head_dim + column + 16 * c), _mm512_set1_ps(factors[r]));
    const size_t stride = size_t(4) * head_dim, first = layout.values + 4 * column;
    for (int key = 0; key < num_keys; key += kGranuleKeys) {
      const uint8_t* words = tile.granules[key / kGranuleKeys] + first;
      const uint8_t* next = tile.next[key / kGranuleKeys] + first;
      const int end = num_keys - key < kGranuleKeys ? num_keys : key + kGranuleKeys;
      for (int pair = key; pair < end; pair += 2, words += stride, next += stride) {
        __m512bh v[C];
        UNROLLED
        for (int c = 0; c < C; ++c) {
          v[c] = (__m512bh)_mm512_load_si512(words + 64 * c);
          __builtin_prefetch(next + 64 * c, 0, 2);
        }
        UNROLLED
        for (int r = 0; r < R; ++r) {
          const __m512bh p = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(weights + (r * kTileKeys + pair) * 2));
          UNROLLED
          for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], v[c], p);
        }
      }
    }
    UNROLLED
    for (int r = 0; r < R; ++r)
      UNROLLED
      for (int c = 0; c < C; ++c) _mm512_storeu_ps(out + r * head_dim + column + 16 * c, sum[r][c]);
  }
};

// Queries and weights are rounded to bytes, each row (a row's weights in each tile) with a scale of its own: sums of
// products are exact.
struct Int8Dots : ByColumns<Int8Dots> {
  static constexpr int kMaxRows = 6;
  static constexpr bool kScalesTiles = true;
  static constexpr float kWeightTop = 127.5f;  // times a mantissa below 2

  // A query: its numbers, then what follows.
  struct QueryTail {
    float scale;
    int32_t offset;  // -128 times the sum of its numbers: keys are stored plus 128
  };
  // A tile's. Values' scales are in two parts: 2^exponent is in the scores already, and out of the sum of weights.
  struct Scales {
    __m512 keys[kTileGranules], exponents[kTileGranules], mantissas[kTileGranules], powers[kTileGranules];
    Scales() = default;
    explicit Scales(const Tile& tile) {
      UNROLLED
      for (int g = 0; g < kTileGranules; ++g) {
        keys[g] = widened(tile.granules[g]);
        const __m512 value = widened(tile.granules[g] + 32);
        exponents[g] = _mm512_getexp_ps(value);
        const __m512 mantissa = _mm512_getmant_ps(value, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
        mantissas[g] = _mm512_mul_ps(mantissa, _mm512_set1_ps(kWeightTop));
        powers[g] = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_sub_ps(_mm512_setzero_ps(), exponents[g]));
      }
    }

    static __m512 widened(const uint8_t* at) {
      return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)at)), 16);
    }
  };

  static size_t query_bytes(int head_dim) { return size_t(head_dim) + sizeof(QueryTail); }
  static size_t weight_bytes() { return kTileKeys; }

  static void prepare(const float* q, int head_dim, uint8_t* query) {
    const float top = largest(q, head_dim);
    const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? 127.0f / top : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (int d = 0; d < head_dim; d += 16) {
      const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load(q + d), inverse));
      _mm_storeu_si128((__m128i*)(query + d), _mm512_cvtepi32_epi8(number));
      sum = _mm512_add_epi32(sum, number);
    }
    const QueryTail tail{top / 127.0f, -128 * _mm512_reduce_add_epi32(sum)};
    __builtin_memcpy(query + head_dim, &tail, sizeof tail);
  }

  template <int R>
  static void score(const uint8_t* queries, int head_dim, const KvLayout& layout, const Tile& tile,
                    const Scales& scales, float* scores) {
    __m512i sum[R][kTileGranules];
    const size_t stride = query_bytes(head_dim);
    QueryTail tails[R];
    UNROLLED
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(&tails[r], queries + r * stride + head_dim, sizeof tails[r]);
      UNROLLED
      for (int g = 0; g < kTileGranules; ++g) sum[r][g] = _mm512_set1_epi32(tails[r].offset);
    }
    const uint8_t* q = queries;
    for (size_t at = layout.keys; at < layout.values; at += 64, q += 4) {
      __m512i k[kTileGranules];
      UNROLLED
      for (int g = 0; g < kTileGranules; ++g) {
        k[g] = _mm512_load_si512(tile.granules[g] + at);
        __builtin_prefetch(tile.next[g] + at, 0, 2);
      }
      UNROLLED
      for (int r = 0; r < R; ++r) {
        const __m512i four = _mm512_set1_epi32(*(const int32_t*)(q + r * stride));
        UNROLLED
        for (int g = 0; g < kTileGranules; ++g) add_products(sum[r][g], k[g], four);
      }
    }
    UNROLLED
    for (int g = 0; g < kTileGranules; ++g) {
      UNROLLED
      for (int r = 0; r < R; ++r)
        _mm512_store_ps(scores + r * kTileKeys + g * 16,
                        _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][g]), scales.keys[g]),
                                        _mm512_set1_ps(tails[r].scale), scales.exponents[g]));
    }
  }

  // sum += four unsigned times four signed bytes. As an instruction, since GCC 12 copies sums around the intrinsic
  // until they no longer fit into registers.
  static void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  }

  static F exp2(F x) { return exp2_roughly(x); }

  template <bool kIsAll>
  static F weigh(const F* p, const Scales& scales, const Visible& visible, uint8_t* weights) {
    __m512i number[kTileGranules];
    F sum[kTileGranules];
    UNROLLED
    for (int g = 0; g < kTileGranules; ++g) {
      __m512 weight = _mm512_mul_ps((__m512)p[g], scales.mantissas[g]);
      sum[g] = p[g] * (F)scales.powers[g];
      if (!kIsAll) {
        const I lanes = visible.lanes(16 * g);
        weight = (__m512)select(lanes, (F)weight, F{});
        sum[g] = select(lanes, sum[g], F{});
      }
      number[g] = _mm512_cvtps_epi32(weight);
    }
    const __m512i bytes = _mm512_packus_epi16(_mm512_packus_epi32(number[0], number[1]),
                                              _mm512_packus_epi32(number[2], number[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_store_si512(weights, _mm512_permutexvar_epi32(order, bytes));
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  template <int R, int C>
  static void add_columns(const uint8_t* weights, int head_dim, int num_keys, const KvLayout& layout,
                          const Tile& tile, const float* factors, float* out, int column) {
    __m512i sum[R][C];
    UNROLLED
    for (int r = 0; r < R; ++r)
      UNROLLED
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_si512();
    const size_t stride = size_t(4) * head_dim, first = layout.values + 4 * column;
    const size_t row_bytes = weight_bytes();
    for (int key = 0; key < num_keys; key += kGranuleKeys) {
      const uint8_t* words = tile.granules[key / kGranuleKeys] + first;
      const uint8_t* next = tile.next[key / kGranuleKeys] + first;
      const int end = num_keys - key < kGranuleKeys ? num_keys : key + kGranuleKeys;
      for (int four = key; four < end; four += 4, words += stride, next += stride) {
        __m512i v[C];
        UNROLLED
        for (int c = 0; c < C; ++c) {
          v[c] = _mm512_load_si512(words + 64 * c);
          __builtin_prefetch(next + 64 * c, 0, 2);
        }
        UNROLLED
        for (int r = 0; r < R; ++r) {
          const __m512i p = _mm512_set1_epi32(*(const int32_t*)(weights + r * row_bytes + four));
          UNROLLED
          for (int c = 0; c < C; ++c) add_products(sum[r][c], p, v[c]);
        }
      }
    }
    UNROLLED
    for (int r = 0; r < R; ++r) {
      const __m512 factor = _mm512_set1_ps(factors[r]);
      const __m512 scale = _mm512_set1_ps(factors[kTileFactors + r] * (1.0f / kWeightTop));
      UNROLLED
      for (int c = 0; c < C; ++c) {
        float* at = out + r * head_dim + column + 16 * c;
        const __m512 tile_sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][c]), scale);
        _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), factor, tile_sum));
      }
    }
  }
};
