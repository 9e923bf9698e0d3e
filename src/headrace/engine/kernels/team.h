// The threads of one engine's step. Thread 0 is the caller; the others wait for jobs.
//
// A job is `count` pieces that any thread may take, so a worker whose core was given to somebody else costs
// at most the piece it holds: a job never waits for a worker that has not joined it. Workers look for the
// next job for some microseconds, then sleep. What a piece computes must not depend on who computes it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

class Team {
 public:
  // `num_threads` >= 1 in all, the caller included.
  explicit Team(int num_threads);
  // No job may be running.
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Whether this process is a child of the one that has the threads.
  bool is_forked() const;

  // Call f(piece) for every piece of [0, count), each once, in any order; return when all are done.
  // One caller at a time, never from inside a piece. After a fork the child computes alone.
  template <typename F>
  void parallel_for(int count, const F& f) {
    if (count <= 0) return;
    if (count == 1 || workers_.empty() || is_forked()) {
      for (int piece = 0; piece < count; ++piece) f(piece);
      return;
    }
    run([](const void* context, int piece) { (*static_cast<const F*>(context))(piece); }, &f, count);
  }

 private:
  using Piece = void (*)(const void* context, int piece);

  void run(Piece piece, const void* context, int count);
  void take_pieces();
  void work();
  bool join(uint32_t* last_job);
  void leave();
  void sleep_until_called(uint32_t last_job);

  // state_: job number << 32 | is_open << 16 | workers inside. A worker joins only while the job is open, and
  // the caller closes it before it returns: so nobody reads a job's fields after its end.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> next_{0};
  alignas(64) Piece piece_ = nullptr;
  const void* context_ = nullptr;
  int count_ = 0;
  std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_caller_asleep_{false};
  std::atomic<bool> is_stopping_{false};
  std::mutex mutex_;
  std::condition_variable called_, finished_;
  int64_t owner_;
  std::vector<std::thread> workers_;
};

}  // namespace headrace
