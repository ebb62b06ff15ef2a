// SPDX-License-Identifier: Apache-2.0
// What the 128 threads of a warpgroup do together: barriers (which two warps have, too), and
// products whose B operand lies in shared memory. Each warp's quarter of a product happens when it
// is begun, or when the warp waits.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "warp_operations.hpp"

namespace bitdecoding::emulation {

// The barrier is the group's own for good.
template <int Threads>
bool any_of_group(int barrier, bool holds) {
  struct Turn {
    int barrier;
    bool holds;
  } mine{barrier, holds};
  require(barrier == 1 + machine()->thread() / Threads, "a barrier of another group of warps");
  machine()->meet_group<Threads>("bar.sync", mine, [](const std::array<Turn*, Threads>& threads) {
    bool any = false;
    for (const Turn* turn : threads) any = any || turn->holds;
    for (Turn* turn : threads) turn->holds = any;
  });
  return mine.holds;
}

// One thread's part of a warp's D (16 x Columns) = A (16x16) B (16 x Columns) + C.
template <int Columns>
struct GroupMmaTurn {
  std::array<std::uint32_t, 4> a;  // see MmaTurn
  std::uint64_t b;                 // descriptor
  std::array<float*, Columns / 2> d;
  bool adds;
};

// B, K-major without a swizzle: (column, k) as fp16.
template <int Columns>
std::array<std::array<float, Columns>, 16> read_operand(std::uint64_t descriptor) {
  const auto field = [&](int first) {
    return static_cast<int>(descriptor >> first & 0x3fffu) * 16;
  };
  require(descriptor >> 49 == 0, "a descriptor of an operand with a swizzle");
  std::array<std::array<float, Columns>, 16> b;
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < Columns; ++n) {
      const int at = field(0) + k / 8 * field(16) + n / 8 * field(32) + n % 8 * 16 + k % 8 * 2;
      std::uint16_t bits;
      std::memcpy(&bits, machine()->shared_at(at, 2), 2);
      b[k][n] = fp16_value(bits);
    }
  }
  return b;
}

template <int Columns>
void multiply_quarter(const std::array<GroupMmaTurn<Columns>, kLanes>& lanes) {
  static float a[16][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    require(lanes[lane].b == lanes[0].b, "lanes have other operands");
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = fp16_value(lanes[lane].a[i] >> 16 * half);
      }
    }
  }
  const auto b = read_operand<Columns>(lanes[0].b);
  for (int row = 0; row < 16; ++row) {
    std::array<float, Columns> sums{};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < Columns; ++n) sums[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < Columns; ++n) {
      const GroupMmaTurn<Columns>& to = lanes[row % 8 * 4 + n % 8 / 2];
      float& d = *to.d[n / 8 * 4 + row / 8 * 2 + n % 2];
      d = to.adds ? d + sums[n] : sums[n];
    }
  }
}

template <int Columns>
void begin_group_mma(GroupMmaTurn<Columns> mine) {
  machine()->meet("wgmma", mine, [](const Lanes<GroupMmaTurn<Columns>>& all) {
    std::array<GroupMmaTurn<Columns>, kLanes> lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = *all[i];
    machine()->begin_product([lanes] { multiply_quarter<Columns>(lanes); });
  });
}
inline void commit_group_mmas() {
  int nothing = 0;
  machine()->meet("wgmma.commit_group", nothing,
                  [](const Lanes<int>&) { machine()->commit_products(); });
}
inline void end_group_mmas(int pending) {
  machine()->meet("wgmma.wait_group", pending,
                  [](const Lanes<int>& all) { machine()->end_products(*all[0]); });
}

// Four matrices of a warp, each transposed as it is stored; lane 8i + r has the address of row r of i.
inline void store_matrices_transposed(void* row, std::array<std::uint32_t, 4> fragments) {
  struct Turn {
    void* row;
    std::array<std::uint32_t, 4> fragments;
  } mine{row, fragments};
  machine()->require_shared(row, 16, 16);
  machine()->meet("stmatrix.trans", mine, [](const Lanes<Turn>& lanes) {
    for (int i = 0; i < 4; ++i) {
      Matrix matrix;
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(&matrix[lane / 4][lane % 4 * 2], &lanes[lane]->fragments[i], 4);
      }
      for (int r = 0; r < 8; ++r) {
        std::array<std::uint16_t, 8> column;
        for (int k = 0; k < 8; ++k) column[k] = matrix[k][r];
        std::memcpy(lanes[8 * i + r]->row, column.data(), 16);
      }
    }
  });
}

}  // namespace bitdecoding::emulation
