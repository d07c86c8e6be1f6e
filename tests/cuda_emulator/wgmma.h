// Products of warp groups, asynchronous ones: wgmma, its fence and its groups, and the registers these are about.
//
// What a product reads from shared memory is read as it is issued, and shadow.h finds who changes it before the product
// is known to be over. Its sums come to registers no sooner than wait_group says so: until then they are poison, and an
// access that the compiler has instrumented is an error, as is a change of its first operand's registers. Registers are
// variables here whose address has been given to a function of include/hopper.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_emulator::wgmma {

struct Product {  // d = a * b, or += if add; m64nNk16
  float* d;
  int n;
  const uint32_t* registers;  // of a; null: it is in shared memory
  uint64_t a, b;              // descriptors
  bool a_across, b_across;    // rows run across k: imm-trans
  bool add;
  float (*widen)(uint16_t);
};

void start_block(int threads);
void end_block();

void fence();
void multiply(const Product& product);
void commit();
void wait(int left);  // until no more than so many groups are in flight
void fence_proxy();
void set_registers(int count);

inline bool watched = false;  // this block has come to a fence
void touch_register(const void* address, size_t bytes, bool writes);

}  // namespace cuda_emulator::wgmma
