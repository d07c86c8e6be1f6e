// AMX for processors that have none, slowly: preloaded, it does what its instructions would when they trap. So the
// tile kernels can be tested, not timed, wherever there is AVX512-BF16. Linux on x86-64.
//
//     c++ -O3 -shared -fPIC tests/amx_emulator.cpp -o amx.so
//     LD_PRELOAD=./amx.so COGVIEW_OPS_CPU=amx python ...    (pytest with -p no:faulthandler, which wants SIGILL too)
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <ucontext.h>

// That csrc/cpu/isa.cpp finds this symbol makes it take AMX for supported.
extern "C" void cogview_emulates_amx() {}

namespace {

struct Tile {
  uint8_t bytes[16][64];
  int rows, width;  // in bytes
};
thread_local Tile tiles[8] __attribute__((tls_model("initial-exec")));
thread_local bool configured __attribute__((tls_model("initial-exec"))) = false;

[[noreturn]] void fail(const char* what, const uint8_t* at) {
  std::fprintf(stderr, "amx_emulator: %s:", what);
  for (int i = 0; i < 12; ++i) std::fprintf(stderr, " %02x", at[i]);
  std::fprintf(stderr, "\n");
  std::abort();
}

// An instruction of VEX map 2: its opcode byte, prefix, operands, and where the next one is.
struct Instruction {
  int opcode, prefix, reg, rm, third;
  bool memory;
  uint8_t* base;
  int64_t index;
  const uint8_t* end;

  Instruction(const uint8_t* at, const greg_t* registers) {
    static constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    if (at[0] != 0xc4 || (at[1] & 31) != 2) fail("no AMX instruction", at);
    const int r = at[1] & 0x80 ? 0 : 8, x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
    prefix = at[2] & 3, third = ~(at[2] >> 3) & 15, opcode = at[3];
    const int mod = at[4] >> 6, low = at[4] & 7;
    reg = (at[4] >> 3 & 7) | r, rm = low | b, memory = mod != 3, base = nullptr, index = 0, end = at + 5;
    if (!memory) return;
    int64_t address = 0;
    const auto displacement = [&](bool wide) {
      int32_t value = int8_t(*end);
      if (wide) std::memcpy(&value, end, 4);
      end += wide ? 4 : 1;
      return value;
    };
    if (low == 4) {
      const int sib = *end++, of_index = (sib >> 3 & 7) | x;
      address = (sib & 7) == 5 && mod == 0 ? displacement(true) : registers[kOrder[(sib & 7) | b]];
      if (of_index != 4) index = registers[kOrder[of_index]] * (int64_t(1) << (sib >> 6));
    } else if (low == 5 && mod == 0) {
      address = displacement(true);
      address += reinterpret_cast<int64_t>(end);
    } else {
      address = registers[kOrder[rm]];
    }
    if (mod) address += displacement(mod == 2);
    base = reinterpret_cast<uint8_t*>(address);
  }
};

void configure(const uint8_t* p, const uint8_t* at) {
  if (p[0] != 1) fail("configuration of another palette", at);
  for (int t = 0; t < 8; ++t) {
    uint16_t width;
    std::memcpy(&width, p + 16 + 2 * t, 2);
    if (width > 64 || p[48 + t] > 16) fail("configuration out of range", at);
    tiles[t] = Tile{{}, p[48 + t], width};
  }
  configured = true;
}

float widened(const uint8_t* p) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, p, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void multiply(Tile& c, const Tile& a, const Tile& b) {
  for (int i = 0; i < c.rows; ++i) {
    float sums[16];
    std::memcpy(sums, c.bytes[i], 64);
    for (int k = 0; k < a.width / 4; ++k)
      for (int pair = 0; pair < 2; ++pair) {
        const float x = widened(a.bytes[i] + 4 * k + 2 * pair);
        for (int j = 0; j < c.width / 4; ++j) sums[j] += x * widened(b.bytes[k] + 4 * j + 2 * pair);
      }
    std::memcpy(c.bytes[i], sums, 64);
  }
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const Instruction in(at, registers);
  enum { kNone, k66, kF3, kF2 };
  if (in.opcode == 0x49 && in.prefix == kNone) {  // ldtilecfg, tilerelease
    if (in.memory)
      configure(in.base + in.index, at);
    else
      configured = false;
  } else if (!configured) {
    fail("tiles are not configured", at);
  } else if (in.opcode == 0x49 && in.prefix == kF2) {  // tilezero
    std::memset(tiles[in.reg].bytes, 0, sizeof tiles[in.reg].bytes);
  } else if (in.opcode == 0x4b && in.prefix == kF2) {  // tileloadd
    Tile& t = tiles[in.reg];
    std::memset(t.bytes, 0, sizeof t.bytes);
    for (int i = 0; i < t.rows; ++i) std::memcpy(t.bytes[i], in.base + i * in.index, size_t(t.width));
  } else if (in.opcode == 0x4b && in.prefix == kF3) {  // tilestored
    const Tile& t = tiles[in.reg];
    for (int i = 0; i < t.rows; ++i) std::memcpy(in.base + i * in.index, t.bytes[i], size_t(t.width));
  } else if (in.opcode == 0x5c && in.prefix == kF3) {  // tdpbf16ps
    Tile &c = tiles[in.reg], &a = tiles[in.rm], &b = tiles[in.third];
    if (in.reg == in.rm || in.reg == in.third || in.rm == in.third) fail("one tile twice in a product", at);
    if (a.rows != c.rows || a.width / 4 != b.rows || b.width != c.width) fail("a product of other shapes", at);
    multiply(c, a, b);
  } else {
    fail("unknown instruction", at);
  }
  registers[REG_RIP] = reinterpret_cast<greg_t>(in.end);
}

__attribute__((constructor)) void start() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
