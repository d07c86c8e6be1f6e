// Where what a block works on is: its sequence, of a batch or of packed ones, and its rows there.
//
// Packed sequences have rows of their own among those that a head's blocks share: number n, from token `begin` on, from
// PackedRows.first(n, begin) on. That is enough for any length, for n grows by one where begin is rounded down; so
// PackedRows.first(sequences, tokens) do, of which a block each may find nothing to do, and neither the host nor a scan
// has to look at lengths. What cu_seqlens holds is not trusted: whatever it is, rows are those of tokens that there
// are.
#pragma once

#include "../three_region_attention.h"
#include "tile_ring.cuh"

namespace cogview::cuda {

constexpr int kBlockRows = 128;  // of every pass, whatever head_dim

// Rows for packed sequences that have at most `most` each.
struct PackedRows {
  int64_t most;  // of whole blocks
  COGVIEW_HOST_DEVICE explicit PackedRows(int64_t most) : most((most + kBlockRows - 1) / kBlockRows * kBlockRows) {}
  // Where those of sequence `number`, from token `begin` on, are.
  COGVIEW_HOST_DEVICE int64_t first(int64_t number, int64_t begin) const {
    const int64_t row = (begin / kBlockRows + number) * kBlockRows;
    return row < number * most ? row : number * most;
  }
};

// Rows of a head's tokens, and of sums of its pivots.
template <bool kPacked>
COGVIEW_HOST_DEVICE int64_t token_rows(const ThreeRegionAttention& a) {
  return kPacked ? PackedRows(a.max_seqlen).first(a.sequences, a.seqlen_k) : a.seqlen_k;
}
template <bool kPacked>
COGVIEW_HOST_DEVICE int64_t part_rows(const ThreeRegionAttention& a) {
  return kPacked ? PackedRows(a.num_pivots).first(a.sequences, a.seqlen_k) : a.num_pivots;
}

// Of `count` numbers how many `is` true of, which are the first ones; all lanes of a warp ask for 32 at once.
template <class Is>
__device__ int count_by_warp(int count, Is is) {
  const int lane = threadIdx.x % 32;
  int first = 0, left = count;
  while (left > 0) {
    const int step = (left + 31) / 32, at = first + (lane + 1) * step - 1;
    const bool yes = at < first + left && is(at);
    const int whole = gpu::count_bits(gpu::lanes_where(yes));
    first += whole * step;
    left = min(left - whole * step, step - 1);
  }
  return first;
}

struct Sequence {
  int number;  // whose pivots are its
  int sample;  // that its rows are of; of packed ones this is the first token, since samples are a token apart
  int seqlen;
};

struct PackedSequences {
  Indices begins;
  int count, tokens, longest;

  PackedSequences() = default;
  COGVIEW_HOST_DEVICE explicit PackedSequences(const ThreeRegionAttention& a)
      : begins(a.cu_seqlens),
        count(static_cast<int>(a.sequences)),
        tokens(static_cast<int>(a.seqlen_k)),
        longest(static_cast<int>(a.max_seqlen)) {}
  __device__ int begin(int n) const {
    const int64_t x = begins[n];
    return n == 0 || x < 0 ? 0 : x < tokens ? static_cast<int>(x) : tokens;
  }
  // The one that has a row; asked by all lanes of a warp.
  __device__ Sequence at(int64_t row, const PackedRows& rows) const {
    const auto before = [&](int n) { return rows.first(n + 1, begin(n + 1)) <= row; };
    const int number = gpu::uniform(count_by_warp(count - 1, before));
    const int first = gpu::uniform(begin(number)), length = gpu::uniform(begin(number + 1)) - first;
    return {number, first, max(0, min(length, longest))};
  }
};

// Where the rows that a block owns are. Asked again at the end instead of remembered, which takes registers from the
// sums.
template <bool kPacked>
struct BlockPlace : Sequence {
  int first, head, h;  // row; of all batch * heads, and of its sample's
  // Each sequence has at most `most` such rows; `backwards`: the last ones first.
  __device__ BlockPlace(const ThreeRegionAttention& a, const Programs& programs, int64_t heads, int rows, int64_t most,
                        bool backwards = false) {
    int program = blockIdx.x;
    gpu::keep(program);
    const auto place = programs.place(program);
    first = place.tile * rows, head = place.head;
    if (backwards) first = (programs.tiles - 1) * rows - first;
    if constexpr (kPacked) {
      static_cast<Sequence&>(*this) = PackedSequences(a).at(first, PackedRows(most));
      first -= static_cast<int>(PackedRows(most).first(number, sample));
      h = head;
    } else {
      number = sample = gpu::uniform(head / static_cast<int>(heads)), h = head - sample * static_cast<int>(heads);
      seqlen = static_cast<int>(a.seqlen_k);
    }
  }
  // Whether there is a row at all; in a batch there is.
  __device__ bool empty() const { return kPacked && static_cast<unsigned>(first) >= static_cast<unsigned>(seqlen); }
  // Where lse and what else there is of a row each begins, of all heads of all samples.
  __device__ int64_t statistics(const ThreeRegionAttention& a) const {
    return kPacked ? head * a.seqlen_q + sample : int64_t(head) * seqlen;
  }
};

template <bool kPacked>
struct QueryPlace : BlockPlace<kPacked> {
  __device__ QueryPlace(const ThreeRegionAttention& a, const Programs& programs, int rows)
      : BlockPlace<kPacked>(a, programs, a.heads, rows, a.max_seqlen, true) {}  // those with most keys first
};

}  // namespace cogview::cuda
