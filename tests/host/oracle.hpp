// SPDX-License-Identifier: Apache-2.0
// Decode attention in float64, one scalar at a time, over the codes and rows that a cache holds,
// and how far fp32 may be from it. Pages are read by PageReader, not by the library.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <vector>

#include "bitdecoding/cache/paged_kv_cache.hpp"
#include "bitdecoding/format/float16.hpp"
#include "page_reader.hpp"

namespace bitdecoding::test {

// One KV head's attended tokens of one sequence, (L, D). Rounding errors are relative to `size`:
// |code * scale| + |zero|, times the norm.
struct DequantizedHead {
  int length = 0;
  int head_dim = 0;
  std::vector<double> k, v, k_size, v_size;
};

// code * scale and zero of an element.
struct Terms {
  double step, zero;
};

inline Terms read_element(const PageReader& page, bool is_k, int token, int channel) {
  const int bits = is_k ? page.f.k_bits : page.f.v_bits;
  const double code =
      page.code(is_k ? page.k_place(token, channel) : page.v_place(token, channel), bits);
  if (page.blocks()) {
    const int exponent =
        page.bytes[is_k ? page.k_exponent(token, channel) : page.v_exponent(token, channel)];
    const double scale = exponent == 0 ? 0. : exponent == 31 ? NAN : std::ldexp(1., exponent - 15);
    return {code * scale, scale * (bits == 2 ? -1.5 : -7.5)};
  }
  const auto fp16 = [&page](int at) { return double{format::float_from_fp16(page.fp16(at))}; };
  return is_k ? Terms{code * fp16(page.k_scale(token, channel)), fp16(page.k_zero(token, channel))}
              : Terms{code * fp16(page.v_scale(token, channel)), fp16(page.v_zero(token, channel))};
}

inline void read_packed(const PageReader& page, int token, double* k, double* v, double* k_size,
                        double* v_size) {
  const double norm =
      page.f.token_norm ? double{format::float_from_fp16(page.fp16(page.norm(token)))} : 1.;
  for (int c = 0; c < page.f.head_dim; ++c) {
    const Terms key = read_element(page, true, token, c);
    const Terms value = read_element(page, false, token, c);
    k[c] = (key.step + key.zero) * norm;
    v[c] = value.step + value.zero;
    k_size[c] = (std::abs(key.step) + std::abs(key.zero)) * norm;
    v_size[c] = std::abs(value.step) + std::abs(value.zero);
  }
}

inline DequantizedHead dequantize(const PagedKvCache& c, int sequence, int head) {
  DequantizedHead result;
  const int head_dim = result.head_dim = c.format.head_dim;
  const int length = result.length = c.lengths[sequence];
  const int packed = c.packed[sequence];
  const std::size_t count = static_cast<std::size_t>(length) * static_cast<std::size_t>(head_dim);
  for (auto* array : {&result.k, &result.v, &result.k_size, &result.v_size}) array->resize(count);
  for (int token = 0; token < length; ++token) {
    const std::size_t at = static_cast<std::size_t>(token) * static_cast<std::size_t>(head_dim);
    const bool first = token < std::min(c.keep_first, packed);
    if (!first && token < packed) {
      const int page =
          c.block_table[std::ptrdiff_t{sequence} * c.max_pages + token / c.format.page_tokens];
      read_packed({c.format, c.pool + c.page_offset(page, head)}, token % c.format.page_tokens,
                  &result.k[at], &result.v[at], &result.k_size[at], &result.v_size[at]);
      continue;
    }
    const std::ptrdiff_t row = first ? token : c.keep_first + token % c.tail_tokens;
    for (int i = 0; i < head_dim; ++i) {
      const auto side = [&](int tensor) {
        const auto* rows = c.side + c.side_offset(c.slots[sequence], head, tensor);
        return double{format::float_from_fp16(rows[row * head_dim + i])};
      };
      result.k[at + i] = side(0);
      result.v[at + i] = side(1);
      result.k_size[at + i] = std::abs(side(0));
      result.v_size[at + i] = std::abs(side(1));
    }
  }
  return result;
}

// H of every block of a row, by its definition; `of_errors`: bounds, which add up.
inline std::vector<double> rotated(const std::vector<double>& row, int block,
                                   bool of_errors = false) {
  if (block == 0) return row;
  std::vector<double> turned(row.size());
  for (std::size_t c = 0; c < row.size(); ++c) {
    const std::size_t size = static_cast<std::size_t>(block), first = c / size * size;
    for (std::size_t j = first; j < first + size; ++j) {
      const bool minus = std::popcount((c - first) & (j - first)) % 2 != 0 && !of_errors;
      turned[c] += minus ? -row[j] : row[j];
    }
    turned[c] /= std::sqrt(static_cast<double>(block));
  }
  return turned;
}

struct Attention {
  std::vector<double> out, out_error;
  double lse = -INFINITY;
  double lse_error = 0.;
};

// Errors, with u = 2^-24 and S = the largest sum over channels of |q| * k_size * softmax_scale:
//   score        (D + 16) u S    folding of scales, one rounding per channel, bias, norm, maximum
//   probability  twice that (its own and the sum's) + 16 u for the exponential
//   output       that, and one rounding per token of a segment (512) and per segment, all relative
//                to the weighted mean of v_size
inline Attention attend(const DequantizedHead& head, const double* q, double softmax_scale) {
  constexpr double u = 0x1p-24;
  const int head_dim = head.head_dim;
  Attention result{std::vector<double>(head_dim), std::vector<double>(head_dim)};
  if (head.length == 0) return result;
  std::vector<double> scores(static_cast<std::size_t>(head.length));
  double maximum = -INFINITY, size = 0.;
  for (int n = 0; n < head.length; ++n) {
    double score = 0., score_size = 0.;
    for (int c = 0; c < head_dim; ++c) {
      const std::size_t at = static_cast<std::size_t>(n * head_dim + c);
      score += q[c] * head.k[at];
      score_size += std::abs(q[c]) * head.k_size[at];
    }
    scores[static_cast<std::size_t>(n)] = score * softmax_scale;
    maximum = std::max(maximum, score * softmax_scale);
    size = std::max(size, score_size * std::abs(softmax_scale));
  }
  double sum = 0.;
  for (int n = 0; n < head.length; ++n) {
    const double p = std::exp(scores[static_cast<std::size_t>(n)] - maximum);
    sum += p;
    for (int c = 0; c < head_dim; ++c) {
      const std::size_t at = static_cast<std::size_t>(n * head_dim + c);
      result.out[c] += p * head.v[at];
      result.out_error[c] += p * head.v_size[at];
    }
  }
  const double p_error = std::expm1(2. * (head_dim + 16) * u * size) + 16. * u;
  const double sum_error = (512. + head.length / 256.) * u;
  for (int c = 0; c < head_dim; ++c) {
    result.out[c] /= sum;
    result.out_error[c] *= (p_error + sum_error) / sum;
  }
  result.lse = maximum + std::log(sum);
  result.lse_error = p_error + sum_error + 2. * u * std::abs(result.lse);
  return result;
}

}  // namespace bitdecoding::test
