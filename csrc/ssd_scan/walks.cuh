// What the walks with and without tensor cores share.
#pragma once

#include <algorithm>

#include "ssd_scan/pieces.cuh"

namespace statescan::ssd_scan::cuda {

// One block's share of a walk: some columns of one or more neighbouring heads along a part.
struct WalkTask {
  int64_t part, b, head, column;
  int64_t begin, end;  // cells, in the order of the walk

  // (part, batch, head) of carry and factor.
  __device__ __forceinline__ int64_t carry_row(const Shape& p) const {
    return (part * p.batch + b) * p.heads + head;
  }
};

// Columns vary fastest, then heads: neighbouring blocks share B and C. `heads`: blocks of them.
__device__ __forceinline__ WalkTask walk_task(const WalkParams& p, int64_t i, int64_t columns,
                                              int64_t heads_of_block) {
  const int64_t heads = p.heads / heads_of_block, cells = p.cells();
  WalkTask t;
  t.column = i % columns, i /= columns;
  t.head = i % heads * heads_of_block, i /= heads;
  t.b = i % p.batch, t.part = i / p.batch;
  t.begin = cells * t.part / p.parts, t.end = cells * (t.part + 1) / p.parts;
  return t;
}

// The cell that the walk comes to as its j-th.
__device__ __forceinline__ int64_t walked_cell(const WalkParams& p, int64_t j) {
  return p.reverse != p.backward ? p.cells() - 1 - j : j;
}

// (chunk, head, headdim, state) of one batch element.
__device__ __forceinline__ View<4> chunk_view(const View<5>& x, int64_t b) {
  View<4> v = {static_cast<char*>(x.data) + b * x.stride[0] * element_bytes(x.dtype), x.dtype, {}};
#pragma unroll
  for (int i = 0; i < 4; ++i) v.stride[i] = x.stride[i + 1];
  return v;
}

// Walks a piece: `body` has the state of one or more heads and the operands.
template <class Body>
__device__ __forceinline__ void walk_piece(const WalkParams& p, const Cell& cell,
                                           const Piece& piece, Body& body) {
  const bool back = p.backward;
  if (piece.padding || (back ? piece.last : piece.first)) {
    body.restart(p.enter && !piece.padding ? (back ? piece.to : piece.from) : -1);
  }
  if (!p.summarize && (back ? piece.exit : piece.entry)) body.save(cell);
  if (piece.padding) {
    if (!back && !p.summarize) body.clear_outputs(piece);
    return;
  }
  body.advance(piece);
  if (back && cell.chunk_entry && piece.entry && p.chunk_states) body.add_chunk_gradient(cell);
  if (p.summarize || !p.leave) return;
  const int64_t slot = back ? (piece.first ? piece.from : -1) : (piece.last ? piece.to : -1);
  if (slot >= 0) body.leave(slot);
}

// Where a block is: in shared memory rather than in every thread's registers.
struct WalkPlace {
  WalkTask task;
  Cell cell;
  Piece piece;
  Marks marks;
};

// Walks the cells of the task at `place`, by all threads of the block.
template <class Body>
__device__ __forceinline__ void walk_cells(const WalkParams& p, WalkPlace& place, Body& body) {
  for (int64_t j = place.task.begin; j < place.task.end; ++j) {
    __syncthreads();  // the cell before is done with
    if (threadIdx.x == 0) place.cell = cell_at(p, walked_cell(p, j));
    __syncthreads();  // the cell is known
    load_marks(p, place.task.b, place.cell, place.marks);
    const int rows = place.cell.rows;
    for (int row = p.backward ? rows : 0; p.backward ? row > 0 : row < rows;) {
      __syncthreads();  // the marks are in place, the piece before is done with
      if (threadIdx.x == 0) {
        const Pieces pieces(p, place.task.b, place.cell, place.marks);
        place.piece = p.backward ? pieces.until(row) : pieces.from(row);
      }
      __syncthreads();  // the piece is known
      walk_piece(p, place.cell, place.piece, body);
      row = p.backward ? place.piece.row : place.piece.row + place.piece.rows;
    }
  }
}

// Scratch of blocks that take `elements` each: shared up to what leaves two blocks on an SM of
// sm_80, else global for as many blocks as may be running.
inline Room room_for(const Shape& p, int64_t elements, int64_t tasks) {
  constexpr int64_t kMostShared = 76 * 1024, kMostBlocks = 2 * 132;
  const bool is_shared = elements * element_bytes(p.compute) <= kMostShared;
  return {elements, is_shared ? tasks : std::min(tasks, kMostBlocks), is_shared};
}

}  // namespace statescan::ssd_scan::cuda
