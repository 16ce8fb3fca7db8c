// How the selective scan along routes lies on the GPU, and what its forward and backward share.
//
//   block:  a batch element and at most 8 channels, along all routes, one after the other
//   warp:   a channel of them: its planes of tokens (u, y, ..) belong to it alone
//   lane:   kItems neighbouring steps of a tile
//
// So what is added to a token is added by one warp in a fixed order. The recurrence of a tile is a scan
// over lanes of maps h -> a h + b.
//
// Narrow operands (B, C, delta) come to shared memory as numbers to compute with, [row][step], for all
// channels of the block, in passes of at most kRows rows. The warps that have no channel bring the next
// pass while the others compute; one barrier ends both.
#pragma once

#include "common/device_view.cuh"
#include "common/lanes.cuh"
#include "common/scalar.cuh"
#include "common/shared.cuh"
#include "route_gather/planes.cuh"
#include "selective_scan_2d/cuda.h"

#include "selective_scan/equations.h"

namespace statescan::selective_scan_2d::cuda {

using selective_scan::decay;

inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

inline constexpr int kRows = 16;   // of narrow operands, in shared memory at a time
inline constexpr int kStates = 8;  // in so many rows, where they are not all of the operands

// Where a token is in its plane: with spare words, see planes.cuh.
STATESCAN_HOST_DEVICE constexpr int in_plane(int token) {
  return route_gather::cuda::skewed<uint32_t>(token);
}
STATESCAN_HOST_DEVICE constexpr int64_t plane_pitch(int64_t tokens) {
  return in_plane(int(tokens)) + 1;
}

// kFast: planes are in shared memory, the state never starts anew, and the backward does not need y.
// Without it a tile of 64 steps has lanes to spare.
// kTogether: all rows of narrow operands come in one pass. kHalves: u and dy of the backward, both of one
// 16-bit type, share a word.
template <class R_, int kItemsOfLane, bool kFast_, bool kTogether_, bool kHalves_ = false>
struct Config {
  using R = R_;
  static constexpr int kItems = kItemsOfLane, kSteps = 32 * kItems;
  static constexpr bool kFast = kFast_, kTogether = kTogether_, kHalves = kHalves_;
  static constexpr int kFwdBlocks = kTogether || kItems == 2 && sizeof(R) == 4 ? 2 : 1;  // on an SM
  using Items = R[kItems];
};
using Fast = Config<float, 8, true, true>;
using FastHalves = Config<float, 8, true, true, true>;
using FastPasses = Config<float, 8, true, false>;
using FastShort = Config<float, 2, true, false>;
using Any = Config<float, 8, false, false>;
using AnyDouble = Config<double, 2, false, false>;

template <bool kBackward, class F>
inline void with_config(const Inputs& p, F&& f) {
  if (p.compute == DType::kFloat64) return f(AnyDouble{});
  if (!p.plan.fast) return f(Any{});
  if (p.chunk == kShortTile) return f(FastShort{});
  if (!p.plan.together) return f(FastPasses{});
  if constexpr (kBackward) {
    if (p.plan.halves) return f(FastHalves{});
  }
  f(Fast{});
}

// One block's share of a launch.
struct Task {
  int64_t b, block, channel;  // block: of channels; channel: the first
  int channels;
};
__device__ __forceinline__ Task task_at(const Inputs& p, int64_t i) {
  Task t;
  t.b = i / p.plan.blocks, t.block = i % p.plan.blocks;
  t.channel = t.block * p.plan.channels;
  const int64_t left = p.dim - t.channel;
  t.channels = left < p.plan.channels ? int(left) : p.plan.channels;
  return t;
}

// A piece of a route.
struct Tile {
  int64_t b, route, i, begin;  // the i-th of its route; its first step
  int steps;                   // there may be fewer than a tile has at the end
  int flags;
  const int32_t* place;
};
__device__ __forceinline__ Tile tile_at(const Inputs& p, int64_t b, int64_t route, int64_t i) {
  const int64_t row = ((p.place_per_batch ? b : 0) * p.routes + route) * p.tiles + i;
  const int64_t begin = i * p.chunk, left = p.steps - begin;
  return {b,
          route,
          i,
          begin,
          left < p.chunk ? int(left) : int(p.chunk),
          int(__ldg(p.flags + row)),
          p.place + row * p.chunk};
}

// Where a block is: in shared memory, since what follows from it would fill the registers.
struct alignas(32) Now {
  Task task;
  int64_t route;
  SharedArray<Tile, 2> tile;  // the i-th in i % 2: while one is walked, the next is prepared
};
inline constexpr int kNowBytes = int(sizeof(Now));

// The shared memory of a block: where it is, two buffers of rows, shares (of the backward), dt_weight
// (rank, warp), tables of each channel, planes.
template <class C>
struct Memory {
  using R = typename C::R;
  Now& now;
  R *row, *share, *dt_weight, *table, *plane;
  int kinds;  // of planes, side by side: those of a token are neighbours

  __device__ __forceinline__ explicit Memory(const Inputs& p, int shares, int planes)
      : now(*dynamic_shared<Now>()),
        row(reinterpret_cast<R*>(&now + 1)),
        share(row + 2 * p.plan.rows * C::kSteps),
        dt_weight(share + shares * kWarps * C::kSteps),
        table(dt_weight + p.rank * kWarps),
        plane(table + p.plan.channels * p.plan.table),
        kinds(planes) {
    if (!C::kFast && p.planes != nullptr) {
      plane =
          static_cast<R*>(p.planes) + int64_t(blockIdx.x) * planes * p.plan.channels * p.plan.pitch;
    }
  }
  __device__ __forceinline__ int64_t channel_elements(const Inputs& p) const {
    return int64_t(kinds) * p.plan.pitch;
  }
  __device__ __forceinline__ R* buffer(const Inputs& p, int i) const {
    return row + (i & 1) * p.plan.rows * C::kSteps;
  }
};

// A warp's channel.
template <class C>
struct Own {
  using R = typename C::R;
  const Inputs& p;
  const Memory<C>& memory;
  // From lane 0, which tells the compiler that it is the same in all lanes.
  int warp = __shfl_sync(kAllLanes, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;

  __device__ __forceinline__ bool is_there() const { return warp < memory.now.task.channels; }
  __device__ __forceinline__ int64_t b() const { return memory.now.task.b; }
  __device__ __forceinline__ int64_t route() const { return memory.now.route; }
  __device__ __forceinline__ int64_t channel() const { return memory.now.task.channel + warp; }
  __device__ __forceinline__ R* dt_weight() const { return memory.dt_weight + warp; }
  __device__ __forceinline__ R* tables() const { return memory.table + warp * p.plan.table; }
  __device__ __forceinline__ R* plane() const {
    return memory.plane + warp * memory.channel_elements(p);
  }
};

// Says where the block goes; before, what it was at has been read.
__device__ __forceinline__ void begin_block_route(const Inputs& p, Now& now, int64_t task,
                                                  int64_t route) {
  __syncthreads();  // what belongs to the route before has been read
  if (threadIdx.x == 0) now.task = task_at(p, task), now.route = route;
  __syncthreads();  // task and route are known
}

// ---- a lane's steps

// Where step t is in a row of a tile: the four or eight of a lane in packs of 16 bytes, such that those
// of all lanes lie side by side.
template <class C>
__device__ __forceinline__ int in_row(int t) {
  return C::kItems == 8 ? (t & 4) * 32 + (t >> 3) * 4 + (t & 3) : t;
}
template <class C, class F>
__device__ __forceinline__ void for_packs_of_row(int lane, F&& f) {
  constexpr int kPack = C::kItems == 8 ? 4 : C::kItems;
#pragma unroll
  for (int i = 0; i < C::kItems; i += kPack)
    f(std::integral_constant<int, kPack>{}, i, i * 32 + lane * kPack);
}
template <class C>
__device__ __forceinline__ void load_items(typename C::R* row, int lane, typename C::Items& x) {
  for_packs_of_row<C>(lane, [&](auto pack, int i, int at) {
    const auto v = several<decltype(pack)::value>(row[at]);
#pragma unroll
    for (int j = 0; j < decltype(pack)::value; ++j) x[i + j] = v.x[j];
  });
}
template <class C>
__device__ __forceinline__ void store_items(typename C::R* row, int lane,
                                            const typename C::Items& x) {
  for_packs_of_row<C>(lane, [&](auto pack, int i, int at) {
    auto& v = several<decltype(pack)::value>(row[at]);
#pragma unroll
    for (int j = 0; j < decltype(pack)::value; ++j) v.x[j] = x[i + j];
  });
}

template <class C>
__device__ __forceinline__ void load_places(const Inputs& p, const Tile& tile, int lane,
                                            int (&at)[C::kItems]) {
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) at[j] = kSkip;
  if (!C::kFast && lane * C::kItems >= p.chunk) return;
  if constexpr (C::kItems == 8) {
    route_gather::cuda::load_entries<8>(tile.place + lane * 8, at);
  } else {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) at[j] = __ldg(tile.place + lane * C::kItems + j);
  }
}

// Bits of the lane's steps before which the state starts anew.
template <class C>
__device__ __forceinline__ unsigned find_starts(const Inputs& p, const Tile& tile, int lane) {
  unsigned starts = 0;
  if (C::kFast || !(tile.flags & kResets)) return starts;
  const int64_t first = tile.begin + lane * C::kItems;
  int64_t phase = first % p.reset_period;
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    if (phase == 0 && first + j > 0 && lane * C::kItems + j < tile.steps) starts |= 1u << j;
    phase = phase + 1 == p.reset_period ? 0 : phase + 1;
  }
  return starts;
}

// ---- rows of narrow operands

// The narrow operands of a tile come in passes: delta first, then B and C of some states; or all
// together. Of delta that is given whole there is a row for each channel.
struct Pass {
  bool has_delta, has_states;
  int64_t first_row, first_state;  // of delta; of B and C
  int rows, states;
  int B, C;  // their first rows in the buffer
};
template <class C>
struct Passes {
  int64_t first;
  int rows, state;  // of delta; of B and C
  bool together;
  int of_delta, count;

  __device__ __forceinline__ explicit Passes(const Inputs& p, const Task& task)
      : first(p.rank > 0 ? 0 : task.channel / p.delta_repeat),
        rows(p.rank > 0 ? int(p.rank)
                        : int((task.channel + task.channels - 1) / p.delta_repeat - first + 1)),
        state(int(p.state)),
        together(C::kTogether || p.plan.together),
        of_delta(together ? 0 : (rows + kRows - 1) / kRows),
        count(together ? 1 : of_delta + (state + kStates - 1) / kStates) {}

  // The pass before whose states the step sizes are complete.
  __device__ __forceinline__ bool completes_delta(int i) const { return i == of_delta; }
  __device__ __forceinline__ Pass at(int i) const {
    if (together) return {true, true, first, 0, rows, state, rows, rows + state};
    if (i < of_delta) {
      const int left = rows - i * kRows;
      return {true, false, first + i * kRows, 0, left < kRows ? left : kRows, 0, 0, 0};
    }
    const int n = (i - of_delta) * kStates, left = state - n,
              some = left < kStates ? left : kStates;
    return {false, true, 0, n, 0, some, 0, some};
  }
};

// The threads of warps without a channel, which bring rows.
struct Helpers {
  int thread, count;
  __device__ __forceinline__ explicit Helpers(const Task& task)
      : thread(int(threadIdx.x) - task.channels * 32),
        count(int(blockDim.x) - task.channels * 32) {}
};

// rows[i][t] = x[b, route, first + i, begin + t]; 0 at steps to skip, and with `no_ghosts` at all steps
// of no token, whatever is there.
template <class C, class T>
__device__ __forceinline__ void stage_rows(const T* data, const View<4>& x, const Tile& tile,
                                           int64_t first, int count, bool no_ghosts,
                                           const Helpers& helpers, typename C::R* rows) {
  using R = typename C::R;
  const T* from = data + tile.b * x.stride[0] + tile.route * x.stride[1] + first * x.stride[2] +
                  tile.begin * x.stride[3];
  if constexpr (sizeof(R) == 4) {
    constexpr int kVec = kPackSize<T>, kPacks = C::kSteps / kVec;
    if (tile.steps == C::kSteps && !(tile.flags & kHoles) && x.stride[3] == 1 &&
        is_aligned(from, x.stride[2], kVec)) {
#pragma unroll(C::kFast ? 4 : 1)
      for (int i = helpers.thread; i < count * kPacks; i += helpers.count) {
        const int row = i / kPacks, t = i % kPacks * kVec;
        float v[kVec];
        Pack<T, kVec>::load(from + row * x.stride[2] + t).unpack(v);
#pragma unroll
        for (int j = 0; j < kVec; ++j) rows[row * C::kSteps + in_row<C>(t + j)] = v[j];
      }
      return;
    }
  }
  const bool time_inside = x.stride[3] <= x.stride[2];
  const int tasks = (time_inside ? count : kRows) * C::kSteps;
#pragma unroll 1
  for (int i = helpers.thread; i < tasks; i += helpers.count) {
    const int row = time_inside ? i / C::kSteps : i % kRows;
    const int t = time_inside ? i % C::kSteps : i / kRows;
    if (row >= count) continue;
    const int place = t < tile.steps ? __ldg(tile.place + t) : int(kSkip);
    const bool there = place >= 0 || (place == kGhost && !no_ghosts);
    rows[row * C::kSteps + in_row<C>(t)] =
        there ? R(to_number(from[row * x.stride[2] + t * x.stride[3]])) : R(0);
  }
}

// Brings the rows of a pass of tile i; with the first what is known of the tile.
template <class C>
__device__ __forceinline__ void stage_pass(const Inputs& p, const Memory<C>& memory, int i_tile,
                                           const Pass& pass, bool first, typename C::R* rows) {
  const Helpers helpers(memory.now.task);
  Tile tile = tile_at(p, memory.now.task.b, memory.now.route, i_tile);
  if (p.chunk < C::kSteps) tile.flags |= kHoles;  // lanes to spare
  if (first && helpers.thread == 0) memory.now.tile[i_tile & 1] = tile;
#pragma unroll 1
  for (int i = pass.has_delta ? 0 : 1; i < (pass.has_states ? 3 : 1); ++i) {
    const View<4>& x = i == 0 ? p.delta : i == 1 ? p.B : p.C;
    typename C::R* to = rows + (i == 0 ? 0 : i == 1 ? pass.B : pass.C) * C::kSteps;
    with_device_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (sizeof(T) <= sizeof(typename C::R)) {  // double is computed in double
        stage_rows<C>(static_cast<const T*>(x.data), x, tile,
                      i == 0 ? pass.first_row : pass.first_state, i == 0 ? pass.rows : pass.states,
                      i > 0, helpers, to);
      }
    });
  }
}

// delta of a channel, before bias and softplus: adds the rows of a low-rank pass, or takes its own.
template <class C>
__device__ __forceinline__ void add_delta(const Inputs& p, typename C::R* rows, const Pass& pass,
                                          const typename C::R* dt_weight, int64_t channel, int lane,
                                          typename C::Items& x) {
  if (p.rank == 0) {
    const int row = int(channel / p.delta_repeat - pass.first_row);
    return load_items<C>(rows + row * C::kSteps, lane, x);
  }
  dt_weight += pass.first_row * kWarps;
#pragma unroll 3
  for (int r = 0; r < pass.rows; ++r, rows += C::kSteps) {
    typename C::Items dt;
    load_items<C>(rows, lane, dt);
    const typename C::R w = dt_weight[r * kWarps];
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) x[j] += w * dt[j];
  }
}

// The step sizes of a lane; 0 at steps to skip.
template <class C>
__device__ __forceinline__ void find_step_sizes(const Inputs& p, typename C::R bias, int flags,
                                                const int (&at)[C::kItems],
                                                typename C::Items& delta) {
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) delta[j] += bias;
  if (p.delta_softplus) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) delta[j] = softplus(delta[j]);
  }
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) delta[j] = at[j] == kSkip ? 0 : delta[j];
  }
}

// ---- the recurrence

// a h + b; where a is 0 the state starts anew, whatever h is.
template <class C>
__device__ __forceinline__ typename C::R advance(typename C::R a, typename C::R h,
                                                 typename C::R b) {
  return !C::kFast && a == 0 ? b : a * h + b;
}

// The value that a lane's own map h -> a h + b starts from, where the lanes before it (kBack: after it)
// come first and the first of them starts from h.
template <class C, bool kBack>
__device__ __forceinline__ typename C::R enter(typename C::R a, typename C::R b, typename C::R h,
                                               int lane) {
  using R = typename C::R;
  auto from = [](R x, int lanes) {
    return kBack ? __shfl_down_sync(kAllLanes, x, lanes) : __shfl_up_sync(kAllLanes, x, lanes);
  };
  const int before = kBack ? 31 - lane : lane;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const R a0 = from(a, lanes), b0 = from(b, lanes);
    if (before >= lanes) {
      b = advance<C>(a, b0, b);
      a *= a0;
    }
  }
  a = from(a, 1), b = from(b, 1);
  return before == 0 ? h : advance<C>(a, h, b);
}

// ---- planes

// Calls f(tag of the pack's size, pointer, channel, token) for packs and single elements of `channels`
// channels.
template <class T, class F>
__device__ __forceinline__ void for_tokens(T* first, int64_t channel_stride, int64_t token_stride,
                                           int channels, int64_t tokens, F&& f) {
  const int thread = int(threadIdx.x);
  const std::integral_constant<int, 1> one;
  constexpr int kVec = sizeof(T) < 8 ? kPackSize<T> : 1;
  int64_t done = 0;
  if constexpr (kVec > 1) {
    if (token_stride == 1 && is_aligned(first, channel_stride, kVec)) {
      done = tokens / kVec * kVec;
#pragma unroll 1
      for (int c = 0; c < channels; ++c) {
#pragma unroll 2
        for (int64_t t = thread * kVec; t < done; t += int(blockDim.x) * kVec) {
          f(std::integral_constant<int, kVec>{}, first + c * channel_stride + t, c, int(t));
        }
      }
    }
  }
  if (token_stride > channel_stride && token_stride > 1) {  // channels are neighbours in memory
    const int c = thread % kWarps;
#pragma unroll 2
    for (int64_t t = thread / kWarps; t < tokens; t += int(blockDim.x) / kWarps) {
      if (c < channels) f(one, first + c * channel_stride + t * token_stride, c, int(t));
    }
    return;
  }
#pragma unroll 1
  for (int c = 0; c < channels && done < tokens; ++c) {
#pragma unroll 2
    for (int64_t t = done + thread; t < tokens; t += blockDim.x) {
      f(one, first + c * channel_stride + t * token_stride, c, int(t));
    }
  }
}

// Planes of one kind, of all channels of the block.
template <class R>
struct Planes {
  R* first;
  int kinds, pitch;
  __device__ __forceinline__ R& at(int c, int token) const {
    return first[(int64_t(c) * pitch + in_plane(token)) * kinds];
  }
  __device__ __forceinline__ void clear(int channels) const {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < int64_t(channels) * pitch; i += blockDim.x) {
      first[i * kinds] = 0;
    }
  }
};
template <class C>
__device__ __forceinline__ Planes<typename C::R> planes_of(const Inputs& p, const Memory<C>& memory,
                                                           int kind) {
  return {memory.plane + kind, memory.kinds, p.plan.pitch};
}

// What becomes of a plane's number that meets a tensor's.
enum class Meet { kAssign, kTimes, kTimesSilu, kTimesSiluSlope };

template <class R>
__device__ __forceinline__ R meet(Meet how, R number, R x) {
  if (how == Meet::kAssign) return x;
  if (how == Meet::kTimes) return number * x;
  const R gate = sigmoid(x);
  return number * (how == Meet::kTimesSilu ? x * gate : silu_slope(x, gate));
}

template <class R>
__device__ __forceinline__ void read_tokens(const View<4>& x, const Task& task, int64_t route,
                                            int64_t tokens, Meet how, const Planes<R>& planes) {
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= sizeof(R)) {
      const T* first = static_cast<const T*>(x.data) + task.b * x.stride[0] + route * x.stride[1] +
                       task.channel * x.stride[2];
      for_tokens(first, x.stride[2], x.stride[3], task.channels, tokens,
                 [&](auto size, const T* from, int c, int t) {
                   constexpr int kSize = decltype(size)::value;
                   if constexpr (kSize == 1) {
                     R& number = planes.at(c, t);
                     number = meet(how, how == Meet::kAssign ? R(0) : number, R(to_number(*from)));
                   } else {
                     float v[kSize];
                     Pack<T, kSize>::load(from).unpack(v);
                     if (how == Meet::kAssign) {
#pragma unroll
                       for (int j = 0; j < kSize; ++j) planes.at(c, t + j) = v[j];
                       return;
                     }
#pragma unroll 1
                     for (int j = 0; j < kSize; ++j) {
                       R& number = planes.at(c, t + j);
                       number = meet(how, number, R(to_number(from[j])));
                     }
                   }
                 });
    }
  });
}

// Reads 16-bit elements as they are into the low (0) or high (1) halves of planes.
__device__ __forceinline__ void read_halves(const View<4>& x, const Task& task, int64_t route,
                                            int64_t tokens, int half, const Planes<float>& planes) {
  const uint16_t* first = static_cast<const uint16_t*>(x.data) + task.b * x.stride[0] +
                          route * x.stride[1] + task.channel * x.stride[2];
  for_tokens(first, x.stride[2], x.stride[3], task.channels, tokens,
             [&](auto size, const uint16_t* from, int c, int t) {
               auto put = [&](int i, uint32_t bits) {
                 reinterpret_cast<uint16_t*>(&planes.at(c, t + i))[half] = uint16_t(bits);
               };
               if constexpr (decltype(size)::value == 1) {
                 put(0, *from);
               } else {
                 const uint4 v = *reinterpret_cast<const uint4*>(from);
                 const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                 for (int i = 0; i < 8; ++i) put(i, words[i / 2] >> (i % 2 * 16));
               }
             });
}

template <class R>
__device__ __forceinline__ void write_tokens(const View<4>& x, const Task& task, int64_t route,
                                             int64_t tokens, const Planes<R>& planes) {
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* first = static_cast<T*>(x.data) + task.b * x.stride[0] + route * x.stride[1] +
               task.channel * x.stride[2];
    for_tokens(first, x.stride[2], x.stride[3], task.channels, tokens,
               [&](auto size, T* to, int c, int t) {
                 constexpr int kSize = decltype(size)::value;
                 if constexpr (std::is_same_v<T, double>) {
                   *to = planes.at(c, t);
                 } else if constexpr (kSize == 1) {
                   *to = from_number<T>(float(planes.at(c, t)));
                 } else {
                   float v[kSize];
#pragma unroll
                   for (int j = 0; j < kSize; ++j) v[j] = float(planes.at(c, t + j));
                   Pack<T, kSize>::of(v).store(to);
                 }
               });
  });
}

// (batch, dim, token) as a tensor with a route axis.
__device__ __forceinline__ View<4> with_routes(const View<3>& x) {
  return {x.data, x.dtype, {x.stride[0], 0, x.stride[1], x.stride[2]}};
}

// Reads a warp's planes of one kind at its lane's steps: 0 at steps of no token. plane: the first of
// the kind.
template <class C>
__device__ __forceinline__ void gather(typename C::R* plane, int kinds, int flags,
                                       const int (&at)[C::kItems], typename C::Items& x) {
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) x[j] = at[j] >= 0 ? plane[at[j] * kinds] : 0;
    return;
  }
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) x[j] = plane[at[j] * kinds];
}

// Both halves of words.
template <class C>
__device__ __forceinline__ void gather_halves(const float* plane, int kinds, int flags, DType dtype,
                                              const int (&at)[C::kItems], float (&low)[C::kItems],
                                              float (&high)[C::kItems]) {
  uint32_t word[C::kItems];
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    word[j] = !(flags & kHoles) || at[j] >= 0 ? float_to_bits(plane[at[j] * kinds]) : 0;
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      low[j] = bits_to_float(word[j] << 16), high[j] = bits_to_float(word[j] & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      low[j] = to_number(Half{uint16_t(word[j])}),
      high[j] = to_number(Half{uint16_t(word[j] >> 16)});
    }
  }
}

// plane += scale x. Where a token comes twice lanes take turns, in the order of the route.
template <class C>
__device__ __forceinline__ void add_to(typename C::R* plane, int kinds, int flags,
                                       const int (&at)[C::kItems], int lane, typename C::R scale,
                                       const typename C::Items& x) {
  if (flags & kRepeats) {
#pragma unroll 1
    for (int turn = 0; turn < 32; ++turn) {
      if (lane == turn) {
#pragma unroll
        for (int j = 0; j < C::kItems; ++j) {
          if (at[j] >= 0) plane[at[j] * kinds] += scale * x[j];
        }
      }
      __syncwarp();  // what the turn added is there
    }
    return;
  }
  typename C::Items sum;
  gather<C>(plane, kinds, flags, at, sum);
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) sum[j] += scale * x[j];
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    if (!(flags & kHoles) || at[j] >= 0) plane[at[j] * kinds] = sum[j];
  }
  __syncwarp();  // the next tile may come to the same tokens
}

// ---- what a warp knows of its channel on a route

template <class R>
__device__ __forceinline__ R parameter(const View<2>& x, int64_t route, int64_t channel, R absent,
                                       int64_t repeat = 1) {
  if (!x) return absent;
  if (repeat > 1) channel /= repeat;
  return load_element<R>(x.data, x.dtype, route * x.stride[0] + channel * x.stride[1]);
}

template <class R>
struct Parameters {
  R D, bias, weight;
  __device__ __forceinline__ Parameters(const Inputs& p, int64_t route, int64_t channel)
      : D(parameter<R>(p.D, route, channel, 0)),
        bias(parameter<R>(p.delta_bias, route, channel, 0, p.delta_repeat)),
        weight(parameter<R>(p.weights, route, channel, 1)) {}
};

// table[i pitch] = scale x[route, channel, i], by the lanes of a warp.
template <class R>
__device__ __forceinline__ void load_table(const View<3>& x, int64_t route, int64_t channel,
                                           int64_t count, R scale, int lane, R* table,
                                           int pitch = 1) {
#pragma unroll 1
  for (int64_t i = lane; i < count; i += 32) {
    table[i * pitch] =
        scale * load_element<R>(x.data, x.dtype,
                                route * x.stride[0] + channel * x.stride[1] + i * x.stride[2]);
  }
}
__device__ __forceinline__ int64_t state_offset(const View<4>& x, int64_t b, int64_t route,
                                                int64_t channel) {
  return b * x.stride[0] + route * x.stride[1] + channel * x.stride[2];
}
// The states of a channel, by the lanes of a warp; zero without `x`.
template <class R>
__device__ __forceinline__ void load_states(const View<4>& x, int64_t b, int64_t route,
                                            int64_t channel, int64_t count, int lane, R* h) {
  const int64_t first = state_offset(x, b, route, channel);
#pragma unroll 1
  for (int64_t n = lane; n < count; n += 32) {
    h[n] = x ? load_element<R>(x.data, x.dtype, first + n * x.stride[3]) : R(0);
  }
}
template <class R>
__device__ __forceinline__ void store_states(const View<4>& x, int64_t b, int64_t route,
                                             int64_t channel, int64_t count, int lane, const R* h) {
  const int64_t first = state_offset(x, b, route, channel);
#pragma unroll 1
  for (int64_t n = lane; n < count; n += 32) {
    store_element(x.data, x.dtype, first + n * x.stride[3], h[n]);
  }
}

}  // namespace statescan::selective_scan_2d::cuda
