// What comes before the scans along routes: where the steps of each route are in a plane, and how the
// channels are dealt to blocks.
#include <algorithm>

#include "common/device_view.cuh"
#include "common/divisor.h"
#include "common/launch.h"
#include "selective_scan_2d/pairs.cuh"
#include "selective_scan_2d/tile.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

constexpr int kPlacesThreads = 1024;

// Tiles that are walked side by side.
STATESCAN_HOST_DEVICE int tiles_of_group(const Inputs& p) {
  return p.plan.pair.pairs > 0 ? p.plan.pair.team : 1;
}

// The places that a group of tiles has come by: a table of twice as many entries as there are steps.
struct Seen {
  SharedArray<int32_t, 2 * kMaxTeam * kLongTile> place;  // kSkip: none
};

// Enters a place where its bits, mixed, lead to or, if others are there, behind them. Was it there?
__device__ __forceinline__ bool comes_again(Seen& seen, int entries, int32_t place) {
  int at = int(uint64_t(uint32_t(place) * 2654435769u) * entries >> 32);
  for (;;) {
    const int32_t before = atomicCAS(&seen.place[at], int32_t(kSkip), place);
    if (before == kSkip || before == place) return before == place;
    if (++at == entries) at = 0;
  }
}

__device__ __forceinline__ int32_t place_of(const Inputs& p, int token) {
  if (token < 0) return token;
  return p.plan.pair.pairs > 0 ? p.plan.pair.position(token) : in_plane(token);
}

// Block: the tiles of a route that are walked side by side; thread: steps of them.
__global__ __launch_bounds__(kPlacesThreads) void places_kernel(const Inputs p, Divisor groups,
                                                                Divisor routes, int32_t* place,
                                                                int32_t* flags, int64_t tasks) {
  Seen& seen = block_shared<Seen>();
  const int i = int(threadIdx.x), chunk = int(p.chunk), most = tiles_of_group(p);
  const int entries = 2 * most * chunk;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t group, route;
    const int64_t table = routes.divide(groups.divide(task, group), route);
    const int64_t first = group * most, row = (table * p.routes + route) * p.tiles + first;
    const int tiles = p.tiles - first < most ? int(p.tiles - first) : most;
    for (int k = i; k < entries; k += int(blockDim.x)) seen.place[k] = kSkip;
    __syncthreads();  // the table is empty
    bool holes = false, ghosts = false, resets = false, repeats = false;
    bool otherwise = p.steps != p.tokens;  // with as many steps as tokens none is left out, then
    for (int k = i; k < tiles * chunk; k += int(blockDim.x)) {
      const int64_t t = first * chunk + k;
      const int token = t < p.steps ? token_at(p, table, route, t) : int(kSkip);
      const int32_t found = place_of(p, token);
      place[row * chunk + k] = found;
      holes |= found < 0;
      if (found >= 0) repeats |= comes_again(seen, entries, found);
      if (t < p.steps) ghosts |= found < 0, resets |= p.resets_at(t);
      if (p.visits != nullptr && token >= 0) {
        otherwise |= atomicAdd(p.visits + (table * p.routes + route) * p.tokens + token, 1) > 0;
      }
    }
    int any = 0;  // flags of all of the group
    if (__syncthreads_or(holes)) any |= kHoles;
    if (__syncthreads_or(ghosts)) any |= kGhosts;
    if (__syncthreads_or(resets)) any |= kResets;
    if (__syncthreads_or(repeats)) any |= kRepeats;
    if (i < tiles) flags[row + i] = any;
    if (p.visits != nullptr && __syncthreads_or(otherwise || ghosts) && i == 0) {
      atomicOr(p.visited_otherwise, 1);
    }
  }
}

}  // namespace

void find_places(const Inputs& p, int32_t* place, int32_t* flags, cudaStream_t stream) {
  const int64_t group = tiles_of_group(p), steps = group * p.chunk;
  const int64_t groups = (p.tiles + group - 1) / group, tasks = p.tables() * p.routes * groups;
  if (tasks == 0) return;
  launch("selective_scan_2d places", places_kernel, blocks_for(tasks, 1),
         int(std::min<int64_t>(steps, kPlacesThreads)), 0, stream, p, Divisor(groups),
         Divisor(p.routes), place, flags, tasks);
}

namespace {

// What a block's walk takes, in tiles that a multiprocessor's instructions do for a pair: those of all of
// its tiles, and what a round takes beside them, whatever it holds.
int64_t time_of(const Problem& p, const PairLayout& x) {
  constexpr int64_t kRound = 6;
  return x.pairs * p.chunks() + kRound * x.rounds;
}

// Pairs of channels that go side by side, see pairs.cuh: none where the map, the rows or the options do
// not allow it; quads where they do. Chosen for the time that all blocks take on the 132 multiprocessors
// of an H100.
PairLayout find_pairs(const Problem& p, bool backward, const View<4>& dy, int64_t shared_limit) {
  constexpr int64_t kMultiprocessors = 132;
  PairLayout best{};
  if (backward && (p.state > 1 || p.z || p.weights || !dy || element_bytes(dy.dtype) != 2)) {
    return best;
  }
  if (p.compute != DType::kFloat32 || p.chunk != kLongTile || p.steps == 0 ||
      element_bytes(p.u.dtype) != 2 || p.rank == 0 || element_bytes(p.delta.dtype) != 2 ||
      p.reset_period > 0 || p.carry || p.u_per_route || p.y_per_route ||
      p.batch * p.dim > kMaxBlocks || p.tokens * 12 + p.rank * 64 + p.state * 24 > shared_limit) {
    return best;
  }
  // Steps and tiles are counted in 32 bits.
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  if (p.steps > kMost - kLongTile || p.batch * p.routes * p.chunks() > kMost) return best;
  int64_t least = 0;
  auto consider = [&](const PairLayout& x) {
    const int64_t together = x.channels * x.pairs, blocks = (p.dim + together - 1) / together;
    const int64_t turns = (p.batch * blocks + kMultiprocessors - 1) / kMultiprocessors;
    const int64_t time = turns * time_of(p, x);
    if (x.bytes <= shared_limit && (best.pairs == 0 || time < least)) least = time, best = x;
  };
  const bool quads = !backward && p.state == 1 && p.routes <= 64;
  for (int channels = quads ? 4 : 2; channels >= 2 && best.pairs == 0; channels -= 2) {
    const int64_t all = (p.dim + channels - 1) / channels;
    const int most_warps = pair_warps(backward, channels);
    for (int pairs = int(std::min<int64_t>(most_warps, all)); pairs > 0; --pairs) {
      const int64_t blocks = (all + pairs - 1) / pairs;
      const int dealt = int((all + blocks - 1) / blocks);
      for (int team = 1; team <= kMaxTeam && team <= p.chunks() && dealt * team <= most_warps;
           ++team) {
        if (dealt * team < std::min<int64_t>(4, all)) continue;
        for (int log2 = channels == 4 ? 3 : 1; log2 > 0; --log2) {
          // Each tile of a round has a buffer of its own: by its parity, the second use of one that a
          // team waits for cannot be told from that before the first.
          if (channels == 4 && 1 << log2 < team) break;
          consider(pair_layout(p, backward, channels, dealt, team, log2));
        }
      }
    }
  }
  return best;
}

// How many neighbouring steps of delta, B and C can be read at once, if all are of one type and of so few
// elements that 32 bits count them: 8 or 4. Else 1.
int steps_at_once(const Problem& p) {
  auto is_small = [&](const View<4>& x, int64_t rows) {
    const int64_t last = (p.batch - 1) * x.stride[0] + (p.routes - 1) * x.stride[1] +
                         (rows - 1) * x.stride[2] + p.steps;
    return last < int64_t(1) << 31;
  };
  if (p.B.dtype != p.delta.dtype || p.C.dtype != p.delta.dtype || !is_small(p.delta, p.rank + 8) ||
      !is_small(p.B, p.state + 1) || !is_small(p.C, p.state + 1)) {
    return 1;
  }
  for (int count : {8, 4}) {
    if (p.steps % count == 0 && in_lines(p.delta, count) && in_lines(p.B, count) &&
        in_lines(p.C, count)) {
      return count;
    }
  }
  return 1;
}

}  // namespace

Plan plan(const Problem& p, bool backward, const View<4>& dy, int64_t shared_limit) {
  const int64_t bytes = element_bytes(p.compute), delta_rows = p.rank > 0 ? p.rank : kWarps;
  const int64_t shares = backward ? 3 : 0;
  Plan plan{};
  plan.pair = find_pairs(p, backward, dy, shared_limit);
  if (plan.pair.pairs > 0) {
    plan.pair.at_once = steps_at_once(p);
    plan.channels = plan.pair.channels * plan.pair.pairs;
    plan.blocks = (p.dim + plan.channels - 1) / plan.channels;
    plan.on_chip = plan.fast = plan.together = true;
    plan.pitch = plan.pair.pitch, plan.shared_bytes = plan.pair.bytes;
    plan.grid = blocks_for(p.batch * plan.blocks, 1);
    return plan;
  }
  plan.pitch = int(plane_pitch(p.tokens));
  plan.table = int(backward ? 3 * p.state + p.rank : 2 * p.state);
  plan.table += plan.table % 2;  // planes begin at a multiple of two elements
  plan.together = delta_rows + 2 * p.state <= kRows;
  plan.rows = plan.together ? int(delta_rows + 2 * p.state) : kRows;
  plan.halves = backward && plan.together && p.chunk == kLongTile && p.reset_period == 0 && !p.z &&
                !p.weights && p.compute == DType::kFloat32 && element_bytes(p.u.dtype) == 2 && dy &&
                dy.dtype == p.u.dtype;
  const int64_t planes = !backward || plan.halves ? 2 : p.z ? 4 : 3;
  // Elements of shared memory beside the channels'.
  auto common = [&](int64_t steps) {
    return (2 * plan.rows + shares * kWarps) * steps + p.rank * kWarps;
  };
  auto most = [&](int64_t steps, int64_t each) {
    const int64_t room = (shared_limit - kNowBytes) / bytes - common(steps);
    return room < each ? 0 : std::min<int64_t>(room / each, backward ? kWarps - 1 : kWarps);
  };
  int64_t steps = p.chunk, each = plan.table + planes * plan.pitch;
  int64_t channels = most(steps, each);
  // With two warps at work a multiprocessor idles: then rather all of them, and planes in memory.
  plan.on_chip = channels >= std::min<int64_t>(3, std::max<int64_t>(p.dim, 1));
  plan.fast = plan.on_chip && p.reset_period == 0 && p.compute == DType::kFloat32 &&
              !(backward && (p.z || p.weights));
  if (!plan.fast) {
    if (plan.halves) return cuda::plan(p, backward, View<4>{}, shared_limit);
    if (p.compute == DType::kFloat32) steps = kLongTile;
    plan.on_chip = plan.on_chip && most(steps, each) >= channels;
    if (!plan.on_chip) each = plan.table;
    channels = most(steps, each);
  }
  if (channels == 0) return plan;
  plan.blocks = (p.dim + channels - 1) / channels;
  plan.channels = plan.blocks > 0 ? int((p.dim + plan.blocks - 1) / plan.blocks) : int(channels);
  plan.shared_bytes = kNowBytes + (common(steps) + plan.channels * each) * bytes;
  plan.grid = blocks_for(p.batch * plan.blocks, 1);
  if (!plan.on_chip) {  // no more than run at the same time, which bounds the memory for planes
    plan.grid = std::min<int64_t>(plan.grid, 4 * 132);
    plan.plane_elements = plan.grid * planes * plan.channels * plan.pitch;
  }
  return plan;
}

}  // namespace statescan::selective_scan_2d::cuda
