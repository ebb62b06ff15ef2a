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
