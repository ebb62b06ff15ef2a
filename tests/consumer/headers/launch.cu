// SPDX-License-Identifier: Apache-2.0
// A kernel of one's own row, instantiated and launched from headers alone. Launching nothing (no
// tokens) succeeds on every machine; the launch of real tokens is tested on a GPU with the library.
#include <bitdecoding/quantize/pack_launch.cuh>

struct my_pack {
  static constexpr bitdecoding::layout::PageConfig config{.k_bits = 4, .v_bits = 2};
  static constexpr char name[] = "my_pack";
};

int main() {
  bitdecoding::PackProblem problem;
  problem.format.v_bits = 2;
  return bitdecoding::quantize::launch_pack<my_pack>(problem, nullptr, nullptr) != cudaSuccess;
}
