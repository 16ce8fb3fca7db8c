// A warp's part of the state of a head, in registers: 16 kAcross columns of headdim, all kN states,
// as the product S^T of (headdim, state). Rounded it is an operand as it is: nothing of the state
// goes through shared memory, and no warp waits for another.
#pragma once

#include "ssd_scan/tensor.cuh"

namespace statescan::ssd_scan::cuda {

// To or from a tensor of float, `memory` being where the warp's first number is.
struct StateMove {
  enum Way { kNone, kLoad, kAdd, kStore } way = kNone;
  float* memory = nullptr;
  int64_t state_stride = 0, column_stride = 0;
};

template <int kTerms, int kN, int kAcross>
class WarpState {
 public:
  static constexpr int kColumns = 16 * kAcross;

  // `states` of kN and `columns` of kColumns are there.
  __device__ __forceinline__ WarpState(int states, int columns)
      : states_(states), columns_(columns) {
    clear();
  }

  __device__ __forceinline__ int columns() const { return columns_; }  // none: 0 or less

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
#pragma unroll
      for (int k = 0; k < kDown; ++k) S_[j][k] = Product{};
    }
  }

  // Between registers and memory, numbers that are there: two neighbouring states of 4 columns of
  // each 8 x 8.
  __device__ __forceinline__ void move(const StateMove& to) {
    const int lane = ptx::lane(), c = lane / 4, n = lane % 4 * 2;
    float* memory = to.memory + c * to.column_stride + n * to.state_stride;
#pragma unroll
    for (int k = 0; k < 2 * kDown; ++k) {
      if (8 * k >= states_) break;
      float* at = memory;
#pragma unroll
      for (int j = 0; j < 2 * kAcross; ++j) {
        float* S = &S_[j / 2][k / 2].d[k % 2][j % 2 * 2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + c >= columns_ || 8 * k + n + e >= states_) continue;
          float& number = at[e * to.state_stride];
          if (to.way == StateMove::kStore) {
            number = S[e];
          } else {
            S[e] = number + (to.way == StateMove::kAdd ? S[e] : 0.0f);
          }
        }
        at += 8 * to.column_stride;
      }
      memory += 8 * to.state_stride;
    }
  }

  // y[r][j] += rows [t + 16 r, t + 16 r + 16) of C times columns 16 j and on of S.
  template <int kRows, class Tile>
  __device__ __forceinline__ void add_output(Tile& C, int t, Product (&y)[kRows][kAcross]) const {
    for_states([&](int k) {
      Terms<Right, kTerms> S[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) S[j] = transposed(left_terms<kTerms>(S_[j][k]));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Terms<Left, kTerms> row = C.left(t + 16 * r, 16 * k);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) multiply(y[r][j], row, S[j]);
      }
    });
  }

  // S <- whole S + key^T value, value[t][j] being columns 16 j and on of steps 16 t and on. What a
  // cell adds is summed by itself: tensor cores cut off what they add, and in a state that is kept
  // for long that would go one way.
  template <class Tile>
  __device__ __forceinline__ void update(Tile& key, float whole,
                                         const Terms<Left, kTerms> (&value)[kSteps / 16][kAcross]) {
    for_states([&](int k) {
      Product sum[kAcross];
#pragma unroll
      for (int t = 0; t < kSteps / 16; ++t) {
        const Terms<Right, kTerms> steps = key.right(16 * t, 16 * k);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) multiply(sum[j], value[t][j], steps);
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& S = S_[j][k].d[i / 4][i % 4];
          S = whole * S + sum[j].d[i / 4][i % 4];
        }
      }
    });
  }

  // Bytes of shared memory for store_rounded().
  static constexpr int kStageBytes = 2 * kColumns * 24;

  // Rounded, as (state, headdim) with rows of `pitch`: 16 states at a time go through `stage` as rows of headdim, from where each lane takes 4 kAcross neighbours of one
  // state. Rows of the stage are turned by 2 for every 8, so that the eight that a lane group
  // fetches lie in different banks.
  __device__ __forceinline__ void store_rounded(BFloat16* to, int64_t pitch, BFloat16* stage) {
    constexpr int kStagePitch = 24, kPairs = 2 * kAcross;
    const int lane = ptx::lane();
    auto row_of = [&](int c) { return stage + (c / 8 * 8 + (c + c / 8 * 2) % 8) * kStagePitch; };
#pragma unroll
    for (int k = 0; k < kDown; ++k) {
      if (16 * k >= states_) continue;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &S_[j][k].d[i / 2][i % 2 * 2];
          BFloat16* at = row_of(16 * j + i % 2 * 8 + lane / 4) + i / 2 * 8 + lane % 4 * 2;
          *reinterpret_cast<uint32_t*>(at) = ptx::pack_bf16(pair[0], pair[1]);
        }
      }
      __syncwarp();  // the stage is filled
#pragma unroll
      for (int h = 0; h < kAcross; ++h) {
        const int matrix = lane / 8, c = lane % 8 / 2 * 2 * kPairs + matrix % kPairs * 2 + lane % 2;
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, row_of(c) + (h + matrix / kPairs) * 8);
        const int n = 16 * k + 8 * h + lane / 4, first = lane % 4 * 2 * kPairs;
#pragma unroll
        for (int i = 0; i < 4; i += kPairs) {
          if (n + 8 * (i / kPairs) >= states_) continue;
          store_neighbours<kPairs>(to + (n + 8 * (i / kPairs)) * pitch + first, pitch % 8 == 0,
                                   columns_ - first, &v[i]);
        }
      }
      __syncwarp();  // it has been read
    }
  }

 private:
  static constexpr int kDown = kN / 16;

  // 2 kPairs neighbours, or those of them that are there.
  template <int kPairs>
  __device__ __forceinline__ static void store_neighbours(BFloat16* to, bool aligned, int there,
                                                          const uint32_t* v) {
    if (aligned && there > 0) {  // and so all are there
      if constexpr (kPairs == 4) ptx::store(reinterpret_cast<uint4*>(to), {v[0], v[1], v[2], v[3]});
      if constexpr (kPairs == 2) ptx::store(reinterpret_cast<uint2*>(to), {v[0], v[1]});
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      if (i < there) to[i] = {uint16_t(v[i / 2] >> i % 2 * 16)};
    }
  }

  // f(k) for 16 states at a time. Beyond those that are there operands are 0, to a multiple of 32:
  // fewer branches leave more for the scheduler to mix.
  template <class F>
  __device__ __forceinline__ void for_states(F&& f) const {
#pragma unroll
    for (int k = 0; k < kDown; k += 2) {
      if (16 * k < states_) f(k), f(k + 1);
    }
  }

  int states_, columns_;
  Product S_[kAcross][kDown];
};

}  // namespace statescan::ssd_scan::cuda
