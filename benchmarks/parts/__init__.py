"""The measurements that `benchmarks.system` runs, one file each."""
