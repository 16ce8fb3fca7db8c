// Runs the conformance kernels on the GPU: nvcc conformance.cu conformance_main.cpp.
#include <cstdio>

extern "C" {
int conformance_count();
const char* conformance_name(int i);
const char* conformance_run(int i, int fault);
}

int main() {
  int failed = 0;
  for (int i = 0; i < conformance_count(); ++i) {
    const char* error = conformance_run(i, 0);
    failed += *error != 0;
    std::printf("%-24s %s\n", conformance_name(i), *error ? error : "as it should be");
  }
  return failed != 0;
}
