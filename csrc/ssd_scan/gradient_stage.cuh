// How operands come to the gradients on tensor cores: those of one step are fetched while the step
// before is computed.
//
// A step is a head, or some of its columns if it has more than a stage holds. Then each block of
// columns is a step twice: once for V = dy x^T alone, which all of them add to, and once for the
// products with the states.
#pragma once

#include "ssd_scan/gradient_task.cuh"
#include "ssd_scan/tensor.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kGradientWarps = 8, kGradientThreads = 32 * kGradientWarps;

template <int kN, int kTerms>
struct GradientStage {
  // As many as leave room for two stages of bfloat16 on sm_90, for one on sm_80.
  static constexpr int kColumns = kTerms == 3 ? 16 : kTerms == 2 || kN > 128 ? 32 : 64;
  TermTile<kTerms, kSteps, kColumns> x, g;  // g: dy before the gate
  TermTile<kTerms, kN, kColumns> S, dS;     // before the piece, and the gradient after it
};

struct Step {
  int64_t h;
  int i;  // of the head's steps
};

// The steps of a task's heads, in order.
struct Steps {
  int64_t begin;         // the first head
  int headdim, columns;  // columns: of a stage

  __device__ __forceinline__ int blocks() const { return (headdim + columns - 1) / columns; }
  __device__ __forceinline__ int per_head() const { return blocks() == 1 ? 1 : 2 * blocks(); }
  __device__ __forceinline__ bool has_states(const Step& s) const {
    return s.i >= blocks() || blocks() == 1;
  }
  __device__ __forceinline__ int block_of(const Step& s) const {
    return s.i < blocks() ? s.i : s.i - blocks();
  }
  __device__ __forceinline__ int first_of(const Step& s) const { return columns * block_of(s); }
  __device__ __forceinline__ int columns_of(const Step& s) const {
    const int left = headdim - first_of(s);
    return left < columns ? left : columns;
  }
  // How many come before.
  __device__ __forceinline__ int count(const Step& s) const {
    return int(s.h - begin) * per_head() + s.i;
  }
  __device__ __forceinline__ Step after(const Step& s) const {
    return s.i + 1 < per_head() ? Step{s.h, s.i + 1} : Step{s.h + 1, 0};
  }
  __device__ __forceinline__ Step before(const Step& s) const {
    return s.i > 0 ? Step{s.h, s.i - 1} : Step{s.h - 1, per_head() - 1};
  }
};

// Pairs of neighbours of rows [first, end), every `by`-th, in columns i to i + 7: f(row, column,
// low, high) sets them, which are 0 from row `rows` on.
template <class Tile, class F>
__device__ __forceinline__ void fill_pairs(int first, int rows, int end, int by, int i, Tile& tile,
                                           F&& f) {
#pragma unroll 1
  for (int row = first; row < end; row += by) {
#pragma unroll 1
    for (int j = 0; j < 8; j += 2) {
      float low = 0, high = 0;
      if (row < rows) f(row, i + j, low, high);
      tile.put(row, i + j, low, high);
    }
  }
}

// The first `rows` of a slice into a tile, and zeros up to row `end`: beside the threads where 8
// bfloat16 numbers lie together. By all threads.
template <int kTerms, int kRows, int kColumns>
__device__ __forceinline__ void fetch_rows(const Slice& x, int rows, int end,
                                           TermTile<kTerms, kRows, kColumns>& tile) {
  constexpr int kPacks = kColumns / 8, kAtOnce = kGradientThreads / kPacks;
  const int first = int(threadIdx.x) / kPacks, i = int(threadIdx.x) % kPacks * 8;
  if (!x.is_pack(i) || (kTerms == 1 && x.dtype != DType::kBFloat16)) {
    return fill_pairs(first, rows, end, kAtOnce, i, tile,
                      [&](int row, int column, float& low, float& high) {
                        load_pair(x, row, column, low, high);
                      });
  }
  if constexpr (kTerms == 1) {
    const char* from = x.data + 2 * x.offset(first, i);
    const int64_t by = 2 * kAtOnce * x.step;
#pragma unroll 2
    for (int row = first; row < first + kRows; row += kAtOnce, from += by) {
      if (row < end) ptx::cp_async_16(&tile.term[0].pack(row, i), from, row < rows ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < end; row += kAtOnce) {
      float v[8] = {};
      if (row < rows) load_pack(x, row, i, v);
      tile.put(row, i, v);
    }
  }
}

// dy silu(z), or 0 if there is no dy.
template <int kTerms, int kColumns>
__device__ __forceinline__ void fetch_gated(const Slice& dy, const Slice& z, int rows,
                                            TermTile<kTerms, kSteps, kColumns>& tile) {
  constexpr int kPacks = kColumns / 8, kAtOnce = kGradientThreads / kPacks;
  const int first = int(threadIdx.x) / kPacks, i = int(threadIdx.x) % kPacks * 8;
  if (!dy.is_pack(i) || !z.is_pack(i)) {
    return fill_pairs(first, rows, kSteps, kAtOnce, i, tile,
                      [&](int row, int column, float& low, float& high) {
                        float gate[2];
                        load_pair(dy, row, column, low, high);
                        load_pair(z, row, column, gate[0], gate[1]);
                        low *= silu(gate[0]), high *= silu(gate[1]);
                      });
  }
#pragma unroll 1
  for (int row = first; row < kSteps; row += kAtOnce) {
    float v[8] = {}, gate[8];
    if (row < rows) {
      load_pack(dy, row, i, v), load_pack(z, row, i, gate);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= silu(gate[j]);
    }
    tile.put(row, i, v);
  }
}

// What the steps of a piece read or write of a tensor: found once, since offsets take more
// instructions than the copies.
struct Operand {
  Slice first;          // of the task's first head
  int64_t head, block;  // bytes from head to head, and from a stage's columns to the next ones
  int rows;             // that are there

  __device__ __forceinline__ Operand(const Slice& first, int64_t head_stride, int columns, int rows)
      : first(first),
        head(head_stride * element_bytes(first.dtype)),
        block(columns * first.column * element_bytes(first.dtype)),
        rows(rows) {
    this->first.packed = first.packed && head % 16 == 0;
  }

  __device__ __forceinline__ Slice at(const Steps& steps, const Step& step) const {
    const char* data = first.data + int(step.h - steps.begin) * head + steps.block_of(step) * block;
    Slice x(data, first.dtype, first.step, first.column, steps.columns_of(step));
    x.packed = first.packed;
    return x;
  }
};

struct Operands {
  Operand x, dy, z, S, dS, dx, dz;
};

// A state before the piece or its gradient after it: what a walk saved, or where the sequence
// begins or ends what is given, (slot, head, headdim, state); 0 if there is none.
__device__ __forceinline__ Operand state_operand(const Shape& p, const void* saved, bool is_saved,
                                                 int64_t row, const View<4>& given, int64_t slot,
                                                 int64_t head, int columns) {
  const int states = int(p.state);
  if (is_saved || !given || slot < 0) {
    const DType dtype = p.cell_dtype();
    const int64_t size = p.state * p.headdim;  // of (batch, cell, head, state, headdim)
    const char* data = static_cast<const char*>(saved) + row * size * element_bytes(dtype);
    return Operand(Slice(data, dtype, p.headdim, 1, 0), size, columns, is_saved ? states : 0);
  }
  const int64_t at = slot * given.stride[0] + head * given.stride[1];
  const char* data = static_cast<const char*>(given.data) + at * element_bytes(given.dtype);
  return Operand(Slice(data, given.dtype, given.stride[3], given.stride[2], 0), given.stride[1],
                 columns, states);
}

// Each by another warp; a barrier before they are read.
__device__ __forceinline__ void find_operands(const GradientParams& p, const CellSums<float>& cell,
                                              const Piece& piece, const Steps& steps, int warp,
                                              Operands& to) {
  if (ptx::lane() > 0) return;
  const int64_t h = steps.begin;
  auto rows_of = [&](const View<4>& x) {
    return Operand(Slice(x, piece, h, 0, 0), x.stride[2], steps.columns, piece.rows);
  };
  switch (warp) {
    case 0: to.x = rows_of(p.x); break;
    case 1:
      to.dy = rows_of(p.dy ? p.dy : p.x);
      if (!p.dy) to.dy.rows = 0;
      break;
    case 2:
      if (p.z) to.z = rows_of(p.z);
      break;
    case 3:
      to.S = state_operand(p, p.cell_states, piece.entry && !piece.first, cell.row(h),
                           p.initial_state, piece.from, h, steps.columns);
      break;
    case 4:
      to.dS = state_operand(p, p.dcell_states, piece.exit && !piece.last, cell.row(h),
                            p.dlast_state, piece.to, h, steps.columns);
      break;
    case 5: to.dx = rows_of(p.dx); break;
    case 6:
      if (p.z) to.dz = rows_of(p.dz);
      break;
  }
}

// The operands of a step into a stage, which this commits to come beside the threads.
template <int kN, int kTerms>
__device__ __forceinline__ void fetch_step(const GradientParams& p, Operands& from,
                                           const Steps& steps, const Step& step,
                                           GradientStage<kN, kTerms>& stage) {
  fetch_rows(from.x.at(steps, step), from.x.rows, kSteps, stage.x);
  if (p.z) {
    fetch_gated(from.dy.at(steps, step), from.z.at(steps, step), from.dy.rows, stage.g);
  } else {
    fetch_rows(from.dy.at(steps, step), from.dy.rows, kSteps, stage.g);
  }
  if (steps.has_states(step)) {
    const int end = round_up(int(p.state), 16);
    fetch_rows(from.S.at(steps, step), from.S.rows, end, stage.S);
    fetch_rows(from.dS.at(steps, step), from.dS.rows, end, stage.dS);
  }
  ptx::cp_async_commit();
}

}  // namespace statescan::ssd_scan::cuda
