// SPDX-License-Identifier: Apache-2.0
// Fibers: many runs of one function, each on a stack of its own, in random turns on one thread. A
// turn ends only in pass() or wait(), so that a schedule is repeated by its seed.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "guarded_array.hpp"

namespace bitdecoding::emulation {

// Where a fiber goes on. The compiler's own pair of non-local jumps: swapcontext() would be a
// system call for every turn, and there are millions; longjmp() may refuse to change stacks.
class ResumePoint {
 public:
  // Goes on at `to`; returns when something goes on here.
  [[gnu::noipa]] void leave_for(ResumePoint& to) {
    if (__builtin_setjmp(registers_) == 0) to.jump();
  }
  // Begins a fiber, whose first turn has no place to go on from.
  [[gnu::noipa]] void leave_for(const ucontext_t& start) {
    if (__builtin_setjmp(registers_) == 0) setcontext(&start);
  }
  // The same from where nothing goes on.
  [[gnu::noipa, noreturn]] void jump() { __builtin_longjmp(registers_, 1); }

 private:
  void* registers_[5];
};

class Fibers {
 public:
  using Body = std::function<void(int fiber)>;
  // Called before every turn. Where all fibers wait, nothing else can wake one: returns whether
  // anything has changed.
  using BetweenTurns = std::function<bool(bool all_wait)>;

  Fibers(int count, std::mt19937& random) : random_(random), fibers_(count) {
    while (stacks().size() < fibers_.size()) stacks().emplace_back(kStackBytes);
  }

  // Runs body(0) to body(count - 1); what one of them throws ends them all. `late` ones, from
  // late.first to below late.second, begin when all others wait or are done.
  void run(const Body& body, const BetweenTurns& between_turns, std::pair<int, int> late) {
    const InaccessiblePages inaccessible_pages;
    body_ = &body;
    running() = this;
    int left = static_cast<int>(fibers_.size());
    for (int fiber = 0; fiber < left; ++fiber) {
      if (fiber < late.first || fiber >= late.second) wake(fiber);
    }
    while (left > 0) {
      const bool has_changed = between_turns(ready_.empty());
      if (ready_.empty()) {
        if (has_changed) continue;
        if (late.first == late.second) throw std::runtime_error("deadlock: every thread waits");
        for (; late.first < late.second; ++late.first) wake(late.first);
      }
      take_turn();
      if (has_faulted_) throw std::runtime_error("a thread touches an inaccessible page");
      if (failure_) std::rethrow_exception(failure_);
      if (fibers_[current_].is_done) --left;
    }
  }

  int current() const { return current_; }
  // The rest of this turn comes later.
  void pass() {
    wake(current_);
    wait();
  }
  // The fiber's turns end until somebody wakes it.
  void wait() { fibers_[current_].resume.leave_for(scheduler_); }
  void wake(int fiber) { ready_.push_back(fiber); }

 private:
  static constexpr std::size_t kStackBytes = 96 * 1024;

  // While it lives, a fiber that touches one of them ends with an exception instead of the program.
  class InaccessiblePages {
   public:
    InaccessiblePages() {
      struct sigaction action{};
      action.sa_handler = [](int) { running()->end_turn_by_fault(); };
      action.sa_flags = SA_ONSTACK | SA_NODEFER;  // the handler doesn't return
      sigaction(SIGSEGV, &action, &before());
    }
    ~InaccessiblePages() { restore(); }

    static void restore() { sigaction(SIGSEGV, &before(), nullptr); }

   private:
    static struct sigaction& before() {
      static struct sigaction action;
      return action;
    }
  };

  struct Fiber {
    ResumePoint resume;
    bool has_begun = false;
    bool is_done = false;
  };

  // Kept from one run to the next.
  static std::vector<GuardedArray<std::uint8_t>>& stacks() {
    static std::vector<GuardedArray<std::uint8_t>> stacks;
    return stacks;
  }
  // makecontext() hands on no pointer.
  static Fibers*& running() {
    static Fibers* fibers = nullptr;
    return fibers;
  }

  void take_turn() {
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    Fiber& fiber = fibers_[current_];
    in_turn_ = true;
    if (fiber.has_begun) {
      scheduler_.leave_for(fiber.resume);
    } else {
      fiber.has_begun = true;
      begin(stacks()[current_]);
    }
    in_turn_ = false;
  }

  void end_turn_by_fault() {
    if (!in_turn_) return InaccessiblePages::restore();  // not a fiber's: it happens again
    has_faulted_ = true;
    scheduler_.jump();
  }

  void begin(const GuardedArray<std::uint8_t>& stack) {
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack.data();
    start.uc_stack.ss_size = stack.size();
    start.uc_link = nullptr;
    makecontext(&start, [] { running()->run_current(); }, 0);
    scheduler_.leave_for(start);
  }

  void run_current() {
    try {
      (*body_)(current_);
    } catch (...) {
      failure_ = std::current_exception();
    }
    fibers_[current_].is_done = true;
    wait();
  }

  std::mt19937& random_;
  std::vector<Fiber> fibers_;
  std::vector<int> ready_;  // fibers that don't wait
  ResumePoint scheduler_;
  const Body* body_ = nullptr;
  bool in_turn_ = false;
  bool has_faulted_ = false;
  std::exception_ptr failure_;
  int current_ = -1;
};

}  // namespace bitdecoding::emulation
