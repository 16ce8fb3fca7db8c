// cross_scan of large channel-first maps on the GPU. A block reads a tile of 64 x 64 tokens once, in
// rows. Routes along rows are written from registers, those along columns by way of shared memory:
//
//   tile  ─┬─ registers ──────────▶ rows, forward or back
//          └─ shared memory ──────▶ columns, forward or back
//
// Every access to memory is 64 neighbouring elements or more, 16 bytes a thread where H, W and the
// address are multiples of that.
#include <algorithm>

#include "common/device_view.cuh"
#include "common/launch.h"
#include "cross_scan/tiles.cuh"

namespace statescan::cross_scan::cuda {
namespace {

// kWidth elements as they are in memory.
template <class E, int kWidth>
struct Bits {
  E element[kWidth];

  __device__ __forceinline__ void load(const E* p) {
    if constexpr (kWidth == 1) {
      element[0] = __ldg(p);
    } else {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(p));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
      constexpr int kInWord = 4 / int(sizeof(E));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        element[i] = E(words[i / kInWord] >> (i % kInWord * 8 * sizeof(E)));
      }
    }
  }
  __device__ __forceinline__ void store(E* p, bool back) const {
    if constexpr (kWidth == 1) {
      *p = element[0];
    } else {
      constexpr int kInWord = 4 / int(sizeof(E));
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const E x = back ? element[kWidth - 1 - i] : element[i];
        words[i / kInWord] |= uint32_t(x) << (i % kInWord * 8 * sizeof(E));
      }
      ptx::store_streaming(reinterpret_cast<uint4*>(p), {words[0], words[1], words[2], words[3]});
    }
  }
};

// Block: a tile. Grid over (batch, pass over the routes, dim, tile of the map); shared memory: a tile.
template <class E, int kWidth>
__global__ __launch_bounds__(kThreads) void tile_kernel(const __grid_constant__ ScanParams p,
                                                        const TileGrid grid) {
  using At = PackAt<kWidth>;
  Tile<E>& tile = block_shared<Tile<E>>();
  const MapRoutes& r = p.routes;
  for (int64_t task = blockIdx.x; task < grid.tasks; task += gridDim.x) {
    const Block at = grid.block(task);
    const E* from = static_cast<const E*>(p.tokens.data) + at.b * p.tokens.stride[0] +
                    at.k0 * p.tokens.stride[1] + at.d * p.tokens.stride[2];
    E* to = static_cast<E*>(p.stack.data) + at.b * p.stack.stride[0] + at.d * p.stack.stride[2];
    constexpr int kTogether = At::kCount < 4 ? At::kCount : 4;
    __syncthreads();  // the tile before has been read
#pragma unroll 1
    for (int n = 0; n < At::kCount; n += kTogether) {
      Bits<E, kWidth> x[kTogether];
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        const At pack(n + m);
        const int i = at.i0 + pack.line, j = at.j0 + pack.first;
        if (i < r.H && j < r.W) x[m].load(from + i * r.W + j);
      }
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        const At pack(n + m);
        const int i = at.i0 + pack.line, j = at.j0 + pack.first;
        if (i >= r.H || j >= r.W) continue;
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          tile.element[Tile<E>::at(pack.line, pack.first + c)] = x[m].element[c];
        }
        for (int k = at.k0; k < at.k1; ++k) {
          const MapRoute& route = r.route[k];
          if (!route.along_rows) continue;
          const int64_t t = route.begin + i * route.di + j * route.dj;
          x[m].store(to + k * p.stack.stride[1] + first_step<kWidth>(t, route.dj < 0),
                     route.dj < 0);
        }
      }
    }
    __syncthreads();  // the tile is written
#pragma unroll 1
    for (int n = 0; n < At::kCount; ++n) {
      const At pack(n);
      const int i = at.i0 + pack.first, j = at.j0 + pack.line;
      if (i >= r.H || j >= r.W) continue;
      Bits<E, kWidth> x;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        x.element[c] = tile.element[Tile<E>::at(pack.first + c, pack.line)];
      }
      for (int k = at.k0; k < at.k1; ++k) {
        const MapRoute& route = r.route[k];
        if (route.along_rows) continue;
        const int64_t t = route.begin + i * route.di + j * route.dj;
        x.store(to + k * p.stack.stride[1] + first_step<kWidth>(t, route.di < 0), route.di < 0);
      }
    }
  }
}

template <class E>
void launch_tiles(const ScanParams& p, cudaStream_t stream) {
  constexpr int kWidth = 16 / int(sizeof(E));
  const bool packed = in_packs<kWidth>(p.tokens, p.routes) && in_packs<kWidth>(p.stack, p.routes);
  const TileGrid grid = TileGrid::of(p.batch, p.dim, p.routes, p.tokens.stride[1] != 0);
  launch("cross_scan, tiles", packed ? tile_kernel<E, kWidth> : tile_kernel<E, 1>,
         blocks_for(grid.tasks, 1), kThreads, 0, stream, p, grid);
}

}  // namespace

void scan(const ScanParams& p, cudaStream_t stream) {
  if (element_bytes(p.tokens.dtype) == 2) {
    launch_tiles<uint16_t>(p, stream);
  } else {
    launch_tiles<uint32_t>(p, stream);
  }
}

}  // namespace statescan::cross_scan::cuda
