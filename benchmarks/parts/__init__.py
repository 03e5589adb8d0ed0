"""The measurements that `benchmarks.system` puts together, one file each."""
