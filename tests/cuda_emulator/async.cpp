#include "async.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "block.h"
#include "shadow.h"

namespace cuda_emulator::async {
namespace {

constexpr int kMaxDelay = 40;

struct Barrier {
  int expected, pending;
  int64_t bytes = 0;  // of copies still to come
  unsigned phase = 0;
  Clocks gathering, completed;  // of those who arrived in this phase; of all phases that are over
  std::vector<int> waiting;     // threads
};

struct Flight {
  std::vector<Copy> copies;
  uint32_t barrier;
  Clocks clocks;
  bool counts_bytes;
  int delay;
};

std::unordered_map<uint32_t, Barrier> barriers;
std::vector<Flight> flights;
std::vector<std::vector<Copy>> issued;  // of each thread, that no flight has taken yet

Barrier& at(uint32_t barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("the mbarrier at offset %u was not initialised", barrier);
  return found->second;
}

// By the thread that runs: it must have seen the initialisation.
Barrier& use(uint32_t barrier) {
  Barrier& found = at(barrier);
  shadow::touch(block.current, barrier, 8, Access::observe);
  return found;
}

void settle(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.expected;
  barrier.phase ^= 1;
  barrier.completed = barrier.gathering;
  for (int thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

void arrive(Barrier& barrier, const Clocks& clocks) {
  if (!barrier.pending) fail("more arrivals at an mbarrier than it expects");
  --barrier.pending;
  join(barrier.gathering, clocks);
}

void perform(const Copy& copy) {
  char* to = shadow::address_of(copy.to, copy.bytes, 1);
  if (copy.from)
    memcpy(to, copy.from, copy.bytes);
  else
    memset(to, 0, copy.bytes);
}

void check(const Copy& copy, Access kind) {
  shadow::address_of(copy.to, copy.bytes, copy.bytes);
  if (reinterpret_cast<uintptr_t>(copy.from) % copy.bytes)
    fail("misaligned copy of %u bytes from %p", copy.bytes, copy.from);
  shadow::touch(block.current, copy.to, copy.bytes, kind);
}

void land(size_t i) {
  const Flight flight = std::move(flights[i]);
  flights[i] = std::move(flights.back());
  flights.pop_back();
  int64_t bytes = 0;
  for (const Copy& copy : flight.copies) perform(copy), bytes += copy.bytes;
  Barrier& barrier = at(flight.barrier);
  if (flight.counts_bytes) {
    barrier.bytes -= bytes;
    join(barrier.gathering, flight.clocks);
  } else {
    arrive(barrier, flight.clocks);
  }
  settle(barrier);
}

}  // namespace

void start_block(int threads) {
  barriers.clear();
  flights.clear();
  issued.assign(threads, {});
}

void end_block() {
  if (!flights.empty()) fail("asynchronous copies are in flight at the end of the block");
  for (const auto& copies : issued)
    if (!copies.empty()) fail("asynchronous copies that nothing waits for at the end of the block");
}

void step() {
  for (size_t i = flights.size(); i-- > 0;)
    if (--flights[i].delay <= 0) land(i);
}

bool land_one() {
  if (flights.empty()) return false;
  land(random_below(flights.size()));
  return true;
}

void init_barrier(uint32_t barrier, int count) {
  shadow::address_of(barrier, 8, 8);
  shadow::touch(block.current, barrier, 8, Access::write);
  if (count < 1 || count >= 1 << 20) fail("an mbarrier for %d arrivals", count);
  barriers[barrier] = {count, count};
}

void arrive(uint32_t barrier, int expected_bytes) {
  Barrier& mine = use(barrier);
  mine.bytes += expected_bytes;
  arrive(mine, shadow::release(block.current));
  settle(mine);
}

void wait(uint32_t barrier, unsigned parity) {
  Barrier& mine = use(barrier);
  while (mine.phase == parity) {
    mine.waiting.push_back(block.current);
    suspend(State::at_mbarrier);
  }
  shadow::acquire(block.current, mine.completed);
}

void copy(const Copy& copy) {
  check(copy, Access::copy);
  if (random_below(4) == 0)
    perform(copy);
  else
    issued[block.current].push_back(copy);
}

void arrive_after_copies(uint32_t barrier) {
  use(barrier);
  const int delay = 1 + static_cast<int>(random_below(kMaxDelay));
  Clocks clocks = shadow::release_copies(block.current, Access::copy);
  flights.push_back({std::move(issued[block.current]), barrier, std::move(clocks), false, delay});
  issued[block.current].clear();
}

void copy_and_complete(std::vector<Copy> copies, uint32_t barrier) {
  use(barrier);
  for (const Copy& copy : copies) check(copy, Access::bulk);
  const int delay = 1 + static_cast<int>(random_below(kMaxDelay));
  Clocks clocks = shadow::release_copies(block.current, Access::bulk);
  flights.push_back({std::move(copies), barrier, std::move(clocks), true, delay});
}

}  // namespace cuda_emulator::async
