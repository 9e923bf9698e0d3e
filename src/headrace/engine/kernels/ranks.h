// How the processes that compute one model together wait for each other: meetings and commands in shared memory.
//
// Memory of zeros is a valid beginning. Nothing here is undone: when a rank is lost, all of it is thrown away.
// Every wait spins for a moment, then sleeps in the kernel, and ends by a limit. Must not know what is computed.
#pragma once

#include <atomic>
#include <cstdint>

namespace headrace {

struct Links;

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
  // Where ranks are on several hosts: how to reach them, and the first column of every rank, and the width behind
  // the last; else null.
  Links* links;
  const int32_t *attended_starts, *inner_starts, *output_starts;
};

// Rows of which each rank made a part: its columns of all rows (`starts`, in units of unit_bytes), or all of the
// rows that are its (`owners`, one rank per row).
struct Cut {
  char* rows;
  int32_t num_rows;
  int64_t row_bytes;
  const int32_t* starts;
  int32_t unit_bytes;
  const int32_t* owners;
};

// Thrown where a meeting failed.
struct RanksApart {
  Wait why;
};

// Return when every rank has come to its next meeting: what they wrote before is then seen: in memory that all
// share, or, if they have links, in the rows of `cut`. Throws RanksApart.
void meet(RankPart& part, const Cut& cut);

// The same for rows [num_rows, width] of floats of which each rank made some columns.
inline void meet(RankPart& part, float* rows, int num_rows, int width, const int32_t* starts) {
  meet(part, {reinterpret_cast<char*>(rows), num_rows, static_cast<int64_t>(width) * 4, starts, 4, nullptr});
}

}  // namespace headrace
