// The threads of a block as contexts of one thread of the host.
#include "on_host.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

on_host::Index threadIdx, blockIdx, blockDim;

namespace on_host {
namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 * 1024;

enum class At { RUNNING, WARP, BLOCK, END };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  At at = At::RUNNING;
  uint64_t given = 0;
};

ucontext_t scheduler;
std::vector<Thread> threads;
const std::function<void()>* running = nullptr;

void run() {
  (*running)();
  threads[threadIdx.x].at = At::END;
}

void wait(At at) {
  Thread& own = threads[threadIdx.x];
  own.at = at;
  swapcontext(&own.context, &scheduler);
}

// Whether all of so many threads from `first` on wait at the same place; those at their end do not wait for a block.
bool are_at(At at, unsigned first, unsigned count) {
  for (unsigned t = first; t < first + count; ++t)
    if (threads[t].at != at && !(at == At::BLOCK && threads[t].at == At::END)) return false;
  return true;
}

void run_block(unsigned count) {
  for (unsigned t = 0; t < count; ++t) {
    Thread& own = threads[t];
    getcontext(&own.context);
    own.context.uc_stack = {own.stack.data(), 0, STACK};
    own.context.uc_link = &scheduler;
    makecontext(&own.context, run, 0);
    own.at = At::RUNNING;
  }
  for (bool left = true; left;) {
    bool moved = false;
    left = false;
    for (unsigned t = 0; t < count; ++t) {
      if (threads[t].at != At::RUNNING) continue;
      moved = true;
      threadIdx = {t, 0, 0};
      swapcontext(&scheduler, &threads[t].context);
    }
    for (unsigned first = 0; first < count; first += WARP)
      if (are_at(At::WARP, first, WARP))
        for (unsigned t = first; t < first + WARP; ++t) threads[t].at = At::RUNNING;
    if (are_at(At::BLOCK, 0, count))
      for (unsigned t = 0; t < count; ++t)
        if (threads[t].at == At::BLOCK) threads[t].at = At::RUNNING;
    for (unsigned t = 0; t < count; ++t) left |= threads[t].at != At::END;
    if (left && !moved) {
      std::fprintf(stderr, "on_host: in block %u some threads wait for others that do not come\n", blockIdx.x);
      std::abort();
    }
  }
}

}  // namespace

void wait_for_warp() { wait(At::WARP); }
void wait_for_block() { wait(At::BLOCK); }
uint64_t& given(unsigned thread) { return threads[thread].given; }

void launch(unsigned blocks, unsigned count, const std::function<void()>& kernel) {
  if (!blocks || count % WARP || count > 1024) {
    std::fprintf(stderr, "on_host: %u blocks of %u threads\n", blocks, count);
    std::abort();
  }
  if (threads.size() < count) threads = std::vector<Thread>(count);
  running = &kernel;
  blockDim = {count, 1, 1};
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx = {block, 0, 0};
    run_block(count);
  }
}

}  // namespace on_host
