// Multiplies rows with one panel of a matrix. Included by each instruction set's file, after pass.h, which defines
//   template <int N> void accumulate(const Pass& pass, Integers (*sums)[2])
// sums = the pass's offsets + the products of N rows with the 32 channels; and
//   void store_past_caches(float* to, Floats v)
//   void finish_stores()
// for a `to` on a cache line; after finish_stores, other threads see what was stored.

HEADRACE_INLINE Floats activate(Floats gate, Epilogue epilogue) {
  if (epilogue == Epilogue::gated_silu) return gate * sigmoid(gate);
  // gelu with tanh: 0.5 (1 + tanh(u)) is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  return gate * sigmoid(all(1.59576912f) * (gate + all(0.044715f) * gate * gate * gate));
}

// What a block of products becomes: `low` and `high` are a row's two halves of the panel, `to` where they belong.
template <Epilogue kEpilogue>
HEADRACE_INLINE void put(float* to, Floats low, Floats high) {
  if (kEpilogue >= Epilogue::gated_silu) {
    store(to, activate(low, kEpilogue) * high);
  } else if (kEpilogue == Epilogue::add) {
    store(to, load(to) + low);
    store(to + kLanes, load(to + kLanes) + high);
  } else if (kEpilogue == Epilogue::stream && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    store_past_caches(to, low);
    store_past_caches(to + kLanes, high);
  } else {
    store(to, low);
    store(to + kLanes, high);
  }
}

// The last panel's first `count` channels.
HEADRACE_INLINE void put_some(float* to, Floats low, Floats high, int count, bool is_added) {
  float both[kPanelChannels];
  store(both, low);
  store(both + kLanes, high);
  for (int i = 0; i < count; ++i) to[i] = is_added ? to[i] + both[i] : both[i];
}

// One expression for every caller: a row has the same bits in a block of any size.
HEADRACE_INLINE Floats scaled(Integers sums, Floats channel_scales, float row_scale) {
  return to_floats(sums) * channel_scales * all(row_scale);
}

// Rows [first, first + num_rows) of one panel.
struct Block {
  int panel, first, num_rows;
};

template <Epilogue kEpilogue>
void finish(const Product& p, const Block& block, const Integers (*sums)[2]) {
  constexpr bool is_gated = kEpilogue >= Epilogue::gated_silu;
  const int channel = block.panel * kPanelChannels;
  const Floats low_scale = load(p.matrix.scale + channel), high_scale = load(p.matrix.scale + channel + kLanes);
  const int count = p.matrix.out_features - channel;
  float* to = p.out + block.first * p.out_stride + (is_gated ? channel / 2 : channel);
  for (int i = 0; i < block.num_rows; ++i, to += p.out_stride) {
    const float row_scale = p.rows.scales[block.first + i];
    const Floats low = scaled(sums[i][0], low_scale, row_scale);
    const Floats high = scaled(sums[i][1], high_scale, row_scale);
    if (is_gated || count >= kPanelChannels) {
      put<kEpilogue>(to, low, high);
    } else {
      put_some(to, low, high, count, kEpilogue == Epilogue::add);
    }
  }
  if (kEpilogue == Epilogue::stream) finish_stores();
}

using Finish = void (*)(const Product&, const Block&, const Integers (*sums)[2]);
constexpr Finish kFinish[] = {finish<Epilogue::store>, finish<Epilogue::stream>, finish<Epilogue::add>,
                              finish<Epilogue::gated_silu>, finish<Epilogue::gated_gelu>};

using Accumulate = void (*)(const Pass&, Integers (*sums)[2]);
constexpr Accumulate kAccumulate[kMaxRows] = {accumulate<1>, accumulate<2>,  accumulate<3>,  accumulate<4>,
                                              accumulate<5>, accumulate<6>,  accumulate<7>,  accumulate<8>,
                                              accumulate<9>, accumulate<10>, accumulate<11>, accumulate<12>};

// Far enough for memory's answer, near enough to be still in the second cache.
constexpr int kAheadBytes = 8192;

// Each of a panel's blocks fetches its part of the next panel, which most often is this thread's too: so memory
// works all the time, not in the first block only.
HEADRACE_INLINE Ahead fetch_ahead(const Matrix& matrix, const uint8_t* panel, int block, int num_blocks) {
  const int64_t num_bytes = static_cast<int64_t>(matrix.in_features) * kPanelChannels;
  const int num_lines = static_cast<int>(num_bytes / kLineBytes);
  if (num_blocks == 1) return {panel + kAheadBytes, num_lines};
  const int share = (num_lines + num_blocks - 1) / num_blocks, first = block * share;
  return {panel + num_bytes + first * kLineBytes, share < num_lines - first ? share : num_lines - first};
}

void multiply_piece(const Product& p, int piece) {
  const Matrix& matrix = p.matrix;
  const int64_t n = matrix.in_features;
  const int num_blocks = p.num_blocks(), index = piece % num_blocks;
  // Blocks of nearly equal size: 13 rows are 6 and 7, not 12 and 1.
  const int first = static_cast<int>(static_cast<int64_t>(p.rows.num_rows) * index / num_blocks);
  const int end = static_cast<int>(static_cast<int64_t>(p.rows.num_rows) * (index + 1) / num_blocks);
  const Block block{piece / num_blocks, first, end - first};
  const uint8_t* panel = matrix.weight + block.panel * n * kPanelChannels;
  Integers sums[kMaxRows][2];
  kAccumulate[block.num_rows - 1]({panel, static_cast<int>(n / kDepth), p.rows.values + first * n, n,
                                   p.rows.offsets + first, fetch_ahead(matrix, panel, index, num_blocks)},
                                  sums);
  kFinish[static_cast<int>(p.epilogue)](p, block, sums);
}

constexpr Kernels make_kernels() {
  return {normalize_row, quantize_row, add_normalized_row, multiply_piece, look_up_row, pack_panel};
}
