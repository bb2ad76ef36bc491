"""One engine over several hosts: the leader schedules, and sends each call of its runner to the followers, which make
the same call."""
