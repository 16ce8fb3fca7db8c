"""python bench/bench_gated_rms_norm.py [options of python -m statescan.bench]"""

import sys

from statescan.bench.__main__ import keep_freed_memory, main

if __name__ == "__main__":
    keep_freed_memory()
    main(["gated_rms_norm", *sys.argv[1:]])
