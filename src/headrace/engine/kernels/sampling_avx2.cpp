// The sampler's passes for AVX2.
#include "sampling.h"

#if defined(__x86_64__)
#pragma GCC target("avx2")
#define HEADRACE_VECTOR_BYTES 32

namespace headrace {
namespace {
#include "sampling_passes.h"
}  // namespace

const SamplingPasses sampling_passes_avx2 = {maxima, mass, pick, allow};

}  // namespace headrace
#endif
