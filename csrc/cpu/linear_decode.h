// Products of few rows with a weight on CPU.
#pragma once

#include "../linear_decode.h"
#include "isa.h"

namespace cogview {

struct LinearPlan : LinearArgs {
  void* packed;          // rows of x as they are multiplied, or x itself
  int64_t packed_bytes;  // of a row
  int64_t group_bytes;   // of a group of rows on the tile unit
};
constexpr int kRows = 16;     // of a group
constexpr int kOutputs = 16;  // of a work item
constexpr int kLongest = 32;  // elements of the longest vector, to a multiple of which rows are padded

struct Host;
void linear_decode(const LinearArgs& args, const Host& host);

COGVIEW_DECLARE_KERNEL(linear_decode_pack, LinearPlan)      // items are groups
COGVIEW_DECLARE_KERNEL(linear_decode_products, LinearPlan)  // items are kOutputs outputs

}  // namespace cogview
