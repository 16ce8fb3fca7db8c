// cross_merge of large channel-first maps on the GPU. A block owns a tile of 64 x 64 tokens, whose sums
// are in registers, and adds the routes in their order: those along rows as they are read, those along
// columns by way of shared memory. float32 throughout; each result is rounded and written once.
#include <algorithm>

#include "common/launch.h"
#include "cross_scan/tiles.cuh"
#include "route_gather/results.cuh"

namespace statescan::cross_scan::cuda {
namespace {

using route_gather::cuda::store_result;

// A thread's packs of one route: of rows, or of columns if the route goes along columns.
template <class T, int kWidth>
struct Packs {
  using At = PackAt<kWidth>;
  Pack<T, kWidth> x[At::kCount];

  __device__ __forceinline__ void load(const T* from, const Block& at, const MapRoutes& r,
                                       const MapRoute& route) {
    const bool rows = route.along_rows, back = (rows ? route.dj : route.di) < 0;
    const int lines = rows ? r.H : r.W, length = rows ? r.W : r.H;
    const int64_t to_next_line = rows ? route.di : route.dj;
    constexpr int kLinesApart = kThreads / At::kInLine;  // of a thread's packs
    const At pack(0);
    const int line = (rows ? at.i0 : at.j0) + pack.line;
    const int first = (rows ? at.j0 : at.i0) + pack.first;
    const T* p = from + route.begin + line * to_next_line;
    p += back ? -(first + kWidth - 1) : first;
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      // What is outside of the map is not stored.
      if (first < length && line + n * kLinesApart < lines) x[n] = Pack<T, kWidth>::load(p);
      p += kLinesApart * to_next_line;
    }
  }
};

template <class T, int kWidth>
struct Sums {
  using At = PackAt<kWidth>;
  float of[At::kCount][kWidth];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) of[n][c] = 0;
    }
  }

  // A route along rows: a thread's packs are its own.
  __device__ __forceinline__ void add_rows(const Packs<T, kWidth>& packs, bool back) {
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      float number[kWidth];
      packs.x[n].unpack(number);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) of[n][c] += back ? number[kWidth - 1 - c] : number[c];
    }
  }

  // A route along columns: packs of columns into the tile, packs of rows out of it.
  __device__ __forceinline__ void add_columns(const Packs<T, kWidth>& packs, bool back,
                                              Tile<T>& tile) {
    __syncthreads();  // the route before has been read
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      const At pack(n);
      T element[kWidth];
      split(packs.x[n], element);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        tile.element[Tile<T>::at(pack.first + c, pack.line)] =
            back ? element[kWidth - 1 - c] : element[c];
      }
    }
    __syncthreads();  // the tile is written
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      const At pack(n);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        of[n][c] += to_number(tile.element[Tile<T>::at(pack.line, pack.first + c)]);
      }
    }
  }

  static __device__ __forceinline__ void split(const Pack<T, kWidth>& x, T (&element)[kWidth]) {
    if constexpr (kWidth == 1) {
      element[0] = x.bits;
    } else {
      const uint32_t words[4] = {x.bits.x, x.bits.y, x.bits.z, x.bits.w};
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        if constexpr (sizeof(T) == 4) {
          element[c] = bits_to_float(words[c]);
        } else {
          element[c] = T{uint16_t(words[c / 2] >> (c % 2 * 16))};
        }
      }
    }
  }
};

// Block: a tile. Grid over (batch, pass over the routes, dim, tile of the map); shared memory: a tile.
template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, kWidth == 8 ? 3 : 2) void tile_kernel(
    const __grid_constant__ MergeParams p, const TileGrid grid, float scale) {
  Tile<T>& tile = block_shared<Tile<T>>();
  const MapRoutes& r = p.routes;
  for (int64_t task = blockIdx.x; task < grid.tasks; task += gridDim.x) {
    const Block at = grid.block(task);
    const T* from =
        static_cast<const T*>(p.stack.data) + at.b * p.stack.stride[0] + at.d * p.stack.stride[2];
    Sums<T, kWidth> sums;
    sums.clear();
    // The packs of the next route are on their way while one is added, if registers allow it.
    constexpr bool kAhead = kWidth > 1;
    Packs<T, kWidth> packs, next;
    auto load = [&](int k, Packs<T, kWidth>& to) {
      if (k < at.k1) to.load(from + k * p.stack.stride[1], at, r, r.route[k]);
    };
    load(at.k0, next);
    for (int k = at.k0; k < at.k1; ++k) {
      packs = next;
      if constexpr (kAhead) load(k + 1, next);
      if (r.route[k].along_rows) {
        sums.add_rows(packs, r.route[k].dj < 0);
      } else {
        sums.add_columns(packs, r.route[k].di < 0, tile);
      }
      if constexpr (!kAhead) load(k + 1, next);
    }
    const int64_t to =
        at.b * p.tokens.stride[0] + at.k0 * p.tokens.stride[1] + at.d * p.tokens.stride[2];
#pragma unroll
    for (int n = 0; n < PackAt<kWidth>::kCount; ++n) {
      const PackAt<kWidth> pack(n);
      const int i = at.i0 + pack.line, j = at.j0 + pack.first;
      if (i >= r.H || j >= r.W) continue;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sums.of[n][c] *= scale;
      store_result<T>(p.tokens, to + i * r.W + j, true, sums.of[n]);
    }
  }
}

template <class T>
void launch_tiles(const MergeParams& p, cudaStream_t stream) {
  constexpr int kWidth = kPackSize<T>;
  const bool packed = in_packs<kWidth>(p.tokens, p.routes) && in_packs<kWidth>(p.stack, p.routes);
  const TileGrid grid = TileGrid::of(p.batch, p.dim, p.routes, !p.sum);
  launch("cross_merge, tiles", packed ? tile_kernel<T, kWidth> : tile_kernel<T, 1>,
         blocks_for(grid.tasks, 1), kThreads, 0, stream, p, grid,
         p.mean ? 1.0f / p.routes.count : 1.0f);
}

}  // namespace

void merge(const MergeParams& p, cudaStream_t stream) {
  switch (p.stack.dtype) {
    case DType::kFloat32: return launch_tiles<float>(p, stream);
    case DType::kFloat16: return launch_tiles<Half>(p, stream);
    case DType::kBFloat16: return launch_tiles<BFloat16>(p, stream);
    case DType::kFloat64: return;
  }
}

}  // namespace statescan::cross_scan::cuda
