// What three-region block-sparse attention is asked to do, the same for every device. With
// w(i) = max(0, (i / block_size - window_blocks + 1) * block_size), the first key of query i's window, query i sees key
// j iff j <= i and (w(i) <= j or j is a pivot).
#pragma once

#include "attention.h"

namespace cogview {

struct ThreeRegionAttention : Attention {
  int64_t seqlen_k, block_size, window_blocks, num_pivots;
  double pivot_bias;
  Indices pivots;  // [sequences, num_pivots], contiguous, ascending, padding at the back
  // Packed, sequence n is the tokens from cu_seqlens[n] to cu_seqlens[n + 1] of a batch of one, and none is longer than
  // max_seqlen; else there is no cu_seqlens, and the sequences are the batch.
  int64_t sequences, max_seqlen;
  Indices cu_seqlens;
  Indices cache_leftpad;  // decode only, or none: the key at which a row's sequence, and with it positions, begin
};

}  // namespace cogview
