// A thread's place in a walk on tensor cores: what its warp and its head have.
#pragma once

#include "ssd_scan/walk_tiles.cuh"

namespace statescan::ssd_scan::cuda {

template <class Kind>
class WalkWarp {
 public:
  __device__ __forceinline__ WalkWarp(const WalkParams& p, int stages)
      : p_(p),
        tiles_(*dynamic_shared<WalkTiles<Kind>>()),
        own_tiles_(tiles_.head(int(threadIdx.x) / kHeadThreads)),
        stages_(stages),
        state_(int(p.state), all_columns(p) - column()) {}

 protected:
  static constexpr int kTerms = Kind::kTerms, kAcross = Kind::kAcross;
  static constexpr int kHeadThreads = Kind::kHeadThreads, kHeadWarps = Kind::kHeadWarps;
  using State = WarpState<kTerms, Kind::kN, kAcross>;

  __device__ __forceinline__ Route& route() const { return tiles_.route; }
  __device__ __forceinline__ const WalkTask& task() const { return route().task; }
  __device__ __forceinline__ const Stop& stop() const { return route().stop(stop_); }
  __device__ __forceinline__ int heads() const { return int(blockDim.x) / kHeadThreads; }
  __device__ __forceinline__ int block_warp() const { return int(threadIdx.x) / 32; }
  __device__ __forceinline__ int warp() const { return block_warp() % kHeadWarps; }  // of the head
  __device__ __forceinline__ int thread() const { return int(threadIdx.x) % kHeadThreads; }
  __device__ __forceinline__ int64_t head() const {
    return task().head + int(threadIdx.x) / kHeadThreads;
  }
  __device__ __forceinline__ int64_t first() const { return task().column * kP; }  // of headdim
  __device__ __forceinline__ int all_columns(const WalkParams& p) const {
    return int(p.headdim - first() < kP ? p.headdim - first() : kP);
  }
  __device__ __forceinline__ int head_columns() const { return state_.columns() + column(); }
  __device__ __forceinline__ int column() const { return warp() * State::kColumns; }  // the warp's
  __device__ __forceinline__ bool outputs() const { return !p_.backward && !p_.summarize; }
  __device__ __forceinline__ int shift() const { return p_.shift_output ? 1 : 0; }

  __device__ __forceinline__ Operands<Kind>& operands(int stop) const {
    return tiles_.operands(heads(), stages_ == 2 ? stop % 2 : 0);
  }
  __device__ __forceinline__ auto& own_value() const {
    return operands(stop_).value[int(threadIdx.x) / kHeadThreads];
  }
  __device__ __forceinline__ Decays<float>& decays() const { return own_tiles_.decays[stop_ % 2]; }

  const WalkParams& p_;
  WalkTiles<Kind>& tiles_;
  HeadTiles<Kind>& own_tiles_;
  int stages_, stop_ = -2;
  State state_;
};

}  // namespace statescan::ssd_scan::cuda
