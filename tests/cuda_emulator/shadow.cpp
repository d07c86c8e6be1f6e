#include "shadow.h"

#include <link.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "block.h"

namespace cuda_emulator {

void join(Clocks& into, const Clocks& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

namespace shadow {
namespace {

struct Record {
  uint32_t epoch = 0, clock = 0;
  uint16_t agent = 0;
  bool atomic = false;
};

// Of a byte. Two readers that are not ordered are kept, of more than two any two.
struct Cell {
  Record write, reads[2];
};

size_t dynamic, dynamic_bytes;  // of this launch
size_t room, room_end;          // the same with its guards
size_t static_bytes;            // written in this block: what a kernel uses of static memory, or less
size_t low, high;               // of what was touched since it was poisoned
std::unique_ptr<Cell[]> cells;
size_t cell_count;

uint32_t epoch = 0, first_epoch;  // one more after each __syncthreads; of this block
int threads;
std::vector<uint32_t> clocks;  // of agents: threads, their copies by cp.async, their bulk copies, wgmma of warps
std::vector<Clocks> known;     // to each thread, beyond `common`
Clocks common;                 // to all threads

// The thread-local storage of this library, on the calling thread.
thread_local char anchor;

int find_storage(dl_phdr_info* info, size_t, void* found) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    char* data = static_cast<char*>(info->dlpi_tls_data);
    if (header.p_type != PT_TLS || !data || &anchor < data || &anchor >= data + header.p_memsz) continue;
    *static_cast<Span*>(found) = {data, header.p_memsz};
    return 1;
  }
  return 0;
}

size_t agents() { return clocks.size(); }

bool knows(const Clocks& clocks, size_t agent, uint32_t clock) {
  return agent < clocks.size() && clocks[agent] >= clock;
}

bool ordered(const Record& before, int thread) {
  if (before.epoch < first_epoch || before.agent == thread) return true;
  if (before.agent < threads && before.epoch < epoch) return true;
  return knows(common, before.agent, before.clock) || knows(known[thread], before.agent, before.clock);
}

// A whole block's clock, of which `common` may have nothing yet.
uint32_t in_common(size_t at) { return at < common.size() ? common[at] : 0; }

bool is_dynamic(uint32_t offset) { return offset >= room && offset < room_end; }

// A byte in words.
struct Place {
  const char* part;
  ptrdiff_t offset;
  explicit Place(uint32_t at)
      : part(is_dynamic(at) ? "dynamic" : "static"), offset(is_dynamic(at) ? ptrdiff_t(at) - ptrdiff_t(dynamic) : at) {}
};

[[noreturn]] void race(int thread, const char* does, const Record& before, const char* did, uint32_t at) {
  const Place place(at);
  if (before.agent >= 3 * threads)
    fail("race on %s shared memory at offset %td: thread %d %s what wgmma of warp %d reads, and nothing orders them",
         place.part, place.offset, thread, does, before.agent - 3 * threads);
  const bool copied = before.agent >= threads;
  fail("race on %s shared memory at offset %td: thread %d %s what %sthread %d %s, and nothing orders them", place.part,
       place.offset, thread, does, copied ? "an asynchronous copy of " : "", before.agent % threads,
       copied ? "writes" : did);
}

}  // namespace

void start_launch(size_t bytes) {
  anchor = 0;
  Span all{};
  dl_iterate_phdr(find_storage, &all);
  if (!all.begin) fail("the shared memory of this library was not found");
  base = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(all.begin) & ~uintptr_t(1023));
  begin = all.begin - base, end = begin + all.bytes;
  const Span whole = dynamic_shared();
  room = whole.begin - base, room_end = room + whole.bytes;
  dynamic = room + kDynamicGuard, dynamic_bytes = bytes;
  if (cell_count < end) cells.reset(new Cell[cell_count = end]);
  low = end, high = 0;
}

void end_launch() { base = nullptr, begin = end = 0; }

void start_block(int count) {
  threads = count;
  first_epoch = ++epoch;
  clocks.assign(3 * threads + (threads + 31) / 32, 1);
  known.assign(threads, {});
  common.clear();
  static_bytes = 0;
  memset(base + dynamic, 0xFF, dynamic_bytes);
  if (low < high) memset(base + low, 0xFF, high - low);
  low = end, high = 0;
}

void end_block() {
  if (static_bytes > kDefaultShared || static_bytes + dynamic_bytes > kMaxShared)
    fail("too much shared memory: %zu bytes static and %zu dynamic", static_bytes, dynamic_bytes);
}

char* address_of(uint32_t offset, size_t bytes, size_t alignment) {
  if (offset % alignment) fail("misaligned access to %zu bytes of shared memory at offset %u", bytes, offset);
  if (offset < begin || offset + bytes > end) fail("access beyond all shared memory at offset %u", offset);
  return base + offset;
}

void touch(int thread, uint32_t offset, size_t bytes, Access access) {
  if (is_dynamic(offset) && (offset < dynamic || offset + bytes > dynamic + dynamic_bytes))
    fail("access to %zu bytes at offset %td of %zu bytes of dynamic shared memory", bytes, Place(offset).offset,
         dynamic_bytes);
  if (offset + bytes > end) fail("access beyond all shared memory at offset %u", offset);
  if (!is_dynamic(offset)) low = std::min<size_t>(low, offset), high = std::max<size_t>(high, offset + bytes);
  const bool copy = access == Access::copy, bulk = access == Access::bulk, atomic = access == Access::atomic;
  const bool writes = copy || bulk || atomic || access == Access::write;
  const uint16_t agent = thread + (copy ? threads : bulk ? 2 * threads : 0);
  const Record now{epoch, clocks[agent], agent, atomic};
  for (uint32_t at = offset; at < offset + bytes; ++at) {
    Cell& cell = cells[at];
    const bool written = cell.write.epoch >= first_epoch;
    if (!written && (!writes || atomic))
      fail("read of %s shared memory at offset %td, which nothing in this block has written", Place(at).part,
           Place(at).offset);
    if (!ordered(cell.write, thread) && !(atomic && cell.write.atomic))
      race(thread, writes ? "writes" : "reads", cell.write, "wrote", at);
    if (writes) {
      for (const Record& read : cell.reads)
        if (!ordered(read, thread)) race(thread, "writes", read, "read", at);
      if (!written && !is_dynamic(at)) ++static_bytes;
      cell = {now, {}};
    } else if (access == Access::read) {
      Record* slot = &cell.reads[random_below(2)];
      for (Record& read : cell.reads)
        if (ordered(read, thread)) slot = &read;
      *slot = now;
    }
  }
}

void load(int thread, uint32_t offset, void* to, size_t bytes) {
  const char* from = address_of(offset, bytes, bytes);
  touch(thread, offset, bytes, Access::read);
  memcpy(to, from, bytes);
}

void store(int thread, uint32_t offset, const void* from, size_t bytes) {
  char* to = address_of(offset, bytes, bytes);
  touch(thread, offset, bytes, Access::write);
  memcpy(to, from, bytes);
}

void order_block() {
  for (Clocks& some : known) {
    join(common, some);
    some.clear();
  }
  common.resize(2 * agents());
  for (int thread = 0; thread < threads; ++thread) common[thread] = clocks[thread]++;
  ++epoch;
}

void order_warp(int warp, unsigned mask) {
  Clocks all;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) join(all, release(32 * warp + l));
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) known[32 * warp + l] = all;
}

Clocks release(int thread) {
  Clocks mine = known[thread];
  mine.resize(2 * agents());
  mine[thread] = clocks[thread]++;
  return mine;
}

Clocks release_copies(int thread, Access kind) {
  Clocks twin(2 * agents());
  const size_t agent = thread + (kind == Access::bulk ? 2 : 1) * threads;
  twin[agent] = clocks[agent]++;
  if (kind == Access::bulk) twin[agents() + agent] = twin[agent];
  return twin;
}

void acquire(int thread, const Clocks& clocks) { join(known[thread], clocks); }

void fence_proxy(int thread) {
  Clocks& mine = known[thread];
  mine.resize(2 * agents());
  for (size_t agent = 0; agent < agents(); ++agent)
    mine[agents() + agent] = std::max({mine[agents() + agent], mine[agent], in_common(agent)});
  mine[agents() + thread] = clocks[thread]++;
}

Clocks all_lanes_know(int warp) {
  Clocks all(2 * agents(), ~0u);
  for (int thread = 32 * warp; thread < 32 * warp + 32; ++thread) {
    Clocks& mine = known[thread];
    mine.resize(all.size());
    const uint32_t own = mine[thread];
    mine[thread] = clocks[thread];
    for (size_t i = 0; i < all.size(); ++i) all[i] = std::min(all[i], mine[i]);
    mine[thread] = own;
  }
  join(all, common);
  return all;
}

void read_by_wgmma(int warp, const Clocks& knows, uint32_t offset, size_t bytes) {
  if (is_dynamic(offset) && (offset < dynamic || offset + bytes > dynamic + dynamic_bytes))
    fail("wgmma reads %zu bytes at offset %td of %zu bytes of dynamic shared memory", bytes, Place(offset).offset,
         dynamic_bytes);
  if (offset + bytes > end) fail("access beyond all shared memory at offset %u", offset);
  const uint16_t agent = 3 * threads + warp;
  const Record now{epoch, clocks[agent], agent, false};
  for (uint32_t at = offset; at < offset + bytes; ++at) {
    Cell& cell = cells[at];
    const Record& write = cell.write;
    const Place place(at);
    if (write.epoch < first_epoch)
      fail("wgmma reads %s shared memory at offset %td, which nothing in this block has written", place.part,
           place.offset);
    const bool copied = write.agent >= threads;
    if (knows[write.agent] < write.clock)
      fail(
          "race on %s shared memory at offset %td: wgmma of warp %d reads what %sthread %d %s, and nothing orders them",
          place.part, place.offset, warp, copied ? "an asynchronous copy of " : "", write.agent % threads,
          copied ? "writes" : "wrote");
    if (knows[agents() + write.agent] < write.clock)
      fail("%s shared memory at offset %td: wgmma of warp %d reads what %sthread %d wrote, without fence.proxy.async",
           place.part, place.offset, warp, copied ? "cp.async of " : "", write.agent % threads);
    Record* slot = &cell.reads[random_below(2)];
    for (Record& read : cell.reads)
      if (read.agent == agent || ordered(read, 32 * warp)) slot = &read;
    *slot = now;
  }
}

Clocks release_wgmma(int warp) {
  Clocks twin(2 * agents());
  const size_t agent = 3 * threads + warp;
  twin[agent] = clocks[agent]++;
  return twin;
}

}  // namespace shadow
}  // namespace cuda_emulator
