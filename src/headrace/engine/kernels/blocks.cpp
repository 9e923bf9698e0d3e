#include "blocks.h"

#include <algorithm>

namespace headrace {
namespace {

// Rows that one piece of work on single rows takes.
constexpr int kRowsPerPiece = 4;

template <typename F>
void for_rows(Team& team, int num_rows, const F& f) {
  team.parallel_for((num_rows + kRowsPerPiece - 1) / kRowsPerPiece, [&](int piece) {
    const int end = std::min(num_rows, (piece + 1) * kRowsPerPiece);
    for (int row = piece * kRowsPerPiece; row < end; ++row) f(row);
  });
}

Rows take_rows(Workspace& workspace, int num_rows, int features) {
  const size_t rows = static_cast<size_t>(num_rows);
  return {workspace.bytes.take(rows * static_cast<size_t>(features)), workspace.scales.take(rows),
          workspace.offsets.take(rows), num_rows};
}

Rows normalize(Team& team, Workspace& workspace, const float* x, const float* norm, float eps, int features,
               int num_rows) {
  const Rows rows = take_rows(workspace, num_rows, features);
  for_rows(team, num_rows, [&](int row) {
    kernels().normalize(x + static_cast<int64_t>(row) * features, norm, eps, features, rows, row);
  });
  return rows;
}

Rows quantize(Team& team, Workspace& workspace, const float* x, int features, int num_rows) {
  const Rows rows = take_rows(workspace, num_rows, features);
  for_rows(team, num_rows, [&](int row) {
    kernels().quantize(x + static_cast<int64_t>(row) * features, features, rows, row);
  });
  return rows;
}

void multiply(Team& team, const Matrix& matrix, const Rows& rows, Epilogue epilogue, float* out, int64_t stride) {
  const Product product{matrix, rows, epilogue, out, stride};
  const auto multiply_piece = kernels().multiply;
  team.parallel_for(product.num_pieces(), [&](int piece) { multiply_piece(product, piece); });
}

// x += matrix * rows, or x += norm(matrix * rows) where there is a norm after the block.
void add_to_residual(Team& team, Workspace& workspace, const Matrix& matrix, const Rows& rows,
                     const float* post_norm, float eps, float* x) {
  const int features = matrix.out_features;
  if (post_norm == nullptr) {
    multiply(team, matrix, rows, Epilogue::add, x, features);
    return;
  }
  float* y = workspace.narrow.take(static_cast<size_t>(rows.num_rows) * static_cast<size_t>(features));
  multiply(team, matrix, rows, Epilogue::store, y, features);
  for_rows(team, rows.num_rows, [&](int row) {
    const int64_t at = static_cast<int64_t>(row) * features;
    kernels().add_normalized(x + at, y + at, post_norm, eps, features);
  });
}

}  // namespace

void attention_block(Team& team, Workspace& workspace, const AttentionBlock& block, const AttentionStep& step,
                     void* cache, float* x) {
  const int num_rows = step.num_tokens;
  const size_t size = static_cast<size_t>(num_rows);
  const float eps = block.shape.norm_eps;
  const Rows normed = normalize(team, workspace, x, block.norm, eps, block.qkv.in_features, num_rows);
  float* qkv = workspace.wide.take(size * static_cast<size_t>(block.qkv.out_features));
  multiply(team, block.qkv, normed, Epilogue::store, qkv, block.qkv.out_features);
  float* attended = workspace.attended.take(size * static_cast<size_t>(block.o.in_features));
  attention(team, block.shape, step, qkv, block.q_norm, block.k_norm, block.cos, block.sin, cache, attended);
  const Rows rows = quantize(team, workspace, attended, block.o.in_features, num_rows);
  add_to_residual(team, workspace, block.o, rows, block.post_norm, eps, x);
}

void mlp_block(Team& team, Workspace& workspace, const MlpBlock& block, int num_rows, float* x) {
  const Rows normed =
      normalize(team, workspace, x, block.norm, block.norm_eps, block.gate_up.in_features, num_rows);
  const int width = block.down.in_features;
  float* inner = workspace.wide.take(static_cast<size_t>(num_rows) * static_cast<size_t>(width));
  const Epilogue epilogue = block.is_gelu ? Epilogue::gated_gelu : Epilogue::gated_silu;
  multiply(team, block.gate_up, normed, epilogue, inner, width);
  const Rows rows = quantize(team, workspace, inner, width, num_rows);
  add_to_residual(team, workspace, block.down, rows, block.post_norm, block.norm_eps, x);
}

void head(Team& team, Workspace& workspace, const float* norm, float norm_eps, const Matrix& matrix,
          int num_rows, const float* x, float* logits) {
  const Rows rows = normalize(team, workspace, x, norm, norm_eps, matrix.in_features, num_rows);
  multiply(team, matrix, rows, Epilogue::stream, logits, matrix.out_features);
}

void linear(Team& team, Workspace& workspace, const Matrix& matrix, int num_rows, const float* x, float* out) {
  const Rows rows = quantize(team, workspace, x, matrix.in_features, num_rows);
  multiply(team, matrix, rows, Epilogue::store, out, matrix.out_features);
}

void embed(Team& team, const Matrix& matrix, const int32_t* indices, int num_rows, float factor, float* x) {
  for_rows(team, num_rows, [&](int row) {
    kernels().look_up(matrix, indices[row], factor, x + static_cast<int64_t>(row) * matrix.in_features);
  });
}

}  // namespace headrace
