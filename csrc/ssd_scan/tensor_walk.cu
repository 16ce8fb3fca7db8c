// The walks of the SSD scan on tensor cores: x, B and C of bfloat16, sums and states in float.
//
// Block: 8 warps for each of 1 or 2 heads of a group, kP columns of their states along one part of
// a sequence. A warp has 16 steps of the outputs and half of their columns, and every eighth 16
// rows of the state in registers; the rounded state is in shared memory, as an operand. Per piece
//
//   stage B, C, x | G = C B^T, all warps | y = row (C S) + M x + D x | x <- column w x | S update
//                   shared by heads        M = G between w, rounded    in place          S rounded
//
// and back (dS), or for the ends of parts: stage C, dy | dy <- row dy | dS update.
//
// Grid over (part, batch, heads of a block, columns). Shared memory: see WalkTiles.
#include "common/launch.h"
#include "ssd_scan/kinds.h"
#include "ssd_scan/tensor.cuh"
#include "ssd_scan/walks.cuh"

namespace statescan::ssd_scan::cuda {
namespace {

constexpr int kHeadWarps = 8, kHeadThreads = 32 * kHeadWarps, kMostHeads = 2;
constexpr int kBelow = 10;  // blocks of 16 x 16 on and below the diagonal of G

template <int kN, int kP>
struct HeadTiles {
  Tile<kSteps, kP> value;  // x, or dy before the gate
  Tile<kN, kP> S;
  Decays<float> decays;
  SharedArray<float, kP> D;
};

template <int kN, int kP>
struct WalkTiles {
  Tile<kSteps, kN> key, C;
  alignas(16) SharedArray<float4, kBelow * 64> G;  // [block][half][lane], as the lanes hold it
  WalkPlace place;
  alignas(16) SharedArray<HeadTiles<kN, kP>, kMostHeads> head;
};

template <int kN, int kP>
class TensorWalk {
 public:
  __device__ __forceinline__ TensorWalk(const WalkParams& p, const WalkTask& task)
      : p_(p),
        task_(task),
        tiles_(*dynamic_shared<WalkTiles<kN, kP>>()),
        own_tiles_(tiles_.head[int(threadIdx.x) / kHeadThreads]),
        warp_(int(threadIdx.x) / 32 % kHeadWarps),
        columns_(int(p.headdim - task.column * kP < kP ? p.headdim - task.column * kP : kP)) {}

  __device__ __forceinline__ void run() {
    const bool entered = task_.part > 0 && !p_.summarize;
    const float* carry = static_cast<const float*>(p_.carry) + carry_offset();
    clear();
    if (entered) {
      for_state(p_.headdim, 1, [&](int64_t at, float& S) { S = carry[at]; });
      round_state();
    }
    if (p_.D && !p_.backward) {
      for (int i = thread(); i < columns_; i += kHeadThreads) {
        own_tiles_.D[i] = load_element<float>(
            p_.D.data, p_.D.dtype, head() * p_.D.stride[0] + (first() + i) * p_.D.stride[1]);
      }
    }
    walk_cells(p_, tiles_.place, *this);
    if (!p_.summarize) return;
    float* to = static_cast<float*>(p_.carry) + carry_offset() +
                p_.batch * p_.heads * p_.state * p_.headdim;
    for_state(p_.headdim, 1, [&](int64_t at, float& S) { to[at] = S; });
    if (thread() == 0 && task_.column == 0) {
      static_cast<float*>(p_.factor)[head_row() + p_.batch * p_.heads] = factor_;
    }
  }

  __device__ __forceinline__ void restart(int64_t slot) {
    clear();
    if (slot >= 0) {
      const View<4>& x = p_.enter;
      const float* from = static_cast<const float*>(x.data) + slot * x.stride[0] +
                          head() * x.stride[1] + first() * x.stride[2];
      for_state(x.stride[3], x.stride[2], [&](int64_t at, float& S) { S = from[at]; });
    }
    __syncthreads();  // the rounded state has been read
    round_state();
    __syncthreads();  // it is in place
    factor_ = -1;
  }

  __device__ __forceinline__ void save(const Cell& cell) {
    if (!p_.backward && p_.chunk_states && cell.chunk_entry) {
      float* to = chunk_state(cell);
      for_state(p_.chunk_states.stride[4], p_.chunk_states.stride[3],
                [&](int64_t at, float& S) { to[at] = S; });
      __syncthreads();  // what it went through is read: operands come in there next
    }
    if (p_.cell_states == nullptr) return;
    const int64_t row = ((task_.b * p_.cells() + cell.index) * p_.heads + head()) * p_.state;
    BFloat16* to = static_cast<BFloat16*>(p_.cell_states) + row * p_.headdim + first();
    const bool packed = p_.headdim % 8 == 0;  // so are the columns of a task
    const int step = packed ? 8 : 1;
    const unsigned across = unsigned(columns_ / step);
    for (unsigned k = unsigned(thread()); k < unsigned(states()) * across; k += kHeadThreads) {
      const int n = int(k / across), i = int(k % across) * step;
      if (packed) {
        ptx::store(reinterpret_cast<uint4*>(to + n * p_.headdim + i), own_tiles_.S.pack(n, i));
      } else {
        to[n * p_.headdim + i] = *own_tiles_.S.at(n, i);
      }
    }
  }

  __device__ __forceinline__ void add_chunk_gradient(const Cell& cell) {
    const float* from = chunk_state(cell);
    for_state(p_.chunk_states.stride[4], p_.chunk_states.stride[3],
              [&](int64_t at, float& S) { S += from[at]; });
    round_state();
    __syncthreads();  // the rounded state is in place
  }

  __device__ __forceinline__ void leave(int64_t slot) {
    const View<4>& x = p_.leave;
    float* to = static_cast<float*>(x.data) + slot * x.stride[0] + head() * x.stride[1] +
                first() * x.stride[2];
    for_state(x.stride[3], x.stride[2], [&](int64_t at, float& S) { to[at] = S; });
  }

  __device__ __forceinline__ void clear_outputs(const Piece& piece) {
    const Slice y(p_.y, piece, head(), first(), columns_);
    const unsigned pairs = unsigned(columns_ + 1) / 2;
    for (unsigned k = unsigned(thread()); k < unsigned(piece.rows) * pairs; k += kHeadThreads) {
      store_pair(y, int(k / pairs), int(k % pairs) * 2, 0, 0);
    }
  }

  __device__ __forceinline__ void advance(const Piece& piece) {
    const int shift = p_.shift_output ? 1 : 0, threads = int(blockDim.x);
    const int64_t group = head() / p_.group_heads();
    const bool outputs = !p_.backward && !p_.summarize;
    const Slice key(p_.backward ? p_.C : p_.B, piece, group, 0, states());
    load_tile(key, piece, p_.backward ? shift : 0, tiles_.key, int(threadIdx.x), threads);
    if (outputs) {
      load_tile(Slice(p_.C, piece, group, 0, states()), piece, shift, tiles_.C, int(threadIdx.x),
                threads);
    }
    if (p_.backward) {
      load_ungated(p_, piece, head(), first(), columns_, own_tiles_.value, thread(), kHeadThreads);
    } else {
      load_tile(Slice(p_.x, piece, head(), first(), columns_), piece, 0, own_tiles_.value, thread(),
                kHeadThreads);
    }
    if (warp_ == 0) find_decays(p_, piece, head(), Head<float>(p_, head()), own_tiles_.decays);
    __syncthreads();  // operands and decays are in place
    if (outputs) {
      mix(piece.rows);
      __syncthreads();  // G is in place
      output(piece, shift);
      __syncthreads();  // x and the rounded state have been read
    }
    weigh(piece.rows);
    __syncthreads();  // the values are weighted
    update(piece.rows);
    round_state();
    __syncthreads();  // the rounded state is in place, the operands may be written again
  }

 private:
  __device__ __forceinline__ int64_t head() const {
    return task_.head + int(threadIdx.x) / kHeadThreads;
  }
  __device__ __forceinline__ int thread() const { return 32 * warp_ + ptx::lane(); }  // of the head
  __device__ __forceinline__ int tile_row() const { return warp_ % 4; }               // 16 outputs
  __device__ __forceinline__ int64_t first() const { return task_.column * kP; }
  __device__ __forceinline__ int states() const { return int(p_.state); }

  static constexpr int kStage = 16 * 17;  // numbers of a product, without conflicts
  static_assert(kStage * kHeadWarps * kMostHeads * 4 <= int(sizeof(Tile<kSteps, kN>)));
  static constexpr int kDown = kN / 128,
                       kAcross = kP / 16;  // products that a warp has of the state

  __device__ __forceinline__ int64_t head_row() const {
    return (task_.part * p_.batch + task_.b) * p_.heads + head();
  }
  __device__ __forceinline__ int64_t carry_offset() const {
    return head_row() * p_.state * p_.headdim + first();
  }
  __device__ __forceinline__ float* chunk_state(const Cell& cell) const {
    const View<5>& x = p_.chunk_states;
    return static_cast<float*>(x.data) + task_.b * x.stride[0] + cell.chunk * x.stride[1] +
           head() * x.stride[2] + first() * x.stride[3];
  }

  // f(offset, number) for the numbers of the warp's part of the state that there are, by way of
  // shared memory: 16 rows by 16 columns at a time, neighbours of a column side by side. Between
  // pieces only.
  template <class F>
  __device__ __forceinline__ void for_state(int64_t state_stride, int64_t column_stride, F&& f) {
    const int lane = ptx::lane();
    float* stage = reinterpret_cast<float*>(tiles_.key.at(0, 0)) + int(threadIdx.x) / 32 * kStage;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const int n = 16 * (warp_ + kHeadWarps * i), c = 16 * j;
        if (n >= states() || c >= columns_) continue;
        S_[i][j].for_each([&](int row, int column, float& S) { stage[column * 17 + row] = S; });
        __syncwarp();  // the numbers are in place
#pragma unroll 1
        for (int k = lane; k < 256; k += 32) {
          const int row = n + k % 16, column = c + k / 16;
          if (row >= states() || column >= columns_) continue;
          f(row * state_stride + column * column_stride, stage[k / 16 * 17 + k % 16]);
        }
        __syncwarp();  // they may have changed
        S_[i][j].for_each([&](int row, int column, float& S) { S = stage[column * 17 + row]; });
        __syncwarp();  // they have been read
      }
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) S_[i][j] = Product{};
    }
  }

  __device__ __forceinline__ void round_state() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        store_rounded(S_[i][j], own_tiles_.S.at(16 * (warp_ + kHeadWarps * i), 16 * j),
                      Tile<kN, kP>::kPitch);
      }
    }
  }

  // G on and below the diagonal, a block of 16 x 16 to each warp in turn.
  __device__ __forceinline__ void mix(int rows) {
    constexpr int kPitch = Tile<kSteps, kN>::kPitch;
    const int lane = ptx::lane();
#pragma unroll 1
    for (int block = int(threadIdx.x) / 32; block < kBelow; block += int(blockDim.x) / 32) {
      const int t = block >= 6 ? 3 : block >= 3 ? 2 : block >= 1, s = block - t * (t + 1) / 2;
      if (16 * t >= rows) continue;
      Product G;
#pragma unroll 2
      for (int k = 0; k < states(); k += 16) {
        multiply(G, left_of(tiles_.C.at(16 * t, k), kPitch),
                 right_of_transposed(tiles_.key.at(16 * s, k), kPitch));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        tiles_.G[(2 * block + h) * 32 + lane] = {G.d[h][0], G.d[h][1], G.d[h][2], G.d[h][3]};
      }
    }
  }

  // The warp's rows of M for the steps of a block, as an operand.
  __device__ __forceinline__ Left mixed(int block, int shift) {
    Decays<float>& d = own_tiles_.decays;
    const int at = (tile_row() * (tile_row() + 1) / 2 + block) * 64 + ptx::lane();
    Product x;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 G = tiles_.G[at + 32 * h];
      x.d[h][0] = G.x, x.d[h][1] = G.y, x.d[h][2] = G.z, x.d[h][3] = G.w;
    }
    x.for_each([&](int row, int column, float& M) {
      const int t = 16 * tile_row() + row, s = 16 * block + column;
      M = s + shift <= t ? M * d.between(t, s, shift) * d.weight[s] : 0.0f;
    });
    return as_left(x);
  }

  // 16 rows of y, half of the columns.
  __device__ __forceinline__ void output(const Piece& piece, int shift) {
    constexpr int kStatePitch = Tile<kSteps, kN>::kPitch, kPitch = Tile<kSteps, kP>::kPitch;
    constexpr int kProducts = kAcross / 2;
    const int first_column = warp_ / 4 * (kP / 2);
    if (16 * tile_row() >= piece.rows || first_column >= columns_) return;
    Product y[kProducts];
    auto for_products = [&](auto&& f) {
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
        if (first_column + 16 * j < columns_) f(y[j], first_column + 16 * j);
      }
    };
#pragma unroll 2
    for (int k = 0; k < states(); k += 16) {
      const Left C = left_of(tiles_.C.at(16 * tile_row(), k), kStatePitch);
      for_products(
          [&](Product& x, int c) { multiply(x, C, right_of(own_tiles_.S.at(k, c), kPitch)); });
    }
    for_products([&](Product& x, int) {
      x.for_each(
          [&](int row, int, float& v) { v *= own_tiles_.decays.row[16 * tile_row() + row]; });
    });
#pragma unroll 1
    for (int block = 0; block <= tile_row(); ++block) {
      const Left M = mixed(block, shift);
      for_products([&](Product& x, int c) {
        multiply(x, M, right_of(own_tiles_.value.at(16 * block, c), kPitch));
      });
    }
    for_products([&](Product& x, int c) { store_output(x, piece, c); });
  }

  __device__ __forceinline__ void store_output(Product& y, const Piece& piece, int c) {
    const Slice to(p_.y, piece, head(), first(), columns_);
    const Slice z_slice(p_.z ? p_.z : p_.y, piece, head(), first(), columns_);
    const int lane = ptx::lane();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 16 * tile_row() + lane / 4 + 8 * i, column = c + 8 * h + lane % 4 * 2;
        if (t >= piece.rows || column >= columns_) continue;
        float a = y.d[h][2 * i], b = y.d[h][2 * i + 1];
        if (p_.D) {
          const uint32_t x = *reinterpret_cast<uint32_t*>(own_tiles_.value.at(t, column));
          a += own_tiles_.D[column] * bits_to_float(x << 16);
          if (column + 1 < columns_) b += own_tiles_.D[column + 1] * bits_to_float(x & 0xffff0000u);
        }
        if (p_.z) {
          float z, next;
          load_pair(z_slice, t, column, z, next);
          a *= silu(z), b *= silu(next);
        }
        store_pair(to, t, column, a, b);
      }
    }
  }

  // What goes into the state from each step, in place.
  __device__ __forceinline__ void weigh(int rows) {
    Decays<float>& d = own_tiles_.decays;
    const unsigned packs = unsigned(round_up(columns_, 16) / 8);
#pragma unroll 1
    for (unsigned k = unsigned(thread()); k < unsigned(rows) * packs; k += kHeadThreads) {
      const int t = int(k / packs), i = int(k % packs) * 8;
      const float weight = p_.backward ? d.row[t] : d.column[t] * d.weight[t];
      uint4& pack = own_tiles_.value.pack(t, i);
      float v[8];
      Pack<BFloat16, 8>{pack}.unpack(v);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] *= weight;
      pack = Pack<BFloat16, 8>::of(v).bits;
    }
  }

  __device__ __forceinline__ void update(int rows) {
    const float whole = own_tiles_.decays.whole;
    if (factor_ >= 0) factor_ *= whole;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        S_[i][j].for_each([&](int, int, float& S) { S *= whole; });
      }
    }
#pragma unroll 1
    for (int t = 0; t < rows; t += 16) {
      Left key[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        const int n = 16 * (warp_ + kHeadWarps * i);
        if (n < states())
          key[i] = left_of_transposed(tiles_.key.at(t, n), Tile<kSteps, kN>::kPitch);
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        if (16 * j >= columns_) continue;
        const Right value = right_of(own_tiles_.value.at(t, 16 * j), Tile<kSteps, kP>::kPitch);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          if (16 * (warp_ + kHeadWarps * i) < states()) multiply(S_[i][j], key[i], value);
        }
      }
    }
  }

  const WalkParams& p_;
  const WalkTask& task_;
  WalkTiles<kN, kP>& tiles_;
  HeadTiles<kN, kP>& own_tiles_;
  int warp_;  // of the head
  int columns_;
  float factor_ =
      1;  // of the state before the part, in the one after it; -1: a sequence starts within
  Product S_[kDown][kAcross];
};

template <int kN, int kP>
__global__ __launch_bounds__(kHeadThreads* kMostHeads,
                             1) void tensor_walk_kernel(const WalkParams p, int64_t heads,
                                                        int64_t tasks) {
  WalkPlace& place = dynamic_shared<WalkTiles<kN, kP>>()->place;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) place.task = walk_task(p, i, (p.headdim + kP - 1) / kP, heads);
    __syncthreads();  // the task is known
    TensorWalk<kN, kP>(p, place.task).run();
  }
}

template <int kN, int kP>
int64_t shared_bytes(int64_t heads) {
  return sizeof(WalkTiles<kN, kP>) - (kMostHeads - heads) * sizeof(HeadTiles<kN, kP>);
}

template <int kN, int kP>
void run(const WalkParams& p, cudaStream_t stream) {
  const int64_t parts = p.summarize ? p.parts - 1 : p.parts;
  const int64_t tasks = parts * p.batch * p.heads * ((p.headdim + kP - 1) / kP);
  // Two heads share B, C and G, where that leaves a block to every processor.
  const bool two =
      p.group_heads() % 2 == 0 && tasks >= 2 * 132 && shared_bytes<kN, kP>(2) <= p.shared_bytes;
  const int64_t heads = two ? 2 : 1;
  launch("ssd_scan walk", tensor_walk_kernel<kN, kP>, blocks_for(tasks / heads, 1),
         int(heads * kHeadThreads), size_t(shared_bytes<kN, kP>(heads)), stream, p, heads,
         tasks / heads);
}

}  // namespace

bool has_tensor_walk(const WalkParams& p) {
  return p.bfloat16 &&
         (p.state <= 128 ? shared_bytes<128, 64>(1) : shared_bytes<256, 32>(1)) <= p.shared_bytes;
}

void tensor_walk(const WalkParams& p, cudaStream_t stream) {
  p.state <= 128 ? run<128, 64>(p, stream) : run<256, 32>(p, stream);
}

}  // namespace statescan::ssd_scan::cuda
