// The products that the gradients on tensor cores are made of, and the shared memory that they are
// between: what one warp does for one head.
#pragma once

#include "ssd_scan/gradient_stage.cuh"
#include "ssd_scan/tensor_steps.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kBelow = 10;          // blocks of 16 x 16 on and below the diagonal
inline constexpr int kAcrossProduct = 24;  // floats from row to row, without conflicts

// What the products of a head leave for the gradient of its decays.
struct HeadSums {
  BlockSums blocks;
  SharedArray<float, 2 * kSteps> from_output, into_state;  // [half of the states][step]
  SharedArray<float, kGradientWarps> held;                 // <S, dS> of a warp
};

struct HeadDecays : Decays<float> {
  float A;
};

template <int kColumns>
struct alignas(16) Skip {
  SharedArray<float, kColumns> D, dD;  // of a step's columns
};

template <int kN, int kTerms>
struct GradientTiles {
  using Stage = GradientStage<kN, kTerms>;
  TermTile<kTerms, kSteps, kN> B, C;
  TermTile<kTerms, kSteps, kSteps> GL;  // at last dG
  // Products on their way to memory, one to each warp; between steps without states, V as G.
  alignas(16) SharedArray<float4, kGradientWarps * 4 * kAcrossProduct> product;
  alignas(16) SharedArray<float4, kBelow * 64> G;    // [block][half][lane], as the lanes hold it
  SharedArray<HeadDecays, 3> decays;                 // of a head, the one before and the next
  SharedArray<HeadSums, 2> sums;                     // of a head and the one before
  SharedArray<SharedArray<float, kSteps>, 2> given;  // step sizes of the next head and one more
  SharedArray<Skip<Stage::kColumns>, 2> skip;        // of a step and the next or the one before
  DecaySums<float> decay_sums;
  Marks marks;
  int64_t index;  // of the task
  GradientTask task;
  Piece piece;
  Operands operands;
  alignas(16) SharedArray<Stage, 2> stage;  // the second one where there is room for it

  __device__ __forceinline__ HeadDecays& decays_of(int64_t h) {
    return decays[int(h - task.begin) % 3];
  }
  __device__ __forceinline__ SharedArray<float, kSteps>& given_of(int64_t h) {
    return given[int(h - task.begin) % 2];
  }
  __device__ __forceinline__ HeadSums& sums_of(int64_t h) { return sums[int(h - task.begin) % 2]; }
};

// A product among float4 as the lanes hold it, in the block's place: read by the same lane.
template <class Array>
__device__ __forceinline__ void keep(const Product& x, Array& products, int block) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    products[(2 * block + h) * 32 + ptx::lane()] = {x.d[h][0], x.d[h][1], x.d[h][2], x.d[h][3]};
  }
}
template <class Array>
__device__ __forceinline__ Product kept(Array& products, int block) {
  Product x;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float4 v = products[(2 * block + h) * 32 + ptx::lane()];
    x.d[h][0] = v.x, x.d[h][1] = v.y, x.d[h][2] = v.z, x.d[h][3] = v.w;
  }
  return x;
}

// As load_numbers and store_numbers, with less code for numbers that do not lie together.
__device__ __forceinline__ void load_some(const Slice& x, int row, int i, float (&v)[8]) {
  if (x.is_pack(i)) return load_pack(x, row, i, v);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = 0;
#pragma unroll 1
  for (int j = 0; j < 8 && i + j < x.columns; ++j) {
    const float y = x.number(row, i + j);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = j == k ? y : v[k];
  }
}
__device__ __forceinline__ void store_some(const Slice& x, int row, int i, const float (&v)[8]) {
  if (x.is_pack(i)) return store_numbers(x, row, i, v);
#pragma unroll 1
  for (int j = 0; j < 8 && i + j < x.columns; ++j) {
    float y = v[0];
#pragma unroll
    for (int k = 1; k < 8; ++k) y = j == k ? v[k] : y;
    store_element(const_cast<char*>(x.data), x.dtype, x.offset(row, i + j), y);
  }
}

// Warp: 16 rows of everything, half of the states, half of a step's columns.
template <int kN, int kTerms>
class GradientWarp {
 public:
  using Tiles = GradientTiles<kN, kTerms>;
  using Stage = typename Tiles::Stage;

  __device__ __forceinline__ GradientWarp(const GradientParams& p, Tiles& tiles)
      : p_(p), tiles_(tiles), warp_(int(threadIdx.x) / 32) {}

 protected:
  static constexpr int kColumns = Stage::kColumns, kAcross = kColumns / 16, kDown = kN / 32;
  static constexpr int kProducts = (kAcross + 1) / 2;  // of 16 columns of dx or y of a warp
  // There are the registers for it.
  static constexpr bool kKeepsB = kN == 128 && kTerms == 1;
  static constexpr int kKeptB = kKeepsB ? kDown : 1;
  static_assert(4 % kAcross == 0 && kDown % (4 / kAcross) == 0);

  __device__ __forceinline__ const GradientTask& task() const { return tiles_.task; }
  __device__ __forceinline__ CellSums<float> cell_sums() const { return {p_, tiles_.task}; }
  __device__ __forceinline__ Steps steps() const {
    return {task().begin, int(p_.headdim), kColumns};
  }
  __device__ __forceinline__ int shift() const { return p_.shift_output ? 1 : 0; }
  __device__ __forceinline__ int states() const { return int(p_.state); }
  __device__ __forceinline__ int half() const { return warp_ / 4; }
  __device__ __forceinline__ int row() const { return 16 * (warp_ % 4); }  // the warp's first
  __device__ __forceinline__ int lane_row() const { return row() + ptx::lane() / 4; }

  // sums[t, n] += scale[t] Q[t, n] and products[t] += sum over n of partner[t, n] Q[t, n].
  __device__ __forceinline__ static void add_projection(const Product& Q,
                                                        const Terms<Left, kTerms>& partner,
                                                        const float (&scale)[2], Product& sums,
                                                        float (&products)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float a = Q.d[h][2 * i], b = Q.d[h][2 * i + 1];
        float low, high;
        unite(terms<kTerms>([&](int j) { return partner.term[j].a[2 * h + i]; }), low, high);
        sums.d[h][2 * i] += scale[i] * a, sums.d[h][2 * i + 1] += scale[i] * b;
        products[i] += low * a;
        products[i] += high * b;
      }
    }
  }

  // The states of the warp's j-th product of dB and dC. Rows of warps take them and columns in
  // different orders, so that each has its share of <S, dS> where it begins.
  __device__ __forceinline__ int state_of(int j) const {
    return kN / 2 * half() + 16 * (kAcross == 4 ? j : (j + warp_ % 4 / kAcross) % kDown);
  }

  // The warp's part of B for all heads.
  __device__ __forceinline__ void load_B() {
    if constexpr (!kKeepsB) return;
    const int lane = ptx::lane();
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      if (state_of(j) < states()) B_[j % kKeptB] = tiles_.B.left(row(), state_of(j), lane);
    }
  }
  __device__ __forceinline__ Terms<Left, kTerms> own_B(int j, int lane) {
    if constexpr (kKeepsB) return B_[j % kKeptB];
    return tiles_.B.left(row(), state_of(j), lane);
  }

  // What dC gets through S and dB through dS, and <S, dS>.
  __device__ __forceinline__ void project(Stage& stage, Decays<float>& decays) {
    const int lane = ptx::lane();
    Terms<Left, kTerms> g[kAcross], x[kAcross];
    int column[kAcross];
#pragma unroll
    for (int k = 0; k < kAcross; ++k) {
      column[k] = 16 * ((k + warp_) % kAcross);
      g[k] = stage.g.left(row(), column[k], lane), x[k] = stage.x.left(row(), column[k], lane);
    }
    Product held;  // its diagonal
    float output[2], into[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = row() + lane / 4 + 8 * i;
      output[i] = decays.row[t], into[i] = decays.column[t] * decays.weight[t];
    }
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      const int n = state_of(j);
      if (n >= states()) continue;
      Product of_output, of_input;
#pragma unroll
      for (int k = 0; k < kAcross; ++k) {
        const auto S = stage.S.right_of_transpose(n, column[k], lane);
        const auto dS = stage.dS.right_of_transpose(n, column[k], lane);
        multiply(of_output, g[k], S);
        multiply(of_input, x[k], dS);
        if (k == 0 && j % (4 / kAcross) == 0) multiply(held, transposed(S), dS);
      }
      add_projection(of_output, tiles_.C.left(row(), n, lane), output, dC_[j], from_output_);
      add_projection(of_input, own_B(j, lane), into, dB_[j], into_state_);
    }
    for_diagonal(held, [&](int, float x) { held_ += x; });
  }

  // Calls f(product, its first column) for the warp's columns of dx or y.
  template <class F>
  __device__ __forceinline__ void for_products(Product (&x)[kProducts], F&& f) {
    if (kAcross == 1 && half() > 0) return;
#pragma unroll
    for (int j = 0; j < kProducts; ++j) f(x[j], 16 * (kProducts * half() + j));
  }

  // The warp's rows of a projection times a state, which adds to x; states [begin, end).
  template <class Projection, class State>
  __device__ __forceinline__ void add_states(Projection& rows, State& state, int begin, int end,
                                             Product (&x)[kProducts]) {
    const int lane = ptx::lane();
#pragma unroll 4
    for (int n = begin; n < end; n += 16) {
      const auto left = rows.left(row(), n, lane);
      for_products(x, [&](Product& y, int c) { multiply(y, left, state.right(n, c, lane)); });
    }
  }
  // The same of B and dS.
  template <class State>
  __device__ __forceinline__ void add_input_states(State& dS, Product (&x)[kProducts]) {
    if constexpr (!kKeepsB) return add_states(tiles_.B, dS, 0, states(), x);
    const int lane = ptx::lane(), other = kN / 2 * (1 - half());
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      const int n = state_of(j);
      if (n >= states()) continue;
      const auto left = own_B(j, lane);
      for_products(x, [&](Product& y, int c) { multiply(y, left, dS.right(n, c, lane)); });
    }
    add_states(tiles_.B, dS, other, other + kN / 2 < states() ? other + kN / 2 : states(), x);
  }
  __device__ __forceinline__ void scale_rows(SharedArray<float, kTile>& scale,
                                             Product (&x)[kProducts]) {
    const int t = lane_row();
    const float by[2] = {scale[t], scale[t + 8]};
    for_products(x, [&](Product& y, int) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y.d[0][i] *= by[i / 2], y.d[1][i] *= by[i / 2];
    });
  }

  // Adds D times 8 neighbours of a tile.
  template <class Tile>
  __device__ __forceinline__ void add_skip(Tile& tile, Skip<kColumns>& skip, int t, int column,
                                           float (&v)[8]) const {
    if (!p_.D) return;
    float x[8];
    tile.get(t, column, x);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Several<float, 4> D = several<4>(skip.D[column + i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i + j] += D.x[j] * x[i + j];
    }
  }

  // Columns times the weights of steps from s on.
  __device__ __forceinline__ static Terms<Left, kTerms> weighted(const Terms<Left, kTerms>& x,
                                                                 Decays<float>& decays, int s) {
    Terms<Left, kTerms> y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = s + ptx::lane() % 4 * 2 + i / 2 * 8;
      float low, high;
      unite(terms<kTerms>([&](int j) { return x.term[j].a[i]; }), low, high);
      const auto pairs = split<kTerms>(low * decays.weight[at], high * decays.weight[at + 1]);
#pragma unroll
      for (int j = 0; j < kTerms; ++j) y.term[j].a[i] = pairs.term[j];
    }
    return y;
  }

  // Calls f(row, column, numbers) with 8 neighbours of a product for each lane.
  template <class F>
  __device__ __forceinline__ void for_rows(Product& x, F&& f) {
    float* own = &tiles_.product[warp_ * 4 * kAcrossProduct].x;
    const int lane = ptx::lane();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        several<2>(own[(lane / 4 + 8 * i) * kAcrossProduct + 8 * h + lane % 4 * 2]) = {
            x.d[h][2 * i], x.d[h][2 * i + 1]};
      }
    }
    __syncwarp();  // the product is in place
    const float* from = own + lane / 2 * kAcrossProduct + lane % 2 * 8;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 y = *reinterpret_cast<const float4*>(from + i);
      v[i] = y.x, v[i + 1] = y.y, v[i + 2] = y.z, v[i + 3] = y.w;
    }
    f(lane / 2, lane % 2 * 8, v);
    __syncwarp();  // it has been read
  }

  const GradientParams& p_;
  Tiles& tiles_;
  int warp_;
  Terms<Left, kTerms> B_[kKeptB];
  Product dB_[kDown], dC_[kDown];  // of all heads
  // Of the head, the lane's shares.
  float from_output_[2], into_state_[2];
  float held_;  // of <S, dS>
};

}  // namespace statescan::ssd_scan::cuda
