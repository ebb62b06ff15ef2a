// SPDX-License-Identifier: Apache-2.0
// Prefill pack on the device: one CTA turns the K or the V of one (page, head) into its record.
//   global --16-byte loads--> fp16 tile --ranges--> parameters, coders --ldmatrix--> units --> page
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
  CoderTable coders;
};

// What one CTA packs.
struct PackTask {
  int batch, head, tensor;  // tensor: 0 K, 1 V
  int page;                 // of this call's pages of the sequence
  int token;                // its first row in the input
  int position;             // its first position in the sequence
  int page_id;              // in the pool; -1: nothing to do
};

// blockIdx: x = (page, head, tensor), tensor fastest, so that neighbours read the same token rows.
__device__ inline PackTask find_task(const PackProblem& p, int* error_word) {
  const int in_page = blockIdx.x % (2 * p.num_kv_heads);
  PackTask task{static_cast<int>(blockIdx.y),
                in_page / 2,
                in_page % 2,
                static_cast<int>(blockIdx.x / (2 * p.num_kv_heads)),
                0,
                0,
                -1};
  const int begin = p.runs.begin(task.batch);
  const int count = p.runs.count(task.batch);
  if (const Fault fault = find_fault(p.runs, begin, count)) {
    report(error_word, task.batch, fault);
    return task;
  }
  if (task.page >= count / p.format.page_tokens) return task;
  const int first_page = p.first_page == nullptr ? 0 : p.first_page[task.batch];
  const int pages = count / p.format.page_tokens;
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

// The K half of a page from load(sK), which fills a tile (N,D) with fp16; the page's tokens before
// `first_token` don't widen the ranges of channel groups.
template <layout::PageConfig Config, class Load, class Page, class Storage>
__device__ void pack_k(const Load& load, int first_token, const Page& page, Storage& s) {
  const KvFormat& format = page.record().format();
  const int tokens = format.page_tokens;
  const auto sK = make_tile<Config.head_dim>(s.tile.data());  // (N,D)
  load(sK);
  __syncthreads();
  if (format.token_norm) {
    const auto gNorm = page.token_norms();  // (N)
    divide_by_norms<kPackThreads>(sK, tokens,
                                  [&](int token, cutlass::half_t norm) { gNorm(token) = norm; });
    __syncthreads();
  }
  const auto gScale = page.k_scales();  // (N,D)
  const auto gZero = page.k_zeros();    // (N,D)
  const auto visit = [&](int channel, int token, const format::GroupRange& range) {
    const auto parameters = format::group_parameters(range, Config.k_bits);
    gScale(token, channel) = cutlass::half_t::bitcast(parameters.scale);
    gZero(token, channel) = cutlass::half_t::bitcast(parameters.zero);
    const format::GroupCoder coder(parameters);
    if constexpr (Config.k_axis == KAxis::channel) {
      s.coders.coder[token >> log2_of(format.k_group)][channel] = coder;
    } else {
      s.coders.coder[channel >> log2_of(format.k_group)][token] = coder;
    }
  };
  if constexpr (Config.k_axis == KAxis::channel) {
    visit_channel_groups<kPackThreads>(sK, tokens, format.k_group, first_token, visit);
  } else {
    visit_token_groups<kPackThreads>(sK, tokens, format.k_group, visit);
  }
  __syncthreads();
  pack_k_units<Config, kPackThreads>(page, sK, s.coders);
}

// The V half of a page from load(sV).
template <layout::PageConfig Config, class Load, class Page, class Storage>
__device__ void pack_v(const Load& load, const Page& page, Storage& s) {
  const KvFormat& format = page.record().format();
  const int tokens = format.page_tokens;
  const auto sV = make_tile<Config.head_dim>(s.tile.data());  // (N,D)
  load(sV);
  __syncthreads();
  const auto gScale = page.v_scales();  // (N,D)
  const auto gZero = page.v_zeros();    // (N,D)
  visit_token_groups<kPackThreads>(
      sV, tokens, format.v_group, [&](int channel, int token, const format::GroupRange& range) {
        const auto parameters = format::group_parameters(range, Config.v_bits);
        gScale(token, channel) = cutlass::half_t::bitcast(parameters.scale);
        gZero(token, channel) = cutlass::half_t::bitcast(parameters.zero);
        s.coders.coder[channel >> log2_of(format.v_group)][token] = format::GroupCoder(parameters);
      });
  __syncthreads();
  pack_v_units<Config, kPackThreads>(page, sV, s.coders);
}

// Bytes behind the last chunk, up to the record's alignment, are zero.
template <class Page>
__device__ void zero_padding(const Page& page, std::uint8_t* bytes) {
  const int used = page.record().chunk(page.record().format().chunks());
  for (int i = used + threadIdx.x; i < page.record().page_bytes(); i += kPackThreads) bytes[i] = 0;
}

// `Row` is a row of the kernel table: a struct whose static `config` is the PageConfig.
template <class Row>
__global__ void __launch_bounds__(kPackThreads)
    pack_pages(const __grid_constant__ PackProblem p,
               const __grid_constant__ layout::PageRecord record, int* error_word) {
  constexpr layout::PageConfig config = Row::config;
  extern __shared__ __align__(128) unsigned char smem[];
  auto& storage = *reinterpret_cast<PackStorage<config.head_dim>*>(smem);

  const PackTask task = find_task(p, error_word);
  if (task.page_id < 0) return;
  std::uint8_t* bytes =
      p.pool +
      (static_cast<std::int64_t>(task.page_id) * p.num_kv_heads + task.head) * record.page_bytes();
  const layout::PackedKvPage<config> page(record, bytes);
  const TokenRows& rows = task.tensor == 0 ? p.k : p.v;
  const auto load = [&](const auto& sX) {  // (N,D)
    load_tile<kPackThreads>(rows, task.batch, task.token, task.head, p.format.page_tokens, sX);
  };
  if (task.tensor == 0) {
    pack_k<config>(load, p.keep_first - task.position, page, storage);
  } else {
    pack_v<config>(load, page, storage);
    zero_padding(page, bytes);
  }
}

}  // namespace bitdecoding::quantize
