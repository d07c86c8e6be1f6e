// What the bindings of three-region attention share: its description, and its tensors around a device's kernels.
#pragma once

#include "../three_region_attention.h"
#include "attention.h"

namespace cogview {

// All arguments but query, key and value; cu_seqlens is null where sequences are a batch.
struct ThreeRegionOptions {
  const Tensor& pivots;
  const Tensor* cu_seqlens;
  int64_t max_seqlen, block_size, window_blocks;
  double pivot_bias, scale;
};

// Contiguous, of the shape that kernels count on; what they hold is for the device to look at, or not.
inline Tensor shaped_pivots(const Tensor& x, const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && x.dim() == 2 && x.size(0) == q.size(0),
                  "pivots: shape does not match");
  return as_contiguous(x);
}
inline Tensor shaped_packed_pivots(const Tensor& x, const Tensor& cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) + 1 == cu_seqlens.size(0), "pivots: shape does not match");
  return as_contiguous(x);
}
inline Tensor shaped_cu_seqlens(const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(q.dim() == 3 && x.dim() == 1 && x.size(0) >= 1, "cu_seqlens: shape does not match");
  return as_contiguous(x);
}

inline ThreeRegionAttention describe(const Tensor& q, const Tensor& k, const Tensor& v, const ThreeRegionOptions& how) {
  ThreeRegionAttention a{};
  describe(&a, q, k, v, -1, how.scale, how.cu_seqlens ? 3 : 4);
  a.seqlen_k = sizes_of(k).tokens, a.pivot_bias = how.pivot_bias;
  STD_TORCH_CHECK(how.block_size >= 1 && how.window_blocks >= 1, "block_size and window_blocks: expected at least 1");
  // beyond the sequence they change nothing, and products of them stay in range
  a.block_size = std::min(how.block_size, a.seqlen_k + 1),
  a.window_blocks = std::min(how.window_blocks, a.seqlen_k + 1);
  a.sequences = how.pivots.size(0), a.num_pivots = how.pivots.size(1);
  a.pivots = indices(how.pivots, "pivots");
  a.max_seqlen = how.max_seqlen;
  if (how.cu_seqlens) a.cu_seqlens = indices(*how.cu_seqlens, "cu_seqlens");
  return a;
}

inline void check_as_many_tokens(const ThreeRegionAttention& a) {
  STD_TORCH_CHECK(a.seqlen_q == a.seqlen_k, "key: expected as many tokens as query");
}

// run(problem) computes out and lse. Options are as the kernels can read them.
template <class Run>
std::tuple<Tensor, Tensor> three_region_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const ThreeRegionOptions& how, Run run) {
  Tensor out = empty_rows(q), lse = stat_like(q);
  if (q.numel() == 0) return {out, lse};
  ThreeRegionAttention a = describe(q, k, v, how);
  check_as_many_tokens(a);
  a.out = view(out), a.lse = lse.mutable_data_ptr();
  run(a);
  return {out, lse};
}

// run(problem) computes dq, dk and dv. Options and dout are as the kernels can read them.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> three_region_backward(const Tensor& dout, const std::optional<Tensor>& dlse_in,
                                                         const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const Tensor& out, const Tensor& lse_in,
                                                         const ThreeRegionOptions& how, Run run) {
  Tensor dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  if (q.numel() == 0) {
    torch::stable::zero_(dk), torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  const Tensor lse = as_contiguous(lse_in);
  const std::optional<Tensor> dlse = as_contiguous(dlse_in);
  ThreeRegionAttention a = describe(q, k, v, how);
  check_as_many_tokens(a);
  describe_backward(&a, q, out, lse, dout, dlse ? &*dlse : nullptr, dq, dk, dv);
  run(a);
  return {dq, dk, dv};
}

}  // namespace cogview
