// SPDX-License-Identifier: Apache-2.0
// Append on the device, in one launch. CTAs of a sequence:
//   one for each head        fills the pages that hold tokens of the ring, then keeps the new tokens
//                            that stay in fp16, K and V: their ring rows may be those of tokens
//                            just packed
//   one for each of the most pages that may hold new tokens alone, head, and K or V    fills its
//                            half of the page's record, if there is such a page
// No CTA reads ring rows that another one writes. Bytes equal the CPU backend's. Of a sequence with
// a fault nothing is written, and it is reported.
//
// A step of few tokens is as long as its chain of latencies: state --> the new tokens' rows; state
// --> counter --> the new state. What needn't wait for the state is read beside it.
#pragma once

#include <cuda_runtime.h>

#include "bitdecoding/quantize/append_problem.hpp"
#include "bitdecoding/quantize/growth.hpp"
#include "bitdecoding/quantize/head_tokens.cuh"
#include "bitdecoding/quantize/pack_kernel.cuh"

namespace bitdecoding::quantize {

// What one CTA works on.
struct AppendTask {
  int batch, head;
  int new_page;                  // which of the pages of new tokens alone; -1: the ring's pages
  int first_tensor, end_tensor;  // 0 K, 1 V
};

// blockIdx: x = heads, then (page, head, tensor), tensor fastest, so that neighbours read the same
// token rows; y = sequence.
__device__ inline AppendTask find_append_task(int num_kv_heads) {
  const int batch = blockIdx.y, first_new = num_kv_heads;
  if (static_cast<int>(blockIdx.x) < first_new) {
    return {batch, static_cast<int>(blockIdx.x), -1, 0, 2};
  }
  const int i = blockIdx.x - first_new;
  return {batch, i / 2 % num_kv_heads, i / 2 / num_kv_heads, i % 2, i % 2 + 1};
}

// All that a sequence's append depends on, but for page ids.
struct AppendInput {
  SequenceState state;
  int begin, count;  // of its run
};

// None of these loads waits for another.
__device__ inline AppendInput read_input(const AppendProblem& p, int batch) {
  const PagedKvCache& c = p.cache;
  return {{c.lengths[batch], c.packed[batch], c.slots[batch]},
          p.runs.begin(batch),
          p.runs.count(batch)};
}

// A sequence's append, the same in each of its CTAs.
struct AppendStep {
  Growth growth;
  int slot;
  int begin;  // the row of the input that holds position growth.old_length
  Fault fault;
};

// What lasts lies in shared memory: registers are short while tiles are packed.
template <int HeadDim>
struct AppendStorage {
  PackStorage<HeadDim> pack;
  AppendTask task;
  AppendStep step;
};

__device__ inline AppendStep find_step(const AppendProblem& p, const AppendInput& input) {
  const PagedKvCache& c = p.cache;
  const SequenceState& state = input.state;
  AppendStep step{{}, state.slot, input.begin, find_fault(p.runs, input.begin, input.count)};
  if (!step.fault && has_fault(c, state)) step.fault = find_fault(c, state);
  if (!step.fault) step.fault = find_growth_fault(c, state, input.count, p.max_tokens);
  if (!step.fault) step.growth = grow(c, state.length, state.packed, input.count);
  return step;
}

__device__ inline const std::int32_t* page_ids(const PagedKvCache& c, int batch) {
  return c.block_table + static_cast<std::int64_t>(batch) * c.max_pages;
}

// Whether the sequence may be written. All threads of the CTA come here; a sequence's first CTA
// reports for all.
__device__ inline bool is_sound(const PagedKvCache& c, int batch, const AppendStep& step,
                                int* error_word) {
  if (step.fault) {
    if (blockIdx.x == 0 && threadIdx.x == 0) report(error_word, batch, step.fault);
    return false;
  }
  if (!step.growth.fills_pages()) return true;
  const int end_column = step.growth.end_column();
  const std::int32_t* ids = page_ids(c, batch);
  Fault fault;
#pragma unroll 1
  for (int column = step.growth.first_column() + threadIdx.x; column < end_column;
       column += kPackThreads) {
    const int id = ids[column];
    if (id < 0 || id >= c.num_pages) fault = {DeviceError::page_id, id, c.num_pages};
  }
  if (fault && blockIdx.x == 0) report(error_word, batch, fault);
  return __syncthreads_and(!fault) != 0;
}

// Called by one thread of every CTA of a sequence once the CTA has the sequence's state. Returns how
// many have counted before: the last one may overwrite the state, whatever the others are still
// doing, and leaves the counter zero. It takes no fence: what a CTA has read has arrived before it
// counts, and nothing that one writes is read by another.
__device__ inline int count_cta(int batch, int* counters) {
  auto* counter = reinterpret_cast<unsigned*>(counters) + batch;
  return static_cast<int>(atomicInc(counter, gridDim.x - 1));
}

// ---- tokens that stay in fp16 ----

// New tokens of a head, K by the first half of the threads, V by the second, in 16-byte pieces:
// each thread has a column of one of them, and every kRowStep-th row.
template <int HeadDim>
class KeptTokens {
 public:
  __device__ KeptTokens(const AppendProblem& p, const AppendTask& task)
      : thread_(arch::thread_id()), rows_(tensor() == 0 ? p.k : p.v), task_(task) {
    const std::uint16_t* mean = arrival(p.cache).mean;
    if (mean != nullptr) mean_ = reinterpret_cast<const uint4&>(mean[channel()]);
  }

  // Reads the thread's first piece where rows are whole: it needn't wait for the sequence's state.
  __device__ void begin(const TokenRuns& runs) {
    has_piece_ = task_.new_page < 0 && runs.leftpad == nullptr && runs.num_tokens == nullptr &&
                 first_token() < runs.row_tokens;
    if (has_piece_) piece_ = load(row(0), first_token());
  }

  __device__ void keep(const PagedKvCache& c, const AppendStep& step) const {
    const Growth& g = step.growth;
    // Of the new tokens: [0, first_end) go to the first rows, [tail_begin, count) to the ring.
    const int first_end = g.first_end(c.keep_first) - g.old_length;
    const int tail_begin = g.tail_begin() - g.old_length, count = g.length - g.old_length;
    std::uint16_t* side = c.side + c.side_offset(step.slot, task_.head, tensor()) + channel();
    const auto side_row = [&](int row) {
      return reinterpret_cast<uint4*>(side + static_cast<std::int64_t>(row) * HeadDim);
    };
    const auto first_row = [&](int i) { return side_row(c.first_row(g.old_length + i)); };
    const auto tail_row = [&](int i) { return side_row(c.tail_row(g.old_length + i)); };
    const std::uint16_t* input = row(step.begin);
    if (const format::Arrival how = arrival(c); how.changes()) {
      // By whole warps, in which neighbours have a row together.
      const int in_warp = thread_ % 32 / kPieces;
#pragma unroll 1
      for (int base = 0; base + first_token() - in_warp < count; base += kRowStep) {
        if (base >= first_end) base = max(base, tail_begin);
        const int i = base + first_token();
        uint4 eight = piece_;
        if (i < count && !(has_piece_ && i == first_token())) eight = load(input, i);
        eight = transform_piece<HeadDim>(arrive(eight, rows_.type), mean_, how.rotation);
        if (i < first_end) *first_row(i) = eight;
        if (i >= tail_begin && i < count) *tail_row(i) = eight;
      }
      return;
    }
    int begin = 0;
    if (has_piece_) {
      const int i = first_token();
      const uint4 eight = arrive(piece_, rows_.type);
      if (i < first_end) *first_row(i) = eight;
      if (i >= tail_begin && i < count) *tail_row(i) = eight;
      begin = kRowStep;
    }
    move(begin, first_end, input, first_row);
    move(max(begin, tail_begin), count, input, tail_row);
  }

 private:
  static constexpr int kPieces = HeadDim / 8;  // of 16 bytes in a row
  static constexpr int kTensorThreads = kPackThreads / 2;
  static constexpr int kRowStep = kTensorThreads / kPieces;

  __device__ int channel() const { return thread_ % kPieces * 8; }
  __device__ int tensor() const { return thread_ / kTensorThreads; }
  __device__ int first_token() const { return thread_ % kTensorThreads / kPieces; }

  __device__ format::Arrival arrival(const PagedKvCache& c) const {
    return c.arrival(task_.head, tensor());
  }
  __device__ const std::uint16_t* row(int token) const {
    return static_cast<const std::uint16_t*>(rows_.data) +
           rows_.offset(task_.batch, token, task_.head);
  }
  __device__ uint4 load(const std::uint16_t* input, int i) const {
    // Read once: not to stay in L2.
    return __ldcs(reinterpret_cast<const uint4*>(input + i * rows_.token_stride + channel()));
  }

  // New tokens [begin, end) to their rows: all loads of a batch are in flight before its stores.
  template <class RowOf>
  __device__ void move(int begin, int end, const std::uint16_t* input, const RowOf& row_of) const {
    constexpr int kBatch = 4;
#pragma unroll 1
    for (int first = begin + first_token(); first < end; first += kBatch * kRowStep) {
      uint4 pieces[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kRowStep < end) pieces[i] = load(input, first + i * kRowStep);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + i * kRowStep;
        if (token < end) *row_of(token) = arrive(pieces[i], rows_.type);
      }
    }
  }

  unsigned thread_;
  TokenRows rows_;
  AppendTask task_;
  bool has_piece_ = false;
  uint4 piece_{};
  uint4 mean_{};
};

// ---- pages ----

// A CTA's half records: those of `first_tensor` up to `end_tensor` of every page in turn, one tile
// of shared memory for all.
template <layout::PageConfig Config>
class PageFiller {
 public:
  __device__ PageFiller(const AppendProblem& p, const layout::PageRecord& record,
                        const AppendTask& task, const AppendStep& step,
                        PackStorage<Config.head_dim>& storage)
      : p_(p), record_(record), task_(task), step_(step), storage_(storage) {}

  // Begins to read the first tile: into shared memory alone, whatever its page may be.
  __device__ void begin() const { begin(first_column(), task_.first_tensor); }
  __device__ void abandon() const { cute::cp_async_wait<0>(); }

  // After begin().
  __device__ void fill() const {
    int column = first_column(), tensor = task_.first_tensor;
    while (column < end_column()) {
      fill_half(column, tensor);
      __syncthreads();  // the tile is free, and rows of the ring have been read
      if (++tensor == task_.end_tensor) {
        tensor = task_.first_tensor;
        ++column;
      }
      begin(column, tensor);
    }
  }

 private:
  using Tokens = HeadTokens<Config.head_dim, kPackThreads>;

  __device__ int tokens_of_page() const { return p_.cache.format.page_tokens; }
  // A CTA of a page of new tokens alone has this one.
  __device__ int first_column() const {
    const Growth& g = step_.growth;
    return task_.new_page < 0 ? g.first_column() : g.new_column() + task_.new_page;
  }
  __device__ int end_column() const {
    const Growth& g = step_.growth;
    return task_.new_page < 0 ? g.new_column() : min(first_column() + 1, g.end_column());
  }

  __device__ Tokens tokens(int tensor) const {
    const TokenRows& rows = tensor == 0 ? p_.k : p_.v;
    return Tokens(p_.cache, step_.growth.old_length, rows,
                  static_cast<const std::uint16_t*>(rows.data) +
                      rows.offset(task_.batch, step_.begin, task_.head),
                  p_.cache.side + p_.cache.side_offset(step_.slot, task_.head, tensor));
  }

  __device__ void begin(int column, int tensor) const {
    if (column >= end_column()) return;
    const auto sX = make_tile<Config.head_dim>(storage_.tile.data());  // (N,D)
    tokens(tensor).begin_tile(column * tokens_of_page(), tokens_of_page(), sX);
  }

  __device__ void fill_half(int column, int tensor) const {
    const PagedKvCache& c = p_.cache;
    const int position = column * tokens_of_page();
    const std::int64_t id = page_ids(c, task_.batch)[column];
    std::uint8_t* bytes = c.pool + (id * c.num_kv_heads + task_.head) * record_.page_bytes();
    const layout::PackedKvPage<Config> page(record_, bytes);
    const auto load = [&](const auto& sX) {  // (N,D)
      tokens(tensor).end_tile(position, tokens_of_page(), sX);
      // What comes next is brought nearer while this one is packed, not before it has come.
      if (tensor + 1 < task_.end_tensor) tokens(tensor + 1).prefetch(position, tokens_of_page());
      // Tokens of the ring have been transformed when they came.
      const int first_new = step_.growth.old_length - position;
      const format::Arrival arrival = c.arrival(task_.head, tensor);
      if (!arrival.changes() || first_new >= tokens_of_page()) return;
      __syncthreads();
      transform_tile<kPackThreads>(arrival, first_new, tokens_of_page(), sX);
    };
    if (tensor == 0) {
      pack_k<Config>(load, c.keep_first - position, page, storage_);
    } else {
      pack_v<Config>(load, page, storage_);
      zero_padding(page, bytes);
    }
  }

  const AppendProblem& p_;
  const layout::PageRecord& record_;
  const AppendTask& task_;
  const AppendStep& step_;
  PackStorage<Config.head_dim>& storage_;
};

// What a CTA does, `storage` in shared memory.
template <layout::PageConfig Config>
__device__ void append_by_cta(const AppendProblem& p, const layout::PageRecord& record,
                              AppendStorage<Config.head_dim>& storage, int* counters,
                              int* error_word) {
  const PagedKvCache& c = p.cache;
  const AppendTask found = find_append_task(c.num_kv_heads);
  AppendInput input;
  if (threadIdx.x == 0) input = read_input(p, found.batch);
  KeptTokens<Config.head_dim> kept(p, found);
  kept.begin(p.runs);
  if (threadIdx.x == 0) {
    storage.task = found;
    storage.step = find_step(p, input);
  }
  __syncthreads();
  const AppendTask& task = storage.task;
  const AppendStep& step = storage.step;
  // One of a warp that has the fewest rows to move; nobody waits yet for what it returns.
  int counted = -1;
  if (threadIdx.x == kPackThreads - 1) counted = count_cta(task.batch, counters);

  const bool fills_pages = step.growth.fills_pages();  // not where there is a fault
  const PageFiller<Config> pages(p, record, task, step, storage.pack);
  if (fills_pages) pages.begin();
  const bool sound = is_sound(c, task.batch, step, error_word);
  if (!sound) return pages.abandon();

  if (counted == static_cast<int>(gridDim.x) - 1) {
    c.lengths[task.batch] = step.growth.length;
    c.packed[task.batch] = step.growth.packed;
  }
  if (fills_pages) {
    pages.fill();
    kept = KeptTokens<Config.head_dim>(p, task);  // anew: no registers in between
  }
  if (task.new_page < 0) kept.keep(c, step);
}

// CTAs of an SM: at head_dim 256, shared memory has room for no more than two.
constexpr int append_ctas(const layout::PageConfig& config) {
  return config.head_dim > 128 ? 2 : 4;
}

// `Row` is a row of the kernel table: a struct whose static `config` is the PageConfig.
template <class Row>
__global__ void __launch_bounds__(kPackThreads, append_ctas(Row::config))
    append_tokens(const __grid_constant__ AppendProblem p,
                  const __grid_constant__ layout::PageRecord record, int* counters,
                  int* error_word) {
  extern __shared__ __align__(128) unsigned char smem[];
  auto& storage = *reinterpret_cast<AppendStorage<Row::config.head_dim>*>(smem);
  append_by_cta<Row::config>(p, record, storage, counters, error_word);
}

}  // namespace bitdecoding::quantize
