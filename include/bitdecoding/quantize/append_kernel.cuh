// SPDX-License-Identifier: Apache-2.0
// Append on the device, in one launch. CTA (part, head, tensor) of a sequence:
//   part 0   fills the pages that hold tokens of the ring, then keeps the new tokens that stay in
//            fp16: their ring rows may be those of tokens just packed
//   part i   fills the i-th page of new tokens alone
// Bytes equal the CPU backend's. Of a sequence with a fault nothing is written, and it is reported.
#pragma once

#include <cuda_runtime.h>

#include "bitdecoding/quantize/append_problem.hpp"
#include "bitdecoding/quantize/growth.hpp"
#include "bitdecoding/quantize/pack_kernel.cuh"

namespace bitdecoding::quantize {

// What one CTA works on.
struct AppendTask {
  int batch, head, tensor;  // tensor: 0 K, 1 V
  int part;
};

// blockIdx: x = (part, head, tensor), tensor fastest, so that neighbours read the same token rows.
__device__ inline AppendTask find_append_task(int num_kv_heads) {
  const int in_part = blockIdx.x % (2 * num_kv_heads);
  return {static_cast<int>(blockIdx.y), in_part / 2, in_part % 2,
          static_cast<int>(blockIdx.x / (2 * num_kv_heads))};
}

// A sequence's append, the same in each of its CTAs.
struct AppendStep {
  Growth growth;
  int slot;
  int begin;  // the row of the input that holds position growth.old_length
  Fault fault;
};

template <int HeadDim>
struct AppendStorage {
  PackStorage<HeadDim> pack;
  AppendStep step;
};

__device__ inline AppendStep find_step(const AppendProblem& p, int batch) {
  const PagedKvCache& c = p.cache;
  // None of these loads waits for another.
  const SequenceState state{c.lengths[batch], c.packed[batch], c.slots[batch]};
  const int begin = p.runs.begin(batch);
  const int count = p.runs.count(batch);
  AppendStep step{{}, state.slot, begin, find_fault(p.runs, begin, count)};
  if (!step.fault) step.fault = find_fault(c, state);
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
__device__ inline void settle(const PagedKvCache& c, int batch, const AppendStep& step, bool sound,
                              int* counters) {
  __threadfence();
  const unsigned last = gridDim.x - 1;
  if (atomicInc(reinterpret_cast<unsigned*>(counters) + batch, last) != last || !sound) return;
  __threadfence();
  c.lengths[batch] = step.growth.length;
  c.packed[batch] = step.growth.packed;
}

// The tokens of one head's K or V by position: old ones in the ring, new ones in the input.
template <int HeadDim>
struct HeadTokens {
  const PagedKvCache& cache;
  const TokenRows& rows;
  int old_length;
  const std::uint16_t* input;  // channel 0 of position `old_length`
  std::uint16_t* side;         // (F + T, D) fp16

  __device__ HeadTokens(const AppendProblem& p, const AppendTask& task, const AppendStep& step)
      : cache(p.cache),
        rows(task.tensor == 0 ? p.k : p.v),
        old_length(step.growth.old_length),
        input(static_cast<const std::uint16_t*>(rows.data) +
              rows.offset(task.batch, step.begin, task.head)),
        side(p.cache.side + p.cache.side_offset(step.slot, task.head, task.tensor)) {}

  __device__ std::uint16_t* side_row(int row) const {
    return side + static_cast<std::int64_t>(row) * HeadDim;
  }
  // Eight channels as they lie in memory.
  __device__ uint4 load(int position, int channel) const {
    const std::uint16_t* row = position < old_length
                                   ? side_row(cache.tail_row(position))
                                   : input + (position - old_length) * rows.token_stride;
    return __ldcs(reinterpret_cast<const uint4*>(row + channel));  // read once: don't keep in L2
  }
  // These as fp16.
  __device__ uint4 arrived(int position, uint4 eight) const {
    if (position < old_length) return eight;
    return rows.type == ElementType::f16 ? arrive(eight, Fp16FromFp16{})
                                         : arrive(eight, Fp16FromBf16{});
  }
};

// Moves rows [0, rows) of D channels, eight channels at a time: all load(row, channel) of a batch
// are in flight before the first store(row, channel, eight).
template <int HeadDim, class Load, class Store>
__device__ void move_rows(int rows, const Load& load, const Store& store) {
  constexpr int kPieces = HeadDim / 8;  // of 16 bytes in a row
  constexpr int kRowStep = kPackThreads / kPieces;
  constexpr int kBatch = 4;
  const int channel = threadIdx.x % kPieces * 8;
#pragma unroll 1
  for (int first = threadIdx.x / kPieces; first < rows; first += kBatch * kRowStep) {
    uint4 pieces[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kRowStep < rows) pieces[i] = load(first + i * kRowStep, channel);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kRowStep < rows) store(first + i * kRowStep, channel, pieces[i]);
    }
  }
}

template <layout::PageConfig Config, class Storage>
__device__ void fill_page(const AppendProblem& p, const AppendTask& task, const AppendStep& step,
                          const layout::PageRecord& record, int column, Storage& storage) {
  const PagedKvCache& c = p.cache;
  const HeadTokens<Config.head_dim> tokens(p, task, step);
  const std::int64_t id = page_ids(c, task.batch)[column];
  std::uint8_t* bytes = c.pool + (id * c.num_kv_heads + task.head) * record.page_bytes();
  const layout::PackedKvPage<Config> page(record, bytes);
  const int position = column * c.format.page_tokens;
  const auto load = [&](const auto& sX) {  // (N,D)
    move_rows<Config.head_dim>(
        c.format.page_tokens,
        [&](int row, int channel) { return tokens.load(position + row, channel); },
        [&](int row, int channel, uint4 eight) {
          reinterpret_cast<uint4&>(sX(row, channel)) = tokens.arrived(position + row, eight);
        });
  };
  if (task.tensor == 0) {
    pack_k<Config>(load, c.keep_first - position, page, storage);
  } else {
    pack_v<Config>(load, page, storage);
    zero_padding(page, bytes);
  }
}

// The new tokens that stay in fp16.
template <int HeadDim>
__device__ void keep_tokens(const AppendProblem& p, const AppendTask& task,
                            const AppendStep& step) {
  const PagedKvCache& c = p.cache;
  const Growth& g = step.growth;
  const HeadTokens<HeadDim> tokens(p, task, step);
  const auto keep = [&](int begin, int end, const auto& row_of) {  // positions
    move_rows<HeadDim>(
        end - begin, [&](int row, int channel) { return tokens.load(begin + row, channel); },
        [&](int row, int channel, uint4 eight) {
          *reinterpret_cast<uint4*>(tokens.side_row(row_of(begin + row)) + channel) =
              tokens.arrived(begin + row, eight);
        });
  };
  keep(g.old_length, g.first_end(c.keep_first),
       [&](int position) { return c.first_row(position); });
  keep(g.tail_begin(), g.length, [&](int position) { return c.tail_row(position); });
}

// `Row` is a row of the kernel table: a struct whose static `config` is the PageConfig.
template <class Row>
__global__ void __launch_bounds__(kPackThreads)
    append_tokens(const __grid_constant__ AppendProblem p,
                  const __grid_constant__ layout::PageRecord record, int* counters,
                  int* error_word) {
  constexpr layout::PageConfig config = Row::config;
  extern __shared__ __align__(128) unsigned char smem[];
  auto& storage = *reinterpret_cast<AppendStorage<config.head_dim>*>(smem);
  const PagedKvCache& c = p.cache;

  const AppendTask task = find_append_task(c.num_kv_heads);
  if (threadIdx.x == 0) storage.step = find_step(p, task.batch);
  __syncthreads();
  const AppendStep& step = storage.step;
  const bool sound = is_sound(c, task.batch, step, error_word);
  // A warp that has the fewest rows to move.
  if (threadIdx.x == kPackThreads - 1) settle(c, task.batch, step, sound, counters);
  if (!sound) return;

  const Growth& g = step.growth;
  const int first_column = task.part == 0 ? g.first_column() : g.new_column() + task.part - 1;
  const int end_column = task.part == 0 ? g.new_column() : min(first_column + 1, g.end_column());
  for (int column = first_column; column < end_column; ++column) {
    fill_page<config>(p, task, step, record, column, storage.pack);
    __syncthreads();  // the tile is free, and rows of the ring have been read
  }
  if (task.part == 0) keep_tokens<config.head_dim>(p, task, step);
}

}  // namespace bitdecoding::quantize
