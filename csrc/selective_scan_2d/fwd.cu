// Forward of the selective scan along routes on the GPU, see tile.cuh for who does what.
//
//   map --u--> planes in shared memory --gather--> scan of a tile --add--> planes of y --gate--> map
//                                                    ^ rows of dt, B, C of the tile
//
// Grid over (batch, block of channels). Shared memory: rows, tables of each channel (A, h, dt_weight),
// planes of u and y if they fit; else they are in global memory.
#include "common/launch.h"
#include "selective_scan_2d/tile.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

// A warp's channel on a route.
template <class C>
struct Walk {
  using R = typename C::R;
  const FwdParams& p;
  int64_t b, route, channel;
  int lane;
  R *A, *h, *dt_weight;  // (state), (state), (rank)
  R *u, *y;              // planes

  __device__ __forceinline__ void begin_route() {
    load_table<R>(p.A, route, channel, p.state, R(kLog2e), lane, A);
    load_table<R>(p.dt_weight, route, channel, p.rank, R(1), lane, dt_weight);
    if (!p.carry || route == 0) {
      load_states(p.initial_state, b, route, channel, p.state, lane, h);
    } else if (p.reset_period > 0) {
      load_states(View<4>{}, b, route, channel, p.state, lane, h);
    }
    __syncwarp();  // the tables are complete
  }

  __device__ __forceinline__ void end_route() {
    __syncwarp();  // the last lane's states are in the table
    if (p.carry && route + 1 < p.routes) return;
    store_states(p.last_state, b, p.carry ? 0 : route, channel, p.state, lane, h);
  }

  // One state along a tile. y += C h
  __device__ __forceinline__ R walk_state(const typename C::Items& delta,
                                          const typename C::Items& delta_u, R* B_row, R* C_row,
                                          R A_n, R h_n, unsigned starts, typename C::Items& y_t) {
    typename C::Items a, b_t, C_t;
    load_items<C>(B_row, lane, b_t);
    R product = 1, end = 0;
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      a[j] = decay(delta[j], A_n);
      if (!C::kFast && starts >> j & 1) a[j] = 0;
      b_t[j] *= delta_u[j];
      end = advance<C>(a[j], end, b_t[j]);
      product *= a[j];
    }
    R state = enter<C, false>(product, end, h_n, lane);
    load_items<C>(C_row, lane, C_t);
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      state = advance<C>(a[j], state, b_t[j]);
      y_t[j] += C_t[j] * state;
    }
    return __shfl_sync(kAllLanes, state, 31);
  }

  // The states of a pass: lane n has what is known of the n-th.
  __device__ __forceinline__ void walk_states(const Tile& tile, const Pass& pass,
                                              const typename C::Items& delta,
                                              const typename C::Items& delta_u, R* rows,
                                              unsigned starts, typename C::Items& y_t) {
    const bool mine = lane < pass.states;
    const int64_t n0 = pass.first_state + lane;
    const R A_of_lane = mine ? A[n0] : R(0);
    R h_of_lane = mine ? h[n0] : R(0);
    if (mine && p.chunk_states != nullptr) {
      const int64_t row = (b * p.routes + route) * p.chunks() + tile.begin / p.chunk;
      static_cast<R*>(p.chunk_states)[(row * p.state + n0) * p.dim + channel] = h_of_lane;
    }
#pragma unroll 1
    for (int n = 0; n < pass.states; ++n) {
      const R end = walk_state(
          delta, delta_u, rows + (pass.B + n) * C::kSteps, rows + (pass.C + n) * C::kSteps,
          __shfl_sync(kAllLanes, A_of_lane, n), __shfl_sync(kAllLanes, h_of_lane, n), starts, y_t);
      if (lane == n) h_of_lane = end;
    }
    if (mine) h[n0] = h_of_lane;
  }
};

// What a lane knows of its steps from pass to pass.
template <class C>
struct Steps {
  int at[C::kItems];
  unsigned starts;
  typename C::Items delta, delta_u, y;
};

template <class C>
__device__ __forceinline__ void walk_pass(Walk<C>& w, const Parameters<typename C::R>& k,
                                          const Tile& tile, const Pass& pass, bool complete,
                                          typename C::R* rows, Steps<C>& s) {
  const FwdParams& p = w.p;
  if (pass.has_delta) add_delta<C>(p, rows, pass, w.dt_weight, w.channel, w.lane, s.delta);
  if (complete) {
    gather<C>(w.u, s.at, s.y);
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      s.delta[j] = step_size(s.delta[j], k.bias, p.delta_softplus);
      if (s.at[j] == kSkip) s.delta[j] = 0;
      s.delta_u[j] = s.delta[j] * s.y[j];
      s.y[j] *= k.D;
    }
  }
  if (pass.has_states) w.walk_states(tile, pass, s.delta, s.delta_u, rows, s.starts, s.y);
}

// All tiles of a route, for all channels of the block. Ends with a barrier.
template <class C>
__device__ __forceinline__ void walk_route(Walk<C>& w, const Task& task, const Memory<C>& memory) {
  const FwdParams& p = w.p;
  const Passes passes(p, task);
  const Helpers helpers(task);
  const bool active = helpers.thread < 0;
  if (p.chunks() == 0) return;
  if (!active) {
    stage_pass<C>(p, tile_at(p, task.b, w.route, 0), passes.at(0), helpers, memory.buffer(0));
  }
  const Parameters<typename C::R> k(p, w.route, w.channel);
  __syncthreads();  // the first rows and the planes are in place
  int64_t pass_count = 0;
#pragma unroll 1
  for (int64_t t = 0; t < p.chunks(); ++t) {
    const Tile tile = tile_at(p, task.b, w.route, t);
    Steps<C> s;
    if (active) {
      load_places<C>(p, tile, w.lane, s.at);
      s.starts = find_starts<C>(p, tile, w.lane);
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) s.delta[j] = 0;
    }
#pragma unroll 1
    for (int64_t i = 0; i < passes.count; ++i, ++pass_count) {
      if (active) {
        walk_pass(w, k, tile, passes.at(i), passes.completes_delta(i), memory.buffer(pass_count),
                  s);
      } else if (i + 1 < passes.count || t + 1 < p.chunks()) {
        const bool last = i + 1 == passes.count;
        stage_pass<C>(p, tile_at(p, task.b, w.route, last ? t + 1 : t), passes.at(last ? 0 : i + 1),
                      helpers, memory.buffer(pass_count + 1));
      }
      __syncthreads();  // these rows have been read, the next are in place
    }
    if (active) {
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) s.y[j] *= k.weight;
      add_to<C>(w.y, s.at, tile.flags, w.lane, s.y);
    }
  }
}

template <class C>
__global__ __launch_bounds__(kFwdThreads, 1) void fwd_kernel(const __grid_constant__ FwdParams p,
                                                             int64_t tasks) {
  using R = typename C::R;
  const Memory<C> memory(p, 0, 2);
  const int warp = int(threadIdx.x) / 32, pitch = p.plan.pitch;
  R *u = memory.plane, *y = u + int64_t(p.plan.channels) * pitch;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    const Task task = task_at(p, i);
    const bool active = warp < task.channels;
    const int mine = active ? warp : 0;
    R* A = memory.table + mine * p.plan.table;
    Walk<C> w{p,
              task.b,
              0,
              task.channel + mine,
              int(threadIdx.x) % 32,
              A,
              A + p.state,
              A + 2 * p.state,
              u + int64_t(mine) * pitch,
              y + int64_t(mine) * pitch};
#pragma unroll 1
    for (int64_t route = 0; route < p.routes; ++route) {
      w.route = route;
      __syncthreads();  // planes and rows before have been read
      if (route == 0 || p.u_per_route) {
        read_tokens(p.u, task, route, p.tokens, Meet::kAssign, u, pitch);
      }
      if (route == 0 || p.y_per_route) clear_planes<C>(y, int64_t(task.channels) * pitch);
      if (active) w.begin_route();
      walk_route(w, task, memory);
      if (active) w.end_route();
      if (!p.y_per_route && route + 1 < p.routes) continue;
      __syncthreads();  // y is complete
      if (p.z) {
        read_tokens(with_routes(p.z), task, 0, p.tokens, Meet::kTimesSilu, y, pitch);
        __syncthreads();  // y is gated
      }
      write_tokens(p.y, task, p.y_per_route ? route : 0, p.tokens, y, pitch);
    }
  }
}

}  // namespace

void fwd(const FwdParams& p, cudaStream_t stream) {
  const int64_t tasks = p.batch * p.plan.blocks;
  if (tasks == 0) return;
  with_config(p, [&](auto config) {
    using C = decltype(config);
    launch("selective_scan_2d fwd", fwd_kernel<C>, p.plan.grid, kFwdThreads,
           size_t(p.plan.shared_bytes), stream, p, tasks);
  });
}

}  // namespace statescan::selective_scan_2d::cuda
