// csrc/cuda's choices of strips and their plan, for tests/test_sweep.py and operators/test_cuda_attention.py.
#include "../csrc/cuda/local_choices.h"

using namespace cogview::cuda;

// Nine numbers of the three passes; whether the text was taken.
extern "C" bool choices(const char* text, int* numbers) {
  StripChoices c;
  if (!read_choices(text, &c)) return false;
  for (const StripChoice& x : {c.forward, c.grad_query, c.grad_key})
    *numbers++ = x.groups, *numbers++ = x.blocks, *numbers++ = x.unit_rows;
  return true;
}

// Groups, blocks and rows of units at once of a pass over 64 x 64 cells, or that there is no such plan.
extern "C" bool plan(int capability, int pass, int head_dim, int kernel, bool causal, const int* choice, int* numbers) {
  cogview::LocalAttention a{};
  a.batch = 8, a.heads = a.kv_heads = 40, a.head_dim = head_dim, a.seqlen_q = 64 * 64;
  a.window.grid = {64, 64}, a.window.kernel = {kernel, kernel}, a.window.dilation = {1, 1};
  a.window.raster_causal = causal;
  StripPlan p;
  if (!plan_strips(a, static_cast<Pass>(pass), {132, 227 * 1024, capability}, {choice[0], choice[1], choice[2]}, &p))
    return false;
  numbers[0] = p.p.groups, numbers[1] = p.p.blocks, numbers[2] = p.unit_rows;
  return true;
}

// Whether every pass takes a window, with a prefix too, on images from its size on, or `large` on those in which no
// tile of owners is near both edges.
extern "C" bool fits(int head_dim, int rows, int columns, bool shift, bool large, int shared) {
  for (int h = large ? 2 * rows + 3 : rows; h < 2 * rows + 12; ++h)
    for (int w = large ? 2 * columns + 3 : columns; w < 2 * columns + 12; ++w)
      for (const Pass pass : {Pass::forward, Pass::grad_query, Pass::grad_key}) {
        cogview::LocalAttention a{};
        a.batch = a.heads = a.kv_heads = 1, a.head_dim = head_dim;
        a.window = {{h, w}, {rows, columns}, {1, 1}, false, shift};
        a.prefix.len = 16;
        StripPlan p;
        if (!plan_strips(a, pass, {132, shared, 90}, {}, &p)) return false;
      }
  return true;
}
