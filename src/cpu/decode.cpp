// SPDX-License-Identifier: Apache-2.0
// decode on the CPU: flash-decoding over items of (sequence, KV head, query rows, run of segments).
//   q --scale * log2(e)--> DecodeTile: per segment scores, softmax, sums --> partial --merge--> out
// How the work divides into items depends on the problem alone, and partials merge in item order:
// every thread count gives the same bits. Cost per eight codes: a shift for every second vector, a
// mask, a conversion, and one multiply-add per query row; scales and zero-points touch only queries
// (K per channel), scores (K per token) and probabilities (V), never codes.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "bitdecoding/format/rotation.hpp"
#include "bitdecoding/run.hpp"
#include "cpu/decode_tile.hpp"
#include "cpu/parallel.hpp"

namespace bitdecoding {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;

// Items of a call: enough to fill many cores evenly, few enough that merging them costs nothing.
constexpr std::int64_t kItems = 256;

int divide_up(int value, int by) { return (value + by - 1) / by; }

// The segments of one sequence: pages, then first rows, then the tail.
class Segments {
 public:
  Segments(const PagedKvCache& c, int sequence)
      : length_(c.lengths[sequence]),
        packed_(c.packed[sequence]),
        first_(std::min(c.keep_first, packed_)),
        page_begin_(first_ / kChunkTokens * kChunkTokens) {}

  int count() const { return page_segments() + first_segments() + tail_segments(); }

  cpu::Segment operator[](int index) const {
    using Place = cpu::Segment::Place;
    if (index < page_segments()) return piece(Place::pages, page_begin_, packed_, first_, index);
    index -= page_segments();
    if (index < first_segments()) return piece(Place::first_rows, 0, first_, 0, index);
    return piece(Place::tail, packed_, length_, 0, index - first_segments());
  }

 private:
  int page_segments() const { return divide_up(packed_ - page_begin_, cpu::kSegmentTokens); }
  int first_segments() const { return divide_up(first_, cpu::kSegmentTokens); }
  int tail_segments() const { return divide_up(length_ - packed_, cpu::kSegmentTokens); }

  static cpu::Segment piece(cpu::Segment::Place place, int begin, int end, int attended_from,
                            int index) {
    const int at = begin + index * cpu::kSegmentTokens;
    return {place, at, at + std::min(cpu::kSegmentTokens, end - at), attended_from};
  }

  int length_;
  int packed_;
  int first_;       // tokens that are read from the first rows
  int page_begin_;  // the first chunk that has others
};

// One KV head of one sequence: its query rows are (query token, head of the group).
struct Rows {
  explicit Rows(const DecodeProblem& p)
      : group(p.query_heads / p.cache.num_kv_heads),
        count(group * p.query_tokens),
        tiles(divide_up(count, cpu::kRowTile)),
        in_tile(tiles == 0 ? 0 : divide_up(count, tiles)) {}

  int group;  // query heads per KV head
  int count;
  int tiles;
  int in_tile;  // rows of a tile, the last may have fewer
};

struct Item {
  int sequence, head;
  int first_row, rows;
  int first_segment, segments;
};

// Items of (sequence, head, tile) follow one another.
std::vector<Item> divide(const DecodeProblem& p, const Rows& rows) {
  const PagedKvCache& c = p.cache;
  std::int64_t segments = 0;
  for (int b = 0; b < c.batch; ++b) segments += Segments(c, b).count();
  segments *= std::int64_t{c.num_kv_heads} * rows.tiles;
  const int in_item = static_cast<int>(std::max<std::int64_t>(1, segments / kItems));

  std::vector<Item> items;
  for (int b = 0; b < c.batch; ++b) {
    const int count = Segments(c, b).count();
    for (int head = 0; head < c.num_kv_heads; ++head) {
      for (int row = 0; row < rows.count; row += rows.in_tile) {
        const int tile = std::min(rows.in_tile, rows.count - row);
        for (int s = 0; s < count; s += in_item) {
          items.push_back({b, head, row, tile, s, std::min(in_item, count - s)});
        }
      }
    }
  }
  return items;
}

float load_element(const void* data, ElementType type, std::int64_t index) {
  switch (type) {
    case ElementType::f16:
      return format::float_from_fp16(static_cast<const std::uint16_t*>(data)[index]);
    case ElementType::bf16:
      return format::float_from_bf16(static_cast<const std::uint16_t*>(data)[index]);
    case ElementType::f32: return static_cast<const float*>(data)[index];
  }
  return 0.f;
}

void store_element(void* data, ElementType type, std::int64_t index, float value) {
  switch (type) {
    case ElementType::f16:
      static_cast<std::uint16_t*>(data)[index] = format::fp16_from_float(value);
      return;
    case ElementType::bf16:
      static_cast<std::uint16_t*>(data)[index] = format::bf16_from_float(value);
      return;
    case ElementType::f32: static_cast<float*>(data)[index] = value; return;
  }
}

void load_query(const DecodeProblem& p, int sequence, int token, int head, float* q) {
  const std::int64_t offset =
      sequence * p.q_batch_stride + token * p.q_token_stride + head * p.q_head_stride;
  for (int c = 0; c < p.cache.format.head_dim; ++c) q[c] = load_element(p.q, p.type, offset + c);
}

// What the mean that was taken from K would have added to all scores of a query, and so to its LSE.
double mean_score(const DecodeProblem& p, int sequence, int token, int head, int kv_head) {
  const std::uint16_t* mean = p.cache.arrival(kv_head, 0).mean;
  if (mean == nullptr) return 0.;
  float q[cpu::kMaxHeadDim];
  load_query(p, sequence, token, head, q);
  double sum = 0.;
  for (int c = 0; c < p.cache.format.head_dim; ++c) {
    sum += double{q[c]} * format::float_from_fp16(mean[c]);
  }
  return sum * p.softmax_scale;
}

// A row's state behind each item: [item, row of the tile].
struct Partials {
  explicit Partials(std::size_t items, int head_dim)
      : softmax(items * cpu::kRowTile),
        out(std::make_unique_for_overwrite<float[]>(items * cpu::kRowTile *
                                                    static_cast<std::size_t>(head_dim))) {}

  std::vector<cpu::SoftmaxRow> softmax;
  std::unique_ptr<float[]> out;
};

void attend(const DecodeProblem& p, const Rows& rows, const cpu::PageMap& map, const Item& item,
            std::size_t index, Partials& partials) {
  const int head_dim = p.cache.format.head_dim;
  float q[cpu::kRowTile * cpu::kMaxHeadDim];
  for (int r = 0; r < item.rows; ++r) {
    const int token = (item.first_row + r) / rows.group;
    const int head = item.head * rows.group + (item.first_row + r) % rows.group;
    float* row = q + r * head_dim;
    load_query(p, item.sequence, token, head, row);
    format::rotate(row, head_dim, p.cache.format.k_rotation);
    for (int c = 0; c < head_dim; ++c) row[c] *= p.softmax_scale * kLog2e;
  }
  cpu::DecodeTile tile(p.cache, map, item.sequence, item.head);
  tile.set_queries(q, item.rows);
  const Segments segments(p.cache, item.sequence);
  for (int s = 0; s < item.segments; ++s) tile.attend(segments[item.first_segment + s]);
  for (int r = 0; r < item.rows; ++r) {
    const std::size_t row = index * cpu::kRowTile + static_cast<std::size_t>(r);
    partials.softmax[row] = tile.row(r);
    std::copy_n(tile.out(r), head_dim, &partials.out[row * static_cast<std::size_t>(head_dim)]);
  }
}

// Output and LSE of row `row` of (sequence, head) from items [begin, end), in this order.
void merge(const DecodeProblem& p, const Rows& rows, int sequence, int kv_head, int row,
           std::size_t begin, std::size_t end, const Partials& partials) {
  const int head_dim = p.cache.format.head_dim;
  const std::size_t in_tile = static_cast<std::size_t>(row % std::max(1, rows.in_tile));
  cpu::SoftmaxRow total;
  for (std::size_t i = begin; i < end; ++i) {
    const cpu::SoftmaxRow& part = partials.softmax[i * cpu::kRowTile + in_tile];
    total.maximum = std::max(total.maximum, part.maximum);
  }
  float out[cpu::kMaxHeadDim] = {};
  for (std::size_t i = begin; i < end; ++i) {
    const std::size_t at = i * cpu::kRowTile + in_tile;
    const float weight = std::exp2(partials.softmax[at].maximum - total.maximum);
    total.sum += partials.softmax[at].sum * weight;
    const float* part = &partials.out[at * static_cast<std::size_t>(head_dim)];
    for (int c = 0; c < head_dim; ++c) out[c] += part[c] * weight;
  }
  const int token = row / rows.group;
  const int head = kv_head * rows.group + row % rows.group;
  const std::int64_t first =
      ((std::int64_t{sequence} * p.query_tokens + token) * p.query_heads + head) * head_dim;
  const float inverse = total.sum == 0.f ? 0.f : 1.f / total.sum;
  for (int c = 0; c < head_dim; ++c) out[c] *= inverse;
  format::rotate(out, head_dim, p.cache.format.v_rotation);
  for (int c = 0; c < head_dim; ++c) store_element(p.out, p.type, first + c, out[c]);
  if (p.lse != nullptr) {
    const double lse = kLn2 * (double{total.maximum} + std::log2(double{total.sum})) +
                       mean_score(p, sequence, token, head, kv_head);
    p.lse[(std::int64_t{sequence} * p.query_heads + head) * p.query_tokens + token] =
        total.sum == 0.f ? -INFINITY : static_cast<float>(lse);
  }
}

void merge_all(const DecodeProblem& p, const Rows& rows, const std::vector<Item>& items,
               const Partials& partials) {
  std::size_t next = 0;
  for (int b = 0; b < p.cache.batch; ++b) {
    for (int head = 0; head < p.cache.num_kv_heads; ++head) {
      for (int first = 0; first < rows.count; first += rows.in_tile) {
        const std::size_t begin = next;
        while (next < items.size() && items[next].sequence == b && items[next].head == head &&
               items[next].first_row == first) {
          ++next;
        }
        for (int row = first; row < std::min(first + rows.in_tile, rows.count); ++row) {
          merge(p, rows, b, head, row, begin, next, partials);
        }
      }
    }
  }
}

}  // namespace

Status decode_attention(const DecodeProblem& problem, const CpuExecution& execution) {
  if (Status status = validate(problem); !status.is_ok()) return status;
  if (Status status = check_state(problem.cache); !status.is_ok()) return status;
  const KvFormat& f = problem.cache.format;
  const Rows rows(problem);
  const std::vector<Item> items = divide(problem, rows);
  const cpu::PageMap map = cpu::map_page(f, problem.cache.pool);
  Partials partials(items.size(), f.head_dim);

  std::int64_t segments = 0;
  for (const Item& item : items) segments += item.segments;
  const std::int64_t segment_ns =
      std::int64_t{cpu::kSegmentTokens} * f.head_dim * (2 + rows.in_tile) / 20;
  const int threads = cpu::choose_threads(
      execution.threads, static_cast<std::int64_t>(items.size()), segments * segment_ns);
  cpu::parallel_for(static_cast<std::int64_t>(items.size()), threads, [&](std::int64_t i) {
    const std::size_t index = static_cast<std::size_t>(i);
    attend(problem, rows, map, items[index], index, partials);
  });
  merge_all(problem, rows, items, partials);
  return {};
}

}  // namespace bitdecoding
