// Three-region attention on compute capability 9.0, forward.
//
// A block stays on its multiprocessor and takes one tile of queries after another. Its first warp group copies, the
// others compute, 64 queries each: scores by wgmma, an online softmax in registers, and from there the second product.
// A group issues the scores of the next tile of keys with the sum of this one's values, and groups take turns at the
// softmax: one's runs while the other's products do.
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
// 0.30 to 0.36 ms were expected, and 0.43 to 0.44 measured: exponentials and tensor cores are busy 45 % of the time
// each. With two warps of consumers to a scheduler what one does after the other is what counts: of a step's 1780
// cycles 700 are exponentials, 260 issue products, 190 wait for scores. And 3000 cycles an item are outside of its
// steps. Three groups of 64 queries, queries in shared memory, turns at the products: all measured slower by 4 to 15 %.
#pragma once

#include <algorithm>
#include <cmath>

#include "three_region_hopper_producer.cuh"
#include "warp_tiles.cuh"

namespace cogview::cuda::hopper {

// A thread of a warp group holds of 64 rows two: of its warp's 16 rows lane / 4 and that + 8. Element 4 j + 2 r + e of
// its sums is column 8 j + 2 (lane % 4) + e of row r.
template <class T, int D, bool kPacked>
struct Consumer {
  using S = Shared<D>;
  static constexpr float kLargest = 256;
  S shared;
  u32 group, warp, lane;  // warp of its group

  // Queries in registers cost shared memory nothing, whose bandwidth is used up nearly; where there are registers left.
  static constexpr bool kQueriesInRegisters = D == 64;
  using Weights = u32[kKeys / 16][4];
  u32 x[kQueriesInRegisters ? D / 16 : 1][4];
  float s[kKeys / 2], acc[D / 2];
  // Weights are 2^(logit - most). `most` follows the largest logit only where a weight exceeds kLargest: most tiles
  // then cost no maximum and no rescaling, and sums stay far from overflow.
  float most[2], sum[2];
  int start[2], here[2];  // of rows: first key of the window, position

  // Groups take turns at their exponentials, where that was measured to be faster (4 %; with 128 columns 6 % slower).
  static constexpr bool kTurns = D == 64;
  __device__ u32 turn_barrier(u32 group) const { return 1 + group; }
  __device__ void take_turn(bool never) const {
    if (!kTurns) return;
    gpu::named_barrier_sync(turn_barrier(group), 256);
    gpu::divide(never);
  }
  __device__ void pass_turn() const {
    if (!kTurns) return;
    gpu::named_barrier_arrive(turn_barrier((group + 1) % kGroups), 256);
  }
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
  // Of keys from `key` on, those before the rows' windows; those behind their queries.
  __device__ void mask_before(int key) {
    hide([&](int r, int column) { return column < start[r] - key - int(lane % 4) * 2; });
  }
  __device__ void mask_behind(int key) {
    hide([&](int r, int column) { return column > here[r] - key - int(lane % 4) * 2; });
  }
  template <class Hidden>  // of (r, column): a number that is known, the rest is the same for all
  __device__ void hide(Hidden hidden) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i)
      if (hidden(i / 2 % 2, i / 4 * 8 + i % 2)) s[i] = -INFINITY;
  }
  __device__ void mask(const Item& item, int t, u32 slot) {
    const int pivots = item.pivot_tiles(), first = item.first + 64 * int(group);
    if (t < pivots) {
      if ((t + 1) * kKeys > item.before) mask_pivots(slot, t * kKeys, item.pivots);
    } else {
      const int key = item.low + (t - pivots) * kKeys;
      if (key < item.high) mask_before(key);
      if (key + kKeys - 1 > first) mask_behind(key);
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
    gpu::settle(p);
    pass_turn();
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
      gpu::settle(part), gpu::settle(p);  // nothing is put off
      if (!grown) pass_turn();
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
      if (lane % 4 == 0 && here[r] < item.end_of<kPacked>(a))
        a.lse[item.statistics<kPacked>(a) + here[r]] = (most[r] + gpu::log2_fast(sum[r])) * kLn2;
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
      if (item.first + int(r) < item.end_of<kPacked>(a))
        gpu::store_global16(out + (item.first + int64_t(r)) * a.out.stride[2] * 2 + at % kParts * 16, x);
    }
  }

  __device__ void run(const Problem& a, int items) {
    u32 step = 0, turn = 0;
    if (group == kGroups - 1) pass_turn();
    for (int n = blockIdx.x; kPacked || n < items; n += gridDim.x, ++turn) {
      const u32 queries = shared.query_tile(turn % 2);
      gpu::barrier_wait(shared.queries_full(turn % 2), turn / 2 & 1);
      const Item item(shared.item(turn % 2));
      if (kPacked && item.empty()) break;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        here[r] = item.first + int(64 * group + 16 * warp + lane / 4) + 8 * r;
        start[r] = item.low == item.high ? item.low : window_start(here[r], a), most[r] = -1e30f, sum[r] = 0;
      }
      take_queries(queries, a.negate);
      const int tiles = item.tiles(), pivots = item.pivot_tiles();
      const u64 rows = S::Queries::rows(queries + 64 * 128 * group);

      Weights even, odd;  // of tiles
      u32 slot = arrival(step);
      gpu::settle(s), gpu::settle(x);
      gpu::multiply_fence();
      scores(rows, S::Keys::rows(shared.key_tile(slot)));
      gpu::multiply_wait<0>(s);
      mask(item, 0, slot);
      release(shared.empty(slot));
      take_turn(a.seqlen < 0);
      soften_first(even, a.scale, pivots > 0 ? a.bias : 0);
      ++step;
      // Scores of tile t and the sum of tile t - 1, whose weights are p; then weights q of tile t.
      const auto next = [&](int t, const Weights& p, Weights& q) {
        const u32 slot = arrival(step);
        gpu::settle(s), gpu::settle(const_cast<Weights&>(p)), gpu::settle(acc);
        gpu::multiply_fence();
        scores(rows, S::Keys::rows(shared.key_tile(slot)));
        weigh(p, S::Keys::columns(shared.value_tile(slot)), t > 1);
        gpu::multiply_wait<1>(s);
        mask(item, t, slot);
        take_turn(a.seqlen < 0);
        float factor[2];
        const bool grows = soften(q, a.scale, t < pivots ? a.bias : 0, factor);
        gpu::multiply_wait<0>(acc);
        release(shared.empty(slot));
        if (grows) {
#pragma unroll
          for (int i = 0; i < D / 2; ++i) acc[i] *= factor[i / 2 % 2];
        }
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
      for (; t + 1 < tiles; t += 2) next(t, even, odd), next(t + 1, odd, even);
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
template <int D>
constexpr int kProducerRegisters = D == 64 ? 56 : 40;
template <int D>
constexpr int kConsumerRegisters = D == 64 ? 224 : 232;

template <class T, int D, bool kPacked>
__global__ void __launch_bounds__(128 * (kGroups + 1), 1) forward(const __grid_constant__ Problem a, int items) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("trap;");  // there is no such code for this architecture
#else
  using S = Shared<D>;
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
    gpu::fewer_registers<kProducerRegisters<D> >();
    Producer<D, kPacked>{shared, warp, lane}.run(a, items);
  } else {
    gpu::more_registers<kConsumerRegisters<D> >();
    Consumer<T, D, kPacked> consumer;
    consumer.shared = shared, consumer.group = warp / 4 - 1, consumer.warp = warp % 4, consumer.lane = lane;
    consumer.run(a, items);
  }
#endif
}

template <class T, int D, bool kPacked>
cudaError_t launch(const ThreeRegionAttention& args, cudaStream_t stream) {
  using S = Shared<D>;
  Problem a;
  a.q = args.q, a.k = args.k, a.v = args.v, a.out = args.out, a.lse = static_cast<float*>(args.lse);
  a.pivots = args.pivots, a.heads = args.heads, a.kv_heads = args.kv_heads, a.seqlen = args.seqlen_k;
  // larger ones mean the same, and products stay below 2^31
  a.pivot_rows = args.num_pivots, a.num_pivots = std::min(args.num_pivots, args.seqlen_k),
  a.block_size = std::min(args.block_size, args.seqlen_k);
  a.window_blocks = std::min(args.window_blocks, (args.seqlen_k + a.block_size - 1) / a.block_size);
  a.packed = PackedSequences(args);
  a.tiles = (token_rows<kPacked>(args) + kQueries - 1) / kQueries, a.total_heads = args.batch * args.heads;
  const int64_t pairs = (int64_t(1) << 25) / (int64_t(4) * D * a.seqlen);  // keys and values of half of L2
  a.section = std::min<int64_t>(a.total_heads, std::max<int64_t>(pairs, 1) * (a.heads / a.kv_heads));
  a.scale = std::fabs(args.scale) * kLog2e, a.bias = args.pivot_bias * kLog2e, a.negate = args.scale < 0;
  if (!(a.scale > 0)) a.scale = 1e-30f;  // masked scores, -inf, must stay below all others
  const int items = a.tiles * a.total_heads;
  int device, processors;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  auto* kernel = forward<T, D, kPacked>;
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
         args.batch * args.heads * (args.seqlen_k / 128 + args.sequences + 1) < int64_t(1) << 31;
}

cudaError_t three_region_hopper_fwd(const ThreeRegionAttention& args, cudaStream_t stream) {
  const bool wide = args.head_dim == 128, packed = args.cu_seqlens.data;
  const auto of = [&](auto one) {
    using T = decltype(one);
    if (packed) return (wide ? hopper::launch<T, 128, true> : hopper::launch<T, 64, true>)(args, stream);
    return (wide ? hopper::launch<T, 128, false> : hopper::launch<T, 64, false>)(args, stream);
  };
  return args.dtype == Dtype::bf16 ? of(__nv_bfloat16{}) : of(__half{});
}

}  // namespace cogview::cuda
