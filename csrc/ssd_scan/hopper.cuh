// What the walk for Hopper is between: the shared memory of a block, and the producers, who bring
// operands there.
#pragma once

#include "common/wgmma.cuh"
#include "ssd_scan/tensor.cuh"
#include "ssd_scan/walks.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kColumns = 64;  // of headdim, in a unit
inline constexpr int kUnits = 4;     // of a block, at most: a head's columns, of heads of one group
inline constexpr int kStages = 2;    // pieces in shared memory
inline constexpr int kProducers = 4, kConsumers = 8;  // warps

// One block's share of a walk: neighbouring units of a group along a part.
struct HopperTask {
  int64_t part, b, group, first_unit;
  int64_t begin, end;  // cells, in the order of the walk
  int units;

  __device__ __forceinline__ HopperTask(const WalkParams& p, int64_t i, int64_t units_per_block) {
    const int64_t all = p.group_heads() * columns_of_head(p), cells = p.cells();
    const int64_t blocks = (all + units_per_block - 1) / units_per_block;
    first_unit = i % blocks * units_per_block, i /= blocks;
    units = int(all - first_unit < units_per_block ? all - first_unit : units_per_block);
    group = i % p.groups, i /= p.groups;
    b = i % p.batch, part = i / p.batch;
    begin = cells * part / p.parts, end = cells * (part + 1) / p.parts;
  }

  STATESCAN_HOST_DEVICE static int64_t columns_of_head(const Shape& p) {
    return (p.headdim + kColumns - 1) / kColumns;
  }
  __device__ __forceinline__ int64_t head(const Shape& p, int unit) const {
    return group * p.group_heads() + (first_unit + unit) / columns_of_head(p);
  }
  __device__ __forceinline__ int64_t first_column(const Shape& p, int unit) const {
    return (first_unit + unit) % columns_of_head(p) * kColumns;
  }
  __device__ __forceinline__ int columns(const Shape& p, int unit) const {
    const int64_t left = p.headdim - first_column(p, unit);
    return int(left < kColumns ? left : kColumns);
  }
};

// A piece and its operands. Rows and columns that are not there are 0.
template <int kN>
struct Stage {
  SwizzledTile<kSteps, kN> key, C;                            // key: B, or on the way back C
  SharedArray<SwizzledTile<kSteps, kColumns>, kUnits> value;  // x or dy
  SharedArray<Decays<float>, kUnits> decays;
  Cell cell;
  Piece piece;  // of no rows: the end
};

// Where a producer is.
struct ProducerPlace {
  Cell cell;
  Piece piece;
  Marks marks;
};

template <int kN>
struct HopperTiles {
  SharedArray<Stage<kN>, kStages> stage;
  SharedArray<SwizzledTile<kN, kColumns>, kUnits> S;
  SharedArray<float, kUnits * kColumns> D;
  SharedArray<ProducerPlace, kProducers> place;
  SharedArray<uint64_t, kStages> full, free;  // by warps
};

// A warp that brings a quarter of B and C and one unit's values and decays. The producers go through
// the pieces each for itself.
template <int kN>
class Producer {
 public:
  __device__ __forceinline__ Producer(const WalkParams& p, const HopperTask& task,
                                      HopperTiles<kN>& tiles)
      : p_(p),
        task_(task),
        tiles_(tiles),
        unit_(int(threadIdx.x) / 32),
        own_(p, task.head(p, is_active() ? unit_ : 0)) {}

  __device__ __forceinline__ void run() {
    ProducerPlace& place = tiles_.place[unit_];
    const bool back = p_.backward;
    for (int64_t j = task_.begin; j < task_.end; ++j) {
      __syncwarp();  // the cell before is done with
      if (ptx::lane() == 0) place.cell = cell_at(p_, walked_cell(p_, j));
      __syncwarp();  // the cell is known
      load_marks(p_, task_.b, place.cell, place.marks, ptx::lane(), 32);
      const int rows = place.cell.rows;
      for (int row = back ? rows : 0; back ? row > 0 : row < rows;) {
        Stage<kN>& stage = next_stage();
        __syncwarp();  // the marks are in place, the piece before is done with
        if (ptx::lane() == 0) {
          const Pieces pieces(p_, task_.b, place.cell, place.marks);
          const Piece piece = back ? pieces.until(row) : pieces.from(row);
          place.piece = piece;
          if (unit_ == 0) stage.cell = cell_at(p_, place.cell.index), stage.piece = piece;
        }
        __syncwarp();  // the piece is known
        if (!place.piece.padding) bring(place.piece, stage);
        publish();
        row = back ? place.piece.row : place.piece.row + place.piece.rows;
      }
    }
    Stage<kN>& stage = next_stage();
    if (unit_ == 0 && ptx::lane() == 0) stage.piece.rows = 0;
    publish();
  }

 private:
  __device__ __forceinline__ bool is_active() const { return unit_ < task_.units; }

  __device__ __forceinline__ Stage<kN>& next_stage() {
    ptx::mbarrier_wait(&tiles_.free[count_ % kStages], unsigned(count_ / kStages + 1) % 2);
    return tiles_.stage[count_ % kStages];
  }
  __device__ __forceinline__ void publish() {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    __syncwarp();  // all that the warp brings is there, and known to the products
    if (ptx::lane() == 0) ptx::mbarrier_arrive(&tiles_.full[count_ % kStages]);
    ++count_;
  }

  __device__ __forceinline__ void bring(const Piece& piece, Stage<kN>& stage) {
    const int shift = p_.shift_output ? 1 : 0, states = int(p_.state);
    constexpr int kQuarter = kSteps / kProducers;
    copy_rows(Slice(p_.backward ? p_.C : p_.B, piece, task_.group, 0, states), piece,
              p_.backward ? shift : 0, stage.key, kQuarter * unit_, kQuarter);
    if (!p_.backward && !p_.summarize) {
      copy_rows(Slice(p_.C, piece, task_.group, 0, states), piece, shift, stage.C, kQuarter * unit_,
                kQuarter);
    }
    if (!is_active()) return;
    const int64_t head = task_.head(p_, unit_);
    copy_rows(Slice(p_.backward ? p_.dy : p_.x, piece, head, task_.first_column(p_, unit_),
                    task_.columns(p_, unit_)),
              piece, 0, stage.value[unit_], 0, kSteps);
    find_decays(p_, piece, head, own_, stage.decays[unit_]);
  }

  // As load_tile, of rows that are packed, by one warp.
  template <int kAcross>
  __device__ __forceinline__ void copy_rows(const Slice& x, const Piece& piece, int shift,
                                            SwizzledTile<kSteps, kAcross>& tile, int first,
                                            int rows) {
    constexpr int kPacks = kAcross / 8;
    const int begin = piece.first ? shift : 0, end = piece.rows;
#pragma unroll 4
    for (int k = ptx::lane(); k < rows * kPacks; k += 32) {
      const int row = first + k / kPacks, i = k % kPacks * 8, left = x.columns - i;
      const bool there = row >= begin && row < end && left > 0;
      ptx::cp_async_16(&tile.pack(row, i), x.data + (there ? 2 * x.offset(row - shift, i) : 0),
                       there ? left < 8 ? 2 * left : 16 : 0);
    }
  }

  const WalkParams& p_;
  const HopperTask& task_;
  HopperTiles<kN>& tiles_;
  int unit_;
  Head<float> own_;
  int count_ = 0;  // of stages
};

}  // namespace statescan::ssd_scan::cuda
