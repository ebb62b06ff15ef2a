// SPDX-License-Identifier: Apache-2.0
// Append on the device, in one launch. CTAs of a sequence:
//   one for each head        keeps the new tokens that stay in fp16, K and V, and fills the pages
//                            that hold tokens of the ring
//   one for each of the most pages that may hold new tokens alone, head, and K or V    fills its
//                            half of the page's record, if there is such a page
// No CTA reads ring rows that another one writes. Bytes equal the CPU backend's. Of a sequence with
// a fault nothing is written, and it is reported.
//
// A step of few tokens is as long as its chain of latencies: state --> the new tokens' rows; state,
// counter --> the new state. Input rows that can be known before are read before.
#pragma once

#include <cuda_runtime.h>

#include "bitdecoding/arch/sm80.cuh"
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

__device__ inline AppendStep find_step(const AppendProblem& p, int batch) {
  const PagedKvCache& c = p.cache;
  // None of these loads waits for another.
  const SequenceState state{c.lengths[batch], c.packed[batch], c.slots[batch]};
  const int begin = p.runs.begin(batch);
  const int count = p.runs.count(batch);
  AppendStep step{{}, state.slot, begin, find_fault(p.runs, begin, count)};
  if (!step.fault && has_fault(c, state)) step.fault = find_fault(c, state);
  if (!step.fault) step.fault = find_growth_fault(c, state, count, p.max_tokens);
  if (!step.fault) step.growth = grow(c, state.length, state.packed, count);
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
  const int end_column = step.growth.end_column();
  if (step.growth.first_column() == end_column) return true;
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

// Called by one thread of every CTA of a sequence once the CTA has read the sequence's state: the
// last one may overwrite it, whatever the others are still doing, and leaves the counter zero.
// A CTA's reads come before its barrier, that before its count, which releases; the last count
// acquires, by way of those between, all that were released before.
__device__ inline void settle(const PagedKvCache& c, int batch, const AppendStep& step, bool sound,
                              int* counters) {
  const int last = static_cast<int>(gridDim.x) - 1;
  if (arch::count_around(counters + batch, last) != last || !sound) return;
  c.lengths[batch] = step.growth.length;
  c.packed[batch] = step.growth.packed;
}

// ---- tokens that stay in fp16 ----

// New tokens of a head, K and V side by side, shared out to the threads in 16-byte pieces: each has
// a column of one of them, and every kRowStep-th row.
template <int HeadDim>
class KeptTokens {
 public:
  // What can be read without knowing the sequence's state is under way when this returns: where
  // rows are whole, the thread's first piece.
  __device__ KeptTokens(const AppendProblem& p, const AppendTask& task)
      : rows_(tensor() == 0 ? p.k : p.v),
        has_piece_(task.new_page < 0 && p.runs.leftpad == nullptr && p.runs.num_tokens == nullptr) {
    if (has_piece_ && first_row() < p.runs.row_tokens) piece_ = load(row(task, 0), first_row());
  }

  __device__ void keep(const PagedKvCache& c, const AppendTask& task,
                       const AppendStep& step) const {
    const Growth& g = step.growth;
    const std::uint16_t* input = row(task, step.begin);
    std::uint16_t* side = c.side + c.side_offset(step.slot, task.head, tensor());
    move(0, g.first_end(c.keep_first) - g.old_length, input, [&](int i) {
      return side + static_cast<std::int64_t>(c.first_row(g.old_length + i)) * HeadDim;
    });
    move(g.tail_begin() - g.old_length, g.length - g.old_length, input, [&](int i) {
      return side + static_cast<std::int64_t>(c.tail_row(g.old_length + i)) * HeadDim;
    });
  }

 private:
  static constexpr int kPieces = HeadDim / 8;  // of 16 bytes in a row
  static constexpr int kRowStep = kPackThreads / (2 * kPieces);

  __device__ static int channel() { return threadIdx.x % kPieces * 8; }
  __device__ static int tensor() { return threadIdx.x / kPieces % 2; }
  __device__ static int first_row() { return threadIdx.x / (2 * kPieces); }

  __device__ const std::uint16_t* row(const AppendTask& task, int token) const {
    return static_cast<const std::uint16_t*>(rows_.data) +
           rows_.offset(task.batch, token, task.head);
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
    for (int first = begin + first_row(); first < end; first += kBatch * kRowStep) {
      uint4 pieces[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + i * kRowStep;
        const bool is_there = i == 0 && has_piece_ && token == first_row();
        if (token < end) pieces[i] = is_there ? piece_ : load(input, token);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + i * kRowStep;
        if (token < end) {
          *reinterpret_cast<uint4*>(row_of(token) + channel()) = arrive(pieces[i], rows_.type);
        }
      }
    }
  }

  TokenRows rows_;
  bool has_piece_;
  uint4 piece_;
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
      : p_(p), record_(record), task_(task), step_(step), storage_(storage) {
    const Growth& g = step.growth;
    column_ = task.new_page < 0 ? g.first_column() : g.new_column() + task.new_page;
    tensor_ = task.first_tensor;
  }

  // Begins to read the first tile: into shared memory alone, whatever its page may be.
  __device__ void begin() const {
    if (column_ >= end_column()) return;
    const auto sX = make_tile<Config.head_dim>(storage_.tile.data());  // (N,D)
    tokens().begin_tile(position(), tokens_of_page(), sX);
    // What comes next is brought nearer while this one is packed.
    if (tensor_ + 1 < task_.end_tensor) tokens(tensor_ + 1).prefetch(position(), tokens_of_page());
  }
  __device__ void abandon() const { cute::cp_async_wait<0>(); }

  __device__ void fill() {
    while (column_ < end_column()) {
      fill_half();
      __syncthreads();  // the tile is free, and rows of the ring have been read
      if (++tensor_ == task_.end_tensor) {
        tensor_ = task_.first_tensor;
        ++column_;
      }
      begin();
    }
  }

 private:
  using Tokens = HeadTokens<Config.head_dim, kPackThreads>;

  __device__ int tokens_of_page() const { return p_.cache.format.page_tokens; }
  // A CTA of a page of new tokens alone has this one.
  __device__ int end_column() const {
    const Growth& g = step_.growth;
    return task_.new_page < 0 ? g.new_column()
                              : min(g.new_column() + task_.new_page + 1, g.end_column());
  }
  __device__ int position() const { return column_ * tokens_of_page(); }

  __device__ Tokens tokens() const { return tokens(tensor_); }
  __device__ Tokens tokens(int tensor) const {
    const TokenRows& rows = tensor == 0 ? p_.k : p_.v;
    return Tokens(p_.cache, step_.growth.old_length, rows,
                  static_cast<const std::uint16_t*>(rows.data) +
                      rows.offset(task_.batch, step_.begin, task_.head),
                  p_.cache.side + p_.cache.side_offset(step_.slot, task_.head, tensor));
  }

  __device__ void fill_half() const {
    const PagedKvCache& c = p_.cache;
    const std::int64_t id = page_ids(c, task_.batch)[column_];
    std::uint8_t* bytes = c.pool + (id * c.num_kv_heads + task_.head) * record_.page_bytes();
    const layout::PackedKvPage<Config> page(record_, bytes);
    const auto load = [&](const auto& sX) {  // (N,D)
      tokens().end_tile(position(), tokens_of_page(), sX);
    };
    if (tensor_ == 0) {
      pack_k<Config>(load, c.keep_first - position(), page, storage_);
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
  int column_, tensor_;
};

// What a CTA does, `storage` in shared memory.
template <layout::PageConfig Config>
__device__ void append_by_cta(const AppendProblem& p, const layout::PageRecord& record,
                              AppendStorage<Config.head_dim>& storage, int* counters,
                              int* error_word) {
  const PagedKvCache& c = p.cache;
  const AppendTask found = find_append_task(c.num_kv_heads);
  const KeptTokens<Config.head_dim> kept(p, found);
  if (threadIdx.x == 0) {
    storage.task = found;
    storage.step = find_step(p, found.batch);
  }
  __syncthreads();
  const AppendTask& task = storage.task;
  const AppendStep& step = storage.step;
  const Growth& g = step.growth;  // nothing grows where there is a fault

  PageFiller<Config> pages(p, record, task, step, storage.pack);
  pages.begin();
  const bool sound = is_sound(c, task.batch, step, error_word);
  // A warp that has the fewest rows to move.
  if (threadIdx.x == kPackThreads - 1) settle(c, task.batch, step, sound, counters);
  if (!sound) return pages.abandon();

  // New tokens may need rows of tokens that pages still need: those come first. (Rows of the ring
  // that this CTA has begun to copy are none of the new ones where keeps_apart().)
  if (task.new_page < 0 && g.keeps_apart(c.tail_tokens)) kept.keep(c, task, step);
  pages.fill();
  if (task.new_page < 0 && !g.keeps_apart(c.tail_tokens)) {
    KeptTokens<Config.head_dim>(p, task).keep(c, task, step);  // anew: no registers in between
  }
}

// `Row` is a row of the kernel table: a struct whose static `config` is the PageConfig.
template <class Row>
__global__ void __launch_bounds__(kPackThreads, 4)
    append_tokens(const __grid_constant__ AppendProblem p,
                  const __grid_constant__ layout::PageRecord record, int* counters,
                  int* error_word) {
  extern __shared__ __align__(128) unsigned char smem[];
  auto& storage = *reinterpret_cast<AppendStorage<Row::config.head_dim>*>(smem);
  append_by_cta<Row::config>(p, record, storage, counters, error_word);
}

}  // namespace bitdecoding::quantize
