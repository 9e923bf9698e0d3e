#include "cpu.h"

#include <algorithm>

#include "export.h"

namespace headrace {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    return Isa::avx512_vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

// The one piece of state that is not passed in: a fact of the machine.
Isa detected = detect();
Isa limit = Isa::avx512_vnni;

}  // namespace

Isa best_isa() { return std::min(detected, limit); }

void limit_isa(Isa isa) { limit = isa; }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_vnni: return "avx512-vnni";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace headrace

HEADRACE_EXPORT const char* headrace_isa() { return headrace::isa_name(headrace::best_isa()); }

// 0 portable, 1 AVX2, 2 AVX-512 VNNI; what the processor lacks stays unused.
HEADRACE_EXPORT void headrace_limit_isa(int isa) { headrace::limit_isa(static_cast<headrace::Isa>(isa)); }

// A digest of the sources this library was built from: tells a stale build in a source tree.
HEADRACE_EXPORT const char* headrace_sources() { return HEADRACE_SOURCES; }
