#include "causal_conv1d/kernels.h"

#include <algorithm>

namespace statescan::causal_conv1d {
namespace {

constexpr int64_t kTile = 64;  // as in cpu_walk.h

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of x that one task should see: enough to hide what a task costs, few enough for tasks
// to be shared out evenly.
constexpr int64_t kTaskElements = 1 << 16;

int64_t steps_for(int64_t channels, int64_t least) {
  return std::max(least, kTaskElements / std::max<int64_t>(channels, 1));
}

int64_t block_channels(const Problem& p) { return std::min(p.dim, p.block_units * kUnit); }

int64_t rows_units(const Problem& p, int64_t steps) {
  const int64_t row = std::max<int64_t>(std::min(p.seqlen, steps), 1);
  return divide_up(std::max<int64_t>(kTaskElements / row, 1), kUnit);
}

}  // namespace

Layout layout_of(const Problem& p, std::initializer_list<const View<3>*> operands) {
  const DType dtype = (*operands.begin())->dtype;
  bool channel_last = p.dim >= kUnit, channel_first = p.seqlen >= 2 * kUnit;
  for (const View<3>* x : operands) {
    if (!*x || x->dtype != dtype) return Layout::kStrided;
    channel_last = channel_last && x->stride[1] == 1;
    channel_first = channel_first && x->stride[2] == 1;
  }
  if (p.compute == DType::kFloat64 || p.width > kFastWidth) return Layout::kStrided;
  return channel_last    ? Layout::kChannelLast
         : channel_first ? Layout::kChannelFirst
                         : Layout::kStrided;
}

std::vector<Piece> cut(const Problem& p, int64_t steps, bool padded) {
  std::vector<Piece> pieces;
  const std::vector<Segment>& segments = p.segments->segments;
  for (int64_t s = 0; s < int64_t(segments.size()); ++s) {
    const int64_t length = segments[s].end - segments[s].begin;
    const int64_t count = std::max<int64_t>(divide_up(length, steps), 1);
    for (int64_t i = 0; i < count; ++i) {
      pieces.push_back({s, i * steps, std::min((i + 1) * steps, length)});
    }
    if (padded && !segments[s].padding) pieces.back().end = length + p.width - 1;
  }
  return pieces;
}

// Channel-last forward: whole rows of the tensor, so that memory is read in one stream.
void FwdParams::plan() {
  block_units = layout == Layout::kChannelLast    ? 128
                : layout == Layout::kChannelFirst ? rows_units(*this, piece_steps())
                                                  : 4;
}

int64_t FwdParams::piece_steps() const {
  if (layout == Layout::kChannelFirst) return 8192;
  return layout == Layout::kChannelLast ? steps_for(std::min<int64_t>(dim, 2048), 32) : 1024;
}

int64_t FwdParams::grain() const {
  const int64_t elements = batch * dim * seqlen;
  return std::max<int64_t>(1, tasks() * (kTaskElements / 4) / std::max<int64_t>(elements, 1));
}

int64_t FwdParams::scratch_bytes() const {
  const int64_t scalars = kTile * (2 * kTile + width - 1) + width * kUnit;
  return scalars * element_bytes(compute) + 8 * 64;
}

// Channel-last backward: the sums and what is carried from one step to the next, (2 width) rows of
// a block, stay in the first-level cache.
void BwdParams::plan() {
  block_units = layout == Layout::kChannelLast    ? 16
                : layout == Layout::kChannelFirst ? rows_units(*this, piece_steps())
                                                  : 4;
}

int64_t BwdParams::piece_steps() const {
  if (layout == Layout::kChannelFirst) return 8192;
  return layout == Layout::kChannelLast ? steps_for(std::min<int64_t>(dim, 256), 64) : 1024;
}

int64_t BwdParams::grain() const {
  const int64_t elements = batch * dim * seqlen;
  return std::max<int64_t>(1, tasks() * (kTaskElements / 8) / std::max<int64_t>(elements, 1));
}

int64_t BwdParams::scratch_bytes() const {
  const int64_t channels = block_channels(*this) + 2 * kUnit;
  const int64_t scalars = 3 * kTile * (kTile + width - 1)             // tiles of x, dy, dx
                          + (3 * width + 1) * channels                // carry, sums, unused sums
                          + (width + 1) * kUnit + 4 * kTile + width;  // of a row
  return scalars * element_bytes(compute) + 16 * 64;
}

// Waking another thread costs as much as some 16000 elements.
int64_t UpdateParams::grain() const {
  const int64_t elements = batch * dim * tokens;
  return std::max<int64_t>(1, tasks() * 16384 / std::max<int64_t>(elements, 1));
}

int64_t UpdateParams::scratch_bytes() const {
  const int64_t rows = std::max(state_len, width) + 2 * tokens;
  const int64_t scalars = (width + 1) * kChannels + rows * kUnit;
  return scalars * element_bytes(compute) + 4 * 64;
}

}  // namespace statescan::causal_conv1d
