// route_gather and cross_scan on the GPU. Bound by memory: each token is read once from memory and
// written once for each route that visits it. Bits are moved as they are, so the kernels know sizes of
// elements and not their types. Results are contiguous; three ways lead there:
//
//   rows     the result is channel-last: threads take its rows as they lie in memory, 16 bytes each
//            if the tokens are channel-last too, and fetch the token of each row. Any route is
//            coalesced, and a token's later visits find it in the second-level cache.
//   planes   anything else, if the tokens of a channel fit in shared memory: a block reads the planes
//            of a few channels once and picks every route from them.
//   steps    anything else that is channel-first: threads take neighbouring steps of a channel.
//
// Routes come as tables of int32, shared by all channels (and mostly by all batch elements).
#include "common/launch.h"
#include "common/ptx.cuh"
#include "route_gather/cuda.h"
#include "route_gather/planes.cuh"

namespace statescan::route_gather::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // of a thread, on their way together

// ---- rows

// Block: a chunk of rows (t, k) of a batch element, of `words` each, as they lie in memory. Grid over
// (batch, chunk). Strides in words.
template <class Word>
__global__ __launch_bounds__(kThreads) void rows_kernel(const GatherParams p, SmallDivisor words,
                                                        SmallDivisor count, Divisor chunks,
                                                        int64_t rows_of_chunk, int64_t tasks) {
  const Table& table = p.table;
  const int64_t rows = table.count * table.steps;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t chunk;
    const int64_t b = chunks.divide(task, chunk);
    const int64_t first_row = chunk * rows_of_chunk, left = rows - first_row;
    const unsigned here = unsigned((left < rows_of_chunk ? left : rows_of_chunk) * words.divisor);
    const int64_t t0 = first_row / table.count;
    const unsigned k0 = unsigned(first_row - t0 * table.count);
    const int32_t* token = table.token + (table.per_batch ? b * rows : 0);
    const Word* from = static_cast<const Word*>(p.tokens.data) + b * p.tokens.stride[0];
    Word* to = static_cast<Word*>(p.stack.data) + (b * rows + first_row) * words.divisor;
    for (unsigned first = threadIdx.x; first < here; first += kLoads * kThreads) {
      // Without branches, so that all loads are on their way together: past the end the last word
      // again, for a step of no token any token.
      Word moved[kLoads];
      unsigned word[kLoads], k[kLoads];
      int32_t l[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const unsigned at = first + i * kThreads,
                       row = words.divide(at < here ? at : here - 1, word[i]);
        const int64_t t = t0 + count.divide(k0 + row, k[i]);
        l[i] = __ldg(token + k[i] * table.steps + t);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        moved[i] = __ldg(from + k[i] * p.tokens.stride[1] + word[i] * p.tokens.stride[2] +
                         (l[i] < 0 ? 0 : l[i]) * p.tokens.stride[3]);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (l[i] < 0) moved[i] = Word{};
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const unsigned at = first + i * kThreads;
        if (at < here) to[at] = moved[i];
      }
    }
  }
}

// ---- steps

constexpr int64_t kChunk = kThreads * kLoads;  // steps of a block

// Block: kChunk steps of a row (b, k, d) of the result. Grid over (batch, route, dim, chunk).
template <class Word>
__global__ __launch_bounds__(kThreads) void steps_kernel(const GatherParams p, Divisor chunks,
                                                         Divisor dim, Divisor count,
                                                         int64_t tasks) {
  const Table& table = p.table;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t chunk, d, k;
    const int64_t row = chunks.divide(task, chunk);
    const int64_t b = count.divide(dim.divide(row, d), k);
    const int32_t* token = table.token + (table.per_batch ? b * table.count + k : k) * table.steps;
    const Word* from = static_cast<const Word*>(p.tokens.data) + b * p.tokens.stride[0] +
                       k * p.tokens.stride[1] + d * p.tokens.stride[2];
    Word* to = static_cast<Word*>(p.stack.data) + row * table.steps;
    Word moved[kLoads];
    int32_t l[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t t = chunk * kChunk + i * kThreads + threadIdx.x;
      l[i] = __ldg(token + (t < table.steps ? t : table.steps - 1));
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      moved[i] = __ldg(from + (l[i] < 0 ? 0 : l[i]) * p.tokens.stride[3]);
      if (l[i] < 0) moved[i] = Word{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t t = chunk * kChunk + i * kThreads + threadIdx.x;
      if (t < table.steps) to[t] = moved[i];
    }
  }
}

// ---- planes

constexpr int kPlanesThreads = 512;  // at most

struct PlanesGrid {
  int capacity;  // channels of a block
  int pitch;     // of a plane
  int routes;    // of a block: one, where each has tokens of its own
  bool last;     // the result is channel-last
  bool packed;   // and is written 16 bytes at a time
  Staging staging;
  SmallDivisor inner;  // packs of steps, or of channels if `last`
  Divisor groups, passes;
  int64_t tasks;
};

// Packs of kPack elements of one step after the other, from every channel of the block.
template <class E>
__device__ __forceinline__ void emit_steps(const GatherParams& p, const PlanesGrid& g,
                                           const E* planes, const int32_t* token, E* to,
                                           int channels) {
  constexpr int kPack = 16 / int(sizeof(E));
  const int64_t steps = p.table.steps;
  const unsigned tasks = g.inner.divisor * g.routes;
  for (unsigned task = threadIdx.x; task < tasks; task += blockDim.x) {
    unsigned at;
    const unsigned k = g.inner.divide(task, at);
    E* out = to + k * p.stack.stride[1];
    if (!g.packed) {
      const int l = __ldg(token + k * steps + at);
      const int from = skewed<E>(l < 0 ? int(p.table.length) : l);
      for (int c = 0; c < channels; ++c) out[c * steps + at] = planes[c * g.pitch + from];
      continue;
    }
    int from[kPack];
    load_entries(token + k * steps + at * kPack, from);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      from[i] = skewed<E>(from[i] < 0 ? int(p.table.length) : from[i]);
    }
    const E* plane = planes;
    out += at * kPack;
#pragma unroll 2
    for (int c = 0; c < channels; ++c, plane += g.pitch, out += steps) {
      E x[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) x[i] = plane[from[i]];
      ptx::store_streaming(reinterpret_cast<uint4*>(out), packed(x));
    }
  }
}

// Packs of kPack channels of a step.
template <class E>
__device__ __forceinline__ void emit_rows(const GatherParams& p, const PlanesGrid& g,
                                          const E* planes, const int32_t* token, E* to,
                                          int channels) {
  constexpr int kPack = 16 / int(sizeof(E));
  const unsigned steps = unsigned(p.table.steps);
  const int width = g.packed ? kPack : 1;
  for (int k = 0; k < g.routes; ++k) {
    for (unsigned task = threadIdx.x; task < steps * g.inner.divisor; task += blockDim.x) {
      unsigned at;
      const unsigned t = g.inner.divide(task, at);
      const int c = int(at) * width;
      if (c >= channels) continue;
      const int l = __ldg(token + k * int64_t(steps) + t);
      const E* from = planes + c * g.pitch + skewed<E>(l < 0 ? int(p.table.length) : l);
      E* out = to + k * p.stack.stride[1] + t * p.stack.stride[3] + c;
      if (!g.packed) {
        *out = *from;
        continue;
      }
      E x[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) x[i] = from[i * g.pitch];
      ptx::store_streaming(reinterpret_cast<uint4*>(out), packed(x));
    }
  }
}

// Block: `capacity` channels of a batch element, and of one route where each has its own tokens.
// Grid over (batch, pass over the routes, group of channels); shared memory: a plane for each channel.
template <class E>
__global__ __launch_bounds__(kPlanesThreads, 2) void planes_kernel(const GatherParams p,
                                                                   const PlanesGrid g) {
  E* planes = dynamic_shared<E>();
  const int length = int(p.table.length);
  for (int64_t task = blockIdx.x; task < g.tasks; task += gridDim.x) {
    int64_t group, k0;
    const int64_t b = g.passes.divide(g.groups.divide(task, group), k0);
    const int64_t d0 = group * g.capacity, left = p.dim - d0;
    const int channels = int(left < g.capacity ? left : g.capacity);
    const E* from = static_cast<const E*>(p.tokens.data) + b * p.tokens.stride[0] +
                    k0 * p.tokens.stride[1] + d0 * p.tokens.stride[2];
    __syncthreads();  // the planes of the task before have been read
    stage(planes, g.pitch,
          Source<E>{from, p.tokens.stride[2], p.tokens.stride[3], channels, length}, g.staging);
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
      planes[c * g.pitch + skewed<E>(length)] = 0;
    }
    __syncthreads();  // the planes are written
    const int64_t routes_before = (p.table.per_batch ? b * p.table.count : 0) + k0;
    const int32_t* token = p.table.token + routes_before * p.table.steps;
    E* to = static_cast<E*>(p.stack.data) + b * p.stack.stride[0] + k0 * p.stack.stride[1] +
            d0 * p.stack.stride[2];
    if (g.last) {
      emit_rows(p, g, planes, token, to, channels);
    } else {
      emit_steps(p, g, planes, token, to, channels);
    }
  }
}

// ---- launches

bool channel_last(const GatherParams& p) {
  return p.stack.stride[2] == 1 && p.stack.stride[3] != 1;
}

template <class Word>
void launch_rows(GatherParams p, cudaStream_t stream) {
  constexpr int64_t kWords = 2 * kThreads * kLoads;  // of a chunk
  const int64_t pack = int64_t(sizeof(Word)) / element_bytes(p.tokens.dtype);
  if (pack > 1) {
    for (int i : {0, 1, 3}) p.tokens.stride[i] /= pack;
  }
  const int64_t words = p.dim / pack, rows = p.table.count * p.table.steps;
  const int64_t rows_of_chunk = kWords / words + 1, chunks = (rows - 1) / rows_of_chunk + 1;
  const int64_t tasks = p.batch * chunks;
  launch("route_gather, rows", rows_kernel<Word>, blocks_for(tasks, 1), kThreads, 0, stream, p,
         SmallDivisor(words), SmallDivisor(p.table.count), Divisor(chunks), rows_of_chunk, tasks);
}

template <class Word>
void launch_steps(const GatherParams& p, cudaStream_t stream) {
  const int64_t chunks = (p.table.steps - 1) / kChunk + 1;
  const int64_t tasks = p.batch * p.table.count * p.dim * chunks;
  launch("route_gather, steps", steps_kernel<Word>, blocks_for(tasks, 1), kThreads, 0, stream, p,
         Divisor(chunks), Divisor(p.dim), Divisor(p.table.count), tasks);
}

// Can rows be moved 16 bytes at a time?
bool in_packs(const GatherParams& p) {
  const int64_t pack = 16 / element_bytes(p.tokens.dtype);
  const View<4>& v = p.tokens;
  return v.stride[2] == 1 && p.dim % pack == 0 && v.stride[0] % pack == 0 &&
         v.stride[1] % pack == 0 && v.stride[3] % pack == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

// Channels of a block: enough to read a table for several at a time (16, where channels are neighbours
// on one side), few enough to fill the SMs. 0: their planes do not fit.
template <class E>
int64_t channels_of_block(const GatherParams& p, bool rows) {
  if (p.table.length * int64_t(sizeof(E)) > kSharedBytes) return 0;
  const int64_t plane = plane_pitch<E>(p.table.length) * int64_t(sizeof(E));
  int64_t channels = std::min<int64_t>((rows ? kSharedBytes : kSharedBytes / 2) / plane, 32);
  if (!rows) channels = std::max<int64_t>(std::min<int64_t>(channels, 8), kSharedBytes / plane > 0);
  const int64_t by_blocks = p.batch * p.dim / 264;  // two blocks for each SM of H200
  channels = std::min(channels, std::max<int64_t>(by_blocks, rows ? 16 : 1));
  if (rows && channels >= 8) channels = channels / 8 * 8;
  return std::min(channels, p.dim);
}

template <class E>
bool launch_planes(const GatherParams& p, cudaStream_t stream) {
  constexpr int64_t kPack = 16 / int64_t(sizeof(E));
  const bool last = channel_last(p), rows = last || p.tokens.stride[3] != 1;
  const int64_t capacity = channels_of_block<E>(p, rows);
  if (capacity == 0 || (last && capacity < std::min<int64_t>(p.dim, 8))) return false;
  const int64_t steps = p.table.steps, size = last ? capacity : steps;
  if (p.table.count * steps * capacity > (int64_t(1) << 30)) return false;  // counted in 32 bits
  PlanesGrid g{int(capacity),
               int(plane_pitch<E>(p.table.length)),
               int(p.tokens.stride[1] == 0 ? p.table.count : 1),
               last,
               size % kPack == 0 && (!last || p.dim % kPack == 0),
               Staging::of(p.tokens, capacity, p.table.length, kPack),
               SmallDivisor(1),
               Divisor((p.dim - 1) / capacity + 1),
               Divisor(1),
               0};
  if (g.staging.along_channels && p.dim % kPack != 0) {
    g.staging.packed = false;
    g.staging.inner = SmallDivisor(capacity);
  }
  g.inner = SmallDivisor(g.packed ? size / kPack : size);
  g.passes = Divisor(p.table.count / g.routes);
  g.tasks = p.batch * int64_t(g.passes.divisor) * int64_t(g.groups.divisor);
  const int64_t bytes = capacity * g.pitch * int64_t(sizeof(E));
  launch("route_gather, planes", planes_kernel<E>, blocks_for(g.tasks, 1),
         bytes > kSharedBytes / 2 ? kPlanesThreads : kThreads, size_t(bytes), stream, p, g);
  return true;
}

template <class E>
void launch_any(const GatherParams& p, cudaStream_t stream) {
  channel_last(p) ? launch_rows<E>(p, stream) : launch_steps<E>(p, stream);
}

}  // namespace

void gather(const GatherParams& p, cudaStream_t stream) {
  if (p.batch * p.dim * p.table.count * p.table.steps == 0) return;
  const int64_t bytes = element_bytes(p.tokens.dtype);
  if (channel_last(p) && in_packs(p)) return launch_rows<uint4>(p, stream);
  const bool rows = channel_last(p) && p.tokens.stride[2] == 1;  // on both sides
  if (!rows && bytes == 2 && launch_planes<uint16_t>(p, stream)) return;
  if (!rows && bytes == 4 && launch_planes<uint32_t>(p, stream)) return;
  if (bytes == 2) return launch_any<uint16_t>(p, stream);
  if (bytes == 4) return launch_any<uint32_t>(p, stream);
  launch_any<uint64_t>(p, stream);
}

}  // namespace statescan::route_gather::cuda
