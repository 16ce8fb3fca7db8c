// The products that the gradients on tensor cores are made of, and the shared memory that they are
// between: what one warp does for one head.
#pragma once

#include "ssd_scan/gradient_task.cuh"
#include "ssd_scan/tensor_steps.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kBelow = 10;      // blocks of 16 x 16 on and below the diagonal
inline constexpr int kColumns = 64;    // of headdim, at a time
inline constexpr int kMostGroups = 4;  // of 64 states
inline constexpr int kPitch = Tile<kSteps, kColumns>::kPitch;

template <int kN>
struct GradientTiles {
  Tile<kSteps, kN> B, C;
  Tile<kSteps, kColumns> x, g, GL;                 // g: dy before the gate; GL at last dG
  Tile<kN, kColumns> state;                        // S before the piece, then dS after it
  alignas(16) SharedArray<float4, kBelow * 64> G;  // [block][half][lane], as the lanes hold it
  StepProducts share;                              // V GL, then its row sums
  Decays<float> decays;
  DecaySums<float> sums;
  SharedArray<float, kMostGroups * kSteps> from_output, into_state;  // [64 states][step], to add up
  SharedArray<float, 16> held;                                       // of a warp
  SharedArray<float, kColumns> skip;
  Marks marks;
  GradientTask task;
  Piece piece;
};

template <int kN>
class GradientWarp {
 public:
  static constexpr int kGroups = kN / 64, kWarps = 4 * kGroups, kThreads = 32 * kWarps;

  __device__ __forceinline__ GradientWarp(const GradientParams& p, GradientTiles<kN>& tiles)
      : p_(p), tiles_(tiles), warp_(int(threadIdx.x) / 32) {}

 protected:
  static constexpr int kProducts = 4 / kGroups;  // of 16 columns of dx or y of a warp

  __device__ __forceinline__ const GradientTask& task() const { return tiles_.task; }
  __device__ __forceinline__ CellSums<float> cell_sums() const { return {p_, tiles_.task}; }
  __device__ __forceinline__ int shift() const { return p_.shift_output ? 1 : 0; }
  __device__ __forceinline__ int states() const { return int(p_.state); }
  __device__ __forceinline__ int tile_row() const { return warp_ % 4; }
  __device__ __forceinline__ int state_group() const { return warp_ / 4; }  // 64 of the states
  __device__ __forceinline__ int columns_of(int first) const {
    return int(p_.headdim - first < kColumns ? p_.headdim - first : kColumns);
  }

  // S before the piece, or dS after it in its place: what a walk saved, or where the sequence
  // begins or ends. With kGradient, adds <S, dS> to held.
  template <bool kGradient>
  __device__ __forceinline__ void load_state(const void* saved, bool is_saved, const View<4>& given,
                                             int64_t slot, int64_t h, int first, int columns) {
    const BFloat16* row =
        static_cast<const BFloat16*>(saved) + cell_sums().row(h) * p_.state * p_.headdim + first;
    const bool packed = p_.headdim % 8 == 0;
    const unsigned packs = unsigned(round_up(columns, 16) / 8);
#pragma unroll 1
    for (unsigned k = threadIdx.x; k < unsigned(round_up(states(), 16)) * packs; k += kThreads) {
      const int n = int(k / packs), i = int(k % packs) * 8;
      uint4 v{};
      if (is_saved && packed && n < states() && i < columns) {
        v = *reinterpret_cast<const uint4*>(row + n * p_.headdim + i);
      } else if (n < states() && (is_saved || (given && slot >= 0))) {
#pragma unroll 1
        for (int j = 0; j < 8 && i + j < columns; ++j) {
          const int64_t at = slot * given.stride[0] + h * given.stride[1] +
                             (first + i + j) * given.stride[2] + n * given.stride[3];
          set_element(v, j,
                      is_saved
                          ? row[n * p_.headdim + i + j].bits
                          : uint16_t(ptx::pack_bf16(static_cast<const float*>(given.data)[at], 0)));
        }
      }
      uint4& pack = tiles_.state.pack(n, i);
      if (kGradient) {
        float x[8], y[8];
        Pack<BFloat16, 8>{pack}.unpack(x), Pack<BFloat16, 8>{v}.unpack(y);
#pragma unroll
        for (int j = 0; j < 8; ++j) held_ += x[j] * y[j];
      }
      pack = v;
    }
  }

  // With Q[t, n] = scale[t] <vectors[t], state[n]>: sums[t, n] += weight[t] Q[t, n] and products[t]
  // += sum over n of partner[t, n] Q[t, n], for the warp's steps and states.
  template <class Vectors, class Partner>
  __device__ __forceinline__ void project(Vectors& vectors, int columns, Partner& partner,
                                          SharedArray<float, kTile>& scale,
                                          SharedArray<float, kTile>* weight, Product (&sums)[4],
                                          float (&products)[2]) {
    if (16 * tile_row() >= tiles_.piece.rows) return;
    const int lane = ptx::lane(), t = 16 * tile_row() + lane / 4;
    Left rows[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (16 * k < columns) rows[k] = left_of(vectors.at(16 * tile_row(), 16 * k), kPitch);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 64 * state_group() + 16 * j;
      if (n >= states()) continue;
      Product Q;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (16 * k >= columns) continue;
        multiply(Q, rows[k], right_of_transposed(tiles_.state.at(n, 16 * k), kPitch));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float by = scale[t + 8 * i], shared = weight ? by * (*weight)[t + 8 * i] : by;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t pair =
              *reinterpret_cast<uint32_t*>(partner.at(t + 8 * i, n + 8 * h + lane % 4 * 2));
          const float a = Q.d[h][2 * i], b = Q.d[h][2 * i + 1];
          sums[j].d[h][2 * i] += shared * a, sums[j].d[h][2 * i + 1] += shared * b;
          products[i] +=
              by * (bits_to_float(pair << 16) * a + bits_to_float(pair & 0xffff0000u) * b);
        }
      }
    }
  }

  // Calls f(product, its first column) for the warp's columns of dx or y.
  template <class F>
  __device__ __forceinline__ void for_products(Product (&x)[kProducts], int columns, F&& f) {
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      const int c = 16 * (kProducts * state_group() + j);
      if (c < columns) f(x[j], c);
    }
  }

  // scale[t] times the warp's 16 rows of a projection times the state.
  template <class Projection>
  __device__ __forceinline__ void through_state(Projection& rows, int columns,
                                                SharedArray<float, kTile>& scale,
                                                Product (&x)[kProducts]) {
#pragma unroll 1
    for (int k = 0; k < states(); k += 16) {
      const Left left = left_of(rows.at(16 * tile_row(), k), Tile<kSteps, kN>::kPitch);
      for_products(x, columns, [&](Product& y, int c) {
        multiply(y, left, right_of(tiles_.state.at(k, c), kPitch));
      });
    }
    for_products(x, columns, [&](Product& y, int) {
      y.for_each([&](int row, int, float& v) { v *= scale[16 * tile_row() + row]; });
    });
  }

  // Calls f(step, column, a, b) for pairs of neighbours of a warp's result that are there.
  template <class F>
  __device__ __forceinline__ void for_pairs(Product (&x)[kProducts], int columns, F&& f) {
    for_products(x, columns, [&](Product& y, int c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = 16 * tile_row() + ptx::lane() / 4 + 8 * i;
          const int column = c + 8 * h + ptx::lane() % 4 * 2;
          if (t < tiles_.piece.rows && column < columns) {
            f(t, column, y.d[h][2 * i], y.d[h][2 * i + 1]);
          }
        }
      }
    });
  }

  __device__ __forceinline__ float skip_weight(int64_t h, int first, int column,
                                               int columns) const {
    if (column >= columns) return 0;
    return load_element<float>(p_.D.data, p_.D.dtype,
                               h * p_.D.stride[0] + (first + column) * p_.D.stride[1]);
  }
  // Adds D times a pair of a tile.
  template <class Tile>
  __device__ __forceinline__ void add_skip(Tile& tile, int64_t h, int first, int t, int column,
                                           int columns, float& a, float& b) const {
    if (!p_.D) return;
    const uint32_t pair = *reinterpret_cast<uint32_t*>(tile.at(t, column));
    a += skip_weight(h, first, column, columns) * bits_to_float(pair << 16);
    b += skip_weight(h, first, column + 1, columns) * bits_to_float(pair & 0xffff0000u);
  }

  // Columns times the weights of steps from s on.
  __device__ __forceinline__ Left weighted(Left x, int s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = s + ptx::lane() % 4 * 2 + i / 2 * 8;
      x.a[i] = ptx::pack_bf16(bits_to_float(x.a[i] << 16) * tiles_.decays.weight[at],
                              bits_to_float(x.a[i] & 0xffff0000u) * tiles_.decays.weight[at + 1]);
    }
    return x;
  }

  const GradientParams& p_;
  GradientTiles<kN>& tiles_;
  int warp_;
  float held_;  // <S, dS> of the head, the thread's share
};

}  // namespace statescan::ssd_scan::cuda
