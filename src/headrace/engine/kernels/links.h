// Meetings of ranks on several hosts: each sends what it made of some rows, and receives what the others made.
//
// One TCP connection to each other rank, connected, known to be a rank's, and of no other use. Every message is a
// header and one rank's part of one meeting. Must not know what is computed, or how connections are made.
#pragma once

#include <cstdint>

#include "ranks.h"

namespace headrace {

struct Links;

// Send this rank's part of `cut` to all others and fill in theirs. Throws RanksApart.
void exchange(Links& links, const Cut& cut);

// The first rank that has not sent its part of the last exchange, or not taken ours; -1: none.
int missing(const Links& links);

}  // namespace headrace
