// Norm, rotary embedding and the way of keys and values into the cache. Included inside an anonymous namespace
// after attention_vector.h. Only elementwise operations and sums in lanes: the same bits for a token always.

constexpr int kMaxHeadDim = 256;

// y = x / sqrt(mean(x²) + eps) * weight (arXiv:1910.07467); without a weight y = x.
inline void normalise(const float* x, const float* weight, float eps, int head_dim, float* y) {
  if (!weight) {
    __builtin_memcpy(y, x, size_t(4) * head_dim);
    return;
  }
  F squares{};
  for (int d = 0; d < head_dim; d += kLanes) squares = FusedAdd(load(x + d), load(x + d), squares);
  const F factor = splat(1.0f / __builtin_sqrtf(reduce_add(squares) / float(head_dim) + eps));
  for (int d = 0; d < head_dim; d += kLanes) store(y + d, load(x + d) * factor * load(weight + d));
}

// Rotary embedding over halves (arXiv:2104.09864), in place; the result times `scale`.
inline void rotate(float* x, const float* cos, const float* sin, int head_dim, float scale) {
  const int half = head_dim / 2;
  for (int d = 0; d < half; ++d) {
    const float first = x[d], second = x[d + half];
    x[d] = (first * cos[d] - second * sin[d]) * scale;
    x[d + half] = (second * cos[d] + first * sin[d]) * scale;
  }
}

// One step of the Hadamard transform within a vector: lanes `Distance` apart become their sum and difference.
template <int Distance>
inline F butterfly(F x) {
  I partners;
  F signs;
  for (int i = 0; i < kLanes; ++i) {
    partners[i] = i ^ Distance;
    signs[i] = i & Distance ? -1.0f : 1.0f;
  }
  return x * signs + __builtin_shuffle(x, partners);
}

// The largest power of two that divides head_dim: the size of the Hadamard matrices.
inline int spread_size(int head_dim) { return head_dim & -head_dim; }

// Multiply blocks of `spread_size` numbers by the Hadamard matrix, in place: products of a query and a key that both
// are spread are `spread_size` times as large, and no number stands out of the others, which is what int8 wants.
inline void spread(float* x, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) {
    F v = butterfly<2>(butterfly<1>(load(x + d)));
    if constexpr (kLanes > 4) v = butterfly<4>(v);
    if constexpr (kLanes > 8) v = butterfly<8>(v);
    store(x + d, v);
  }
  for (int distance = kLanes; distance < spread_size(head_dim); distance *= 2)
    for (int block = 0; block < head_dim; block += 2 * distance)
      for (int d = block; d < block + distance; d += kLanes) {
        const F a = load(x + d), b = load(x + d + distance);
        store(x + d, a + b);
        store(x + d + distance, a - b);
      }
}

// To bfloat16, nearest even; not a number stays so.
inline uint16_t narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

inline float largest(const float* x, int head_dim) {
  F top{};
  for (int d = 0; d < head_dim; d += kLanes) {
    const F y = (F)((I)load(x + d) & splat(0x7fffffff));
    top = select(y == y, larger(top, y), splat(__builtin_inff()));  // not a number counts as infinite
  }
  return reduce_max(top);
}

// int8 with one scale: a bfloat16 rounded up, so that the largest number is at most 127. Numbers that are not
// finite give a scale that is not a number, whoever sees them then is not finite either.
inline uint16_t quantise(const float* x, int head_dim, int8_t* y) {
  const float top = largest(x, head_dim);
  if (!(top < __builtin_inff())) {
    __builtin_memset(y, 0, head_dim);
    return 0x7fc0;
  }
  uint32_t bits;
  const float exact = top / 127.0f;
  __builtin_memcpy(&bits, &exact, 4);
  const uint16_t scale = uint16_t((bits + 0xffff) >> 16);
  const float inverse = top > 1e-30f ? 1.0f / widen(scale) : 0.0f;
  const float round = 12582912.0f;  // as in exp2_of
  for (int d = 0; d < head_dim; ++d) y[d] = int8_t(int32_t(x[d] * inverse + round - round));
  return scale;
}

// Where a token's head goes: words 16 (or 8) keys apart, and a column of its word of values.
struct Place {
  uint8_t* granule;
  int lane;
};

inline Place place_of(const AttentionTask& task, int32_t slot, int head) {
  const int block_size = task.step.block_size, offset = slot % block_size;
  uint8_t* block = task.cache + size_t(slot / block_size) * task.layout.block_bytes;
  return {block + head * task.layout.head_bytes + offset / task.layout.granule * task.layout.granule_bytes,
          offset % task.layout.granule};
}

template <typename T, int kPerWord>
inline void scatter(const AttentionTask& task, const Place& place, const T* k, const T* v, bool is_last) {
  const int head_dim = task.shape.head_dim, granule = task.layout.granule;
  T* keys = reinterpret_cast<T*>(place.granule + task.layout.keys) + place.lane * kPerWord;
  for (int d = 0; d < head_dim; d += kPerWord)
    for (int j = 0; j < kPerWord; ++j) keys[d * granule + j] = k[d + j];
  T* values = reinterpret_cast<T*>(place.granule + task.layout.values) +
              size_t(place.lane / kPerWord) * head_dim * kPerWord;
  const int j = place.lane % kPerWord;
  for (int d = 0; d < head_dim; ++d) values[d * kPerWord + j] = v[d];
  // A word's later values get the weight 0, but 0 times what an earlier owner left may not be a number.
  if (sizeof(T) == 2 && is_last && j + 1 < kPerWord)
    for (int d = 0; d < head_dim; ++d) values[d * kPerWord + j + 1] = T{};
}

inline void write_head(const AttentionTask& task, const Place& place, const float* k, const float* v,
                       bool is_last) {
  const int head_dim = task.shape.head_dim;
  if (task.shape.kv_kind == kv_float32) return scatter<float, 1>(task, place, k, v, is_last);
  if (task.shape.kv_kind == kv_bfloat16) {
    uint16_t narrow_k[kMaxHeadDim], narrow_v[kMaxHeadDim];
    for (int d = 0; d < head_dim; ++d) narrow_k[d] = narrow(k[d]), narrow_v[d] = narrow(v[d]);
    return scatter<uint16_t, 2>(task, place, narrow_k, narrow_v, is_last);
  }
  int8_t small_k[kMaxHeadDim], small_v[kMaxHeadDim];
  uint16_t* scales = reinterpret_cast<uint16_t*>(place.granule);
  const uint16_t k_scale = quantise(k, head_dim, small_k);
  uint16_t v_scale = quantise(v, head_dim, small_v);
  const uint16_t least = 0x0d80;  // 2^-100: some code takes its logarithm
  if (v_scale < least) v_scale = least;
  const uint16_t nan = 0x7fc0;
  scales[place.lane] = v_scale == nan ? nan : k_scale;  // scores tell of values that are not numbers, too
  scales[kGranuleKeys + place.lane] = v_scale;
  for (int d = 0; d < head_dim; ++d) small_k[d] = int8_t(small_k[d] ^ 0x80);  // plus 128
  scatter<int8_t, 4>(task, place, small_k, small_v, is_last);
}

// Fetch what a token's write will change. Tokens after one another change the same lines: nothing to fetch then.
inline void fetch_for_write(const AttentionTask& task, int token) {
  const KvLayout& layout = task.layout;
  const int32_t slot = task.step.slots[token];
  if (token && slot == task.step.slots[token - 1] + 1) return;
  const size_t side = layout.values - layout.keys, column = size_t(4) * task.shape.head_dim;
  for (int head = 0; head < task.shape.num_kv_heads; ++head) {
    const Place place = place_of(task, slot, head);
    __builtin_prefetch(place.granule, 1);
    for (size_t at = 0; at < side; at += 64) __builtin_prefetch(place.granule + layout.keys + at, 1);
    const uint8_t* values = place.granule + layout.values + place.lane / layout.per_word * column;
    for (size_t at = 0; at < column; at += 64) __builtin_prefetch(values + at, 1);
  }
}

void write_tokens(const AttentionTask& task, int first, int end) {
  const AttentionShape& shape = task.shape;
  const int head_dim = shape.head_dim, num_kv_heads = shape.num_kv_heads;
  const size_t stride = size_t(shape.num_heads + 2 * num_kv_heads) * head_dim;
  float key[kMaxHeadDim];
  fetch_for_write(task, first);
  for (int token = first; token < end; ++token) {
    if (token + 1 < end) fetch_for_write(task, token + 1);
    const int32_t slot = task.step.slots[token];
    const bool is_last = token + 1 == task.step.num_tokens || task.step.slots[token + 1] != slot + 1;
    const size_t angles = size_t(task.step.positions[token]) * (head_dim / 2);
    const float* k = task.qkv + token * stride + size_t(shape.num_heads) * head_dim;
    const float* v = k + size_t(num_kv_heads) * head_dim;
    for (int head = 0; head < num_kv_heads; ++head) {
      normalise(k + head * head_dim, task.k_norm, shape.norm_eps, head_dim, key);
      rotate(key, task.cos + angles, task.sin + angles, head_dim, 1.0f);
      if (shape.kv_kind == kv_int8) spread(key, head_dim);
      write_head(task, place_of(task, slot, head), key, v + head * head_dim, is_last);
    }
  }
}
