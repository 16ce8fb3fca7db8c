// What the walk for Hopper is between: the shared memory of a block, and the producers, who bring
// operands there.
#pragma once

#include "common/wgmma.cuh"
#include "ssd_scan/tensor.cuh"
#include "ssd_scan/walks.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kColumns = 64;                   // of headdim, in a unit
inline constexpr int kMostUnits = 4;                  // of a block
inline constexpr int kStages = 2;                     // pieces in shared memory
inline constexpr int kProducers = 4, kConsumers = 8;  // warps

STATESCAN_HOST_DEVICE int64_t columns_of_head(const Shape& p) {
  return (p.headdim + kColumns - 1) / kColumns;
}

// Columns of a head.
struct Unit {
  int64_t head, first;
  int columns;  // none: there is no such unit, but what would be one is computed all the same
};

// One block's share of a walk: neighbouring units of a group along a part.
struct HopperTask {
  int64_t part, b, group;
  int64_t begin, end;  // cells, in the order of the walk
  SharedArray<Unit, kMostUnits> unit;
};

__device__ __forceinline__ void find_task(const WalkParams& p, int64_t i, int units,
                                          HopperTask& task) {
  const int64_t across = columns_of_head(p), all = p.group_heads() * across, cells = p.cells();
  const int64_t blocks = (all + units - 1) / units, first = i % blocks * units;
  i /= blocks;
  task.group = i % p.groups, i /= p.groups;
  task.b = i % p.batch, task.part = i / p.batch;
  task.begin = cells * task.part / p.parts, task.end = cells * (task.part + 1) / p.parts;
  for (int u = 0; u < units; ++u) {
    const bool there = first + u < all;
    const int64_t at = there ? first + u : first;
    Unit& unit = task.unit[u];
    unit.head = task.group * p.group_heads() + at / across, unit.first = at % across * kColumns;
    const int64_t left = p.headdim - unit.first;
    unit.columns = !there ? 0 : int(left < kColumns ? left : kColumns);
  }
}

// What the decays of a piece are multiplied as. Between blocks of 16 steps they are products of two
// that meet at the first step of the later block, both at most 1 for a stable scan.
struct alignas(16) Factors {
  SharedArray<float, kTile> into;                 // of step s in the state
  SharedArray<float, kTile> from_block;           // of row t, from the beginning of its block
  SharedArray<float, 3 * (kTile - 16)> to_block;  // [block - 1][s]: of step s there, weighted

  // By one warp, which has found the decays.
  __device__ __forceinline__ void find(const WalkParams& p, Decays<float>& d) {
    const int shift = p.shift_output ? 1 : 0;
    auto between = [&](int after, int before) {
      return exp2((d.high[after] - d.high[before]) + (d.low[after] - d.low[before]));
    };
    for (int t = ptx::lane(); t < kTile; t += 32) {
      into[t] = p.backward ? d.row[t] : d.column[t] * d.weight[t];
      from_block[t] = between(t + 1 - shift, t / 16 * 16);
    }
    for (int i = ptx::lane(); i < 3 * (kTile - 16); i += 32) {
      const int block = i / (kTile - 16) + 1, s = i % (kTile - 16);
      if (s < 16 * block) to_block[i] = between(16 * block, s + 1) * d.weight[s];
    }
  }
};

// A piece and its operands. Rows and columns that are not there are 0.
template <int kN, int kUnits>
struct Stage {
  SwizzledTile<kSteps, kN> key, C;                            // key: B, or on the way back C
  SharedArray<SwizzledTile<kSteps, kColumns>, kUnits> value;  // x or dy
  SharedArray<Decays<float>, kUnits> decays;
  SharedArray<Factors, kUnits> factors;
  Cell cell;
  Piece piece;                      // of no rows: the end
  SharedArray<char*, kUnits> y, z;  // the piece's first row of each unit
};

// Where a producer is.
struct ProducerPlace {
  int walked;  // cells
  Cell cell;
  Piece piece;
  Marks marks;
};

template <int kN, int kUnits>
struct HopperTiles {
  SharedArray<Stage<kN, kUnits>, kStages> stage;
  SharedArray<SwizzledTile<kN, kColumns>, kUnits> S;
  alignas(16) SharedArray<float, kUnits * kColumns> D;
  SharedArray<ProducerPlace, kProducers> place;
  SharedArray<uint64_t, kStages> full, free;  // by warps
  HopperTask task;
  // Of the state before the part, in the one after it; -1: a sequence starts within. For the first
  // thread of a unit's warpgroup.
  SharedArray<float, kUnits> factor;
};

// A warp that brings a quarter of B and C and one unit's values and decays. The producers go through
// the pieces each for itself.
template <int kN, int kUnits>
class Producer {
 public:
  __device__ __forceinline__ Producer(const WalkParams& p, HopperTiles<kN, kUnits>& tiles)
      : p_(p), tiles_(tiles) {}

  __device__ __forceinline__ void run() {
    ProducerPlace& place = tiles_.place[own()];
    const bool back = p_.backward;
    if (ptx::lane() == 0) place.walked = 0;
    __syncwarp();                                            // the place is known
    while (place.walked < int(task().end - task().begin)) {  // no memory has room for 2^31 cells
      if (ptx::lane() == 0) {
        place.cell = cell_at(p_, walked_cell(p_, task().begin + place.walked));
      }
      __syncwarp();  // the cell is known
      load_marks(p_, task().b, place.cell, place.marks, ptx::lane(), 32);
      const int rows = place.cell.rows;
      for (int row = back ? rows : 0; back ? row > 0 : row < rows;) {
        Stage<kN, kUnits>& stage = next_stage();
        __syncwarp();  // the marks are in place, the piece before is done with
        if (ptx::lane() == 0) {
          const Pieces pieces(p_, task().b, place.cell, place.marks);
          const Piece piece = back ? pieces.until(row) : pieces.from(row);
          place.piece = piece;
          if (own() == 0) stage.cell = cell_at(p_, place.cell.index), stage.piece = piece;
        }
        __syncwarp();  // the piece is known
        if (own() < kUnits && ptx::lane() == 0) {
          const Unit& unit = task().unit[own()];
          stage.y[own()] = first_row(p_.y, place.piece, unit);
          stage.z[own()] = first_row(p_.z, place.piece, unit);
        }
        if (!place.piece.padding) bring(place.piece, stage);
        publish();
        row = back ? place.piece.row : place.piece.row + place.piece.rows;
      }
      __syncwarp();  // the cell is done with
      if (ptx::lane() == 0) ++place.walked;
      __syncwarp();  // on to the next
    }
    Stage<kN, kUnits>& stage = next_stage();
    if (own() == 0 && ptx::lane() == 0) stage.piece.rows = 0;
    publish();
  }

 private:
  __device__ __forceinline__ HopperTask& task() const { return tiles_.task; }
  __device__ __forceinline__ static int own() { return warp_of_group(); }  // the warp's unit

  __device__ __forceinline__ Stage<kN, kUnits>& next_stage() {
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

  __device__ __forceinline__ static char* first_row(const View<4>& x, const Piece& piece,
                                                    const Unit& unit) {
    return const_cast<char*>(Slice(x, piece, unit.head, unit.first, unit.columns).data);
  }

  __device__ __forceinline__ void bring(const Piece& piece, Stage<kN, kUnits>& stage) {
    const int shift = p_.shift_output ? 1 : 0, states = int(p_.state);
    constexpr int kQuarter = kSteps / kProducers;
    copy_rows(Slice(p_.backward ? p_.C : p_.B, piece, task().group, 0, states), piece,
              p_.backward ? shift : 0, stage.key, kQuarter * own(), kQuarter);
    if (!p_.backward && !p_.summarize) {
      copy_rows(Slice(p_.C, piece, task().group, 0, states), piece, shift, stage.C,
                kQuarter * own(), kQuarter);
    }
    if (own() >= kUnits) return;
    const Unit& unit = task().unit[own()];
    copy_rows(Slice(p_.backward ? p_.dy : p_.x, piece, unit.head, unit.first, unit.columns), piece,
              0, stage.value[own()], 0, kSteps);
    find_decays(p_, piece, unit.head, Head<float>(p_, unit.head), stage.decays[own()]);
    __syncwarp();  // the decays are found
    stage.factors[own()].find(p_, stage.decays[own()]);
  }

  // As load_tile, of rows that are packed, by one warp.
  template <int kAcross>
  __device__ __forceinline__ void copy_rows(const Slice& x, const Piece& piece, int shift,
                                            SwizzledTile<kSteps, kAcross>& tile, int first,
                                            int rows) {
    constexpr int kPacks = kAcross / 8;
    const int begin = piece.first ? shift : 0, end = piece.rows;
#pragma unroll 2
    for (int k = ptx::lane(); k < rows * kPacks; k += 32) {
      const int row = first + k / kPacks, i = k % kPacks * 8, left = x.columns - i;
      const bool there = row >= begin && row < end && left > 0;
      ptx::cp_async_16(&tile.pack(row, i), x.data + (there ? 2 * x.offset(row - shift, i) : 0),
                       there ? left < 8 ? 2 * left : 16 : 0);
    }
  }

  const WalkParams& p_;
  HopperTiles<kN, kUnits>& tiles_;
  int count_ = 0;  // of stages
};

}  // namespace statescan::ssd_scan::cuda
