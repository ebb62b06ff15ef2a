# SPDX-License-Identifier: Apache-2.0
# THE table of compiled kernels. One row = one kernel = one name in build_info() and in a profile:
#   <kind>_k<K bits>v<V bits>_<K axis: c channel, t token, b block>_d<head_dim>[_n<query columns of a tile>]
# A line stands for the rows of one kind and tile, one for each page format that `pages` (a glob) matches. The limits
# of a kernel are what ptxas may say of its sm_80 or sm_90a code: registers and bytes of stack of a thread
# (spilled registers lie there), bytes of static shared memory (launch code bounds the dynamic rings). Where two lines
# name a row, the later counts:
#   "decode_sm90  k2v2_?_d64  n16    208       32      0"    sets those two rows apart
set(BITDECODING_PAGES
  k4v4_c_d64  k4v4_c_d128  k4v4_t_d64  k4v4_t_d128  k4v4_b_d64  k4v4_b_d128
  k4v2_c_d64  k4v2_c_d128  k4v2_t_d64  k4v2_t_d128  k4v2_b_d64  k4v2_b_d128
  k2v4_c_d64  k2v4_c_d128  k2v4_t_d64  k2v4_t_d128  k2v4_b_d64  k2v4_b_d128
  k2v2_c_d64  k2v2_c_d128  k2v2_t_d64  k2v2_t_d128  k2v2_b_d64  k2v2_b_d128
  k4v4_c_d256 k4v4_t_d256  k4v2_c_d256 k2v2_c_d256)
set(BITDECODING_KERNEL_TABLE
#  kind          pages      tile  registers  stack  shared
  "pack          *          -            64      0       0"   # prefill pack, every device: 4 CTAs share an SM
  "pack          *_d256     -            80      0       0"   # 3: of the tile, 64 KiB, no more would fit
  "append        *          -            64      0       0"   # append, every device
  "append        *_d256     -           128      0       0"
  "decode_sm80   *          n4          168     16       0"   # decode for 8.0 to 8.9, cp.async rings: 12 warps; spills, in merges
  "decode_sm80   *          n8          168     16       0"
  "decode_sm80   *_d256     n4          255      0       0"   #   8 warps
  "decode_sm80   *_d256     n8          255      0       0"
  "decode_sm80   *_t_d256   n8          255      8       0"   #   spills
  "decode_sm80   *          n16         255      0       0"   #   8 warps; head_dim 256: of 8 columns each
  "decode_sm80   *_c_d128   n16         255     16       0"   #   spills
  "decode_sm80   *_t_d128   n16         255    128       0"   #   spills
  "decode_sm80   *_b_d128   n16         255     96       0"   #   spills
  "decode_sm90   *          n4          168      0       0"   # decode for 9.0, bulk-copy rings: 12 warps
  "decode_sm90   *          n8          168      8       0"   #   spills
  "decode_sm90   *_b_d128   n8          168     24       0"   #   spills
  "decode_sm90   *_d256     n4          255      0       0"   #   8 warps
  "decode_sm90   *_d256     n8          255      0       0"
  "decode_sm90   *          n16         255      0       0"   #   8 warps; head_dim 256: of 8 columns each
  "decode_sm90   *_c_d128   n16         255     24       0"   #   spills
  "decode_sm90   *_t_d128   n16         255    136       0"   #   spills
  "decode_sm90   *_b_d128   n16         255    112       0"   #   spills
  "decode_sm90   *_c_d128   n32         168      0       0"   #   wgmma: 3 warpgroups; not for blocks
  "decode_sm90   *_t_d128   n32         168      8       0"   #   spills
  "decode_sm90   *_c_d64    n32         168      8       0"   #   spills
  "decode_sm90   *_t_d64    n32         168      8       0"   #   spills
  "decode_sm90   *_c_d128   n64         255      0       0"   #   wgmma: 2 warpgroups
  "decode_sm90   *_t_d128   n64         255      0       0"
  "decode_sm90   *_c_d64    n64         255      0       0"
  "decode_sm90   *_t_d64    n64         255      0       0")
# Rows of a kind compile in order, several to a unit: CuTe's headers cost seconds each time.
set(BITDECODING_PACK_KERNELS_PER_UNIT 8)
set(BITDECODING_APPEND_KERNELS_PER_UNIT 8)
set(BITDECODING_DECODE_KERNELS_PER_UNIT 4)
