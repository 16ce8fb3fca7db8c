// What the gradients on tensor cores do beside their products: the decays of the next head, and the
// gradient of those of the head before. Each by one warp while others have blocks of V.
#pragma once

#include "ssd_scan/tensor_products.cuh"

namespace statescan::ssd_scan::cuda {

template <int kN, int kTerms>
class GradientDecays {
 public:
  using Tiles = GradientTiles<kN, kTerms>;

  __device__ __forceinline__ GradientDecays(const GradientParams& p, Tiles& tiles)
      : p_(p), tiles_(tiles) {}

  // In the round of a step, the one before the first and the one after the last among them.
  __device__ __forceinline__ void advance(const Piece& piece, int warp, const Step& step) {
    const GradientTask& task = tiles_.task;
    const Step next = steps().after(step);
    if (warp == kFinisher && step.i == 0 && step.h > task.begin) finish_head(piece, step.h - 1);
    if (warp == kFinder && next.i == 0 && next.h < task.end) find(piece, next.h);
    if (warp != kLoader) return;
    if (next.i == 0 && next.h + 1 < task.end) load_given(piece, next.h + 1);
    if (!p_.D) return;
    if (steps().count(step) > 0) finish_step(piece, steps().before(step));
    if (next.h < task.end) load_D(next);
  }

 private:
  __device__ __forceinline__ Steps steps() const {
    return {tiles_.task.begin, int(p_.headdim), Tiles::Stage::kColumns};
  }

  static constexpr int kFinisher = 5, kFinder = 6, kLoader = 7;  // those without blocks of V

  // From step sizes that another warp has brought, but for the first head.
  __device__ __forceinline__ void find(const Piece& piece, int64_t h) {
    GivenSteps<float> given;
    if (h == tiles_.task.begin) {
      given = GivenSteps<float>(p_, piece, h);
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) given.x[e] = tiles_.given_of(h)[2 * ptx::lane() + e];
    }
    const Head<float> own(p_, h);
    find_decays(p_, piece, own, given, tiles_.decays_of(h));
    if (ptx::lane() == 0) tiles_.decays_of(h).A = own.A;
  }
  __device__ __forceinline__ void load_given(const Piece& piece, int64_t h) {
    const GivenSteps<float> given(p_, piece, h);
#pragma unroll
    for (int e = 0; e < 2; ++e) tiles_.given_of(h)[2 * ptx::lane() + e] = given.x[e];
  }

  __device__ __forceinline__ void load_D(const Step& step) {
    const int first = steps().first_of(step), columns = steps().columns_of(step);
    for (int i = ptx::lane(); i < Tiles::Stage::kColumns; i += 32) {
      const int64_t at = step.h * p_.D.stride[0] + (first + i) * p_.D.stride[1];
      tiles_.skip[steps().count(step) & 1].D[i] =
          i < columns ? load_element<float>(p_.D.data, p_.D.dtype, at) : 0.0f;
    }
  }

  // dD, to which each lane adds its own columns.
  __device__ __forceinline__ void finish_step(const Piece& piece, const Step& step) {
    if (!steps().has_states(step)) return;
    const CellSums<float> sums{p_, tiles_.task};
    const int first = steps().first_of(step), columns = steps().columns_of(step);
    float sum = 0;
    for (int i = ptx::lane(); i < columns; i += 32) {
      const float dD = tiles_.skip[steps().count(step) & 1].dD[i];
      if (p_.wide_D) sums.add(sums.skip(step.h, first + i), dD, piece.entry);
      sum += dD;
    }
    sum = warp_sum(sum);
    if (p_.wide_D || ptx::lane() > 0) return;
    sums.add(sums.skip(step.h, 0), sum, piece.entry && first == 0);
  }

  __device__ __forceinline__ void finish_head(const Piece& piece, int64_t h) {
    HeadSums& from = tiles_.sums_of(h);
    HeadDecays& decays = tiles_.decays_of(h);
    DecaySums<float>& to = tiles_.decay_sums;
    __syncwarp();  // the sums before have been read
    for (int i = ptx::lane(); i < kSteps; i += 32) {
      to.from_output[i] = from.from_output[i] + from.from_output[kSteps + i];
      to.into_state[i] = from.into_state[i] + from.into_state[kSteps + i];
    }
    add_blocks(from.blocks, decays, piece.rows, p_.shift_output ? 1 : 0, to);
    __syncwarp();  // they are in place
    float held = 0;
    for (int i = 0; i < kGradientWarps; ++i) held += from.held[i];
    const Sums<float> found =
        decay_gradient(p_, piece, h, decays.A, held * decays.whole, decays, to, p_.ddt);
    if (ptx::lane() > 0) return;
    const CellSums<float> sums{p_, tiles_.task};
    sums.add(sums.dA(h), found.dA, piece.entry);
    sums.add(sums.ddt_bias(h), found.ddt_bias, piece.entry);
  }

  const GradientParams& p_;
  Tiles& tiles_;
};

}  // namespace statescan::ssd_scan::cuda
