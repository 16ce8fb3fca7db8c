// Maps too large for shared memory, and batches too small to fill a GPU with whole routes: all parts of
// a route, of 64 steps each, are walked at the same time.
//
//   map --> planes (token, 32 channels) of floats
//   ends:   what each part makes of h = 0, and the sum of its step sizes     all parts at once
//   carry:  from part to part; what enters each                              blocks of 32 channels
//   walk:   from there, reads planes of u and adds to planes of y            all parts at once
//   planes of y --gate--> map
//
//   block:  a part of a route, and at most 8 groups of 32 channels (backward: 4)
//   warp:   a group: its 32 channels of a token are neighbours, so any route reads whole lines
//   lane:   a channel, one step after the other, 8 of them in registers
//
// What a step needs for all channels (B, C, dt) is in shared memory, [row][step], and read by all lanes
// at once. A number of a plane is added to by one lane: within a route since a token comes once (a
// route where one comes twice is walked by one block, part after part), from route to route since
// they follow each other, or have planes of their own that are added up in order.
#pragma once

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/lanes.cuh"
#include "common/shared.cuh"
#include "selective_scan_2d/walk.cuh"

namespace statescan::selective_scan_2d::cuda {

inline constexpr int kLanes = 32;                     // channels of a group
inline constexpr int kFwdGroups = 8, kBwdGroups = 4;  // of a block, at most
inline constexpr int kPartSteps = 64;                 // every tile ends with a part
inline constexpr int kSome = 8;                       // steps of a lane in registers
inline constexpr int kFwdPartThreads = kLanes * kFwdGroups, kBwdPartThreads = kLanes * kBwdGroups;

// How tasks are numbered: groups of channels first, then parts, routes, batch elements.
struct Deal {
  Divisor blocks, parts, routes;
  int64_t first_route, first_slot, tasks;

  Deal(const Inputs& p, int64_t first_route, int64_t routes)
      : blocks(p.parts.blocks()),
        parts(p.parts.count),
        routes(routes),
        first_route(first_route),
        first_slot(first_route % p.parts.at_once),
        tasks(p.batch * routes * p.parts.count * p.parts.blocks()) {}
};

// Launches for all routes, `count` at a time.
template <class F>
void for_rounds(const Inputs& p, int64_t count, F&& launch_routes) {
  for (int64_t route = 0; route < p.routes; route += count) {
    const int64_t left = p.routes - route;
    launch_routes(Deal(p, route, left < count ? left : count));
  }
}

// What a lane works on.
struct PartTask {
  int64_t b, route, slot, part;  // slot: of the planes that the route adds to
  int64_t group, channel;        // past the last they are the last, and nothing is stored
  bool warp_there, there;        // a group, a channel
};
__device__ __forceinline__ PartTask part_task(const Inputs& p, const Deal& deal, int64_t i) {
  PartTask t;
  int64_t block;
  i = deal.parts.divide(deal.blocks.divide(i, block), t.part);
  t.b = deal.routes.divide(i, t.route);
  t.slot = deal.first_slot + t.route;
  t.route += deal.first_route;
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x) / kLanes, 0);
  t.group = block * p.parts.warps + warp;
  t.warp_there = t.group < p.parts.groups;
  if (!t.warp_there) t.group = p.parts.groups - 1;
  t.channel = t.group * kLanes + int(threadIdx.x) % kLanes;
  t.there = t.warp_there && t.channel < p.dim;
  if (t.channel >= p.dim) t.channel = p.dim - 1;
  return t;
}

__device__ __forceinline__ bool has_repeats(const Inputs& p, const PartTask& t) {
  return __ldg(p.parts.repeats + (p.place_per_batch ? t.b : 0) * p.routes + t.route) != 0;
}

// A lane's column of a plane: that of a token is kLanes further for each token.
__device__ __forceinline__ float* column_of(const Inputs& p, float* planes, int64_t b,
                                            int64_t count, int64_t i, int64_t group) {
  return planes + ((b * count + i) * p.parts.groups + group) * p.tokens * kLanes +
         int(threadIdx.x) % kLanes;
}
__device__ __forceinline__ float* u_column(const Inputs& p, const PartTask& t) {
  return column_of(p, p.parts.u, t.b, p.u_per_route ? p.routes : 1, p.u_per_route ? t.route : 0,
                   t.group);
}
__device__ __forceinline__ float* sum_column(const Inputs& p, float* planes, const PartTask& t) {
  return column_of(p, planes, t.b, p.parts.at_once, t.slot, t.group);
}

// Of a lane: where its number of state 0 is in (batch, route, part, state, dim); one of
// (batch, route, part, dim).
__device__ __forceinline__ int64_t step_sum_at(const Inputs& p, const PartTask& t, int64_t part) {
  return ((t.b * p.routes + t.route) * p.parts.count + part) * p.dim + t.channel;
}
__device__ __forceinline__ int64_t state_at(const Inputs& p, const PartTask& t, int64_t part) {
  return ((t.b * p.routes + t.route) * p.parts.count + part) * p.state * p.dim + t.channel;
}

// The shared memory of a block: what it knows of a part, and a column of numbers for each thread.
struct PartMemory {
  int* place;  // (step)
  float* row;  // (row, step): delta's, B's, C's
  float* own;  // (number, thread)

  __device__ __forceinline__ explicit PartMemory(const Inputs& p)
      : place(dynamic_shared<int>()),
        row(reinterpret_cast<float*>(place + kPartSteps)),
        own(row + (p.rank + 2 * p.state) * kPartSteps + threadIdx.x) {}

  __device__ __forceinline__ float* B(const Inputs& p) const { return row + p.rank * kPartSteps; }
  __device__ __forceinline__ float* C(const Inputs& p) const {
    return row + (p.rank + p.state) * kPartSteps;
  }
  // The i-th number of the thread.
  __device__ __forceinline__ float& operator()(int64_t i) const { return own[i * blockDim.x]; }
};
// How many numbers a thread has, see parts_fwd.cu and parts_bwd.cu.
STATESCAN_HOST_DEVICE constexpr int64_t part_numbers(const Problem& p, bool backward) {
  return backward ? (3 + kPartSteps / kSome) * p.state + 2 * p.rank : 2 * p.state + p.rank;
}
constexpr int64_t part_memory_bytes(const Problem& p, int64_t numbers, int warps) {
  return 4 * kPartSteps * (1 + p.rank + 2 * p.state) + 4 * numbers * warps * kLanes;
}

// row[i][t] = x[b, route, i, begin + t]; 0 at steps to skip, and with `no_ghosts` at all steps of no
// token, whatever is there.
__device__ __forceinline__ void stage_narrow(const Inputs& p, const View<4>& x,
                                             const PartTask& task, int64_t begin, int count,
                                             bool no_ghosts, int* place, float* row) {
  const int64_t first = task.b * x.stride[0] + task.route * x.stride[1] + begin * x.stride[3];
  const int least = no_ghosts ? 0 : int(kGhost);  // place at which x is read
  with_device_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= 4) {
      constexpr int kPack = kPackSize<T>, kPacks = kPartSteps / kPack;
      const T* from = static_cast<const T*>(x.data) + first;
      if (x.stride[3] == 1 && begin + kPartSteps <= p.steps &&
          is_aligned(from, x.stride[2], kPack)) {
#pragma unroll 2
        for (int i = int(threadIdx.x); i < count * kPacks; i += int(blockDim.x)) {
          const int t = i % kPacks * kPack;
          float v[kPack];
          Pack<T, kPack>::load(from + i / kPacks * x.stride[2] + t).unpack(v);
#pragma unroll
          for (int j = 0; j < kPack; j += 4) {
            const auto at = several<4>(place[t + j]);
            auto& to = several<4>(row[i * kPack + j]);
#pragma unroll
            for (int k = 0; k < 4; ++k) to.x[k] = at.x[k] >= least ? v[j + k] : 0.0f;
          }
        }
        return;
      }
#pragma unroll 4
      for (int i = int(threadIdx.x); i < count * kPartSteps; i += int(blockDim.x)) {
        const int t = i % kPartSteps;
        row[i] = place[t] >= least ? to_number(from[i / kPartSteps * x.stride[2] + t * x.stride[3]])
                                   : 0.0f;
      }
    }
  });
}

// Brings what the block needs of the steps from `begin` on.
__device__ __forceinline__ void stage_part(const Inputs& p, const PartTask& task, int64_t begin,
                                           bool with_B, bool with_C, const PartMemory& memory) {
  __syncthreads();  // what is there has been read
  for (int t = int(threadIdx.x); t < kPartSteps; t += int(blockDim.x)) {
    memory.place[t] = begin + t < p.steps
                          ? token_at(p, p.place_per_batch ? task.b : 0, task.route, begin + t)
                          : int(kSkip);
  }
  __syncthreads();  // places are known
  if (p.rank > 0) {
    stage_narrow(p, p.delta, task, begin, int(p.rank), false, memory.place, memory.row);
  }
  if (with_B) stage_narrow(p, p.B, task, begin, int(p.state), true, memory.place, memory.B(p));
  if (with_C) stage_narrow(p, p.C, task, begin, int(p.state), true, memory.place, memory.C(p));
  __syncthreads();  // rows are in place
}

// What enters each part of every route from what each makes of 0, in place; see parts.cu. Backward: dh
// from the last part to the first.
void carry_parts(const Inputs& p, bool backward, const View<4>& begin, const View<4>& end,
                 void* chunk_states, cudaStream_t stream);

// Between maps and planes. Into: x, times silu(gate) if there is one; planes that are added to are
// cleared. From: the sum over `slots`
// planes in order, times silu(gate), or with `dout` times dout silu'(gate).
void into_planes(const Inputs& p, const View<4>& x, const View<3>& gate, int64_t routes,
                 float* planes, float* cleared, cudaStream_t stream);
void from_planes(const Inputs& p, const float* planes, bool per_route, const View<4>& x,
                 const View<3>& gate, const View<4>* dout, cudaStream_t stream);

}  // namespace statescan::selective_scan_2d::cuda
