// Who last read and wrote each byte of shared memory: finds races, bytes that nothing in the block has written, and
// accesses beyond the dynamic part. Happens-before, not chance: a race is found whatever the schedule was.
//
// __syncthreads orders all threads, __syncwarp the lanes of its mask, and an mbarrier those who arrived before those
// who waited. Shuffles order nothing. An asynchronous copy writes as an agent of its own, the twin of its thread, from
// the moment it is issued, and only an mbarrier orders it. A warp's wgmma reads as an agent of its own too, and only
// its wait_group orders that.
//
// The asynchronous proxy, through which wgmma reads, sees what stores and cp.async have written only behind a
// fence.proxy.async on the way from writer to reader: clocks come twice, for what an agent knows and for what it knows
// to be there for that proxy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_emulator {

// copy: cp.async; bulk: a copy by the asynchronous proxy; observe: a read that a write may follow
enum class Access { read, write, atomic, copy, bulk, observe };

// What somebody knows: of each agent, the last of its clock's values that is before now.
using Clocks = std::vector<uint32_t>;
void join(Clocks& into, const Clocks& from);

namespace shadow {

void start_launch(size_t dynamic_bytes);
void end_launch();
void start_block(int threads);
void end_block();  // checks how much static shared memory was used

// All shared memory while a launch runs. Offsets are from its beginning, rounded down to 1024 bytes.
inline char* base;
inline size_t begin, end;

inline bool is_shared(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - base - begin) < end - begin;
}
inline uint32_t offset_of(const void* address) { return static_cast<const char*>(address) - base; }
char* address_of(uint32_t offset, size_t bytes, size_t alignment);
void touch(int thread, uint32_t offset, size_t bytes, Access access);
void load(int thread, uint32_t offset, void* to, size_t bytes);  // aligned to `bytes`
void store(int thread, uint32_t offset, const void* from, size_t bytes);

void order_block();
void order_warp(int warp, unsigned mask);
// What the thread, or its copies so far, can tell who waits for it.
Clocks release(int thread);
Clocks release_copies(int thread, Access kind);
void acquire(int thread, const Clocks& clocks);

void fence_proxy(int thread);
// Reads of a warp's wgmma: what all of its lanes know, a check against that, and what its lanes know when they are
// over.
Clocks all_lanes_know(int warp);
void read_by_wgmma(int warp, const Clocks& knows, uint32_t offset, size_t bytes);
Clocks release_wgmma(int warp);

}  // namespace shadow
}  // namespace cuda_emulator
