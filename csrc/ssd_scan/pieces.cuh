// How a cell falls into pieces: neighbouring steps of one sequence, or padding. Rows of a cell and
// of a piece are its steps in the order of the scan.
#pragma once

#include "common/marks.cuh"
#include "common/shared.cuh"
#include "ssd_scan/cuda.h"

namespace statescan::ssd_scan::cuda {

struct Cell {
  int64_t index, chunk;
  int64_t begin;     // in time
  int rows;          // steps
  bool chunk_entry;  // the scan enters the chunk here
  bool first, last;  // of all cells, in the order of the scan
};

__device__ __forceinline__ Cell cell_at(const Shape& p, int64_t index) {
  const int64_t per_chunk = p.cells_per_chunk(), size = p.cell();
  Cell c;
  c.index = index, c.chunk = index / per_chunk;
  const int64_t within = index - c.chunk * per_chunk, chunk_begin = c.chunk * p.chunk;
  const int64_t left = p.seqlen - chunk_begin, chunk_steps = left < p.chunk ? left : p.chunk;
  c.begin = chunk_begin + within * size;
  const int64_t rows = chunk_steps - within * size;
  c.rows = int(rows < size ? rows : size);
  c.chunk_entry = p.reverse ? within * size + c.rows == chunk_steps : within == 0;
  const bool at_begin = c.begin == 0, at_end = c.begin + c.rows == p.seqlen;
  c.first = p.reverse ? at_end : at_begin, c.last = p.reverse ? at_begin : at_end;
  return c;
}

struct Piece {
  int64_t b, begin;  // the first row's step, in time
  int step;          // from one row to the next, in time: 1 or -1
  int row, rows;     // its first row in the cell, and how many
  bool first, last;  // of its sequence
  bool entry, exit;  // it has the cell's first, last row
  bool padding;
  int64_t from, to;  // slots of the sequence's initial and last state where they are here, or -1

  // Of a row; `shift` steps before it.
  __device__ __forceinline__ int64_t time(int i, int shift = 0) const {
    return begin + int64_t(step) * (i - shift);
  }
};

// What the cell's rows are, and the step after them.
using Marks = SharedArray<int, kTile + 1>;

// By so many threads; a barrier before the marks are read.
__device__ __forceinline__ void load_marks(const Inputs& p, int64_t b, const Cell& cell,
                                           Marks& marks, int thread = int(threadIdx.x),
                                           int threads = int(blockDim.x)) {
  for (int i = thread; i <= cell.rows; i += threads) {
    const int64_t t = p.reverse ? cell.begin + cell.rows - 1 - i : cell.begin + i;
    const bool there = t >= 0 && t < p.seqlen;
    int mark = there ? 0 : int(kStart);
    if (p.marks != nullptr) {
      if (there) mark = p.marks[b * p.seqlen + t];
    } else {
      if (i == 0 && cell.first) mark |= kStart | kFromSlot;
      if (i == cell.rows - 1 && cell.last) mark |= kToSlot;
    }
    marks[i] = mark;
  }
}

class Pieces {
 public:
  __device__ __forceinline__ Pieces(const Inputs& p, int64_t b, const Cell& cell, Marks& marks)
      : p_(p), b_(b), cell_(cell), marks_(marks) {}

  // The piece that begins with a row, or that ends before a row.
  __device__ __forceinline__ Piece from(int begin) const {
    int end = p_.marks == nullptr ? cell_.rows : begin + 1;
    while (end < cell_.rows && !begins(end)) ++end;
    return piece(begin, end);
  }
  __device__ __forceinline__ Piece until(int end) const {
    int begin = p_.marks == nullptr ? 0 : end - 1;
    while (begin > 0 && !begins(begin)) --begin;
    return piece(begin, end);
  }

 private:
  __device__ __forceinline__ bool begins(int row) const {
    return marks_[row] & kStart || (marks_[row] ^ marks_[row - 1]) & kPadding;
  }

  __device__ __forceinline__ Piece piece(int begin, int end) const {
    Piece x;
    x.b = b_, x.step = p_.reverse ? -1 : 1;
    x.begin = p_.reverse ? cell_.begin + cell_.rows - 1 - begin : cell_.begin + begin;
    x.row = begin, x.rows = end - begin;
    x.padding = marks_[begin] & kPadding;
    x.first = marks_[begin] & kStart, x.last = begins(end);
    x.entry = begin == 0, x.exit = end == cell_.rows;
    x.from = slot(marks_[begin], kFromSlot, x.time(0));
    x.to = slot(marks_[end - 1], kToSlot, x.time(x.rows - 1));
    return x;
  }

  __device__ __forceinline__ int64_t slot(int mark, int flag, int64_t t) const {
    return mark & flag ? marked_slot(p_.sequences, p_.slots_per_row, b_, t) : -1;
  }

  const Inputs& p_;
  int64_t b_;
  const Cell& cell_;
  Marks& marks_;
};

}  // namespace statescan::ssd_scan::cuda
