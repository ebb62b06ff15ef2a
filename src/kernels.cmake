# SPDX-License-Identifier: Apache-2.0
# THE table of compiled kernels. One row = one kernel = one name in build_info() and in a profile.
# Rows compile in order, several to a unit (CuTe's headers cost seconds each time); a new row is a new line here.

# Prefill pack: pack_k<K bits>v<V bits>_<K axis: c channel, t token>_d<head_dim>, every device
set(BITDECODING_PACK_KERNELS
  pack_k4v4_c_d64  pack_k4v4_c_d128  pack_k4v4_t_d64  pack_k4v4_t_d128
  pack_k4v2_c_d64  pack_k4v2_c_d128  pack_k4v2_t_d64  pack_k4v2_t_d128
  pack_k2v4_c_d64  pack_k2v4_c_d128  pack_k2v4_t_d64  pack_k2v4_t_d128
  pack_k2v2_c_d64  pack_k2v2_c_d128  pack_k2v2_t_d64  pack_k2v2_t_d128)
set(BITDECODING_PACK_KERNELS_PER_UNIT 8)

# Append: append_k<K bits>v<V bits>_<K axis>_d<head_dim>, every device
set(BITDECODING_APPEND_KERNELS
  append_k4v4_c_d64  append_k4v4_c_d128  append_k4v4_t_d64  append_k4v4_t_d128
  append_k4v2_c_d64  append_k4v2_c_d128  append_k4v2_t_d64  append_k4v2_t_d128
  append_k2v4_c_d64  append_k2v4_c_d128  append_k2v4_t_d64  append_k2v4_t_d128
  append_k2v2_c_d64  append_k2v2_c_d128  append_k2v2_t_d64  append_k2v2_t_d128)
set(BITDECODING_APPEND_KERNELS_PER_UNIT 8)

# Decode: decode_<arch>_k<K bits>v<V bits>_<K axis>_d<head_dim>_n<query columns of a tile>
#   sm80 cp.async rings, for 8.0 to 8.9      sm90 bulk-copy rings, for 9.0
set(BITDECODING_DECODE_KERNELS
  decode_sm80_k4v4_c_d64_n4  decode_sm80_k4v4_c_d64_n8  decode_sm80_k4v4_c_d64_n16
  decode_sm80_k4v4_c_d128_n4  decode_sm80_k4v4_c_d128_n8  decode_sm80_k4v4_c_d128_n16
  decode_sm80_k4v4_t_d64_n4  decode_sm80_k4v4_t_d64_n8  decode_sm80_k4v4_t_d64_n16
  decode_sm80_k4v4_t_d128_n4  decode_sm80_k4v4_t_d128_n8  decode_sm80_k4v4_t_d128_n16
  decode_sm80_k4v2_c_d64_n4  decode_sm80_k4v2_c_d64_n8  decode_sm80_k4v2_c_d64_n16
  decode_sm80_k4v2_c_d128_n4  decode_sm80_k4v2_c_d128_n8  decode_sm80_k4v2_c_d128_n16
  decode_sm80_k4v2_t_d64_n4  decode_sm80_k4v2_t_d64_n8  decode_sm80_k4v2_t_d64_n16
  decode_sm80_k4v2_t_d128_n4  decode_sm80_k4v2_t_d128_n8  decode_sm80_k4v2_t_d128_n16
  decode_sm80_k2v4_c_d64_n4  decode_sm80_k2v4_c_d64_n8  decode_sm80_k2v4_c_d64_n16
  decode_sm80_k2v4_c_d128_n4  decode_sm80_k2v4_c_d128_n8  decode_sm80_k2v4_c_d128_n16
  decode_sm80_k2v4_t_d64_n4  decode_sm80_k2v4_t_d64_n8  decode_sm80_k2v4_t_d64_n16
  decode_sm80_k2v4_t_d128_n4  decode_sm80_k2v4_t_d128_n8  decode_sm80_k2v4_t_d128_n16
  decode_sm80_k2v2_c_d64_n4  decode_sm80_k2v2_c_d64_n8  decode_sm80_k2v2_c_d64_n16
  decode_sm80_k2v2_c_d128_n4  decode_sm80_k2v2_c_d128_n8  decode_sm80_k2v2_c_d128_n16
  decode_sm80_k2v2_t_d64_n4  decode_sm80_k2v2_t_d64_n8  decode_sm80_k2v2_t_d64_n16
  decode_sm80_k2v2_t_d128_n4  decode_sm80_k2v2_t_d128_n8  decode_sm80_k2v2_t_d128_n16
  decode_sm90_k4v4_c_d64_n4  decode_sm90_k4v4_c_d64_n8  decode_sm90_k4v4_c_d64_n16
  decode_sm90_k4v4_c_d128_n4  decode_sm90_k4v4_c_d128_n8  decode_sm90_k4v4_c_d128_n16
  decode_sm90_k4v4_t_d64_n4  decode_sm90_k4v4_t_d64_n8  decode_sm90_k4v4_t_d64_n16
  decode_sm90_k4v4_t_d128_n4  decode_sm90_k4v4_t_d128_n8  decode_sm90_k4v4_t_d128_n16
  decode_sm90_k4v2_c_d64_n4  decode_sm90_k4v2_c_d64_n8  decode_sm90_k4v2_c_d64_n16
  decode_sm90_k4v2_c_d128_n4  decode_sm90_k4v2_c_d128_n8  decode_sm90_k4v2_c_d128_n16
  decode_sm90_k4v2_t_d64_n4  decode_sm90_k4v2_t_d64_n8  decode_sm90_k4v2_t_d64_n16
  decode_sm90_k4v2_t_d128_n4  decode_sm90_k4v2_t_d128_n8  decode_sm90_k4v2_t_d128_n16
  decode_sm90_k2v4_c_d64_n4  decode_sm90_k2v4_c_d64_n8  decode_sm90_k2v4_c_d64_n16
  decode_sm90_k2v4_c_d128_n4  decode_sm90_k2v4_c_d128_n8  decode_sm90_k2v4_c_d128_n16
  decode_sm90_k2v4_t_d64_n4  decode_sm90_k2v4_t_d64_n8  decode_sm90_k2v4_t_d64_n16
  decode_sm90_k2v4_t_d128_n4  decode_sm90_k2v4_t_d128_n8  decode_sm90_k2v4_t_d128_n16
  decode_sm90_k2v2_c_d64_n4  decode_sm90_k2v2_c_d64_n8  decode_sm90_k2v2_c_d64_n16
  decode_sm90_k2v2_c_d128_n4  decode_sm90_k2v2_c_d128_n8  decode_sm90_k2v2_c_d128_n16
  decode_sm90_k2v2_t_d64_n4  decode_sm90_k2v2_t_d64_n8  decode_sm90_k2v2_t_d64_n16
  decode_sm90_k2v2_t_d128_n4  decode_sm90_k2v2_t_d128_n8  decode_sm90_k2v2_t_d128_n16)
set(BITDECODING_DECODE_KERNELS_PER_UNIT 4)
