"""python bench/bench_cross_scan.py [options of python -m statescan.bench]"""

import sys

from statescan.bench.__main__ import keep_freed_memory, main

if __name__ == "__main__":
    keep_freed_memory()
    main(["cross_scan", "cross_merge", *sys.argv[1:]])
