"""python bench/bench_mamba2_step.py [options of python -m statescan.bench]"""

import sys

from statescan.bench.__main__ import keep_freed_memory, main

if __name__ == "__main__":
    keep_freed_memory()
    main(["mamba2_step", *sys.argv[1:]])
