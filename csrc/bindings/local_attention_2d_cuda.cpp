#include "../cuda/local_attention_2d.h"

#include <cstdlib>

#include "../cuda/local_choices.h"
#include "attention_cuda.h"
#include "local_attention_2d.h"

namespace cogview {
namespace {

constexpr char kStrips[] = "COGVIEW_OPS_STRIPS";  // what `python -m benchmarks.sweep` tries

cuda::StripChoices strips() {
  const char* text = std::getenv(kStrips);
  cuda::StripChoices choices;
  STD_TORCH_CHECK(cuda::read_choices(text, &choices), kStrips,
                  ": expected numbers of groups and blocks of some passes, and of rows at once of the forward, as in "
                  "forward=3,8,1;grad_query=3;grad_key=2,7, got ",
                  text);
  return choices;
}

void check_fits(const LocalAttention& a, cuda::Pass pass, const char* name, const cuda::StripChoice& choice) {
  if (choice.any())
    STD_TORCH_CHECK(cuda::local_takes(a, pass, choice), kStrips, ": ", name, "=", choice.groups, ",", choice.blocks,
                    ",", choice.unit_rows, " does not fit this call on this device");
}

struct CudaCall : CudaAttention {
  static void check_options(const LocalAttention& a) {
    STD_TORCH_CHECK(!a.window.kernel.h || (a.window.kernel.h % 2 && a.window.kernel.w % 2),
                    "kernel_size: expected odd sizes");
    STD_TORCH_CHECK(!a.coarse.grid.h || (a.coarse.kernel.h % 2 && a.coarse.kernel.w % 2),
                    "coarse_kernel_size: expected odd sizes");
  }
  static void forward(const LocalAttention& a, const Tensor& q) {
    const cuda::StripChoice choice = strips().forward;
    run_cuda(q, [&](cudaStream_t stream) {
      check_fits(a, cuda::Pass::forward, "forward", choice);
      return cuda::local_fwd(a, choice, stream);
    });
  }
  static void backward(const LocalAttention& a, const Tensor& q) {
    const cuda::StripChoices choices = strips();
    int64_t bytes = 0;
    run_cuda(q, [&](cudaStream_t) {
      check_fits(a, cuda::Pass::grad_query, "grad_query", choices.grad_query);
      check_fits(a, cuda::Pass::grad_key, "grad_key", choices.grad_key);
      return cuda::local_bwd_scratch(a, &bytes);
    });
    const Tensor scratch = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
    run_cuda(q, [&](cudaStream_t stream) { return cuda::local_bwd(a, scratch.mutable_data_ptr(), choices, stream); });
  }
};

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(COGVIEW_OPS_NAMESPACE, CUDA, m) {
  m.impl("local_attention_2d_fwd", TORCH_BOX(&cogview::local_attention_2d_fwd<cogview::CudaCall>));
  m.impl("local_attention_2d_bwd", TORCH_BOX(&cogview::local_attention_2d_bwd<cogview::CudaCall>));
}
