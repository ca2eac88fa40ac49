"""Who sends to whom: phases of a run, topologies, and what the past makes of the next graphs."""
