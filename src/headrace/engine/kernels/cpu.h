// Which instructions this processor has. Decides at run time, so that one library runs on every machine.
//
// Code for an instruction set lies in a file of its own that includes its headers first, then says
// `#pragma GCC target(...)`, and keeps everything it defines in an anonymous namespace: a template compiled
// twice under one name would be merged by the linker, perhaps into the one that this machine cannot run.
#pragma once

namespace headrace {

enum class Isa { portable = 0, avx2 = 1, avx512_vnni = 2 };

// The best that this processor and its operating system have, or less after `limit_isa`.
Isa best_isa();

// Use no more than `isa` from now on (for tests). Not while another thread computes.
void limit_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace headrace
