// What the attention bindings share: tensors as the kernels see them, and scratch.
#pragma once

#include "../cpu/attention.h"
#include "common.h"

namespace cogview {

inline void check_attention_tensor(const Tensor& x, const char* name, Dtype dtype) {
  STD_TORCH_CHECK(x.dim() == 4, name, ": expected 4 dimensions, got ", x.dim());
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, ": expected query's dtype");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1, name, ": expected a contiguous last dimension");
}

inline Tensor4 view(const Tensor& x) {
  Tensor4 v;
  v.data = const_cast<void*>(x.const_data_ptr());
  for (int d = 0; d < 3; ++d) v.stride[d] = x.stride(d);
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

// dout as a kernel can read it: with a contiguous last dimension, zeros if only lse has a gradient.
inline Tensor readable(const std::optional<Tensor>& dout, const Tensor& out) {
  if (!dout) {
    Tensor zeros = torch::stable::empty_like(out);
    return torch::stable::zero_(zeros);
  }
  check_same_shape(*dout, out, "dout");
  return dout->stride(3) == 1 || dout->size(3) <= 1 ? *dout : torch::stable::contiguous(*dout);
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

constexpr int64_t kTile = 64;  // rows of the kernels' tiles

// How many groups of `size` it takes for `count`.
inline int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

// How many of a head's tiles one work item takes: `size`, which share packed tiles, or so few that there are `enough`.
inline int64_t group_size(int64_t tiles, int64_t heads, int64_t size, int64_t enough) {
  while (size > 1 && heads * groups(tiles, size) < enough) size /= 2;
  return size;
}

inline Tensor byte_buffer(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}
// The first 64-byte-aligned address of a buffer.
inline char* aligned(const Tensor& buffer) {
  const auto at = reinterpret_cast<uintptr_t>(buffer.mutable_data_ptr());
  return reinterpret_cast<char*>((at + 63) & ~uintptr_t(63));
}

// One allocation, a 64-byte-aligned piece of so many bytes for each thread; `owner` keeps it alive.
inline Scratch scratch(const Tensor& like, int64_t bytes, Tensor* owner) {
  Scratch s;
  s.bytes = (bytes + 63) / 64 * 64;
  *owner = byte_buffer(like, s.bytes * num_threads() + 64);
  s.data = aligned(*owner);
  return s;
}
inline Scratch scratch(const Tensor& like, Dtype dtype, int64_t head_dim, Tensor* owner) {
  return scratch(like, COGVIEW_PICK(tile_scratch)(dtype, head_dim), owner);
}

}  // namespace cogview
