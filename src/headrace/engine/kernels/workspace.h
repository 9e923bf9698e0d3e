// Memory between the phases of a block, reused by all layers and steps: fresh pages would cost more time than
// the work in them. Grows to the largest step seen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace headrace {

// Uninitialised memory that grows.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `size` elements, on a cache line; what was there is lost if it grows. Throws std::bad_alloc.
  T* take(size_t size) {
    if (size > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t num_bytes = (size * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, num_bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

struct Workspace {
  Buffer<int8_t> bytes;
  Buffer<float> scales, wide, narrow, attended;
  Buffer<int32_t> offsets;
};

}  // namespace headrace
