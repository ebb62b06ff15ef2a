// SPDX-License-Identifier: Apache-2.0
// The faults that kernels find in a sequence's state are those that check_state finds on the host.
#include "bitdecoding/cache/sequence_state.hpp"

#include <doctest.h>

#include <climits>
#include <string>

#include "bitdecoding/run.hpp"
#include "cpu/cache_box.hpp"

namespace bitdecoding {
namespace {

using namespace test;

TEST_CASE("the same verdict and the same culprit as check_state") {
  const int values[] = {INT_MIN, -128, -1,  0,   1,   63,  64,  65,  100, 127,
                        128,     192,  193, 320, 321, 640, 641, 768, 832, INT_MAX};
  int sound = 0, unsound = 0;
  for (const int page_tokens : {64, 128}) {
    CacheBox box({.k_group = 64, .page_tokens = page_tokens}, {1, 1, 512});
    for (const int length : values) {
      for (const int packed : values) {
        for (const int slot : {INT_MIN, -1, 0, box.cache.num_slots - 1, box.cache.num_slots}) {
          box.lengths[0] = length;
          box.packed[0] = packed;
          box.slots[0] = slot;
          const Fault fault = find_fault(box.cache, {length, packed, slot});
          const std::string text = check_state(box.view()).text();
          const char* culprit = fault.error == DeviceError::slot     ? "slots"
                                : fault.error == DeviceError::length ? "lengths"
                                : fault.error == DeviceError::packed ? "packed"
                                                                     : "";
          CAPTURE(length);
          CAPTURE(packed);
          CAPTURE(slot);
          CAPTURE(text);
          REQUIRE(static_cast<bool>(fault) == !text.empty());
          REQUIRE(has_fault(box.cache, {length, packed, slot}) == !text.empty());
          REQUIRE(text.starts_with(culprit));
          ++(fault ? unsound : sound);
        }
      }
    }
  }
  CHECK(sound > 50);
  CHECK(unsound > 500);
}

TEST_CASE("values and limits of the error word") {
  const CacheBox box({}, {1, 1, 512});  // five pages of 128, 192 rows in the ring, three slots
  const PagedKvCache& c = box.cache;
  CHECK(find_fault(c, {300, 128, 0}) == Fault{});
  CHECK(find_fault(c, {300, 128, 3}) == Fault{DeviceError::slot, 3, 3});
  CHECK(find_fault(c, {-7, 0, 0}) == Fault{DeviceError::length, -7, 192});
  CHECK(find_fault(c, {400, 128, 0}) == Fault{DeviceError::length, 272, 192});
  CHECK(find_fault(c, {300, 100, 0}) == Fault{DeviceError::packed, 100, 640});
  CHECK(find_fault(c, {800, 768, 0}) == Fault{DeviceError::packed, 768, 640});
}

}  // namespace
}  // namespace bitdecoding
