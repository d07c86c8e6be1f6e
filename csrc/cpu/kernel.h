// How a kernel of the attention operators is exported. Included by kernel files only.
#pragma once

#include "tile_unit.h"
#include "vec.h"

// Defines the exported kernel `name`: items [begin, end), each by `function` of the tensors' dtype T, for the dtypes
// that it `runs` for; no plan has another.
#define COGVIEW_KERNEL(name, Plan, function, runs)                                    \
  void name(const Plan& plan, int64_t begin, int64_t end, int slot) {                 \
    [[maybe_unused]] AmxScope amx;                                                    \
    char* scratch = plan.scratch.of(slot);                                            \
    by_dtype(plan.problem.dtype, [&](auto x) {                                        \
      using T = decltype(x);                                                          \
      if constexpr (runs)                                                             \
        for (int64_t item = begin; item < end; ++item) function(plan, item, scratch); \
      else                                                                            \
        __builtin_trap();                                                             \
    });                                                                               \
  }
