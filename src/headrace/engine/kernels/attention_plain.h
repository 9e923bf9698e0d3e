// Scores and weighted sums in float32 with any kind of cache, for any instruction set. Included inside an
// anonymous namespace after attention_vector.h.
//
// An `Arithmetic` has: kMaxRows (rows computed at once, at most kTileFactors), kScalesTiles (weights are relative to
// a tile's own largest score), a tile's Scales, bytes of a row's query and weights, `prepare` a query,
// `score` rows against a tile's 64 keys, `exp2`, `weigh` (softened scores become weights), and `add_values`.

// One row's place in a tile: its keys are [first, end) of 64.
struct Visible {
  int first, end;
  // Which of the keys from `at` on are visible.
  I lanes(int at) const {
    const I key = count_from(at);
    return (key >= splat(first)) & (key < splat(end));
  }
};

// Four granules of 16 keys, and those that come next, to be fetched while these are computed: into the second
// cache, as the first has too few reads open to keep memory busy (11 against 14 GB/s).
struct Tile {
  const uint8_t* granules[kTileGranules];
  const uint8_t* next[kTileGranules];
};

// Where a tile's own factors begin among the factors of its rows.
constexpr int kTileFactors = 8;

template <int kKind>
struct Plain {
  static constexpr int kMaxRows = 4;
  static constexpr int kPerWord = kKind == kv_int8 ? 4 : kKind == kv_bfloat16 ? 2 : 1;
  static constexpr int kVectors = kLanes == 16 ? 4 : kGranuleKeys / kLanes;  // of keys, computed at once
  static constexpr int kColumns = kLanes == 16 ? 4 : 2;                      // vectors of values

  static constexpr bool kScalesTiles = false;

  // int8's, of a tile.
  struct Scales {
    static constexpr int kVectors = kKind == kv_int8 ? kTileKeys / kLanes : 1;
    F keys[kVectors], values[kVectors];
    Scales() = default;
    explicit Scales(const Tile& tile) {
      if constexpr (kKind == kv_int8)
        for (int v = 0; v < kVectors; ++v) {
          const uint8_t* granule = tile.granules[v * kLanes / kGranuleKeys] + v * kLanes % kGranuleKeys * 2;
          keys[v] = widen(granule);
          values[v] = widen(granule + 2 * kGranuleKeys);
        }
    }
  };

  static size_t query_bytes(int head_dim) { return size_t(4) * head_dim; }
  static size_t weight_bytes() { return 4 * kTileKeys; }

  static void prepare(const float* q, int head_dim, uint8_t* query) {
    __builtin_memcpy(query, q, size_t(4) * head_dim);
  }

  // Number j of each word.
  template <bool kIsKey>
  static F unpack(I words, int j) {
    if (kKind == kv_float32) return (F)words;
    if (kKind == kv_bfloat16) return (F)(j == 0 ? words << 16 : words & splat(int32_t(0xffff0000)));
    if (kIsKey) return __builtin_convertvector(((words >> (8 * j)) & splat(255)) - splat(128), F);
    return __builtin_convertvector((words << (24 - 8 * j)) >> 24, F);
  }

  // bfloat16 numbers as float32.
  static F widen(const uint8_t* at) {
    typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
    H halves;
    __builtin_memcpy(&halves, at, sizeof halves);
    return (F)(__builtin_convertvector(halves, I) << 16);
  }

  template <int R>
  static void score(const uint8_t* queries, int head_dim, const KvLayout& layout, const Tile& tile,
                    const Scales& scales, float* scores) {
    const float* q = reinterpret_cast<const float*>(queries);
    for (int key = 0; key < kTileKeys; key += kVectors * kLanes) {
      const uint8_t *words[kVectors], *next[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const int at = key + v * kLanes;
        const size_t offset = layout.keys + at % kGranuleKeys * 4;
        words[v] = tile.granules[at / kGranuleKeys] + offset;
        next[v] = tile.next[at / kGranuleKeys] + offset;
      }
      F sum[R][kVectors] = {};
      for (int d = 0; d < head_dim; d += kPerWord) {
        const size_t offset = size_t(d) / kPerWord * (4 * kGranuleKeys);
        I word[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          word[v] = load_words(words[v] + offset);
          __builtin_prefetch(next[v] + offset, 0, 2);
        }
        for (int j = 0; j < kPerWord; ++j) {
          F k[kVectors];
          for (int v = 0; v < kVectors; ++v) k[v] = unpack<true>(word[v], j);
          for (int r = 0; r < R; ++r) {
            const F x = splat(q[r * head_dim + d + j]);
            for (int v = 0; v < kVectors; ++v) sum[r][v] = FusedAdd(k[v], x, sum[r][v]);
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const int at = key + v * kLanes;
        for (int r = 0; r < R; ++r)
          store(scores + r * kTileKeys + at, kKind == kv_int8 ? sum[r][v] * scales.keys[at / kLanes] : sum[r][v]);
      }
    }
  }

  static F exp2(F x) { return exp2_of(x); }

  // `p` [64] in (0, 1], 0 where not visible. Returns their sum, lane by lane.
  template <bool kIsAll>
  static F weigh(const F* p, const Scales& scales, const Visible& visible, uint8_t* weights) {
    F sum{};
    for (int v = 0; v < kTileKeys / kLanes; ++v) {
      F weight = p[v];
      sum += weight;
      if constexpr (kKind == kv_int8) {
        weight *= scales.values[v];
        if (!kIsAll) weight = select(visible.lanes(v * kLanes), weight, F{});
      }
      store(reinterpret_cast<float*>(weights) + v * kLanes, weight);
    }
    return sum;
  }

  // out[r] = out[r] * factors[r] + sum over the tile's first num_keys of weight * value.
  template <int R>
  static void add_values(const uint8_t* weights, int head_dim, int num_keys, const KvLayout& layout,
                         const Tile& tile, const float* factors, float* out) {
    const float* p = reinterpret_cast<const float*>(weights);
    int column = 0;
    for (; column + kColumns * kLanes <= head_dim; column += kColumns * kLanes)
      add_columns<R, kColumns>(p, head_dim, num_keys, layout, tile, factors, out, column);
    for (; column < head_dim; column += kLanes)
      add_columns<R, 1>(p, head_dim, num_keys, layout, tile, factors, out, column);
  }

  template <int R, int C>
  static void add_columns(const float* p, int head_dim, int num_keys, const KvLayout& layout, const Tile& tile,
                          const float* factors, float* out, int column) {
    F sum[R][C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        sum[r][c] = load(out + r * head_dim + column + c * kLanes) * splat(factors[r]);
    for (int key = 0; key < num_keys; key += kPerWord) {
      const size_t offset =
          layout.values + 4 * (size_t(key % kGranuleKeys) / kPerWord * head_dim + column);
      const uint8_t* words = tile.granules[key / kGranuleKeys] + offset;
      const uint8_t* next = tile.next[key / kGranuleKeys] + offset;
      I word[C];
      for (int c = 0; c < C; ++c) {
        word[c] = load_words(words + 4 * kLanes * c);
        __builtin_prefetch(next + 4 * kLanes * c, 0, 2);
      }
      for (int j = 0; j < kPerWord; ++j) {
        F v[C];
        for (int c = 0; c < C; ++c) v[c] = unpack<false>(word[c], j);
        for (int r = 0; r < R; ++r) {
          const F x = splat(p[r * kTileKeys + key + j]);
          for (int c = 0; c < C; ++c) sum[r][c] = FusedAdd(v[c], x, sum[r][c]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) store(out + r * head_dim + column + c * kLanes, sum[r][c]);
  }
};
