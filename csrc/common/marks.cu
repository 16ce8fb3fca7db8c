#include "common/marks.cuh"

#include "common/divisor.h"
#include "common/launch.h"

namespace statescan {
namespace {

constexpr int kThreads = 128;

struct Marking {
  Sequences sequences;
  int64_t slots_per_row;
  bool reverse;
};

__device__ __forceinline__ int packed_mark(const Marking& p, int64_t t) {
  const Run run = run_at(p.sequences, 0, t, 0, false);
  if (t < run.begin || t >= run.end) return kPadding;  // offsets that make no sense
  int mark = 0;
  if (t == (p.reverse ? run.end - 1 : run.begin)) mark |= kStart | kFromSlot;
  if (t == (p.reverse ? run.begin : run.end - 1)) mark |= kToSlot;
  return mark;
}

__device__ __forceinline__ int indexed_mark(const Marking& p, int64_t b, int64_t t) {
  const IndexView& ids = p.sequences.ids;
  const int64_t id = ids.at(b, t);
  if (id < 0) return kPadding;
  auto is_of = [&](int64_t i) { return i >= 0 && i < p.sequences.seqlen && ids.at(b, i) == id; };
  const int64_t before = p.reverse ? t + 1 : t - 1, after = p.reverse ? t - 1 : t + 1;
  int mark = is_of(before) ? 0 : kStart;
  if (p.slots_per_row > 0) {
    if (id >= p.slots_per_row) return mark;
    if (mark & kStart) mark |= kFromSlot;
    return is_of(after) ? mark : mark | kToSlot;
  }
  if (p.sequences.ends == nullptr) return mark;
  const RunEnds ends = p.sequences.ends[b];
  if (t == (p.reverse ? ends.end - 1 : ends.begin)) mark |= kFromSlot;
  if (t == (p.reverse ? ends.begin : ends.end - 1)) mark |= kToSlot;
  return mark;
}

// Thread: a token.
__global__ __launch_bounds__(kThreads) void marks_kernel(const Marking p, int32_t* marks,
                                                         Divisor seqlen, int64_t tasks) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < tasks;
       i += int64_t(gridDim.x) * kThreads) {
    int64_t t;
    const int64_t b = seqlen.divide(i, t);
    marks[i] = p.sequences.offsets ? packed_mark(p, t) : indexed_mark(p, b, t);
  }
}

}  // namespace

void find_marks(const Sequences& s, int64_t slots_per_row, bool reverse, int32_t* marks,
                cudaStream_t stream) {
  if (s.ends != nullptr) find_run_ends(s, stream);
  const int64_t tasks = s.batch * s.seqlen;
  if (tasks == 0) return;
  launch("find_marks", marks_kernel, blocks_for(tasks, kThreads), kThreads, 0, stream,
         Marking{s, slots_per_row, reverse}, marks, Divisor(s.seqlen), tasks);
}

}  // namespace statescan
