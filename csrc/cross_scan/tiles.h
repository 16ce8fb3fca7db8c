// The tiles that large maps are taken apart into.
#pragma once

namespace statescan::cross_scan::cuda {

inline constexpr int kTile = 64;  // tokens square: 128 bytes of a row or column of 16-bit elements

}  // namespace statescan::cross_scan::cuda
