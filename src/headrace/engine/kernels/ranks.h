// How the processes that compute one model together wait for each other: meetings and commands in shared memory.
//
// Memory of zeros is a valid beginning. Nothing here is undone: when a rank is lost, all of it is thrown away.
// Every wait spins for a moment, then sleeps in the kernel, and ends by a limit. Must not know what is computed.
#pragma once

#include <atomic>
#include <cstdint>

namespace headrace {

constexpr int kMaxRanks = 64;

// A number that only rises, written by one process. On cache lines of its own: others spin on it.
struct alignas(128) Rising {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> num_asleep;
};

struct SharedState {
  alignas(128) std::atomic<uint32_t> is_broken;
  Rising command;             // number of the last command of rank 0
  Rising arrived[kMaxRanks];  // meetings that each rank came to
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "processes share these");

// What the library's functions return; 1 is theirs: memory ran out.
enum class Wait : int32_t { done = 0, broken = 2, too_long = 3 };

// One rank's place among all. The fields of operations/kernel_structures.py.
struct RankPart {
  SharedState* state;
  const int32_t* watched;  // sockets whose other end closes when a rank ends
  int32_t num_watched;
  int32_t rank, num_ranks;
  int32_t limit_ms;  // longest wait for another rank in a meeting
  int32_t spin_us;   // how long this rank looks for another before it sleeps; follows what was worth it
  // Rows that all ranks make together, and the first column that is this rank's: [T, o.in_features],
  // [T, down.in_features] and [T, hidden_size].
  float *attended, *inner, *output;
  int32_t first_attended, first_inner, first_output;
};

// Thrown where a meeting failed.
struct RanksApart {
  Wait why;
};

// Return when every rank has come to its next meeting: what they wrote before is then seen. Throws RanksApart.
void meet(RankPart& part);

}  // namespace headrace
