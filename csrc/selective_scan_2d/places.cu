// What comes before the scans along routes: where the steps of each route are in a plane, and how the
// channels are dealt to blocks.
#include <algorithm>

#include "common/divisor.h"
#include "common/launch.h"
#include "selective_scan_2d/tile.cuh"

namespace statescan::selective_scan_2d::cuda {
namespace {

struct Seen {
  SharedArray<int32_t, kLongTile> place;
};

// Block: a tile of a route; thread: a step. Whether a token comes twice is asked of every pair.
__global__ __launch_bounds__(kLongTile) void places_kernel(const Inputs p, Divisor tiles,
                                                           Divisor routes, int32_t* place,
                                                           int32_t* flags, int64_t tasks) {
  Seen& seen = block_shared<Seen>();
  const int i = int(threadIdx.x), chunk = int(p.chunk);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t tile, route;
    const int64_t table = routes.divide(tiles.divide(task, tile), route);
    const int64_t t = tile * p.chunk + i;
    int32_t found = kSkip;
    if (i < chunk && t < p.steps) {
      const int token = token_at(p, table, route, t);
      found = token < 0 ? token : in_plane(token);
    }
    __syncthreads();  // the tile before has been looked at
    seen.place[i] = found;
    __syncthreads();  // all steps of the tile are known
    bool repeats = false;
    for (int j = 0; j < i && found >= 0; ++j) repeats |= seen.place[j] == found;
    const int any_repeat = __syncthreads_or(repeats);
    const int any_hole = __syncthreads_or(i < chunk && found < 0);
    const int any_reset = __syncthreads_or(i < chunk && t < p.steps && p.resets_at(t));
    if (i < chunk) place[task * p.chunk + i] = found;
    if (i == 0) {
      flags[task] =
          (any_repeat ? kRepeats : 0) | (any_hole ? kHoles : 0) | (any_reset ? kResets : 0);
    }
  }
}

}  // namespace

void find_places(const Inputs& p, int32_t* place, int32_t* flags, cudaStream_t stream) {
  const int64_t tasks = p.tables() * p.routes * p.tiles;
  if (tasks == 0) return;
  launch("selective_scan_2d places", places_kernel, blocks_for(tasks, 1), kLongTile, 0, stream, p,
         Divisor(p.tiles), Divisor(p.routes), place, flags, tasks);
}

Plan plan(const Problem& p, bool backward, const View<4>& dy, int64_t shared_limit) {
  const int64_t bytes = element_bytes(p.compute), delta_rows = p.rank > 0 ? p.rank : kWarps;
  const int64_t shares = backward ? 3 : 0;
  Plan plan{};
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
