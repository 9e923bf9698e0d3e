// The kernels in plain C++, for every other processor; and the choice between all of them.
#include "cpu.h"
#include "matrix.h"

namespace headrace {
namespace {

#include "lanes.h"
#include "rows.h"
#include "pass.h"

template <int N>
void accumulate(const Pass& pass, Integers (*sums)[2]) {
  for (int i = 0; i < N; ++i) {
    int32_t totals[kPanelChannels] = {};
    const uint8_t* w = pass.panel;
    const int8_t* row = pass.x + i * pass.stride;
    for (int k = 0; k < pass.depth; ++k, w += kPanelChannels * kDepth, row += kDepth)
      for (int channel = 0; channel < kPanelChannels; ++channel)
        for (int j = 0; j < kDepth; ++j) totals[channel] += w[channel * kDepth + j] * row[j];
    for (int channel = 0; channel < kPanelChannels; ++channel)
      sums[i][channel / kLanes][channel % kLanes] = pass.offsets[i] + totals[channel];
  }
}

HEADRACE_INLINE void store_past_caches(float* to, Floats v) { store(to, v); }

HEADRACE_INLINE void finish_stores() {}

#include "panel.h"

}  // namespace

const Kernels kPortableKernels = make_kernels();

const Kernels& kernels() {
#if defined(__x86_64__)
  if (best_isa() == Isa::avx512_vnni) return kAvx512Kernels;
  if (best_isa() == Isa::avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace headrace
