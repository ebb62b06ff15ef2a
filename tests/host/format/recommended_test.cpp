// SPDX-License-Identifier: Apache-2.0
#include "bitdecoding/format/recommended.hpp"

#include <doctest.h>

#include <string>

#include "bitdecoding/layout/page_record.hpp"

namespace bitdecoding {
namespace {

TEST_CASE("a format is recommended for 4, 3 and 2 bits and every head_dim") {
  for (const int head_dim : {64, 128, 256}) {
    double more = 5;
    for (const int bits : {4, 3, 2}) {
      CAPTURE(bits);
      CAPTURE(head_dim);
      KvFormat f;
      CHECK(recommended_format(bits, head_dim, &f).is_ok());
      CHECK(validate(f).is_ok());
      CHECK(f.head_dim == head_dim);
      CHECK(f.k_bits + f.v_bits == 2 * bits);
      CHECK(bits_per_element(f) < more);  // scales do not eat up what the codes save
      more = bits_per_element(f);
      CHECK(more <= bits + 1);
    }
  }
  static_assert(format::is_valid(format::recommended(2, 128)));
}

TEST_CASE("what is not recommended for is refused and leaves the result alone") {
  const KvFormat before{.k_bits = 2, .token_norm = true};
  for (const int bits : {-1, 0, 1, 5, 8, 16}) {
    KvFormat f = before;
    CHECK(recommended_format(bits, 128, &f).text() ==
          "bits = " + std::to_string(bits) + "; allowed: 2, 3, 4");
    CHECK(f == before);
  }
  for (const int head_dim : {-64, 0, 32, 80, 96, 512}) {
    for (const int bits : {2, 3, 4}) {
      KvFormat f = before;
      CHECK(recommended_format(bits, head_dim, &f).text() ==
            "head_dim = " + std::to_string(head_dim) + "; allowed: 64, 128, 256");
      CHECK(f == before);
    }
  }
}

}  // namespace
}  // namespace bitdecoding
