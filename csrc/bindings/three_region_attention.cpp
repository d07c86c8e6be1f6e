#include "../cpu/three_region_attention.h"

#include "attention.h"

namespace cogview {
namespace {

// Checks what guards memory; the messages users see come from Python.
ThreeRegionArgs describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots, int64_t block_size,
                         int64_t window_blocks, double pivot_bias, double scale) {
  ThreeRegionArgs a{};
  a.dtype = dtype_of(q, "query");
  check_attention_tensor(q, "query", a.dtype);
  a.batch = q.size(0), a.heads = q.size(1), a.seqlen_q = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = k.size(1), a.seqlen_k = k.size(2), a.num_pivots = pivots.size(1);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "key: heads do not divide query's");
  STD_TORCH_CHECK(pivots.dim() == 2 && pivots.size(0) == a.batch, "pivots: shape does not match");
  STD_TORCH_CHECK(block_size >= 1 && window_blocks >= 1, "block_size and window_blocks: expected at least 1");
  // beyond the sequence they change nothing, and products of them stay in range
  a.block_size = std::min(block_size, a.seqlen_k + 1), a.window_blocks = std::min(window_blocks, a.seqlen_k + 1);
  a.pivot_bias = pivot_bias, a.scale = scale;
  a.q = view(q);
  a.k = key_view(k, "key", q, a.kv_heads, -1);
  a.v = key_view(v, "value", q, a.kv_heads, a.seqlen_k);
  a.pivots = indices(pivots, "pivots");
  a.query_group = group_size(a.query_tiles(), a.batch * a.heads, 16, 4 * num_threads());
  return a;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in,
                               int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  const Tensor pivots = torch::stable::contiguous(pivots_in);
  Tensor out = empty_rows(q), lse = stat_like(q), owner;
  if (q.numel() == 0) return {out, lse};
  ThreeRegionArgs a = describe(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale);
  STD_TORCH_CHECK(a.seqlen_q == a.seqlen_k, "key: expected as many tokens as query");
  a.out = view(out), a.lse = lse.mutable_data_ptr();
  a.scratch = scratch(q, a.dtype, a.head_dim, &owner);
  run_items(COGVIEW_PICK(three_region_fwd), a, a.batch * a.heads * groups(a.query_tiles(), a.query_group));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const std::optional<Tensor>& dout_in, const std::optional<Tensor>& dlse_in,
                                       const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                       const Tensor& lse_in, const Tensor& pivots_in, int64_t block_size,
                                       int64_t window_blocks, double pivot_bias, double scale) {
  Tensor dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  if (q.numel() == 0) {
    torch::stable::zero_(dk), torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  const Tensor pivots = torch::stable::contiguous(pivots_in), lse = torch::stable::contiguous(lse_in);
  const Tensor dout = readable(dout_in, out);
  ThreeRegionArgs a = describe(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale);
  STD_TORCH_CHECK(a.seqlen_q == a.seqlen_k, "key: expected as many tokens as query");
  check_same_shape(out, q, "out");
  a.out = key_view(out, "out", q, a.heads, a.seqlen_q);
  a.dout = key_view(dout, "dout", q, a.heads, a.seqlen_q);
  a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  Tensor delta = stat_like(q), dlse = delta, owner;
  a.lse = stat_view(lse, delta, "lse"), a.delta = delta.mutable_data_ptr();
  if (dlse_in) {
    dlse = torch::stable::contiguous(*dlse_in);
    a.dlse = stat_view(dlse, delta, "dlse");
  }
  const int64_t pairs = a.batch * a.kv_heads, enough = 32;  // items for the threads of most machines
  a.key_group = group_size(a.key_tiles(), pairs, 4, enough);
  // their parts take less memory than query, key and value
  a.pivot_chunks = std::clamp<int64_t>(enough / pairs, 1, std::max<int64_t>(1, a.seqlen_q / (2 * a.num_pivots + 1)));
  // groups of one color are so far apart that no query has two of them in its window
  a.colors = 1 + groups(std::min(a.block_size * a.window_blocks, a.seqlen_k), a.key_group * kTile);
  const std::vector<int64_t> parts{a.batch, a.kv_heads, a.pivot_chunks, a.num_pivots, a.head_dim};
  Tensor pivot_dk = torch::stable::new_empty(q, parts, stat_type(q)), pivot_dv = torch::stable::empty_like(pivot_dk);
  a.pivot_dk = pivot_dk.mutable_data_ptr(), a.pivot_dv = pivot_dv.mutable_data_ptr();
  const int64_t tiles = a.batch * a.heads * a.query_tiles();
  Tensor dq_sums = byte_buffer(q, tiles * a.dq_tile_size() * (a.dtype == Dtype::f64 ? 8 : 4) + 64);
  a.dq_sums = aligned(dq_sums);
  a.scratch = scratch(q, a.dtype, a.head_dim, &owner);
  run_items(COGVIEW_PICK(three_region_prepare), a, tiles);
  if (a.num_pivots > 0) run_items(COGVIEW_PICK(three_region_grad_pivot), a, pairs * a.pivot_chunks);
  const int64_t key_groups = groups(a.key_tiles(), a.key_group);
  for (a.color = 0; a.color < a.colors && a.color < key_groups; ++a.color)
    run_items(COGVIEW_PICK(three_region_grad_key), a, pairs * groups(key_groups - a.color, a.colors));
  run_items(COGVIEW_PICK(three_region_finish), a, tiles);
  return {dq, dk, dv};
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pivots_in, const Tensor& seqlens_in,
              int64_t block_size, int64_t window_blocks, double pivot_bias, double scale) {
  Tensor out = empty_rows(q), owner;
  if (q.numel() == 0) return out;
  const Tensor pivots = torch::stable::contiguous(pivots_in), seqlens = torch::stable::contiguous(seqlens_in);
  ThreeRegionArgs a = describe(q, k, v, pivots, block_size, window_blocks, pivot_bias, scale);
  STD_TORCH_CHECK(a.seqlen_q <= a.seqlen_k, "query: more tokens than the cache holds");
  STD_TORCH_CHECK(seqlens.dim() == 1 && seqlens.size(0) == a.batch, "cache_seqlens: shape does not match");
  a.cache_seqlens = indices(seqlens, "cache_seqlens");
  a.out = view(out);
  a.scratch = scratch(q, a.dtype, a.head_dim, &owner);
  const int64_t group = a.heads / a.kv_heads;
  if (a.seqlen_q > kTile) {  // a prompt: as the forward
    run_items(COGVIEW_PICK(three_region_fwd), a, a.batch * a.heads * groups(a.query_tiles(), a.query_group));
  } else {
    // heads that share keys together, but enough items for all threads
    const int64_t parts = groups(num_threads(), a.batch * a.kv_heads);
    a.decode_heads = std::clamp<int64_t>(group / parts, 1, kTile / a.seqlen_q);
    run_items(COGVIEW_PICK(three_region_decode), a, a.batch * a.kv_heads * groups(group, a.decode_heads));
  }
  return out;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("three_region_attention_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("three_region_attention_bwd", TORCH_BOX(&cogview::bwd));
  m.impl("three_region_attention_decode", TORCH_BOX(&cogview::decode));
}
