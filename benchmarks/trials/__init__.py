"""Small measurements that settle one question each; `python -m benchmarks.trials.NAME` goes on where it stopped."""
