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
  __device__ __forceinline__ void add_rows(const T* from, const Block& at, const MapRoutes& r,
                                           const MapRoute& route) {
    const bool back = route.dj < 0;
    Pack<T, kWidth> x[At::kCount];
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      const At pack(n);
      const int64_t i = at.i0 + pack.line, j = at.j0 + pack.first;
      if (i >= r.H || j >= r.W) continue;
      const int64_t t = route.begin + i * route.di + j * route.dj;
      x[n] = Pack<T, kWidth>::load(from + first_step<kWidth>(t, back));
    }
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      float number[kWidth];
      x[n].unpack(number);  // those outside of the map are not stored
#pragma unroll
      for (int c = 0; c < kWidth; ++c) of[n][c] += back ? number[kWidth - 1 - c] : number[c];
    }
  }

  // A route along columns: packs of columns into the tile, packs of rows out of it.
  __device__ __forceinline__ void add_columns(const T* from, const Block& at, const MapRoutes& r,
                                              const MapRoute& route, Tile<T>& tile) {
    const bool back = route.di < 0;
    Pack<T, kWidth> x[At::kCount];
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      const At pack(n);
      const int64_t i = at.i0 + pack.first, j = at.j0 + pack.line;
      if (i >= r.H || j >= r.W) continue;
      const int64_t t = route.begin + i * route.di + j * route.dj;
      x[n] = Pack<T, kWidth>::load(from + first_step<kWidth>(t, back));
    }
    __syncthreads();  // the route before has been read
#pragma unroll
    for (int n = 0; n < At::kCount; ++n) {
      const At pack(n);
      T element[kWidth];
      split(x[n], element);
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
__global__ __launch_bounds__(kThreads) void tile_kernel(const __grid_constant__ MergeParams p,
                                                        const TileGrid grid, float scale) {
  Tile<T>& tile = block_shared<Tile<T>>();
  const MapRoutes& r = p.routes;
  for (int64_t task = blockIdx.x; task < grid.tasks; task += gridDim.x) {
    const Block at = grid.block(task);
    const T* from =
        static_cast<const T*>(p.stack.data) + at.b * p.stack.stride[0] + at.d * p.stack.stride[2];
    Sums<T, kWidth> sums;
    sums.clear();
    for (int k = at.k0; k < at.k1; ++k) {
      if (r.route[k].along_rows()) {
        sums.add_rows(from + k * p.stack.stride[1], at, r, r.route[k]);
      } else {
        sums.add_columns(from + k * p.stack.stride[1], at, r, r.route[k], tile);
      }
    }
    const int64_t to =
        at.b * p.tokens.stride[0] + at.k0 * p.tokens.stride[1] + at.d * p.tokens.stride[2];
#pragma unroll
    for (int n = 0; n < PackAt<kWidth>::kCount; ++n) {
      const PackAt<kWidth> pack(n);
      const int64_t i = at.i0 + pack.line, j = at.j0 + pack.first;
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
