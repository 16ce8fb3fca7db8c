// What the walks with and without tensor cores share.
#pragma once

#include <algorithm>

#include "common/ptx.cuh"
#include "ssd_scan/pieces.cuh"

namespace statescan::ssd_scan::cuda {

// One block's share of a walk: some columns of one or more neighbouring heads along a part.
struct WalkTask {
  int64_t part, b, head, group, column;
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
  t.group = t.head / p.group_heads();
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

// Does the walk come into a sequence with the piece, and from which slot's state (-1: from zero)?
__device__ __forceinline__ bool enters_sequence(const WalkParams& p, const Piece& piece) {
  return piece.padding || (p.backward ? piece.last : piece.first);
}
__device__ __forceinline__ int64_t entered_slot(const WalkParams& p, const Piece& piece) {
  return !p.enter || piece.padding ? -1 : p.backward ? piece.to : piece.from;
}
// Does it come into the cell with it?
__device__ __forceinline__ bool enters_cell(const WalkParams& p, const Piece& piece) {
  return p.backward ? piece.exit : piece.entry;
}
// Is what the state of a chunk got added after the piece?
__device__ __forceinline__ bool adds_chunk_gradient(const WalkParams& p, const Cell& cell,
                                                    const Piece& piece) {
  return p.backward && p.chunk_states && cell.chunk_entry && piece.entry && !piece.padding;
}
// The slot for the state after the piece, or -1.
__device__ __forceinline__ int64_t left_slot(const WalkParams& p, const Piece& piece) {
  if (p.summarize || !p.leave || piece.padding) return -1;
  if (p.backward) return piece.first ? piece.from : -1;
  return piece.last ? piece.to : -1;
}

// Walks a piece: `body` has the state of one or more heads and the operands.
template <class Body>
__device__ __forceinline__ void walk_piece(const WalkParams& p, const Cell& cell,
                                           const Piece& piece, Body& body) {
  if (enters_sequence(p, piece)) body.restart(entered_slot(p, piece));
  if (!p.summarize && enters_cell(p, piece)) body.save(cell);
  if (piece.padding) {
    if (!p.backward && !p.summarize) body.clear_outputs(piece);
    return;
  }
  body.advance(piece);
  if (adds_chunk_gradient(p, cell, piece)) body.add_chunk_gradient(cell);
  if (const int64_t slot = left_slot(p, piece); slot >= 0) body.leave(slot);
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

// A piece on the way of a task, and its cell, the `cells`-th of the task.
struct Stop {
  bool there;  // else the way has ended
  int64_t cells;
  Cell cell;
  Piece piece;
};

// The way of a task, of which two pieces are known ahead.
struct Route {
  WalkTask task;
  Marks marks;
  SharedArray<Stop, 3> stops;

  __device__ __forceinline__ Stop& stop(int i) { return stops[(i + 3) % 3]; }
};

// Finds the i-th piece from the one before it, by one warp: the first is the 0-th.
__device__ __forceinline__ void find_stop(const WalkParams& p, Route& route, int i) {
  const Stop& from = route.stop(i - 1);
  Stop& to = route.stop(i);
  bool within = false;
  int64_t cells = 0;
  int row = 0;
  if (i > 0) {
    row = p.backward ? from.piece.row : from.piece.row + from.piece.rows;
    within = from.there && (p.backward ? row > 0 : row < from.cell.rows);
    cells = from.cells + (within ? 0 : 1);
  }
  const bool there = (i == 0 || from.there) && route.task.begin + cells < route.task.end;
  if (ptx::lane() == 0) {
    to.there = there, to.cells = cells;
    if (there) to.cell = within ? from.cell : cell_at(p, walked_cell(p, route.task.begin + cells));
  }
  if (!there) return;
  __syncwarp();  // the cell is known
  if (!within) load_marks(p, route.task.b, to.cell, route.marks, ptx::lane(), 32);
  __syncwarp();  // the marks are in place
  if (ptx::lane() == 0) {
    const Pieces pieces(p, route.task.b, to.cell, route.marks);
    if (p.backward) {
      to.piece = pieces.until(within ? row : to.cell.rows);
    } else {
      to.piece = pieces.from(within ? row : 0);
    }
  }
  __syncwarp();  // the piece is known
}

// Scratch of blocks that take `elements` each: shared up to what leaves two blocks on an SM of
// sm_80, else global for as many blocks as may be running.
inline Room room_for(const Shape& p, int64_t elements, int64_t tasks) {
  constexpr int64_t kMostShared = 76 * 1024, kMostBlocks = 2 * 132;
  const bool is_shared = elements * element_bytes(p.compute) <= kMostShared;
  return {elements, is_shared ? tasks : std::min(tasks, kMostBlocks), is_shared};
}

}  // namespace statescan::ssd_scan::cuda
