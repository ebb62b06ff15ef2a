// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: shuffles, votes, sums, and the operations on 8x8 matrices
// of 16-bit elements, in which lane 4g + t holds the elements 2t and 2t + 1 of row g.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "bitdecoding/format/float16.hpp"
#include "machine.hpp"

namespace bitdecoding::emulation {

template <class Argument>
using Lanes = std::array<Argument*, kLanes>;

inline void sync_warp() {
  int nothing = 0;
  machine()->meet("__syncwarp", nothing, [](const Lanes<int>&) {});
}

// The value of the lane `source`; of its own, if there is no such lane.
template <class T>
T shuffle(std::string_view operation, T value, int source) {
  struct Turn {
    T sent, received;
    int source;
  } mine{value, value, source};
  machine()->meet(operation, mine, [](const Lanes<Turn>& lanes) {
    for (Turn* lane : lanes) {
      if (lane->source >= 0 && lane->source < kLanes) lane->received = lanes[lane->source]->sent;
    }
  });
  return mine.received;
}

// fold(all, value, lane) over the values of all lanes, from 0 on.
template <class Fold>
unsigned reduce(std::string_view operation, unsigned value, const Fold& fold) {
  machine()->meet(operation, value, [&](const Lanes<unsigned>& lanes) {
    unsigned all = 0;
    for (int i = 0; i < kLanes; ++i) all = fold(all, *lanes[i], i);
    for (unsigned* lane : lanes) *lane = all;
  });
  return value;
}

inline bool elect_one() {
  int elected = machine()->lane();
  machine()->meet("elect.sync", elected, [](const Lanes<int>& lanes) {
    const int any = machine()->draw(kLanes);
    for (int* lane : lanes) *lane = any;
  });
  return elected == machine()->lane();
}

using Matrix = std::array<std::array<std::uint16_t, 8>, 8>;

inline std::uint32_t pair(std::uint16_t low, std::uint16_t high) {
  return low | static_cast<std::uint32_t>(high) << 16;
}
inline std::uint32_t fragment(const Matrix& matrix, int lane, bool transposed) {
  const int g = lane / 4, t = lane % 4;
  if (transposed) return pair(matrix[2 * t][g], matrix[2 * t + 1][g]);
  return pair(matrix[g][2 * t], matrix[g][2 * t + 1]);
}

inline std::uint32_t transpose_matrix(std::uint32_t mine) {
  machine()->meet("movmatrix", mine, [](const Lanes<std::uint32_t>& lanes) {
    Matrix matrix;
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(&matrix[lane / 4][lane % 4 * 2], lanes[lane], 4);
    }
    for (int lane = 0; lane < kLanes; ++lane) *lanes[lane] = fragment(matrix, lane, true);
  });
  return mine;
}

// Four matrices; lane 8i + r has the address of row r of matrix i.
inline std::array<std::uint32_t, 4> load_matrices(const void* row, bool transposed) {
  struct Turn {
    const void* row;
    std::array<std::uint32_t, 4> fragments;
  } mine{row, {}};
  machine()->require_shared(row, 16, 16);
  const auto operation = transposed ? "ldmatrix.trans" : "ldmatrix";
  machine()->meet(operation, mine, [&](const Lanes<Turn>& lanes) {
    for (int i = 0; i < 4; ++i) {
      Matrix matrix;
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r].data(), lanes[8 * i + r]->row, 16);
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane]->fragments[i] = fragment(matrix, lane, transposed);
      }
    }
  });
  return mine.fragments;
}

inline float fp16_value(std::uint32_t bits) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i] = format::float_from_fp16(static_cast<std::uint16_t>(i));
    }
    return all;
  }();
  return values[bits & 0xffffu];
}

// One lane's part of D (16x8) = A (16x16) B (16x8) + C, fp16 products and fp32 sums.
struct MmaTurn {
  std::array<std::uint32_t, 4> a;  // rows g + 8 * (i % 2), columns 2t, 2t + 1, + 8 * (i / 2)
  std::array<std::uint32_t, 2> b;  // rows 2t, 2t + 1, + 8 * i, column g
  std::array<float, 4> c;          // rows g + 8 * (i / 2), column 2t + i % 2; becomes D
};

inline void multiply_matrices(const Lanes<MmaTurn>& lanes) {
  static float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const MmaTurn& mine = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = fp16_value(mine.a[i] >> 16 * half);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + half + 8 * i][g] = fp16_value(mine.b[i] >> 16 * half);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      MmaTurn& to = *lanes[row % 8 * 4 + column / 2];
      to.c[row / 8 * 2 + column % 2] += sums[column];
    }
  }
}

// One lane's part of D (16x8) = A (16x32) B (32x8) + C: codes are unsigned bytes, sums 32 bits.
struct ByteMmaTurn {
  std::array<std::uint32_t, 4> a;  // rows g + 8 * (i % 2), columns 4t .. 4t + 3, + 16 * (i / 2)
  std::array<std::uint32_t, 2> b;  // rows 4t .. 4t + 3, + 16 * i, column g
  std::array<std::uint32_t, 4> c;  // rows g + 8 * (i / 2), column 2t + i % 2; becomes D
};

// `Element`: of B, std::int8_t or std::uint8_t.
template <class Element>
void multiply_bytes(const Lanes<ByteMmaTurn>& lanes) {
  static int a[16][32], b[32][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const ByteMmaTurn& mine = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int byte = 0; byte < 4; ++byte) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][4 * t + byte + 16 * (i / 2)] = mine.a[i] >> 8 * byte & 0xff;
      }
      for (int i = 0; i < 2; ++i) {
        b[4 * t + byte + 16 * i][g] = static_cast<Element>(mine.b[i] >> 8 * byte & 0xff);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[row][k] * b[k][column];
      ByteMmaTurn& to = *lanes[row % 8 * 4 + column / 2];
      to.c[row / 8 * 2 + column % 2] += static_cast<std::uint32_t>(sum);
    }
  }
}

}  // namespace bitdecoding::emulation
