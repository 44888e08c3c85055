"""Is it really better: held-out answers, comparison, intervals, what rewards reward."""
