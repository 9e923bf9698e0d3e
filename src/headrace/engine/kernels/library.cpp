// The C functions that `operations/int8.py` calls. Each returns 0, 1 where memory ran out, 2 where a rank was
// lost, or 3 where one did not come in time.
#include <exception>

#include "blocks.h"
#include "export.h"

using namespace headrace;

namespace {

template <typename F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const RanksApart& apart) {
    return static_cast<int>(apart.why);
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace

HEADRACE_EXPORT void* headrace_workspace_new() { return new (std::nothrow) Workspace; }

HEADRACE_EXPORT void headrace_workspace_free(void* workspace) { delete static_cast<Workspace*>(workspace); }

HEADRACE_EXPORT int headrace_attention_block(Team* team, Workspace* workspace, const AttentionBlock* block,
                                             const AttentionStep* step, void* cache, float* x,
                                             RankPart* part) {
  return guarded([&] { attention_block(*team, *workspace, *block, *step, cache, x, part); });
}

HEADRACE_EXPORT int headrace_mlp_block(Team* team, Workspace* workspace, const MlpBlock* block, int num_rows,
                                       float* x, RankPart* part) {
  return guarded([&] { mlp_block(*team, *workspace, *block, num_rows, x, part); });
}

HEADRACE_EXPORT int headrace_head(Team* team, Workspace* workspace, const float* norm, float norm_eps,
                                  const Matrix* matrix, int num_rows, const float* x, float* logits,
                                  int64_t stride) {
  return guarded([&] { head(*team, *workspace, norm, norm_eps, *matrix, num_rows, x, logits, stride); });
}

HEADRACE_EXPORT void headrace_embed(Team* team, const Matrix* matrix, const int32_t* indices, int first,
                                    int num_rows, float factor, float* x) {
  embed(*team, *matrix, indices, first, num_rows, factor, x);
}

// weight [out_features, in_features] -> to [panels, in_features / 4, 32, 4], scale [panels * 32]
HEADRACE_EXPORT void headrace_pack(Team* team, const float* weight, int in_features, int out_features,
                                   uint8_t* to, float* scale) {
  const int num_panels = Matrix{nullptr, nullptr, in_features, out_features}.num_panels();
  team->parallel_for(num_panels, [&](int panel) {
    kernels().pack(weight, in_features, out_features, panel, to, scale);
  });
}

// out [num_rows, out_features] = matrix * x, for tests and benchmarks of the multiplication alone.
HEADRACE_EXPORT int headrace_multiply(Team* team, Workspace* workspace, const Matrix* matrix, int num_rows,
                                      const float* x, float* out) {
  return guarded([&] { linear(*team, *workspace, *matrix, num_rows, x, out); });
}
