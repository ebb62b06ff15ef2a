// SPDX-License-Identifier: Apache-2.0
// Partial attention of a segment and how partials become the output. A partial is m (log2 domain),
// l = sum 2^(s - m) and O of the same scale; merging is associative, and always in the items'
// order.
//   memory   float o[columns][D + 8], m[columns], l[columns]
#pragma once

#include <algorithm>

#include "bitdecoding/arch/sm80.cuh"
#include "bitdecoding/decode/halves/values.cuh"
#include "bitdecoding/decode/query.cuh"

namespace bitdecoding::decode {

template <class S>
struct alignas(16) Partial {
  float o[S::columns][S::head_dim + 8];  // padded: lanes of a store meet different banks
  float maximum[S::columns];
  float sum[S::columns];
};

// Where column `column` of a segment goes in out (B,Sq,Hq,D) and lse (B,Hq,Sq), and where its query
// is.
struct OutputRow {
  std::int64_t out, query;  // elements of channel 0
  std::int64_t lse;
  int kv_head;

  __device__ OutputRow(const DecodeProblem& p, int sequence, int kv_head, int group, int column)
      : kv_head(kv_head) {
    const int token = p.query_tokens == 1 ? 0 : column / group;
    const int head = kv_head * group + column - token * group;
    query = sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
    out = ((static_cast<std::int64_t>(sequence) * p.query_tokens + token) * p.query_heads + head) *
          p.cache.format.head_dim;
    lse = (static_cast<std::int64_t>(sequence) * p.query_heads + head) * p.query_tokens + token;
  }
};

// Four channels, from element `index` on.
__device__ inline void store_output(const DecodeProblem& p, std::int64_t index, float4 o) {
  uint2 bits;
  if (p.type == ElementType::f16) {
    bits = {as_bits(__floats2half2_rn(o.x, o.y)), as_bits(__floats2half2_rn(o.z, o.w))};
  } else {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(o.x, o.y),
                                     __floats2bfloat162_rn(o.z, o.w)};
    bits = reinterpret_cast<const uint2&>(pairs);
  }
  *reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(p.out) + index) = bits;
}

__device__ inline float natural_lse(float maximum, float sum) {
  if (sum == 0.f) return -INFINITY;
  return 0.693147181f * (maximum + arch::log2(sum));
}

// Of what every lane has summed over its rows.
__device__ inline float sum_of_rows(float sum) {
  for (int distance = 4; distance < 32; distance *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  return sum;
}

// A warp's result to memory: its columns are those of the partial from `first_column` on.
template <class S, class Groups, class To>
__device__ void store_partial(Output<S, Groups>& output, const Softmax<S>& softmax,
                              const Groups& groups, int lane, Partial<To>& partial,
                              int first_column = 0) {
  constexpr int kPartChannels = S::head_dim / S::V::v_parts;
  const int g = lane / 4, t = lane % 4;
  if constexpr (Halves<S>) make_true(output);
#pragma unroll
  for (int c = 0; c < S::lane_columns; ++c) {
    const float sum = sum_of_rows(softmax.sum(c));
    const int column = first_column + S::column(c, t);
    if (g == 0) {
      partial.maximum[column] = softmax.maximum(c) - kWeightExponent<S>;
      partial.sum[column] = sum;
    }
    float zero = 0.f;
#pragma unroll
    for (int part = 0; part < S::V::v_parts; ++part) {
      if (begins_group(part * kPartChannels, groups.v_group())) {
        zero = sum_of_rows(output.zero_sum_of(part)(c));
      }
#pragma unroll
      for (int tile = 0; tile < S::v_part_tiles; ++tile) {
        const int k = part * S::v_part_tiles + tile;
        partial.o[column][16 * k + g] = output.tOrO(0, c, k) + zero;
        partial.o[column][16 * k + g + 8] = output.tOrO(1, c, k) + zero;
      }
    }
  }
}

// By so many threads.
template <class S, int Threads>
__device__ void copy_partial(const Partial<S>& from, Partial<S>& to, int thread) {
  static_assert(sizeof(Partial<S>) % sizeof(float4) == 0);
  for (int i = thread; i < static_cast<int>(sizeof(Partial<S>) / sizeof(float4)); i += Threads) {
    reinterpret_cast<float4*>(&to)[i] = reinterpret_cast<const float4*>(&from)[i];
  }
}

// The columns of which four channels a lane, eight at head_dim 256, fill a warp, and how many it
// merges together at most.
template <class S>
inline constexpr int kFewColumns = std::max(128 / S::head_dim, 1);
inline constexpr int kManyColumns = 4;

// Columns that a warp merges together. 32 / Columns lanes have a column each, and of it four
// channels kParts times.
template <class S, int Columns>
struct MergedColumns {
  static constexpr int kLanes = 32 / Columns;
  static constexpr int kParts = S::head_dim / (4 * kLanes);

  float maximum = kMaximumFloor, sum = 0.f;
  float4 o[kParts] = {};  // relative to the maximum

  static __device__ int column() { return arch::lane_id() / kLanes; }  // of the lane
  static __device__ int channel(int part) { return 4 * (arch::lane_id() % kLanes + part * kLanes); }
};

// Undoes V's rotation in the outputs of a warp's columns. Bits don't depend on how many these are.
template <class S, int Columns>
__device__ void rotate_output(float4 (&o)[MergedColumns<S, Columns>::kParts], int block) {
  using Merged = MergedColumns<S, Columns>;
  float x[4 * Merged::kParts];
#pragma unroll
  for (int part = 0; part < Merged::kParts; ++part) {
    x[4 * part] = o[part].x;
    x[4 * part + 1] = o[part].y;
    x[4 * part + 2] = o[part].z;
    x[4 * part + 3] = o[part].w;
  }
  format::rotate<4, Merged::kLanes>(x, block);
#pragma unroll
  for (int part = 0; part < Merged::kParts; ++part) {
    o[part] = {x[4 * part], x[4 * part + 1], x[4 * part + 2], x[4 * part + 3]};
  }
}

// What K's mean would have added to all scores of a column, and so to its LSE: to each of the
// column's lanes. Channels D/2 apart meet first, then those D/4 apart, and so on: bits don't depend
// on how many columns the warp has.
template <class S, int Columns>
__device__ float mean_score(const DecodeProblem& p, const OutputRow& row) {
  using Merged = MergedColumns<S, Columns>;
  const auto* q = static_cast<const std::uint16_t*>(p.q) + row.query;
  const std::uint16_t* mean = p.cache.arrival(row.kv_head, 0).mean;
  float sums[Merged::kParts];
#pragma unroll
  for (int part = 0; part < Merged::kParts; ++part) {
    sums[part] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int channel = Merged::channel(part) + i;
      const float2 a = widen_pair(reinterpret_cast<const std::uint32_t&>(q[channel]), p.type);
      const float2 b = __half22float2(reinterpret_cast<const __half2&>(mean[channel]));
      sums[part] = __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, sums[part]));
    }
  }
#pragma unroll
  for (int width = Merged::kParts / 2; width > 0; width /= 2) {
#pragma unroll
    for (int part = 0; part < width; ++part) sums[part] = __fadd_rn(sums[part], sums[part + width]);
  }
  for (int width = Merged::kLanes / 2; width > 0; width /= 2) {
    sums[0] = __fadd_rn(sums[0], __shfl_xor_sync(0xffffffffu, sums[0], width));
  }
  return sums[0] * p.softmax_scale;
}

// A merged column to the output, and its LSE. All lanes of a warp come here, those whose column
// `is_mine` store.
template <class S, int Columns>
__device__ void store_column(const DecodeProblem& p, const OutputRow& row, bool is_mine,
                             MergedColumns<S, Columns> merged) {
  using Merged = MergedColumns<S, Columns>;
  const float inverse = merged.sum == 0.f ? 0.f : arch::reciprocal(merged.sum);
  for (float4& o : merged.o) o = {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
  const int rotation = p.cache.format.v_rotation;
  if (rotation != 0) rotate_output<S, Columns>(merged.o, rotation);
  float lse = natural_lse(merged.maximum, merged.sum);
  if (p.lse != nullptr && p.cache.k_mean != nullptr) lse += mean_score<S, Columns>(p, row);
  if (!is_mine) return;
#pragma unroll
  for (int part = 0; part < Merged::kParts; ++part) {
    store_output(p, row.out + Merged::channel(part), merged.o[part]);
  }
  if (Merged::channel(0) == 0 && p.lse != nullptr) p.lse[row.lse] = lse;
}

// Partials of one segment in the items' order: a bit each, and the pointer of bit i in lane i.
template <class S>
class PartialList {
 public:
  __device__ PartialList(unsigned entries, const Partial<S>* mine)
      : rest_(entries), mine_(reinterpret_cast<std::uintptr_t>(mine)) {}
  __device__ int count() const { return __popc(rest_); }
  // The next one; the last one again and again.
  __device__ const Partial<S>& next() {
    const int entry = __ffs(static_cast<int>(rest_)) - 1;
    if ((rest_ & (rest_ - 1)) != 0) rest_ &= rest_ - 1;
    return *reinterpret_cast<const Partial<S>*>(__shfl_sync(0xffffffffu, mine_, entry));
  }

 private:
  unsigned rest_;
  std::uintptr_t mine_;
};

// Partials whose loads are under way together.
template <class S, int Columns>
inline constexpr int kMergeBatch = Columns == kManyColumns ? 4 : (S::head_dim > 128 ? 12 : 20);

template <class S>
__device__ float raise_maximum(PartialList<S> partials, int column, float maximum) {
#pragma unroll 4
  for (int rest = partials.count(); rest > 0; --rest) {
    maximum = fmaxf(maximum, partials.next().maximum[column]);
  }
  return maximum;
}

// Adds the lane's column of the partials. Where there are more than a batch, merged.maximum is that
// of all of them before the first is added: then the bits don't depend on how many columns the warp
// merges; for the same reason sums are fused by name. Every lane weighs all partials itself, since
// shuffles take longer.
template <class S, int Columns>
__device__ void merge_partials(PartialList<S> partials, int column,
                               MergedColumns<S, Columns>& merged) {
  using Merged = MergedColumns<S, Columns>;
  constexpr int kFours = kMergeBatch<S, Columns> / 4;
  float top[kFours][4], sum[kFours][4];
  float4 o[kFours][4][Merged::kParts];
  for (int count = partials.count(); count > 0; count -= 4 * kFours) {
    float raised = merged.maximum;
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      if (4 * four >= count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Partial<S>& partial = partials.next();
        top[four][i] = partial.maximum[column];
        sum[four][i] = partial.sum[column];
#pragma unroll
        for (int part = 0; part < Merged::kParts; ++part) {
          const float& first = partial.o[column][Merged::channel(part)];
          o[four][i][part] = reinterpret_cast<const float4&>(first);
        }
      }
    }
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      if (4 * four >= count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * four + i >= count) top[four][i] = -INFINITY;  // the last one again
        raised = fmaxf(raised, top[four][i]);
      }
    }
    const float shrink = arch::exp2(merged.maximum - raised);
    merged.maximum = raised;
    merged.sum *= shrink;
    for (float4& m : merged.o) m = {m.x * shrink, m.y * shrink, m.z * shrink, m.w * shrink};
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      if (4 * four >= count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float w = arch::exp2(top[four][i] - raised);
        merged.sum = __fmaf_rn(w, sum[four][i], merged.sum);
#pragma unroll
        for (int part = 0; part < Merged::kParts; ++part) {
          const float4& more = o[four][i][part];
          float4& m = merged.o[part];
          m = {__fmaf_rn(w, more.x, m.x), __fmaf_rn(w, more.y, m.y), __fmaf_rn(w, more.z, m.z),
               __fmaf_rn(w, more.w, m.w)};
        }
      }
    }
  }
}

}  // namespace bitdecoding::decode
