// The narrow operands of a tile in shared memory, and the step sizes that are found from them.
#pragma once

#include "common/device_view.cuh"
#include "common/scalar.cuh"
#include "selective_scan_2d/tile.cuh"

namespace statescan::selective_scan_2d::cuda {

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
    if (!(tile.flags & kGhosts) && x.stride[3] == 1 && is_aligned(from, x.stride[2], kVec)) {
#pragma unroll(C::kFast ? 4 : 1)
      for (int i = helpers.thread; i < count * kPacks; i += helpers.count) {
        const int row = i / kPacks, t = i % kPacks * kVec;
        const T* first = from + row * x.stride[2] + t;
        float v[kVec] = {};
        if (t + kVec <= tile.steps) {
          Pack<T, kVec>::load(first).unpack(v);
        } else if (t < tile.steps) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) v[j] = t + j < tile.steps ? to_number(first[j]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < kVec; j += 4) {  // four neighbours in time are neighbours in a row
          several<4>(rows[row * C::kSteps + in_row<C>(t + j)]) = {v[j], v[j + 1], v[j + 2],
                                                                  v[j + 3]};
        }
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

template <class C>
__device__ __forceinline__ void add_bias(typename C::R bias, typename C::Items& delta) {
#pragma unroll
  for (int j = 0; j < C::kItems; ++j) delta[j] += bias;
}

// The step sizes of a lane; 0 at steps to skip.
template <class C>
__device__ __forceinline__ void find_step_sizes(const Inputs& p, typename C::R bias, int flags,
                                                const int (&at)[C::kItems],
                                                typename C::Items& delta) {
  add_bias<C>(bias, delta);
  if (p.delta_softplus) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) delta[j] = softplus(delta[j]);
  }
  if (flags & kHoles) {
#pragma unroll
    for (int j = 0; j < C::kItems; ++j) delta[j] = at[j] == kSkip ? 0 : delta[j];
  }
}

}  // namespace statescan::selective_scan_2d::cuda
