// Work on single rows: norms, rotation, quantisation, packing. Included by each instruction set's file, after
// lanes.h. A row's result depends on that row alone.

HEADRACE_INLINE float mean_square(const float* x, int n) {
  Floats sums{};
  for (int i = 0; i < n; i += kLanes) {
    const Floats v = load(x + i);
    sums += v * v;
  }
  return sum(sums) / static_cast<float>(n);
}

// One step of the Hadamard transform within sixteen lanes: (a, b) -> (a + b, a - b) for lanes `Distance` apart.
template <int Distance>
HEADRACE_INLINE Floats butterfly(Floats v) {
  Integers partner, sign;
  for (int i = 0; i < kLanes; ++i) {
    partner[i] = i ^ Distance;
    sign[i] = (i & Distance) ? INT32_MIN : 0;
  }
  return __builtin_shuffle(v, partner) + (Floats)(bits(v) ^ sign);
}

// The first steps, for a run of `Count` vectors that stay in registers: distances below 16 * Count.
template <int Count>
HEADRACE_INLINE void rotate_run(float* x, Floats factor) {
  Floats v[Count];
  for (int i = 0; i < Count; ++i) {
    v[i] = butterfly<1>(load(x + i * kLanes) * factor);
    v[i] = butterfly<8>(butterfly<4>(butterfly<2>(v[i])));
  }
  for (int distance = 1; distance < Count; distance *= 2)
    for (int i = 0; i < Count; ++i) {
      if (i & distance) continue;
      const Floats a = v[i], b = v[i + distance];
      v[i] = a + b;
      v[i + distance] = a - b;
    }
  for (int i = 0; i < Count; ++i) store(x + i * kLanes, v[i]);
}

template <int Count>
HEADRACE_INLINE void rotate_runs(float* x, int n, Floats factor) {
  for (int i = 0; i < n; i += Count * kLanes) rotate_run<Count>(x + i, factor);
}

// Multiply blocks of `size` (a power of two >= 16) by the orthogonal Hadamard matrix, its own inverse.
HEADRACE_INLINE void rotate(float* x, int n, int size) {
  const Floats factor = all(1.0f / __builtin_sqrtf(static_cast<float>(size)));
  switch (size / kLanes) {
    case 1: return rotate_runs<1>(x, n, factor);
    case 2: return rotate_runs<2>(x, n, factor);
    case 4: return rotate_runs<4>(x, n, factor);
    default: rotate_runs<8>(x, n, factor);
  }
  for (int distance = 8 * kLanes; distance < size; distance *= 2)
    for (int block = 0; block < n; block += 2 * distance)
      for (int i = block; i < block + distance; i += kLanes) {
        const Floats a = load(x + i), b = load(x + i + distance);
        store(x + i, a + b);
        store(x + i + distance, a - b);
      }
}

// The largest |x|; NaN if there is one: as integers, NaN's bits are above infinity's.
HEADRACE_INLINE float largest(const float* x, int n) {
  Integers most{};
  for (int i = 0; i < n; i += kLanes) {
    const Integers v = bits(load(x + i)) & 0x7fffffff;
    most = v > most ? v : most;
  }
  int32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result = most[i] > result ? most[i] : result;
  float value;
  __builtin_memcpy(&value, &result, sizeof value);
  return value;
}

// Round x * (127 / largest) into bytes; returns their sum.
HEADRACE_INLINE int32_t to_bytes(const float* x, int n, float most, int8_t* to) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  const Floats inverse = all(most > 0.0f && most < __builtin_inff() ? 127.0f / most : 0.0f);
  Integers total{};
  for (int i = 0; i < n; i += kLanes) {
    const Integers q = __builtin_convertvector(round_to_integer(load(x + i) * inverse), Integers);
    const Bytes packed = __builtin_convertvector(q, Bytes);
    __builtin_memcpy(to + i, &packed, sizeof packed);
    total += q;
  }
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

HEADRACE_INLINE void finish_quantizing(float* x, int n, const Rows& to, int row) {
  rotate(x, n, rotation_size(n));
  const float most = largest(x, n);
  to.offsets[row] = -128 * to_bytes(x, n, most, to.values + static_cast<int64_t>(row) * n);
  to.scales[row] = most < __builtin_inff() ? most / 127.0f : __builtin_nanf("");
}

void quantize_row(const float* x, int n, const Rows& to, int row) {
  alignas(64) float scratch[kMaxFeatures];
  __builtin_memcpy(scratch, x, sizeof(float) * n);
  finish_quantizing(scratch, n, to, row);
}

void normalize_row(const float* x, const float* weight, float eps, int n, const Rows& to, int row) {
  alignas(64) float scratch[kMaxFeatures];
  const Floats factor = all(1.0f / __builtin_sqrtf(mean_square(x, n) + eps));
  for (int i = 0; i < n; i += kLanes) store(scratch + i, load(x + i) * factor * load(weight + i));
  finish_quantizing(scratch, n, to, row);
}

void add_normalized_row(float* x, const float* y, const float* weight, float eps, int n) {
  const Floats factor = all(1.0f / __builtin_sqrtf(mean_square(y, n) + eps));
  for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) + load(y + i) * factor * load(weight + i));
}

void look_up_row(const Matrix& matrix, int index, float factor, float* out) {
  const int n = matrix.in_features;
  const int64_t panel_bytes = static_cast<int64_t>(n) * kPanelChannels;
  const uint8_t* from = matrix.weight + index / kPanelChannels * panel_bytes + index % kPanelChannels * kDepth;
  const float scale = matrix.scale[index];
  for (int i = 0; i < n; ++i)
    out[i] = static_cast<float>(from[i / kDepth * kPanelChannels * kDepth + i % kDepth] - 128) * scale;
  rotate(out, n, rotation_size(n));
  for (int i = 0; i < n; i += kLanes) store(out + i, load(out + i) * all(factor));
}

void pack_panel(const float* weight, int in_features, int out_features, int panel, uint8_t* to, float* scale) {
  alignas(64) float scratch[kMaxFeatures];
  alignas(64) int8_t bytes[kMaxFeatures];
  to += static_cast<int64_t>(panel) * in_features * kPanelChannels;
  for (int lane = 0; lane < kPanelChannels; ++lane) {
    const int channel = panel * kPanelChannels + lane;
    float most = 0.0f;
    if (channel < out_features) {
      const float* row = weight + static_cast<int64_t>(channel) * in_features;
      __builtin_memcpy(scratch, row, sizeof(float) * in_features);
      rotate(scratch, in_features, rotation_size(in_features));
      most = largest(scratch, in_features);
    } else {
      __builtin_memset(scratch, 0, sizeof(float) * in_features);
    }
    to_bytes(scratch, in_features, most, bytes);
    scale[channel] = most < __builtin_inff() ? most / 127.0f : __builtin_nanf("");
    for (int i = 0; i < in_features; ++i)
      to[(i / kDepth * kPanelChannels + lane) * kDepth + i % kDepth] = static_cast<uint8_t>(bytes[i] + 128);
  }
}
