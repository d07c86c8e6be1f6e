// The dtypes every kernel takes.
#pragma once

#include <cstdint>

#include "inline.h"

namespace cogview {

enum class Dtype { f64, f32, bf16, f16 };

// Of a statistic or a sum: double for double, else float.
COGVIEW_INLINE constexpr int64_t accumulator_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

}  // namespace cogview
