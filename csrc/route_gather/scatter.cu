// route_scatter and cross_merge on the GPU. A gather by the inverse: whoever writes a token adds up its
// visits, in the order of routes and steps, in float32, and rounds once. No atomics, and each result is
// written once, so the sums are the same bits in every run. Three ways, as in gather.cu:
//
//   rows     both sides channel-last: threads take 16 bytes of a row of the result each.
//   planes   the steps of all routes of a few channels are read once into shared memory, as they lie in
//            memory, and every token picks its visits from there.
//   any      one number at a time: what is left, and all of double.
#include <type_traits>

#include "common/launch.h"
#include "route_gather/cuda.h"
#include "route_gather/planes.cuh"
#include "route_gather/results.cuh"

namespace statescan::route_gather::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t first_route(const ScatterParams& p, int64_t b, int64_t k) {
  return (p.visits.per_batch ? b * p.visits.count : 0) + k;
}

// ---- rows

constexpr int kRoutes = 4;  // whose visits are on their way together

// The sum of one pack of channels over the visits of token l, by the routes k0 ... k0 + routes - 1.
template <class T>
__device__ __forceinline__ void sum_rows(const ScatterParams& p, int64_t b, int64_t k0, int routes,
                                         int64_t l, const T* from, float (&sum)[kPackSize<T>]) {
  constexpr int kPack = kPackSize<T>;
  const Visits& v = p.visits;
  const int32_t* first = v.first + first_route(p, b, k0) * v.length + l;
  const int32_t* next = v.next + first_route(p, b, k0) * v.steps;
  int visits = 0;
#pragma unroll
  for (int c = 0; c < kPack; ++c) sum[c] = 0;
  auto add = [&](const Pack<T, kPack>& pack) {
    float x[kPack];
    pack.unpack(x);
#pragma unroll
    for (int c = 0; c < kPack; ++c) sum[c] += x[c];
    ++visits;
  };
  for (int k = 0; k < routes; k += kRoutes) {
    Pack<T, kPack> pack[kRoutes];
    int32_t step[kRoutes];
    auto row = [&](int i, int32_t t) {
      return from + (k + i) * p.stack.stride[1] + t * p.stack.stride[3];
    };
    // Without branches: past the last route the last, and for a token that is not visited any step.
#pragma unroll
    for (int i = 0; i < kRoutes; ++i) {
      step[i] = __ldg(first + (k + i < routes ? k + i : routes - 1) * v.length);
    }
#pragma unroll
    for (int i = 0; i < kRoutes; ++i) {
      pack[i] =
          Pack<T, kPack>::load(row(k + i < routes ? i : routes - 1 - k, step[i] < 0 ? 0 : step[i]));
      if (k + i >= routes) step[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kRoutes; ++i) {
      if (step[i] < 0) continue;
      add(pack[i]);
      if (v.next == nullptr) continue;
      for (int32_t t = next[(k + i) * v.steps + step[i]]; t >= 0; t = next[(k + i) * v.steps + t]) {
        add(Pack<T, kPack>::load(row(i, t)));
      }
    }
  }
  if (!p.mean || visits < 2) return;
#pragma unroll
  for (int c = 0; c < kPack; ++c) sum[c] *= 1.0f / visits;
}

// Block: a chunk of rows of the result, l or (l, k), as they lie in memory. Grid over (batch, chunk).
template <class T>
__global__ __launch_bounds__(kThreads) void rows_kernel(const ScatterParams p, SmallDivisor packs,
                                                        SmallDivisor routes, Divisor chunks,
                                                        int64_t rows_of_chunk, int64_t tasks) {
  constexpr int kPack = kPackSize<T>;
  const int64_t rows = p.visits.length * routes.divisor;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t chunk;
    const int64_t b = chunks.divide(task, chunk);
    const int64_t first_row = chunk * rows_of_chunk, left = rows - first_row;
    const unsigned here = unsigned((left < rows_of_chunk ? left : rows_of_chunk) * packs.divisor);
    const int64_t l0 = first_row / routes.divisor;
    const unsigned k0 = unsigned(first_row - l0 * routes.divisor);
    const T* from = static_cast<const T*>(p.stack.data) + b * p.stack.stride[0];
    const int64_t to = (b * rows + first_row) * p.dim;
    for (unsigned at = threadIdx.x; at < here; at += kThreads) {
      unsigned pack, k;
      const unsigned row = packs.divide(at, pack);
      const int64_t l = l0 + routes.divide(k0 + row, k);
      float sum[kPack];
      sum_rows<T>(p, b, k, p.sum ? int(p.visits.count) : 1, l,
                  from + k * p.stack.stride[1] + pack * kPack, sum);
      store_result<T>(p.tokens, to + int64_t(at) * kPack, true, sum);
    }
  }
}

// ---- planes

constexpr int kPlanesThreads = 256;  // two blocks to an SM, by shared memory

struct PlanesGrid {
  int capacity;  // channels of a block
  int pitch;     // of a plane
  int routes;    // of a block: all, or one where they are not summed
  bool last;     // the result is channel-last
  bool packed;   // and is written in packs
  Staging staging;
  SmallDivisor inner;  // packs of tokens, or of channels if `last`
  Divisor groups, passes;
  int64_t tasks;
};

// The results of kTokens neighbouring tokens from l0 on, of kChannels channels from c0 on, stored along
// tokens, or (kRow) along channels. The planes are those of routes k0 ... of batch element b, and of
// channels d0 ...
template <class T, int kTokens, int kChannels, bool kRow>
__device__ __forceinline__ void emit(const ScatterParams& p, const PlanesGrid& g, const T* planes,
                                     int64_t b, int64_t k0, int64_t d0, int channels, int l0,
                                     int c0) {
  const Visits& v = p.visits;
  const int steps = int(v.steps);
  float sum[kChannels][kTokens];
  int visits[kTokens], plane[kChannels];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) visits[i] = 0;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    // Past the last channel the last one again, which is not stored.
    plane[c] = (c0 + c < channels ? c0 + c : channels - 1) * g.pitch;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) sum[c][i] = 0;
  }
  for (int k = 0; k < g.routes; ++k) {
    const int64_t route = first_route(p, b, k0) + k;
    const T* of_route = planes + k * g.capacity * g.pitch;
    int step[kTokens];
    if constexpr (kTokens > 1) {
      load_entries(v.first + route * v.length + l0, step);
    } else {
      step[0] = __ldg(v.first + route * v.length + l0);
    }
    for (bool more = true; more;) {  // once, where no token comes twice
      more = false;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int at = skewed<T>(step[i] < 0 ? steps : step[i]);
        visits[i] += step[i] >= 0;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[c][i] += to_number(of_route[plane[c] + at]);
        if (v.next == nullptr) continue;
        step[i] = step[i] < 0 ? -1 : v.next[route * v.steps + step[i]];
        more = more || step[i] >= 0;
      }
    }
  }
  if (p.mean) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float scale = visits[i] > 1 ? 1.0f / visits[i] : 1.0f;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[c][i] *= scale;
    }
  }
  const int64_t to = b * p.tokens.stride[0] + k0 * p.tokens.stride[1] +
                     (d0 + c0) * p.tokens.stride[2] + l0 * p.tokens.stride[3];
  if constexpr (!kRow) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c0 + c < channels) {
        store_result<T>(p.tokens, to + c * p.tokens.stride[2], true, sum[c]);
      }
    }
  } else if (c0 + kChannels <= channels && p.dim % kChannels == 0) {
    float row[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) row[c] = sum[c][0];
    store_result<T>(p.tokens, to, true, row);
  } else {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c0 + c < channels) store_element(p.tokens.data, p.tokens.dtype, to + c, sum[c][0]);
    }
  }
}

// Block: `capacity` channels of a batch element, and of one route where they are not summed. Grid over
// (batch, pass over the routes, group of channels); shared memory: a plane for each route and channel.
template <class T>
__global__ __launch_bounds__(kPlanesThreads, 2) void planes_kernel(const ScatterParams p,
                                                                   const PlanesGrid g) {
  constexpr int kPack = kPackSize<T>;
  using E = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  E* planes = dynamic_shared<E>();
  const int steps = int(p.visits.steps);
  for (int64_t task = blockIdx.x; task < g.tasks; task += gridDim.x) {
    int64_t group, k0;
    const int64_t b = g.passes.divide(g.groups.divide(task, group), k0);
    const int64_t d0 = group * g.capacity, left = p.dim - d0;
    const int channels = int(left < g.capacity ? left : g.capacity);
    const E* from = static_cast<const E*>(p.stack.data) + b * p.stack.stride[0] +
                    k0 * p.stack.stride[1] + d0 * p.stack.stride[2];
    __syncthreads();  // the planes of the task before have been read
    for (int k = 0; k < g.routes; ++k) {
      E* of_route = planes + k * g.capacity * g.pitch;
      stage(of_route, g.pitch,
            Source<E>{from + k * p.stack.stride[1], p.stack.stride[2], p.stack.stride[3], channels,
                      steps},
            g.staging);
      for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        of_route[c * g.pitch + skewed<E>(steps)] = 0;
      }
    }
    __syncthreads();  // the planes are written
    const T* numbers = reinterpret_cast<const T*>(planes);
    // Channels in fours where tokens come in packs; one pack of them where the result is a row.
    const int fours = (channels + 3) / 4;
    const unsigned rows = g.last ? unsigned(p.visits.length) : unsigned(fours);
    for (unsigned at = threadIdx.x; at < rows * g.inner.divisor; at += blockDim.x) {
      unsigned inner;
      const int row = int(g.inner.divide(at, inner));
      if (g.last) {
        const int c0 = int(inner) * kPack;
        if (c0 < channels) {
          emit<T, 1, kPack, true>(p, g, numbers, b, k0, d0, channels, row, c0);
        }
      } else if (g.packed) {
        emit<T, kPack, 4, false>(p, g, numbers, b, k0, d0, channels, int(inner) * kPack, row * 4);
      } else {
        emit<T, 1, 4, false>(p, g, numbers, b, k0, d0, channels, int(inner), row * 4);
      }
    }
  }
}

// ---- any

// Thread: one number of the result, as they lie in memory. Grid over all of them.
template <class R>
__global__ __launch_bounds__(kThreads) void any_kernel(const ScatterParams p, bool last,
                                                       Divisor length, Divisor dim, Divisor routes,
                                                       int64_t tasks) {
  const Visits& v = p.visits;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t b, k0, d, l;
    if (last) {
      b = length.divide(routes.divide(dim.divide(task, d), k0), l);
    } else {
      b = routes.divide(dim.divide(length.divide(task, l), d), k0);
    }
    const int64_t from = b * p.stack.stride[0] + d * p.stack.stride[2];
    const int64_t end = p.sum ? v.count : k0 + 1;
    R sum = 0;
    int64_t visits = 0;
    for (int64_t k = k0; k < end; ++k) {
      const int64_t route = first_route(p, b, k);
      for (int32_t t = v.first[route * v.length + l]; t >= 0;
           t = v.next ? v.next[route * v.steps + t] : -1) {
        sum += load_element<R>(p.stack.data, p.stack.dtype,
                               from + k * p.stack.stride[1] + t * p.stack.stride[3]);
        ++visits;
      }
    }
    if (p.mean && visits > 1) sum *= R(1) / R(visits);
    store_element(p.tokens.data, p.tokens.dtype, task, sum);
  }
}

// ---- launches

bool channel_last(const ScatterParams& p) {
  return p.tokens.stride[2] == 1 && p.tokens.stride[3] != 1;
}

template <class T>
void launch_rows(const ScatterParams& p, cudaStream_t stream) {
  constexpr int64_t kPack = kPackSize<T>, kPacks = 4 * kThreads;  // of a chunk
  const int64_t routes = p.sum ? 1 : p.visits.count, rows = p.visits.length * routes;
  const int64_t packs = p.dim / kPack, rows_of_chunk = kPacks / packs + 1;
  const int64_t chunks = (rows - 1) / rows_of_chunk + 1, tasks = p.batch * chunks;
  launch("route_scatter, rows", rows_kernel<T>, blocks_for(tasks, 1), kThreads, 0, stream, p,
         SmallDivisor(packs), SmallDivisor(routes), Divisor(chunks), rows_of_chunk, tasks);
}

template <class T>
bool rows_in_packs(const ScatterParams& p) {
  const View<4>& v = p.stack;
  constexpr int64_t kPack = kPackSize<T>;
  return channel_last(p) && v.stride[2] == 1 && p.dim % kPack == 0 && v.stride[0] % kPack == 0 &&
         v.stride[1] % kPack == 0 && v.stride[3] % kPack == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

template <class T>
bool launch_planes(const ScatterParams& p, cudaStream_t stream) {
  constexpr int64_t kPack = kPackSize<T>;
  using E = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  const Visits& v = p.visits;
  const int64_t routes = p.sum ? v.count : 1;
  if (v.steps * routes * int64_t(sizeof(T)) > kSharedBytes) return false;
  const bool last = channel_last(p), rows = last || p.stack.stride[3] != 1;
  const int64_t bytes_of_one = plane_pitch<E>(v.steps) * int64_t(sizeof(T)) * routes;
  // A table is read for four channels at a time; but all SMs shall have blocks.
  int64_t capacity = std::min<int64_t>(kSharedBytes / bytes_of_one, rows ? 32 : 8);
  if (capacity == 0) return false;
  if (!rows) capacity = std::min(capacity, std::max<int64_t>(p.batch * p.dim / 264, 1));
  if (capacity >= kPack) capacity = capacity / kPack * kPack;
  capacity = std::min(capacity, p.dim);
  if (last && capacity < std::min(p.dim, kPack)) return false;
  if (v.length * std::max<int64_t>(capacity, 4) > (int64_t(1) << 30)) return false;
  const bool packed = v.length % kPack == 0;
  const int64_t inner = last     ? (capacity + kPack - 1) / kPack
                        : packed ? v.length / kPack
                                 : v.length;
  PlanesGrid g{int(capacity),
               int(plane_pitch<E>(v.steps)),
               int(routes),
               last,
               packed,
               Staging::of(p.stack, capacity, v.steps, kPack),
               SmallDivisor(inner),
               Divisor((p.dim - 1) / capacity + 1),
               Divisor(p.sum ? 1 : v.count),
               0};
  if (g.staging.along_channels && p.dim % kPack != 0) {
    g.staging.packed = false;
    g.staging.inner = SmallDivisor(capacity);
  }
  g.tasks = p.batch * int64_t(g.passes.divisor) * int64_t(g.groups.divisor);
  const int64_t bytes = capacity * bytes_of_one;
  launch("route_scatter, planes", planes_kernel<T>, blocks_for(g.tasks, 1), kPlanesThreads,
         size_t(bytes), stream, p, g);
  return true;
}

template <class R>
void launch_any(const ScatterParams& p, cudaStream_t stream) {
  const int64_t routes = p.sum ? 1 : p.visits.count;
  const int64_t tasks = p.batch * routes * p.dim * p.visits.length;
  launch("route_scatter, any", any_kernel<R>, blocks_for(tasks, kThreads), kThreads, 0, stream, p,
         channel_last(p), Divisor(p.visits.length), Divisor(p.dim), Divisor(routes), tasks);
}

template <class T>
void scatter_as(const ScatterParams& p, cudaStream_t stream) {
  if (rows_in_packs<T>(p)) return launch_rows<T>(p, stream);
  const bool rows = channel_last(p) && p.stack.stride[2] == 1;
  if (rows || !launch_planes<T>(p, stream)) launch_any<float>(p, stream);
}

}  // namespace

void scatter(const ScatterParams& p, cudaStream_t stream) {
  if (p.batch * p.dim * p.visits.length * (p.sum ? 1 : p.visits.count) == 0) return;
  if (p.compute == DType::kFloat64) return launch_any<double>(p, stream);
  switch (p.stack.dtype) {
    case DType::kFloat32: return scatter_as<float>(p, stream);
    case DType::kFloat16: return scatter_as<Half>(p, stream);
    case DType::kBFloat16: return scatter_as<BFloat16>(p, stream);
    case DType::kFloat64: return;
  }
}

}  // namespace statescan::route_gather::cuda
