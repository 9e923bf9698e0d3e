// The sampler's passes for any processor.
#include "sampling.h"

#define HEADRACE_VECTOR_BYTES 16

namespace headrace {
namespace {
#include "sampling_passes.h"
}  // namespace

const SamplingPasses sampling_passes_portable = {maxima, mass, pick, allow};

}  // namespace headrace
