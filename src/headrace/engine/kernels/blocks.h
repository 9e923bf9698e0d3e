// The fused operations of a decoder: embed, one attention block, one MLP block, head. One call each.
//
// Activations between them are float32 rows [T, hidden_size]. Everything but the integer products is float32
// in a fixed order per row: a row's result is the same bits whatever else is in the step, and however many ranks
// compute it. `part` is null where one process computes alone; else each rank has some rows of every matrix, and
// a block throws RanksApart where another rank was lost.
#pragma once

#include "attention.h"
#include "matrix.h"
#include "ranks.h"
#include "team.h"
#include "workspace.h"

namespace headrace {

// Pointers to packed weights, which stay the caller's. Norm weights are [n] or null where a model has none.
struct AttentionBlock {
  const float* norm;
  Matrix qkv;  // [(H + 2K) * D, hidden_size]; H and K are this rank's
  const float* q_norm;
  const float* k_norm;
  Matrix o;  // [hidden_size, H * D]: this rank's rows, all ranks' H
  const float* post_norm;
  const float* cos;  // [max_position, D / 2]
  const float* sin;
  AttentionShape shape;
};

struct MlpBlock {
  const float* norm;
  Matrix gate_up;  // [2 * intermediate_size, hidden_size]: 16 channels of gate, 16 of up, in turn; this rank's rows
  Matrix down;     // [hidden_size, intermediate_size]: this rank's rows
  const float* post_norm;
  float norm_eps;
  int32_t is_gelu;
};

// x [T, hidden_size] += o(attention(qkv(norm(x)))); keys and values go into `cache`.
void attention_block(Team& team, Workspace& workspace, const AttentionBlock& block, const AttentionStep& step,
                     void* cache, float* x, RankPart* part);

// x [num_rows, hidden_size] += down(activation(gate(norm(x))) * up(norm(x)))
void mlp_block(Team& team, Workspace& workspace, const MlpBlock& block, int num_rows, float* x,
               RankPart* part);

// logits [num_rows, matrix.out_features] = head(norm(x)), rows `stride` apart. Ranks meet elsewhere.
void head(Team& team, Workspace& workspace, const float* norm, float norm_eps, const Matrix& matrix,
          int num_rows, const float* x, float* logits, int64_t stride);

// out [num_rows, out_features] = matrix * x, with x quantised
void linear(Team& team, Workspace& workspace, const Matrix& matrix, int num_rows, const float* x, float* out);

// x [num_rows, in_features] = factor * rows `indices` - first of the matrix; what is not in it stays as it is.
void embed(Team& team, const Matrix& matrix, const int32_t* indices, int first, int num_rows, float factor,
           float* x);

}  // namespace headrace
