// The kinds of walk on tensor cores, and what each has in shared memory.
#pragma once

#include "ssd_scan/walks.cuh"
#include "ssd_scan/warp_state.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kP = 64;      // columns of a head in a block
inline constexpr int kBelow = 10;  // blocks of 16 x 16 on and below the diagonal of G
inline constexpr int kMostWarps = 8;

// Which instance: terms of an operand, most states, 16 columns of a warp.
template <int kTerms_, int kN_, int kAcross_>
struct WalkKind {
  static constexpr int kTerms = kTerms_, kN = kN_, kAcross = kAcross_;
  static constexpr int kHeadWarps = kP / (16 * kAcross), kHeadThreads = 32 * kHeadWarps;
  static constexpr int kMostHeads = kMostWarps / kHeadWarps;
};

template <class Kind>
struct OutputStage {
  static constexpr int kPitch = 20 * Kind::kAcross;
  SharedArray<float, 16 * kPitch> element;
};

template <class Kind>
struct HeadTiles {
  SharedArray<Decays<float>, 2> decays;  // of a piece and of the next one
  alignas(16)
      SharedArray<uint4, kBelow * Kind::kTerms * 32> M;  // [block][term][lane], as left operands
  alignas(16) SharedArray<float, kP> D;
  // 16 steps of y on their way from a warp's registers to memory.
  alignas(16) SharedArray<OutputStage<Kind>, Kind::kHeadWarps> stage;
};

// What a piece brings.
template <class Kind>
struct Operands {
  TermTile<Kind::kTerms, kSteps, Kind::kN> key, C;
  SharedArray<TermTile<Kind::kTerms, kSteps, kP>, Kind::kMostHeads> value;  // x, or dy ungated
};

// The beginning of shared memory. There follow so many HeadTiles as the block has heads, and one or
// two Operands, each with as many values.
template <class Kind>
struct WalkTiles {
  Route route;
  alignas(16) SharedArray<float4, kBelow * 64> G;  // [block][half][lane], as the lanes hold it

  STATESCAN_HOST_DEVICE static constexpr int64_t operand_bytes(int heads) {
    return sizeof(Operands<Kind>) -
           (Kind::kMostHeads - heads) * sizeof(TermTile<Kind::kTerms, kSteps, kP>);
  }
  STATESCAN_HOST_DEVICE static constexpr int64_t bytes(int heads, int stages) {
    return sizeof(WalkTiles) + heads * sizeof(HeadTiles<Kind>) + stages * operand_bytes(heads);
  }
  __device__ __forceinline__ HeadTiles<Kind>& head(int i) {
    return reinterpret_cast<HeadTiles<Kind>*>(this + 1)[i];
  }
  __device__ __forceinline__ Operands<Kind>& operands(int heads, int stage) {
    return *reinterpret_cast<Operands<Kind>*>(reinterpret_cast<char*>(&head(heads)) +
                                              stage * operand_bytes(heads));
  }
};

}  // namespace statescan::ssd_scan::cuda
