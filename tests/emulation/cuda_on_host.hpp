// SPDX-License-Identifier: Apache-2.0
// What device code calls, for a host compiler: CUDA's built-ins and CuTe's atoms, on the Machine.
// Include it before any .cuh.
//
// No macro renames anything: kernels live in bitdecoding::decode, and names are looked up from the
// inside to the outside. CUDA's built-ins, which a host compiler lacks, are declared in
// bitdecoding. `cute` and `cutlass` are namespaces of bitdecoding::decode: they declare anew what
// is PTX inside, and find everything else in the global ones by a using-directive.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cute/tensor.hpp>

#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "machine.hpp"
#include "warp_operations.hpp"
#include "warpgroup_operations.hpp"

#define __launch_bounds__(...)  // an attribute: nothing that could be declared

namespace bitdecoding {

// ---- where a thread is ----
template <int (emulation::Machine::*Read)() const>
struct Coordinate {
  operator unsigned() const { return static_cast<unsigned>((emulation::machine()->*Read)()); }
};
template <int (emulation::Machine::*X)() const>
struct Coordinates {
  Coordinate<X> x;
};
template <int (emulation::Machine::*X)() const, int (emulation::Machine::*Y)() const>
struct GridCoordinates {
  Coordinate<X> x;
  Coordinate<Y> y;
};
inline constexpr Coordinates<&emulation::Machine::thread> threadIdx;
inline constexpr Coordinates<&emulation::Machine::threads> blockDim;
inline constexpr GridCoordinates<&emulation::Machine::column, &emulation::Machine::row> blockIdx;
inline constexpr Coordinates<&emulation::Machine::ctas> gridDim;

// ---- barriers, shuffles, votes: always of whole warps ----
inline void __syncthreads() { emulation::machine()->sync_threads(); }
inline int __syncthreads_and(bool holds) { return emulation::machine()->sync_threads_and(holds); }
inline void __syncwarp() { emulation::sync_warp(); }

inline void require_whole_warp(unsigned mask) {
  emulation::require(mask == 0xffffffffu, "an operation of less than a warp");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  require_whole_warp(mask);
  return emulation::shuffle("__shfl_sync", value, source % emulation::kLanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  require_whole_warp(mask);
  return emulation::shuffle("__shfl_up_sync", value, emulation::machine()->lane() - distance);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  require_whole_warp(mask);
  return emulation::shuffle("__shfl_xor_sync", value, emulation::machine()->lane() ^ distance);
}
inline unsigned __ballot_sync(unsigned mask, bool holds) {
  require_whole_warp(mask);
  return emulation::reduce("__ballot_sync", holds,
                           [](unsigned all, unsigned one, int lane) { return all | one << lane; });
}
inline bool __any_sync(unsigned mask, bool holds) {
  require_whole_warp(mask);
  return emulation::reduce("__any_sync", holds,
                           [](unsigned all, unsigned one, int) { return all | one; }) != 0;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  require_whole_warp(mask);
  return emulation::reduce("__reduce_add_sync", value,
                           [](unsigned all, unsigned one, int) { return all + one; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  require_whole_warp(mask);
  return emulation::reduce("__reduce_max_sync", value,
                           [](unsigned all, unsigned one, int) { return std::max(all, one); });
}

// ---- one thread's ----
inline int atomicCAS(int* address, int expected, int desired) {
  const int before = *address;
  if (before == expected) *address = desired;
  emulation::machine()->pass();
  return before;
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned before = *address;
  *address = before >= last ? 0 : before + 1;
  emulation::machine()->pass();
  return before;
}
using std::max;
using std::min;
constexpr int __popc(unsigned bits) { return std::popcount(bits); }
constexpr int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
constexpr int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto fused = [](__half x, __half y, __half z) {
    return __double2half(double{__half2float(x)} * __half2float(y) + __half2float(z));
  };
  return __halves2half2(fused(__low2half(a), __low2half(b), __low2half(c)),
                        fused(__high2half(a), __high2half(b), __high2half(c)));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __saturatef(float a) { return a > 0.f ? std::min(a, 1.f) : 0.f; }
template <class T>
T __ldcs(const T* address) {
  return *address;
}
constexpr unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
constexpr int __float_as_int(float value) { return std::bit_cast<int>(value); }
constexpr float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
constexpr float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
// Byte i of the result is the byte of b:a that hexadecimal digit i of the selector names.
constexpr unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t bytes = a | static_cast<std::uint64_t>(b) << 32;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> 4 * i & 7;
    chosen |= static_cast<unsigned>(bytes >> 8 * byte & 0xff) << 8 * i;
  }
  return chosen;
}

namespace decode {

namespace cute {

using namespace ::cute;

// ---- matrices ----
struct SM80_16x8x16_F32F16F16F32_TN {
  static void fma(float& d0, float& d1, float& d2, float& d3, std::uint32_t a0, std::uint32_t a1,
                  std::uint32_t a2, std::uint32_t a3, std::uint32_t b0, std::uint32_t b1, float c0,
                  float c1, float c2, float c3) {
    emulation::MmaTurn mine{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    emulation::machine()->meet("mma", mine, emulation::multiply_matrices);
    d0 = mine.c[0];
    d1 = mine.c[1];
    d2 = mine.c[2];
    d3 = mine.c[3];
  }
};

template <class Element>
struct MultiplyBytes {
  using Word = std::uint32_t;
  static void fma(Word& d0, Word& d1, Word& d2, Word& d3, Word a0, Word a1, Word a2, Word a3,
                  Word b0, Word b1, Word c0, Word c1, Word c2, Word c3) {
    emulation::ByteMmaTurn mine{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    emulation::machine()->meet("mma of bytes", mine, emulation::multiply_bytes<Element>);
    d0 = mine.c[0];
    d1 = mine.c[1];
    d2 = mine.c[2];
    d3 = mine.c[3];
  }
};
using SM80_16x8x32_S32U8S8S32_TN = MultiplyBytes<std::int8_t>;
using SM80_16x8x32_S32U8U8S32_TN = MultiplyBytes<std::uint8_t>;

template <bool Transposed>
struct LoadMatrices {
  static void copy(const uint128_t& row, std::uint32_t& a, std::uint32_t& b, std::uint32_t& c,
                   std::uint32_t& d) {
    const auto fragments = emulation::load_matrices(&row, Transposed);
    a = fragments[0];
    b = fragments[1];
    c = fragments[2];
    d = fragments[3];
  }
};
using SM75_U32x4_LDSM_N = LoadMatrices<false>;
using SM75_U16x8_LDSM_T = LoadMatrices<true>;

struct SM90_U16x8_STSM_T {
  static void copy(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d,
                   uint128_t& row) {
    emulation::store_matrices_transposed(&row, {a, b, c, d});
  }
};

// ---- products of a warpgroup ----
namespace SM90::GMMA {
using namespace ::cute::SM90::GMMA;

template <int Columns>
struct MultiplyGroup {
  // `rest`: Columns / 2 accumulators, and whether they are added to.
  template <class... Rest>
  static void fma(std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                  std::uint64_t b, Rest&&... rest) {
    static_assert(sizeof...(rest) == Columns / 2 + 1);
    emulation::GroupMmaTurn<Columns> mine{{a0, a1, a2, a3}, b, {}, false};
    int count = 0;
    const auto take = [&](auto& argument) {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(argument)>, float>) {
        mine.d[count++] = &argument;
      } else {
        mine.adds = argument == ScaleOut::One;
      }
    };
    (take(rest), ...);
    emulation::begin_group_mma(mine);
  }
};
template <Major A, Major B>
using MMA_64x32x16_F32F16F16_RS = MultiplyGroup<32>;
template <Major A, Major B>
using MMA_64x64x16_F32F16F16_RS = MultiplyGroup<64>;
}  // namespace SM90::GMMA
inline unsigned cast_smem_ptr_to_uint(const void* address) {
  return emulation::machine()->shared_address(address);
}
template <class Register>
void warpgroup_fence_operand(Register&) {}
inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { emulation::commit_group_mmas(); }
template <int Pending>
void warpgroup_wait() {
  emulation::end_group_mmas(Pending);
}

// ---- cp.async ----
template <class Piece>
struct SM80_CP_ASYNC_CACHEGLOBAL {
  static void copy(const Piece& from, Piece& to) {
    emulation::machine()->copy_piece(&from, &to, sizeof(Piece));
  }
};
inline void cp_async_fence() { emulation::machine()->commit_pieces(); }
template <int Pending>
void cp_async_wait() {
  emulation::machine()->await_pieces(Pending);
}

// ---- mbarriers and bulk copies ----
inline bool elect_one_sync() { return emulation::elect_one(); }
inline void initialize_barrier(std::uint64_t& barrier, int arrivals) {
  emulation::machine()->begin_barrier(&barrier, arrivals);
}
inline void set_barrier_transaction_bytes(std::uint64_t& barrier, int bytes) {
  emulation::machine()->arrive(&barrier, bytes);
}
inline void arrive_barrier(std::uint64_t& barrier) { emulation::machine()->arrive(&barrier, 0); }
inline void wait_barrier(std::uint64_t& barrier, int parity) {
  emulation::machine()->await_phase(&barrier, parity);
}
struct SM90_BULK_COPY_G2S {
  static void copy(const void* from, std::uint64_t* barrier, void* to, int bytes) {
    emulation::machine()->copy_bulk(from, to, bytes, barrier);
  }
};

}  // namespace cute

// One thread runs at a time and sees what the others have written: fences have nothing to order.
namespace cutlass::arch {
inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}
}  // namespace cutlass::arch

}  // namespace decode

namespace quantize {
namespace cute = decode::cute;
}  // namespace quantize

}  // namespace bitdecoding
