// Launches: limits, blocks one after another, warps of a block in random order, and who waits for whom.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "async.h"
#include "block.h"
#include "fibers.h"
#include "shadow.h"

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

std::mutex one_launch;
std::map<const void*, int> dynamic_limits;  // what cudaFuncSetAttribute has set
std::set<const void*> launched;
void* scheduler;  // its stack pointer while a fiber runs
void (*kernel_body)(void*);
void* kernel_context;
std::string failure;
uint64_t random_state;
unsigned first_seed;

void run_thread(int thread) {
  const unsigned x = thread % blockDim.x, yz = thread / blockDim.x;
  threadIdx = {x, yz % blockDim.y, yz / blockDim.y};
  block.current = thread;
  cuda_emulator_switch(&scheduler, block.threads[thread].stack_pointer);
  block.current = -1;
  if (!failure.empty()) throw std::runtime_error(failure);
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
  int states[5] = {};
  for (int t = 0; t < block.size; ++t) ++states[static_cast<int>(block.threads[t].state)];
  fail("deadlock: %d threads wait at __syncthreads, %d at an mbarrier, %d for lanes of their warp, and %d have exited",
       states[2], states[3], states[1], states[4]);
}

// Lanes that are ready when their warp is, each until it waits for something; now and then only some of them.
void run_warp(int w) {
  unsigned lanes = block.ready[w];
  if (random_below(4) == 0 && (lanes & random_state >> 7)) lanes &= random_state >> 7;
  const bool backwards = random_below(2);
  while (lanes) {
    const int l = backwards ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
    lanes &= ~(1u << l);
    run_thread(32 * w + l);
  }
}

void run_block() {
  static const Stacks stacks(kMaxThreads);
  const int warps = (block.size + 31) / 32;
  block.running = block.size, block.arrived = 0, block.current = -1, block.last_access = nullptr;
  std::fill(std::begin(block.ready), std::end(block.ready), 0);
  for (int t = 0; t < 32 * warps; ++t) block.threads[t].state = State::exited;
  for (int t = 0; t < block.size; ++t) {
    block.threads[t].stack_pointer = stacks.start(t, entry);
    make_ready(t);
  }
  shadow::start_block(block.size);
  async::start_block(block.size);
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
  async::end_block();
  shadow::end_block();
}

void check_limits(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  if (count < 1 || count > kMaxThreads || threads.z > 64)
    fail("a block of %u x %u x %u threads", threads.x, threads.y, threads.z);
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  const auto set = dynamic_limits.find(kernel);
  const size_t limit = set == dynamic_limits.end() ? kDefaultShared : set->second;
  if (config.dynamicSmemBytes > limit)
    fail("%zu bytes of dynamic shared memory, and the kernel's attribute allows %zu", config.dynamicSmemBytes, limit);
  if (config.numAttrs) fail("launch attributes are not emulated");
}

}  // namespace

void fail(const char* format, ...) {
  char what[512], text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  if (block.current < 0) {
    snprintf(text, sizeof text, "CUDA emulator: %s (seed %u)", what, first_seed);
    throw std::runtime_error(text);
  }
  Dl_info library{};
  if (block.last_access) dladdr(block.last_access, &library);
  const char* base = static_cast<const char*>(library.dli_fbase);
  snprintf(
      text, sizeof text,
      "CUDA emulator: %s (block %u %u %u, thread %d, seed %u; last access to shared memory: addr2line -Cfie %s %#zx)",
      what, blockIdx.x, blockIdx.y, blockIdx.z, block.current, first_seed, library.dli_fname,
      base ? static_cast<const char*>(block.last_access) - base : 0);
  failure = text;
  suspend(State::exited);
  abort();
}

void set_seed(unsigned seed) {
  first_seed = seed;
  random_state = seed * 0x9E3779B97F4A7C15u + 1;
}

unsigned random_below(unsigned n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return (random_state >> 32) * n >> 32;
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

static bool same_instruction(const char* a, const char* b) { return a == b || !strcmp(a, b); }

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

void before_atomic(const void* address, size_t bytes) {
  if (shadow::is_shared(address)) shadow::touch(block.current, shadow::offset_of(address), bytes, Access::atomic);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (!random_state) {
    const char* seed = getenv("CUDA_EMULATOR_SEED");
    set_seed(seed ? atoi(seed) : 1);
  }
  check_limits(config, kernel);
  launched.insert(kernel);
  gridDim = config.gridDim, blockDim = config.blockDim;
  block.size = blockDim.x * blockDim.y * blockDim.z;
  kernel_body = body, kernel_context = context;
  failure.clear();
  struct End {
    ~End() { block.current = -1, shadow::end_launch(); }
  } end;
  shadow::start_launch(config.dynamicSmemBytes);
  const bool backwards = random_below(2);
  const uint64_t x = gridDim.x, y = gridDim.y, blocks = x * y * gridDim.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t n = backwards ? blocks - 1 - i : i;
    blockIdx = {unsigned(n % x), unsigned(n / x % y), unsigned(n / x / y)};
    run_block();
  }
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || size_t(value) > kMaxShared)
    return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(one_launch);
  dynamic_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t blocks_at_once(int* blocks, int threads, size_t dynamic_bytes) {
  *blocks = 1;
  return threads > kMaxThreads || dynamic_bytes > kMaxShared ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace cuda_emulator

// Kernels launched so far, for tests that want to have run them all: up to `room`, and how many there are.
extern "C" __attribute__((visibility("default"))) int cuda_emulator_launched(const void** kernels, int room) {
  const std::lock_guard<std::mutex> lock(cuda_emulator::one_launch);
  int n = 0;
  for (const void* kernel : cuda_emulator::launched)
    if (n++ < room) *kernels++ = kernel;
  return n;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : int(cuda_emulator::kMaxShared);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
