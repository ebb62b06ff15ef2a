// SPDX-License-Identifier: Apache-2.0
// format::rotate by a warp whose lanes share rows: the same bits, wherever the channels lie.
#pragma once

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/format/rotation.hpp"

namespace bitdecoding::format {

// Where the channel at some distance from a lane's value is: so many values further in the same
// lane, or, if `lanes` is not 0, the same value of the lane whose number differs in that bit.
struct Partner {
  int values, lanes;
};

// Channels at this distance become their sum and difference. Partners are known when this is
// compiled: a value whose place is not would lie in local memory.
template <class PartnerAt, int Distance, int Values>
__device__ void rotation_step(float (&x)[Values]) {
  constexpr Partner partner = PartnerAt{}(Distance);
  const float sign = (arch::lane_id() & partner.lanes) != 0 ? -1.f : 1.f;
#pragma unroll
  for (int i = 0; i < Values; ++i) {
    if constexpr (partner.lanes != 0) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], partner.lanes);
      x[i] = __fmaf_rn(x[i], sign, other);  // the product is exact
    } else if ((i & partner.values) == 0) {
      const float a = x[i], b = x[i + partner.values];
      x[i] = __fadd_rn(a, b);
      x[i + partner.values] = __fsub_rn(a, b);
    }
  }
}

// Of rows of HeadDim channels; x: the lane's. partner_at(distance) -> Partner, without a state.
// Called by whole warps, `block` the same in all lanes; 0 changes nothing.
template <int HeadDim, int Distance = 1, int Values, class PartnerAt>
__device__ void rotate(float (&x)[Values], int block, const PartnerAt& partner_at) {
  if constexpr (Distance < longest_rotation(HeadDim)) {
    if (Distance < block) {
      rotation_step<PartnerAt, Distance>(x);
      return rotate<HeadDim, 2 * Distance>(x, block, partner_at);
    }
  }
  const float scale = rotation_scale(block);
#pragma unroll
  for (float& value : x) value = __fmul_rn(value, scale);
}

}  // namespace bitdecoding::format
