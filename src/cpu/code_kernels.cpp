// SPDX-License-Identifier: Apache-2.0
// Compiled with contraction into fused multiply-adds, unlike the quantiser: no bits are fixed here.
#include "cpu/code_kernels.hpp"

#include "bitdecoding/layout/code_layout.hpp"
#include "bitdecoding/layout/page_config.hpp"
#include "cpu/instruction_sets.hpp"
#include "cpu/vector8.hpp"

namespace bitdecoding::cpu {
namespace {

using layout::CodeShape;
using layout::kBlockTokens;
using layout::kChunkBlocks;
using layout::kLanes;
using layout::kMaxHeadDim;
using layout::kSpanChannels;

template <int Bits>
constexpr int kFields = 8 / Bits;  // codes of a byte
template <int Bits>
constexpr int kWordChannels = 8 * kFields<Bits>;  // of V's words of one index, over all lanes

// Four rows and two vectors make eight sums, as many as two multiply-adds per cycle of latency four
// keep busy, in half of AVX2's registers. Fewer rows sum odd and even steps apart.
constexpr int kRegisterRows = 4;
constexpr int chains(int rows) { return rows < kRegisterRows ? 2 : 1; }

// run(rows) in register-sized pieces: piece.operator()<Rows>(first_row).
template <class Piece>
BITDECODING_INLINE void for_row_pieces(int rows, const Piece& piece) {
  for (int row = 0; row < rows; row += kRegisterRows) {
    switch (rows - row) {
      case 1: piece.template operator()<1>(row); break;
      case 2: piece.template operator()<2>(row); break;
      case 3: piece.template operator()<3>(row); break;
      default: piece.template operator()<kRegisterRows>(row); break;
    }
  }
}

// Transposes the words of a unit's 32 lanes: out[4 * word + t] holds those of g = 0..7.
template <int UnitWords>
BITDECODING_INLINE void gather_words(const std::uint8_t* unit, UInt8* out) {
  constexpr int kGroup_bytes = 4 * UnitWords * 4;  // lanes 4g .. 4g + 3
  for (int half = 0; half < UnitWords / 2; ++half) {
    UInt8 rows[8];
    UInt8 columns[8];
    for (int g = 0; g < 8; ++g) load(unit + g * kGroup_bytes + half * 32, rows[g]);
    transpose(rows, columns);
    for (int i = 0; i < 8; ++i) {
      const int in_group = half * 8 + i;  // t * UnitWords + word
      out[in_group % UnitWords * 4 + in_group / UnitWords] = columns[i];
    }
  }
}

template <int Bits>
BITDECODING_INLINE void codes_of(const UInt8& words, int byte, int field, Float8& codes) {
  const std::uint32_t mask = ((1u << Bits) - 1) << (field * Bits);
  codes = __builtin_convertvector((Int8)((words >> (8 * byte)) & mask), Float8);
}

// Half a span, 32 channels, of one 16-token block: two vectors of tokens, r = 0 and 1. `words` are
// the span's, `q` the half's.
template <int Bits, int HeadDim, int Rows>
BITDECODING_INLINE void score_half(const UInt8* words, int half, const float* q,
                                   Float8 (&sums)[chains(Rows)][2][Rows]) {
  using Shape = CodeShape<Bits, HeadDim>;
  for (int t = 0; t < 4; ++t) {
    for (int tile = 0; tile < 2; ++tile) {
      const int word = Shape::tiles_per_word == 2 ? 0 : 2 * tile;
      const int field = half + (Shape::tiles_per_word == 2 ? 2 * tile : 0);
      for (int byte = 0; byte < 4; ++byte) {
        const int h = byte / 2, u = byte % 2;
        Float8 codes[2];
        for (int r = 0; r < 2; ++r) {
          codes_of<Bits>(words[4 * (word + r) + t], byte, field, codes[r]);
        }
        for (int row = 0; row < Rows; ++row) {
          const float scale = q[row * HeadDim + t * (HeadDim / 4) + 4 * tile + 2 * u + h];
          for (int r = 0; r < 2; ++r) sums[h % chains(Rows)][r][row] += codes[r] * scale;
        }
      }
    }
  }
}

// One 16-token block.
template <int Bits, int HeadDim, int Rows>
BITDECODING_INLINE void score_block(const UInt8* words, int first_channel, int end_channel,
                                    const float* q, const float* bias, float* scores) {
  Float8 sums[chains(Rows)][2][Rows] = {};
  for (int row = 0; row < Rows; ++row) sums[0][0][row] = sums[0][1][row] = Float8{} + bias[row];
  for (int channel = first_channel; channel < end_channel; channel += kSpanChannels / 2) {
    const int span = channel / kSpanChannels, half = channel % kSpanChannels / (kSpanChannels / 2);
    score_half<Bits, HeadDim, Rows>(words + span * 4 * CodeShape<Bits, HeadDim>::k_span_words, half,
                                    q + channel / 4, sums);
  }
  for (int row = 0; row < Rows; ++row) {
    for (int r = 0; r < 2; ++r) {
      if (chains(Rows) == 2) sums[0][r][row] += sums[chains(Rows) - 1][r][row];
      store(sums[0][r][row], scores + row * kSegmentTokens + 8 * r);
    }
  }
}

template <int Bits, int HeadDim>
BITDECODING_INLINE void score_blocks(const KeyCodes& k, const float* q, const float* bias, int rows,
                                     float* scores) {
  using Shape = CodeShape<Bits, HeadDim>;
  constexpr int kUnit_bytes = kLanes * 4 * Shape::k_unit_words;
  for (int block = 0; block < k.blocks; ++block) {
    UInt8 words[4 * Shape::block_words];
    for (int unit = 0; unit < Shape::k_units; ++unit) {
      gather_words<Shape::k_unit_words>(k.codes + (block * Shape::k_units + unit) * kUnit_bytes,
                                        words + unit * 4 * Shape::k_unit_words);
    }
    float* to = scores + block * kBlockTokens;
    for_row_pieces(rows, [&]<int Rows>(int row) __attribute__((always_inline)) {
      score_block<Bits, HeadDim, Rows>(words, k.first_channel, k.first_channel + k.channels,
                                       q + row * HeadDim, bias + row, to + row * kSegmentTokens);
    });
  }
}

// Two fields of one word index: two vectors of channels, over the chunk's 64 tokens.
template <int Bits, int HeadDim, int Rows>
BITDECODING_INLINE void add_fields(const UInt8* words, int word_in_part, int field, const float* p,
                                   float* out) {
  using Shape = CodeShape<Bits, HeadDim>;
  Float8 sums[chains(Rows)][2][Rows] = {};
  for (int r = 0; r < Rows; ++r) {
    for (int f = 0; f < 2; ++f) load(out + r * HeadDim + 8 * f, sums[0][f][r]);
  }
  for (int block = 0; block < kChunkBlocks; ++block) {
    const int nth = block * Shape::v_part_words + word_in_part;
    for (int t = 0; t < 4; ++t) {
      const UInt8& packed = words[4 * nth + t];
      for (int byte = 0; byte < 4; ++byte) {
        const int token = kBlockTokens * block + 2 * t + byte / 2 + 8 * (byte % 2);
        Float8 codes[2];
        for (int f = 0; f < 2; ++f) codes_of<Bits>(packed, byte, field + f, codes[f]);
        for (int r = 0; r < Rows; ++r) {
          const float weight = p[r * kChunkTokens + token];
          for (int f = 0; f < 2; ++f) sums[byte % chains(Rows)][f][r] += codes[f] * weight;
        }
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int f = 0; f < 2; ++f) {
      if (chains(Rows) == 2) sums[0][f][r] += sums[chains(Rows) - 1][f][r];
      store(sums[0][f][r], out + r * HeadDim + 8 * f);
    }
  }
}

template <int Bits, int HeadDim>
BITDECODING_INLINE void add_chunk(const ValueCodes& v, const float* p, int rows, float* out) {
  using Shape = CodeShape<Bits, HeadDim>;
  constexpr int kUnit_bytes = kLanes * 4 * 4;
  const int end_word = (v.first_channel + v.channels) / kWordChannels<Bits>;
  for (int word = v.first_channel / kWordChannels<Bits>; word < end_word;) {
    const int part = word / Shape::v_part_words;
    UInt8 words[16 * Shape::v_units];
    for (int unit = 0; unit < Shape::v_units; ++unit) {
      gather_words<4>(v.codes + (part * Shape::v_units + unit) * kUnit_bytes, words + unit * 16);
    }
    for (; word < end_word && word / Shape::v_part_words == part; ++word) {
      for_row_pieces(rows, [&]<int Rows>(int row) __attribute__((always_inline)) {
        for (int field = 0; field < kFields<Bits>; field += 2) {
          add_fields<Bits, HeadDim, Rows>(
              words, word % Shape::v_part_words, field, p + row * kChunkTokens,
              out + row * HeadDim + word * kWordChannels<Bits> + 8 * field);
        }
      });
    }
  }
}

// 2^x for x <= 0: the Taylor series of 2^f, |f| <= 1/2, to f^7 is good to 2^-27.
BITDECODING_INLINE void exp2_of(const Float8& x, Float8& result) {
  constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  constexpr float kSeries[] = {1.f,
                               0x1.62e430p-1f,
                               0x1.ebfbe0p-3f,
                               0x1.c6b08ep-5f,
                               0x1.3b2ab6p-7f,
                               0x1.5d87fep-10f,
                               0x1.430912p-13f,
                               0x1.ffcbfcp-17f};
  const Float8 low = Float8{} - 126.f;
  const Float8 clamped = x < low ? low : x;
  const Float8 shifted = clamped + kRounder;
  const Float8 fraction = clamped - (shifted - kRounder);
  Float8 series = Float8{} + kSeries[7];
  for (int i = 6; i >= 0; --i) series = series * fraction + kSeries[i];
  const Float8 power = (Float8)((UInt8)series + ((UInt8)shifted << 23));
  result = x != x ? x : (x < low ? Float8{} : power);
}

template <int Rows>
BITDECODING_INLINE void score_row_piece(const Float8* k, int head_dim, const float* q,
                                        float* scores) {
  for (int r = 0; r < Rows; ++r) {
    Float8 sums[2] = {};
    for (int c = 0; c < head_dim; c += 16) {
      for (int i = 0; i < 2; ++i) {
        Float8 query;
        load(q + r * head_dim + c + 8 * i, query);
        sums[i] += query * k[c / 8 + i];
      }
    }
    scores[r * kSegmentTokens] = lane_sum(sums[0] + sums[1]);
  }
}

// 16 channels of V.
template <int Rows>
BITDECODING_INLINE void add_row_piece(const std::uint16_t* v, int head_dim, int tokens,
                                      const float* p, float* out) {
  Float8 sums[2][Rows];
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < 2; ++i) load(out + r * head_dim + 8 * i, sums[i][r]);
  }
  for (int n = 0; n < tokens; ++n) {
    Float8 values[2];
    for (int i = 0; i < 2; ++i) load_fp16(v + n * head_dim + 8 * i, values[i]);
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < 2; ++i) sums[i][r] += values[i] * p[r * kSegmentTokens + n];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < 2; ++i) store(sums[i][r], out + r * head_dim + 8 * i);
  }
}

}  // namespace

BITDECODING_CLONES
void widen_token_plane(const std::uint16_t* plane, float* values) {
  UInt8 rows[8];
  UInt8 columns[8];
  for (int g = 0; g < 8; ++g) {
    Float8 row;
    load_fp16(plane + 8 * g, row);
    rows[g] = (UInt8)row;
  }
  transpose(rows, columns);
  for (int i = 0; i < 8; ++i) store(columns[i], values + 8 * i);
}

BITDECODING_CLONES
void fold_channel_group(const float* q, const float* weights, const std::uint16_t* scales,
                        const std::uint16_t* zeros, int head_dim, int rows, float* scaled,
                        float* bias) {
  Float8 sums[kRowTile] = {};
  for (int c = 0; c < head_dim; c += 8) {
    Float8 scale, zero, weight;
    load_fp16(scales + c, scale);
    load_fp16(zeros + c, zero);
    load(weights + c, weight);
    scale *= weight;
    for (int r = 0; r < rows; ++r) {
      Float8 query;
      load(q + r * head_dim + c, query);
      sums[r] += query * zero;
      store(query * scale, scaled + r * head_dim + c);
    }
  }
  for (int r = 0; r < rows; ++r) bias[r] = lane_sum(sums[r]);
}

BITDECODING_CLONES
void score_codes(const KeyCodes& k, const float* q, const float* bias, int rows, float* scores) {
  if (k.head_dim == 64) {
    k.bits == 2 ? score_blocks<2, 64>(k, q, bias, rows, scores)
                : score_blocks<4, 64>(k, q, bias, rows, scores);
  } else if (k.head_dim == 128) {
    k.bits == 2 ? score_blocks<2, 128>(k, q, bias, rows, scores)
                : score_blocks<4, 128>(k, q, bias, rows, scores);
  } else {
    k.bits == 2 ? score_blocks<2, 256>(k, q, bias, rows, scores)
                : score_blocks<4, 256>(k, q, bias, rows, scores);
  }
}

BITDECODING_CLONES
void add_token_group(const float* partial, const float* scales, const float* zeros,
                     const float* q_sum, int rows, float* scores) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < kChunkTokens; ++n) {
      scores[r * kSegmentTokens + n] +=
          partial[r * kSegmentTokens + n] * scales[n] + q_sum[r] * zeros[n];
    }
  }
}

BITDECODING_CLONES
void multiply_scores(const float* factors, int rows, float* scores) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < kChunkTokens; ++n) scores[r * kSegmentTokens + n] *= factors[n];
  }
}

BITDECODING_CLONES
void score_rows(const std::uint16_t* k, int head_dim, int tokens, const float* q, int rows,
                float* scores) {
  for (int n = 0; n < tokens; ++n) {
    Float8 key[kMaxHeadDim / 8];
    for (int c = 0; c < head_dim; c += 8) load_fp16(k + n * head_dim + c, key[c / 8]);
    for_row_pieces(rows, [&]<int Rows>(int row) __attribute__((always_inline)) {
      score_row_piece<Rows>(key, head_dim, q + row * head_dim, scores + row * kSegmentTokens + n);
    });
  }
}

BITDECODING_CLONES
void softmax(int tokens, int rows, float* scores, float* maxima, float* sums) {
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kSegmentTokens;
    Float8 top = Float8{} + kScoreFloor;
    for (int n = 0; n < tokens; n += 8) {
      Float8 score;
      load(row + n, score);
      top = score > top ? score : top;
    }
    float maximum = kScoreFloor;
    for (int i = 0; i < 8; ++i) maximum = top[i] > maximum ? top[i] : maximum;
    Float8 sum{};
    for (int n = 0; n < tokens; n += 8) {
      Float8 p;
      load(row + n, p);
      exp2_of(p - maximum, p);
      sum += p;
      store(p, row + n);
    }
    maxima[r] = maximum;
    sums[r] = lane_sum(sum);
  }
}

BITDECODING_CLONES
void scale_probabilities(const float* p, const float* scales, const float* zeros, int first_token,
                         int rows, float* scaled, float* zero_sums) {
  for (int r = 0; r < rows; ++r) {
    Float8 sum{};
    for (int n = 0; n < kChunkTokens; n += 8) {
      Float8 weight, scale, zero;
      load(p + r * kSegmentTokens + n, weight);
      load(scales + n, scale);
      load(zeros + n, zero);
      const Int8 token = Int8{0, 1, 2, 3, 4, 5, 6, 7} + n;
      const Int8 counts = token >= first_token;
      sum += counts ? weight * zero : Float8{};
      store(counts ? weight * scale : Float8{}, scaled + r * kChunkTokens + n);
    }
    zero_sums[r * kMaxVGroups] += lane_sum(sum);
  }
}

BITDECODING_CLONES
void add_codes(const ValueCodes& v, const float* p, int rows, float* out) {
  if (v.head_dim == 64) {
    v.bits == 2 ? add_chunk<2, 64>(v, p, rows, out) : add_chunk<4, 64>(v, p, rows, out);
  } else if (v.head_dim == 128) {
    v.bits == 2 ? add_chunk<2, 128>(v, p, rows, out) : add_chunk<4, 128>(v, p, rows, out);
  } else {
    v.bits == 2 ? add_chunk<2, 256>(v, p, rows, out) : add_chunk<4, 256>(v, p, rows, out);
  }
}

BITDECODING_CLONES
void finish_codes(const float* weights, const float* zero_sums, int head_dim, int group, int rows,
                  float* out) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < head_dim; c += 8) {
      Float8 sum, weight;
      load(out + r * head_dim + c, sum);
      load(weights + c, weight);
      store(sum * weight + zero_sums[r * kMaxVGroups + c / group], out + r * head_dim + c);
    }
  }
}

BITDECODING_CLONES
void add_rows(const std::uint16_t* v, int head_dim, int tokens, const float* p, int rows,
              float* out) {
  for (int c = 0; c < head_dim; c += 16) {
    for_row_pieces(rows, [&]<int Rows>(int row) __attribute__((always_inline)) {
      add_row_piece<Rows>(v + c, head_dim, tokens, p + row * kSegmentTokens,
                          out + row * head_dim + c);
    });
  }
}

}  // namespace bitdecoding::cpu
