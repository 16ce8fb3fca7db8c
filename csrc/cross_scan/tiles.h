// The tiles that large maps are taken apart into.
#pragma once

namespace statescan::cross_scan::cuda {

inline constexpr int kTile = 64;  // tokens square: 128 bytes of a row or column of 16-bit elements
// Smaller maps would leave too much of a tile empty; they go by tables, see route_gather/gather.cu.
inline constexpr int kLeastSide = 48;

}  // namespace statescan::cross_scan::cuda
