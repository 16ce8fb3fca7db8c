// What the walks of parts need around them, see parts.cuh: whether a token comes twice, planes from
// maps and back, and the carry from part to part.
#include <algorithm>

#include "common/launch.h"
#include "selective_scan_2d/parts.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPlaneBytes = 16 << 20;  // so much stays in second-level cache

// Thread: a step of a route. Whoever comes to a token second says so.
__global__ __launch_bounds__(kThreads) void repeats_kernel(const Inputs p, Divisor steps,
                                                           Divisor routes, int32_t* visits,
                                                           int64_t tasks) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < tasks;
       i += int64_t(gridDim.x) * kThreads) {
    int64_t t, route;
    const int64_t row = steps.divide(i, t), table = routes.divide(row, route);
    const int token = token_at(p, table, route, t);
    if (token < 0 || atomicExch(visits + row * p.tokens + token, 1) == 0) continue;
    atomicMax(p.parts.repeats + row, 1);
  }
}

// 32 tokens of a group of channels, on their way between a map and a plane.
constexpr int kSquarePitch = kLanes + 1, kSquareSize = kLanes * kSquarePitch;
struct Square {
  SharedArray<float, kSquareSize> number;

  __device__ __forceinline__ float& at(int channel, int token) {
    return number[channel * kSquarePitch + token];
  }
};
struct Squares {
  Divisor tiles, groups, routes;
  int64_t tasks;
  Squares(const Inputs& p, int64_t routes)
      : tiles((p.tokens + kLanes - 1) / kLanes),
        groups(p.parts.groups),
        routes(routes),
        tasks(p.batch * routes * p.parts.groups * int64_t(tiles.divisor)) {}
};

// Where a square is, and f(row, lane) for all of its rows and lanes.
struct SquareTask {
  int64_t b, route, group, token;
  __device__ __forceinline__ SquareTask(const Squares& s, int64_t i) {
    i = s.groups.divide(s.tiles.divide(i, token), group);
    b = s.routes.divide(i, route);
    token *= kLanes;
  }
  template <class F>
  __device__ __forceinline__ static void for_rows(F&& f) {
#pragma unroll
    for (int i = 0; i < kLanes; i += kThreads / kLanes) {
      f(i + int(threadIdx.x) / kLanes, int(threadIdx.x) % kLanes);
    }
  }
  // f(channel, token) of those that there are: neighbours in memory for neighbouring lanes.
  template <class F>
  __device__ __forceinline__ void for_numbers(const Inputs& p, bool channels_inside, F&& f) const {
    for_rows([&](int row, int lane) {
      const int c = channels_inside ? lane : row, t = channels_inside ? row : lane;
      if (group * kLanes + c < p.dim && token + t < p.tokens) f(c, t);
    });
  }
  __device__ __forceinline__ int64_t offset(const View<4>& x) const {
    return b * x.stride[0] + route * x.stride[1] + group * kLanes * x.stride[2] +
           token * x.stride[3];
  }
};

// Numbers of the square meet those of a map.
template <class F>
__device__ __forceinline__ void meet_map(const Inputs& p, const View<4>& x, const SquareTask& task,
                                         Square& square, F&& f) {
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= 4) {
      const T* from = static_cast<const T*>(x.data) + task.offset(x);
      task.for_numbers(p, x.stride[2] < x.stride[3], [&](int c, int t) {
        float& number = square.at(c, t);
        number = f(number, to_number(from[c * x.stride[2] + t * x.stride[3]]));
      });
    }
  });
}

// Block: a square.
__global__ __launch_bounds__(kThreads) void into_kernel(const Inputs p, const View<4> x,
                                                        const View<3> gate, float* planes,
                                                        float* cleared, Squares squares) {
  Square& square = block_shared<Square>();
  for (int64_t i = blockIdx.x; i < squares.tasks; i += gridDim.x) {
    const SquareTask task(squares, i);
    __syncthreads();  // the square before has been read
    SquareTask::for_rows([&](int row, int lane) { square.at(row, lane) = 0; });
    __syncthreads();  // channels past the last are zero
    if (x) {
      meet_map(p, x, task, square, [](float, float x) { return x; });
      __syncthreads();  // x is there
      if (gate) {
        meet_map(p, with_routes(gate), task, square, [](float x, float z) { return x * silu(z); });
        __syncthreads();  // it is gated
      }
    }
    const int64_t routes = int64_t(squares.routes.divisor);
    float* to = column_of(p, planes, task.b, routes, task.route, task.group);
    SquareTask::for_rows([&](int t, int lane) {
      if (task.token + t < p.tokens) to[(task.token + t) * kLanes] = square.at(lane, t);
    });
    for (int64_t slot = task.route; slot < p.parts.at_once && cleared != nullptr; slot += routes) {
      to = column_of(p, cleared, task.b, p.parts.at_once, slot, task.group);
      SquareTask::for_rows([&](int t, int) {
        if (task.token + t < p.tokens) to[(task.token + t) * kLanes] = 0;
      });
    }
  }
}

// Block: a square.
__global__ __launch_bounds__(kThreads) void from_kernel(const Inputs p, const float* planes,
                                                        int slots, const View<4> x,
                                                        const View<3> gate, const View<4> dout,
                                                        bool is_slope, Squares squares) {
  Square& square = block_shared<Square>();
  for (int64_t i = blockIdx.x; i < squares.tasks; i += gridDim.x) {
    const SquareTask task(squares, i);
    __syncthreads();  // the square before has been read
    SquareTask::for_rows([&](int t, int lane) {
      float sum = 0;
      if (task.token + t < p.tokens) {
#pragma unroll 4
        for (int slot = 0; slot < slots; ++slot) {
          sum += column_of(p, const_cast<float*>(planes), task.b, p.parts.at_once,
                           slots > 1 ? slot : task.route, task.group)[(task.token + t) * kLanes];
        }
      }
      square.at(lane, t) = sum;
    });
    __syncthreads();  // the sums are there
    if (is_slope) {
      if (dout) {
        meet_map(p, dout, task, square, [](float y, float dout) { return y * dout; });
      } else {
        SquareTask::for_rows([&](int row, int lane) { square.at(row, lane) = 0; });
      }
      __syncthreads();  // dout y is there
    }
    if (gate) {
      meet_map(p, with_routes(gate), task, square, [&](float y, float z) {
        const float s = sigmoid(z);
        return y * (is_slope ? silu_slope(z, s) : z * s);
      });
      __syncthreads();  // what the gate makes of it is there
    }
    with_device_type(x.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* to = static_cast<T*>(x.data) + task.offset(x);
      task.for_numbers(p, x.stride[2] < x.stride[3], [&](int c, int t) {
        to[c * x.stride[2] + t * x.stride[3]] = from_number<T>(square.at(c, t));
      });
    });
  }
}

// The carry along all parts of a route, or of all routes. A warp has 8 parts, or more if there are many.
constexpr int kCarryWarps = 32, kCarryThreads = kCarryWarps * kLanes, kAhead = 8;
struct CarryShared {
  SharedArray<float, kCarryThreads> factor, end;
};

// A piece of a carry: h -> factor h + end, where a negative factor (no power is) lets nothing through.
// 0 stays 0, also where the factor of a growing state is infinite.
struct Piece {
  float factor = 1, end = 0;
  __device__ __forceinline__ float operator()(float h) const {
    return factor < 0 || h == 0 ? end : factor * h + end;
  }
  __device__ __forceinline__ void append(const Piece& next) {
    end = next(end);
    factor = factor < 0 || next.factor < 0 ? -1 : factor * next.factor;
  }
};

struct Carry {
  bool backward;
  View<4> begin, end;  // (batch, route or 1, dim, state)
  float *states, *chunk_states;
};

// Thread: a channel and state, and a run of parts. The i-th of all parts, in the order of the walk.
struct Chain {
  const Inputs& p;
  const Carry& carry;
  int64_t b, route, n, channel;  // route: the first
  int64_t length;

  struct At {
    int64_t route, part;
    bool anew;  // nothing comes from the part before
  };
  __device__ __forceinline__ At at(int64_t i) const {
    if (carry.backward) i = length - 1 - i;
    if (!p.carry) return {route, i, false};
    const int64_t r = i / p.parts.count, part = i - r * p.parts.count;
    const bool begins_route =
        carry.backward ? part + 1 == p.parts.count && r + 1 < p.routes : part == 0 && r > 0;
    return {r, part, p.reset_period > 0 && begins_route};
  }
  __device__ __forceinline__ int64_t row(const At& at) const {
    return (b * p.routes + at.route) * p.parts.count + at.part;
  }
  __device__ __forceinline__ int64_t state(const At& at) const {
    return (row(at) * p.state + n) * p.dim + channel;
  }
  __device__ __forceinline__ bool resets_in(int64_t part) const {
    const int64_t first = part * kPartSteps, left = p.steps - first;
    const int64_t last = first + (left < kPartSteps ? left : kPartSteps) - 1;
    return p.reset_period > 0 && last >= p.reset_period &&
           (first == 0 || (first - 1) / p.reset_period < last / p.reset_period);
  }
  __device__ __forceinline__ float A(int64_t of_route) const {
    return float(kLog2e) * load_element<float>(p.A.data, p.A.dtype,
                                               of_route * p.A.stride[0] + channel * p.A.stride[1] +
                                                   n * p.A.stride[2]);
  }
  // Calls f(where, its piece) for parts [first, end) in order; what they are is loaded ahead.
  template <class F>
  __device__ __forceinline__ void for_parts(int64_t first, int64_t end, F&& f) const {
    int64_t of_route = -1;
    float A_log2e = 0;
#pragma unroll 1
    for (int64_t i = first; i < end; i += kAhead) {
      float walked[kAhead], sum[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= end) continue;
        const At where = at(i + j);
        walked[j] = carry.states[state(where)];
        sum[j] = p.parts.step_sums[row(where) * p.dim + channel];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= end) continue;
        const At where = at(i + j);
        if (where.route != of_route) of_route = where.route, A_log2e = A(of_route);
        const float factor = selective_scan::decay(sum[j], A_log2e);
        f(where, Piece{resets_in(where.part) ? -1.0f : factor, walked[j]});
      }
    }
  }
};

// Block: 32 channels of a state of a chain; each warp a run of its parts, first as one piece.
__global__ __launch_bounds__(kCarryThreads) void carry_kernel(const Inputs p, const Carry carry,
                                                              Divisor groups, Divisor state,
                                                              Divisor chains, int64_t tasks) {
  CarryShared& shared = block_shared<CarryShared>();
  const int warp = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
  const int warps = int(blockDim.x) / kLanes;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    int64_t group, n, chain;
    const int64_t b = chains.divide(state.divide(groups.divide(i, group), n), chain);
    const int64_t channel = group * kLanes + lane;
    const Chain c{
        p, carry, b, chain, n, channel, p.carry ? p.routes * p.parts.count : p.parts.count};
    const int64_t each = (c.length + warps - 1) / warps;
    const int64_t first = warp * each < c.length ? warp * each : c.length;
    const int64_t end = channel >= p.dim          ? first
                        : first + each < c.length ? first + each
                                                  : c.length;
    Piece all;
    c.for_parts(first, end, [&](const Chain::At& at, const Piece& piece) {
      if (at.anew) all = {-1, 0};
      all.append(piece);
    });
    __syncthreads();  // what was there has been read
    shared.factor[warp * kLanes + lane] = all.factor;
    shared.end[warp * kLanes + lane] = all.end;
    __syncthreads();  // the pieces are known
    if (channel >= p.dim) continue;
    auto of_chain = [&](const View<4>& x) {
      return b * x.stride[0] + chain * x.stride[1] + channel * x.stride[2] + n * x.stride[3];
    };
    float h = carry.begin
                  ? load_element<float>(carry.begin.data, carry.begin.dtype, of_chain(carry.begin))
                  : 0.0f;
    for (int w = 0; w < warp; ++w) {
      h = Piece{shared.factor[w * kLanes + lane], shared.end[w * kLanes + lane]}(h);
    }
    c.for_parts(first, end, [&](const Chain::At& at, const Piece& piece) {
      if (at.anew) h = 0;
      carry.states[c.state(at)] = h;
      if (carry.chunk_states != nullptr && at.part * kPartSteps % p.chunk == 0) {
        const int64_t row = (b * p.routes + at.route) * p.chunks() + at.part * kPartSteps / p.chunk;
        carry.chunk_states[(row * p.state + n) * p.dim + channel] = h;
      }
      h = piece(h);
    });
    if (warp == warps - 1 && carry.end) {
      store_element(carry.end.data, carry.end.dtype, of_chain(carry.end), h);
    }
  }
}

// Are parts faster than routes as wholes with planes in shared memory? In cycles, by the instructions of
// docs/selective_scan_2d.md on 132 multiprocessors.
bool are_faster(const Problem& p, bool backward, const Plan& whole, int64_t groups) {
  // A warp has a tile, and issues every third cycle: too few are there to hide its latencies. Those of
  // pairs of channels issue 0.8 of the time, if there are enough of them.
  const PairLayout& pair = whole.pair;
  const bool pairs = pair.pairs > 0;
  const int64_t tile = pairs      ? backward             ? 1650
                                    : pair.channels == 4 ? 1030
                                                         : 480 + 115 * p.state
                       : backward ? 1220 + 540 * p.state
                                  : 480 + 113 * p.state;
  const int64_t rounds = pairs ? pair.rounds : p.chunks();
  const int64_t together = pairs ? pair.pairs * pair.team * 3 / 8 : 0;
  const int64_t turns = (p.batch * whole.blocks + 131) / 132;
  const int64_t wholes = turns * p.routes * rounds * std::max<int64_t>(3, together) * tile;
  // A warp has a step of 32 channels, and 0.6 of all issue slots are used; launches come on top.
  const int64_t step = backward ? 250 + 40 * p.state : 110 + 12 * p.state;
  const int64_t warp_steps = p.batch * p.routes * p.steps * groups;
  const int64_t launches = backward ? 50000 : 35000;
  return launches + warp_steps * step * 10 / (6 * 4 * 132) < wholes;
}

}  // namespace

Parts plan_parts(const Problem& p, bool backward, const Plan& whole, int64_t shared_limit) {
  Parts parts{};
  const int64_t least = std::min({p.batch, p.dim, p.steps, p.tokens, p.state});
  if (p.compute != DType::kFloat32 || least == 0) return parts;
  parts.groups = (p.dim + kLanes - 1) / kLanes;
  if (whole.on_chip && !are_faster(p, backward, whole, parts.groups)) return Parts{};
  parts.plane_elements = p.batch * parts.groups * kLanes * p.tokens;
  parts.line_bytes = 4 * kLanes;
  const int64_t in_cache = kPlaneBytes / (4 * parts.plane_elements);
  if (p.dim < 8 && in_cache == 0) return Parts{};  // memory for lanes without a channel
  const int64_t numbers = part_numbers(p, backward);
  auto deal = [&](int64_t most) {
    const int64_t blocks = (parts.groups + most - 1) / most;
    parts.warps = int((parts.groups + blocks - 1) / blocks);
    parts.shared_bytes = part_memory_bytes(p, numbers, parts.warps);
    return parts.shared_bytes <= shared_limit;
  };
  int most = backward ? kBwdGroups : kFwdGroups;
  while (!deal(most)) {
    if (--most == 0) return Parts{};
  }
  parts.count = (p.steps + kPartSteps - 1) / kPartSteps;
  parts.at_once = int(std::clamp<int64_t>(in_cache / (backward && p.z ? 2 : 1), 1, p.routes));
  if (backward ? p.u_per_route : p.y_per_route) parts.at_once = int(p.routes);
  return parts;
}

void find_repeats(const Inputs& p, int32_t* visits, cudaStream_t stream) {
  const int64_t tasks = p.tables() * p.routes * p.steps;
  launch("selective_scan_2d repeats", repeats_kernel, blocks_for(tasks, kThreads), kThreads, 0,
         stream, p, Divisor(p.steps), Divisor(p.routes), visits, tasks);
}

void into_planes(const Inputs& p, const View<4>& x, const View<3>& gate, int64_t routes,
                 float* planes, float* cleared, cudaStream_t stream) {
  const Squares squares(p, routes);
  launch("selective_scan_2d into planes", into_kernel, blocks_for(squares.tasks, 1), kThreads, 0,
         stream, p, x, gate, planes, cleared, squares);
}

void from_planes(const Inputs& p, const float* planes, bool per_route, const View<4>& x,
                 const View<3>& gate, const View<4>* dout, cudaStream_t stream) {
  const Squares squares(p, per_route ? p.routes : 1);
  launch("selective_scan_2d from planes", from_kernel, blocks_for(squares.tasks, 1), kThreads, 0,
         stream, p, planes, per_route ? 1 : p.parts.at_once, x, gate, dout ? *dout : View<4>{},
         dout != nullptr, squares);
}

void carry_parts(const Inputs& p, bool backward, const View<4>& begin, const View<4>& end,
                 void* chunk_states, cudaStream_t stream) {
  const int64_t chains = p.carry ? 1 : p.routes,
                tasks = p.batch * chains * p.state * p.parts.groups;
  const int64_t length = p.carry ? p.routes * p.parts.count : p.parts.count;
  const int warps = int(std::min<int64_t>((length + kAhead - 1) / kAhead, kCarryWarps));
  const Carry carry{backward, begin, end, backward ? p.parts.dh : p.parts.h,
                    static_cast<float*>(chunk_states)};
  launch("selective_scan_2d carry", carry_kernel, blocks_for(tasks, 1), warps * kLanes, 0, stream,
         p, carry, Divisor(p.parts.groups), Divisor(p.state), Divisor(chains), tasks);
}

}  // namespace statescan::selective_scan_2d::cuda
