// Parameters and launchers of the CUDA kernels of the selective scan along routes.
#pragma once

#include <cstdint>

#include "common/cuda.h"
#include "selective_scan_2d/shape.h"

namespace statescan::selective_scan_2d::cuda {

// A warp has a channel, its lanes have neighbouring steps: 2 or 8 of them in a tile. Further warps bring
// what all channels share.
inline constexpr int kWarps = 8;  // with a channel, at most
inline constexpr int kFwdThreads = 32 * (kWarps + 2);
inline constexpr int kBwdThreads = 32 * kWarps;  // one at least without
inline constexpr int kShortTile = 64, kLongTile = 256;
// Where a lane has two or four channels, see pairs.cuh: warps with channels, as registers allow, and
// helpers.
constexpr int pair_warps(bool backward, int channels) {
  return backward ? 6 : channels == 4 ? 14 : 12;
}
constexpr int pair_helpers(bool backward, int channels) {
  return backward || channels == 4 ? 2 : 4;
}
template <bool kBackward, int kChannels>
inline constexpr int kPairThreads =
    32 * (pair_warps(kBackward, kChannels) + pair_helpers(kBackward, kChannels));
inline constexpr int kMaxTeam = 8;

// Where a step is in a plane of tokens; negative: a step of no token.
enum Place : int32_t { kGhost = -1, kSkip = -2 };
// What a tile's steps have to look out for; tiles that a team walks side by side have the same flags.
enum TileFlag : int32_t {
  kRepeats = 1,  // a token comes twice
  kHoles = 2,    // there are steps of no token, or steps past the end (which are skipped)
  kResets = 4,   // the state starts anew
  kGhosts = 8,   // there are steps of no token before the end
};

// How a block that goes along routes with pairs of channels, or quads, lies in shared memory, see
// pairs.cuh.
struct PairLayout {
  int pairs;                       // of a block; 0: a kernel without pairs
  int channels;                    // of a lane: 2, or of quads 4
  int team;                        // warps that walk neighbouring tiles of a pair side by side
  int rounds;                      // of a route
  int helpers;                     // warps without channels
  int buffer_tiles, buffers_log2;  // tiles of a buffer of rows; buffers, which take turns
  int route_mask;                  // tables of that many routes and one more are kept
  int rank_blocks, dt_blocks;      // of eight: of ranks; of rows in shared memory
  int items;                       // of a pair's table
  int pitch;                       // tokens of a plane, with spare ones in between
  int spare_after[2];              // spare tokens of a plane: one after every 2^n
  int at_once;              // neighbouring steps of delta, B, C that can be read at once: 8, 4, 1
  int B, C, place, buffer;  // bytes: where they are in a buffer of rows, and how large that is
  int buffers, weight, table, map, words, sums;  // bytes: where they are
  int map_turn;                                  // bytes: of the maps of all teams
  // Of the backward: words of dy, shares of dB and dC, ddelta, sums of each team and of each helper.
  int dy, shares, ddelta, team_sums, helper_sums;
  int64_t bytes;  // of all

  // Where a token is in a plane.
  STATESCAN_HOST_DEVICE int position(int token) const {
    return token + (token >> spare_after[0]) + (token >> spare_after[1]);
  }
};

// How a problem is dealt out. `Problem::chunk` is the tile.
struct Plan {
  int channels;    // of a block; 0: not even one channel's states fit in shared memory
  int64_t blocks;  // of channels
  bool on_chip;    // planes are in shared memory
  bool fast;       // .. and the state never starts anew
  bool together;   // all rows of narrow operands fit in a pass
  bool halves;     // u and dy share words
  int rows;        // in shared memory at a time, twice
  int table;       // elements of a channel's tables
  int pitch;       // tokens of a plane, with spare ones in between
  PairLayout pair;
  int64_t shared_bytes;
  int64_t grid;            // blocks of the launch
  int64_t plane_elements;  // in global memory, for all blocks of the launch
};

// Where all parts of a route are walked at the same time (parts.cuh): how they are dealt out, and the
// memory that they work in, of floats. Planes are (token, 32 channels) for each group of 32 channels.
struct Parts {
  int64_t count;   // of a route; 0: routes are walked as wholes
  int64_t groups;  // of 32 channels
  int warps;       // of a block: a group each
  int at_once;     // routes at the same time, each with planes of its own to add to
  int64_t shared_bytes;
  int64_t plane_elements;  // of one kind, of all batch elements and groups
  int line_bytes;          // of a token in a plane

  float *u, *dy;  // (batch, route or 1, group) planes
  float *y, *du;  // (batch, at_once, group) planes, which begin as zeros; backward: y with a gate
  float *h, *dh;  // (batch, route, part, state, dim): what a part makes of 0, then what enters it
  float* step_sums;  // (batch, route, part, dim), of the step sizes
  int32_t* repeats;  // (batch or 1, route): a token comes twice, so its parts are walked in turn

  STATESCAN_HOST_DEVICE int64_t blocks() const { return (groups + warps - 1) / warps; }
};

struct Inputs : Problem {
  const int32_t* place;  // (batch or 1, route, tile, chunk)
  const int32_t* flags;  // (batch or 1, route, tile)
  // Of quads with D: visits of a token by a route (batch or 1, route, token), and whether any of them is
  // not 1. Else null.
  int32_t *visits, *visited_otherwise;
  bool place_per_batch;
  int64_t tiles;  // of a route
  Plan plan;
  void* planes;  // (block, kind, channel, pitch); null: in shared memory
  Parts parts;

  STATESCAN_HOST_DEVICE int64_t tables() const { return place_per_batch ? batch : 1; }
};

struct FwdParams : Inputs {
  View<4> y;           // (batch, route or 1, dim, token)
  View<4> last_state;  // (batch, route, dim, state); with carry of the last route only
  void* chunk_states;  // (batch, route, tile, state, dim) in the compute type, or null
};

struct BwdParams : Inputs {
  const void* chunk_states;
  View<4> dy;           // (batch, route or 1, dim, token), absent: zero
  View<4> dlast_state;  // as last_state, or absent

  View<4> du;              // (batch, route or 1, dim, token)
  View<4> ddelta;          // (batch, route, dim, step), not yet summed over delta_repeat; where the
                           // routes share delta in the compute type, with route stride 0
  View<3> dz;              // (batch, dim, token)
  View<4> dinitial_state;  // as initial_state, or absent
  // Partial sums, in the compute type, to be added up in order. All of them have a route axis.
  void *dB, *dC;                      // (block of channels, route, batch, step, state)
  void* ddt;                          // (block of channels, route, batch, rank, step)
  void* dA;                           // (batch, route, dim, state)
  void* ddt_weight;                   // (batch, route, dim, rank)
  void *dD, *ddelta_bias, *dweights;  // (batch, route, dim)
};

// `shared_limit`: bytes of shared memory that a block can have. `dy` is of the backward, absent: zero.
Plan plan(const Problem& p, bool backward, const View<4>& dy, int64_t shared_limit);

// `whole`: what plan() says.
Parts plan_parts(const Problem& p, bool backward, const Plan& whole, int64_t shared_limit);

// Fills Parts::repeats, which are zeros as `visits` (batch or 1, route, token) are.
void find_repeats(const Inputs& p, int32_t* visits, cudaStream_t stream);

// Fills Inputs::place, flags and visits, which begin as zeros. Entries of the table that are no tokens become ghosts (but -2 a
// skip): whatever the table holds, no kernel leaves a tensor.
void find_places(const Inputs& p, int32_t* place, int32_t* flags, cudaStream_t stream);

void fwd(const FwdParams& p, cudaStream_t stream);
void fwd_pairs(const FwdParams& p, cudaStream_t stream);  // what fwd does if the plan has pairs
void fwd_quads(const FwdParams& p, cudaStream_t stream);  // .. of four channels
void bwd(const BwdParams& p, cudaStream_t stream);
void bwd_pairs(const BwdParams& p, cudaStream_t stream);
void fwd_in_parts(const FwdParams& p, cudaStream_t stream);
void bwd_in_parts(const BwdParams& p, cudaStream_t stream);

}  // namespace statescan::selective_scan_2d::cuda
