// Three-region attention on compute capability 9.0, forward.
//
// A block stays on its multiprocessor and takes one tile of queries after another. Its first warp group copies, the
// others compute, 64 queries each: scores by wgmma, an online softmax in registers, and from there the second product.
// A group issues the scores of the next tile of keys before the softmax of this one, and groups take turns to issue:
// one's softmax runs while the other's products do.
//
// The keys of a tile of queries are a run of pivots, whose rows are gathered, and a run of its window. Of the tiles of
// keys only those at an edge of the pattern are masked.
//
// What it costs, counted for 160 heads of 4224 queries, 64 columns, windows of 6 x 128 and 768 pivots on an H100 (132
// multiprocessors at 1.755 GHz). 647 million scores are seen, 731 million computed (tiles of 128 x 128, of which a
// diagonal one is seen by half). Each takes 256 FLOP, at 4096 a cycle, and an exponential, at 16 a cycle: 197 us each,
// at best at the same time. Copies to shared memory are 1.46 GB, from L2 at 5.5 TB/s 266 us; memory's 346 MB take 115
// us. A warp's step of 16 x 128 scores is 349 instructions, 130 of a copying warp beside it: of the 1024 cycles that a
// tile takes the tensor cores and the exponentials, 830 issue one, and shared memory moves 96 of 128 bytes in each. So
// 0.30 to 0.36 ms are to be expected; nothing of this has run on a GPU. Three groups compute 822 million scores (222
// us) and copy 1.10 GB (200 us).
#pragma once

#include <algorithm>
#include <cmath>

#include "three_region_hopper_producer.cuh"
#include "warp_tiles.cuh"

namespace cogview::cuda::hopper {

// A thread of a warp group holds of 64 rows two: of its warp's 16 rows lane / 4 and that + 8. Element 4 j + 2 r + e of
// its sums is column 8 j + 2 (lane % 4) + e of row r.
template <class T, int D, int kGroups>
struct Consumer {
  using S = Shared<D, kGroups>;
  static constexpr float kLag = 8, kLargest = 256;   // 2^kLag
  static constexpr bool kTwoWeights = kGroups == 2;  // registers of three groups suffice for one set of weights
  S shared;
  u32 group, warp, lane;  // warp of its group

  // Queries in registers cost shared memory nothing, whose bandwidth is used up nearly; where there are registers left.
  static constexpr bool kQueriesInRegisters = D == 64 && kGroups == 2;
  using Weights = u32[kKeys / 16][4];
  u32 x[kQueriesInRegisters ? D / 16 : 1][4];
  float s[kKeys / 2], acc[D / 2];
  // Weights are 2^(logit - most). `most` follows the largest logit only where a weight exceeds kLargest: most tiles
  // then cost no maximum and no rescaling, and sums stay far from overflow.
  float most[2], sum[2];
  int start[2], here[2];  // of rows: first key of the window, position

  __device__ u32 turn_barrier(u32 group) const { return 1 + group; }
  __device__ void join_group() const { gpu::named_barrier_sync(1 + kGroups + group, 128); }

  __device__ void scores(u64 queries, u64 keys) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      if constexpr (kQueriesInRegisters)
        gpu::multiply_async<T, kKeys, false>(s, x[k], S::Keys::along(keys, k), k > 0);
      else
        gpu::multiply_async<T, kKeys, false>(s, S::Queries::along(queries, k), S::Keys::along(keys, k), k > 0);
    }
    gpu::multiply_commit();
  }
  __device__ void weigh(const Weights& p, u64 values, bool add) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      gpu::multiply_async<T, D, true>(acc, p[k], S::Keys::across(values, k), add || k > 0);
    gpu::multiply_commit();
  }

  __device__ void mask_pivots(u32 slot, int column, int high) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const uint2 at = gpu::load_shared8(shared.position(slot, 8 * j + lane % 4 * 2));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool there = column + 8 * j + int(lane % 4) * 2 + e % 2 < high;
        if (!there || (e % 2 ? at.y : at.x) >= u32(start[e / 2])) s[4 * j + e] = -INFINITY;
      }
    }
  }
  __device__ void mask_window(int key) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int first = key + int(lane % 4) * 2 - start[r];
      const u32 count = here[r] + 1 - start[r];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (u32(first + 8 * j + e) >= count) s[4 * j + 2 * r + e] = -INFINITY;
    }
  }
  __device__ void mask(const Item& item, const Counts& counts, int t, u32 slot) {
    const int pivots = counts.pivot_tiles(), first = item.first + 64 * int(group);
    if (t < pivots) {
      if ((t + 1) * kKeys > counts.low) mask_pivots(slot, t * kKeys, counts.high);
    } else {
      const int key = item.low + (t - pivots) * kKeys;
      if (key < item.high || key + kKeys - 1 > first) mask_window(key);
    }
  }

  // Weights of scores, and what they add to sums. Of all elements 4 j + 2 r + e of row r.
  __device__ void exponentials(Weights& p, float (&part)[2], float scale, float bias) const {
    const float shift[2] = {bias - most[0], bias - most[1]};
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int r = i / 2 % 2;
      const float x = gpu::exp2_fast(fmaf(s[i], scale, shift[r])), y = gpu::exp2_fast(fmaf(s[i + 1], scale, shift[r]));
      part[r] = i < 4 ? x + y : part[r] + x + y;
      p[i / 8][i / 2 % 4] = gpu::pack_as(x, y, static_cast<T*>(nullptr));
    }
  }
  // `most` becomes the largest logit so far.
  __device__ void raise(float scale, float bias, float (&factor)[2]) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(quad_max(fmaf(top[r], scale, bias)), most[r]);
      factor[r] = gpu::exp2_fast(most[r] - top[r]);
      most[r] = top[r], sum[r] *= factor[r];
    }
  }
  __device__ void soften_first(Weights& p, float scale, float bias) {
    float factor[2], part[2];
    raise(scale, bias, factor);
    exponentials(p, part, scale, bias);
    sum[0] = part[0], sum[1] = part[1];
  }
  // Takes it that `most` stays, and does it again, once, where weights are too large then. Whether sums must be
  // multiplied by `factor`.
  __device__ bool soften(Weights& p, float scale, float bias, float (&factor)[2]) {
    float part[2];
    bool grown = false;
#pragma unroll 1
    for (;;) {
      exponentials(p, part, scale, bias);
      gpu::settle(part);  // sums are not put off
      u32 top[2] = {p[0][0], p[0][1]};
#pragma unroll
      for (int i = 2; i < kKeys / 4; ++i)
        top[i % 2] = gpu::max_packed(top[i % 2], p[i / 4][i % 4], static_cast<T*>(nullptr));
      top[0] = gpu::max_packed(top[0], top[1], static_cast<T*>(nullptr));
      const float2 two = gpu::unpack(top[0], static_cast<T*>(nullptr));
      if (grown || !__any_sync(~0u, fmaxf(two.x, two.y) > kLargest)) break;
      raise(scale, bias, factor);
      grown = true;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += part[r];
    return grown;
  }
  // The same without a second set of registers for weights: scores become weights where they are.
  __device__ bool soften_in_place(float scale, float bias, float (&factor)[2]) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    bool larger = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaf(top[r], scale, bias);
      larger |= top[r] > most[r] + kLag;
    }
    const bool grown = __any_sync(~0u, larger);
    if (grown) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(quad_max(top[r]), most[r]);
        factor[r] = gpu::exp2_fast(most[r] - top[r]);
        most[r] = top[r], sum[r] *= factor[r];
      }
    }
    const float shift[2] = {bias - most[0], bias - most[1]};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      s[i] = gpu::exp2_fast(fmaf(s[i], scale, shift[i / 2 % 2]));
      sum[i / 2 % 2] += s[i];
    }
    return grown;
  }
  __device__ void pack(Weights& p) const {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        p[k][i] = gpu::pack_as(s[8 * k + 2 * i], s[8 * k + 2 * i + 1], static_cast<T*>(nullptr));
  }

  // The slot of a step, once that is there.
  __device__ u32 arrival(u32 step) const {
    const u32 slot = step % S::kStages;
    gpu::barrier_wait(shared.full(slot), step / S::kStages & 1);
    gpu::fence_proxy();
    return slot;
  }
  // What the warp has read of this slot may be overwritten.
  __device__ void release(u32 barrier) const {
    __syncwarp();
    if (lane == 0) gpu::barrier_arrive(barrier);
  }

  // To registers, or negated where they are.
  __device__ void take_queries(u32 queries, bool negate) {
    if constexpr (kQueriesInRegisters) {
      const u32 signs = negate ? 0x80008000u : 0;
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        gpu::load_matrices(x[k], queries + S::Queries::part(64 * group + 16 * warp + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) x[k][i] ^= signs;
      }
    } else if (negate) {
      for (u32 i = warp * 32 + lane; i < 64 * D / 8; i += 128) {
        const u32 at = queries + S::Queries::part(64 * group + i / (D / 8), i % (D / 8));
        uint4 q = gpu::load_shared16(at);
        q.x ^= 0x80008000u, q.y ^= 0x80008000u, q.z ^= 0x80008000u, q.w ^= 0x80008000u;
        gpu::store_shared16(at, q);
      }
      join_group();  // the fence of proxies comes with the first tile of keys
    }
  }

  // Sums to the rows of the queries in shared memory, and from there to memory.
  __device__ void store(const Problem& a, const Item& item, u32 queries) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      inverse[r] = gpu::reciprocal(sum[r]);
      if (lane % 4 == 0 && here[r] < a.seqlen)
        a.lse[(int64_t(item.b) * a.heads + item.h) * a.seqlen + here[r]] = (most[r] + gpu::log2_fast(sum[r])) * kLn2;
    }
    if (kQueriesInRegisters)
      __syncwarp();
    else
      join_group();  // all have read the queries
    const u32 row = 64 * group + 16 * warp;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        w[i] = gpu::pack_as(acc[8 * j + 2 * i] * inverse[i % 2], acc[8 * j + 2 * i + 1] * inverse[i % 2],
                            static_cast<T*>(nullptr));
      gpu::store_matrices(w, queries + S::Queries::part(row + lane % 16, 2 * j + lane / 16));
    }
    __syncwarp();
    constexpr u32 kParts = D / 8;
    char* out = rows_of(a.out, item.b, item.h);
#pragma unroll
    for (u32 i = 0; i < kParts / 2; ++i) {
      const u32 at = i * 32 + lane, r = row + at / kParts;
      const uint4 x = gpu::load_shared16(queries + S::Queries::part(r, at % kParts));
      if (item.first + int(r) < a.seqlen)
        gpu::store_global16(out + (item.first + int64_t(r)) * a.out.stride[2] * 2 + at % kParts * 16, x);
    }
  }

  __device__ void run(const Problem& a, int items) {
    u32 step = 0, turn = 0;
    if (group == kGroups - 1) gpu::named_barrier_arrive(turn_barrier(0), 256);
    for (int n = blockIdx.x; n < items; n += gridDim.x, ++turn) {
      Item item(n, S::kQueries, a);
      const u32 queries = shared.query_tile(turn % 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        here[r] = item.first + int(64 * group + 16 * warp + lane / 4) + 8 * r;
        start[r] = window_start(here[r], a), most[r] = -1e30f, sum[r] = 0;
      }
      gpu::barrier_wait(shared.queries_full(turn % 2), turn / 2 & 1);
      const uint2 found = gpu::load_shared8(shared.count(turn % 2));
      Counts counts;
      counts.low = found.x, counts.high = found.y;
      take_queries(queries, a.negate);
      const int tiles = counts.tiles(item), pivots = counts.pivot_tiles();
      const u64 rows = S::Queries::rows(queries + 64 * 128 * group);

      Weights even, odd;  // of tiles
      u32 slot = arrival(step);
      gpu::settle(s), gpu::settle(x);
      gpu::multiply_fence();
      scores(rows, S::Keys::rows(shared.key_tile(slot)));
      gpu::multiply_wait<0>(s);
      mask(item, counts, 0, slot);
      release(shared.empty(slot));
      soften_first(even, a.scale, pivots > 0 ? a.bias : 0);
      ++step;
      // Scores of tile t and the sum of tile t - 1, whose weights are p; then weights q of tile t.
      const auto next = [&](int t, const Weights& p, Weights& q) {
        const u32 slot = arrival(step);
        gpu::named_barrier_sync(turn_barrier(group), 256);
        gpu::settle(s), gpu::settle(const_cast<Weights&>(p)), gpu::settle(acc);
        gpu::multiply_fence();
        scores(rows, S::Keys::rows(shared.key_tile(slot)));
        weigh(p, S::Keys::columns(shared.value_tile(slot)), t > 1);
        gpu::named_barrier_arrive(turn_barrier((group + 1) % kGroups), 256);
        gpu::multiply_wait<1>(s);
        mask(item, counts, t, slot);
        const float bias = t < pivots ? a.bias : 0;
        float factor[2];
        const bool grows = kTwoWeights ? soften(q, a.scale, bias, factor) : soften_in_place(a.scale, bias, factor);
        if (kTwoWeights) gpu::settle(q);  // before the wait
        if (!kTwoWeights) gpu::settle(s), gpu::divide(a.seqlen < 0);
        gpu::multiply_wait<0>(acc);
        release(shared.empty(slot));
        if (grows) {
#pragma unroll
          for (int i = 0; i < D / 2; ++i) acc[i] *= factor[i / 2 % 2];
        }
        if (!kTwoWeights) pack(q);
        ++step;
      };
      const auto last = [&](const Weights& p) {
        const u32 slot = arrival(step);
        gpu::settle(const_cast<Weights&>(p)), gpu::settle(acc);
        gpu::multiply_fence();
        weigh(p, S::Keys::columns(shared.value_tile(slot)), tiles > 1);
        gpu::multiply_wait<0>(acc);
        release(shared.empty(slot));
        ++step;
      };
      int t = 1;
      if (kTwoWeights) {
        for (; t + 1 < tiles; t += 2) next(t, even, odd), next(t + 1, odd, even);
      } else {
        for (; t < tiles; ++t) next(t, even, even);
      }
      if (t < tiles) {
        next(t, even, odd);
        last(odd);
      } else {
        last(even);
      }
      store(a, item, queries);
      release(shared.queries_empty(turn % 2));
    }
  }
};

// Of a multiprocessor's 512 for each of 128 threads; that there are no spills and few moves was tried.
template <int D, int kGroups>
constexpr int kProducerRegisters = kGroups == 3 ? 32
                                   : D == 64    ? 56
                                                : 40;
template <int D, int kGroups>
constexpr int kConsumerRegisters = kGroups == 3 ? 160
                                   : D == 64    ? 224
                                                : 232;

template <class T, int D, int kGroups>
__global__ void __launch_bounds__(128 * (kGroups + 1), 1) forward(const __grid_constant__ Problem a, int items) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("trap;");  // there is no such code for this architecture
#else
  using S = Shared<D, kGroups>;
  const S shared{gpu::shared_address(gpu::shared_memory())};
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < S::kStages; ++i) {
      gpu::barrier_init(shared.full(i), 128);
      gpu::barrier_init(shared.empty(i), 4 * kGroups);
    }
    for (u32 i = 0; i < 2; ++i) {
      gpu::barrier_init(shared.queries_full(i), 129);
      gpu::barrier_init(shared.queries_empty(i), 4 * kGroups);
    }
  }
  __syncthreads();
  const u32 warp = gpu::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (warp < 4) {
    gpu::fewer_registers<kProducerRegisters<D, kGroups> >();
    Producer<D, kGroups>{shared, warp, lane}.run(a, items);
  } else {
    gpu::more_registers<kConsumerRegisters<D, kGroups> >();
    Consumer<T, D, kGroups> consumer;
    consumer.shared = shared, consumer.group = warp / 4 - 1, consumer.warp = warp % 4, consumer.lane = lane;
    consumer.run(a, items);
  }
#endif
}

template <class T, int D, int kGroups>
cudaError_t launch(const ThreeRegionAttention& args, cudaStream_t stream) {
  using S = Shared<D, kGroups>;
  Problem a;
  a.q = args.q, a.k = args.k, a.v = args.v, a.out = args.out, a.lse = static_cast<float*>(args.lse);
  a.pivots = args.pivots, a.heads = args.heads, a.kv_heads = args.kv_heads, a.seqlen = args.seqlen_k;
  // larger ones mean the same, and products stay below 2^31
  a.pivot_rows = args.num_pivots, a.num_pivots = std::min(args.num_pivots, args.seqlen_k),
  a.block_size = std::min(args.block_size, args.seqlen_k);
  a.window_blocks = std::min(args.window_blocks, (args.seqlen_k + a.block_size - 1) / a.block_size);
  a.tiles = (a.seqlen + S::kQueries - 1) / S::kQueries, a.total_heads = args.batch * args.heads;
  const int64_t pairs = (int64_t(1) << 25) / (int64_t(4) * D * a.seqlen);  // keys and values of half of L2
  a.section = std::min<int64_t>(a.total_heads, std::max<int64_t>(pairs, 1) * (a.heads / a.kv_heads));
  a.scale = std::fabs(args.scale) * kLog2e, a.bias = args.pivot_bias * kLog2e, a.negate = args.scale < 0;
  if (!(a.scale > 0)) a.scale = 1e-30f;  // masked scores, -inf, must stay below all others
  const int items = a.tiles * a.total_heads;
  int device, processors;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  auto* kernel = forward<T, D, kGroups>;
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes);
  if (error) return error;
  const cudaLaunchConfig_t config{
      dim3(std::min(items, processors)), dim3(128 * (kGroups + 1)), S::bytes, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, a, items);
}

}  // namespace cogview::cuda::hopper

namespace cogview::cuda {

bool three_region_hopper_takes(const ThreeRegionAttention& args) {
  const auto aligned = [](const Tensor4& x) {
    bool whole = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    for (int64_t stride : x.stride) whole &= stride % 8 == 0;
    return whole && x.stride[2] >= 0 && x.stride[2] < int64_t(1) << 28;
  };
  return (args.dtype == Dtype::bf16 || args.dtype == Dtype::f16) && (args.head_dim == 64 || args.head_dim == 128) &&
         aligned(args.q) && aligned(args.k) && aligned(args.v) && aligned(args.out) &&
         args.batch * args.heads * (args.seqlen_k / 128 + 1) < int64_t(1) << 31;
}

cudaError_t three_region_hopper_fwd(const ThreeRegionAttention& args, cudaStream_t stream, int groups) {
  const bool wide = args.head_dim == 128;
  if (groups == 3 && !wide)
    return (args.dtype == Dtype::bf16 ? hopper::launch<__nv_bfloat16, 64, 3> : hopper::launch<__half, 64, 3>)(args,
                                                                                                              stream);
  if (args.dtype == Dtype::bf16)
    return (wide ? hopper::launch<__nv_bfloat16, 128, 2> : hopper::launch<__nv_bfloat16, 64, 2>)(args, stream);
  return (wide ? hopper::launch<__half, 128, 2> : hopper::launch<__half, 64, 2>)(args, stream);
}

}  // namespace cogview::cuda
