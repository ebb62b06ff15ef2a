// SPDX-License-Identifier: Apache-2.0
// Prefill pack on the device: one CTA turns the K, then the V of one (page, head) into its record.
// While it waits for one of them, the other CTAs of its SM are at work.
//   global --cp.async--> fp16 tile --ranges--> parameters, coders --ldmatrix--> units --> page
// Bytes equal the CPU backend's. A row with an impossible run writes nothing, a page id outside the
// pool is skipped; both are reported through the error word.
#pragma once

#include <cuda_runtime.h>

#include "bitdecoding/cache/device_error.cuh"
#include "bitdecoding/layout/packed_kv_tensor.hpp"
#include "bitdecoding/quantize/group_range.cuh"
#include "bitdecoding/quantize/pack_problem.hpp"
#include "bitdecoding/quantize/pack_units.cuh"
#include "bitdecoding/quantize/token_tile.cuh"

namespace bitdecoding::quantize {

// 8 warps: one 32-token run of a channel pair per thread at head_dim 128.
inline constexpr int kPackThreads = 256;

template <int HeadDim>
struct alignas(128) PackStorage {
  cute::array_aligned<cutlass::half_t, cute::cosize_v<TileLayout<HeadDim>>, 16> tile;  // (N,D)
  // Of the tile: tables of both axes are as large.
  alignas(16) unsigned char table[sizeof(GroupTable<KAxis::token, HeadDim>)];

  template <KAxis Axis>
  __device__ auto& groups() {
    static_assert(sizeof(GroupTable<Axis, HeadDim>) <= sizeof table);
    return reinterpret_cast<GroupTable<Axis, HeadDim>&>(table);
  }
};

// What one CTA packs.
struct PackTask {
  int batch, head;
  int page;          // of this call's pages of the sequence
  int token = 0;     // its first row in the input
  int position = 0;  // its first position in the sequence
  int page_id = -1;  // in the pool; -1: nothing to do
};

// blockIdx: x = (page, head), head fastest, so that neighbours read the same token rows.
__device__ inline PackTask find_task(const PackProblem& p, int* error_word) {
  const int page = static_cast<int>(blockIdx.x) / p.num_kv_heads;
  PackTask task{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x) - page * p.num_kv_heads,
                page};
  const int begin = p.runs.begin(task.batch);
  const int count = p.runs.count(task.batch);
  if (const Fault fault = find_fault(p.runs, begin, count)) {
    report(error_word, task.batch, fault);
    return task;
  }
  const int pages = count >> log2_of(p.format.page_tokens);
  if (task.page >= pages) return task;
  const int first_page = p.first_page == nullptr ? 0 : p.first_page[task.batch];
  if (first_page < 0 || first_page > p.max_pages - pages) {
    report(error_word, task.batch, first_page, p.max_pages, DeviceError::first_page);
    return task;
  }
  const int column = first_page + task.page;
  const int page_id = p.block_table[static_cast<std::int64_t>(task.batch) * p.max_pages + column];
  if (page_id < 0 || page_id >= p.num_pages) {
    report(error_word, task.batch, page_id, p.num_pages, DeviceError::page_id);
    return task;
  }
  task.token = begin + task.page * p.format.page_tokens;
  task.position = column * p.format.page_tokens;
  task.page_id = page_id;
  return task;
}

// What stores a group's parameters: (token, channel, parameters). All tensors (N,D).
template <class Scales, class Zeros>
__device__ auto storing(const Scales& gScale, const Zeros& gZero) {
  return [=](const auto& token, const auto& channel, const format::GroupParameters& parameters) {
    gScale(token, channel) = cutlass::half_t::bitcast(parameters.scale);
    gZero(token, channel) = cutlass::half_t::bitcast(parameters.zero);
  };
}
template <class Exponents>
__device__ auto storing(const Exponents& gExponent) {
  return [=](const auto& token, const auto& channel, std::uint8_t exponent) {
    gExponent(token, channel) = exponent;
  };
}

// The K half of a page from load(sK), which fills a tile (N,D) with fp16; the page's tokens before
// `first_token` don't widen the ranges of channel groups.
template <layout::PageConfig Config, class Load, class Page, class Storage>
__device__ void pack_k(const Load& load, int first_token, const Page& page, Storage& s) {
  const KvFormat& format = page.record().format();
  const int tokens = format.page_tokens;
  const auto sK = make_tile<Config.head_dim>(s.tile.data());  // (N,D)
  auto& groups = s.template groups<Config.k_axis>();
  load(sK);
  __syncthreads();
  if (format.token_norm) {
    const auto gNorm = page.token_norms();  // (N)
    divide_by_norms<kPackThreads>(sK, tokens,
                                  [&](int token, cutlass::half_t norm) { gNorm(token) = norm; });
    __syncthreads();
  }
  const auto store = [&] {
    if constexpr (Config.has_blocks()) {
      return storing(page.k_exponents());
    } else {
      return storing(page.k_scales(), page.k_zeros());
    }
  }();
  const int group_log2 = log2_of(format.k_group);
  const float margin = format::clip_margin(format.k_clip);
  if constexpr (Config.k_axis == KAxis::channel) {
    find_channel_ranges<kPackThreads>(sK, tokens, first_token, groups);
    __syncthreads();
    const int in_chunk_log2 = max(log2_of(kChunkTokens) - group_log2, 0);  // groups of a chunk
    visit_groups<kPackThreads, Config.k_bits, Config.k_axis>(
        groups, tokens >> group_log2, Config.head_dim, format.k_group / kRunValues, margin,
        [&](int group, int channel, const auto& parameters) {
          const int in_chunk = group & ((1 << in_chunk_log2) - 1);
          store(cute::make_coord(0, in_chunk, group >> in_chunk_log2), channel, parameters);
        });
  } else {
    find_token_ranges<kPackThreads>(sK, tokens, format.k_group, groups);
    __syncthreads();
    visit_groups<kPackThreads, Config.k_bits, Config.k_axis>(
        groups, Config.head_dim >> group_log2, tokens, 1, margin,
        [&](int group, int token, const auto& parameters) {
          store(token, cute::make_coord(0, group), parameters);
        });
  }
  __syncthreads();
  pack_k_units<Config, kPackThreads>(page, sK, groups);
}

// The V half of a page from load(sV).
template <layout::PageConfig Config, class Load, class Page, class Storage>
__device__ void pack_v(const Load& load, const Page& page, Storage& s) {
  const KvFormat& format = page.record().format();
  const int tokens = format.page_tokens;
  const auto sV = make_tile<Config.head_dim>(s.tile.data());  // (N,D)
  auto& groups = s.template groups<KAxis::token>();
  load(sV);
  __syncthreads();
  find_token_ranges<kPackThreads>(sV, tokens, format.v_group, groups);
  __syncthreads();
  const auto store = [&] {
    if constexpr (Config.has_blocks()) {
      return storing(page.v_exponents());
    } else {
      return storing(page.v_scales(), page.v_zeros());
    }
  }();
  visit_groups<kPackThreads, Config.v_bits, Config.k_axis>(
      groups, Config.head_dim >> log2_of(format.v_group), tokens, 1,
      format::clip_margin(format.v_clip), [&](int group, int token, const auto& parameters) {
        store(token, cute::make_coord(0, group), parameters);
      });
  __syncthreads();
  pack_v_units<Config, kPackThreads>(page, sV, groups);
}

// Bytes behind the last chunk, up to the record's alignment, are zero.
template <class Page>
__device__ void zero_padding(const Page& page, std::uint8_t* bytes) {
  const int used = page.record().chunk(page.record().format().chunks());
  for (int i = used + threadIdx.x; i < page.record().page_bytes(); i += kPackThreads) bytes[i] = 0;
}

// What a CTA does. `Row` is a row of the kernel table: a struct whose static `config` is the
// PageConfig.
template <class Row>
__device__ void pack_page(const PackProblem& p, const layout::PageRecord& record, int* error_word,
                          PackStorage<Row::config.head_dim>& storage) {
  constexpr layout::PageConfig config = Row::config;
  const PackTask task = find_task(p, error_word);
  if (task.page_id < 0) return;
  std::uint8_t* bytes =
      p.pool +
      (static_cast<std::int64_t>(task.page_id) * p.num_kv_heads + task.head) * record.page_bytes();
  const layout::PackedKvPage<config> page(record, bytes);
  const auto load = [&](const TokenRows& rows, int tensor) {
    return [&, rows, tensor](const auto& sX) {  // (N,D)
      const int tokens = p.format.page_tokens;
      load_tile<kPackThreads>(rows, task.batch, task.token, task.head, tokens, sX);
      const auto arrival = format::arrival_of(p.format, p.k_mean, task.head, tensor);
      if (!arrival.changes()) return;
      __syncthreads();
      transform_tile<kPackThreads>(arrival, 0, tokens, sX);
    };
  };
  pack_k<config>(load(p.k, 0), p.keep_first - task.position, page, storage);
  __syncthreads();  // the tile is free
  pack_v<config>(load(p.v, 1), page, storage);
  zero_padding(page, bytes);
}

template <class Row>
__global__ void __launch_bounds__(kPackThreads)
    pack_pages(const __grid_constant__ PackProblem p,
               const __grid_constant__ layout::PageRecord record, int* error_word) {
  extern __shared__ __align__(128) unsigned char smem[];
  pack_page<Row>(p, record, error_word,
                 *reinterpret_cast<PackStorage<Row::config.head_dim>*>(smem));
}

}  // namespace bitdecoding::quantize
