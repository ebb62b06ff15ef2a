// SPDX-License-Identifier: Apache-2.0
// Decode attention, one launch: every warp streams its share of the batch's bytes, the CTA merges
// its warps' partials, and the last CTA to finish a segment merges the segment.
//   workspace   Partial [CTAs][warps]: ends of segments inside a CTA | Partial [CTAs][2]: first and
//               last segment of a CTA          counters [CTAs], zero before and after
#pragma once

#include "bitdecoding/decode/merge.cuh"
#include "bitdecoding/decode/stream.cuh"

namespace bitdecoding::decode {

// Warps of a CTA, one CTA per SM: as many as the registers of a stream allow.
template <DecodeConfig Config>
inline constexpr int kMaxWarps = Config.query_columns == 8 ? 12 : 8;
inline constexpr int kMostWarps = 12;

// A partial that a warp leaves to the CTA.
struct PartialTag {
  int sequence = -1;  // -1: none
  int head = 0;
  int segment_begin = 0, segment_last = 0;  // units at which its first and last item begin
  int stage = 0;                            // of the warp's ring, where its last partial lies
};

struct alignas(16) CtaStorage {
  PartialTag tags[kMostWarps][2];  // the segment that ends in the warp's share, its last segment
  // Of the segments that reach beyond the CTA.
  int finish_first[2], finish_partials[2];
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
        batch_(a.batch),
        total_(choose_items()),
        shares_(total_, active_ctas(total_, gridDim.x)) {}

  __device__ void run() {
    if (total_ > 0 && static_cast<int>(blockIdx.x) < active_ctas(total_, gridDim.x)) {
      if (has_whole_groups(a_.problem.cache.format)) {
        stream(WholeGroups<S::head_dim>{});
      } else {
        stream(AnyGroups{a_.problem.cache.format});
      }
      __syncthreads();
      merge_warps();
    }
    write_other_sequences();
  }

 private:
  // Pages are items only where every warp gets many; returns the units of the batch.
  __device__ int choose_items() {
    constexpr int kFewUnits = 16;  // of a warp
    const PagedKvCache& cache = a_.problem.cache;
    const int total = total_units(cache, batch_, lane_);
    const bool are_pages = batch_.items.packed_tokens > kChunkTokens;
    if (!are_pages || total >= kFewUnits * static_cast<int>(gridDim.x) * a_.warps) return total;
    batch_.items = ItemShape{};
    return total_units(cache, batch_, lane_);
  }

  __device__ Partial<S>* inner_partial(int warp) const {
    return reinterpret_cast<Partial<S>*>(a_.workspace) + blockIdx.x * a_.warps + warp;
  }
  __device__ Partial<S>* cta_partial(int cta, int which) const {
    return reinterpret_cast<Partial<S>*>(a_.workspace) + gridDim.x * a_.warps + 2 * cta + which;
  }
  __device__ std::uint8_t* ring_bytes(int warp) const {
    return smem_ + warp * a_.stages * a_.stage_bytes;
  }
  // A warp's last partial lies where its last item was.
  __device__ Partial<S>* last_partial(int warp, int stage) const {
    return reinterpret_cast<Partial<S>*>(ring_bytes(warp) + stage * a_.stage_bytes);
  }

  template <class Groups>
  __device__ void stream(const Groups& groups) {
    const UnitRange share = shares_.range(blockIdx.x);
    UnitRange range = Shares(share.end - share.begin, a_.warps).range(warp_);
    range = {share.begin + range.begin, share.begin + range.end};
    if (lane_ < 2) cta_storage_.tags[warp_][lane_] = PartialTag{};
    Ring<Config> ring(a_, batch_, ring_bytes(warp_), warp_storage_[warp_], range, lane_);
    Stream<Config, Groups> stream(a_, groups, lane_);
    while (!ring.empty()) {
      const Item item = ring.item();
      if (item.flags & Item::first) stream.begin_segment(item);
      ring.wait();
      ring.load_next();
      stream.attend(item, ring.bytes());
      if (item.flags & Item::last) finish(stream, ring, item);
      if (item.flags & (Item::zone | Item::last)) ring.written();
      ring.release();
    }
  }

  // The segment's result leaves the registers for the stage of its last item: a whole segment goes
  // from there to the output, one that an earlier warp began to the workspace; the warp's last
  // segment stays.
  template <class Groups>
  __device__ void finish(Stream<Config, Groups>& stream, Ring<Config>& ring, const Item& item) {
    auto& partial = *reinterpret_cast<Partial<S>*>(ring.bytes());
    __syncwarp();
    store_partial<S>(stream.output(), stream.softmax(), a_.record.format().v_group, lane_, partial);
    __syncwarp();
    const PartialTag tag{item.sequence, item.head, item.segment_begin, item.segment_last,
                         ring.stage()};
    if (item.flags & Item::whole) {
      store_whole(partial, tag);
    } else if (!ring.is_last()) {
      copy_partial<S>(partial, *inner_partial(warp_), lane_);
      if (lane_ == 0) cta_storage_.tags[warp_][0] = tag;
    } else if (lane_ == 0) {
      cta_storage_.tags[warp_][1] = tag;
    }
  }

  __device__ int columns_of(int head) const {
    if (a_.column_tiles == 1) return a_.columns;
    return min(S::columns, a_.columns - head % a_.column_tiles * S::columns);
  }
  __device__ OutputRow row_of(int sequence, int head, int column) const {
    if (a_.column_tiles == 1) return OutputRow(a_.problem, sequence, head, a_.group, column);
    return OutputRow(a_.problem, sequence, head / a_.column_tiles, a_.group,
                     head % a_.column_tiles * S::columns + column);
  }

  __device__ void store_whole(const Partial<S>& partial, const PartialTag& tag) {
    const int channel = lane_ * 4;
    for (int column = 0; channel < S::head_dim && column < columns_of(tag.head); ++column) {
      store_merged(tag, column, channel,
                   *reinterpret_cast<const float4*>(&partial.o[column][channel]),
                   partial.maximum[column], partial.sum[column]);
    }
  }

  __device__ void store_merged(const PartialTag& tag, int column, int channel, float4 o,
                               float maximum, float sum) {
    const OutputRow row = row_of(tag.sequence, tag.head, column);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    store_output(a_.problem, row.out + channel,
                 {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse});
    if (channel == 0 && a_.problem.lse != nullptr) {
      a_.problem.lse[row.lse] = natural_lse(maximum, sum);
    }
  }

  // The partials of one segment in this CTA, in unit order: entries 2 * warp + which, a bit each,
  // and the pointer of entry i in lane i.
  class WarpPartials {
   public:
    static constexpr int kBatch = 12;

    __device__ WarpPartials(unsigned entries, const Partial<S>* mine)
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
  // The partials of one segment in all CTAs, in unit order: the first one's last, the others' first.
  class CtaPartials {
   public:
    static constexpr int kBatch = 20;

    __device__ CtaPartials(const DecodeCta& cta, int first, int count)
        : cta_(cta), first_(first), count_(count) {}
    __device__ int count() const { return count_; }
    __device__ const Partial<S>& next() {
      const int i = next_;
      next_ = min(next_ + 1, count_ - 1);
      return *cta_.cta_partial(first_ + i, i == 0);
    }

   private:
    const DecodeCta& cta_;
    int first_, count_;
    int next_ = 0;
  };

  // A segment that has partials in this CTA, and which.
  struct CtaSegment {
    PartialTag tag;
    unsigned entries = 0;              // of WarpPartials; 0: no segment
    const Partial<S>* mine = nullptr;  // the lane's
  };

  // Lane i of every warp holds entry i; runs of entries of one segment are merged together. Columns
  // of all segments are dealt out to the warps one by one.
  __device__ void merge_warps() {
    PartialTag mine;
    if (lane_ < 2 * a_.warps) mine = cta_storage_.tags[lane_ / 2][lane_ % 2];
    const Partial<S>* partial =
        lane_ % 2 == 0 ? inner_partial(lane_ / 2) : last_partial(lane_ / 2, mine.stage);
    const unsigned held = __ballot_sync(0xffffffffu, mine.sequence >= 0);
    const unsigned before = held & ((1u << lane_) - 1u);
    const int previous = before == 0 ? lane_ : 31 - __clz(static_cast<int>(before));
    const bool same = (__shfl_sync(0xffffffffu, mine.sequence, previous) == mine.sequence) &
                      (__shfl_sync(0xffffffffu, mine.head, previous) == mine.head) & (before != 0);
    unsigned starts = __ballot_sync(0xffffffffu, mine.sequence >= 0 && !same);
    const UnitRange share = shares_.range(blockIdx.x);
    CtaSegment crossing[2];  // began in an earlier CTA, or ends in a later one
    int turn = 0;
    while (starts != 0) {
      const int begin = __ffs(static_cast<int>(starts)) - 1;
      starts &= starts - 1;
      const unsigned below_next = starts == 0 ? ~0u : (starts & -starts) - 1u;
      const CtaSegment segment{{__shfl_sync(0xffffffffu, mine.sequence, begin),
                                __shfl_sync(0xffffffffu, mine.head, begin),
                                __shfl_sync(0xffffffffu, mine.segment_begin, begin),
                                __shfl_sync(0xffffffffu, mine.segment_last, begin)},
                               held & below_next & ~((1u << begin) - 1u),
                               partial};
      const bool began = segment.tag.segment_begin >= share.begin;
      const bool ends = segment.tag.segment_last < share.end;
      if (began && ends) {
        merge_inside(segment, turn);
      } else {
        merge_crossing(segment, began, turn);
        crossing[began] = segment;
      }
    }
    if ((crossing[0].entries | crossing[1].entries) != 0) finish_crossing(crossing);
  }

  __device__ bool is_my_turn(int& turn) const {
    const bool mine = turn == warp_;
    turn = turn + 1 == a_.warps ? 0 : turn + 1;
    return mine;
  }

  __device__ void merge_inside(const CtaSegment& segment, int& turn) {
    for (int column = 0; column < columns_of(segment.tag.head); ++column) {
      if (!is_my_turn(turn)) continue;
      merge_column<S>(WarpPartials(segment.entries, segment.mine), column,
                      [&](int channel, float4 o, float maximum, float sum) {
                        store_merged(segment.tag, column, channel, o, maximum, sum);
                      });
    }
  }

  __device__ void merge_crossing(const CtaSegment& segment, bool began, int& turn) {
    Partial<S>& mine = *cta_partial(blockIdx.x, began);
    for (int column = 0; column < columns_of(segment.tag.head); ++column) {
      if (!is_my_turn(turn)) continue;
      merge_column<S>(WarpPartials(segment.entries, segment.mine), column,
                      [&](int channel, float4 o, float maximum, float sum) {
                        *reinterpret_cast<float4*>(&mine.o[column][channel]) = o;
                        if (channel == 0) {
                          mine.maximum[column] = maximum;
                          mine.sum[column] = sum;
                        }
                      });
    }
  }

  // The last of a segment's CTAs merges the partials of all, in order. crossing[0] began in an
  // earlier CTA, crossing[1] in this one.
  __device__ void finish_crossing(const CtaSegment (&crossing)[2]) {
    const bool counts = warp_ == a_.warps - 1 && lane_ < 2;  // a warp that often has no column
    const CtaSegment& mine = crossing[lane_ % 2];
    const int first = counts ? shares_.at(mine.tag.segment_begin) : 0;
    const int last = counts ? shares_.at(mine.tag.segment_last) : 0;
    __syncthreads();
    if (counts) {
      int partials = 0;  // 0: not the last CTA
      if (mine.entries != 0) {
        __threadfence();  // the whole CTA's partial: fences are cumulative over the barrier
        if (atomicAdd(&a_.counters[first], 1) == last - first) {
          a_.counters[first] = 0;
          partials = last - first + 1;
          __threadfence();
        }
      }
      cta_storage_.finish_first[lane_] = first;
      cta_storage_.finish_partials[lane_] = partials;
    }
    __syncthreads();
    int turn = 0;
    for (int i = 0; i < 2; ++i) {
      const int partials = cta_storage_.finish_partials[i];
      if (partials == 0) continue;
      const PartialTag& tag = crossing[i].tag;
      const CtaPartials all(*this, cta_storage_.finish_first[i], partials);
      for (int column = 0; column < columns_of(tag.head); ++column) {
        if (!is_my_turn(turn)) continue;
        merge_column<S>(all, column, [&](int channel, float4 o, float maximum, float sum) {
          store_merged(tag, column, channel, o, maximum, sum);
        });
      }
    }
  }

  // Sequences without items. Without tokens: out 0, lse -inf. With a fault: NaN, and a report.
  __device__ void write_other_sequences() {
    const DecodeProblem& p = a_.problem;
    const PagedKvCache& c = p.cache;
    const std::int64_t rows = static_cast<std::int64_t>(p.query_tokens) * p.query_heads;
    for (int b = blockIdx.x; b < c.batch; b += gridDim.x) {
      const SequenceState state = load_state(c, b);
      const Fault fault = find_decode_fault(c, state);
      if (state.length != 0 && !fault) continue;
      if (fault) report(a_.error_word, b, fault);
      const float out = fault ? NAN : 0.f;
      for (std::int64_t i = 4 * threadIdx.x; i < rows * S::head_dim; i += 4 * blockDim.x) {
        store_output(p, b * rows * S::head_dim + i, {out, out, out, out});
      }
      if (p.lse == nullptr) continue;
      for (std::int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
        p.lse[b * rows + i] = fault ? NAN : -INFINITY;
      }
    }
  }

  const DecodeArguments& a_;
  std::uint8_t* smem_;
  CtaStorage& cta_storage_;
  WarpStorage* warp_storage_;
  int warp_, lane_;
  BatchShape batch_;
  int total_;      // units of the batch
  Shares shares_;  // of the CTAs
};

// Starts what would otherwise be waited for one after the other while the lengths are being read:
// queries and block table come to the L2 cache, and the SM learns the addresses of all arrays.
__device__ inline void prefetch_inputs(const DecodeArguments& a) {
  constexpr int kLine = 128;
  const DecodeProblem& p = a.problem;
  const PagedKvCache& c = p.cache;
  switch (threadIdx.x) {
    case 0: arch::prefetch_l2(p.q); break;
    case 1: arch::prefetch_l2(c.block_table); break;
    case 2: arch::prefetch_l2(c.side); break;
    case 3: arch::prefetch_l2(c.pool); break;
    case 4: arch::prefetch_l2(a.workspace); break;
    case 5: arch::prefetch_l2(a.counters); break;
    case 6: arch::prefetch_l2(p.out); break;
    default: break;
  }
  const std::int64_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const std::int64_t table_bytes = std::int64_t{4} * c.batch * c.max_pages;
  if (thread * kLine < table_bytes) {
    arch::prefetch_l2(reinterpret_cast<const char*>(c.block_table) + thread * kLine);
  }
  const std::int64_t last_row = (c.batch - 1) * p.q_batch_stride +
                                (p.query_tokens - 1) * p.q_token_stride +
                                (p.query_heads - 1) * p.q_head_stride;
  if (thread * kLine < 2 * last_row) {
    arch::prefetch_l2(static_cast<const char*>(p.q) + thread * kLine);
  }
}

template <class Row>
__global__ void __launch_bounds__(kMaxWarps<Row::config> * 32, 1)
    decode_attention(const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(128) std::uint8_t smem[];
  prefetch_inputs(arguments);
  DecodeCta<Row::config>(arguments, smem).run();
}

}  // namespace bitdecoding::decode
