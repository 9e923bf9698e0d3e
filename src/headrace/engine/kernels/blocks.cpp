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

// The residual stream, and what becomes of a block's result before it is added.
struct Residual {
  float* x;  // [num_rows, features]; each rank has its own, of the same bits
  int features;
  const float* post_norm;  // or null
  float eps;
};

// x += matrix * rows, or x += norm(matrix * rows) where there is a norm after the block.
void add_to_residual(Team& team, Workspace& workspace, const Matrix& matrix, const Rows& rows,
                     const Residual& to, RankPart* part) {
  const int features = to.features;
  if (part == nullptr && to.post_norm == nullptr) {
    multiply(team, matrix, rows, Epilogue::add, to.x, features);
    return;
  }
  const size_t size = static_cast<size_t>(rows.num_rows) * static_cast<size_t>(features);
  float* y = part != nullptr ? part->output : workspace.narrow.take(size);
  multiply(team, matrix, rows, Epilogue::store, y + (part != nullptr ? part->first_output : 0), features);
  if (part != nullptr) meet(*part, y, rows.num_rows, features, part->output_starts);
  for_rows(team, rows.num_rows, [&](int row) {
    float* x = to.x + static_cast<int64_t>(row) * features;
    const float* added = y + static_cast<int64_t>(row) * features;
    if (to.post_norm != nullptr) {
      kernels().add_normalized(x, added, to.post_norm, to.eps, features);
    } else {
      for (int i = 0; i < features; ++i) x[i] += added[i];
    }
  });
}

}  // namespace

void attention_block(Team& team, Workspace& workspace, const AttentionBlock& block, const AttentionStep& step,
                     void* cache, float* x, RankPart* part) {
  const int num_rows = step.num_tokens;
  const size_t size = static_cast<size_t>(num_rows);
  const float eps = block.shape.norm_eps;
  const int width = block.o.in_features;
  const Rows normed = normalize(team, workspace, x, block.norm, eps, block.qkv.in_features, num_rows);
  float* qkv = workspace.wide.take(size * static_cast<size_t>(block.qkv.out_features));
  multiply(team, block.qkv, normed, Epilogue::store, qkv, block.qkv.out_features);
  float* attended =
      part != nullptr ? part->attended : workspace.attended.take(size * static_cast<size_t>(width));
  attention(team, block.shape, step, qkv, block.q_norm, block.k_norm, block.cos, block.sin, cache,
            attended + (part != nullptr ? part->first_attended : 0), width);
  if (part != nullptr) meet(*part, attended, num_rows, width, part->attended_starts);
  const Rows rows = quantize(team, workspace, attended, width, num_rows);
  add_to_residual(team, workspace, block.o, rows, {x, block.qkv.in_features, block.post_norm, eps}, part);
}

void mlp_block(Team& team, Workspace& workspace, const MlpBlock& block, int num_rows, float* x,
               RankPart* part) {
  const Rows normed =
      normalize(team, workspace, x, block.norm, block.norm_eps, block.gate_up.in_features, num_rows);
  const int width = block.down.in_features;
  const size_t size = static_cast<size_t>(num_rows) * static_cast<size_t>(width);
  float* inner = part != nullptr ? part->inner : workspace.wide.take(size);
  const Epilogue epilogue = block.is_gelu ? Epilogue::gated_gelu : Epilogue::gated_silu;
  multiply(team, block.gate_up, normed, epilogue, inner + (part != nullptr ? part->first_inner : 0), width);
  if (part != nullptr) meet(*part, inner, num_rows, width, part->inner_starts);
  const Rows rows = quantize(team, workspace, inner, width, num_rows);
  const Residual residual{x, block.gate_up.in_features, block.post_norm, block.norm_eps};
  add_to_residual(team, workspace, block.down, rows, residual, part);
}

void head(Team& team, Workspace& workspace, const float* norm, float norm_eps, const Matrix& matrix,
          int num_rows, const float* x, float* logits, int64_t stride) {
  const Rows rows = normalize(team, workspace, x, norm, norm_eps, matrix.in_features, num_rows);
  multiply(team, matrix, rows, Epilogue::stream, logits, stride);
}

void linear(Team& team, Workspace& workspace, const Matrix& matrix, int num_rows, const float* x, float* out) {
  const Rows rows = quantize(team, workspace, x, matrix.in_features, num_rows);
  multiply(team, matrix, rows, Epilogue::store, out, matrix.out_features);
}

void embed(Team& team, const Matrix& matrix, const int32_t* indices, int first, int num_rows, float factor,
           float* x) {
  for_rows(team, num_rows, [&](int row) {
    const int index = indices[row] - first;
    if (index < 0 || index >= matrix.out_features) return;
    kernels().look_up(matrix, index, factor, x + static_cast<int64_t>(row) * matrix.in_features);
  });
}

}  // namespace headrace
