// The walks of the SSD scan on tensor cores: x, B and C as sums of kTerms of bfloat16, one for
// bfloat16, two for float16, three for float; sums and states in float.
//
// Block: 1, 2 or 4 heads of a group, 64 columns of their states along one part of a sequence. A warp
// has 16 kAcross of the columns: their state, S^T of (headdim, state), in registers, and their
// outputs of all steps. Warps share operands, G = C B^T (of the block) and M (of the head) and
// nothing else. Per piece
//
//   wait for B, C, x | fetch the next | decays of the next, half of the warps; G, the other half
//   y = C S of 32 steps                 | M = G between w, 10 blocks of 16 x 16, warps of the head
//   y = row y + M x + D x, gate         | the other 32 steps
//   S = whole S + (column w x)^T B
//
// with a barrier of the block after waiting and before M, one of the head after M. Back (dS),
// or for the ends of parts, nothing but the last of these is done, with C and row dy for B and
// column w x, and there is one barrier for a piece.
//
// Grid over (part, batch, heads of a block, columns). Shared memory: see WalkTiles.
#include "common/launch.h"
#include "ssd_scan/kinds.h"
#include "ssd_scan/walk_tiles.cuh"

namespace statescan::ssd_scan::cuda {
namespace {

template <class Kind>
class TensorWalk {
  static constexpr int kTerms = Kind::kTerms, kN = Kind::kN, kAcross = Kind::kAcross;
  static constexpr int kHeadThreads = Kind::kHeadThreads, kHeadWarps = Kind::kHeadWarps;

 public:
  __device__ __forceinline__ TensorWalk(const WalkParams& p, int stages)
      : p_(p),
        tiles_(*dynamic_shared<WalkTiles<Kind>>()),
        own_tiles_(tiles_.head(int(threadIdx.x) / kHeadThreads)),
        stages_(stages),
        state_(int(p.state), all_columns(p) - column()) {}

  __device__ __forceinline__ void run() {
    if (p_.D && outputs()) load_skip_weights();
    for (; stop_ < 0 || stop().there; ++stop_) take_stop();
    if (p_.summarize && thread() == 0 && task().column == 0) {
      static_cast<float*>(p_.factor)[head_row(1)] = factor_;
    }
  }

 private:
  using State = WarpState<kTerms, kN, kAcross>;

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

  // ---- the state from and to memory

  // (part, batch, head) of carry and factor, of a later part.
  __device__ __forceinline__ int64_t head_row(int later) const {
    return ((task().part + later) * p_.batch + task().b) * p_.heads + head();
  }
  __device__ __forceinline__ StateMove carry(StateMove::Way way, int later) const {
    const int64_t at = head_row(later) * p_.state * p_.headdim + first() + column();
    return {way, static_cast<float*>(p_.carry) + at, p_.headdim, 1};
  }
  // Of (slot, head, headdim, state).
  __device__ __forceinline__ StateMove slot(StateMove::Way way, const View<4>& x,
                                            int64_t slot) const {
    if (slot < 0) return {};
    const int64_t at =
        slot * x.stride[0] + head() * x.stride[1] + (first() + column()) * x.stride[2];
    return {way, static_cast<float*>(x.data) + at, x.stride[3], x.stride[2]};
  }
  __device__ __forceinline__ StateMove chunk(StateMove::Way way) const {
    const View<5>& x = p_.chunk_states;
    const int64_t at = task().b * x.stride[0] + stop().cell.chunk * x.stride[1] +
                       head() * x.stride[2] + (first() + column()) * x.stride[3];
    return {way, static_cast<float*>(x.data) + at, x.stride[4], x.stride[3]};
  }
  __device__ __forceinline__ int64_t cell_offset() const {
    const int64_t row =
        ((task().b * p_.cells() + stop().cell.index) * p_.heads + head()) * p_.state;
    return row * p_.headdim + first() + column();
  }

  // What is done at a stop, in order: at most a move, but for kAdvance.
  enum Step { kEnter, kSaveChunk, kSaveCell, kAdvance, kAddChunk, kLeave };

  __device__ __forceinline__ StateMove move_of(int step) const {
    const Piece& piece = stop().piece;
    const bool saves = !p_.summarize && enters_cell(p_, piece);
    switch (step) {
      case kEnter:
        if (enters_sequence(p_, piece)) {
          return slot(StateMove::kLoad, p_.enter, entered_slot(p_, piece));
        }
        if (stop_ == 0 && task().part > 0 && !p_.summarize) return carry(StateMove::kLoad, 0);
        return {};
      case kSaveChunk:
        if (!saves || p_.backward || !p_.chunk_states || !stop().cell.chunk_entry) return {};
        return chunk(StateMove::kStore);
      case kSaveCell:
        if (!saves || p_.cell_states == nullptr) return {};
        return {StateMove::kStore, static_cast<float*>(p_.cell_states) + cell_offset(), p_.headdim,
                1};
      case kAddChunk:
        if (!adds_chunk_gradient(p_, stop().cell, piece)) return {};
        return chunk(StateMove::kAdd);
      default:
        if (p_.summarize && !route().stop(stop_ + 1).there) return carry(StateMove::kStore, 1);
        return slot(StateMove::kStore, p_.leave, left_slot(p_, piece));
    }
  }

  // M of the piece before has been read, and serves as the stage.
  __device__ __forceinline__ void save_rounded() {
    static_assert(State::kStageBytes * kHeadWarps <= int(sizeof(own_tiles_.M)));
    state_.store_rounded(
        static_cast<BFloat16*>(p_.cell_states) + cell_offset(), p_.headdim,
        reinterpret_cast<BFloat16*>(&own_tiles_.M[0]) + warp() * State::kStageBytes / 2);
  }

  __device__ __forceinline__ void load_skip_weights() {
#pragma unroll 1
    for (int i = thread(); i < kP; i += kHeadThreads) {
      own_tiles_.D[i] =
          i >= head_columns()
              ? 0.0f
              : load_element<float>(p_.D.data, p_.D.dtype,
                                    head() * p_.D.stride[0] + (first() + i) * p_.D.stride[1]);
    }
  }

  // The first two times, for stops -2 and -1, there are only those ahead of them.
  __device__ __forceinline__ void take_stop() {
    ptx::cp_async_wait<0>();
    __syncthreads();  // operands (of two stages), decays and the next stop are in place, and the
                      // piece before is done with
    fetch(stop_ + stages_ - 1);
    if (stages_ == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // operands are in place
    }
    look_ahead();
    if (stop_ >= 0) walk(stop().piece);
  }

  __device__ __forceinline__ void walk(const Piece& piece) {
    if (enters_sequence(p_, piece)) state_.clear(), factor_ = -1;
#pragma unroll 1  // every move is a thousand instructions: there is one place for all of them
    for (int step = kEnter; step <= kLeave; ++step) {
      if (step == kSaveCell && kTerms == 1) {
        if (!p_.summarize && enters_cell(p_, piece) && p_.cell_states != nullptr) save_rounded();
      } else if (step == kAdvance) {
        piece.padding ? clear_outputs(piece) : advance(piece);
      } else if (const StateMove move = move_of(step); move.way != StateMove::kNone) {
        state_.move(move);
      }
    }
  }

  __device__ __forceinline__ void clear_outputs(const Piece& piece) {
    if (!outputs()) return;
    const Slice y(p_.y, piece, head(), first(), head_columns());
    const unsigned pairs = unsigned(head_columns() + 1) / 2;
    for (unsigned k = unsigned(thread()); k < unsigned(piece.rows) * pairs; k += kHeadThreads) {
      store_pair(y, int(k / pairs), int(k % pairs) * 2, 0, 0);
    }
  }

  __device__ __forceinline__ void advance(const Piece& piece) {
    if (outputs()) output(piece);
    if (state_.columns() > 0) update();
    if (factor_ >= 0) factor_ *= decays().whole;
  }

  // The operands of a stop, if it is there: copies that run on.
  __device__ __forceinline__ void fetch(int i) {
    const Stop& stop = route().stop(i);
    if (i < 0 || !stop.there || stop.piece.padding) return;
    const Piece& piece = stop.piece;
    const int threads = int(blockDim.x), states = int(p_.state), block_thread = int(threadIdx.x);
    const int64_t group = task().group;
    Operands<Kind>& to = operands(i);
    auto& value = to.value[block_thread / kHeadThreads];
    const Slice key(p_.backward ? p_.C : p_.B, piece, group, 0, states);
    fetch_tile(key, piece, p_.backward ? shift() : 0, to.key, block_thread, threads);
    if (outputs()) {
      fetch_tile(Slice(p_.C, piece, group, 0, states), piece, shift(), to.C, block_thread, threads);
    }
    if (p_.backward) {
      load_ungated(p_, piece, head(), first(), head_columns(), value, thread(), kHeadThreads);
    } else {
      fetch_tile(Slice(p_.x, piece, head(), first(), head_columns()), piece, 0, value, thread(),
                 kHeadThreads);
    }
    ptx::cp_async_commit();
  }

  // The decays of the next stop, by a warp for each head, and the stop after it. The other warps go
  // on with G.
  __device__ __forceinline__ void look_ahead() {
    const Stop& next = route().stop(stop_ + 1);
    if (stop_ >= -1 && !next.there) return;
    if (block_warp() == int(blockDim.x) / 32 - 1) find_stop(p_, route(), stop_ + 2);
    if (stop_ < -1 || next.piece.padding || block_warp() >= heads()) return;
    const int64_t head = task().head + block_warp();
    find_decays(p_, next.piece, head, Head<float>(p_, head),
                tiles_.head(block_warp()).decays[(stop_ + 1) % 2]);
  }

  // By the warps that have no decays to find: two neighbouring blocks at a time share the rows of C
  // and go side by side. The second may lie above the diagonal.
  __device__ __forceinline__ void find_G() {
    Operands<Kind>& x = operands(stop_);
    const int warps = int(blockDim.x) / 32 - heads();
#pragma unroll 1
    for (int pair = block_warp() - heads(); pair >= 0 && pair < 6; pair += warps) {
      const int t = pair < 2 ? 3 : pair < 4 ? 2 : 5 - pair, s = pair < 4 ? pair % 2 * 2 : 0;
      if (16 * t >= stop().piece.rows) continue;
      Product G[2];
#pragma unroll 2
      for (int k = 0; k < p_.state; k += 32) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Terms<Left, kTerms> C = x.C.left(16 * t, k + 16 * i);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            multiply(G[j], C, x.key.right_of_transpose(16 * (s + j), k + 16 * i));
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (s + j > t) continue;
        const int at = (t * (t + 1) / 2 + s + j) * 64 + ptx::lane();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          tiles_.G[at + 32 * h] = {G[j].d[h][0], G[j].d[h][1], G[j].d[h][2], G[j].d[h][3]};
        }
      }
    }
  }

  // A warp has whole rows of blocks, as many blocks as the others of its head if there are two.
  __device__ __forceinline__ void find_M(int rows) {
    Decays<float>& d = decays();
    const int lane = ptx::lane();
#pragma unroll 1
    for (int i = 0; i < 4 / kHeadWarps; ++i) {
      const int t = i == 0 ? 3 - warp() : warp();
      if (16 * t >= rows) continue;
      const float begin_high = d.high[16 * t], begin_low = d.low[16 * t];
      float high[2], low[2], from_begin[2];  // of the lane's rows
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int after = 16 * t + lane / 4 + 8 * r + 1 - shift();
        high[r] = d.high[after], low[r] = d.low[after];
        from_begin[r] = exp2((high[r] - begin_high) + (low[r] - begin_low));
      }
#pragma unroll 1
      for (int s = 0; s < t; ++s) {
        decay_G(t, s, [&](int step, float (&G)[2]) {
          const float to_begin =
              exp2((begin_high - d.high[step + 1]) + (begin_low - d.low[step + 1]));
#pragma unroll
          for (int r = 0; r < 2; ++r) G[r] *= from_begin[r] * (to_begin * d.weight[step]);
        });
      }
      decay_G(t, t, [&](int step, float (&G)[2]) {
        const float step_high = d.high[step + 1], step_low = d.low[step + 1];
        const float weight = d.weight[step];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float L = exp2((high[r] - step_high) + (low[r] - step_low));
          G[r] = step + shift() <= 16 * t + lane / 4 + 8 * r ? G[r] * L * weight : 0.0f;
        }
      });
    }
  }

  // A block of G becomes one of M: decay(step, the lane's two numbers of G).
  template <class Decay>
  __device__ __forceinline__ void decay_G(int t, int s, Decay&& decay) {
    const int block = t * (t + 1) / 2 + s, lane = ptx::lane();
    Product x;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 v = tiles_.G[(2 * block + h) * 32 + lane];
      const float rows[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float G[2] = {rows[e][0], rows[e][1]};
        decay(16 * s + 8 * h + lane % 4 * 2 + e, G);
        x.d[h][e] = G[0], x.d[h][2 + e] = G[1];
      }
    }
    const auto M = left_terms<kTerms>(x);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const uint32_t (&a)[4] = M.term[i].a;
      own_tiles_.M[(block * kTerms + i) * 32 + lane] = {a[0], a[1], a[2], a[3]};
    }
  }

  __device__ __forceinline__ Terms<Left, kTerms> load_M(int t, int s) {
    const int block = t / 16 * (t / 16 + 1) / 2 + s / 16;
    return terms<kTerms>([&](int i) -> Left {
      const uint4 a = own_tiles_.M[(block * kTerms + i) * 32 + ptx::lane()];
      return {{a.x, a.y, a.z, a.w}};
    });
  }

  // Outputs of 32 steps at a time: enough to do between one load and the next, and registers for it.
  __device__ __forceinline__ void output(const Piece& piece) {
    const bool has_columns = state_.columns() > 0;
    const int rows = piece.rows;
    find_G();
#pragma unroll
    for (int t = 0; t < kSteps; t += 32) {
      if (t >= rows) break;
      Product y[2][kAcross];
      if (has_columns) state_.add_output(operands(stop_).C, t, y);
      if (t == 0) {
        __syncthreads();  // G is in place
        find_M(rows);
        ptx::barrier_sync(1 + int(threadIdx.x) / kHeadThreads, kHeadThreads);  // M is in place
      }
      if (!has_columns) continue;
      add_steps(t, rows, y);
      if (p_.D) add_skip(t, y);
      const Slice to(p_.y, piece, head(), first() + column(), state_.columns());
      if (kTerms == 1 && !p_.z && to.packed && to.dtype == DType::kBFloat16 &&
          state_.columns() >= State::kColumns) {
        store_directly(to, t, rows, y);
      } else {
        store_staged(to, piece, t, rows, y);
      }
    }
  }

  // y <- row y + M x.
  __device__ __forceinline__ void add_steps(int t, int rows, Product (&y)[2][kAcross]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        y[r][j].for_each([&](int row, int, float& v) { v *= decays().row[t + 16 * r + row]; });
      }
    }
    auto& value = own_value();
#pragma unroll
    for (int s = 0; s <= t + 16; s += 16) {
      if (s >= rows) break;
      Terms<Right, kTerms> x[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) x[j] = value.right(s, column() + 16 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (s > t + 16 * r || t + 16 * r >= rows) continue;
        const Terms<Left, kTerms> M = load_M(t + 16 * r, s);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) multiply(y[r][j], M, x[j]);
      }
    }
  }

  __device__ __forceinline__ void add_skip(int t, Product (&y)[2][kAcross]) {
    auto& value = own_value();
    const int lane = ptx::lane();
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = column() + 16 * j + 8 * h + lane % 4 * 2;
        const auto D = several<2>(own_tiles_.D[c]);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float x, next;
          value.pair(t + 8 * r + lane / 4, c, x, next);
          float* v = &y[r / 2][j].d[h][r % 2 * 2];
          v[0] += D.x[0] * x, v[1] += D.x[1] * next;
        }
      }
    }
  }

  // Straight from the registers: bfloat16, all columns, no gate. Lanes exchange pairs with their
  // neighbours, so that each has 4 numbers of a step and a warp fills 32 bytes of every row.
  __device__ __forceinline__ void store_directly(const Slice& to, int t, int rows,
                                                 const Product (&y)[2][kAcross]) {
    const int lane = ptx::lane(), c = lane % 2 == 1 ? lane % 4 * 2 + 6 : lane % 4 * 2;
    int row = t + lane / 4;
    char* at = const_cast<char*>(to.data) + 2 * (row * to.step + c);
#pragma unroll
    for (int r = 0; r < 4; ++r, row += 8, at += 16 * to.step) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const float* low = &y[r / 2][j].d[0][r % 2 * 2];
        const float* high = &y[r / 2][j].d[1][r % 2 * 2];
        const uint32_t own[2] = {ptx::pack_bf16(low[0], low[1]), ptx::pack_bf16(high[0], high[1])};
        const bool odd = lane % 2 == 1;
        const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? own[0] : own[1], 1);
        const uint2 four = odd ? uint2{other, own[1]} : uint2{own[0], other};
        if (row < rows) ptx::store(reinterpret_cast<uint2*>(at) + 4 * j, four);
      }
    }
  }

  // Any others: 16 steps at a time go through the warp's stage, from where a lane takes 8
  // neighbours of a step.
  __device__ __forceinline__ void store_staged(const Slice& to, const Piece& piece, int t, int rows,
                                               const Product (&y)[2][kAcross]) {
    auto& stage = own_tiles_.stage[warp()].element;
    constexpr int kPitch = OutputStage<Kind>::kPitch;
    constexpr unsigned kPacks = 2 * kAcross;
#pragma unroll
    for (int r = 0; r < 2; ++r, t += 16) {
      if (t >= rows) continue;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const unsigned lane = unsigned(ptx::lane());
        float* at = &stage[int(lane / 4 * kPitch + 16 * j + lane % 4 * 2)];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &y[r][j].d[i / 2][i % 2 * 2];
          several<2>(at[i % 2 * 8 * kPitch + i / 2 * 8]) = {pair[0], pair[1]};
        }
      }
      __syncwarp();  // the stage is filled
#pragma unroll 1
      for (unsigned k = unsigned(ptx::lane()); k < 16 * kPacks; k += 32) {
        const int row = int(k / kPacks), i = int(k % kPacks) * 8;
        if (t + row < rows && i < to.columns) {
          store_neighbours(to, piece, t + row, i, &stage[row * kPitch + i]);
        }
      }
      __syncwarp();  // it has been read
    }
  }

  __device__ __forceinline__ void store_neighbours(const Slice& to, const Piece& piece, int t,
                                                   int i, float* y) {
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = several<4>(y[e / 4 * 4]).x[e % 4];
    if (p_.z) {
      float gate[8];
      load_numbers(Slice(p_.z, piece, head(), first() + column(), to.columns), t, i, gate);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] *= silu(gate[e]);
    }
    store_numbers(to, t, i, v);
  }

  // x, of (headdim, steps), times the weights of the lane's steps.
  __device__ __forceinline__ static Terms<Left, kTerms> weighted(
      const Terms<Right, kTerms>& x, const Several<float, 2> (&weights)[2]) {
    Terms<Right, kTerms> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Several<float, 2>& weight = weights[i % 2];
      float low, high;
      unite(terms<kTerms>([&](int k) { return x.term[k].b[i]; }), low, high);
      const auto pair = split<kTerms>(low * weight.x[0], high * weight.x[1]);
#pragma unroll
      for (int k = 0; k < kTerms; ++k) result.term[k].b[i] = pair.term[k];
    }
    return transposed(result);
  }

  __device__ __forceinline__ void update() {
    Decays<float>& d = decays();
    Terms<Left, kTerms> value[kSteps / 16][kAcross];
#pragma unroll
    for (int t = 0; t < kSteps / 16; ++t) {
      Several<float, 2> weights[2];  // of the lane's steps
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int s = 16 * t + 8 * i + ptx::lane() % 4 * 2;
        weights[i] = p_.backward ? several<2>(d.row[s]) : several<2>(d.column[s]);
        const auto steps = several<2>(d.weight[s]);
        if (!p_.backward) weights[i].x[0] *= steps.x[0], weights[i].x[1] *= steps.x[1];
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        value[t][j] = weighted(own_value().right(16 * t, column() + 16 * j), weights);
      }
    }
    state_.update(operands(stop_).key, d.whole, value);
  }

  const WalkParams& p_;
  WalkTiles<Kind>& tiles_;
  HeadTiles<Kind>& own_tiles_;
  int stages_, stop_ = -2;
  float factor_ = 1;  // of the state before the part, in the one after it; -1: a sequence starts
                      // within
  State state_;
};

template <class Kind>
__global__ __launch_bounds__(32 * kMostWarps, 1) void tensor_walk_kernel(const WalkParams p,
                                                                         int stages,
                                                                         int64_t tasks) {
  Route& route = dynamic_shared<WalkTiles<Kind>>()->route;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) {
      route.task = walk_task(p, i, (p.headdim + kP - 1) / kP, blockDim.x / Kind::kHeadThreads);
    }
    __syncthreads();  // the task is known
    TensorWalk<Kind>(p, stages).run();
  }
}

// How many heads a block takes, and how many pieces' operands it has room for.
struct Plan {
  int heads, stages;
};

// What a wave of blocks on 132 multiprocessors takes grows with the heads on each of them, and for
// B, C and G with the blocks; waiting for operands with nothing else to do adds half of it.
template <class Kind>
Plan plan(const WalkParams& p, int64_t tasks) {
  Plan best{};
  int64_t least = 0;
  for (int heads = 1; heads <= Kind::kMostHeads && p.group_heads() % heads == 0; heads *= 2) {
    auto bytes = [&](int stages) { return WalkTiles<Kind>::bytes(heads, stages); };
    if (bytes(1) > p.shared_bytes) break;
    const int stages = Kind::kTerms == 1 && bytes(2) <= p.shared_bytes ? 2 : 1;
    const int64_t at_once = std::min<int64_t>(Kind::kMostHeads / heads,
                                              (p.shared_bytes + 1024) / (bytes(stages) + 1024));
    const int64_t waves = (tasks / heads + 132 * at_once - 1) / (132 * at_once);
    const int64_t cost = waves * at_once * (heads + 1) * (stages == 2 || at_once > 1 ? 2 : 3);
    if (heads == 1 || cost <= least) best = {heads, stages}, least = cost;
  }
  return best;
}

template <class Kind>
void run(const WalkParams& p, cudaStream_t stream) {
  const int64_t parts = p.summarize ? p.parts - 1 : p.parts;
  const int64_t tasks = parts * p.batch * p.heads * ((p.headdim + kP - 1) / kP);
  const Plan with = plan<Kind>(p, tasks);
  launch("ssd_scan walk", tensor_walk_kernel<Kind>, blocks_for(tasks / with.heads, 1),
         with.heads * Kind::kHeadThreads, size_t(WalkTiles<Kind>::bytes(with.heads, with.stages)),
         stream, p, with.stages, tasks / with.heads);
}

// f(kind) for the instance that a walk takes; false if there is none.
template <class F>
bool with_kind(const WalkParams& p, F&& f) {
  auto take = [&](auto kind) {
    if (WalkTiles<decltype(kind)>::bytes(1, 1) > p.shared_bytes) return false;
    f(kind);
    return true;
  };
  const bool wide = p.state > 128;
  switch (p.terms()) {
    case 1: return wide ? take(WalkKind<1, 256, 1>{}) : take(WalkKind<1, 128, 2>{});
    case 2: return wide ? take(WalkKind<2, 256, 1>{}) : take(WalkKind<2, 128, 1>{});
    case 3: return !wide && take(WalkKind<3, 128, 1>{});
    default: return false;
  }
}

}  // namespace

bool has_tensor_walk(const WalkParams& p) {
  return with_kind(p, [](auto) {});
}

void tensor_walk(const WalkParams& p, cudaStream_t stream) {
  with_kind(p, [&](auto kind) { run<decltype(kind)>(p, stream); });
}

}  // namespace statescan::ssd_scan::cuda
