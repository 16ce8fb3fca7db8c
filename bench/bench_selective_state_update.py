"""python bench/bench_selective_state_update.py [options of python -m statescan.bench]"""

import sys

from statescan.bench.__main__ import keep_freed_memory, main

if __name__ == "__main__":
    keep_freed_memory()
    main(["selective_state_update", *sys.argv[1:]])
