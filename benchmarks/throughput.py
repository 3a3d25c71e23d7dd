#!/usr/bin/env python3
""" Measure throughput beside the paper's: `splitmixer-timm benchmark` from a checkout.

    python benchmarks/throughput.py --help
"""
import sys

from splitmixer_timm.cli import main

if __name__ == '__main__':
    sys.exit(main(['benchmark', *sys.argv[1:]]))
