// A block of threads: fibers, warps in random order, and who waits for whom.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "async.h"
#include "block.h"
#include "fibers.h"
#include "shadow.h"
#include "wgmma.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, . - cuda_emulator_switch
)");

namespace cuda_emulator {

Block block;

namespace {

void* scheduler;  // its stack pointer while a fiber runs
struct Named {
  int expected = 0, arrived = 0;
  Clocks gathering;
  std::vector<bool> here;  // threads that have arrived
  std::vector<int> waiting;
};
Named named[16];
void (*kernel_body)(void*);
void* kernel_context;

bool same_instruction(const char* a, const char* b) { return a == b || !strcmp(a, b); }

void run_thread(int thread) {
  const unsigned x = thread % blockDim.x, yz = thread / blockDim.x;
  threadIdx = {x, yz % blockDim.y, yz / blockDim.y};
  block.current = thread;
  cuda_emulator_switch(&scheduler, block.threads[thread].stack_pointer);
  block.current = -1;
  if (!block.failure.empty()) throw std::runtime_error(block.failure);
}

void entry() {
  kernel_body(kernel_context);
  const int l = lane();
  for (int other = 0; other < 32; ++other) {
    const Thread& waits = block.threads[warp() * 32 + other];
    if (waits.state == State::meeting && waits.mask >> l & 1)
      fail("lane %d has exited, and lane %d waits for it at %s, mask %08x", l, other, waits.instruction, waits.mask);
  }
  --block.running;
  suspend(State::exited);
}

[[noreturn]] void deadlock() {
  int states[6] = {};
  for (int t = 0; t < block.size; ++t) ++states[static_cast<int>(block.threads[t].state)];
  fail(
      "deadlock: %d threads wait at __syncthreads, %d at an mbarrier, %d at a named barrier, %d for lanes of their "
      "warp, and %d have exited",
      states[2], states[3], states[4], states[1], states[5]);
}

// Lanes that are ready when their warp is, each until it waits for something; now and then only some of them.
void run_warp(int w) {
  unsigned lanes = block.ready[w];
  const unsigned some = random_bits();
  if (random_below(4) == 0 && (lanes & some)) lanes &= some;
  const bool backwards = random_below(2);
  while (lanes) {
    const int l = backwards ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
    lanes &= ~(1u << l);
    run_thread(32 * w + l);
  }
}

}  // namespace

void run_block(void (*body)(void*), void* context) {
  kernel_body = body, kernel_context = context;
  static const Stacks stacks(kMaxThreads);
  const int warps = (block.size + 31) / 32;
  block.running = block.size, block.arrived = 0, block.current = -1, block.code = nullptr;
  std::fill(std::begin(block.ready), std::end(block.ready), 0);
  for (int t = 0; t < 32 * warps; ++t) block.threads[t].state = State::exited;
  for (int t = 0; t < block.size; ++t) {
    block.threads[t].stack_pointer = stacks.start(t, entry);
    make_ready(t);
  }
  shadow::start_block(block.size);
  async::start_block(block.size);
  wgmma::start_block(block.size);
  for (Named& barrier : named) barrier = {0, 0, {}, std::vector<bool>(block.size), {}};
  while (block.running) {
    const int first = random_below(warps);
    int w = first;
    while (!block.ready[w] && (w = (w + 1) % warps) != first) continue;
    if (block.ready[w])
      run_warp(w);
    else if (!async::land_one())
      deadlock();
    async::step();
  }
  wgmma::end_block();
  async::end_block();
  shadow::end_block();
}

int current() { return block.current; }
int lane() { return block.current % 32; }
int warp() { return block.current / 32; }

void suspend(State why) {
  Thread& me = block.threads[block.current];
  me.state = why;
  block.ready[warp()] &= ~(1u << lane());
  cuda_emulator_switch(&me.stack_pointer, scheduler);
}

void meet(const char* instruction, unsigned mask, void* mine, Act act) {
  const int l = lane(), first = 32 * warp();
  if (!(mask >> l & 1)) fail("%s: lane %d is not in its mask %08x", instruction, l, mask);
  if (block.size - first < 32) mask &= (1u << (block.size - first)) - 1;
  bool all = true;
  for (int other = 0; other < 32; ++other) {
    if (other == l || !(mask >> other & 1)) continue;
    const Thread& they = block.threads[first + other];
    const bool meeting = they.state == State::meeting,
               same = meeting && same_instruction(they.instruction, instruction);
    all &= same && they.mask == mask;
    // lanes that wait for others first are waited for
    if (they.state == State::exited)
      fail("%s: lane %d of mask %08x has exited", instruction, other, mask);
    else if (they.state == State::at_barrier || (meeting && !same && they.mask >> l & 1))
      fail("lanes of a warp at different instructions: lane %d at %s, lane %d at %s", l, instruction, other,
           meeting ? they.instruction : "__syncthreads");
    else if (same && they.mask != mask && they.mask >> l & 1)
      fail("%s: lane %d has mask %08x, lane %d mask %08x", instruction, l, mask, other, they.mask);
  }
  Thread& me = block.threads[block.current];
  me.instruction = instruction, me.mask = mask, me.mine = mine;
  if (!all) return suspend(State::meeting);
  void* lanes[32];
  for (int other = 0; other < 32; ++other) lanes[other] = block.threads[first + other].mine;
  act(mask, lanes);
  for (int other = 0; other < 32; ++other)
    if (other != l && mask >> other & 1) make_ready(first + other);
}

void synchronize_warp(unsigned mask) {
  meet("__syncwarp", mask, nullptr, [](unsigned mask, void* const*) { shadow::order_warp(warp(), mask); });
}

void synchronize_block() {
  for (int other = 0; other < 32; ++other) {
    const Thread& they = block.threads[32 * warp() + other];
    if (they.state == State::meeting && they.mask >> lane() & 1)
      fail("lanes of a warp at different instructions: lane %d at __syncthreads, lane %d at %s", lane(), other,
           they.instruction);
  }
  if (++block.arrived < block.size) return suspend(State::at_barrier);
  block.arrived = 0;
  shadow::order_block();
  for (int t = 0; t < block.size; ++t)
    if (block.threads[t].state == State::at_barrier) make_ready(t);
}

void synchronize_named(int id, int threads, bool waits) {
  if (id < 1 || id > 15) fail("named barrier %d: 1 to 15 are there beside that of __syncthreads", id);
  if (threads < 1 || threads % 32) fail("named barrier %d: %d threads are no warps", id, threads);
  Named& mine = named[id];
  if (!mine.arrived) mine.expected = threads;
  if (mine.expected != threads) fail("named barrier %d: for %d threads and for %d", id, mine.expected, threads);
  if (mine.here[block.current]) fail("named barrier %d: thread %d arrives twice", id, block.current);
  mine.here[block.current] = true;
  join(mine.gathering, shadow::release(block.current));
  if (waits) mine.waiting.push_back(block.current);
  if (++mine.arrived < threads) {
    if (waits) suspend(State::at_named);
    return;
  }
  for (int thread : mine.waiting) {
    shadow::acquire(thread, mine.gathering);
    if (thread != block.current) make_ready(thread);
  }
  mine = {0, 0, {}, std::vector<bool>(block.size), {}};
}

void before_atomic(const void* address, size_t bytes) {
  if (shadow::is_shared(address)) shadow::touch(block.current, shadow::offset_of(address), bytes, Access::atomic);
}

}  // namespace cuda_emulator
