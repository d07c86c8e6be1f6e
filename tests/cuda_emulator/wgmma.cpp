#include "wgmma.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "../../csrc/cuda/matrix_descriptor.h"
#include "block.h"
#include "fibers.h"
#include "shadow.h"

namespace cuda_emulator::wgmma {
namespace {

using cogview::cuda::Swizzle;

constexpr uint32_t kPoison = 0x7FFADEAD;  // a NaN
constexpr size_t kWords = Stacks::kBytes / 4;

struct Sums {  // in flight, of a thread
  float* to;
  int count;
  long group;  // of the last product that adds to them
  std::vector<float> values;
};

struct Operand {
  const uint32_t* begin;
  long group;
};

struct Word {
  uint32_t written, read;  // when last, by ordinary instructions
};

struct ThreadState {
  uint32_t fenced = 0;
  std::vector<Sums> sums;
  std::vector<Operand> operands;
};

struct WarpState {
  long group = 0, retired = 0;  // the one that products join; groups before this one are over
  bool open = false;            // it has products
  std::deque<Clocks> over;      // of groups from `retired` on: what is known then
  size_t issued = 0;
};

struct Issued {  // by the first warp of a group of four that got there
  int n;
  uint64_t a, b;
  bool registers, add;
};

std::vector<ThreadState> threads;
std::vector<WarpState> warps;
std::vector<std::vector<Issued>> groups;
uint32_t now = 1;
std::unique_ptr<Word[]> words;  // of each thread's stack; a variable is found by its address modulo a stack's size

Word& word(int thread, const void* address) {
  return words[thread * kWords + reinterpret_cast<uintptr_t>(address) / 4 % kWords];
}

bool overlap(const void* a, size_t bytes, const void* b, size_t others) {
  const auto x = reinterpret_cast<uintptr_t>(a), y = reinterpret_cast<uintptr_t>(b);
  return x < y + others && y < x + bytes;
}

void check_fenced(int thread, const void* registers, int count, bool overwritten, const char* what) {
  for (int i = 0; i < count; ++i) {
    const Word& seen = word(thread, static_cast<const uint32_t*>(registers) + i);
    const bool wrote = seen.written >= threads[thread].fenced;
    if (wrote || (overwritten && seen.read >= threads[thread].fenced))
      fail("wgmma: lane %d has %s %s since its last wgmma.fence", thread % 32, wrote ? "written" : "read", what);
  }
}

// Where element (row, k) is that the descriptor's matrix has, k < 16.
class Matrix {
 public:
  Matrix(uint64_t descriptor, bool across)
      : start_((descriptor & 0x3FFF) << 4),
        leading_((descriptor >> 16 & 0x3FFF) << 4),
        stride_((descriptor >> 32 & 0x3FFF) << 4),
        across_(across),
        swizzle_(static_cast<Swizzle>(descriptor >> 62)) {
    if (descriptor >> 49 & 7) fail("wgmma: a descriptor's base offset is not emulated");
    if (descriptor & ~(0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 3ull << 62))
      fail("wgmma: a descriptor has bits that mean nothing");
  }
  uint32_t at(int row, int k) const {
    const uint32_t width = swizzle_ == Swizzle::k128 ? 128 : swizzle_ == Swizzle::k64 ? 64 : 32;
    uint32_t offset;
    if (swizzle_ == Swizzle::kNone) {
      const uint32_t of_k = k / 8 * leading_, of_row = row / 8 * stride_;
      offset = across_ ? of_row + row % 8 * 2 + of_k + k % 8 * 16 : of_row + row % 8 * 16 + of_k + k % 8 * 2;
    } else if (across_) {
      const int columns = width / 2;
      offset = row % columns * 2 + row / columns * leading_ + k % 8 * width + k / 8 * stride_;
    } else {
      offset = row % 8 * width + row / 8 * stride_ + k * 2;
    }
    const uint32_t at = start_ + offset, mask = swizzle_ == Swizzle::kNone ? 0 : width / 16 - 1;
    return at ^ (at >> 7 & mask) << 4;
  }

 private:
  uint32_t start_, leading_, stride_;
  bool across_;
  Swizzle swizzle_;
};

struct Reader {
  int warp;
  Clocks knows;
  // to[row * kRow + k * kK]; 8 elements that are contiguous are read together
  void read(const Matrix& from, int rows, bool across, float* to, size_t row_step, size_t k_step,
            float (*widen)(uint16_t)) const {
    for (int outer = 0; outer < (across ? 16 : rows); ++outer)
      for (int inner = 0; inner < (across ? rows : 16); inner += 8) {
        const uint32_t at = across ? from.at(inner, outer) : from.at(outer, inner);
        const char* x = shadow::address_of(at, 16, 16);
        shadow::read_by_wgmma(warp, knows, at, 16);
        uint16_t eight[8];
        memcpy(eight, x, sizeof eight);
        for (int i = 0; i < 8; ++i) {
          const int row = across ? inner + i : outer, k = across ? outer : inner + i;
          to[row * row_step + k * k_step] = widen(eight[i]);
        }
      }
  }
};

Sums* find(int thread, const float* d, int count) {
  for (Sums& sums : threads[thread].sums) {
    if (sums.to == d && sums.count == count) return &sums;
    if (overlap(sums.to, 4 * sums.count, d, 4 * count)) fail("wgmma: sums in flight have another shape");
  }
  return nullptr;
}

// By one lane for its warp.
void perform(void* const* lanes) {
  const int w = warp(), first = 32 * w;
  const Product& x = *static_cast<const Product*>(lanes[0]);
  WarpState& mine = warps[w];
  for (int l = 1; l < 32; ++l) {
    const Product& other = *static_cast<const Product*>(lanes[l]);
    if (other.n != x.n || other.a != x.a || other.b != x.b || other.add != x.add || !other.registers != !x.registers)
      fail("wgmma: lanes of a warp have different descriptors or shapes");
  }
  const Issued issue{x.n, x.a, x.b, x.registers != nullptr, x.add};
  std::vector<Issued>& group = groups[w / 4];
  if (mine.issued == group.size()) {
    group.push_back(issue);
  } else {
    const Issued& other = group[mine.issued];
    if (other.n != issue.n || other.a != issue.a || other.b != issue.b || other.registers != issue.registers ||
        other.add != issue.add)
      fail("wgmma: warps of a group have different descriptors or shapes");
  }
  ++mine.issued;
  mine.open = true;

  static float a[64][16], b[16 * 256];
  const Reader reader{w, shadow::all_lanes_know(w)};
  if (x.registers) {
    for (int l = 0; l < 32; ++l) {
      const Product& lane = *static_cast<const Product*>(lanes[l]);
      check_fenced(first + l, lane.registers, 4, false, "registers of its first operand");
      for (int q = 0; q < 4; ++q)
        for (int e = 0; e < 2; ++e)
          a[16 * (w % 4) + l / 4 + q % 2 * 8][l % 4 * 2 + q / 2 * 8 + e] =
              x.widen(uint16_t(lane.registers[q] >> 16 * e));
      threads[first + l].operands.push_back({lane.registers, mine.group});
    }
  } else {
    reader.read(Matrix(x.a, x.a_across), 64, x.a_across, a[0], 16, 1, x.widen);  // all of it, whichever rows are ours
  }
  reader.read(Matrix(x.b, x.b_across), x.n, x.b_across, b, 1, x.n, x.widen);

  static float sums[16][256];
  for (int row = 0; row < 16; ++row) {
    std::fill(sums[row], sums[row] + x.n, 0.0f);
    for (int k = 0; k < 16; ++k) {
      const float factor = a[16 * (w % 4) + row][k];
      for (int column = 0; column < x.n; ++column) sums[row][column] += factor * b[k * x.n + column];
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* d = static_cast<const Product*>(lanes[l])->d;
    const int count = x.n / 2;
    Sums* to = find(first + l, d, count);
    if (!to) {
      check_fenced(first + l, d, count, true, "registers of its sums");
      threads[first + l].sums.push_back({d, count, 0, std::vector<float>(d, d + count)});
      to = &threads[first + l].sums.back();
      for (int i = 0; i < count; ++i) memcpy(d + i, &kPoison, 4);
    }
    to->group = mine.group;
    for (int i = 0; i < count; ++i) {
      const float sum = sums[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2];
      to->values[i] = x.add ? to->values[i] + sum : sum;
    }
  }
}

void retire(int w) {
  WarpState& mine = warps[w];
  for (int thread = 32 * w; thread < 32 * w + 32; ++thread) {
    ThreadState& state = threads[thread];
    shadow::acquire(thread, mine.over.front());
    auto& sums = state.sums;
    for (size_t i = sums.size(); i-- > 0;) {
      if (sums[i].group != mine.retired) continue;
      for (int e = 0; e < sums[i].count; ++e)
        if (memcmp(sums[i].to + e, &kPoison, 4)) fail("wgmma: lane %d has changed sums in flight", thread % 32);
      memcpy(sums[i].to, sums[i].values.data(), 4 * sums[i].count);
      sums.erase(sums.begin() + i);
    }
    auto& operands = state.operands;
    const auto over = [&](const Operand& x) { return x.group == mine.retired; };
    operands.erase(std::remove_if(operands.begin(), operands.end(), over), operands.end());
  }
  mine.over.pop_front();
  ++mine.retired;
}

}  // namespace

void start_block(int count) {
  watched = false;
  threads.assign(count, {});
  warps.assign((count + 31) / 32, {});
  groups.assign((count + 127) / 128, {});
}

void end_block() {
  for (const WarpState& warp : warps)
    if (warp.open || !warp.over.empty()) fail("wgmma: products are in flight at the end of the block");
}

void fence() {
  if (!words) words.reset(new Word[kMaxThreads * kWords]());
  watched = true;
  meet("wgmma.fence", ~0u, nullptr, [](unsigned, void* const*) {
    ++now;
    for (int l = 0; l < 32; ++l) threads[32 * warp() + l].fenced = now;
  });
}

void multiply(const Product& product) {
  if (block.size % 128) fail("wgmma: a block of %d threads", block.size);
  if (!threads[block.current].fenced) fail("wgmma: lane %d has come to no wgmma.fence", lane());
  Product mine = product;
  meet("wgmma", ~0u, &mine, [](unsigned, void* const* lanes) { perform(lanes); });
}

void commit() {
  meet("wgmma.commit_group", ~0u, nullptr, [](unsigned, void* const*) {
    WarpState& mine = warps[warp()];
    mine.over.push_back(shadow::release_wgmma(warp()));
    ++mine.group, mine.open = false;
  });
}

void wait(int left) {
  meet("wgmma.wait_group", ~0u, &left, [](unsigned, void* const* lanes) {
    const int left = *static_cast<const int*>(lanes[0]);
    for (int l = 1; l < 32; ++l)
      if (*static_cast<const int*>(lanes[l]) != left) fail("wgmma.wait_group: lanes wait for different groups");
    while (static_cast<int>(warps[warp()].over.size()) > left) retire(warp());
  });
}

void fence_proxy() { shadow::fence_proxy(block.current); }

void set_registers(int count) {
  if (count < 24 || count > 256 || count % 8) fail("setmaxnreg: %d registers", count);
  meet("setmaxnreg", ~0u, nullptr, [](unsigned, void* const*) {});
}

void touch_register(const void* address, size_t bytes, bool writes) {
  const int thread = block.current;
  const ptrdiff_t above = static_cast<const char*>(address) - static_cast<char*>(__builtin_frame_address(0));
  if (above < 0 || static_cast<size_t>(above) >= Stacks::kBytes) return;  // not this fiber's stack
  ThreadState& mine = threads[thread];
  for (const Sums& sums : mine.sums)
    if (overlap(sums.to, 4 * sums.count, address, bytes))
      fail("wgmma: lane %d %s sums before wait_group", thread % 32, writes ? "writes" : "reads");
  if (writes)
    for (const Operand& x : mine.operands)
      if (overlap(x.begin, 16, address, bytes))
        fail("wgmma: lane %d writes registers of a first operand before wait_group", thread % 32);
  for (size_t i = 0; i < (bytes + 3) / 4; ++i) {
    Word& seen = word(thread, static_cast<const char*>(address) + 4 * i);
    (writes ? seen.written : seen.read) = now;
  }
}

}  // namespace cuda_emulator::wgmma
