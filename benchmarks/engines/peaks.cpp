// What this machine can do at best: bytes read from memory, and int8 multiply-adds, per second, by a number of
// threads. Prints one line of JSON. Compiled for the machine that it runs on, each time (`peaks.py`).
// Shares nothing with the engine's kernels: a limit that they set themselves would flatter them.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <immintrin.h>
#include <thread>
#include <vector>

static const size_t STREAM_BYTES = size_t(256) << 20;  // many times any cache
static const int REPEATS = 15;                         // the best of them counts
static const int64_t ROUNDS = 4'000'000;               // of eight independent multiply-adds
static volatile int64_t sink;                          // keeps results from being thrown away

static double seconds(const std::function<void(int)>& work, int threads) {
    std::atomic<int> ready{0};
    std::vector<std::chrono::steady_clock::time_point> begins(threads), ends(threads);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++)
        team.emplace_back([&, t] {
            for (ready++; ready < threads;) {}
            begins[t] = std::chrono::steady_clock::now();
            work(t);
            ends[t] = std::chrono::steady_clock::now();
        });
    for (auto& thread : team) thread.join();
    const auto begin = *std::min_element(begins.begin(), begins.end());
    return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - begin).count();
}

static double best_seconds(const std::function<void(int)>& work, int threads) {
    double best = 1e9;
    for (int repeat = 0; repeat < REPEATS; repeat++) best = std::min(best, seconds(work, threads));
    return best;
}

#if defined(__AVX512F__)
using Lane = __m512i;
static Lane join(Lane a, Lane b) { return _mm512_or_si512(a, b); }
static Lane set(int value) { return _mm512_set1_epi8(char(value)); }
#elif defined(__AVX2__)
using Lane = __m256i;
static Lane join(Lane a, Lane b) { return _mm256_or_si256(a, b); }
static Lane set(int value) { return _mm256_set1_epi8(char(value)); }
#else
#error "needs AVX2"
#endif

#if defined(__AVX512VNNI__)
static const char* INSTRUCTION = "AVX-512 VNNI";
static Lane multiply_add(Lane sum, Lane a, Lane b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX2__) && !defined(__AVX512F__)
static const char* INSTRUCTION = "AVX2";
static Lane multiply_add(Lane sum, Lane a, Lane b) {
    const Lane pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
static const char* INSTRUCTION = "";
static Lane multiply_add(Lane sum, Lane a, Lane) { return sum; }
#endif

static int64_t fold(Lane value) {
    int64_t words[sizeof(Lane) / 8], total = 0;
    __builtin_memcpy(words, &value, sizeof value);
    for (int64_t word : words) total += word;
    return total;
}

static void read_part(const Lane* from, size_t count) {
    Lane a = set(0), b = a, c = a, d = a;
    for (size_t i = 0; i < count; i += 4) {
        a = join(a, from[i]), b = join(b, from[i + 1]), c = join(c, from[i + 2]), d = join(d, from[i + 3]);
    }
    sink = fold(join(join(a, b), join(c, d)));
}

static void multiply() {
    Lane sums[8], a = set(1), b = set(2);
    for (auto& sum : sums) sum = set(0);
    for (int64_t round = 0; round < ROUNDS; round++) {
        for (auto& sum : sums) sum = multiply_add(sum, a, b);
        asm volatile("" : "+x"(a), "+x"(b));
    }
    for (auto& sum : sums) sink = fold(sum);
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    auto* memory = static_cast<char*>(std::aligned_alloc(4096, STREAM_BYTES));
    for (size_t i = 0; i < STREAM_BYTES; i += 64) memory[i] = 1;
    const size_t count = STREAM_BYTES / sizeof(Lane) / threads / 4 * 4;
    const auto* lanes = reinterpret_cast<const Lane*>(memory);
    const double read_s = best_seconds([&](int t) { read_part(lanes + t * count, count); }, threads);
    const double multiply_s = best_seconds([](int) { multiply(); }, threads);
    const double bytes = double(count) * sizeof(Lane) * threads;
    const double operations = 2.0 * ROUNDS * 8 * sizeof(Lane) * threads;
    std::printf("{\"read_bytes_per_s\": %.6g, \"int8_operations_per_s\": %.6g, \"instruction\": \"%s\"}\n",
                bytes / read_s, *INSTRUCTION ? operations / multiply_s : 0.0, INSTRUCTION);
    return 0;
}
