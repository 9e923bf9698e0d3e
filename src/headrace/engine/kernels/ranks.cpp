#include "ranks.h"

#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "export.h"
#include "links.h"

namespace headrace {
namespace {

using Clock = std::chrono::steady_clock;
// Ranks that have a core each come within some microseconds of each other: then spinning pays. Where they share
// one, whoever spins keeps the other from coming.
constexpr int32_t kMostSpinUs = 128, kLeastSpinUs = 2;
// Now and then it is tried again whether the other ranks have their cores back.
constexpr uint32_t kTryEvery = 64;
constexpr int32_t kTrySpinUs = 32;
// A sleeper looks up so often whether a rank was lost.
constexpr std::chrono::milliseconds kSlice{5};
constexpr int kMaxWatched = kMaxRanks;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

bool is_reached(const Rising& rising, uint32_t wanted) {
  return static_cast<int32_t>(rising.value.load(std::memory_order_acquire) - wanted) >= 0;
}

// Of another process, so none of the private variants.
void sleep_while(Rising& rising, uint32_t value, std::chrono::milliseconds longest) {
  const timespec limit{static_cast<time_t>(longest.count() / 1000),
                       static_cast<long>(longest.count() % 1000 * 1'000'000)};
  syscall(SYS_futex, &rising.value, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void wake_all(Rising& rising) { syscall(SYS_futex, &rising.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void raise_to(Rising& rising, uint32_t value) {
  rising.value.store(value);  // in one order with num_asleep: either this one sees the sleeper, or it the value
  if (rising.num_asleep.load() > 0) wake_all(rising);
}

void break_all(SharedState& state) {
  state.is_broken.store(1);
  wake_all(state.command);
  for (Rising& each : state.arrived) wake_all(each);
}

bool is_some_end_closed(const int32_t* watched, int num_watched) {
  pollfd ends[kMaxWatched];
  if (num_watched > kMaxWatched) num_watched = kMaxWatched;
  for (int i = 0; i < num_watched; ++i) ends[i] = {watched[i], 0, 0};  // hang-ups are told unasked
  return num_watched > 0 && poll(ends, static_cast<nfds_t>(num_watched), 0) > 0;
}

bool spin(const Rising& rising, uint32_t wanted, std::chrono::microseconds limit) {
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (is_reached(rising, wanted)) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

// What a waiter needs besides the number that it waits for.
struct Patience {
  std::chrono::microseconds spin;
  std::chrono::milliseconds limit, slice;
  const int32_t* watched;
  int num_watched;
};

Wait wait_for(SharedState& state, Rising& rising, uint32_t wanted, const Patience& patience) {
  const auto end = Clock::now() + patience.limit;
  if (spin(rising, wanted, patience.spin)) return Wait::done;
  while (true) {
    rising.num_asleep.fetch_add(1);
    const uint32_t seen = rising.value.load();
    const bool is_done = static_cast<int32_t>(seen - wanted) >= 0;
    if (!is_done && state.is_broken.load() == 0) sleep_while(rising, seen, patience.slice);
    rising.num_asleep.fetch_sub(1);
    if (is_done || is_reached(rising, wanted)) return Wait::done;
    if (is_some_end_closed(patience.watched, patience.num_watched)) break_all(state);
    if (state.is_broken.load() != 0) return Wait::broken;
    if (Clock::now() >= end) return Wait::too_long;
  }
}

}  // namespace

void meet(RankPart& part, const Cut& cut) {
  if (part.links != nullptr) return exchange(*part.links, cut);
  SharedState& state = *part.state;
  Rising& own = state.arrived[part.rank];
  const uint32_t meeting = own.value.load(std::memory_order_relaxed) + 1u;
  raise_to(own, meeting);
  if (meeting % kTryEvery == 0) part.spin_us = std::max(part.spin_us, kTrySpinUs);
  for (int rank = 0; rank < part.num_ranks; ++rank) {
    if (rank == part.rank) continue;
    Rising& other = state.arrived[rank];
    if (spin(other, meeting, std::chrono::microseconds{part.spin_us})) {
      part.spin_us = std::min(2 * part.spin_us, kMostSpinUs);
      continue;
    }
    part.spin_us = std::max(part.spin_us / 2, kLeastSpinUs);
    const Patience patience{std::chrono::microseconds{0}, std::chrono::milliseconds{part.limit_ms}, kSlice,
                            part.watched, part.num_watched};
    const Wait why = wait_for(state, other, meeting, patience);
    if (why != Wait::done) throw RanksApart{why};
  }
}

}  // namespace headrace

using namespace headrace;

HEADRACE_EXPORT size_t headrace_ranks_state_bytes() { return sizeof(SharedState); }

// 0: met; 2: a rank was lost; 3: one did not come within the limit.
HEADRACE_EXPORT int headrace_ranks_meet(RankPart* part, const Cut* cut) {
  try {
    meet(*part, *cut);
    return 0;
  } catch (const RanksApart& apart) {
    return static_cast<int>(apart.why);
  }
}

// The first rank that has come to fewer meetings than this one; -1: none.
HEADRACE_EXPORT int headrace_ranks_missing(const RankPart* part) {
  if (part->links != nullptr) return missing(*part->links);
  const uint32_t meeting = part->state->arrived[part->rank].value.load();
  for (int rank = 0; rank < part->num_ranks; ++rank)
    if (!is_reached(part->state->arrived[rank], meeting)) return rank;
  return -1;
}

// Rank 0: what was written before is command `number`.
HEADRACE_EXPORT void headrace_ranks_post(SharedState* state, uint32_t number) { raise_to(state->command, number); }

// Wait for command `number`: 0: it is there; 2: a rank was lost; 3: not within the limit.
HEADRACE_EXPORT int headrace_ranks_await(SharedState* state, uint32_t number, int spin_us, int limit_ms) {
  const std::chrono::milliseconds limit{limit_ms};
  const Patience patience{std::chrono::microseconds{spin_us}, limit, limit, nullptr, 0};
  return static_cast<int>(wait_for(*state, state->command, number, patience));
}

// Have every wait of every rank end, now and later.
HEADRACE_EXPORT void headrace_ranks_break(SharedState* state) { break_all(*state); }
