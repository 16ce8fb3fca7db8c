// The walks of the SSD scan on a Hopper GPU: as tensor_walk.cu, where rows of x (or dy), B and C are
// packed and fill the tiles well enough. What pays is that the tensor cores of sm_90a take their operands
// from shared memory by themselves.
//
// Block: two warpgroups that multiply and one that brings operands, on one SM, for up to 4 units (a
// unit: 64 columns of headdim of one head) of a group along one part of a sequence. Each of the two
// has every other unit, with its states in registers, [column][state], and rounded in shared
// memory, [state][column]. Per piece
//
//   producers   | B, C, x of the next piece by cp.async, its decays | ...
//   warpgroup   | G = C B^T | per unit: y = row (C S) + M x + D x, gate  | S rounded
//                             M from G in registers, S = whole S + (column w x)^T B
//
// and back (dS), or for the ends of parts, without G and y. Stages go to and fro by mbarriers.
//
// Grid over (part, batch, group, units of a block). Shared memory: see HopperTiles.
#include "common/launch.h"
#include "ssd_scan/hopper_products.cuh"
#include "ssd_scan/kinds.h"

namespace statescan::ssd_scan::cuda {
namespace {

// A thread's registers: so many at launch, which the warpgroups share out among themselves anew. What
// one takes another must have given back, or it waits forever.
constexpr int kRegisters = 65536 / kThreads / 8 * 8, kConsumerRegisters = 232;
constexpr int kProducerRegisters = 3 * kRegisters - 2 * kConsumerRegisters;
static_assert(kProducerRegisters == 40);

template <int kN, int kUnits>
class HopperWalk : HopperGroup<kN, kUnits> {
  using Group = HopperGroup<kN, kUnits>;
  using Group::kPanels, Group::p_, Group::tiles_, Group::at_, Group::S_;
  using Group::output, Group::update, Group::round_state, Group::row_bytes;
  using Group::task, Group::own, Group::stage, Group::thread, Group::for_own;

 public:
  using Group::Group;

  __device__ __forceinline__ void run() {
    const bool entered = task().part > 0 && !p_.summarize;
    for_own([&](int i, int unit) {
      clear(i);
      if (thread() == 0) tiles_.factor[unit] = 1;
      if (!entered) return;
      float* carry = static_cast<float*>(p_.carry) + carry_offset(unit);
      for_state(i, unit, carry, p_.headdim, 1, [](float* at, float& S) { S = *at; });
    });
    round_state();
    for (int count = 0;; ++count) {
      at_ = count % kStages;
      ptx::mbarrier_wait(&tiles_.full[at_], unsigned(count / kStages) % 2);
      __syncwarp();  // lanes that waited apart go on together: products are of whole warps
      if (stage().piece.rows == 0) break;
      walk_piece(p_, stage().cell, stage().piece, *this);
      __syncwarp();  // the warp is done with the stage
      if (ptx::lane() == 0) ptx::mbarrier_arrive(&tiles_.free[at_]);
    }
    if (!p_.summarize) return;
    for_own([&](int i, int unit) {
      float* to = static_cast<float*>(p_.carry) + carry_offset(unit) +
                  p_.batch * p_.heads * p_.state * p_.headdim;
      for_state(i, unit, to, p_.headdim, 1, [](float* at, float& S) { *at = S; });
      if (thread() == 0 && own(unit).first == 0 && own(unit).columns > 0) {
        static_cast<float*>(p_.factor)[head_row(unit) + p_.batch * p_.heads] = tiles_.factor[unit];
      }
    });
  }

  __device__ __forceinline__ void restart(int64_t slot) {
    for_own([&](int i, int unit) {
      clear(i);
      if (thread() == 0) tiles_.factor[unit] = -1;
      if (slot < 0) return;
      for_state(i, unit, slot_state(p_.enter, slot, unit), p_.enter.stride[3], p_.enter.stride[2],
                [](float* at, float& S) { S = *at; });
    });
    round_state();
  }

  __device__ __forceinline__ void save(const Cell& cell) {
    const bool chunk = !p_.backward && p_.chunk_states && cell.chunk_entry;
    for_own([&](int i, int unit) {
      if (chunk) {
        for_state(i, unit, chunk_state(cell, unit), p_.chunk_states.stride[4],
                  p_.chunk_states.stride[3], [](float* at, float& S) { *at = S; });
      }
      if (p_.cell_states != nullptr) save_rounded(cell, unit);
    });
  }

  __device__ __forceinline__ void add_chunk_gradient(const Cell& cell) {
    for_own([&](int i, int unit) {
      for_state(i, unit, chunk_state(cell, unit), p_.chunk_states.stride[4],
                p_.chunk_states.stride[3], [](float* at, float& S) { S += *at; });
    });
    round_state();
  }

  __device__ __forceinline__ void leave(int64_t slot) {
    for_own([&](int i, int unit) {
      for_state(i, unit, slot_state(p_.leave, slot, unit), p_.leave.stride[3], p_.leave.stride[2],
                [](float* at, float& S) { *at = S; });
    });
  }

  __device__ __forceinline__ void clear_outputs(const Piece& piece) {
    for_own([&](int, int unit) {
      const unsigned packs = unsigned(own(unit).columns) / 8;
      for (unsigned k = unsigned(thread()); k < unsigned(piece.rows) * packs; k += kGroupThreads) {
        char* row = stage().y[unit] + k / packs * row_bytes(p_.y);
        ptx::store(reinterpret_cast<uint4*>(row) + k % packs, uint4{});
      }
    });
  }

  __device__ __forceinline__ void advance(const Piece& piece) {
    if (p_.backward || p_.summarize) {
      for_own([&](int i, int unit) {
        update(i, unit);
        ptx::wgmma_wait<0>(S_[i]);
      });
    } else {
      output(piece);
    }
    round_state();
  }

 private:
  __device__ __forceinline__ int64_t head_row(int unit) const {
    return (task().part * p_.batch + task().b) * p_.heads + own(unit).head;
  }
  __device__ __forceinline__ int64_t carry_offset(int unit) const {
    return head_row(unit) * p_.state * p_.headdim + own(unit).first;
  }
  __device__ __forceinline__ float* slot_state(const View<4>& x, int64_t slot, int unit) const {
    return static_cast<float*>(x.data) + slot * x.stride[0] + own(unit).head * x.stride[1] +
           own(unit).first * x.stride[2];
  }
  __device__ __forceinline__ float* chunk_state(const Cell& cell, int unit) const {
    const View<5>& x = p_.chunk_states;
    return static_cast<float*>(x.data) + task().b * x.stride[0] + cell.chunk * x.stride[1] +
           own(unit).head * x.stride[2] + own(unit).first * x.stride[3];
  }

  // f(address, number) for the thread's numbers of a unit's state that there are, which begins at
  // `state`.
  template <class F>
  __device__ __forceinline__ void for_state(int i, int unit, float* state, int64_t state_stride,
                                            int64_t column_stride, F&& f) {
    const int column = 16 * warp_of_group() + fragment_row(), n = fragment_column();
    const int columns_left = own(unit).columns - column, states_left = int(p_.state) - n;
    float* at = state + column * column_stride + n * state_stride;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j, at = ptx::opaque(at + 8 * state_stride)) {
      float* d = S_[i][j / 8].d + j % 8 * 4;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e >= states_left) continue;
        float* here = at + e * state_stride;
        if (columns_left > 0) f(here, d[e]);
        if (columns_left > 8) f(here + 8 * column_stride, d[e + 2]);
      }
    }
  }

  __device__ __forceinline__ void clear(int i) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (float& S : S_[i][panel].d) S = 0;
    }
  }

  // S before the cell, for the gradients; or dS after it.
  __device__ __forceinline__ void save_rounded(const Cell& cell, int unit) {
    const int64_t row =
        ((task().b * p_.cells() + cell.index) * p_.heads + own(unit).head) * p_.state;
    BFloat16* to = static_cast<BFloat16*>(p_.cell_states) + row * p_.headdim + own(unit).first;
    const bool packed = p_.headdim % 8 == 0;  // so are the columns of a unit
    const int step = packed ? 8 : 1;
    const unsigned across = unsigned(own(unit).columns / step);
    for (unsigned k = unsigned(thread()); k < unsigned(p_.state) * across; k += kGroupThreads) {
      const int n = int(k / across), i = int(k % across) * step;
      if (packed) {
        ptx::store(reinterpret_cast<uint4*>(to + n * p_.headdim + i), tiles_.S[unit].pack(n, i));
      } else {
        to[n * p_.headdim + i] = *tiles_.S[unit].at(n, i);
      }
    }
  }
};

template <int kN, int kUnits>
__global__ __launch_bounds__(kThreads, 1) void hopper_walk_kernel(const WalkParams p) {
  if constexpr (ptx::kHopper) {
    auto& tiles = *dynamic_shared<HopperTiles<kN, kUnits>>();
    HopperTask& task = tiles.task;
    if (threadIdx.x == 0) find_task(p, blockIdx.x, kUnits, task);
    if (threadIdx.x < kStages) {
      ptx::mbarrier_init(&tiles.full[int(threadIdx.x)], kProducers);
      ptx::mbarrier_init(&tiles.free[int(threadIdx.x)], kConsumers);
    }
    __syncthreads();  // the task is known, the mbarriers are there
    for (int i = int(threadIdx.x); p.D && i < kUnits * kColumns; i += kThreads) {
      const Unit& unit = task.unit[i / kColumns];
      const int64_t column = i % kColumns;
      tiles.D[i] = column < unit.columns
                       ? load_element<float>(
                             p.D.data, p.D.dtype,
                             unit.head * p.D.stride[0] + (unit.first + column) * p.D.stride[1])
                       : 0;
    }
    __syncthreads();  // D is there
    if (threadIdx.x < kGroupThreads) {
      ptx::have_less_registers<kProducerRegisters>();
      Producer<kN, kUnits>(p, tiles).run();
    } else {
      ptx::have_more_registers<kConsumerRegisters>();
      HopperWalk<kN, kUnits>(p, tiles).run();
    }
  }
}

// Is it more than an empty kernel, as it is where it was built for another architecture?
bool is_built() {
  static const bool built = registers_of("ssd_scan walk", hopper_walk_kernel<64, 2>) > 32;
  return built;
}

// Rows of 16-byte packs.
bool is_packed(const View<4>& x) {
  return x.dtype == DType::kBFloat16 && x.stride[3] == 1 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[0] % 8 == 0 &&
         x.stride[1] % 8 == 0 && x.stride[2] % 8 == 0;
}

// At least two thirds of a tile are used.
bool fills(int64_t size, int64_t tile) { return 3 * size >= 2 * ((size + tile - 1) / tile * tile); }

int64_t blocks(const WalkParams& p, int64_t units_per_block) {
  const int64_t units = p.group_heads() * columns_of_head(p);
  const int64_t parts = p.summarize ? p.parts - 1 : p.parts;
  return parts * p.batch * p.groups * ((units + units_per_block - 1) / units_per_block);
}

template <int kN, int kUnits>
void run(const WalkParams& p, cudaStream_t stream) {
  launch(kUnits == 4 ? "ssd_scan hopper walk, 4 units" : "ssd_scan hopper walk, 2 units",
         hopper_walk_kernel<kN, kUnits>, blocks(p, kUnits), kThreads,
         sizeof(HopperTiles<kN, kUnits>), stream, p);
}

// Four units share more, two make more blocks, and a processor has room for one: what takes less
// time, if the walk with four takes 7 / 4 of that with two.
template <int kN>
void run(const WalkParams& p, cudaStream_t stream) {
  auto waves = [&](int64_t units) { return (blocks(p, units) + p.processors - 1) / p.processors; };
  7 * waves(4) <= 4 * waves(2) ? run<kN, 4>(p, stream) : run<kN, 2>(p, stream);
}

}  // namespace

bool has_hopper_walk(const WalkParams& p) {
  if (!p.hopper || !p.bfloat16 || p.state > 128 || p.headdim % 8 != 0 || !is_built()) return false;
  if (!fills(p.state, p.state <= 64 ? 64 : 128) || !fills(p.headdim, kColumns)) return false;
  if (p.group_heads() * columns_of_head(p) < 2 || !is_packed(p.B) || !is_packed(p.C)) return false;
  if (int64_t(sizeof(HopperTiles<128, 4>)) > p.shared_bytes) return false;
  if (p.backward) return p.dy && is_packed(p.dy) && !p.z;
  return is_packed(p.x) && is_packed(p.y) && (!p.z || is_packed(p.z));
}

void hopper_walk(const WalkParams& p, cudaStream_t stream) {
  p.state <= 64 ? run<64>(p, stream) : run<128>(p, stream);
}

}  // namespace statescan::ssd_scan::cuda
