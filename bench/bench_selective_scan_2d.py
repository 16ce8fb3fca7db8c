"""python bench/bench_selective_scan_2d.py [options of python -m statescan.bench]"""

import sys

from statescan.bench.__main__ import keep_freed_memory, main

if __name__ == "__main__":
    keep_freed_memory()
    main(["selective_scan_2d", *sys.argv[1:]])
