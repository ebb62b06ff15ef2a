// SPDX-License-Identifier: Apache-2.0
// An array that ends where an inaccessible page begins; another such page lies before it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace bitdecoding::emulation {

template <class T>
class GuardedArray {
 public:
  // All zero; a page takes no memory before it is written.
  explicit GuardedArray(std::size_t size) : size_(size) {
    const std::size_t page = page_bytes();
    mapped_bytes_ = (size * sizeof(T) + page - 1) / page * page + 2 * page;
    void* mapped = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<std::uint8_t*>(mapped);
    protect(PROT_READ | PROT_WRITE);
  }
  // A copy that cannot be written.
  template <class U>
  explicit GuardedArray(const std::vector<U>& values)
      : GuardedArray(values.size() * sizeof(U) / sizeof(T)) {
    std::memcpy(data(), values.data(), size_ * sizeof(T));
    protect(PROT_READ);
  }
  GuardedArray(GuardedArray&& other) noexcept
      : mapped_(std::exchange(other.mapped_, nullptr)),
        mapped_bytes_(other.mapped_bytes_),
        size_(other.size_) {}
  ~GuardedArray() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
  }

  // NaN as fp16, bf16 and fp32, up to the page before.
  void poison() const {
    std::memset(mapped_ + page_bytes(), 0xff, mapped_bytes_ - 2 * page_bytes());
  }

  T* data() const { return reinterpret_cast<T*>(mapped_ + mapped_bytes_ - page_bytes()) - size_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  static std::size_t page_bytes() {
    static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }
  void protect(int access) const {
    mprotect(mapped_ + page_bytes(), mapped_bytes_ - 2 * page_bytes(), access);
  }

  std::uint8_t* mapped_;
  std::size_t mapped_bytes_;
  std::size_t size_;
};

}  // namespace bitdecoding::emulation
