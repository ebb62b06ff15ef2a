// SPDX-License-Identifier: Apache-2.0
// What a CUDA operation found wrong in device memory, where no host can look without waiting.
//   int32 [4]   sequence + 1 (0: nothing wrong) | value | limit | DeviceError
#pragma once

namespace bitdecoding {

inline constexpr int kErrorWord_ints = 4;

// What the value is and what the limit means. The sequence writes nothing and its decode output is
// NaN; for a pack's `page_id` only that page is not written.
enum class DeviceError : int {
  none = 0,
  run = 1,           // leftpad or num_tokens; tokens of a row
  first_page = 2,    // pages before the run; columns of the block table
  page_id = 3,       // in the block table; pages of the pool
  slot = 4,          // slots of the side buffer
  length = 5,        // negative, or tokens behind the pages; rows of the tail ring
  packed = 6,        // negative, not whole pages, or more than lengths; tokens of the block table
  grown_length = 7,  // after the append; max_tokens
  grown_pages = 8,   // pages that the append fills; columns of the block table
};

// What is wrong with a sequence, if anything is: the rest of the error word.
struct Fault {
  DeviceError error = DeviceError::none;
  int value = 0;
  int limit = 0;

  constexpr explicit operator bool() const { return error != DeviceError::none; }
  friend constexpr bool operator==(const Fault&, const Fault&) = default;
};

}  // namespace bitdecoding
