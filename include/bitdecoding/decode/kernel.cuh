// SPDX-License-Identifier: Apache-2.0
// Decode attention, one launch: every warp streams its share of the batch's bytes, the CTA merges
// its warps' partials, and the last CTA to finish a segment merges the segment.
//   workspace   Partial [CTAs][warps]: ends of segments inside a CTA | Partial [CTAs][2]: first and
//               last segment of a CTA          counters [CTAs], zero before and after
#pragma once

#include "bitdecoding/decode/stream.cuh"

namespace bitdecoding::decode {

// Warps of a CTA, one CTA per SM: as many as the registers of a stream allow.
template <DecodeConfig Config>
inline constexpr int kMaxWarps = Config.query_columns == 8 ? 12 : 8;
inline constexpr int kMostWarps = 12;
inline constexpr int kMostStages = 4;

// A partial that a warp leaves to the CTA.
struct PartialTag {
  int sequence = -1;  // -1: none
  int head = 0;
  int segment_begin = 0;
};

struct alignas(16) CtaStorage {
  PartialTag tags[kMostWarps][2];  // the segment that ends in the warp's share, its last segment
  int finisher;
};

struct WarpStorage {
  alignas(16) Item items[kMostStages];
  alignas(8) std::uint64_t barriers[kMostStages];
};

template <DecodeConfig Config>
class DecodeCta {
 public:
  using S = Shape<Config>;

  __device__ DecodeCta(const DecodeArguments& a, std::uint8_t* smem)
      : a_(a),
        smem_(smem),
        cta_storage_(*reinterpret_cast<CtaStorage*>(smem + a.warps * a.stages * a.stage_bytes)),
        warp_storage_(reinterpret_cast<WarpStorage*>(smem + a.warps * a.stages * a.stage_bytes +
                                                     sizeof(CtaStorage))),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        total_(total_units(a.problem.cache, a.batch, lane_)),
        shares_(total_, active_ctas(total_, gridDim.x)) {}

  __device__ void run() {
    write_empty_sequences();
    if (static_cast<int>(blockIdx.x) >= active_ctas(total_, gridDim.x) || total_ == 0) return;
    stream();
    __syncthreads();
    merge_warps();
  }

 private:
  __device__ Partial<S>* inner_partial(int warp) const {
    return reinterpret_cast<Partial<S>*>(a_.workspace) + blockIdx.x * a_.warps + warp;
  }
  __device__ Partial<S>* cta_partial(int cta, int which) const {
    return reinterpret_cast<Partial<S>*>(a_.workspace) + gridDim.x * a_.warps + 2 * cta + which;
  }
  // A warp's last partial lies where its ring was.
  __device__ Partial<S>* last_partial(int warp) const {
    return reinterpret_cast<Partial<S>*>(smem_ + warp * a_.stages * a_.stage_bytes);
  }

  __device__ void stream() {
    const UnitRange share = shares_.range(blockIdx.x);
    UnitRange range = Shares(share.end - share.begin, a_.warps).range(warp_);
    range = {share.begin + range.begin, share.begin + range.end};
    PartialTag tags[2];
    Ring<Config> ring(a_, smem_ + warp_ * a_.stages * a_.stage_bytes, warp_storage_[warp_].items,
                      warp_storage_[warp_].barriers, range, lane_);
    Stream<Config> stream(a_, lane_);
    PartialTag open;  // the segment whose state the stream holds
    while (!ring.empty()) {
      const Item item = ring.item();
      if (item.flags & Item::first) {
        if (open.sequence >= 0) {
          store_partial(stream, *inner_partial(warp_));
          tags[0] = open;
        }
        stream.begin_segment(item);
        open = {item.sequence, item.head, item.segment_begin};
      }
      ring.wait();
      ring.load_next();
      stream.attend(item, ring.bytes());
      ring.release();
      if ((item.flags & Item::last) && (item.flags & Item::whole)) {
        store_whole(stream, item);
        open.sequence = -1;
      }
    }
    __syncwarp();
    if (open.sequence >= 0) {
      store_partial(stream, *last_partial(warp_));
      tags[1] = open;
    }
    if (lane_ == 0) {
      cta_storage_.tags[warp_][0] = tags[0];
      cta_storage_.tags[warp_][1] = tags[1];
    }
  }

  __device__ int columns_of(int head) const {
    return min(S::columns, a_.columns - head % a_.column_tiles * S::columns);
  }
  __device__ OutputRow row_of(int sequence, int head, int column) const {
    return OutputRow(a_.problem, sequence, head / a_.column_tiles, a_.group,
                     head % a_.column_tiles * S::columns + column);
  }

  __device__ void store_partial(Stream<Config>& stream, Partial<S>& partial) {
    finish_stream<S>(
        stream.output(), stream.softmax(), a_.record.format().v_group, lane_,
        [&](int column, int channel, float o, float) { partial.o[column][channel] = o; },
        [&](int column, float maximum, float sum) {
          partial.maximum[column] = maximum;
          partial.sum[column] = sum;
        });
  }

  __device__ void store_whole(Stream<Config>& stream, const Item& item) {
    const int columns = columns_of(item.head);
    finish_stream<S>(
        stream.output(), stream.softmax(), a_.record.format().v_group, lane_,
        [&](int column, int channel, float o, float sum) {
          if (column >= columns) return;
          store_output(a_.problem, row_of(item.sequence, item.head, column).out + channel, o / sum);
        },
        [&](int column, float maximum, float sum) {
          if (column >= columns || a_.problem.lse == nullptr) return;
          a_.problem.lse[row_of(item.sequence, item.head, column).lse] = natural_lse(maximum, sum);
        });
  }

  __device__ void store_merged(const PartialTag& tag, int column, int channel, float4 o,
                               float maximum, float sum) {
    const OutputRow row = row_of(tag.sequence, tag.head, column);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    store_output(a_.problem, row.out + channel, o.x * inverse);
    store_output(a_.problem, row.out + channel + 1, o.y * inverse);
    store_output(a_.problem, row.out + channel + 2, o.z * inverse);
    store_output(a_.problem, row.out + channel + 3, o.w * inverse);
    if (channel == 0 && a_.problem.lse != nullptr) {
      a_.problem.lse[row.lse] = natural_lse(maximum, sum);
    }
  }

  // The CTA's partials of one segment: entries 2 * warp + which, a bit each, in unit order.
  struct WarpPartials {
    const DecodeCta& cta;
    unsigned entries;

    __device__ int end() const { return 2 * kMostWarps; }
    __device__ const Partial<S>* at(int entry) const {
      if (entry >= end() || (entries >> entry & 1u) == 0) return nullptr;
      return entry % 2 == 0 ? cta.inner_partial(entry / 2) : cta.last_partial(entry / 2);
    }
  };
  // The partials of one segment among all CTAs: the first one's last, the others' first.
  struct CtaPartials {
    const DecodeCta& cta;
    int first, last;

    __device__ int end() const { return last - first + 1; }
    __device__ const Partial<S>* at(int i) const {
      return i < end() ? cta.cta_partial(first + i, i == 0) : nullptr;
    }
  };

  // Lane i of every warp holds entry i; runs of entries of one segment are merged together.
  __device__ void merge_warps() {
    PartialTag mine;
    if (lane_ < 2 * a_.warps) mine = cta_storage_.tags[lane_ / 2][lane_ % 2];
    const unsigned held = __ballot_sync(0xffffffffu, mine.sequence >= 0);
    const unsigned before = held & ((1u << lane_) - 1u);
    const int previous = before == 0 ? lane_ : 31 - __clz(static_cast<int>(before));
    const bool same = (__shfl_sync(0xffffffffu, mine.sequence, previous) == mine.sequence) &
                      (__shfl_sync(0xffffffffu, mine.head, previous) == mine.head) & (before != 0);
    unsigned starts = __ballot_sync(0xffffffffu, mine.sequence >= 0 && !same);
    while (starts != 0) {
      const int begin = __ffs(static_cast<int>(starts)) - 1;
      starts &= starts - 1;
      const unsigned below_next = starts == 0 ? ~0u : (starts & -starts) - 1u;
      merge_segment({__shfl_sync(0xffffffffu, mine.sequence, begin),
                     __shfl_sync(0xffffffffu, mine.head, begin),
                     __shfl_sync(0xffffffffu, mine.segment_begin, begin)},
                    held & below_next & ~((1u << begin) - 1u));
    }
  }

  __device__ void merge_segment(const PartialTag& segment, unsigned entries) {
    const WarpPartials partials{*this, entries};
    const int columns = columns_of(segment.head);
    const SegmentItems items = segment_items(a_.problem.cache.lengths[segment.sequence],
                                             a_.problem.cache.packed[segment.sequence],
                                             a_.problem.cache.keep_first, a_.batch.zone_log2);
    const int first = shares_.at(segment.segment_begin);
    const int last = shares_.at(segment.segment_begin + items.last_begin());
    if (first == last) {
      merge_partials<S>(partials, columns,
                        [&](int column, int channel, float4 o, float maximum, float sum) {
                          store_merged(segment, column, channel, o, maximum, sum);
                        });
      return;
    }
    Partial<S>& mine = *cta_partial(blockIdx.x, static_cast<int>(blockIdx.x) == first);
    merge_partials<S>(partials, columns,
                      [&](int column, int channel, float4 o, float maximum, float sum) {
                        *reinterpret_cast<float4*>(&mine.o[column][channel]) = o;
                        if (channel == 0) {
                          mine.maximum[column] = maximum;
                          mine.sum[column] = sum;
                        }
                      });
    finish_segment(segment, columns, first, last);
  }

  // The last of the segment's CTAs merges the partials of all, in order.
  __device__ void finish_segment(const PartialTag& segment, int columns, int first, int last) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int finished = atomicAdd(&a_.counters[first], 1);
      cta_storage_.finisher = finished == last - first;
      if (cta_storage_.finisher) a_.counters[first] = 0;
    }
    __syncthreads();
    if (!cta_storage_.finisher) return;
    __threadfence();
    merge_partials<S>(CtaPartials{*this, first, last}, columns,
                      [&](int column, int channel, float4 o, float maximum, float sum) {
                        store_merged(segment, column, channel, o, maximum, sum);
                      });
  }

  // Sequences without tokens have no items: out 0, lse -inf.
  __device__ void write_empty_sequences() {
    const DecodeProblem& p = a_.problem;
    const std::int64_t rows = static_cast<std::int64_t>(p.query_tokens) * p.query_heads;
    for (int b = blockIdx.x; b < p.cache.batch; b += gridDim.x) {
      if (p.cache.lengths[b] != 0) continue;
      for (std::int64_t i = threadIdx.x; i < rows * S::head_dim; i += blockDim.x) {
        store_output(p, b * rows * S::head_dim + i, 0.f);
      }
      if (p.lse == nullptr) continue;
      for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) p.lse[b * rows + i] = -INFINITY;
    }
  }

  const DecodeArguments& a_;
  std::uint8_t* smem_;
  CtaStorage& cta_storage_;
  WarpStorage* warp_storage_;
  int warp_, lane_;
  int total_;      // units of the batch
  Shares shares_;  // of the CTAs
};

template <class Row>
__global__ void __launch_bounds__(kMaxWarps<Row::config> * 32, 1)
    decode_attention(const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(128) std::uint8_t smem[];
  DecodeCta<Row::config>(arguments, smem).run();
}

}  // namespace bitdecoding::decode
