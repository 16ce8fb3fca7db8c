// Backward of the selective scan along routes on the GPU. Blocks and warps are those of the forward
// (tile.cuh); routes and their tiles are walked from the last to the first, each tile from the state
// that the forward saved for it: once forward for h, then back.
//
//   map --u, dy--> planes --gather--> scan forward, scan back --add--> planes of du (and y) --> map
//                                       | ddelta, dB, dC of every channel
//                                       v
//             summed over the channels of the block: dB, dC, ddt, written once for each tile
//
// Sums over blocks of channels, batch elements and routes follow in a fixed order. Nothing is atomic.
//
// Grid over (batch, block of channels). Shared memory: rows, shares, tables of each channel (A, dh, dA,
// dt_weight, ddt_weight), planes of u, dy, du and with a gate y.
#include "common/launch.h"
#include "selective_scan_2d/sums.cuh"
#include "selective_scan_2d/walk.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

using selective_scan::step_vjp;

enum Plane { kU, kDy, kDu, kY };  // kY with a gate only; as halves u and dy are one
template <class C>
inline constexpr int kDuPlane = C::kHalves ? 1 : kDu;
template <class C>
__device__ __forceinline__ int kinds_of(const BwdParams& p) {
  return C::kHalves ? 2 : !C::kFast && p.z ? 4 : 3;
}

// A warp's channel. Its tables: A, dh, dA (state), ddt_weight (rank).
template <class C>
struct Walk : Own<C> {
  using R = typename C::R;
  const BwdParams& p;
  R dD = 0, dbias = 0, dweight = 0;  // of the lane's steps
  // Where all rows come in one pass: ddt_weight of the lane's steps.
  static constexpr int kRanks = C::kTogether ? kRows - 2 : 1;
  R ddt_weight_sum[kRanks];
  __device__ __forceinline__ Walk(const BwdParams& p, const Memory<C>& memory)
      : Own<C>{p, memory}, p(p) {}

  __device__ __forceinline__ R* A() const { return this->tables(); }
  __device__ __forceinline__ R* dh() const { return A() + p.state; }
  __device__ __forceinline__ R* dA() const { return A() + 2 * p.state; }
  __device__ __forceinline__ R* ddt_weight() const { return A() + 3 * p.state; }
};

template <class C>
__device__ __forceinline__ void begin_route(Walk<C>& w) {
  using R = typename C::R;
  const BwdParams& p = w.p;
  const int64_t route = w.route(), channel = w.channel();
  auto clear = [&](R* table, int64_t count) {
    load_states(View<4>{}, 0, 0, 0, count, w.lane, table);
  };
  load_table<R>(p.A, route, channel, p.state, R(kLog2e), w.lane, w.A());
  load_table<R>(p.dt_weight, route, channel, p.rank, R(1), w.lane, w.dt_weight(), kWarps);
  clear(w.dA(), p.state);
  clear(w.ddt_weight(), p.rank);
  if (!p.carry || route + 1 == p.routes) {
    load_states(p.dlast_state, w.b(), p.carry ? 0 : route, channel, p.state, w.lane, w.dh());
  } else if (p.reset_period > 0) {
    clear(w.dh(), p.state);
  }
  w.dD = w.dbias = w.dweight = 0;
#pragma unroll
  for (int r = 0; r < w.kRanks; ++r) w.ddt_weight_sum[r] = 0;
  __syncwarp();  // the tables are complete
}

// A warp without a channel has no share in sums over the channels.
template <class C>
__device__ __forceinline__ void clear_shares(const Walk<C>& w) {
  for (int i = w.lane; i < kShares * C::kSteps; i += 32) {
    share_of(w.memory, i / C::kSteps, w.warp)[i % C::kSteps] = 0;
  }
  for (int64_t r = w.lane; r < w.p.rank; r += 32) w.dt_weight()[r * kWarps] = 0;
}

template <class C>
__device__ __forceinline__ void end_route(const Walk<C>& w) {
  using R = typename C::R;
  const BwdParams& p = w.p;
  __syncwarp();  // the tables are complete
  if (p.dinitial_state && (!p.carry || w.route() == 0)) {
    store_states(p.dinitial_state, w.b(), w.route(), w.channel(), p.state, w.lane, w.dh());
  }
  const int64_t row = (w.b() * p.routes + w.route()) * p.dim + w.channel();
  auto table = [&](void* to, const R* from, int64_t count) {
#pragma unroll 1
    for (int64_t i = w.lane; i < count; i += 32) static_cast<R*>(to)[row * count + i] = from[i];
  };
  table(p.dA, w.dA(), p.state);
  if constexpr (C::kTogether) {
#pragma unroll
    for (int r = 0; r < w.kRanks; ++r) {
      if (r >= p.rank) break;
      const R sum = sum_over_warp(w.ddt_weight_sum[r]);
      if (w.lane == r) w.ddt_weight()[r] = sum;
    }
    __syncwarp();  // the table is complete
  }
  if (p.rank > 0) table(p.ddt_weight, w.ddt_weight(), p.rank);
  auto sum = [&](void* to, R x) {
    x = sum_over_warp(x);
    if (w.lane == 0) static_cast<R*>(to)[row] = x;
  };
  if (p.D) sum(p.dD, w.dD);
  if (p.delta_bias) sum(p.ddelta_bias, w.dbias);
  if (p.weights) sum(p.dweights, w.dweight);
}

// A lane's steps of a tile.
template <class C>
struct Steps {
  using Items = typename C::Items;
  int at[C::kItems];
  unsigned starts;
  Items delta, slope, u, dy;  // dy times the route's weight
  Items d_delta, d_delta_u;
  typename C::R y[C::kFast ? 1 : C::kItems];  // sums over states
};

// One state along a tile, and back. h: before the tile; dh: after it, returned before it.
template <class C>
__device__ __forceinline__ typename C::R walk_state(Walk<C>& w, Steps<C>& s, typename C::R* B_row,
                                                    typename C::R* C_row, typename C::R A,
                                                    typename C::R h_first, typename C::R dh_last,
                                                    typename C::R& dA) {
  using R = typename C::R;
  typename C::Items a, h, B, C_t, dB, dC;
  load_items<C>(B_row, w.lane, B);
  load_items<C>(C_row, w.lane, C_t);
  R product = 1, end = 0;
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    a[j] = decay(s.delta[j], A);
    if (!C::kFast && s.starts >> j & 1) a[j] = 0;
    end = advance<C>(a[j], end, s.delta[j] * s.u[j] * B[j]);
    product *= a[j];
  }
  const R before = enter<C, false>(product, end, h_first, w.lane);
  R back = 0;
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    h[j] = advance<C>(a[j], j == 0 ? before : h[j == 0 ? 0 : j - 1], s.delta[j] * s.u[j] * B[j]);
    if constexpr (!C::kFast) s.y[j] += C_t[j] * h[j];
  }
#pragma unroll
  for (int j = C::kItems - 1; j >= 0; --j) {
    back = advance<C>(a[j], back + C_t[j] * s.dy[j], R(0));
  }
  R dh = enter<C, true>(product, back, dh_last, w.lane);
#pragma unroll
  for (int j = C::kItems - 1; j >= 0; --j) {
    const R h_prev = j == 0 ? before : h[j == 0 ? 0 : j - 1];
    if (!C::kFast && a[j] == 0) {  // nothing of what was before comes through
      const R g = dh + s.dy[j] * C_t[j];
      dC[j] = s.dy[j] * h[j], dB[j] = g * s.delta[j] * s.u[j];
      s.d_delta_u[j] += g * B[j];
      dh = 0;
      continue;
    }
    step_vjp(a[j], h_prev, h[j], s.delta[j], s.delta[j] * s.u[j], A, B[j], C_t[j], s.dy[j], dh, dA,
             dB[j], dC[j], s.d_delta[j], s.d_delta_u[j]);
  }
  store_items<C>(share_of(w.memory, kDB, w.warp), w.lane, dB);
  store_items<C>(share_of(w.memory, kDC, w.warp), w.lane, dC);
  return __shfl_sync(kAllLanes, dh, 0);
}

// What has to be known of a step before the walks along states.
template <class C>
__device__ __forceinline__ void begin_steps(const Walk<C>& w, const Parameters<typename C::R>& k,
                                            int flags, Steps<C>& s) {
  const BwdParams& p = w.p;
  if constexpr (C::kHalves) {
    gather_halves<C>(w.plane(0), flags, p.u.dtype, s.at, s.u, s.dy);
  } else {
    gather<C>(w.plane(kU), flags, s.at, s.u);
    gather<C>(w.plane(kDy), flags, s.at, s.dy);
  }
  add_bias<C>(k.bias, s.delta);
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    s.slope[j] = 1;
    s.dy[j] *= k.weight;
    s.d_delta[j] = s.d_delta_u[j] = 0;
    if constexpr (!C::kFast) s.y[j] = k.D * s.u[j];
  }
  if (p.delta_softplus) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) s.delta[j] = softplus(s.delta[j], s.slope[j]);
  }
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) {
      if (s.at[j] == kSkip) s.delta[j] = s.slope[j] = 0;
    }
  }
}

// What needs y: the gradients of the weights and of the gate.
template <class C>
__device__ __forceinline__ void add_outputs(Walk<C>& w, const Parameters<typename C::R>& k,
                                            const Tile& tile, Steps<C>& s) {
  if (w.p.weights) {
    typename C::Items dy;
    gather<C>(w.plane(kDy), tile.flags, s.at, dy);
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) w.dweight += s.y[j] * dy[j];
  }
  if (w.p.z) add_to<C>(w.plane(kY), tile.flags, s.at, w.lane, k.weight, s.y);
}

// After the last state: delta becomes ddelta.
template <class C>
__device__ __forceinline__ void end_steps(Walk<C>& w, const Parameters<typename C::R>& k,
                                          const Tile& tile, Steps<C>& s) {
  using R = typename C::R;
  typename C::Items du;
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) {
    du[j] = k.D * s.dy[j] + s.delta[j] * s.d_delta_u[j];
    s.delta[j] = (s.d_delta[j] * R(kLn2) + s.u[j] * s.d_delta_u[j]) * s.slope[j];
    w.dD += s.dy[j] * s.u[j];
    w.dbias += s.delta[j];
  }
  // Again, rather than kept in registers while states are walked.
  if constexpr (!C::kFast) load_places<C>(w.p, tile.place, w.lane, s.at);
  add_to<C>(w.plane(kDuPlane<C>), tile.flags, s.at, w.lane, R(1), du);
  if constexpr (!C::kFast) add_outputs(w, k, tile, s);
  store_items<C>(share_of(w.memory, kDDelta, w.warp), w.lane, s.delta);
}

// ddt_weight += sum over the steps of ddelta dt, for the ranks of a pass
template <class C>
__device__ __forceinline__ void add_to_dt_weight(Walk<C>& w, const Pass& pass, typename C::R* rows,
                                                 const typename C::Items& ddelta) {
  using R = typename C::R;
  if constexpr (C::kTogether) {
#pragma unroll
    for (int r = 0; r < w.kRanks; ++r) {
      if (r >= pass.rows) break;
      typename C::Items dt;
      load_items<C>(rows + r * C::kSteps, w.lane, dt);
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) w.ddt_weight_sum[r] += ddelta[j] * dt[j];
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < pass.rows; r += 4) {
      R sums[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i] = 0;
        if (r + i >= pass.rows) continue;
        typename C::Items dt;
        load_items<C>(rows + (r + i) * C::kSteps, w.lane, dt);
#pragma unroll
        for (int j = 0; j < C::kItems; ++j) sums[i] += ddelta[j] * dt[j];
      }
      const R sum = sums_over_warp<4>(sums, w.lane);
      const int mine = r + w.lane / 8;
      if (w.lane % 8 == 0 && mine < pass.rows) w.ddt_weight()[pass.first_row + mine] += sum;
    }
  }
}

// h before the tile, of the state that the lane has in a pass.
template <class C>
__device__ __forceinline__ typename C::R saved_state(const Walk<C>& w, const Tile& tile,
                                                     const Pass& pass, bool active) {
  const BwdParams& p = w.p;
  if (!active || w.lane >= pass.states) return 0;
  const int64_t row = (tile.b * p.routes + tile.route) * p.tiles + tile.i;
  const int64_t at = (row * p.state + pass.first_state + w.lane) * p.dim + w.channel();
  return __ldg(static_cast<const typename C::R*>(p.chunk_states) + at);
}

// The states of a pass, one after the other for the whole block: their dB and dC are summed over it.
// Meanwhile the helpers bring the next rows. The barrier after the last is the caller's.
template <class C, class Stage>
__device__ __forceinline__ void walk_states(Walk<C>& w, const Parameters<typename C::R>& k,
                                            const Tile& tile, const Pass& pass, bool active,
                                            typename C::R* rows, typename C::R h_of_lane,
                                            Steps<C>& s, Stage&& stage) {
  using R = typename C::R;
  const BwdParams& p = w.p;
  const bool mine = active && w.lane < pass.states;  // lane n has what is known of the n-th
  const int64_t n0 = pass.first_state + w.lane;
  const R A_of_lane = mine ? w.A()[n0] : R(0);
  R dh_of_lane = mine ? w.dh()[n0] : R(0);
#pragma unroll 1
  for (int n = 0; n < pass.states; ++n) {
    if (active) {
      R dA = 0;
      const R dh =
          walk_state(w, s, rows + (pass.B + n) * C::kSteps, rows + (pass.C + n) * C::kSteps,
                     __shfl_sync(kAllLanes, A_of_lane, n), __shfl_sync(kAllLanes, h_of_lane, n),
                     __shfl_sync(kAllLanes, dh_of_lane, n), dA);
      dA = sum_over_warp(dA);
      if (w.lane == n) {
        dh_of_lane = dh;
        w.dA()[n0] += dA;
      }
      if (pass.first_state + n + 1 == p.state) end_steps(w, k, tile, s);
    } else if (n == 0) {
      stage();
    }
    __syncthreads();  // the shares of all channels are there
    write_sums(p, w.memory, tile, pass.first_state + n);
    if (n + 1 < pass.states) __syncthreads();  // the shares have been read
  }
  if (mine) w.dh()[n0] = dh_of_lane;
}

// All tiles of a route from the last to the first, for all channels of the block.
template <class C>
__device__ __forceinline__ void walk_route(Walk<C>& w) {
  using R = typename C::R;
  const BwdParams& p = w.p;
  const Memory<C>& memory = w.memory;
  const Passes<C> passes(p, memory.now.task);
  const bool active = w.is_there();
  // Low-rank delta comes once more, for the gradient of its weights, if it does not stay.
  const int again = p.rank > 0 ? passes.of_delta : 0, count = passes.count + again;
  auto pass_at = [&](int i) { return passes.at(i < passes.count ? i : i - passes.count); };
  const int tiles = int(p.tiles);
  if (tiles == 0) return;
  if (!active) stage_pass<C>(p, memory, tiles - 1, pass_at(0), true, memory.buffer(p, 0));
  const Parameters<R> k(p, w.route(), active ? w.channel() : memory.now.task.channel);
  __syncthreads();        // the first rows and the planes are in place
  int done = 0;           // passes
  int places[C::kItems];  // of the next tile: on their way while one is walked
  if (active) load_places<C>(p, memory.now.tile[(tiles - 1) & 1].place, w.lane, places);
#pragma unroll 1
  for (int t = tiles - 1; t >= 0; --t) {
    const Tile& tile = memory.now.tile[t & 1];
    Steps<C> s;
    if (active) {
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) s.at[j] = places[j];
      if (t > 0) load_places<C>(p, tile.place - p.chunk, w.lane, places);
      s.starts = find_starts<C>(p, tile, w.lane);
#pragma unroll
      for (int j = 0; j < C::kItems; ++j) s.delta[j] = 0;
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i, ++done) {
      const Pass pass = pass_at(i);
      const bool back = i >= passes.count, last = i + 1 == count;
      R* rows = memory.buffer(p, done);
      auto stage = [&] {
        if (last && t == 0) return;
        stage_pass<C>(p, memory, last ? t - 1 : t, pass_at(last ? 0 : i + 1), last,
                      memory.buffer(p, done + 1));
      };
      const R h = saved_state(w, tile, pass, active);  // on its way while step sizes are found
      if (active && !back) {
        if (pass.has_delta) {
          add_delta<C>(p, rows, pass, w.dt_weight(), w.channel(), w.lane, s.delta);
        }
        if (passes.completes_delta(i)) begin_steps(w, k, tile.flags, s);
      }
      if (pass.has_states) {
        walk_states(w, k, tile, pass, active, rows, h, s, stage);
      } else if (!active) {
        stage();
      }
      if (active && p.rank > 0 && pass.has_delta && (back || passes.together)) {
        add_to_dt_weight(w, pass, rows, s.delta);
      }
      __syncthreads();  // rows and shares have been read, the next rows are in place
    }
  }
}

// Planes of u, and of the gradient of y before the gate.
template <class C>
__device__ __forceinline__ void read_planes(const BwdParams& p, const Memory<C>& memory) {
  const Task& task = memory.now.task;
  const int64_t route = memory.now.route;
  const bool first = route + 1 == p.routes;
  if constexpr (C::kHalves) {
    const auto words = planes_of(p, memory, 0);
    auto half = [&](int i) {
      return [&words, i](int c, int t) -> uint16_t& {
        return reinterpret_cast<uint16_t*>(&words.at(c, t))[i];
      };
    };
    if (first || p.u_per_route) read_halves(p.u, task, route, p.tokens, int(blockDim.x), half(0));
    if (first || p.y_per_route) {
      read_halves(p.dy, task, p.y_per_route ? route : 0, p.tokens, int(blockDim.x), half(1));
    }
    return;
  }
  if (first || p.u_per_route) {
    read_tokens(p.u, task, route, p.tokens, Meet::kAssign, planes_of(p, memory, kU));
  }
  if (!first && !p.y_per_route) return;
  const auto dy = planes_of(p, memory, kDy);
  if (!p.dy) return dy.clear(task.channels);
  read_tokens(p.dy, task, p.y_per_route ? route : 0, p.tokens, Meet::kAssign, dy);
  if (!p.z) return;
  __syncthreads();  // the gradient is there
  read_tokens(with_routes(p.z), task, 0, p.tokens, Meet::kTimesSilu, dy);
}

// dz = dout y silu'(z)
template <class C>
__device__ __forceinline__ void write_dz(const BwdParams& p, const Memory<C>& memory) {
  const Task& task = memory.now.task;
  const auto y = planes_of(p, memory, kY);
  if (p.dy) {
    read_tokens(p.dy, task, 0, p.tokens, Meet::kTimes, y);
  } else {
    y.clear(task.channels);
  }
  __syncthreads();  // dout y is there
  read_tokens(with_routes(p.z), task, 0, p.tokens, Meet::kTimesSiluSlope, y);
  __syncthreads();  // dz is there
  write_tokens(with_routes(p.dz), task, 0, p.tokens, y);
}

template <class C>
__global__ __launch_bounds__(kBwdThreads, 1) void bwd_kernel(const __grid_constant__ BwdParams p,
                                                             int64_t tasks) {
  const Memory<C> memory(p, kShares, kinds_of<C>(p));
  Walk<C> w(p, memory);
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
#pragma unroll 1
    for (int64_t route = p.routes - 1; route >= 0; --route) {
      begin_block_route(p, memory.now, i, route);
      const Task& task = memory.now.task;
      const bool first = route + 1 == p.routes;
      read_planes(p, memory);
      const auto du = planes_of(p, memory, kDuPlane<C>);
      if (first || p.u_per_route) du.clear(task.channels);
      if constexpr (!C::kFast) {
        if (first && p.z) planes_of(p, memory, kY).clear(task.channels);
      }
      w.is_there() ? begin_route(w) : clear_shares(w);
      walk_route(w);
      if (w.is_there()) end_route(w);
      if (!p.u_per_route && route > 0) continue;
      __syncthreads();  // du is complete
      write_tokens(p.du, task, p.u_per_route ? route : 0, p.tokens, du);
    }
    if constexpr (!C::kFast) {
      if (p.z) write_dz(p, memory);
    }
  }
}

}  // namespace

void bwd(const BwdParams& p, cudaStream_t stream) {
  if (p.plan.pair.pairs > 0) return bwd_pairs(p, stream);
  const int64_t tasks = p.batch * p.plan.blocks;
  if (tasks == 0) return;
  with_config<true>(p, [&](auto config) {
    using C = decltype(config);
    launch("selective_scan_2d bwd", bwd_kernel<C>, p.plan.grid, kBwdThreads,
           size_t(p.plan.shared_bytes), stream, p, tasks);
  });
}

}  // namespace statescan::selective_scan_2d::cuda
