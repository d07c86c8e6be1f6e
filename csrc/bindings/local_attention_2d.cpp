#include "attention.h"
#include "patches.h"

namespace cogview {
namespace {

using Optional = std::optional<Tensor>;

// The schema's arguments after query, key and value, as they come.
struct Sets {
  const Optional &prefix_k, &prefix_v, &coarse_k, &coarse_v, &prefix_mask;
};
struct Options {
  const std::vector<int64_t>&grid, &kernel, &dilation;
  bool raster_causal, shift;
  double prefix_bias;
  const std::vector<int64_t>&coarse_grid, &coarse_kernel;
  double coarse_bias, scale;
};

Grid pair(const std::vector<int64_t>& x, const char* name) {
  STD_TORCH_CHECK(x.size() == 2, name, ": expected two ints");
  return {x[0], x[1]};
}

// A window that sees the whole grid from every cell is as good as any larger one.
Grid whole_at_most(Grid window, Grid grid) {
  return {std::min(window.h, 2 * grid.h - 1), std::min(window.w, 2 * grid.w - 1)};
}

// Checks what guards memory; the messages users see come from Python.
LocalArgs describe(const Tensor& q, const Tensor& k, const Tensor& v, const Sets& s, const Options& o) {
  LocalArgs a{};
  a.dtype = dtype_of(q, "query");
  check_attention_tensor(q, "query", a.dtype);
  a.batch = q.size(0), a.heads = q.size(1), a.seqlen_q = q.size(2), a.head_dim = q.size(3), a.kv_heads = k.size(1);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "key: heads do not divide query's");
  a.grid = pair(o.grid, "grid"), a.kernel = pair(o.kernel, "kernel_size");
  const int64_t most = k.dim() == 4 ? k.size(2) : 0;  // so that products do not overflow
  STD_TORCH_CHECK(a.grid.h > 0 && a.grid.w > 0 && a.grid.h <= most && a.grid.w <= most,
                  "grid: expected sizes from 1 to the number of keys");
  STD_TORCH_CHECK(a.kernel.h > 0 && a.kernel.h % 2 && a.kernel.w > 0 && a.kernel.w % 2,
                  "kernel_size: expected odd sizes");
  STD_TORCH_CHECK(!(o.shift && o.raster_causal), "edge: shifted windows are not raster-causal");
  const int64_t tokens = a.grid.h * a.grid.w;
  a.q = view(q), a.k = key_view(k, "key", q, a.kv_heads, tokens), a.v = key_view(v, "value", q, a.kv_heads, tokens);
  a.dilation = pair(o.dilation, "dilation"), a.shift = o.shift, a.raster_causal = o.raster_causal;
  STD_TORCH_CHECK(a.dilation.h > 0 && a.dilation.w > 0, "dilation: expected sizes above 0");
  // beyond the grid they change nothing, phases stay few and windows countable
  a.kernel = whole_at_most(a.kernel, a.grid);
  a.dilation = {a.kernel.h == 1 ? 1 : std::min(a.dilation.h, a.grid.h),
                a.kernel.w == 1 ? 1 : std::min(a.dilation.w, a.grid.w)};
  STD_TORCH_CHECK(!a.shift || (a.kernel.h <= a.grid.h / a.dilation.h && a.kernel.w <= a.grid.w / a.dilation.w),
                  "kernel_size: expected a dilated window inside the grid");
  a.prefix_bias = o.prefix_bias, a.coarse_bias = o.coarse_bias, a.scale = o.scale;
  STD_TORCH_CHECK(s.prefix_k.has_value() == s.prefix_v.has_value(), "prefix_value: expected with prefix_key");
  STD_TORCH_CHECK(s.coarse_k.has_value() == s.coarse_v.has_value(), "coarse_value: expected with coarse_key");
  if (s.prefix_k) {
    a.prefix_len = s.prefix_k->size(2);
    a.prefix_k = key_view(*s.prefix_k, "prefix_key", q, a.kv_heads, -1);
    a.prefix_v = key_view(*s.prefix_v, "prefix_value", q, a.kv_heads, a.prefix_len);
    if (s.prefix_mask) {
      const Tensor& mask = *s.prefix_mask;
      STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == a.batch &&
                          mask.size(1) == a.prefix_len && mask.is_contiguous(),
                      "prefix_mask: expected a contiguous bool [B, P]");
      a.prefix_mask = static_cast<const bool*>(mask.const_data_ptr());
    }
  }
  if (s.coarse_k) {
    a.coarse_grid = pair(o.coarse_grid, "coarse_grid"), a.coarse_kernel = pair(o.coarse_kernel, "coarse_kernel_size");
    const Grid c = a.coarse_grid;
    STD_TORCH_CHECK(c.h > 0 && c.w > 0 && a.grid.h % c.h == 0 && a.grid.w % c.w == 0,
                    "coarse_grid: does not divide grid");
    STD_TORCH_CHECK(a.coarse_kernel.h > 0 && a.coarse_kernel.w > 0, "coarse_kernel_size: expected sizes above 0");
    a.coarse_kernel = whole_at_most(a.coarse_kernel, c);
    a.coarse_k = key_view(*s.coarse_k, "coarse_key", q, a.kv_heads, c.h * c.w);
    a.coarse_v = key_view(*s.coarse_v, "coarse_value", q, a.kv_heads, c.h * c.w);
  }
  return a;
}

// Strips of queries, and work items: up to `chunks` for each head of keys, none much smaller than its windows. In the
// backward `chunks` must not depend on the threads, since it decides in which order gradients are summed up.
void plan_strips(LocalArgs& a, int64_t chunks) {
  const Phase first(a, 0);
  a.lanes.strip = choose_strip(first.y, first.x);
  const int64_t bands = std::max<int64_t>(1, first.y.queries / std::max(a.lanes.strip.h, 2 * first.y.radius));
  a.lanes.chunks = std::min(chunks, a.phases() * bands);
  a.lanes.bands = groups(a.lanes.chunks, a.phases());
}

// Patches of the queries, the keys and the coarse keys. What the backward uses of them depends on the shape alone, so
// that results do not depend on the number of threads.
void plan_patches(LocalArgs& a) {
  const Phase first(a, 0);
  const int64_t heads = a.batch * a.heads * a.phases(), pairs = a.batch * a.kv_heads, enough = 32;
  choose_patches(first.y, first.x, &a.queries, &a.keys);
  a.queries.forward = choose_group(first.grid(), a.queries, heads, 16, 4 * num_threads());
  a.keys.backward = choose_group(first.grid(), a.keys, pairs * a.phases(), 8, enough);
  if (a.coarse_grid.h) {
    choose_patches(first.coarse_y, first.coarse_x, nullptr, &a.coarse);
    a.coarse.backward = choose_group(a.coarse_grid, a.coarse, pairs, 8, enough);
  }
}

// Runs a kernel for groups of key patches, color by color.
void run_colors(void (*kernel)(const LocalArgs&, int64_t, int64_t, int), LocalArgs& a, Patches& p, Grid grid,
                int64_t heads) {
  for (p.color.h = 0; p.color.h < p.colors.h; ++p.color.h)
    for (p.color.w = 0; p.color.w < p.colors.w; ++p.color.w) {
      const Grid groups = groups_of_color(grid, p);
      run_items(kernel, a, heads * groups.h * groups.w);
    }
}

Optional contiguous(const Optional& x) { return x ? Optional(torch::stable::contiguous(*x)) : Optional(); }

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& prefix_k,
                               const Optional& prefix_v, const Optional& coarse_k, const Optional& coarse_v,
                               const Optional& prefix_mask, std::vector<int64_t> grid, std::vector<int64_t> kernel,
                               std::vector<int64_t> dilation, bool raster_causal, bool shift, double prefix_bias,
                               std::vector<int64_t> coarse_grid, std::vector<int64_t> coarse_kernel, double coarse_bias,
                               double scale) {
  Tensor out = empty_rows(q), lse = stat_like(q), owner;
  if (q.numel() == 0) return {out, lse};
  const Optional mask = contiguous(prefix_mask);
  LocalArgs a = describe(
      q, k, v, {prefix_k, prefix_v, coarse_k, coarse_v, mask},
      {grid, kernel, dilation, raster_causal, shift, prefix_bias, coarse_grid, coarse_kernel, coarse_bias, scale});
  STD_TORCH_CHECK(a.seqlen_q == a.grid.h * a.grid.w, "query: expected one token per cell");
  a.out = view(out), a.lse = lse.mutable_data_ptr();
  if (COGVIEW_PICK(local_2d_on_tiles)(a.dtype)) {
    a.scratch = scratch(q, a.dtype, a.head_dim, &owner);
    plan_patches(a);
    const Grid groups = groups_of(a.phase_grid(), a.queries, a.queries.forward);
    run_items(COGVIEW_PICK(local_tiles_fwd), a, a.batch * a.heads * a.phases() * groups.h * groups.w);
  } else {
    plan_strips(a, groups(4 * num_threads(), a.batch * a.kv_heads));
    a.scratch = scratch(q, COGVIEW_PICK(local_2d_scratch)(a, false), &owner);
    run_items(COGVIEW_PICK(local_2d_fwd), a, a.batch * a.kv_heads * a.lanes.chunks);
  }
  return {out, lse};
}

// Of the sums of the gradients of prefix and coarse keys.
int64_t shared_bytes(const LocalArgs& a) {
  const int64_t row = (a.head_dim + 31) / 32 * 32 * (a.dtype == Dtype::f64 ? 8 : 4);
  return a.batch * a.kv_heads * a.lanes.chunks * 2 * a.shared_keys() * row;
}

void backward_in_strips(LocalArgs& a, const Tensor& q) {
  const int64_t pairs = a.batch * a.kv_heads;
  // sums for the prefix and the coarse keys, of every work item, are to take about as much memory as query at most, but
  // a few items are worth more
  const int64_t most = std::max<int64_t>(4, a.seqlen_q * (a.heads / a.kv_heads) / (2 * a.shared_keys() + 1));
  plan_strips(a, std::min(groups(32, pairs), most));
  Tensor owner, sums = byte_buffer(q, shared_bytes(a) + 64);
  a.lanes.shared_sums = aligned(sums);
  a.scratch = scratch(q, COGVIEW_PICK(local_2d_scratch)(a, true), &owner);
  run_items(COGVIEW_PICK(local_2d_bwd), a, pairs * a.lanes.chunks);
  run_items(COGVIEW_PICK(local_2d_finish), a, pairs * a.shared_keys(), 64);
}

void backward_on_tiles(LocalArgs& a, const Tensor& q) {
  Tensor delta = stat_like(q), owner;
  a.delta = delta.mutable_data_ptr();
  plan_patches(a);
  const int64_t pairs = a.batch * a.kv_heads, patches = a.batch * a.heads * a.query_patches();
  // their parts take less memory than query, key and value
  a.prefix_chunks = std::clamp<int64_t>(32 / pairs, 1, std::max<int64_t>(1, a.seqlen_q / (2 * a.prefix_len + 1)));
  const std::vector<int64_t> parts{a.batch, a.kv_heads, a.prefix_chunks, a.prefix_len, a.head_dim};
  Tensor prefix_dks = torch::stable::new_empty(q, parts, stat_type(q)),
         prefix_dvs = torch::stable::empty_like(prefix_dks);
  a.prefix_dks = prefix_dks.mutable_data_ptr(), a.prefix_dvs = prefix_dvs.mutable_data_ptr();
  Tensor dq_sums = byte_buffer(q, patches * a.dq_patch_size() * (a.dtype == Dtype::f64 ? 8 : 4) + 64);
  a.dq_sums = aligned(dq_sums);
  a.scratch = scratch(q, a.dtype, a.head_dim, &owner);
  run_items(COGVIEW_PICK(local_tiles_prepare), a, patches);
  if (a.prefix_len > 0) {
    run_items(COGVIEW_PICK(local_tiles_grad_prefix), a, pairs * a.prefix_chunks);
    run_items(COGVIEW_PICK(local_tiles_finish_prefix), a, pairs * a.prefix_tiles());
  }
  if (a.coarse_grid.h) {
    a.coarse.colors = choose_colors(a, a.coarse, true);
    run_colors(COGVIEW_PICK(local_tiles_grad_coarse), a, a.coarse, a.coarse_grid, pairs);
  }
  a.keys.colors = choose_colors(a, a.keys, false);
  run_colors(COGVIEW_PICK(local_tiles_grad_key), a, a.keys, a.phase_grid(), pairs * a.phases());
  run_items(COGVIEW_PICK(local_tiles_finish), a, patches);
}

Tensor grad_like(const Optional& x, const Tensor& q) { return x ? empty_rows(*x) : torch::stable::new_empty(q, {0}); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    const Optional& dout_in, const Optional& dlse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Optional& prefix_k, const Optional& prefix_v, const Optional& coarse_k, const Optional& coarse_v,
    const Optional& prefix_mask, const Tensor& out, const Tensor& lse_in, std::vector<int64_t> grid,
    std::vector<int64_t> kernel, std::vector<int64_t> dilation, bool raster_causal, bool shift, double prefix_bias,
    std::vector<int64_t> coarse_grid, std::vector<int64_t> coarse_kernel, double coarse_bias, double scale) {
  Tensor dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  Tensor prefix_dk = grad_like(prefix_k, q), prefix_dv = grad_like(prefix_v, q);
  Tensor coarse_dk = grad_like(coarse_k, q), coarse_dv = grad_like(coarse_v, q);
  if (q.numel() == 0) {
    for (Tensor* g : {&dk, &dv, &prefix_dk, &prefix_dv, &coarse_dk, &coarse_dv}) torch::stable::zero_(*g);
    return {dq, dk, dv, prefix_dk, prefix_dv, coarse_dk, coarse_dv};
  }
  const Optional mask = contiguous(prefix_mask);
  const Tensor lse = torch::stable::contiguous(lse_in), dout = readable(dout_in, out);
  LocalArgs a = describe(
      q, k, v, {prefix_k, prefix_v, coarse_k, coarse_v, mask},
      {grid, kernel, dilation, raster_causal, shift, prefix_bias, coarse_grid, coarse_kernel, coarse_bias, scale});
  STD_TORCH_CHECK(a.seqlen_q == a.grid.h * a.grid.w, "query: expected one token per cell");
  a.out = key_view(out, "out", q, a.heads, a.seqlen_q), a.dout = key_view(dout, "dout", q, a.heads, a.seqlen_q);
  a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  if (prefix_k) a.prefix_dk = view(prefix_dk), a.prefix_dv = view(prefix_dv);
  if (coarse_k) a.coarse_dk = view(coarse_dk), a.coarse_dv = view(coarse_dv);
  const Tensor like = stat_like(q), dlse = dlse_in ? torch::stable::contiguous(*dlse_in) : like;
  a.lse = stat_view(lse, like, "lse"), a.dlse = dlse_in ? stat_view(dlse, like, "dlse") : nullptr;
  (COGVIEW_PICK(local_2d_on_tiles)(a.dtype) ? backward_on_tiles : backward_in_strips)(a, q);
  return {dq, dk, dv, prefix_dk, prefix_dv, coarse_dk, coarse_dv};
}

Tensor decode(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& prefix_k, const Optional& prefix_v,
              const Optional& coarse_k, const Optional& coarse_v, const Optional& prefix_mask, const Tensor& seqlens_in,
              std::vector<int64_t> grid, std::vector<int64_t> kernel, std::vector<int64_t> dilation, double prefix_bias,
              std::vector<int64_t> coarse_grid, std::vector<int64_t> coarse_kernel, double coarse_bias, double scale) {
  Tensor out = empty_rows(q), owner;
  if (q.numel() == 0) return out;
  const Optional mask = contiguous(prefix_mask);
  const Tensor seqlens = torch::stable::contiguous(seqlens_in);
  LocalArgs a =
      describe(q, k, v, {prefix_k, prefix_v, coarse_k, coarse_v, mask},
               {grid, kernel, dilation, true, false, prefix_bias, coarse_grid, coarse_kernel, coarse_bias, scale});
  STD_TORCH_CHECK(a.seqlen_q <= a.grid.h * a.grid.w, "query: more tokens than the grid has cells");
  STD_TORCH_CHECK(seqlens.dim() == 1 && seqlens.size(0) == a.batch, "cache_seqlens: shape does not match");
  a.cache_seqlens = indices(seqlens, "cache_seqlens");
  a.out = view(out);
  a.scratch = scratch(q, a.dtype, a.head_dim, &owner);
  const int64_t group = a.heads / a.kv_heads, items = a.batch * a.kv_heads * a.seqlen_q;
  // heads that share keys together, but enough items for all threads
  a.decode_heads = std::clamp<int64_t>(group / groups(num_threads(), items), 1, 8);
  run_items(COGVIEW_PICK(local_2d_decode), a, items * groups(group, a.decode_heads));
  return out;
}

}  // namespace
}  // namespace cogview

STABLE_TORCH_LIBRARY_IMPL(cogview_ops, CPU, m) {
  m.impl("local_attention_2d_fwd", TORCH_BOX(&cogview::fwd));
  m.impl("local_attention_2d_bwd", TORCH_BOX(&cogview::bwd));
  m.impl("local_attention_2d_decode", TORCH_BOX(&cogview::decode));
}
