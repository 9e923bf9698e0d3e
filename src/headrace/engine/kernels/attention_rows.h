// The rows of one piece: queries of one request, softmax over tiles of 64 keys, online (arXiv:2205.14135).
// Included inside an anonymous namespace after attention_plain.h and attention_write.h.
//
// A row is one query of one head; a group's heads lie next to each other. A row's sequence of operations depends
// on its own position alone: which rows are computed with it decides only what is loaded once.

// Memory of one piece, cut from its scratch.
template <class A>
struct Rows {
  uint8_t* queries;  // [rows, query_bytes]
  float* out;        // [rows, head_dim]: weighted sums so far
  F* sums;           // [rows]: of weights, lane by lane
  float* maxima;     // [rows]
  float* scores;     // [kMaxRows, 64]
  uint8_t* weights;  // [kMaxRows, weight_bytes]
  uint8_t* gathered;  // blocks of 8: two tiles put together from them

  static size_t round_up(size_t bytes) { return (bytes + 63) & ~size_t(63); }

  static size_t bytes(const AttentionTask& task, int num_rows) {
    Rows rows;
    return rows.cut(task, num_rows, nullptr);
  }

  size_t cut(const AttentionTask& task, int num_rows, uint8_t* memory) {
    const int head_dim = task.shape.head_dim;
    size_t at = 0;
    const auto take = [&](size_t num_bytes) {
      uint8_t* taken = memory + at;
      at += round_up(num_bytes);
      return taken;
    };
    queries = take(num_rows * A::query_bytes(head_dim));
    out = reinterpret_cast<float*>(take(size_t(4) * num_rows * head_dim));
    sums = reinterpret_cast<F*>(take(num_rows * sizeof(F)));
    maxima = reinterpret_cast<float*>(take(size_t(4) * num_rows));
    scores = reinterpret_cast<float*>(take(size_t(4) * A::kMaxRows * kTileKeys));
    weights = take(A::kMaxRows * A::weight_bytes());
    gathered = take(2 * kTileGranules * 2 * task.layout.granule_bytes);
    return at;
  }
};

// One KV head of a piece.
template <class A>
class HeadOfPiece {
 public:
  HeadOfPiece(const AttentionTask& task, const AttentionPiece& piece, int head, Rows<A>& rows)
      : task_(task), piece_(piece), head_(head), rows_(rows) {
    const int32_t* starts = task.step.query_starts + piece.request;
    context_ = task.step.context_lengths[piece.request];
    first_token_ = starts[0] + piece.first_query;
    num_queries_ = piece.end_query - piece.first_query;
    first_position_ = context_ - (starts[1] - starts[0]) + piece.first_query;
    table_ = task.step.block_tables + size_t(piece.request) * task.step.table_stride;
  }

  // `next`: whose first tile is fetched while the last one of this is computed, or null.
  void compute(const HeadOfPiece* next) {
    prepare();
    const int end_tile = (first_position_ + num_queries_ - 1) / kTileKeys + 1;
    Tile tile;
    locate(first_tile(), tile.granules);
    for (int index = first_tile(); index < end_tile; ++index) {
      if (index + 1 < end_tile)
        locate(index + 1, tile.next);
      else if (next && task_.layout.granule == kGranuleKeys)
        next->locate(next->first_tile(), tile.next);
      else
        __builtin_memcpy(tile.next, tile.granules, sizeof tile.next);
      compute_tile(tile, index * kTileKeys);
      __builtin_memcpy(tile.granules, tile.next, sizeof tile.next);
    }
    finish();
  }

 private:
  int num_rows() const { return num_queries_ * task_.group; }

  int first_tile() const {
    const int window = task_.shape.window;
    return window && first_position_ >= window ? (first_position_ - window + 1) / kTileKeys : 0;
  }

  void prepare() {
    const AttentionShape& shape = task_.shape;
    const int head_dim = shape.head_dim;
    const size_t stride = size_t(shape.num_heads + 2 * shape.num_kv_heads) * head_dim;
    const size_t query_bytes = A::query_bytes(head_dim);
    const bool is_spread = shape.kv_kind == kv_int8;
    const float scale = shape.scale * kLog2E / float(is_spread ? spread_size(head_dim) : 1);
    float q[kMaxHeadDim];
    for (int row = 0; row < num_rows(); ++row) {
      const int token = first_token_ + row / task_.group;
      const size_t angles = size_t(task_.step.positions[token]) * (head_dim / 2);
      const size_t query_head = size_t(head_) * task_.group + row % task_.group;
      normalise(task_.qkv + token * stride + query_head * head_dim, task_.q_norm, shape.norm_eps, head_dim, q);
      rotate(q, task_.cos + angles, task_.sin + angles, head_dim, scale);
      if (is_spread) spread(q, head_dim);
      A::prepare(q, head_dim, rows_.queries + row * query_bytes);
      rows_.sums[row] = F{};
      rows_.maxima[row] = -__builtin_inff();
    }
    __builtin_memset(rows_.out, 0, size_t(4) * num_rows() * head_dim);
  }

  // Find a tile's granules. Those beyond the context are never computed with: any place does.
  void locate(int index, const uint8_t** granules) const {
    const KvLayout& layout = task_.layout;
    const int block_size = task_.step.block_size, shift = __builtin_ctz(block_size);
    if (layout.granule < kGranuleKeys) return gather(index, granules);
    for (int g = 0; g < kTileGranules; ++g) {
      int key = index * kTileKeys + g * kGranuleKeys;
      if (key >= context_) key = context_ - 1;
      granules[g] = task_.cache + size_t(table_[key >> shift]) * layout.block_bytes +
                    head_ * layout.head_bytes + (key & (block_size - 1)) / kGranuleKeys * layout.granule_bytes;
    }
  }

  // Blocks of 8: put two half granules together to one of 16.
  void gather(int index, const uint8_t** granules) const {
    const KvLayout& half = task_.layout;
    const size_t side = 2 * (half.values - half.keys);
    for (int g = 0; g < kTileGranules; ++g) {
      uint8_t* whole = rows_.gathered + (index % 2 * kTileGranules + g) * (2 * half.granule_bytes);
      granules[g] = whole;
      for (int part = 0; part < 2; ++part) {
        int key = index * kTileKeys + g * kGranuleKeys + part * 8;
        if (key >= context_) key = context_ - 1;
        const uint8_t* from =
            task_.cache + size_t(table_[key / 8]) * half.block_bytes + head_ * half.head_bytes;
        for (size_t word = 0; word < side / 64; ++word)
          __builtin_memcpy(whole + half.keys + word * 64 + part * 32, from + half.keys + word * 32, 32);
        __builtin_memcpy(whole + half.keys + side + part * (side / 2), from + half.values, side / 2);
        if (half.keys) {
          __builtin_memcpy(whole + part * 16, from, 16);
          __builtin_memcpy(whole + 32 + part * 16, from + 32, 16);
        }
      }
    }
  }

  // All rows that see something of the tile, some at a time.
  void compute_tile(const Tile& tile, int start) {
    const int window = task_.shape.window, last_key = start + kTileKeys - 1;
    int first_query = start > first_position_ ? start - first_position_ : 0, end_query = num_queries_;
    if (window && last_key + window - first_position_ < end_query)
      end_query = last_key + window - first_position_;
    const int first = first_query * task_.group, num = end_query * task_.group - first;
    const int num_parts = (num + A::kMaxRows - 1) / A::kMaxRows;
    scales_ = typename A::Scales(tile);
    for (int part = 0; part < num_parts; ++part)
      compute_rows(tile, start, first + num * part / num_parts, first + num * (part + 1) / num_parts);
  }

  void compute_rows(const Tile& tile, int start, int first, int end) {
    static_assert(A::kMaxRows <= 6);
    switch (end - first) {
      case 1: return rows_of_tile<1>(tile, start, first);
      case 2: return rows_of_tile<2>(tile, start, first);
      case 3: return rows_of_tile<3>(tile, start, first);
      case 4: return rows_of_tile<A::kMaxRows < 4 ? A::kMaxRows : 4>(tile, start, first);
      case 5: return rows_of_tile<A::kMaxRows < 5 ? A::kMaxRows : 5>(tile, start, first);
      default: return rows_of_tile<A::kMaxRows < 6 ? A::kMaxRows : 6>(tile, start, first);
    }
  }

  template <int R>
  void rows_of_tile(const Tile& tile, int start, int first) {
    const int head_dim = task_.shape.head_dim;
    const KvLayout layout = whole_granules();
    A::template score<R>(rows_.queries + first * A::query_bytes(head_dim), head_dim, layout, tile, scales_,
                         rows_.scores);
    // Positions grow with rows.
    const Visible visible_to_first = visible(first, start), visible_to_last = visible(first + R - 1, start);
    alignas(64) float factors[16];
    if (visible_to_first.end >= kTileKeys && visible_to_last.first <= 0)
      soften<R, true>(start, first, factors);
    else
      soften<R, false>(start, first, factors);
    const int num_keys = visible_to_last.end < kTileKeys ? visible_to_last.end : kTileKeys;
    A::template add_values<R>(rows_.weights, head_dim, num_keys, layout, tile, factors,
                              rows_.out + size_t(first) * head_dim);
  }

  // Which of the tile's keys a row sees.
  Visible visible(int row, int start) const {
    const int end = first_position_ + row / task_.group + 1 - start;
    return {task_.shape.window ? end - task_.shape.window : 0, end};
  }

  // Scores become weights. `factors` [16]: what a row's sums so far are multiplied by, and, from kTileFactors on, the
  // weights, which with A::kScalesTiles are relative to the tile's own largest score.
  template <int R, bool kIsAll>
  void soften(int start, int first, float* factors) {
    constexpr int kVectors = kTileKeys / kLanes;
    Visible seen[R];
    if (!kIsAll)
      for (int r = 0; r < R; ++r) seen[r] = visible(first + r, start);
    F highest[R];
    for (int r = 0; r < R; ++r) {
      highest[r] = splat(-__builtin_inff());
      for (int v = 0; v < kVectors; ++v) {
        float* at = rows_.scores + r * kTileKeys + v * kLanes;
        F score = load(at);
        if (!kIsAll) store(at, score = select(seen[r].lanes(v * kLanes), score, splat(-__builtin_inff())));
        highest[r] = larger(highest[r], score);
      }
    }
    alignas(64) float tops[R + kLanes], references[R];
    reduce_max<R>(highest, tops);
    for (int i = 0; i < 16; ++i) factors[i] = 0.0f;
    for (int r = 0; r < R; ++r) {
      float& maximum = rows_.maxima[first + r];
      const float now = tops[r] > maximum ? tops[r] : maximum;
      factors[r] = maximum - now;
      factors[kTileFactors + r] = tops[r] - now;
      references[r] = A::kScalesTiles ? tops[r] : now;
      maximum = now;
    }
    for (int i = 0; i < 16; i += kLanes) store(factors + i, exp2_of(load(factors + i)));
    for (int r = 0; r < R; ++r) {
      F p[kVectors];
      for (int v = 0; v < kVectors; ++v)
        p[v] = A::exp2(load(rows_.scores + r * kTileKeys + v * kLanes) - splat(references[r]));
      const F sum = A::template weigh<kIsAll>(p, scales_, seen[r], rows_.weights + r * A::weight_bytes());
      F& sums = rows_.sums[first + r];
      sums = FusedAdd(sums, splat(factors[r]), A::kScalesTiles ? sum * splat(factors[kTileFactors + r]) : sum);
    }
  }

  // The layout of the tile's granules: gathered ones are twice those of the cache.
  KvLayout whole_granules() const {
    KvLayout layout = task_.layout;
    if (layout.granule < kGranuleKeys) layout.values = layout.keys + 2 * (layout.values - layout.keys);
    return layout;
  }

  void finish() {
    const int head_dim = task_.shape.head_dim;
    for (int row = 0; row < num_rows(); ++row) {
      const int token = first_token_ + row / task_.group;
      const size_t query_head = size_t(head_) * task_.group + row % task_.group;
      float* out = task_.out + size_t(token) * task_.out_stride + query_head * head_dim;
      const float* from = rows_.out + size_t(row) * head_dim;
      const F factor = splat(1.0f / reduce_add(rows_.sums[row]));
      // Plus 0: a sum of nothing but zeros has one sign, whichever of them were left out.
      for (int d = 0; d < head_dim; d += kLanes) store(out + d, load(from + d) * factor + F{});
    }
  }

  const AttentionTask& task_;
  const AttentionPiece& piece_;
  const int head_;
  Rows<A>& rows_;
  typename A::Scales scales_;  // of the tile being computed
  int context_, first_token_, num_queries_, first_position_;
  const int32_t* table_;
};

template <class A>
void attend_piece(const AttentionTask& task, const AttentionPiece& piece, const AttentionPiece* next_piece,
                  uint8_t* scratch) {
  Rows<A> rows;
  rows.cut(task, (piece.end_query - piece.first_query) * task.group, scratch);
  for (int head = piece.first_head; head < piece.end_head; ++head) {
    HeadOfPiece<A> current(task, piece, head, rows);
    if (head + 1 < piece.end_head) {
      const HeadOfPiece<A> next(task, piece, head + 1, rows);
      current.compute(&next);
    } else if (next_piece) {
      const HeadOfPiece<A> next(task, *next_piece, next_piece->first_head, rows);
      current.compute(&next);
    } else {
      current.compute(nullptr);
    }
  }
}

void exp2_for_tests(const float* x, float* y, int count) {
  for (int i = 0; i < count; i += kLanes) {
    float lanes[kLanes] = {};
    const int num = count - i < kLanes ? count - i : kLanes;
    __builtin_memcpy(lanes, x + i, size_t(4) * num);
    store(lanes, exp2_of(load(lanes)));
    __builtin_memcpy(y + i, lanes, size_t(4) * num);
  }
}
