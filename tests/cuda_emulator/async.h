// mbarriers in shared memory, and copies to it that land at a random later time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_emulator {

struct Copy {
  uint32_t to;       // offset in shared memory
  const void* from;  // null: zeros
  uint32_t bytes;
};

namespace async {

void start_block(int threads);
void end_block();
void step();      // time goes by
bool land_one();  // false: nothing is in flight

void init_barrier(uint32_t barrier, int count);
void arrive(uint32_t barrier, int expected_bytes = 0);
void wait(uint32_t barrier, unsigned parity);

void copy(const Copy& copy);  // of this thread, cp.async; some land at once
void arrive_after_copies(uint32_t barrier);
void copy_and_complete(std::vector<Copy> copies, uint32_t barrier);  // counts its bytes on the barrier

}  // namespace async
}  // namespace cuda_emulator
