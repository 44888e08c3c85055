"""What happens before step 1: the command line, checks, loading, the plan."""
