// The walks of the SSD scan on tensor cores: x, B and C as sums of kTerms of bfloat16, one for
// bfloat16, two for float16, three for float; sums and states in float.
//
// Block: 1, 2 or 4 heads of a group, 64 columns of their states along one part of a sequence. A warp
// has 16 kAcross of the columns: their state, S^T of (headdim, state), in registers, and their
// outputs of all steps. Warps share operands, G = C B^T (of the block) and M (of the head) and
// nothing else. Per piece
//
//   wait for B, C, x | half of the warps: fetch the next; the other half: its decays, and G
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
#include "ssd_scan/walk_outputs.cuh"

namespace statescan::ssd_scan::cuda {
namespace {

template <class Kind>
class TensorWalk : WalkOutputs<Kind> {
  using Base = WalkOutputs<Kind>;
  using Base::kAcross, Base::kHeadThreads, Base::kHeadWarps, Base::kTerms, Base::column,
      Base::block_warp, Base::decays, Base::find_G, Base::first, Base::head, Base::head_columns,
      Base::heads, Base::operands, Base::output, Base::outputs, Base::own_value, Base::route,
      Base::shift, Base::stop, Base::task, Base::thread, Base::warp;
  using Base::own_tiles_, Base::p_, Base::stages_, Base::state_, Base::stop_, Base::tiles_;
  using typename Base::State;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    if (p_.D && outputs()) load_skip_weights();
    for (; stop_ < 0 || stop().there; ++stop_) take_stop();
    if (p_.summarize && thread() == 0 && task().column == 0) {
      static_cast<float*>(p_.factor)[head_row(1)] = factor_;
    }
  }

 private:
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
    // Half of the warps have fetched; the others find G and what is ahead.
    const bool here = stop_ >= 0, ahead = stop_ == -2 || route().stop(stop_ + 1).there;
    const int helper = block_warp() - int(blockDim.x) / 64;
    if (helper >= 0) {
      const bool prepares = stop_ > -2 && ahead && helper < heads();
      GivenSteps<float> given;
      if (prepares) given = given_steps(helper);
      if (here && outputs() && !stop().piece.padding) find_G(helper, int(blockDim.x) / 64);
      if (prepares) find_decays(helper, given);
      if (ahead && block_warp() == int(blockDim.x) / 32 - 1) find_stop(p_, route(), stop_ + 2);
    }
    if (here) walk(stop().piece);
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

  // The operands of a stop, if it is there: copies that run on. By half of the warps where the
  // others have better things to do.
  __device__ __forceinline__ void fetch(int i) {
    const Stop& stop = route().stop(i);
    const int by = stages_ == 2 && outputs() ? 2 : 1;  // one of so many threads
    const int thread = int(threadIdx.x), threads = int(blockDim.x) / by;
    if (i < 0 || !stop.there || stop.piece.padding || thread >= threads) return;
    const Piece& piece = stop.piece;
    const int states = int(p_.state), head_threads = kHeadThreads / by;
    const int head_thread = thread % head_threads;
    const int64_t group = task().group, head = task().head + thread / head_threads;
    Operands<Kind>& to = operands(i);
    auto& value = to.value[thread / head_threads];
    const Slice key(p_.backward ? p_.C : p_.B, piece, group, 0, states);
    fetch_tile(key, piece, p_.backward ? shift() : 0, to.key, thread, threads);
    if (outputs()) {
      fetch_tile(Slice(p_.C, piece, group, 0, states), piece, shift(), to.C, thread, threads);
    }
    if (p_.backward) {
      load_ungated(p_, piece, head, first(), head_columns(), value, head_thread, head_threads);
    } else {
      fetch_tile(Slice(p_.x, piece, head, first(), head_columns()), piece, 0, value, head_thread,
                 head_threads);
    }
    ptx::cp_async_commit();
  }

  // Of the next stop, for one of the block's heads: what is given is on its way while G is found.
  __device__ __forceinline__ GivenSteps<float> given_steps(int head) const {
    return GivenSteps<float>(p_, route().stop(stop_ + 1).piece, task().head + head);
  }
  __device__ __forceinline__ void find_decays(int head, const GivenSteps<float>& given) {
    cuda::find_decays(p_, route().stop(stop_ + 1).piece, Head<float>(p_, task().head + head), given,
                      tiles_.head(head).decays[(stop_ + 1) % 2]);
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

  float factor_ = 1;  // of the state before the part, in the one after it; -1: a sequence starts
                      // within
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
