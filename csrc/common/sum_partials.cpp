#include "common/sum_partials.h"

#include "common/tile.h"

namespace statescan::partials {
namespace STATESCAN_ISA {
namespace {

constexpr int kRows = 64;  // of n, in one tile

// tile[t, n] = the sum for these steps and rows of one (i, j).
template <class R>
void sum_tile(const SumParams& p, const R* from, int rows, int steps, R* tile, int pitch) {
  for (int64_t part = 0; part < p.parts; ++part, from += p.count) {
    for (int t = 0; t < steps; ++t) {
      for (int n = 0; n < rows; ++n) {
        R& sum = tile[t * pitch + n];
        const R share = from[t * p.size[3] + n];
        sum = part == 0 ? share : sum + share;
      }
    }
  }
}

template <class R>
void sum_tasks(const SumParams& p, const Range& range) {
  alignas(64) R tile[SumParams::kSteps * kRows];
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t begin = task % p.tiles() * SumParams::kSteps, ij = task / p.tiles();
    const int64_t left = p.size[2] - begin;
    const int steps = int(left < SumParams::kSteps ? left : SumParams::kSteps);
    const R* from = static_cast<const R*>(p.partial) + (ij * p.size[2] + begin) * p.size[3];
    const int64_t i = ij / p.size[1], j = ij % p.size[1];
    const Plane out =
        Plane{p.out.data, p.out.dtype, p.out.stride[3], p.out.stride[2]}.at(0, begin).shifted(
            i * p.out.stride[0] + j * p.out.stride[1]);
    for (int64_t n = 0; n < p.size[3]; n += kRows) {
      const int rows = int(p.size[3] - n < kRows ? p.size[3] - n : kRows);
      const int pitch = tile_pitch<R>(rows);
      sum_tile(p, from + n, rows, steps, tile, pitch);
      store_tile(out.at(n, 0), rows, steps, tile, pitch);
    }
  }
}

}  // namespace

void sum(const SumParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return sum_tasks<double>(p, range);
  sum_tasks<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::partials
