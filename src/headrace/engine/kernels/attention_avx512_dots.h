// Dot products of AVX-512 for bfloat16 and int8. Included inside an anonymous namespace after attention_rows.h;
// what an Arithmetic has: attention_plain.h.

// Sums live in registers only where every loop over them is gone.
#define UNROLLED _Pragma("GCC unroll 8")

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
  static size_t query_bytes(int head_dim) { return size_t(2) * head_dim; }
  static size_t weight_bytes() { return 2 * kTileKeys; }

  static void prepare(const float* q, int head_dim, uint8_t* query) {
    for (int d = 0; d < head_dim; d += 16)
      _mm256_storeu_si256((__m256i*)(query + 2 * d), (__m256i)_mm512_cvtneps_pbh((__m512)load(q + d)));
  }

  template <int R>
  static void score(const uint8_t* queries, int head_dim, const KvLayout& layout, const Tile& tile,
                    float* scores) {
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

  static F weigh_scores(const F* p, const Tile&, const Visible&, uint8_t* weights) {
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

// Queries and weights become integers of kParts bytes, each row with a scale of its own: products are exact.
struct Int8Dots : ByColumns<Int8Dots> {
  static constexpr int kParts = 2;
  static constexpr int kMaxRows = kParts == 2 ? 3 : 6;
  static constexpr float kQueryTop = kParts == 2 ? 32639.0f : 127.0f;  // 127 * 256 + 127
  static constexpr float kWeightTop = kParts == 2 ? 65535.0f : 255.0f;

  // A query: its parts' int8 numbers, then what follows.
  struct QueryTail {
    float scale;
    int32_t offset[kParts];  // -128 times the sum of its numbers: keys are stored plus 128
    int32_t unused[4 - 1 - kParts];
  };
  // Weights: their parts' bytes, then their scale.
  static size_t query_bytes(int head_dim) { return size_t(kParts) * head_dim + sizeof(QueryTail); }
  static size_t weight_bytes() { return kParts * kTileKeys + 64; }

  static void prepare(const float* q, int head_dim, uint8_t* query) {
    const float top = largest(q, head_dim);
    QueryTail tail{};
    tail.scale = top / kQueryTop;
    const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? kQueryTop / top : 0.0f);
    __m512i sums[kParts];
    UNROLLED
    for (int part = 0; part < kParts; ++part) sums[part] = _mm512_setzero_si512();
    for (int d = 0; d < head_dim; d += 16) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load(q + d), inverse));
      // The lower byte is signed, too: what it lacks, the upper one has more.
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(whole, 24), 24);
      const __m512i high = kParts == 2 ? _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 8) : low;
      _mm_storeu_si128((__m128i*)(query + d), _mm512_cvtepi32_epi8(high));
      sums[0] = _mm512_add_epi32(sums[0], high);
      if (kParts == 2) {
        _mm_storeu_si128((__m128i*)(query + head_dim + d), _mm512_cvtepi32_epi8(low));
        sums[kParts - 1] = _mm512_add_epi32(sums[kParts - 1], low);
      }
    }
    UNROLLED
    for (int part = 0; part < kParts; ++part) tail.offset[part] = -128 * _mm512_reduce_add_epi32(sums[part]);
    __builtin_memcpy(query + kParts * head_dim, &tail, sizeof tail);
  }

  template <int R>
  static void score(const uint8_t* queries, int head_dim, const KvLayout& layout, const Tile& tile,
                    float* scores) {
    __m512i sum[kParts][R][kTileGranules];
    const size_t stride = query_bytes(head_dim);
    QueryTail tails[R];
    UNROLLED
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(&tails[r], queries + r * stride + kParts * head_dim, sizeof tails[r]);
      UNROLLED
      for (int part = 0; part < kParts; ++part)
        UNROLLED
        for (int g = 0; g < kTileGranules; ++g) sum[part][r][g] = _mm512_set1_epi32(tails[r].offset[part]);
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
      for (int r = 0; r < R; ++r)
        UNROLLED
        for (int part = 0; part < kParts; ++part) {
          const __m512i four = _mm512_set1_epi32(*(const int32_t*)(q + r * stride + part * head_dim));
          UNROLLED
          for (int g = 0; g < kTileGranules; ++g)
            add_products(sum[part][r][g], k[g], four);
        }
    }
    UNROLLED
    for (int g = 0; g < kTileGranules; ++g) {
      const __m512 key_scale = scales(tile.granules[g]);
      UNROLLED
      for (int r = 0; r < R; ++r)
        _mm512_store_ps(scores + r * kTileKeys + g * 16,
                        _mm512_mul_ps(_mm512_mul_ps(whole(sum[0][r][g], sum[kParts - 1][r][g]), key_scale),
                                      _mm512_set1_ps(tails[r].scale)));
    }
  }

  // sum += four unsigned times four signed bytes. As an instruction, since GCC 12 copies sums around the intrinsic
  // until they no longer fit into registers.
  static void add_products(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  }

  static __m512 scales(const uint8_t* at) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)at)), 16);
  }

  static __m512 whole(__m512i high, __m512i low) {
    return _mm512_cvtepi32_ps(kParts == 2 ? _mm512_add_epi32(_mm512_slli_epi32(high, 8), low) : low);
  }

  static F weigh_scores(const F* p, const Tile& tile, const Visible& visible, uint8_t* weights) {
    __m512 weight[kTileGranules], top = _mm512_set1_ps(1e-30f);
    F sum{};
    UNROLLED
    for (int g = 0; g < kTileGranules; ++g) {
      sum += p[g];
      weight[g] = _mm512_mul_ps((__m512)p[g], scales(tile.granules[g] + 32));
      if (!visible.is_all()) {
        const I lanes = count_from(16 * g);
        const I is_visible = (lanes >= splat(visible.first)) & (lanes < splat(visible.end));
        weight[g] = (__m512)select(is_visible, (F)weight[g], F{});
      }
      top = _mm512_max_ps(top, weight[g]);
    }
    const float largest = _mm512_reduce_max_ps(top);
    const __m512 inverse = _mm512_set1_ps(kWeightTop / largest);
    UNROLLED
    for (int g = 0; g < kTileGranules; ++g) {
      const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(weight[g], inverse));
      const __m512i high = kParts == 2 ? _mm512_srli_epi32(number, 8) : number;
      _mm_store_si128((__m128i*)(weights + 16 * g), _mm512_cvtepi32_epi8(high));
      if (kParts == 2)
        _mm_store_si128((__m128i*)(weights + kTileKeys + 16 * g), _mm512_cvtepi32_epi8(number));
    }
    *(float*)(weights + kParts * kTileKeys) = largest * (1.0f / kWeightTop);
    return sum;
  }

  template <int R, int C>
  static void add_columns(const uint8_t* weights, int head_dim, int num_keys, const KvLayout& layout,
                          const Tile& tile, const float* factors, float* out, int column) {
    __m512i sum[kParts][R][C];
    UNROLLED
    for (int part = 0; part < kParts; ++part)
      UNROLLED
      for (int r = 0; r < R; ++r)
        UNROLLED
        for (int c = 0; c < C; ++c) sum[part][r][c] = _mm512_setzero_si512();
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
        for (int r = 0; r < R; ++r)
          UNROLLED
          for (int part = 0; part < kParts; ++part) {
            const __m512i p = _mm512_set1_epi32(*(const int32_t*)(weights + r * row_bytes + part * kTileKeys + four));
            UNROLLED
            for (int c = 0; c < C; ++c) add_products(sum[part][r][c], p, v[c]);
          }
      }
    }
    UNROLLED
    for (int r = 0; r < R; ++r) {
      const __m512 factor = _mm512_set1_ps(factors[r]);
      const __m512 scale = _mm512_set1_ps(*(const float*)(weights + r * row_bytes + kParts * kTileKeys));
      UNROLLED
      for (int c = 0; c < C; ++c) {
        float* at = out + r * head_dim + column + 16 * c;
        const __m512 tile_sum = _mm512_mul_ps(whole(sum[0][r][c], sum[kParts - 1][r][c]), scale);
        _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), factor, tile_sum));
      }
    }
  }
};
