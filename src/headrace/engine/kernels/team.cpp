#include "team.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "export.h"

namespace headrace {
namespace {

constexpr uint64_t kOpen = 1u << 16;
constexpr uint64_t kInside = kOpen - 1;
// Longer than the gaps between the jobs of a step, shorter than a time slice.
constexpr std::chrono::microseconds kWorkerSpin{100};
constexpr std::chrono::microseconds kCallerSpin{50};

// Counts forks in this process's line: a cheap way to know that the threads of a Team are not here.
std::atomic<int64_t> forks{0};

int64_t count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spin until `is_done` or for `limit`; returns whether it was done.
template <typename F>
bool spin(std::chrono::microseconds limit, const F& is_done) {
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (is_done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

uint32_t job_of(uint64_t state) { return static_cast<uint32_t>(state >> 32); }

}  // namespace

Team::Team(int num_threads) : owner_(count_forks()) {
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
}

Team::~Team() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  called_.notify_all();
  for (auto& worker : workers_) worker.join();
}

bool Team::is_forked() const { return forks.load(std::memory_order_relaxed) != owner_; }

void Team::run(Piece piece, const void* context, int count) {
  piece_ = piece;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t job = job_of(state_.load(std::memory_order_relaxed)) + 1u;
  state_.store((job & 0xffffffffu) << 32 | kOpen);
  if (num_asleep_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    called_.notify_all();
  }
  take_pieces();
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  const auto is_empty = [this] { return (state_.load(std::memory_order_acquire) & kInside) == 0; };
  if (spin(kCallerSpin, is_empty)) return;
  // A worker holds a piece and perhaps not its core: this one may be what it waits for.
  std::unique_lock<std::mutex> lock(mutex_);
  is_caller_asleep_ = true;
  finished_.wait(lock, [this] { return (state_.load() & kInside) == 0; });
  is_caller_asleep_ = false;
}

void Team::take_pieces() {
  const int count = count_;
  const int share = 2 * num_threads();
  int begin = next_.load(std::memory_order_relaxed);
  while (begin < count) {
    // Many at first, one by one at the end: neighbours read memory in order, and the counter rarely changes cores.
    const int end = begin + std::max(1, (count - begin) / share);
    if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    for (int piece = begin; piece < end; ++piece) piece_(context_, piece);
    begin = next_.load(std::memory_order_relaxed);
  }
}

bool Team::join(uint32_t* last_job) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while ((state & kOpen) && job_of(state) != *last_job) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      *last_job = job_of(state);
      return true;
    }
  }
  return false;
}

void Team::leave() {
  const uint64_t before = state_.fetch_sub(1);
  if ((before & kInside) == 1 && is_caller_asleep_.load()) {
    std::lock_guard<std::mutex> lock(mutex_);
    finished_.notify_one();
  }
}

void Team::work() {
  uint32_t last_job = 0;
  while (!is_stopping_.load(std::memory_order_relaxed)) {
    bool has_joined = false;
    spin(kWorkerSpin, [&] {
      has_joined = join(&last_job);
      return has_joined || is_stopping_.load(std::memory_order_relaxed);
    });
    if (has_joined) {
      take_pieces();
      leave();
    } else {
      sleep_until_called(last_job);
    }
  }
}

void Team::sleep_until_called(uint32_t last_job) {
  std::unique_lock<std::mutex> lock(mutex_);
  num_asleep_.fetch_add(1);  // before the look at state_: the caller stores state_, then looks at this
  called_.wait(lock, [&] {
    const uint64_t state = state_.load();
    return is_stopping_.load() || ((state & kOpen) && job_of(state) != last_job);
  });
  num_asleep_.fetch_sub(1);
}

}  // namespace headrace

HEADRACE_EXPORT void* headrace_team_start(int num_threads) {
  try {
    return new headrace::Team(num_threads);
  } catch (...) {  // the system gives no more threads
    return nullptr;
  }
}

HEADRACE_EXPORT void headrace_team_stop(void* team) {
  auto* mine = static_cast<headrace::Team*>(team);
  if (!mine->is_forked()) delete mine;  // a child has no threads to end: waiting for them would be for ever
}

// Adds 1 to each of `count` numbers, `rounds` times over: what the tests see of the team.
HEADRACE_EXPORT void headrace_team_count(void* team, int32_t* numbers, int count, int rounds) {
  for (int round = 0; round < rounds; ++round)
    static_cast<headrace::Team*>(team)->parallel_for(count, [&](int piece) { numbers[piece] += 1; });
}
