// One walk along in_features: some rows with the 32 channels of a panel. Include it after lanes.h.

constexpr int kLineBytes = 64;

// Weights that will be needed soon, to be fetched meanwhile.
struct Ahead {
  const uint8_t* from;
  int num_lines;
};

struct Pass {
  const uint8_t* panel;
  int depth;  // in_features / 4
  const int8_t* x;
  int64_t stride;
  const int32_t* offsets;  // of each row, what its sums begin with
  Ahead ahead;
};
