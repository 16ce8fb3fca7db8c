// Forward of the selective scan along routes on the GPU, see tile.cuh for who does what.
//
//   map --u--> planes in shared memory --gather--> scan of a tile --add--> planes of y --gate--> map
//                                                    ^ rows of dt, B, C of the tile
//
// Grid over (batch, block of channels). Shared memory: rows, dt_weight, tables of each channel (A, h),
// planes of u and y if they fit; else they are in global memory.
#include "common/launch.h"
#include "selective_scan_2d/walk.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

enum Plane { kU, kY, kPlanes };

// A warp's channel. Its tables: A (state), h (state).
template <class C>
struct Walk : Own<C> {
  using R = typename C::R;
  const FwdParams& p;
  __device__ __forceinline__ Walk(const FwdParams& p, const Memory<C>& memory)
      : Own<C>{p, memory}, p(p) {}

  __device__ __forceinline__ R* A() const { return this->tables(); }
  __device__ __forceinline__ R* h() const { return A() + p.state; }
};

template <class C>
__device__ __forceinline__ void begin_route(const Walk<C>& w) {
  using R = typename C::R;
  const FwdParams& p = w.p;
  const int64_t route = w.route(), channel = w.channel();
  load_table<R>(p.A, route, channel, p.state, R(kLog2e), w.lane, w.A());
  load_table<R>(p.dt_weight, route, channel, p.rank, R(1), w.lane, w.dt_weight(), kWarps);
  if (!p.carry || route == 0) {
    load_states(p.initial_state, w.b(), route, channel, p.state, w.lane, w.h());
  } else if (p.reset_period > 0) {
    load_states(View<4>{}, 0, 0, 0, p.state, w.lane, w.h());
  }
  __syncwarp();  // the tables are complete
}

template <class C>
__device__ __forceinline__ void end_route(const Walk<C>& w) {
  const FwdParams& p = w.p;
  __syncwarp();  // the states are in the table
  if (p.carry && w.route() + 1 < p.routes) return;
  store_states(p.last_state, w.b(), p.carry ? 0 : w.route(), w.channel(), p.state, w.lane, w.h());
}

// What a lane knows of its steps from pass to pass.
template <class C>
struct Steps {
  int at[C::kItems];
  unsigned starts;
  typename C::Items delta, delta_u, y;
};

// One state along a tile, from h; its end. y += C h
template <class C>
__device__ __forceinline__ typename C::R walk_state(typename C::R* B_row, typename C::R* C_row,
                                                    typename C::R A, typename C::R h, int lane,
                                                    Steps<C>& s) {
  using R = typename C::R;
  typename C::Items a, b, C_t;
  load_items<C>(B_row, lane, b);
  R product = 1, end = 0;
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    a[j] = decay(s.delta[j], A);
    if (!C::kFast && s.starts >> j & 1) a[j] = 0;
    b[j] *= s.delta_u[j];
    end = advance<C>(a[j], end, b[j]);
    product *= a[j];
  }
  h = enter<C, false>(product, end, h, lane);
  load_items<C>(C_row, lane, C_t);
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    h = advance<C>(a[j], h, b[j]);
    s.y[j] += C_t[j] * h;
  }
  return __shfl_sync(kAllLanes, h, 31);
}

// The states of a pass: lane n has what is known of the n-th.
template <class C>
__device__ __forceinline__ void walk_states(const Walk<C>& w, const Tile& tile, const Pass& pass,
                                            typename C::R* rows, Steps<C>& s) {
  using R = typename C::R;
  const FwdParams& p = w.p;
  const bool mine = w.lane < pass.states;
  const int64_t n0 = pass.first_state + w.lane;
  const R A = mine ? w.A()[n0] : R(0);
  R h = mine ? w.h()[n0] : R(0);
  if (mine && p.chunk_states != nullptr) {
    const int64_t row = (tile.b * p.routes + tile.route) * p.tiles + tile.i;
    static_cast<R*>(p.chunk_states)[(row * p.state + n0) * p.dim + w.channel()] = h;
  }
#pragma unroll 1
  for (int n = 0; n < pass.states; ++n) {
    const R end = walk_state(rows + (pass.B + n) * C::kSteps, rows + (pass.C + n) * C::kSteps,
                             __shfl_sync(kAllLanes, A, n), __shfl_sync(kAllLanes, h, n), w.lane, s);
    if (w.lane == n) h = end;
  }
  if (mine) w.h()[n0] = h;
}

// Step sizes; y begins with D u.
template <class C>
__device__ __forceinline__ void begin_steps(const Walk<C>& w, const Parameters<typename C::R>& k,
                                            int flags, Steps<C>& s) {
  gather<C>(w.plane(kU), flags, s.at, s.y);
  find_step_sizes<C>(w.p, k.bias, flags, s.at, s.delta);
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    s.delta_u[j] = s.delta[j] * s.y[j];
    s.y[j] *= k.D;
  }
}

// All tiles of a route, for all channels of the block.
template <class C>
__device__ __forceinline__ void walk_route(const Walk<C>& w) {
  const FwdParams& p = w.p;
  const Memory<C>& memory = w.memory;
  const Passes<C> passes(p, memory.now.task);
  const bool active = w.is_there();
  const int tiles = int(p.tiles);
  if (tiles == 0) return;
  if (!active) stage_pass<C>(p, memory, 0, passes.at(0), true, memory.buffer(p, 0));
  const Parameters<typename C::R> k(p, w.route(), active ? w.channel() : memory.now.task.channel);
  __syncthreads();        // the first rows and the planes are in place
  int done = 0;           // passes
  int places[C::kItems];  // of the next tile: on their way while one is walked
  if (active) load_places<C>(p, memory.now.tile[0].place, w.lane, places);
#pragma unroll 1
  for (int t = 0; t < tiles; ++t) {
    const Tile& tile = memory.now.tile[t & 1];
    Steps<C> s;
    if (active) {
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) s.at[j] = places[j];
      if (t + 1 < tiles) load_places<C>(p, tile.place + p.chunk, w.lane, places);
      s.starts = find_starts<C>(p, tile, w.lane);
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) s.delta[j] = 0;
    }
#pragma unroll 1
    for (int i = 0; i < passes.count; ++i, ++done) {
      const bool last = i + 1 == passes.count;
      if (active) {
        const Pass pass = passes.at(i);
        typename C::R* rows = memory.buffer(p, done);
        if (pass.has_delta) {
          add_delta<C>(p, rows, pass, w.dt_weight(), w.channel(), w.lane, s.delta);
        }
        if (passes.completes_delta(i)) begin_steps(w, k, tile.flags, s);
        if (pass.has_states) walk_states(w, tile, pass, rows, s);
      } else if (!last || t + 1 < tiles) {
        stage_pass<C>(p, memory, last ? t + 1 : t, passes.at(last ? 0 : i + 1), last,
                      memory.buffer(p, done + 1));
      }
      if (active && last) {
        add_to<C>(w.plane(kY), tile.flags, s.at, w.lane, k.weight, s.y);
      }
      __syncthreads();  // these rows have been read, the next are in place
    }
  }
}

template <class C>
__global__ __launch_bounds__(kFwdThreads,
                             C::kFwdBlocks) void fwd_kernel(const __grid_constant__ FwdParams p,
                                                            int64_t tasks) {
  using R = typename C::R;
  const Memory<C> memory(p, 0, kPlanes);
  const Walk<C> w(p, memory);
  const Planes<R> u = planes_of(p, memory, kU), y = planes_of(p, memory, kY);
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    for (int64_t route = 0; route < p.routes; ++route) {
      begin_block_route(p, memory.now, i, route);
      const Task& task = memory.now.task;
      if (route == 0 || p.u_per_route) {
        read_tokens(p.u, task, route, p.tokens, Meet::kAssign, u);
      }
      if (route == 0 || p.y_per_route) y.clear(task.channels);
      if (w.is_there()) begin_route(w);
      walk_route(w);
      if (w.is_there()) end_route(w);
      if (!p.y_per_route && route + 1 < p.routes) continue;
      __syncthreads();  // y is complete
      if (p.z) {
        read_tokens(with_routes(p.z), task, 0, p.tokens, Meet::kTimesSilu, y);
        __syncthreads();  // y is gated
      }
      write_tokens(p.y, task, p.y_per_route ? route : 0, p.tokens, y);
    }
  }
}

}  // namespace

void fwd(const FwdParams& p, cudaStream_t stream) {
  if (p.plan.pair.pairs > 0) {
    return p.plan.pair.channels == 4 ? fwd_quads(p, stream) : fwd_pairs(p, stream);
  }
  const int64_t tasks = p.batch * p.plan.blocks;
  if (tasks == 0) return;
  with_config<false>(p, [&](auto config) {
    using C = decltype(config);
    launch("selective_scan_2d fwd", fwd_kernel<C>, p.plan.grid, kFwdThreads,
           size_t(p.plan.shared_bytes), stream, p, tasks);
  });
}

}  // namespace statescan::selective_scan_2d::cuda
