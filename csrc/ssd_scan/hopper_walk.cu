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
#include "ssd_scan/hopper.cuh"
#include "ssd_scan/kinds.h"

namespace statescan::ssd_scan::cuda {
namespace {

constexpr int kGroupThreads = 128, kThreads = 3 * kGroupThreads;
constexpr int kGroups = 2, kOwn = kUnits / kGroups;  // warpgroups that multiply; units of each
// 65536 registers of an SM: 2 x 128 x 232 and 128 x 48.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 48;

template <int kN>
class HopperWalk {
 public:
  __device__ __forceinline__ HopperWalk(const WalkParams& p, const HopperTask& task,
                                        HopperTiles<kN>& tiles)
      : p_(p), task_(task), tiles_(tiles), group_(int(threadIdx.x) / kGroupThreads - 1) {}

  __device__ __forceinline__ void run() {
    const bool entered = task_.part > 0 && !p_.summarize;
    for_own([&](int i, int unit) {
      clear(i);
      if (!entered) return;
      const float* carry = static_cast<const float*>(p_.carry) + carry_offset(unit);
      for_state(i, unit, p_.headdim, 1, [&](int64_t at, float& S) { S = carry[at]; });
    });
    round_state();
    for (int count = 0;; ++count) {
      const int at = count % kStages;
      ptx::mbarrier_wait(&tiles_.full[at], unsigned(count / kStages) % 2);
      stage_ = &tiles_.stage[at];
      if (stage_->piece.rows == 0) break;
      walk_piece(p_, stage_->cell, stage_->piece, *this);
      __syncwarp();  // the warp is done with the stage
      if (ptx::lane() == 0) ptx::mbarrier_arrive(&tiles_.free[at]);
    }
    if (!p_.summarize) return;
    for_own([&](int i, int unit) {
      float* to = static_cast<float*>(p_.carry) + carry_offset(unit) +
                  p_.batch * p_.heads * p_.state * p_.headdim;
      for_state(i, unit, p_.headdim, 1, [&](int64_t at, float& S) { to[at] = S; });
      if (thread() == 0 && task_.first_column(p_, unit) == 0) {
        static_cast<float*>(p_.factor)[head_row(unit) + p_.batch * p_.heads] = factor_[i];
      }
    });
  }

  __device__ __forceinline__ void restart(int64_t slot) {
    for_own([&](int i, int unit) {
      clear(i);
      factor_[i] = -1;
      if (slot < 0) return;
      const float* from = slot_state(p_.enter, slot, unit);
      for_state(i, unit, p_.enter.stride[3], p_.enter.stride[2],
                [&](int64_t at, float& S) { S = from[at]; });
    });
    round_state();
  }

  __device__ __forceinline__ void save(const Cell& cell) {
    const bool chunk = !p_.backward && p_.chunk_states && cell.chunk_entry;
    for_own([&](int i, int unit) {
      if (chunk) {
        float* to = chunk_state(cell, unit);
        for_state(i, unit, p_.chunk_states.stride[4], p_.chunk_states.stride[3],
                  [&](int64_t at, float& S) { to[at] = S; });
      }
      if (p_.cell_states != nullptr) save_rounded(cell, unit);
    });
  }

  __device__ __forceinline__ void add_chunk_gradient(const Cell& cell) {
    for_own([&](int i, int unit) {
      const float* from = chunk_state(cell, unit);
      for_state(i, unit, p_.chunk_states.stride[4], p_.chunk_states.stride[3],
                [&](int64_t at, float& S) { S += from[at]; });
    });
    round_state();
  }

  __device__ __forceinline__ void leave(int64_t slot) {
    for_own([&](int i, int unit) {
      float* to = slot_state(p_.leave, slot, unit);
      for_state(i, unit, p_.leave.stride[3], p_.leave.stride[2],
                [&](int64_t at, float& S) { to[at] = S; });
    });
  }

  __device__ __forceinline__ void clear_outputs(const Piece& piece) {
    for_own([&](int, int unit) {
      const Slice y = slice(p_.y, piece, unit);
      const unsigned pairs = unsigned(y.columns + 1) / 2;
      for (unsigned k = unsigned(thread()); k < unsigned(piece.rows) * pairs; k += kGroupThreads) {
        store_pair(y, int(k / pairs), int(k % pairs) * 2, 0, 0);
      }
    });
  }

  __device__ __forceinline__ void advance(const Piece& piece) {
    const bool outputs = !p_.backward && !p_.summarize;
    GroupProduct G;
    if (outputs) {
      ptx::wgmma_fence(G.d);
#pragma unroll
      for (int k = 0; k < kN; k += 16) {
        ptx::wgmma_64x64x16<false>(G.d, stage_->C.rows(k), stage_->key.rows(k), k > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(G.d);
    }
    for_own([&](int i, int unit) {
      if (outputs) output(piece, unit, G);
      update(i, unit);
    });
    round_state();
  }

 private:
  static constexpr int kPanels = kN / 64;

  __device__ __forceinline__ int thread() const { return int(threadIdx.x) % kGroupThreads; }

  // f(number among the warpgroup's units, among the block's).
  template <class F>
  __device__ __forceinline__ void for_own(F&& f) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int unit = kGroups * i + group_;
      if (unit < task_.units) f(i, unit);
    }
  }

  __device__ __forceinline__ Slice slice(const View<4>& x, const Piece& piece, int unit) const {
    return Slice(x, piece, task_.head(p_, unit), task_.first_column(p_, unit),
                 task_.columns(p_, unit));
  }
  __device__ __forceinline__ int64_t head_row(int unit) const {
    return (task_.part * p_.batch + task_.b) * p_.heads + task_.head(p_, unit);
  }
  __device__ __forceinline__ int64_t carry_offset(int unit) const {
    return head_row(unit) * p_.state * p_.headdim + task_.first_column(p_, unit);
  }
  __device__ __forceinline__ float* slot_state(const View<4>& x, int64_t slot, int unit) const {
    return static_cast<float*>(x.data) + slot * x.stride[0] + task_.head(p_, unit) * x.stride[1] +
           task_.first_column(p_, unit) * x.stride[2];
  }
  __device__ __forceinline__ float* chunk_state(const Cell& cell, int unit) const {
    const View<5>& x = p_.chunk_states;
    return static_cast<float*>(x.data) + task_.b * x.stride[0] + cell.chunk * x.stride[1] +
           task_.head(p_, unit) * x.stride[2] + task_.first_column(p_, unit) * x.stride[3];
  }

  // f(offset, number) for the thread's numbers of a unit's state that there are.
  template <class F>
  __device__ __forceinline__ void for_state(int i, int unit, int64_t state_stride,
                                            int64_t column_stride, F&& f) {
    const int columns = task_.columns(p_, unit), states = int(p_.state);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      S_[i][panel].for_each([&](int column, int n, float& S) {
        n += 64 * panel;
        if (column < columns && n < states) f(n * state_stride + column * column_stride, S);
      });
    }
  }

  __device__ __forceinline__ void clear(int i) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      S_[i][panel].for_each([](int, int, float& S) { S = 0; });
    }
  }

  __device__ __forceinline__ void group_barrier() { ptx::barrier_sync(1 + group_, kGroupThreads); }

  __device__ __forceinline__ void round_state() {
    group_barrier();  // the rounded states have been read
    for_own([&](int i, int unit) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        store_transposed(S_[i][panel], tiles_.S[unit], 64 * panel);
      }
    });
    ptx::fence_proxy_async();
    group_barrier();  // they are in place
  }

  // S before the cell, for the gradients; or dS after it.
  __device__ __forceinline__ void save_rounded(const Cell& cell, int unit) {
    const int64_t row =
        ((task_.b * p_.cells() + cell.index) * p_.heads + task_.head(p_, unit)) * p_.state;
    BFloat16* to =
        static_cast<BFloat16*>(p_.cell_states) + row * p_.headdim + task_.first_column(p_, unit);
    const bool packed = p_.headdim % 8 == 0;  // so are the columns of a unit
    const int step = packed ? 8 : 1;
    const unsigned across = unsigned(task_.columns(p_, unit) / step);
    for (unsigned k = unsigned(thread()); k < unsigned(p_.state) * across; k += kGroupThreads) {
      const int n = int(k / across), i = int(k % across) * step;
      if (packed) {
        ptx::store(reinterpret_cast<uint4*>(to + n * p_.headdim + i), tiles_.S[unit].pack(n, i));
      } else {
        to[n * p_.headdim + i] = *tiles_.S[unit].at(n, i);
      }
    }
  }

  __device__ __forceinline__ void output(const Piece& piece, int unit, GroupProduct& G) {
    Decays<float>& d = stage_->decays[unit];
    GroupProduct y;
    ptx::wgmma_fence(y.d);
#pragma unroll
    for (int k = 0; k < kN; k += 16) {
      ptx::wgmma_64x64x16<true>(y.d, stage_->C.rows(k), tiles_.S[unit].columns(k), k > 0);
    }
    ptx::wgmma_commit();
    uint32_t M[4][4];
    mix(G, d, M);
    ptx::wgmma_wait<0>(y.d);
    y.for_each([&](int t, int, float& v) { v *= d.row[t]; });
    ptx::wgmma_fence(y.d, M);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::wgmma_64x64x16(y.d, M[k], stage_->value[unit].columns(16 * k));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(y.d);
    store_output(y, piece, unit);
  }

  // The thread's part of M, as a left operand.
  __device__ __forceinline__ void mix(GroupProduct& G, Decays<float>& d, uint32_t (&M)[4][4]) {
    const int shift = p_.shift_output ? 1 : 0;
    GroupProduct x;
#pragma unroll
    for (int i = 0; i < 32; ++i) x.d[i] = G.d[i];
    x.for_each([&](int t, int s, float& v) {
      v = s + shift <= t ? v * d.between(t, s, shift) * d.weight[s] : 0.0f;
    });
#pragma unroll
    for (int i = 0; i < 16; ++i) M[i / 4][i % 4] = ptx::pack_bf16(x.d[2 * i], x.d[2 * i + 1]);
  }

  __device__ __forceinline__ void store_output(GroupProduct& y, const Piece& piece, int unit) {
    const Slice to = slice(p_.y, piece, unit), gate = slice(p_.z ? p_.z : p_.y, piece, unit);
    const int first = 16 * warp_of_group() + ptx::lane() / 4, across = ptx::lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      const int t = first + i % 4 / 2 * 8, column = across + i / 4 * 8;
      if (t >= piece.rows || column >= to.columns) continue;
      float a = y.d[i], b = y.d[i + 1];
      if (p_.D) {
        const uint32_t x = *reinterpret_cast<uint32_t*>(stage_->value[unit].at(t, column));
        a += tiles_.D[unit * kColumns + column] * bits_to_float(x << 16);
        b += tiles_.D[unit * kColumns + column + 1] * bits_to_float(x & 0xffff0000u);
      }
      if (p_.z) {
        float z, next;
        load_pair(gate, t, column, z, next);
        a *= silu(z), b *= silu(next);
      }
      store_pair(to, t, column, a, b);
    }
  }

  // S = whole S + what each step puts into it.
  __device__ __forceinline__ void update(int i, int unit) {
    Decays<float>& d = stage_->decays[unit];
    const float whole = d.whole;
    if (factor_[i] >= 0) factor_[i] *= whole;
    uint32_t left[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Left x = left_of_columns(stage_->value[unit], 16 * k, 16 * warp_of_group());
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int t = 16 * k + ptx::lane() % 4 * 2 + j / 2 * 8;
        left[k][j] = ptx::pack_bf16(bits_to_float(x.a[j] << 16) * into_state(d, t),
                                    bits_to_float(x.a[j] & 0xffff0000u) * into_state(d, t + 1));
      }
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      S_[i][panel].for_each([&](int, int, float& S) { S *= whole; });
      ptx::wgmma_fence(S_[i][panel].d, left);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        ptx::wgmma_64x64x16(S_[i][panel].d, left[k], stage_->key.columns(16 * k, panel));
      }
    }
    ptx::wgmma_commit();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) ptx::wgmma_wait<0>(S_[i][panel].d);
  }
  __device__ __forceinline__ float into_state(Decays<float>& d, int t) const {
    return p_.backward ? d.row[t] : d.column[t] * d.weight[t];
  }

  const WalkParams& p_;
  const HopperTask& task_;
  HopperTiles<kN>& tiles_;
  int group_;  // of the warpgroups that multiply
  Stage<kN>* stage_ = nullptr;
  // Of the state before the part, in the one after it; -1: a sequence starts within.
  float factor_[kOwn] = {1, 1};
  GroupProduct S_[kOwn][kPanels];
};

template <int kN>
__global__ __launch_bounds__(kThreads, 1) void hopper_walk_kernel(const WalkParams p,
                                                                  int64_t units_per_block) {
  if constexpr (ptx::kHopper) {
    HopperTiles<kN>& tiles = *dynamic_shared<HopperTiles<kN>>();
    const HopperTask task(p, blockIdx.x, units_per_block);
    if (threadIdx.x < kStages) {
      ptx::mbarrier_init(&tiles.full[int(threadIdx.x)], kProducers);
      ptx::mbarrier_init(&tiles.free[int(threadIdx.x)], kConsumers);
    }
    for (int i = int(threadIdx.x); p.D && i < task.units * kColumns; i += kThreads) {
      const int unit = i / kColumns, column = i % kColumns;
      tiles.D[i] =
          column < task.columns(p, unit)
              ? load_element<float>(p.D.data, p.D.dtype,
                                    task.head(p, unit) * p.D.stride[0] +
                                        (task.first_column(p, unit) + column) * p.D.stride[1])
              : 0;
    }
    __syncthreads();  // the mbarriers and D are there
    if (threadIdx.x < kGroupThreads) {
      ptx::have_less_registers<kProducerRegisters>();
      Producer<kN>(p, task, tiles).run();
    } else {
      ptx::have_more_registers<kConsumerRegisters>();
      HopperWalk<kN>(p, task, tiles).run();
    }
  }
}

// Is it more than an empty kernel, as it is where it was built for another architecture?
bool is_built() {
  static const bool built = registers_of("ssd_scan walk", hopper_walk_kernel<64>) > 32;
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

int64_t state_tile(const Shape& p) { return p.state <= 64 ? 64 : 128; }

int64_t blocks(const WalkParams& p, int64_t units_per_block) {
  const int64_t units = p.group_heads() * HopperTask::columns_of_head(p);
  const int64_t parts = p.summarize ? p.parts - 1 : p.parts;
  return parts * p.batch * p.groups * ((units + units_per_block - 1) / units_per_block);
}

// Four units share more, two make more blocks: what takes less time on 132 processors, if the
// walk with four takes 7 / 4 of that with two.
int64_t units_per_block(const WalkParams& p) {
  auto waves = [&](int64_t units) { return (blocks(p, units) + 131) / 132; };
  return 7 * waves(4) <= 4 * waves(2) ? 4 : 2;
}

template <int kN>
void run(const WalkParams& p, cudaStream_t stream) {
  const int64_t units = units_per_block(p);
  launch("ssd_scan hopper walk", hopper_walk_kernel<kN>, blocks(p, units), kThreads,
         sizeof(HopperTiles<kN>), stream, p, units);
}

}  // namespace

bool has_hopper_walk(const WalkParams& p) {
  if (!p.hopper || !p.bfloat16 || p.state > 128 || !is_built()) return false;
  if (!fills(p.state, state_tile(p)) || !fills(p.headdim, kColumns)) return false;
  if (p.group_heads() * HopperTask::columns_of_head(p) < 2) return false;
  const View<4>& value = p.backward ? p.dy : p.x;
  return is_packed(p.B) && is_packed(p.C) && value && is_packed(value) && !(p.backward && p.z) &&
         int64_t(sizeof(HopperTiles<128>)) <= p.shared_bytes;
}

void hopper_walk(const WalkParams& p, cudaStream_t stream) {
  p.state <= 64 ? run<64>(p, stream) : run<128>(p, stream);
}

}  // namespace statescan::ssd_scan::cuda
