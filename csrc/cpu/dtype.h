// The dtypes every kernel takes. Shared by kernels and bindings.
#pragma once

namespace cogview {
enum class Dtype { f64, f32, bf16, f16 };
}
