#include "gated_rms_norm/shape.h"

#include <algorithm>

namespace statescan::gated_rms_norm {

bool merge_rows(Shape& p, int rank, const int64_t* sizes, const std::vector<Operand>& operands) {
  std::vector<int64_t> merged;
  std::vector<int> last;  // the innermost dimension of each merged one
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == 1) continue;
    bool joins = !last.empty();
    for (const Operand& o : operands) {
      joins = joins && o.strides[last.back()] == sizes[i] * o.strides[i];
    }
    if (joins) {
      merged.back() *= sizes[i], last.back() = i;
    } else {
      merged.push_back(sizes[i]), last.push_back(i);
    }
  }
  const int count = int(merged.size());
  if (count > kLead) return false;
  std::fill(p.lead, p.lead + kLead, 1);
  std::copy(merged.begin(), merged.end(), p.lead + kLead - count);
  for (const Operand& o : operands) {
    std::fill(o.view->stride, o.view->stride + kLead, 0);
    for (int i = 0; i < count; ++i) o.view->stride[kLead - count + i] = o.strides[last[i]];
    o.view->stride[kLead] = o.strides[rank];
  }
  return true;
}

}  // namespace statescan::gated_rms_norm
