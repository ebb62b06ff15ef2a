// SPDX-License-Identifier: Apache-2.0
// A GPU as kernels see it: a grid of CTAs whose threads are fibers. Lanes meet in the operations of
// their warp, threads at the barrier of their CTA; copies land in shared memory when they please.
// What a GPU would answer with anything from a hang to wrong numbers throws here.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "fibers.hpp"
#include "guarded_array.hpp"

namespace bitdecoding::emulation {

inline constexpr int kLanes = 32;
inline constexpr int kPairThreads = 2 * kLanes;
inline constexpr int kGroupThreads = 4 * kLanes;  // of a warpgroup

// When copies land that nobody waits for yet.
enum class Landing { at_once, at_any_time, when_awaited };

struct Grid {
  int ctas = 1;
  int threads = kLanes;     // of a CTA
  int shared_bytes = 0;     // of a CTA
  int column = 0, row = 0;  // of the first CTA, where the grid is a part of a larger one
};

inline void require(bool holds, const char* rule) {
  if (!holds) throw std::runtime_error(rule);
}
inline bool is_aligned(const void* address, int bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(bytes) == 0;
}

class Machine;
// The one whose kernel runs.
inline Machine*& machine() {
  static Machine* running = nullptr;
  return running;
}

class Machine {
 public:
  // Called by every thread with the shared memory of its CTA.
  using Kernel = std::function<void(std::uint8_t* shared)>;

  // `late_cta` begins when the others can't go on; -1: none.
  Machine(const Grid& grid, Landing landing, int late_cta, std::mt19937& random)
      : grid_(grid),
        landing_(landing),
        late_cta_(late_cta),
        random_(random),
        fibers_(grid.ctas * grid.threads, random),
        warps_(grid.ctas * grid.threads / kLanes),
        pairs_((grid.ctas * grid.threads + kPairThreads - 1) / kPairThreads),
        groups_((grid.ctas * grid.threads + kGroupThreads - 1) / kGroupThreads),
        threads_(grid.ctas * grid.threads) {
    for (int cta = 0; cta < grid.ctas; ++cta) ctas_.emplace_back(grid.shared_bytes);
  }

  void run(const Kernel& kernel) {
    machine() = this;
    fibers_.run(
        [&](int fiber) {
          kernel(ctas_[fiber / grid_.threads].shared.data());
          require(threads_[fiber].pieces.empty(), "a thread ends before its cp.async have landed");
        },
        [&](bool all_wait) { return land_one(all_wait); },
        late_cta_ < 0 ? std::pair(0, 0)
                      : std::pair(late_cta_ * grid_.threads, (late_cta_ + 1) * grid_.threads));
    require(bulk_copies_.empty(), "the grid ends before its bulk copies have landed");
    for (const Warp& warp : warps_) {
      require(warp.products.empty(), "the grid ends before its wgmmas");
    }
  }

  int ctas() const { return grid_.ctas; }
  int threads() const { return grid_.threads; }  // of a CTA
  int cta() const { return fibers_.current() / grid_.threads; }
  int column() const { return grid_.column + cta(); }
  int row() const { return grid_.row; }
  int thread() const { return fibers_.current() % grid_.threads; }
  int lane() const { return thread() % kLanes; }

  // ---- meetings ----
  // All lanes of a warp come to `operation`; then `act` sees the arguments of all, once.
  template <class Argument, class Act>
  void meet(std::string_view operation, Argument& mine, const Act& act) {
    meet_in(warps_[fibers_.current() / kLanes], operation, mine, act);
  }
  // The same of the threads of a pair of warps, or of a warpgroup.
  template <int Threads, class Argument, class Act>
  void meet_group(std::string_view operation, Argument& mine, const Act& act) {
    require(threads() % Threads == 0, "a pair of warps or a warpgroup is not whole");
    const int index = fibers_.current() / Threads;
    if constexpr (Threads == kPairThreads) {
      meet_in(pairs_[index], operation, mine, act);
    } else {
      meet_in(groups_[index], operation, mine, act);
    }
  }
  void sync_threads() {
    Cta& mine = ctas_[cta()];
    if (++mine.arrived < grid_.threads) return fibers_.wait();
    mine.arrived = 0;
    release(cta() * grid_.threads, grid_.threads);
  }
  // Whether it holds for all threads of the CTA.
  bool sync_threads_and(bool holds) {
    Cta& mine = ctas_[cta()];
    mine.holds_for_all = holds && (mine.arrived == 0 || mine.holds_for_all);
    sync_threads();
    const bool holds_for_all = mine.holds_for_all;
    sync_threads();  // nobody votes anew before all have read this
    return holds_for_all;
  }
  // Others may come first.
  void pass() { fibers_.pass(); }
  int draw(int below) { return static_cast<int>(random_() % static_cast<unsigned>(below)); }

  // ---- wgmma ----
  // Products of the current thread's warp are done in their order: now or when it waits.
  void begin_product(const std::function<void()>& product) {
    Warp& mine = warps_[fibers_.current() / kLanes];
    if (mine.products.empty() && draw(2) == 0) return product();
    mine.products.push_back({product, mine.product_groups});
  }
  void commit_products() { ++warps_[fibers_.current() / kLanes].product_groups; }
  // Of the groups that the warp has committed, all but the newest `pending` are done.
  void end_products(int pending) {
    Warp& mine = warps_[fibers_.current() / kLanes];
    while (!mine.products.empty() && mine.products.front().group < mine.product_groups - pending) {
      mine.products.front().act();
      mine.products.pop_front();
    }
  }

  // A shared-memory address, and what it names.
  unsigned shared_address(const void* address) {
    require_shared(address, 1, 1);
    return static_cast<unsigned>(static_cast<const std::uint8_t*>(address) -
                                 ctas_[cta()].shared.begin());
  }
  const void* shared_at(int address, int bytes) {
    const std::uint8_t* named = ctas_[cta()].shared.begin() + address;
    require_shared(named, bytes, 1);
    return named;
  }
  // Shared memory that an instruction names by address.
  void require_shared(const void* address, int bytes, int alignment) {
    const GuardedArray<std::uint8_t>& shared = ctas_[cta()].shared;
    const auto* first = static_cast<const std::uint8_t*>(address);
    require(first >= shared.begin() && first + bytes <= shared.end(), "not in shared memory");
    require(is_aligned(address, alignment), "misaligned in shared memory");
  }

  // ---- cp.async ----
  void copy_piece(const void* from, void* to, int bytes) {
    require_shared(to, bytes, bytes);
    require(is_aligned(from, bytes), "cp.async from a misaligned address");
    Thread& mine = threads_[fibers_.current()];
    const Piece piece{from, to, bytes, mine.groups};
    if (lands_at_once()) return piece.land();
    piece.poison();
    mine.pieces.push_back(piece);
  }
  void commit_pieces() { ++threads_[fibers_.current()].groups; }
  // Of the groups that the thread has committed, all but the newest `pending` land.
  void await_pieces(int pending) {
    Thread& mine = threads_[fibers_.current()];
    std::erase_if(mine.pieces, [&](const Piece& piece) {
      const bool lands = pending == 0 || piece.group < mine.groups - pending;
      if (lands) piece.land();
      return lands;
    });
  }

  // ---- mbarrier, and bulk copies that complete its phases ----
  void begin_barrier(const std::uint64_t* word, int arrivals) {
    require_shared(word, 8, 8);
    Cta& mine = ctas_[cta()];
    require(mine.barriers.emplace(word, Barrier{arrivals, arrivals}).second,
            "an mbarrier is initialised twice");
  }
  void arrive(const std::uint64_t* word, int expected_bytes) {
    Barrier& barrier = barrier_at(word);
    require(barrier.missing > 0, "more arrivals at an mbarrier than its phase has");
    --barrier.missing;
    barrier.missing_bytes += expected_bytes;
    complete(barrier);
  }
  // Until the phase of this parity is over.
  void await_phase(const std::uint64_t* word, int parity) {
    Barrier& barrier = barrier_at(word);
    while (barrier.parity == parity) {
      barrier.waiting.push_back(fibers_.current());
      fibers_.wait();
    }
  }
  void copy_bulk(const void* from, void* to, int bytes, const std::uint64_t* word) {
    require(bytes > 0 && bytes % 16 == 0, "a bulk copy of other than multiples of 16 bytes");
    require_shared(to, bytes, 16);
    require(is_aligned(from, 16), "a bulk copy from a misaligned address");
    touch(from, bytes);
    const BulkCopy copy{{from, to, bytes, 0}, &barrier_at(word)};
    if (lands_at_once()) return land(copy);
    copy.piece.poison();
    bulk_copies_.push_back(copy);
  }

 private:
  struct Piece {
    const void* from;
    void* to;
    int bytes;
    int group;  // of the thread's cp.async

    void land() const { std::memcpy(to, from, static_cast<std::size_t>(bytes)); }
    // What was there is lost, and what comes is not there yet.
    void poison() const { std::memset(to, 0xff, static_cast<std::size_t>(bytes)); }
  };
  struct Thread {
    std::vector<Piece> pieces;
    int groups = 0;  // committed
  };
  template <int Threads>
  struct Meeting {
    static constexpr int kThreads = Threads;
    std::string_view operation;
    int arrived = 0;
    std::array<void*, Threads> arguments;
  };
  struct Product {
    std::function<void()> act;
    int group;
  };
  struct Warp : Meeting<kLanes> {
    std::deque<Product> products;  // of wgmmas that are begun
    int product_groups = 0;        // committed
  };
  using Pair = Meeting<kPairThreads>;
  using Group = Meeting<kGroupThreads>;
  struct Barrier {
    int arrivals;  // of a phase
    int missing;
    int missing_bytes = 0;
    int parity = 0;
    std::vector<int> waiting = {};  // fibers
  };
  struct BulkCopy {
    Piece piece;
    Barrier* barrier;
  };
  struct Cta {
    explicit Cta(int shared_bytes) : shared(static_cast<std::size_t>(shared_bytes)) {
      shared.poison();
    }

    GuardedArray<std::uint8_t> shared;
    int arrived = 0;
    bool holds_for_all = true;
    std::map<const std::uint64_t*, Barrier> barriers;
  };

  // Ends this turn if the memory is inaccessible, and not the program when the copy lands.
  static void touch(const void* memory, int bytes) {
    const auto* first = static_cast<const volatile std::uint8_t*>(memory);
    (void)first[0];
    (void)first[bytes - 1];
  }

  template <class Place, class Argument, class Act>
  void meet_in(Place& place, std::string_view operation, Argument& mine, const Act& act) {
    constexpr int kThreads = Place::kThreads;
    const int index = fibers_.current() % kThreads;
    if (place.arrived == 0) place.operation = operation;
    require(place.operation == operation, "threads that meet are at different operations");
    place.arguments[index] = &mine;
    if (++place.arrived < kThreads) return fibers_.wait();
    std::array<Argument*, kThreads> all;
    for (int i = 0; i < kThreads; ++i) all[i] = static_cast<Argument*>(place.arguments[i]);
    act(all);
    place.arrived = 0;
    release(fibers_.current() - index, kThreads);
  }

  // Everybody may go on; whether this thread goes first is left to chance.
  void release(int first, int count) {
    for (int fiber = first; fiber < first + count; ++fiber) {
      if (fiber != fibers_.current()) fibers_.wake(fiber);
    }
    if (draw(2) == 0) pass();
  }

  Barrier& barrier_at(const std::uint64_t* word) {
    const auto found = ctas_[cta()].barriers.find(word);
    require(found != ctas_[cta()].barriers.end(), "an mbarrier is used before it is initialised");
    return found->second;
  }
  void complete(Barrier& barrier) {
    if (barrier.missing > 0 || barrier.missing_bytes != 0) return;
    barrier.missing = barrier.arrivals;
    barrier.parity ^= 1;
    for (const int fiber : barrier.waiting) fibers_.wake(fiber);
    barrier.waiting.clear();
  }

  bool lands_at_once() {
    return landing_ == Landing::at_once || (landing_ == Landing::at_any_time && draw(2) == 0);
  }
  void land(const BulkCopy& copy) {
    copy.piece.land();
    copy.barrier->missing_bytes -= copy.piece.bytes;
    complete(*copy.barrier);
  }
  // Between turns. Returns whether a copy has landed.
  bool land_one(bool all_wait) {
    if (bulk_copies_.empty()) return false;
    const bool is_time = landing_ == Landing::at_any_time && draw(kTurnsOfCopy) == 0;
    if (!all_wait && !is_time) return false;
    std::swap(bulk_copies_[draw(static_cast<int>(bulk_copies_.size()))], bulk_copies_.back());
    const BulkCopy copy = bulk_copies_.back();
    bulk_copies_.pop_back();
    land(copy);
    return true;
  }

  static constexpr int kTurnsOfCopy = 1000;  // a copy lands about as often

  Grid grid_;
  Landing landing_;
  int late_cta_;
  std::mt19937& random_;
  Fibers fibers_;
  std::vector<Cta> ctas_;
  std::vector<Warp> warps_;
  std::vector<Pair> pairs_;
  std::vector<Group> groups_;
  std::vector<Thread> threads_;
  std::vector<BulkCopy> bulk_copies_;  // under way
};

}  // namespace bitdecoding::emulation
