// 2D local attention on CUDA: the calls, and what they tell the kernels.
#include "local_attention_2d.h"

#include <algorithm>

#include "launch.cuh"
#include "local_backward.cuh"
#include "local_forward.cuh"
#include "local_grad_extra.cuh"
#include "local_grad_table.cuh"
#include "pack.cuh"

namespace cogview::cuda {

// of local_instances.cuh, compiled in instances/
template <class T, int D>
cudaError_t launch_local_forward(const StripPlan&, int, const ForwardArgs&, cudaStream_t);
template <class T, int D>
cudaError_t launch_local_backward(const StripPlan&, int, const BackwardArgs&, cudaStream_t);
template <class T, int D>
cudaError_t launch_grad_extra(const Attention&, const GradExtra&, const float*, const Logits&, cudaStream_t);
template <class T, int D>
cudaError_t launch_grad_table(const GradTableArgs&, cudaStream_t);

namespace {

#ifndef COGVIEW_LOCAL_SHAPES  // that instances/ has
#define COGVIEW_LOCAL_SHAPES(X) \
  X(bf16, 32) X(bf16, 64) X(bf16, 96) X(bf16, 128) X(f16, 32) X(f16, 64) X(f16, 96) X(f16, 128)
#endif

// f(value of the dtype's type, head_dim as a constant)
template <class F>
cudaError_t by_shape(const Attention& a, F f) {
#define COGVIEW_CASE(DTYPE, D) \
  if (a.dtype == Dtype::DTYPE && a.head_dim == D) return f(One<Dtype::DTYPE>{}, std::integral_constant<int, D>{});
  COGVIEW_LOCAL_SHAPES(COGVIEW_CASE)
#undef COGVIEW_CASE
  return cudaErrorInvalidValue;
}

struct Device {
  Chip chip{};
  cudaError_t error;
  Device() {
    int device = 0;
    error = cudaGetDevice(&device);
    const auto ask = [&](int* value, cudaDeviceAttr what) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
    };
    ask(&chip.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&chip.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (error == cudaSuccess) error = compute_capability(&chip.capability);
    if (error == cudaSuccess && chip.capability < 80) error = cudaErrorNotSupported;
  }
};

Plane plane(const Tensor4& x, const Window& w, int64_t bytes = 2) {
  const int64_t cell = x.stride[2] * bytes;
  return {static_cast<char*>(x.data),     x.stride[0] * bytes, x.stride[1] * bytes, cell,
          cell * w.dilation.h * w.grid.w, cell * w.dilation.w};
}

// [B, H, cells] of `bytes` each.
Plane of_queries(const LocalAttention& a, void* x, int64_t bytes) {
  return plane({x, {a.heads * a.seqlen_q, a.seqlen_q, 1}}, a.window, bytes);
}

ExtraKeys extra_keys(const Tensor4& k, const Tensor4& v, double bias) {
  return {static_cast<const char*>(k.data),
          static_cast<const char*>(v.data),
          k.stride[0] * 2,
          k.stride[1] * 2,
          k.stride[2] * 2,
          v.stride[0] * 2,
          v.stride[1] * 2,
          v.stride[2] * 2,
          static_cast<float>(bias) * kLog2e};
}

Extra extra(const LocalAttention& a) {
  const Coarse& c = a.coarse;
  Extra e{};
  e.prefix = extra_keys(a.prefix.k, a.prefix.v, a.prefix.bias), e.coarse = extra_keys(c.k, c.v, c.bias);
  e.mask = a.prefix.mask, e.length = static_cast<int>(a.prefix.len);
  e.height = static_cast<int>(c.grid.h), e.width = static_cast<int>(c.grid.w);
  e.ratio_y = c.grid.h ? static_cast<int>(a.window.grid.h / c.grid.h) : 1;
  e.ratio_x = c.grid.w ? static_cast<int>(a.window.grid.w / c.grid.w) : 1;
  e.radius_y = static_cast<int>(c.kernel.h / 2), e.radius_x = static_cast<int>(c.kernel.w / 2);
  return e;
}

LocalOptions options(const LocalAttention& a) {
  const Tensor4 mask{const_cast<bool*>(a.key_mask), {a.seqlen_q, 0, 1}};
  return {a.window.kernel.h > 0, plane(mask, a.window, 1), static_cast<const float*>(a.bias.table),
          static_cast<int>(a.bias.size.h), static_cast<int>(a.bias.size.w)};
}

// Keys or values of the image, or one row that is read where there are none.
Plane local_rows(const LocalAttention& a, const Tensor4& x) {
  return plane(a.window.kernel.h ? x : Tensor4{a.q.data}, a.window);
}

int64_t queries(const LocalAttention& a) { return a.batch * a.heads * a.seqlen_q; }

GradExtra grad_prefix(const LocalAttention& a) {
  const Prefix& p = a.prefix;
  GradExtra e{p.k, p.v, p.dk, p.dv, static_cast<int>(p.len), p.mask};
  return e;
}

GradExtra grad_coarse(const LocalAttention& a) {
  const Coarse& c = a.coarse;
  const Extra of = extra(a);
  GradExtra e{c.k, c.v, c.dk, c.dv, of.height * of.width};
  e.height = of.height, e.width = of.width, e.radius_y = of.radius_y, e.radius_x = of.radius_x;
  e.ratio_y = Ratio(of.ratio_y), e.ratio_x = Ratio(of.ratio_x);
  e.rows = static_cast<int>(a.window.grid.h), e.columns = static_cast<int>(a.window.grid.w);
  return e;
}

// But for addresses.
GradTableArgs grad_table(const LocalAttention& a, int multiprocessors) {
  const Window& w = a.window;
  GradTableArgs t{};
  t.y = reach(w, true, false).axis, t.x = reach(w, false, false).axis, t.ordered = w.raster_causal;
  t.above = t.y.radius * (w.shift ? 2 : 1), t.left = t.right = t.x.radius * (w.shift ? 2 : 1);
  t.below = w.raster_causal ? 0 : t.above;
  t.heads = static_cast<int>(a.heads), t.group = static_cast<int>(a.heads / a.kv_heads);
  t.tiles = a.batch * t.y.dilation * t.x.dilation * t.tiles_down() * t.tiles_across();
  const int64_t blocks = a.heads * t.units_down() * t.runs();
  // eight on each multiprocessor, each with two tiles for each of its warps
  const int64_t wished = (8 * multiprocessors + blocks - 1) / blocks, room = t.tiles / (2 * t.kWarps);
  t.splits = static_cast<int>(std::max<int64_t>(1, std::min(wished, room)));
  return t;
}

// Floats of scratch, one after the other: two statistics of each query; sums of keys where heads share them; the parts
// of the gradients of prefix and coarse keys, and of the table.
struct Scratch {
  int64_t stats, sums = 0, prefix = 0, coarse = 0, table = 0;
  int prefix_splits, coarse_splits;
  Scratch(const LocalAttention& a, int multiprocessors) : stats(2 * queries(a)) {
    if (a.heads != a.kv_heads && a.window.kernel.h) sums = 2 * a.batch * a.kv_heads * a.seqlen_q * a.head_dim;
    const auto parts = [&](int64_t keys, int* splits) {  // of blocks of 128 keys, two on each multiprocessor
      const int64_t blocks = std::max<int64_t>(1, (keys + 127) / 128 * a.batch * a.kv_heads);
      *splits = static_cast<int>(std::min<int64_t>(16, (2 * multiprocessors + blocks - 1) / blocks));
      return 2 * *splits * a.batch * a.kv_heads * keys * a.head_dim;
    };
    prefix = parts(a.prefix.len, &prefix_splits), coarse = parts(a.coarse.grid.h * a.coarse.grid.w, &coarse_splits);
    if (!a.bias.grad) return;
    const GradTableArgs t = grad_table(a, multiprocessors);
    table = static_cast<int64_t>(t.splits) * t.heads * t.units_down() * t.units_across() * 256;
  }
  int64_t bytes() const { return 4 * (stats + sums + prefix + coarse + table); }
};

}  // namespace

bool local_takes(const LocalAttention& a, Pass pass, const StripChoice& choice) {
  const Device device;
  StripPlan plan;
  return device.error == cudaSuccess && plan_strips(a, pass, device.chip, choice, &plan);
}

cudaError_t local_fwd(const LocalAttention& a, const StripChoice& choice, cudaStream_t stream) {
  const Device device;
  if (device.error != cudaSuccess) return device.error;
  StripPlan plan;
  if (!plan_strips(a, Pass::forward, device.chip, choice, &plan)) return cudaErrorInvalidValue;
  const Logits logits(a.scale, 0);
  const ForwardArgs args{plan.p,
                         plane(a.q, a.window),
                         local_rows(a, a.k),
                         local_rows(a, a.v),
                         plane(a.out, a.window),
                         of_queries(a, a.lse, 4),
                         logits.factor,
                         logits.flip,
                         extra(a),
                         options(a)};
  return by_shape(a, [&](auto t, auto dim) {
    return launch_local_forward<decltype(t), dim()>(plan, device.chip.multiprocessors, args, stream);
  });
}

cudaError_t local_bwd_scratch(const LocalAttention& a, int64_t* bytes) {
  const Device device;
  *bytes = Scratch(a, device.chip.multiprocessors).bytes();
  return device.error;
}

cudaError_t local_bwd(const LocalAttention& a, void* scratch, const StripChoices& choices, cudaStream_t stream) {
  const Device device;
  if (device.error != cudaSuccess) return device.error;
  const Scratch sizes(a, device.chip.multiprocessors);
  float* const floats = static_cast<float*>(scratch);
  BackwardArgs args{};
  args.stats = of_queries(a, scratch, 4), args.second_stats = 4 * queries(a);
  args.lse = static_cast<const float*>(a.lse), args.dlse = static_cast<const float*>(a.dlse);
  const Logits logits(a.scale, 0);
  args.scale = logits.factor, args.step = logits.scale, args.flip = logits.flip;
  const Plane q = plane(a.q, a.window), k = local_rows(a, a.k), v = local_rows(a, a.v);
  const Plane dout = plane(a.dout, a.window);
  const auto run = [&](Pass pass, const StripChoice& choice) {
    StripPlan plan;
    if (!plan_strips(a, pass, device.chip, choice, &plan)) return cudaErrorInvalidValue;
    args.p = plan.p;
    return by_shape(a, [&](auto t, auto dim) {
      return launch_local_backward<decltype(t), dim()>(plan, device.chip.multiprocessors, args, stream);
    });
  };
  args.x = q, args.y = dout, args.a = k, args.b = v;
  args.out = plane(a.out, a.window), args.first = plane(a.dq, a.window), args.extra = extra(a);
  args.options = options(a);
  args.cells = of_queries(a, nullptr, 1);
  cudaError_t error = run(Pass::grad_query, choices.grad_query);
  if (error != cudaSuccess) return error;
  args.x = k, args.y = v, args.a = q, args.b = dout;
  args.first = plane(a.dk, a.window), args.second = plane(a.dv, a.window);
  args.cells = plane({nullptr, {a.kv_heads * a.seqlen_q, a.seqlen_q, 1}}, a.window, 1);
  args.sums = floats + sizes.stats, args.sums2 = args.sums + sizes.sums / 2;
  if (a.window.kernel.h) error = run(Pass::grad_key, choices.grad_key);
  const auto run_extra = [&](GradExtra e, double bias, int splits, float* parts) {
    e.splits = splits, e.parts = parts;
    return by_shape(a, [&](auto t, auto dim) {
      return launch_grad_extra<decltype(t), dim()>(a, e, floats, Logits(a.scale, bias), stream);
    });
  };
  float* const parts = floats + sizes.stats + sizes.sums;
  if (error == cudaSuccess && a.prefix.len)
    error = run_extra(grad_prefix(a), a.prefix.bias, sizes.prefix_splits, parts);
  if (error == cudaSuccess && a.coarse.grid.h)
    error = run_extra(grad_coarse(a), a.coarse.bias, sizes.coarse_splits, parts + sizes.prefix);
  if (error == cudaSuccess && a.bias.grad) {
    GradTableArgs t = grad_table(a, device.chip.multiprocessors);
    t.q = q, t.k = k, t.v = v, t.dout = dout, t.stats = args.stats, t.second_stats = args.second_stats;
    t.options = args.options, t.scale = args.scale, t.flip = args.flip;
    t.parts = parts + sizes.prefix + sizes.coarse, t.grad = static_cast<float*>(a.bias.grad);
    error = by_shape(a, [&](auto type, auto dim) { return launch_grad_table<decltype(type), dim()>(t, stream); });
  }
  return error;
}

}  // namespace cogview::cuda
