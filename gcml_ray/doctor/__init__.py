"""``gcml doctor``: whether machine and configuration fit, and what a run will need."""
