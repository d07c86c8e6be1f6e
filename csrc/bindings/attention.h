// What the attention bindings share: tensors as the kernels see them. Checks guard memory; the messages that users see
// come from Python.
#pragma once

#include "../attention.h"
#include "common.h"
#include "host.h"

namespace cogview {

inline void check_attention_tensor(const Tensor& x, const char* name, Dtype dtype) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions, got ", x.dim());
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, ": expected query's dtype");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1, name, ": expected a contiguous last dimension");
}

inline Tensor4 view(const Tensor& x) {
  Tensor4 v;
  v.data = const_cast<void*>(x.const_data_ptr());
  for (int d = 0; d < 3 && d < x.dim(); ++d) v.stride[d] = x.stride(d);  // the gradient of nothing has one dimension
  return v;
}

// Keys or values: query's dtype and batch, heads that divide query's, `tokens` rows (-1: any).
inline Tensor4 key_view(const Tensor& x, const char* name, const Tensor& q, int64_t kv_heads, int64_t tokens) {
  check_attention_tensor(x, name, dtype_of(q, "query"));
  STD_TORCH_CHECK(
      x.size(0) == q.size(0) && x.size(1) == kv_heads && x.size(3) == q.size(3) && (tokens < 0 || x.size(2) == tokens),
      name, ": shape does not match");
  return view(x);
}

inline Indices indices(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, name, ": expected int32 or int64");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor");
  return {x.const_data_ptr(), type == ScalarType::Long};
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(as_contiguous(*x)) : std::nullopt;
}

// dout as a kernel can read it: with a contiguous last dimension, zeros if only lse has a gradient.
inline Tensor readable(const std::optional<Tensor>& dout, const Tensor& out) {
  if (!dout) {
    Tensor zeros = torch::stable::empty_like(out);
    return torch::stable::zero_(zeros);
  }
  check_same_shape(*dout, out, "dout");
  return dout->stride(3) == 1 || dout->size(3) <= 1 ? *dout : as_contiguous(*dout);
}

// [B, H, S] of statistics: lse or its gradient, contiguous, as `like` is.
inline void* stat_view(const Tensor& x, const Tensor& like, const char* name) {
  check_same_shape(x, like, name);
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.is_contiguous(), name, ": dtype or layout does not match");
  return const_cast<void*>(x.const_data_ptr());
}
inline Tensor stat_like(const Tensor& q) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, stat_type(q));
}

// What every attention is told: query, key and value; the outputs come later. `tokens` of key and value, -1: any.
inline void describe(Attention* a, const Tensor& q, int64_t kv_heads, double scale) {
  a->dtype = dtype_of(q, "query");
  check_attention_tensor(q, "query", a->dtype);
  a->batch = q.size(0), a->heads = q.size(1), a->seqlen_q = q.size(2), a->head_dim = q.size(3);
  a->kv_heads = kv_heads, a->scale = scale;
  STD_TORCH_CHECK(a->kv_heads > 0 && a->heads % a->kv_heads == 0, "key: heads do not divide query's");
  a->q = view(q);
}
inline void describe(Attention* a, const Tensor& q, const Tensor& k, const Tensor& v, int64_t tokens, double scale) {
  check_attention_tensor(k, "key", dtype_of(q, "query"));
  describe(a, q, k.size(1), scale);
  a->k = key_view(k, "key", q, a->kv_heads, tokens);
  a->v = key_view(v, "value", q, a->kv_heads, k.size(2));
}

// The rest of a backward; the tensors have to stay.
inline void describe_backward(Attention* a, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& dout,
                              const Tensor* dlse, Tensor& dq, Tensor& dk, Tensor& dv) {
  const Tensor like = stat_like(q);
  a->out = key_view(out, "out", q, a->heads, a->seqlen_q), a->dout = key_view(dout, "dout", q, a->heads, a->seqlen_q);
  a->lse = stat_view(lse, like, "lse"), a->dlse = dlse ? stat_view(*dlse, like, "dlse") : nullptr;
  a->dq = view(dq), a->dk = view(dk), a->dv = view(dv);
}

// Where the new tokens, `least` of them, of each sample end in a cache of keys.
inline Tensor checked_seqlens(const Tensor& x, const Tensor& q, const Tensor& k, int64_t least) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && x.dim() == 1 && x.size(0) == q.size(0),
                  "cache_seqlens: shape does not match");
  const Tensor seqlens = as_contiguous(x);
  const Indices in = indices(seqlens, "cache_seqlens");
  for (int64_t b = 0; b < seqlens.size(0); ++b) {
    STD_TORCH_CHECK(in[b] >= least && in[b] <= k.size(2), "cache_seqlens: expected all query tokens in the cache");
  }
  return seqlens;
}

// The rest of a decode.
inline void describe_decode(Attention* a, const Tensor& seqlens, const Tensor& out) {
  a->cache_seqlens = indices(seqlens, "cache_seqlens"), a->out = view(out);
}

}  // namespace cogview
