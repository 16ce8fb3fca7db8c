// Tiles of a map in shared memory, which rows go into and columns come out of, or the other way round.
#pragma once

#include "common/divisor.h"
#include "common/shared.cuh"
#include "cross_scan/cuda.h"
#include "cross_scan/tiles.h"

namespace statescan::cross_scan::cuda {

inline constexpr int kThreads = 256;

// A tile of E, rows one word longer than they are. A warp takes 8 packs of a column (16 of 32-bit
// elements) in 4 (2) neighbouring columns at a time; what is added every few rows sends them all to
// different banks.
template <class E>
struct Tile {
  static constexpr int kPitch = kTile + 4 / int(sizeof(E));
  static constexpr int kSpare = 32;
  SharedArray<E, kTile * kPitch + kSpare * 2> element;

  static __device__ __forceinline__ int at(int i, int j) {
    return i * kPitch + (sizeof(E) == 2 ? (i >> 3) * 8 : (i >> 5) * 2) + j;
  }
};

// Where a block is: a tile of one channel of one batch element, and the routes that it goes along.
struct Block {
  int64_t b, d;
  int i0, j0, k0, k1;
};

struct TileGrid {
  Divisor across, down, dim, passes;
  int routes;  // of a pass
  int64_t tasks;

  static TileGrid of(int64_t batch, int64_t channels, const MapRoutes& r, bool each) {
    const int64_t across = (int64_t(r.W) - 1) / kTile + 1, down = (int64_t(r.H) - 1) / kTile + 1;
    const int64_t passes = each ? r.count : 1;
    return {Divisor(across), Divisor(down),      Divisor(channels),
            Divisor(passes), each ? 1 : r.count, batch * channels * passes * across * down};
  }
  __device__ __forceinline__ Block block(int64_t task) const {
    Block at;
    int64_t pass, i, j;
    at.b = passes.divide(dim.divide(down.divide(across.divide(task, j), i), at.d), pass);
    at.i0 = int(i) * kTile, at.j0 = int(j) * kTile;
    at.k0 = int(pass) * routes, at.k1 = at.k0 + routes;
    return at;
  }
};

// Pack `n` of a tile that this thread has, by rows: of kWidth tokens from (i, j) on, or by columns with i
// and j exchanged.
template <int kWidth>
struct PackAt {
  static constexpr int kInLine = kTile / kWidth, kCount = kTile * kInLine / kThreads;
  int line, first;

  __device__ __forceinline__ explicit PackAt(int n) {
    const int at = int(threadIdx.x) + n * kThreads;
    line = at / kInLine, first = at % kInLine * kWidth;
  }
};

// The first of kWidth steps that visit neighbouring tokens of a line, the step of the first of which is
// t: where the route goes back along it, that of the last.
template <int kWidth>
__device__ __forceinline__ int64_t first_step(int64_t t, bool back) {
  return back ? t - (kWidth - 1) : t;
}

// Do packs of kWidth lie within rows and columns, at addresses that are multiples of them?
template <int kWidth>
bool in_packs(const View<4>& v, const MapRoutes& r) {
  return r.H % kWidth == 0 && r.W % kWidth == 0 && v.stride[0] % kWidth == 0 &&
         v.stride[1] % kWidth == 0 && v.stride[2] % kWidth == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

}  // namespace statescan::cross_scan::cuda
