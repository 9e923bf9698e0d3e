// An int8 matrix and what multiplies it: the layouts that packing, multiplication and look-up share.
//
// Weights are [out_features, in_features], symmetric with one scale per output channel; activations symmetric
// with one scale per row. Products are summed in int32, exactly: whatever order, instructions or batch.
// Before quantising, both sides are rotated by the same orthogonal matrix (Hadamard blocks along in_features,
// arXiv:2404.00456), which changes no product and spreads outliers over a block.
#pragma once

#include <cstdint>

namespace headrace {

constexpr int kPanelChannels = 32;
constexpr int kDepth = 4;          // products that one instruction sums
constexpr int kMaxRows = 12;       // rows that are multiplied with a panel at once
constexpr int kMaxFeatures = 65536;  // 255 * 127 * in_features stays below 2^31

// Panels of 32 output channels, each [in_features / 4][32 channels][4]; bytes are weight + 128, as the first
// operand of the multiplication has no sign. Channels beyond out_features are zeros.
struct Matrix {
  const uint8_t* weight;
  const float* scale;  // [out_features rounded up to panels]
  int32_t in_features;   // a multiple of 16, at most kMaxFeatures
  int32_t out_features;

  int num_panels() const { return (out_features + kPanelChannels - 1) / kPanelChannels; }
};

// Rows of activations.
struct Rows {
  int8_t* values;    // [num_rows, in_features]
  float* scales;     // [num_rows]; NaN where a row held NaN or infinity
  int32_t* offsets;  // [num_rows]: -128 * sum(values), undoes the +128 of the weights
  int32_t num_rows;
};

enum class Epilogue : int32_t {
  store = 0,       // out = product
  stream = 1,      // the same past the caches, for outputs larger than they are
  add = 2,         // out += product
  gated_silu = 3,  // panels are 16 gate and 16 up channels: out[16 per panel] = silu(gate) * up
  gated_gelu = 4,
};

struct Product {
  Matrix matrix;
  Rows rows;
  Epilogue epilogue;
  float* out;  // [num_rows, out_stride]
  int64_t out_stride;

  // A panel is multiplied with blocks of rows: these are the pieces of work, panel after panel.
  int num_blocks() const { return (rows.num_rows + kMaxRows - 1) / kMaxRows; }
  int num_pieces() const { return matrix.num_panels() * num_blocks(); }
};

// Size of the rotation's blocks: the largest power of two that divides in_features, from 16 to 512.
constexpr int rotation_size(int in_features) {
  const int size = in_features & -in_features;
  return size > 512 ? 512 : size;
}

// What each instruction set implements; a row is one token's.
struct Kernels {
  // y = x / rms(x) * weight, rotated and quantised into row `row` of `to`.
  void (*normalize)(const float* x, const float* weight, float eps, int n, const Rows& to, int row);
  void (*quantize)(const float* x, int n, const Rows& to, int row);
  // x += y / rms(y) * weight
  void (*add_normalized)(float* x, const float* y, const float* weight, float eps, int n);
  void (*multiply)(const Product& product, int piece);
  // out = factor * row `index` of the matrix, as it was before the rotation.
  void (*look_up)(const Matrix& matrix, int index, float factor, float* out);
  // Quantise panel `panel` of `weight` [out_features, in_features] into `to` and `scale` (the whole matrix').
  void (*pack)(const float* weight, int in_features, int out_features, int panel, uint8_t* to, float* scale);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The fastest that this processor has.
const Kernels& kernels();

}  // namespace headrace
