// SPDX-License-Identifier: Apache-2.0
#include "decode_plans.hpp"

#include <cstddef>
#include <functional>
#include <unordered_map>
#include <utility>

#include "bitdecoding/run.hpp"
#include "execution.hpp"

namespace bitdecoding::python {

namespace {

struct Wanted {
  KvFormat format;
  int columns = 0;
  std::optional<std::string> kernel;
  int device = 0;

  friend bool operator==(const Wanted&, const Wanted&) = default;
};

struct HashWanted {
  std::size_t operator()(const Wanted& wanted) const {
    const std::size_t rest = std::hash<std::optional<std::string>>{}(wanted.kernel) ^
                             std::hash<int>{}(64 * wanted.columns + wanted.device);
    return std::hash<KvFormat>{}(wanted.format) ^ rest;
  }
};

}  // namespace

const decode::DecodePlan& decode_plan(const KvFormat& format, int columns,
                                      const std::optional<std::string>& kernel, int device) {
  static std::unordered_map<Wanted, decode::DecodePlan, HashWanted> plans;
  Wanted wanted{format, columns, kernel, device};
  if (const auto found = plans.find(wanted); found != plans.end()) return found->second;
  decode::DecodePlan plan;
  const char* name = kernel ? kernel->c_str() : nullptr;
  run([&] { return plan_decode(format, columns, name, {.device = device}, &plan); });
  return plans.try_emplace(std::move(wanted), plan).first->second;
}

nb::dict plan_facts(const decode::DecodePlan& plan) {
  nb::dict facts;
  facts["kernel"] = nb::str(plan.kernel);
  facts["ctas"] = plan.ctas;
  facts["warps"] = plan.warps;
  facts["stages"] = plan.stages;
  facts["stage_bytes"] = plan.stage_bytes;
  facts["smem_bytes"] = plan.smem_bytes;
  facts["workspace_bytes"] = plan.workspace_bytes;
  return facts;
}

}  // namespace bitdecoding::python
