// Multiplies rows with one panel of a matrix. Included by each instruction set's file, which defines before
//   template <int N> void accumulate(panel, depth, x, stride, Integers sums[N][2])
// sums += the products of N rows with the 32 channels; `depth` is in_features / 4; and
//   void store_past_caches(float* to, Floats v)
//   void finish_stores()
// for a `to` on a cache line; after finish_stores, other threads see what was stored.

HEADRACE_INLINE void store_some(float* to, Floats v, int count, Epilogue epilogue) {
  if (epilogue == Epilogue::stream && count >= kLanes && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    store_past_caches(to, v);
  } else if (count >= kLanes) {
    store(to, epilogue == Epilogue::add ? load(to) + v : v);
  } else {
    for (int i = 0; i < count; ++i) to[i] = epilogue == Epilogue::add ? to[i] + v[i] : v[i];
  }
}

HEADRACE_INLINE Floats activate(Floats gate, Epilogue epilogue) {
  if (epilogue == Epilogue::gated_silu) return gate * sigmoid(gate);
  // gelu with tanh: 0.5 (1 + tanh(u)) is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  return gate * sigmoid(all(1.59576912f) * (gate + all(0.044715f) * gate * gate * gate));
}

// One expression for every caller: a row has the same bits in a block of any size.
HEADRACE_INLINE Floats scaled(Integers sums, const float* channel_scales, float row_scale) {
  return to_floats(sums) * load(channel_scales) * all(row_scale);
}

template <int N>
void multiply_rows(const Product& p, int panel, int first_row) {
  const Matrix& matrix = p.matrix;
  const int64_t n = matrix.in_features;
  Integers sums[N][2];
  for (int i = 0; i < N; ++i) sums[i][0] = sums[i][1] = all(p.rows.offsets[first_row + i]);
  accumulate<N>(matrix.weight + panel * n * kPanelChannels, static_cast<int>(n / kDepth),
                p.rows.values + first_row * n, n, sums);
  const float* scales = matrix.scale + panel * kPanelChannels;
  const int first_channel = panel * kPanelChannels;
  for (int i = 0; i < N; ++i) {
    const float row_scale = p.rows.scales[first_row + i];
    const Floats low = scaled(sums[i][0], scales, row_scale);
    const Floats high = scaled(sums[i][1], scales + kLanes, row_scale);
    float* out = p.out + (first_row + i) * p.out_stride;
    if (p.epilogue >= Epilogue::gated_silu) {
      store(out + first_channel / 2, activate(low, p.epilogue) * high);
    } else {
      const int count = matrix.out_features - first_channel;
      store_some(out + first_channel, low, count, p.epilogue);
      store_some(out + first_channel + kLanes, high, count - kLanes, p.epilogue);
    }
  }
}

using MultiplyRows = void (*)(const Product&, int panel, int first_row);
constexpr MultiplyRows kMultiplyRows[kMaxRows] = {
    multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,  multiply_rows<5>,  multiply_rows<6>,
    multiply_rows<7>, multiply_rows<8>, multiply_rows<9>, multiply_rows<10>, multiply_rows<11>, multiply_rows<12>};

// Blocks of nearly equal size: 13 rows are 7 and 6, not 12 and 1.
void multiply_panel(const Product& p, int panel) {
  const int num_blocks = (p.rows.num_rows + kMaxRows - 1) / kMaxRows;
  for (int block = 0, row = 0; block < num_blocks; ++block) {
    const int size = (p.rows.num_rows - row) / (num_blocks - block);
    kMultiplyRows[size - 1](p, panel, row);
    row += size;
  }
  if (p.epilogue == Epilogue::stream) finish_stores();
}

constexpr Kernels make_kernels() {
  return {normalize_row, quantize_row, add_normalized_row, multiply_panel, look_up_row, pack_panel};
}
