// SPDX-License-Identifier: Apache-2.0
// The device's copy of a CacheBox.
#pragma once

#include "cpu/cache_box.hpp"
#include "device_array.hpp"

namespace bitdecoding::test {

class DeviceCache {
 public:
  explicit DeviceCache(const CacheBox& box)
      : box_(box),
        pool_(box.pool),
        side_(box.side),
        block_table_(box.block_table),
        slots_(box.slots),
        lengths_(box.lengths),
        packed_(box.packed),
        mean_(box.mean) {}

  PagedKvCache view() const {
    PagedKvCache c = box_.cache;
    c.pool = reinterpret_cast<std::uint8_t*>(pool_.data());
    c.side = reinterpret_cast<std::uint16_t*>(side_.data());
    c.block_table = block_table_.data();
    c.slots = slots_.data();
    c.lengths = lengths_.data();
    c.packed = packed_.data();
    if (!box_.mean.empty()) c.k_mean = reinterpret_cast<const std::uint16_t*>(mean_.data());
    return c;
  }

  // What the device holds now.
  CacheBox host() const {
    CacheBox box = box_;
    box.pool = pool_.host();
    box.side = side_.host();
    box.lengths = lengths_.host();
    box.packed = packed_.host();
    return box;
  }

 private:
  CacheBox box_;
  DeviceArray<Piece> pool_, side_;
  DeviceArray<std::int32_t> block_table_, slots_, lengths_, packed_;
  DeviceArray<Piece> mean_;
};

}  // namespace bitdecoding::test
