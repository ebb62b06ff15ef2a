// SPDX-License-Identifier: Apache-2.0
// Decode attention, one launch: every stream (a warp or more) takes its share of the batch's bytes,
// the CTA merges its streams' partials, and the last CTA to finish a segment merges the segment.
//   workspace   Partial [CTAs][streams]: ends of segments inside a CTA | Partial [CTAs][2]: first and
//               last segment of a CTA          counters [CTAs][columns], 0 between launches
#pragma once

#include "bitdecoding/decode/merge.cuh"
#include "bitdecoding/decode/prefetch.cuh"
#include "bitdecoding/decode/stream.cuh"
#include "bitdecoding/decode/wgmma/stream.cuh"

namespace bitdecoding::decode {

// Of any kernel.
inline constexpr int kMostWarps = 12;

// What the streams leave to the CTA.
struct CtaStorage {
  // Of the segment that ends in the stream's share and of its last one; sequence -1: none.
  SegmentPlace partials[kMostWarps][2];
  int last_stages[kMostWarps];  // of the ring: where a warp's last segment's partial lies
};

// StreamOf: what a warp does with the items of its ring.
template <DecodeConfig Config, template <DecodeConfig, class> class StreamOf = Stream>
class DecodeCta {
 public:
  using S = Shape<Config>;
  using Threads = StreamThreads<Config>;
  static_assert(!Wgmma<S> || Config.arch == Arch::sm90, "wgmma is sm_90a's");
  static_assert(!Wgmma<S> || !Config.page.has_blocks(), "wgmma needs whole groups");
  static_assert(!Wgmma<S> || S::head_dim <= 128, "O of wgmma takes 64 registers at head_dim 128");

  __device__ DecodeCta(const DecodeArguments& a, std::uint8_t* smem) : a_(a), smem_(smem) {}

  __device__ __forceinline__ void run() {
    const BatchItems items = choose_items();
    const int ctas = active_ctas(items.total, gridDim.x);
    if (items.total > 0 && static_cast<int>(blockIdx.x) < ctas) {
      if constexpr (Wgmma<S>) {
        GroupStream<Config> mine(a_, group_storage(Threads::stream()));
        stream(mine, items);
      } else if constexpr (Config.page.has_blocks()) {
        StreamOf<Config, BlockGroups> mine(a_, {}, arch::lane_id());
        stream(mine, items);
      } else if (a_.has_whole_groups) {
        StreamOf<Config, WholeGroups<S::head_dim>> mine(a_, {}, arch::lane_id());
        stream(mine, items);
      } else {
        StreamOf<Config, AnyGroups> mine(a_, {a_.problem.cache.format}, arch::lane_id());
        stream(mine, items);
      }
      __syncthreads();
      merge_streams();
    }
    if (storage(warp_id()).has_empty) write_other_sequences();
  }

 private:
  // Shared memory: GroupStorage of the streams | their rings | CtaStorage | WarpStorage of the warps
  __device__ CtaStorage& cta_storage() const {
    return *reinterpret_cast<CtaStorage*>(ring_bytes(streams()));
  }
  __device__ WarpStorage& storage(int warp) const {
    return reinterpret_cast<WarpStorage*>(ring_bytes(streams()) + sizeof(CtaStorage))[warp];
  }
  // A GroupStorage.
  __device__ auto& group_storage(int stream) const {
    return reinterpret_cast<GroupStorage<S>*>(smem_)[stream];
  }
  __device__ static int warp_id() { return arch::thread_id() / 32; }
  __device__ int streams() const { return a_.warps / Threads::kWarps; }

  // Chunks are items, or pages where every stream gets many: then a 16-bit tile takes as long as a
  // page.
  __device__ BatchItems choose_items() {
    constexpr int kFewItems = 16;  // chunks of a stream
    const PagedKvCache& cache = a_.problem.cache;
    const int lane = arch::lane_id();
    BatchShape batch = a_.batch;
    batch.item_tokens = kChunkTokens;
    const SequenceState first = load_first_state(cache, lane);
    prefetch_inputs(a_);
    BatchItems items = count_items(cache, batch, lane, first);
    const bool can_be_pages = a_.batch.item_tokens > kChunkTokens;
    if (can_be_pages && items.total >= kFewItems * static_cast<int>(gridDim.x) * streams()) {
      batch.item_tokens = a_.batch.item_tokens;
      items = count_items(cache, batch, lane, first);
    }
    if (lane == 0) {
      WarpStorage& mine = storage(warp_id());
      mine.batch = batch;
      mine.has_empty = items.has_empty;
      mine.shares = Shares(items.total, active_ctas(items.total, gridDim.x));
    }
    __syncwarp();
    return items;
  }

  __device__ Partial<S>* inner_partial(int stream) const {
    return reinterpret_cast<Partial<S>*>(a_.workspace) + blockIdx.x * streams() + stream;
  }
  __device__ Partial<S>* cta_partial(int cta, int which) const {
    return reinterpret_cast<Partial<S>*>(a_.workspace) + gridDim.x * streams() + 2 * cta + which;
  }
  __device__ std::uint8_t* ring_bytes(int stream) const {
    return smem_ + streams() * stream_storage_bytes<Config>() + stream * a_.stages * a_.stage_bytes;
  }
  // A warpgroup's partial takes the place of its operands, a warp's that of its last item.
  __device__ Partial<S>* stream_partial(int stream, int stage) const {
    if constexpr (Wgmma<S>) {
      return &group_storage(stream).partial();
    } else {
      return reinterpret_cast<Partial<S>*>(ring_bytes(stream) + stage * a_.stage_bytes);
    }
  }

  template <class Attention>
  __device__ __forceinline__ void stream(Attention& stream, const BatchItems& items) {
    const int warp = warp_id(), lane = arch::lane_id(), index = Threads::stream();
    const ItemRange share = storage(warp).shares.range(blockIdx.x);
    ItemRange range = Shares(share.end - share.begin, streams()).range(index);
    range = {share.begin + range.begin, share.begin + range.end};
    if (Threads::warp() == 0 && lane < 2) cta_storage().partials[index][lane].sequence = -1;
    Ring<Config> ring(a_, ring_bytes(index), storage(index * Threads::kWarps).barriers,
                      storage(warp), lane);
    ItemCursor cursor = ring.start(range, items);
    if (cursor.done()) return;
    // Queries are on their way while the ring fills, or while the segment before is finished. What
    // begins a segment stands here once: a second copy would have to be fetched in its turn.
    stream.load_query(cursor.segment());
    ring.fill(cursor);
    for (;;) {
      stream.begin_segment(ring.segment());
      attend_segment(stream, ring);
      Threads::sync();
      const bool is_last = ring.is_last();
      if (!is_last) stream.load_query(ring.next_segment());
      finish(stream, ring);
      if (is_last) return;
      ring.written();
      ring.release();
    }
  }

  // The stream's items of a segment, but for the release of the last one.
  template <class Attention>
  __device__ __forceinline__ void attend_segment(Attention& stream, Ring<Config>& ring) {
    for (;;) {
      const ItemTokens tokens = ring.tokens();
      ring.wait(tokens);
      if constexpr (Wgmma<S>) {
        const bool is_plain = ring.next_is_plain();
        if (!is_plain) ring.load_any();
        stream.attend(tokens, ring.bytes(), [&] {
          if (is_plain) ring.load_plain();
        });
      } else {
        ring.load_next();
        stream.attend(tokens, ring.bytes());
      }
      if (tokens.flags & ItemTokens::last) return;
      if (tokens.flags & ItemTokens::rewritten) ring.written();
      ring.release();
    }
  }

  // The segment's result leaves the registers for shared memory: a whole segment goes from there to
  // the output, one that an earlier stream began to the workspace; the stream's last segment stays.
  template <class Attention>
  __device__ void finish(Attention& stream, Ring<Config>& ring) {
    const int index = Threads::stream(), thread = Threads::thread();
    Partial<S>& partial = *stream_partial(index, ring.stage());
    Threads::sync();
    stream.store(partial);
    Threads::sync();
    const SegmentPlace segment = ring.segment();
    if (ring.tokens().flags & ItemTokens::whole) {
      store_whole(partial, segment);
    } else if (!ring.is_last()) {
      copy_partial<S, Threads::kThreads>(partial, *inner_partial(index), thread);
      if (thread == 0) cta_storage().partials[index][0] = segment;
    } else if (thread == 0) {
      cta_storage().partials[index][1] = segment;
      cta_storage().last_stages[index] = ring.stage();
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

  __device__ void store_whole(const Partial<S>& partial, const SegmentPlace& segment) {
    using Merged = MergedColumns<S, kFewColumns<S>>;
    const int columns = columns_of(segment.head);
    for (int first = Threads::warp() * kFewColumns<S>; first < columns;
         first += Threads::kWarps * kFewColumns<S>) {
      const int column = min(first + Merged::column(), columns - 1);
      Merged whole{partial.maximum[column], partial.sum[column]};
#pragma unroll
      for (int part = 0; part < Merged::kParts; ++part) {
        const float& first = partial.o[column][Merged::channel(part)];
        whole.o[part] = reinterpret_cast<const float4&>(first);
      }
      store_merged(segment, column, true, whole);
    }
  }

  template <int Columns>
  __device__ void store_merged(const SegmentPlace& segment, int column, bool is_mine,
                               const MergedColumns<S, Columns>& merged) {
    store_column<S>(a_.problem, row_of(segment.sequence, segment.head, column), is_mine, merged);
  }

  template <class Merged>
  __device__ void store_partial_column(const Merged& merged, int column, Partial<S>& to) const {
#pragma unroll
    for (int part = 0; part < Merged::kParts; ++part) {
      reinterpret_cast<float4&>(to.o[column][Merged::channel(part)]) = merged.o[part];
    }
    to.maximum[column] = merged.maximum;
    to.sum[column] = merged.sum;
  }

  // Entries 2 * stream + which of the CTA's partials, in the items' order: entry i is lane i's.
  struct StreamPartials {
    const Partial<S>* mine = nullptr;
    unsigned held = 0;    // entries that there are
    unsigned starts = 0;  // of them, the first of each segment
  };
  __device__ const SegmentPlace& segment_of(int entry) const {
    return cta_storage().partials[entry / 2][entry % 2];
  }
  // Without a branch before the votes: nvcc 13.0 has begun its reconvergence above __syncthreads(),
  // where the warp was apart, and lanes then voted by themselves.
  __device__ StreamPartials find_partials() const {
    const int lane = arch::lane_id();
    const int entry = min(lane, 2 * streams() - 1), stream = entry / 2;
    const SegmentPlace& place = segment_of(entry);
    const bool is_held = (lane == entry) & (place.sequence >= 0);
    const std::uintptr_t inner = reinterpret_cast<std::uintptr_t>(inner_partial(stream));
    const std::uintptr_t last =
        reinterpret_cast<std::uintptr_t>(stream_partial(stream, cta_storage().last_stages[stream]));
    StreamPartials found;
    found.mine = reinterpret_cast<const Partial<S>*>(entry % 2 == 0 ? inner : last);
    found.held = __ballot_sync(0xffffffffu, is_held);
    const unsigned before = found.held & ((1u << lane) - 1u);
    const int previous = before == 0 ? lane : 31 - __clz(static_cast<int>(before));
    const int begin = __shfl_sync(0xffffffffu, place.begin, previous);
    found.starts = __ballot_sync(0xffffffffu, is_held & ((before == 0) | (begin != place.begin)));
    return found;
  }

  // Warps have a column or two each, or, where there are too many columns for that, four at a time.
  __device__ void merge_streams() {
    const StreamPartials found = find_partials();
    const int columns = min(a_.columns, S::columns);
    if (__popc(found.starts) * columns <= a_.warps * kFewColumns<S>) {
      merge_segments<kFewColumns<S>>(found, columns);
    } else {
      merge_segments<kManyColumns>(found, columns);
    }
  }

  template <int Columns>
  __device__ void merge_segments(const StreamPartials& found, int columns) {
    const int turns = (columns + Columns - 1) / Columns;  // of a segment
    for (int turn = warp_id(); turn < __popc(found.starts) * turns; turn += a_.warps) {
      const int index = turn / turns, lane = arch::lane_id();
      // The segment's entries: from the one that starts it to the one that starts the next.
      const bool is_start = (found.starts >> lane & 1) != 0;
      const int before = __popc(found.starts & ((1u << lane) - 1u));
      const unsigned start = __ballot_sync(0xffffffffu, is_start && before == index);
      const unsigned next = found.starts & ~(start | (start - 1u));
      const unsigned below_next = next == 0 ? ~0u : (next & -next) - 1u;
      const PartialList<S> partials(found.held & below_next & ~(start - 1u), found.mine);
      merge_columns<Columns>(segment_of(__ffs(static_cast<int>(start)) - 1),
                             (turn - index * turns) * Columns, partials);
    }
  }

  // Of `ctas` CTAs from `first` on, those from number `begin` on, 32 at most: the last segment of
  // the first CTA, the first segment of the others.
  __device__ PartialList<S> cta_partials(int first, int ctas, int begin) const {
    const int i = min(begin + arch::lane_id(), ctas - 1);
    const int count = min(ctas - begin, 32);
    return {~0u >> (32 - count), cta_partial(first + i, i == 0)};
  }

  // To the output, or, of a segment that other CTAs have partials of, to the workspace: the last of
  // the CTAs merges the partials of all, in order. It does so with the instructions that have just
  // merged its own: others would have to be fetched first.
  template <int Columns>
  __device__ void merge_columns(const SegmentPlace& segment, int first_column,
                                const PartialList<S>& partials) {
    using Merged = MergedColumns<S, Columns>;
    const int columns = columns_of(segment.head);
    if (first_column >= columns) return;
    const int column = min(first_column + Merged::column(), columns - 1);
    bool is_mine = first_column + Merged::column() < columns;
    const Shares shares = storage(warp_id()).shares;
    const ItemRange share = shares.range(blockIdx.x);
    const bool began = segment.begin >= share.begin;
    bool is_whole = began && segment.last < share.end;
    int first = 0, ctas = 0;
    for (;;) {
      const int count = ctas == 0 ? partials.count() : ctas;
      const auto list = [&](int begin) {
        return ctas == 0 ? partials : cta_partials(first, ctas, begin);
      };
      Merged merged;
      if (count > kMergeBatch<S, Columns>) {
        for (int begin = 0; begin < count; begin += 32) {
          merged.maximum = raise_maximum<S>(list(begin), column, merged.maximum);
        }
      }
      for (int begin = 0; begin < count; begin += 32) {
        merge_partials<S, Columns>(list(begin), column, merged);
      }
      if (is_whole) {
        store_merged(segment, column, is_mine, merged);
        return;
      }
      store_partial_column(merged, column, *cta_partial(blockIdx.x, began));
      first = shares.at(segment.begin);
      ctas = shares.at(segment.last) + 1 - first;
      is_mine =
          is_last_of<Merged::kLanes>(a_.counters + first * S::columns + column, is_mine, ctas);
      if (!__any_sync(0xffffffffu, is_mine)) return;
      is_whole = true;
    }
  }

  // Whether `all` warps have counted now, each `Lanes` lanes for themselves; if so, resets the
  // counter. What the others wrote before they counted is seen after.
  template <int Lanes>
  __device__ bool is_last_of(int* counter, bool counts, int all) const {
    __syncwarp();
    int before = 0;
    if (counts && arch::lane_id() % Lanes == 0) {
      before = arch::count(counter);
      if (before == all - 1) *counter = 0;
    }
    before = __shfl_sync(0xffffffffu, before, arch::lane_id() / Lanes * Lanes);
    __syncwarp();
    return counts && before == all - 1;
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
};

template <class Row>
__global__ void __launch_bounds__(max_warps(Row::config) * 32, 1)
    decode_attention(const __grid_constant__ DecodeArguments arguments) {
  extern __shared__ __align__(128) std::uint8_t smem[];
  DecodeCta<Row::config>(arguments, smem).run();
}

}  // namespace bitdecoding::decode
